"""A store that is trusted for days: two writers, kills of every process of a study, rows and pages damaged in every way, a full disk, progress; and a warm run against a fresh kernel, bit for bit.
What papermill does is played where only the store is asked; the rest are real processes, signals and files, most of them with a page of their own that costs nothing."""
import contextlib, errno, fcntl, itertools, json, math, os, pty, re, shutil, signal, socket, struct, subprocess, sys, termios, threading, time, warnings
from dataclasses import asdict, fields
from pathlib import Path

import joblib
import nbformat
import papermill
import pandas as pd
import psutil
import pytest
import torch
from filelock import FileLock
from joblib.externals.loky import get_reusable_executor
from papermill.exceptions import PapermillExecutionError

from xprune_nb.data import load
from xprune_nb.experiments import (LATER, ROW_MIME, HIDDEN, Cache, Died, Orphaned, Run, Warm, asked_for, carry_out, clean, execute, execute_one, export, grid, prune_steps, read_row, remaining, row, row_of, rows, run_notebook,
                                   run_of, status, store as room)
from xprune_nb.model import baseline

says = lambda *parts: '.*'.join(map(re.escape, parts))
found = lambda folder: sorted(p.name for p in Path(folder).iterdir() if p.name != HIDDEN)
unfinished = lambda folder: sorted(p.name for p in Path(folder).rglob('*') if 'part' in p.name or p.suffix == '.progress')
FIELDS = [f.name for f in fields(Run)]
timeless = lambda r: {k: v for k, v in r.items() if not k.startswith(('seconds', 'latency')) and k not in ('written', 'page')}
SHORT = dict(criterion='random', epochs=0, images=10)  # as short as a run can be
RUNS = grid(**SHORT, seed=[0, 1, 2, 3])
ROOT = Path(__file__).resolve().parent.parent

def until(true, seconds=90, what='it'):
    "Wait until something is true, and say what it was"
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f'{what} did not happen in {seconds} s'
        time.sleep(.05)
    return found

# --- a store: what papermill would do is played here ---

def page(r=None):
    "An executed notebook, with its row if it has one"
    outputs = [] if r is None else [nbformat.v4.new_output('display_data', {ROW_MIME: r, 'text/plain': 'row'})]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# One run'), nbformat.v4.new_code_cell('emit(row)', outputs=outputs), nbformat.v4.new_code_cell('1')])

class Player:
    "Plays papermill: writes the page, and gives its row; `breaks` says for which seeds it dies of what"
    def __init__(self): self.runs, self.breaks = [], {}
    def __call__(self, run, out, work, wanted, fresh):
        self.runs.append(run)
        assert wanted() and not fresh and out.parent == work
        r = dict(asdict(run), run_id=run.id, status='done', error='', accuracy=run.seed/100)
        nbformat.write(page() if run.seed in self.breaks else page(r), out)
        if isinstance(e := self.breaks.get(run.seed), BaseException): raise e
        return row_of(nbformat.read(out, 4))

@pytest.fixture
def player(monkeypatch): monkeypatch.setattr(room, 'carry_out', p := Player()); return p

def play(runs, store, **kw): return execute(runs, store, **dict(dict(backend='threading', n_jobs=2, progress=False), **kw))

error_of = lambda e: PapermillExecutionError(0, 1, 'cell', 'ValueError', e, [f'ValueError: {e}'])
contents = lambda folder: {n: ((Path(folder)/n).stat().st_mtime_ns, (Path(folder)/n).read_bytes()) for n in found(folder)}

def test_done_runs_are_not_done_again(player, tmp_path):
    first = play(RUNS[:3], tmp_path)
    before = contents(tmp_path)
    second = play([*RUNS, *RUNS[:2]], tmp_path)
    assert [r.seed for r in player.runs[3:]] == [3] and {n: v for n, v in contents(tmp_path).items() if n in before} == before
    assert first.equals(second[:3]) and second.run_id.tolist() == [r.id for r in RUNS]  # in the order asked for, each once
    assert found(tmp_path) == sorted(r.id + s for r in RUNS for s in ('.ipynb', '.json')) and set(FIELDS) <= set(second) and unfinished(tmp_path) == []
    assert sorted(rows(tmp_path).run_id) == sorted(second.run_id) and rows(tmp_path, RUNS[2:0:-1]).seed.tolist() == [2, 1]

def test_a_failed_run_is_recorded_and_the_rest_go_on(player, tmp_path):
    player.breaks = {1: error_of('ratio 0.99 would leave a layer without a filter'), 2: 'no row', 3: RuntimeError()}
    table = play(RUNS, tmp_path)
    assert table.status.tolist() == ['done', 'failed', 'failed', 'failed'] and sorted(r.seed for r in player.runs) == [0, 1, 2, 3]
    assert table.error[0] == '' and 'would leave a layer without a filter' in table.error[1] and 'ended without a row' in table.error[2] and table.error[3] == 'RuntimeError'
    assert table[FIELDS].to_dict('records') == [asdict(r) for r in RUNS] and len(found(tmp_path)) == 8  # its page is kept beside it
    assert play(RUNS, tmp_path, retry_failed=False).status.tolist() == table.status.tolist() and len(player.runs) == 4
    player.breaks = {3: player.breaks[3]}
    assert play(RUNS, tmp_path).status.tolist() == ['done', 'done', 'done', 'failed'] and sorted(r.seed for r in player.runs[4:]) == [1, 2, 3]

def test_a_run_that_was_killed_is_tried_once_more(player, tmp_path, monkeypatch):
    "And one whose study is gone is nobody's any more"
    ends = iter([Died('the run was killed (signal 9, SIGKILL)'), None, Died('first'), Died('the run was killed (signal 9, SIGKILL)')])
    def killed(*args):
        if e := next(ends): raise e
        return player(*args)
    monkeypatch.setattr(room, 'carry_out', killed)
    assert play(RUNS[:1], tmp_path).status.tolist() == ['done']
    nbformat.write(page(), tmp_path/f'{RUNS[1].id}.ipynb')  # of an earlier attempt
    assert play(RUNS[1:2], tmp_path).error.tolist() == ['the run was killed (signal 9, SIGKILL), twice'] and not (tmp_path/f'{RUNS[1].id}.ipynb').exists()
    def gone(*args): raise Orphaned('the study is gone')
    monkeypatch.setattr(room, 'carry_out', gone)
    with pytest.raises(Orphaned): execute_one(RUNS[2], tmp_path)
    assert len(found(tmp_path)) == 3 and unfinished(tmp_path) == []  # a row with its page, and one without

# --- a row is what its name says ---

@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '"row"', '{}', '{"run_id": 1}', '{"accuracy": 0.5}', '\0'*500, 'NaN', b'\xff\xfe\x80', '['*10**5], ids=lambda o: repr(o)[:20])
def test_what_is_no_row_is_run_again(player, tmp_path, text):
    path = tmp_path/f'{RUNS[0].id}.json'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match=re.escape(path.name)): assert len(rows(tmp_path)) == 0
    with pytest.warns(UserWarning, match=re.escape(path.name)): assert play(RUNS[:1], tmp_path).status.tolist() == ['done'] and len(player.runs) == 1
    assert read_row(path)['seed'] == 0

@pytest.mark.filterwarnings('ignore:.*is no whole row')
def test_no_half_row_is_taken_for_a_whole_one(player, tmp_path):
    path, = (tmp_path/f"{r}.json" for r in play(RUNS[:1], tmp_path).run_id)
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        assert read_row(path) is None, whole[:n]
    assert play(RUNS[:1], tmp_path).seed.tolist() == [0] and len(player.runs) == 2 and read_row(path).keys() == json.loads(whole).keys()

OTHERS = [(dict(ratio=.7), 'it holds another run, oneshot-random-0.7-seed0-'), (dict(seed=1), 'it holds another run, oneshot-random-0.5-seed1-'), (dict(criterion='lrp'), 'it holds another run, oneshot-lrp-'), (dict(threads=2), 'it holds another run'),
          (dict(run_id='x'), "its run_id is 'x'"), (dict(status='gone'), "no status called 'gone'"), (dict(status=None), 'no status called'), (dict(seed=1.5), 'seed is 1.5 (float), expected int'), (dict(lr=None), 'lr is None'), (dict(ratio='0.5'), "ratio is '0.5' (str)"),
          (dict(criterion='lpr'), "no criterion called 'lpr'"), (dict(accuracy=math.nan), 'its accuracy is nan, expected a share in [0, 1]'), (dict(accuracy=7), 'its accuracy is 7'), (dict(accuracy=-.1), 'its accuracy is -0.1'), (dict(accuracy='0.5'), "its accuracy is '0.5'"),
          (dict(accuracy=True), 'its accuracy is True'), (dict(accuracy=None), 'its accuracy is None'), (dict(accuracy=[.5]), 'its accuracy is [0.5]'), (dict(accuracy_dense=math.inf), 'its accuracy_dense is inf'), (dict(accuracy_pruned='x'), "its accuracy_pruned is 'x'"),
          (dict(seconds='1'), "its seconds is '1'"), (dict(seconds=math.nan), 'its seconds is nan'), (dict(written='now'), "its written is 'now'"), (dict(error=None), 'its error is None'), (dict(page=3), 'is not the page that was written with it')]
MISSING = ['data', 'criterion', 'ratio', 'seed', 'lr', 'run_id', 'status', 'error', 'seconds', 'accuracy']

@pytest.mark.parametrize('change,said', [*OTHERS, *(((k,), f"it does not say '{k}'") for k in MISSING)], ids=str)
def test_a_row_that_is_not_what_its_name_says(player, tmp_path, change, said):
    "It is named by its file, left out of the table, and made again; its neighbour is not"
    play(RUNS[:2], tmp_path)
    path, other = (tmp_path/f'{r.id}.json' for r in RUNS[:2])
    r = json.loads(path.read_text())
    path.write_text(json.dumps(r | change if isinstance(change, dict) else {k: v for k, v in r.items() if k not in change}))
    with pytest.warns(UserWarning) as warned: assert rows(tmp_path).seed.tolist() == [1]
    assert [str(w.message).startswith(f'{path.name} is no whole row: ') and said in str(w.message) and 'made again' in str(w.message) for w in warned] == [True], [str(w.message) for w in warned]
    assert status(tmp_path).state.tolist() == ['damaged', 'done']
    before = other.stat().st_mtime_ns
    with pytest.warns(UserWarning, match=re.escape(path.name)): table = play(RUNS[:2], tmp_path)
    assert table.status.tolist() == ['done', 'done'] and [r.seed for r in player.runs[2:]] == [0] and other.stat().st_mtime_ns == before
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert timeless(read_row(path)) == timeless(r)

def foreign(path): nbformat.write(page(dict(read_row(path.with_name(f'{RUNS[1].id}.json')))), path)
HARMS = dict(missing=lambda p: p.unlink(), empty=lambda p: p.write_bytes(b''), garbled=lambda p: p.write_bytes(p.read_bytes()[:-40] + b'\0'*40), cut=lambda p: p.write_bytes(p.read_bytes()[:-3]), anothers=lambda p: shutil.copy(p.with_name(f'{RUNS[1].id}.ipynb'), p), foreign=foreign,
             fresh=lambda p: shutil.copy(run_notebook(), p), link=lambda p: (p.unlink(), p.symlink_to('nowhere')))

@pytest.mark.parametrize('old', [False, True])
@pytest.mark.parametrize('harm', HARMS)
def test_a_done_row_beside_a_page_that_is_not_its_own(player, tmp_path, harm, old):
    "Also of a row from before rows had a digest of their page"
    play(RUNS[:2], tmp_path)
    path, notebook = tmp_path/f'{RUNS[0].id}.json', tmp_path/f'{RUNS[0].id}.ipynb'
    if old: path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in ('page', 'written')})); assert read_row(path)
    HARMS[harm](notebook)
    with pytest.warns(UserWarning, match=says(f'{path.name} is no whole row: ', notebook.name)): assert rows(tmp_path).seed.tolist() == [1]
    with pytest.warns(UserWarning, match=re.escape(path.name)): play(RUNS[:2], tmp_path)
    assert [r.seed for r in player.runs[2:]] == [0] and row_of(nbformat.read(notebook, 4)).items() <= read_row(path).items()

@pytest.mark.parametrize('suffix', ['.json', '.ipynb'])
def test_a_folder_in_the_place_of_a_file(player, tmp_path, suffix):
    "It is moved aside with all that is in it, not deleted"
    play(RUNS[:2], tmp_path)
    path = tmp_path/f'{RUNS[0].id}{suffix}'
    path.unlink(); path.mkdir(); (path/'mine').write_text('precious')
    with pytest.warns(UserWarning, match=says(f'{RUNS[0].id}.json is no whole row: ', 'is a folder')): assert rows(tmp_path).seed.tolist() == [1]
    with pytest.warns(UserWarning, match=re.escape(RUNS[0].id)): assert play(RUNS[:2], tmp_path).status.tolist() == ['done', 'done']
    aside, = tmp_path.glob(f'{path.name}.aside-*')
    assert (aside/'mine').read_text() == 'precious' and path.is_file() and [r.seed for r in player.runs[2:]] == [0]
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert rows(tmp_path, RUNS[:2]).seed.tolist() == [0, 1]

def test_rows_written_before_there_was_a_choice(tmp_path):
    "They have the defaults, and their page proves itself by the row that it carries"
    r = dict(asdict(RUNS[0]), run_id=RUNS[0].id, status='done', error='', accuracy=.5)
    old = {k: v for k, v in r.items() if k not in LATER}
    (tmp_path/f'{RUNS[0].id}.json').write_text(json.dumps(old | dict(seconds=1.)))
    nbformat.write(page(old), tmp_path/f'{RUNS[0].id}.ipynb')
    assert run_of(old) == RUNS[0]
    assert rows(tmp_path)[FIELDS].to_dict('records') == [asdict(RUNS[0])] and play(RUNS[:1], tmp_path).run_id.tolist() == [RUNS[0].id]

def test_row_of_takes_the_last_and_wants_one():
    nb = page(dict(run_id='a')); nb.cells += page(dict(run_id='b')).cells
    assert row_of(nb)['run_id'] == 'b'
    with pytest.raises(ValueError, match='ended without a row'): row_of(page())

# --- a full disk, an interruption, nothing there ---

@pytest.mark.parametrize('way,nth', list(itertools.product(['fsync', 'replace'], [1, 2, 3, 4, 5])))
def test_a_full_disk_stops_the_study_in_a_sentence(player, tmp_path, monkeypatch, way, nth):
    "While what was asked for, a page or its row is written: no half file, nothing done is lost, and it goes on when there is room"
    with monkeypatch.context() as m:
        calls, real = iter(range(1, 100)), getattr(os, way)
        def full(*args):
            if next(calls) == nth: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)
        m.setattr(os, way, full)
        with pytest.raises(OSError, match=says('could not be written (No space left on device)', 'Free some space')): play(RUNS[:2], tmp_path, n_jobs=1)
    done = [n for n in found(tmp_path) if n.endswith('.json')]
    assert len(done) == (nth > 3) and unfinished(tmp_path) == [] and all(read_row(tmp_path/n) for n in done)
    assert play(RUNS[:2], tmp_path).status.tolist() == ['done', 'done'] and len(player.runs) == (2 if nth == 1 else 3)

def test_a_full_disk_while_papermill_writes(player, tmp_path):
    player.breaks = {0: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))}
    with pytest.raises(OSError, match=says(f'{RUNS[0].id}.ipynb could not be written (No space left on device)', 'Free some space')): play(RUNS[:1], tmp_path)
    assert found(tmp_path) == unfinished(tmp_path) == []

def test_an_interruption_leaves_nothing_half(player, tmp_path):
    player.breaks = {0: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt): execute_one(RUNS[0], tmp_path)
    assert found(tmp_path) == unfinished(tmp_path) == []

def test_stores_that_are_not_there(tmp_path):
    for look in rows, clean:
        with pytest.raises(OSError, match=says('there is no store', 'nowhere', 'nothing was run there')): look(tmp_path/'nowhere')
    for look in asked_for, status:
        with pytest.raises(OSError, match=says('there is no study in', 'nothing was run there')): look(tmp_path/'nowhere')
    assert len(rows(tmp_path)) == 0 and not (tmp_path/'nowhere').exists()
    (tmp_path/'file').write_text('mine')
    for path in tmp_path/'file', tmp_path/'file'/'below':
        with pytest.raises(OSError, match='is a file, expected a folder'): play(RUNS, path)
    assert (tmp_path/'file').read_text() == 'mine'

def test_a_package_without_its_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv('XPRUNE_NBS', str(tmp_path))
    with pytest.raises(OSError, match=says('there is no ', 'run.ipynb. Install from a clone', 'XPRUNE_NBS')): execute_one(RUNS[0], tmp_path)
    assert found(tmp_path) == unfinished(tmp_path) == []  # it is no run that failed
    monkeypatch.delenv('XPRUNE_NBS'); assert run_notebook().name == 'run.ipynb'

# --- what can't be a study is refused at once ---

@pytest.mark.parametrize('call,message', [
    (lambda s: Run(threads=0), 'threads is 0, expected at least 1'), (lambda s: Run(schedule='iterative', steps=10**30), 'expected at most 1000'), (lambda s: grid(seed=[0, 1], threads=0), 'threads is 0'),
    *[(lambda s, n=n: execute(RUNS, s, n_jobs=n), f'n_jobs is {n!r}, expected a number of runs at a time, at least 1') for n in (0, -1, '2', True, 1.5, math.nan)],
    (lambda s: execute(RUNS, ''), "store is '', expected the name of a folder"), (lambda s: execute(RUNS, '  '), "store is ''"), (lambda s: execute(RUNS, None), 'store is None'), (lambda s: execute(RUNS, 3), 'store is 3'),
    (lambda s: execute(RUNS[0], s), 'runs is a Run, expected a list of runs: grid(...), or [run]'), (lambda s: execute('runs', s), 'runs is a str'), (lambda s: execute(asdict(RUNS[0]), s), 'runs is a dict'), (lambda s: execute(None, s), 'runs is a NoneType'), (lambda s: execute(3, s), 'runs is a int'),
    (lambda s: execute([RUNS[0], 'lrp'], s), "'lrp' is among the runs, expected a Run"), (lambda s: execute([asdict(RUNS[0])], s), 'is among the runs, expected a Run'), (lambda s: execute([Run], s), 'is among the runs, expected a Run'),
    (lambda s: execute(RUNS, s, backend='lokky'), "no backend called 'lokky'; did you mean 'loky'? There are: loky, threading, sequential, dask, ray"), (lambda s: execute(RUNS, s, backend=None), "no backend called 'None'"),
    (lambda s: execute(RUNS, s, known=[1]), 'known is a list, expected a table of rows'), (lambda s: execute(RUNS, s, known=pd.DataFrame(dict(a=[1]))), "known has no column 'run_id'")], ids=lambda o: o[:60] if isinstance(o, str) else 'call')
def test_what_can_not_be_a_study_is_refused_at_once(tmp_path, monkeypatch, call, message):
    "Before anything is written or started"
    def never(*args, **kw): raise AssertionError('a run was started')
    monkeypatch.setattr(room, 'execute_one', never); monkeypatch.chdir(tmp_path); begin = time.perf_counter()
    with pytest.raises((ValueError, TypeError), match=re.escape(message)): call(tmp_path/'store')
    assert list(tmp_path.iterdir()) == [] and time.perf_counter() - begin < 2

def test_no_runs_are_no_study(tmp_path): assert len(execute([], tmp_path, progress=False)) == 0 and len(execute((r for r in ()), tmp_path, progress=False)) == 0

# --- real processes: a page that costs nothing, and does what it is told ---

TOY = '''import os, time
from dataclasses import asdict
from pathlib import Path
from xprune_nb import experiments as ex
run, toy = ex.asked(globals()), Path(os.environ['TOY'])
with open(toy/'log', 'a') as f: print(run.seed, os.getpid(), os.getppid(), file=f)
ex.teller()(what='retraining', step=1, steps=1, epoch=3, epochs=15)
print('a line that no one waits for')
if (toy/f'{run.seed}.py').exists(): exec((toy/f'{run.seed}.py').read_text())
while (toy/f'hold-{run.seed}').exists(): time.sleep(.02)
ex.emit(dict(asdict(run), run_id=run.id, status='done', error='', accuracy_dense=.8, accuracy_pruned=.1, accuracy_recalibrated=.3, accuracy=.25 + run.seed/100))'''

class Toy:
    "A folder with a run.ipynb that says in a log which runs begin, in which process; runs wait while they are on hold, or do what they are told first"
    def __init__(self, folder):
        self.folder = Path(folder)
        asked = nbformat.v4.new_code_cell('\n'.join(f'{k} = {v!r}' for k, v in asdict(Run()).items()), metadata=dict(tags=['parameters']))
        nb = nbformat.v4.new_notebook(cells=[asked, *map(nbformat.v4.new_code_cell, TOY.split('\n', 5))], metadata=dict(kernelspec=dict(name='python3', language='python', display_name='python3')))
        nbformat.write(nb, self.folder/'run.ipynb')
        self.env = dict(XPRUNE_NBS=str(folder), TOY=str(folder))
    def begun(self): return [tuple(map(int, line.split())) for line in (self.folder/'log').read_text().splitlines()] if (self.folder/'log').exists() else []  # seed, pid, parent
    def seeds(self): return [seed for seed, *_ in self.begun()]
    def hold(self, *seeds): [(self.folder/f'hold-{s}').touch() for s in seeds]
    def release(self): [p.unlink() for p in self.folder.glob('hold-*')]
    def tell(self, seed, code): (self.folder/f'{seed}.py').write_text(code)

@pytest.fixture
def toy(tmp_path_factory, monkeypatch):
    t = Toy(tmp_path_factory.mktemp('toy'))
    for k, v in t.env.items(): monkeypatch.setenv(k, v)
    yield t
    room._stop_servers()

STUDY = '''import json, sys
from xprune_nb.experiments import *
from xprune_nb.experiments import progress
runs, kw = [Run(**r) for r in json.loads(sys.argv[2])], json.loads(sys.argv[3])
progress._Plain.every = .3
print('ready', flush=True)
if kw.pop('wait', False): sys.stdin.readline()
table = execute(runs, sys.argv[1], **kw)
print(table[['seed', 'status', 'error']].to_json(orient='records'), flush=True)'''

def start(runs, store, **kw):
    "A study in a process of its own"
    args = [sys.executable, '-c', STUDY, str(store), json.dumps([asdict(r) for r in runs]), json.dumps(dict(dict(progress=False), **kw))]
    return subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

def end(study, seconds=120):
    "What its table says"
    out, err = study.communicate(timeout=seconds)
    assert study.returncode == 0, err
    return json.loads(out.splitlines()[-1])

def kill_all(study, family=()):
    "Whatever is left, at the end of a test"
    if study.poll() is None: family = [psutil.Process(study.pid), *psutil.Process(study.pid).children(recursive=True), *family]
    for p in family:
        with contextlib.suppress(psutil.NoSuchProcess): p.kill()
    study.communicate()

def whole(store, runs):
    "Each run has its row once, with its page unless it was killed, and nothing else is there"
    with warnings.catch_warnings(): warnings.simplefilter('error'); table = rows(store)
    pages = [f'{i}.ipynb' for i in table.run_id[~table.error.str.startswith('the run was killed')]]
    assert sorted(table.run_id) == sorted(r.id for r in runs) and found(store) == sorted([*pages, *(f'{r.id}.json' for r in runs)]) and unfinished(store) == []
    for r in table.to_dict('records'):
        if r['status'] == 'done': assert row_of(nbformat.read(store/f"{r['run_id']}.ipynb", 4))['run_id'] == r['run_id']
    return table

def test_each_process_of_a_study_is_killed(toy, tmp_path):
    """Two at a time: a run; the server of the other; then the worker of both. And runs that end without a word whenever they are tried. Each has its row, once"""
    runs = grid(**SHORT, seed=range(6)); toy.hold(0, 1)
    for seed, code in {3: 'os.kill(os.getpid(), 9)', 4: 'import ctypes; ctypes.string_at(0)', 5: 'os._exit(7)'}.items(): toy.tell(seed, code)
    study = start(runs, tmp_path/'store', n_jobs=2)
    try:
        until(lambda: sorted(toy.seeds()) == [0, 1], what='two runs begin')
        (seed, child, server), (other, child2, server2) = toy.begun()
        assert len({child, server, child2, server2, study.pid}) == 5
        os.kill(child, signal.SIGKILL)
        assert until(lambda: toy.begun()[2:], what='a killed run begins again')[0] == (seed, toy.begun()[2][1], server)  # in the same server
        os.kill(server2, signal.SIGKILL)
        again = until(lambda: toy.begun()[3:], what='a run whose server was killed begins again')[0]
        assert again[0] == other and again[2] != server2 and not psutil.pid_exists(child2)  # there is one of it
        worker = psutil.Process(server).parent()
        assert worker.pid != study.pid
        worker.kill()
        until(lambda: len(toy.begun()) == 6, what='the runs of a killed worker begin again')
        assert sorted(toy.seeds()[4:]) == [0, 1] and not any(psutil.pid_exists(pid) for _, pid, _ in toy.begun()[:4])
        toy.release()
        said = end(study)
    finally: kill_all(study)
    assert [r['seed'] for r in said] == list(range(6)) and [r['status'] for r in said] == ['done']*3 + ['failed']*3
    assert [r['error'] for r in said[3:]] == ['the run was killed (signal 9, SIGKILL, as when memory is short), twice', 'the run was killed (signal 11, SIGSEGV), twice', 'the run was killed (exit status 7), twice']
    assert {s: toy.seeds().count(s) for s in range(6)} == {0: 3, 1: 3, 2: 1, 3: 2, 4: 2, 5: 2}
    assert whole(tmp_path/'store', runs).status.value_counts().to_dict() == dict(done=3, failed=3)

@pytest.mark.parametrize('kw', [dict(n_jobs=2), dict(backend='sequential'), pytest.param(dict(backend='threading', n_jobs=2), marks=pytest.mark.slow), dict(backend='sequential', fresh=True)], ids=str)
def test_a_study_that_was_killed_leaves_no_process(toy, tmp_path, kw):
    "It alone, and nobody waits for what is left of it; then it is taken up again, and what was done is not touched"
    runs, store, n = RUNS[:2], tmp_path/'store', kw.get('n_jobs', 1)
    toy.hold(*[0, 1][2-n:])
    study = start(runs, store, **kw)
    family = []
    try:
        until(lambda: len(toy.begun()) == 2, what='the runs begin')
        family = psutil.Process(study.pid).children(recursive=True)
        assert {pid for seed, pid, _ in toy.begun()[2-n:]} <= {p.pid for p in family}
        until(lambda: status(store).state.tolist() == (['running']*2 if n == 2 else ['done', 'running']), 10, 'the runs are seen')
        assert status(store).doing.tolist() == [''][n-1:] + ['retraining, epoch 3 of 15']*n
        lies = unfinished(store), found(store), sorted((store/HIDDEN).glob('*.lock'))
        assert [p.name for p in clean(store, dry=False)] == [f'{runs[0].id}.lock'][n-1:]  # whoever is under way keeps what is his
        assert (unfinished(store), found(store), [*lies[2][:2-n], *sorted((store/HIDDEN).glob('*.lock'))]) == lies
        os.kill(study.pid, signal.SIGKILL); begin = time.monotonic()
        assert psutil.wait_procs(family, timeout=20)[1] == [], f'after {time.monotonic()-begin:.0f} s'
        assert psutil.Process(study.pid).status() == psutil.STATUS_ZOMBIE
    finally: kill_all(study, family)
    before = contents(store)
    assert sorted(before) == [f'{runs[0].id}{s}' for s in ('.ipynb', '.json')][2*(n-1):] and len(unfinished(store)) > 0  # it had no time to clean up
    assert status(store).state.tolist() == ['done', 'waiting'][n-1:] + ['waiting']*(n-1)
    for name in f'.{runs[1].id}.json.99.part', f'.{runs[1].id}.ipynb.99.part', f'{HIDDEN}/.{runs[1].id}.progress.99.part': (store/name).write_text('{')
    left = clean(store)
    assert {p.name for p in left} >= {*unfinished(store), f'{runs[1].id}.lock'} and all(p.exists() for p in left)
    toy.release()
    assert execute(runs, store, backend='sequential', progress=False).status.tolist() == ['done', 'done']
    whole(store, runs)
    assert {k: v for k, v in contents(store).items() if k in before} == before and toy.seeds().count(0) == n
    gone = clean(store, dry=False)
    assert {p.name for p in gone} == {f'{r.id}.lock' for r in runs[2-n:]} and not any(p.exists() for p in gone) and clean(store) == []
    whole(store, runs)

@pytest.mark.parametrize('kw', [dict(n_jobs=2), dict(backend='threading', n_jobs=2), pytest.param(dict(backend='sequential'), marks=pytest.mark.slow)], ids=str)
def test_a_study_that_is_interrupted_leaves_nothing_half(toy, tmp_path, kw):
    "Ctrl-C reaches every process of a terminal: no run is recorded as failed, none is begun anew, and no process stays"
    n = kw.get('n_jobs', 1); toy.hold(*range(4))
    study = start(RUNS, tmp_path/'store', **kw)
    family = []
    try:
        until(lambda: len(toy.begun()) == n, what='the runs begin')
        family = psutil.Process(study.pid).children(recursive=True)
        os.killpg(study.pid, signal.SIGINT)
        err = study.communicate(timeout=60)[1]
        assert study.returncode and 'KeyboardInterrupt' in err and psutil.wait_procs(family, timeout=10)[1] == []
    finally: kill_all(study, family)
    assert len(toy.begun()) == n and found(tmp_path/'store') == []
    assert status(tmp_path/'store').state.tolist() == ['waiting']*4

RACER = '''import json, sys
from pathlib import Path
from xprune_nb.experiments import *
from xprune_nb.experiments.store import _stop_servers
run = Run(**json.loads(sys.argv[1]))
print('ready', flush=True)
for line in sys.stdin:
    r = execute_one(run, Path(line.strip()))
    print(json.dumps(r and r['status']), flush=True)
_stop_servers()'''

def test_two_processes_on_one_run(toy, tmp_path):
    "Time after time, together or one somewhat later: one of them carries it out; the other does without, or finds it done"
    both = [subprocess.Popen([sys.executable, '-c', RACER, json.dumps(asdict(RUNS[0]))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        assert [p.stdout.readline() for p in both] == ['ready\n']*2
        said = []
        for i, late in enumerate([0, 0, 0, 0, .05, .1, .2, .4]):
            (store := tmp_path/str(i)).mkdir()
            for p in both if i % 2 else both[::-1]: p.stdin.write(f'{store}\n'); p.stdin.flush(); time.sleep(late)
            said.append({json.loads(p.stdout.readline()) for p in both})
            assert 'done' in said[-1] <= {'done', None} and len(toy.begun()) == i + 1, i
            whole(store, RUNS[:1])
        for p in both: p.stdin.close()
        assert [p.wait(20) for p in both] == [0, 0]
    finally: [p.kill() for p in both if p.poll() is None]
    assert {None} < set().union(*said)  # they did meet

def test_two_studies_in_one_store(toy, tmp_path):
    "Each run is carried out once, by one of them; both have all rows, and say so"
    both = [start(RUNS, tmp_path, backend='sequential', progress=True, wait=True) for _ in range(2)]
    try:
        assert [p.stdout.readline() for p in both] == ['ready\n']*2
        for p in both: p.stdin.write('go\n'); p.stdin.flush()
        for p in both:
            out, err = p.communicate(timeout=120)
            assert p.returncode == 0 and [r['status'] for r in json.loads(out)] == ['done']*4 and err.splitlines()[-1].startswith('4 of 4 runs'), err
            for r in RUNS: assert len(re.findall(rf'^{re.escape(r.id.rsplit("-", 1)[0])}: 0\.\d+ \(', err, re.M)) == 1
    finally: [kill_all(p) for p in both]
    assert sorted(toy.seeds()) == [0, 1, 2, 3]
    whole(tmp_path, RUNS)

def test_a_full_disk_for_real(toy, tmp_path):
    "Refused by the operating system, in the midst of a page, to the process of the run"
    toy.tell(1, "print('x'*300_000)")
    code = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n' + STUDY
    study = subprocess.run([sys.executable, '-c', code, str(tmp_path), json.dumps([asdict(r) for r in RUNS[:3]]), json.dumps(dict(backend='sequential', progress=False))], capture_output=True, text=True, timeout=120)
    assert study.returncode and re.search(says(f'OSError: [Errno {errno.EFBIG}] {RUNS[1].id}.ipynb could not be written (File too large)', 'Free some space, and run again: what is done is kept'), study.stderr), study.stderr
    whole(tmp_path, RUNS[:1])
    assert toy.seeds() == [0, 1] and execute(RUNS[:3], tmp_path, backend='sequential', progress=False).status.tolist() == ['done']*3 and toy.seeds() == [0, 1, 1, 2]

# --- in a kernel of its own ---

@pytest.mark.parametrize('deaths,message', [(['Kernel died before replying to kernel_info']*2, None), (['Kernel died before replying to kernel_info']*3, 'Kernel died before replying'),
                                            (['Kernel did not respond in 180 seconds'], 'did not respond'), ([error_of('Kernel died before replying, said the cell')], 'said the cell')], ids=range(4))
def test_a_kernel_that_dies_while_starting_is_started_again(tmp_path, monkeypatch, deaths, message):
    asked, run = [], Run(**SHORT, threads=3)
    def start(nb, out, parameters, **kw):
        asked.append((Path(nb), parameters, kw))
        if len(asked) <= len(deaths): raise e if isinstance(e := deaths[len(asked)-1], Exception) else RuntimeError(e)
        nbformat.write(page(dict(parameters, run_id=run.id, status='done', error='', accuracy=.5)), out)
    monkeypatch.setattr(papermill, 'execute_notebook', start); monkeypatch.setenv('OMP_NUM_THREADS', '7'); monkeypatch.delenv('TQDM_DISABLE', raising=False); before = dict(os.environ)
    r = execute_one(run, tmp_path, fresh=True)
    assert (r['status'] == 'done') == (message is None) and (message or '') in r['error'] and len(asked) == min(len(deaths)+1, 3 if 'before' in str(deaths[0]) and len(deaths) > 1 else 1)
    assert all(nb == run_notebook() and p == asdict(run) for nb, p, _ in asked) and os.environ == before
    for *_, kw in asked: assert kw['folder'] == run_notebook().parent and kw['env'] == before | dict(OMP_NUM_THREADS='3', TQDM_DISABLE='1', PYDEVD_DISABLE_FILE_VALIDATION='1', XPRUNE_CACHE=str(tmp_path/HIDDEN/'cache'), XPRUNE_PROGRESS=str(tmp_path/HIDDEN/f'{run.id}.progress'))
    sockets = [kw['config'].KernelManager.ip for *_, kw in asked]
    assert all(kw['config'].KernelManager.transport == 'ipc' for *_, kw in asked) and len(set(sockets)) == len(sockets)

def test_kernels_that_overlap_have_environments_of_their_own(toy, tmp_path, monkeypatch):
    "And leave folder and environment of the caller alone"
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('OMP_NUM_THREADS', '5'); before = dict(os.environ)
    runs = [Run(**SHORT, seed=i, threads=i+1) for i in range(2)]; toy.hold(0, 1)
    for i in range(2): toy.tell(i, "(toy/f'saw-{run.seed}').write_text(' '.join([os.environ['OMP_NUM_THREADS'], os.environ['XPRUNE_PROGRESS'], os.getcwd()]))")
    study = threading.Thread(target=lambda: execute(runs, 'store', backend='threading', n_jobs=2, fresh=True, progress=False)); study.start()
    try:
        until(lambda: len(toy.begun()) == 2, what='two kernels are there')
        assert os.getcwd() == str(tmp_path) and dict(os.environ) == before
    finally: toy.release(); study.join(60)
    for i, r in enumerate(runs): assert (toy.folder/f'saw-{i}').read_text() == f"{i+1} {tmp_path/'store'/HIDDEN/f'{r.id}.progress'} {toy.folder}"
    assert os.getcwd() == str(tmp_path) and dict(os.environ) == before
    whole(tmp_path/'store', runs)

# --- joblib's backends ---

def test_the_callers_own_pool_is_left_alone(tmp_path, monkeypatch):
    "loky keeps one pool a process; the run fails at once here, since its notebook is none"
    (tmp_path/'run.ipynb').write_text('{}'); monkeypatch.setenv('XPRUNE_NBS', str(tmp_path))
    def work():
        "Who there is, not who happened to be asked: one of two quick workers can take all four"
        asked = set(joblib.Parallel(n_jobs=2)(joblib.delayed(os.getpid)() for _ in range(4)))
        there = set(get_reusable_executor(reuse=True)._processes)
        assert asked <= there and len(there) == 2; return there
    try:
        mine = work()
        assert execute(RUNS[:1], tmp_path/'store', n_jobs=2, backend='loky', progress=False).status.tolist() == ['failed']
        assert room._pool_is_up() and work() == mine and os.getpid() not in mine
    finally: get_reusable_executor(reuse=True).shutdown()
    assert not room._pool_is_up()

def test_a_backend_that_gives_all_results_at_the_end(player, tmp_path, monkeypatch):
    "Such as Ray's"
    class AtTheEnd(joblib.parallel.ThreadingBackend): supports_return_generator = False
    joblib.register_parallel_backend('at the end', AtTheEnd); monkeypatch.setattr(room, 'BACKENDS', (*room.BACKENDS, 'at the end'))
    with pytest.raises(ValueError, match='does not support return_as'), joblib.parallel_config('at the end'): joblib.Parallel(return_as='generator_unordered')
    player.breaks = {1: error_of('no')}
    assert play(RUNS[:2], tmp_path/'store', backend='at the end').status.tolist() == ['done', 'failed']

def test_a_pool_that_dies_whenever_it_is_tried_is_given_up(tmp_path, monkeypatch):
    class TerminatedWorkerError(Exception): pass
    tried = []
    def dying(parallel, jobs): tried.append(1); raise TerminatedWorkerError; yield
    monkeypatch.setattr(room, '_results', dying)
    with pytest.raises(RuntimeError, match=says('three workers in a row were killed, and no run was done.', 'Run fewer at a time (n_jobs)')): play(RUNS, tmp_path)
    assert len(tried) == 3 and found(tmp_path) == []

# --- what one does with a study ---

def test_rows_that_are_known_count_as_done(player, tmp_path):
    "They come back with the others, in the order asked for; a failed one is tried, and a row of the store goes first"
    player.breaks = {1: error_of('no')}
    known = play(RUNS[:3], tmp_path/'there')
    player.breaks.clear(); player.runs.clear()
    table = play(RUNS[::-1], tmp_path/'here', known=known)
    assert table.run_id.tolist() == [r.id for r in RUNS[::-1]] and table.status.tolist() == ['done']*4 and sorted(r.seed for r in player.runs) == [1, 3]
    assert found(tmp_path/'here') == sorted(f'{RUNS[i].id}{s}' for i in (1, 3) for s in ('.ipynb', '.json')) and sorted(rows(tmp_path/'here').seed) == [1, 3]
    assert table.accuracy.tolist() == [.03, .02, .01, 0.] and status(tmp_path/'here').state.tolist() == ['done']*4
    mine = play(RUNS[1:2], tmp_path/'here', known=table.assign(accuracy=.9))
    assert mine.accuracy.tolist() == [.01] and len(player.runs) == 2
    assert play(RUNS[:1], tmp_path/'empty', known=known.assign(extra=1)).extra.tolist() == [1] and found(tmp_path/'empty') == []

def test_what_a_store_was_asked_for(player, tmp_path):
    odd = [Run(**SHORT, rewind=5), Run(**SHORT, floor=.1, protect='a, b'), Run(**SHORT, threads=2)]
    play(odd, tmp_path); assert asked_for(tmp_path) == odd
    play(RUNS[:1], tmp_path); assert asked_for(tmp_path) == RUNS[:1] and len(rows(tmp_path)) == 4

def test_status_says_what_is_done_failed_and_why(player, tmp_path):
    player.breaks = {2: error_of('no filter is left')}
    play(RUNS, tmp_path)
    for r in RUNS[:1]: (tmp_path/f'{r.id}.json').write_text('{')
    (tmp_path/f'{RUNS[3].id}.json').unlink()
    begin = dict(what='scoring', step=2, steps=3, epoch=0, epochs=0, begin=time.time()-60, host=socket.gethostname())
    (tmp_path/HIDDEN/f'{RUNS[0].id}.progress').write_text(json.dumps(dict(begin, pid=2**22+1)))  # there is no such process
    with warnings.catch_warnings(): warnings.simplefilter('error'); table = status(tmp_path)
    assert list(table) == ['run_id', 'state', 'error', 'doing', 'seconds'] and table.run_id.tolist() == [r.id for r in RUNS]
    assert table.state.tolist() == ['damaged', 'done', 'failed', 'waiting'] and table.error.tolist() == ['', '', 'ValueError: no filter is left', ''] and table.doing.tolist() == ['']*4
    (tmp_path/HIDDEN/f'{RUNS[2].id}.progress').write_text(json.dumps(dict(begin, pid=os.getpid())))
    (tmp_path/HIDDEN/f'{RUNS[3].id}.progress').write_text(json.dumps(dict(begin, host='another machine', pid=1)))
    table = status(tmp_path)
    assert table.state.tolist() == ['damaged', 'done', 'running', 'running'] and table.doing.tolist() == ['', ''] + ['scoring, step 2 of 3']*2 and 59 < table.seconds[3] < 70
    (tmp_path/HIDDEN/f'{RUNS[3].id}.progress').write_text('{')
    assert status(tmp_path).state.tolist() == ['damaged', 'done', 'running', 'waiting']

@pytest.mark.parametrize('suffix', ['.csv', '.parquet'])
def test_rows_as_one_table(player, tmp_path, suffix):
    table = play([*RUNS, Run(**SHORT, rewind=5)], tmp_path/'store').assign(versions=[dict(torch='2')]*5, live=[[1, 2]]*5)
    path = export(table, tmp_path/f'all{suffix}')
    again = pd.read_csv(path) if suffix == '.csv' else pd.read_parquet(path)
    assert again.run_id.tolist() == table.run_id.tolist() and again.accuracy.tolist() == table.accuracy.tolist() and json.loads(again.versions[0]) == dict(torch='2') and json.loads(again.live[1]) == [1, 2]
    assert b'\r' not in path.read_bytes() or suffix != '.csv'
    with pytest.raises(ValueError, match=says("no kind of table called '.xlsx'", '.csv, .parquet')): export(table, tmp_path/'all.xlsx')
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, 'store']

def test_parquet_that_is_not_installed(tmp_path, monkeypatch):
    def missing(*args, **kw): raise ImportError('no pyarrow')
    monkeypatch.setattr(pd.DataFrame, 'to_parquet', missing)
    with pytest.raises(OSError, match=says("pip install 'xprune_nb[parquet]', or name a .csv")): export(pd.DataFrame(dict(a=[1])), tmp_path/'all.parquet')
    assert list(tmp_path.iterdir()) == []

def test_cleaning_leaves_rows_and_whoever_holds_a_lock(player, tmp_path):
    play(RUNS[:2], tmp_path); before = contents(tmp_path)
    (tmp_path/HIDDEN/'cache').mkdir(); (tmp_path/HIDDEN/'cache'/'dense-1.safetensors').write_text('x')
    for r in RUNS[:2]: (tmp_path/HIDDEN/f'{r.id}.elsewhere-1-2.part.ipynb').write_text('{')
    with FileLock(tmp_path/HIDDEN/f'{RUNS[1].id}.lock'):
        names = [f'{RUNS[0].id}.elsewhere-1-2.part.ipynb', f'{RUNS[0].id}.lock']
        assert sorted(p.name for p in clean(tmp_path)) == names and sorted(p.name for p in clean(tmp_path, dry=False)) == names
        assert (tmp_path/HIDDEN/f'{RUNS[1].id}.elsewhere-1-2.part.ipynb').exists() and (tmp_path/HIDDEN/f'{RUNS[1].id}.lock').exists()
    assert sorted(p.name for p in clean(tmp_path, cache=True)) == ['cache', f'{RUNS[1].id}.elsewhere-1-2.part.ipynb', f'{RUNS[1].id}.lock']
    assert (tmp_path/HIDDEN/'cache').exists(); clean(tmp_path, dry=False, cache=True); assert [p.name for p in (tmp_path/HIDDEN).iterdir()] == ['study.json']
    assert contents(tmp_path) == before and play(RUNS[:2], tmp_path).status.tolist() == ['done', 'done'] and len(player.runs) == 2

# --- what runs share ---

def counted(keep, name='scores', about=dict(images=64), value=1.):
    "What a cache gives, and whether it was worked out"
    worked = []
    return keep(name, about, lambda: worked.append(1) or dict(a=torch.full((3,), value), b=torch.tensor(7)))['a'].tolist(), bool(worked)

def test_a_result_is_kept_under_all_that_it_depends_on(tmp_path):
    keep, about = Cache(tmp_path/'new'), dict(images=64, seed=0)
    assert counted(keep, about=about) == ([1.]*3, True) and counted(keep, about=about, value=2.) == ([1.]*3, False) and counted(Cache(tmp_path/'new'), about=dict(seed=0, images=64), value=2.) == ([1.]*3, False)
    for name, other in ('scores', dict(images=65, seed=0)), ('scores', dict(images=64)), ('macs', about): assert counted(keep, name, other, 2.) == ([2.]*3, True)
    assert len(found(tmp_path/'new')) == 4 and counted(keep, about=about, value=2.) == ([1.]*3, False)
    assert counted(Cache(None)) == ([1.]*3, True) and counted(Cache(None), value=2.) == ([2.]*3, True)
    with pytest.raises(ZeroDivisionError): keep('scores', dict(broken=1), lambda: 1/0)
    assert len(found(tmp_path/'new')) == 4

def test_a_result_keeps_its_order(tmp_path):
    "A plan is packed in the order of the network, whether its scores were worked out or read"
    made = {k: torch.zeros(n, dtype=d) for k, n, d in [('z', 1, torch.float), ('a', 5, torch.double), ('features.10', 2, torch.float), ('features.2', 7, torch.long), ('b', 1, torch.bool)]}
    for _ in range(2): assert list(Cache(tmp_path)('scores', {}, lambda: made)) == list(made)

def replaced(p): Cache(p.parent)('scores', dict(other=1), lambda: dict(a=torch.zeros(3))); other = next(o for o in p.parent.iterdir() if o != p); shutil.move(other, p)
def flipped(p): b = bytearray(p.read_bytes()); b[-1] ^= 1; p.write_bytes(bytes(b))
def folder(p): p.unlink(); p.mkdir()
@pytest.mark.parametrize('harm', [lambda p: p.write_bytes(b''), lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.write_bytes(b'\0'*500), flipped, replaced, lambda p: p.write_bytes(p.read_bytes() + b'x')], ids=['empty', 'cut', 'zeros', 'flipped', 'anothers', 'longer'])
def test_a_damaged_result_is_worked_out_again(tmp_path, harm):
    keep = Cache(tmp_path); counted(keep)
    path, = tmp_path.iterdir(); harm(path)
    assert counted(keep, value=2.) == ([2.]*3, True) and counted(keep, value=3.) == ([2.]*3, False) and found(tmp_path) == [path.name]

WRITER = '''import sys, torch
from xprune_nb.experiments import Cache
keep, mine = Cache(sys.argv[1]), 0
print('ready', flush=True); sys.stdin.readline()
def work(): global mine; mine += 1; return dict(a=torch.full((20_000,), float(i)))
for i in range(150): assert keep('scores', dict(i=i), work)['a'].eq(i).all()
print(mine)'''

def test_two_writers_of_one_result(tmp_path):
    "At once, again and again: what is read is whole at any time, and so is what is left"
    both = [subprocess.Popen([sys.executable, '-c', WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.stdout.readline() for p in both] == ['ready\n']*2
    for p in both: p.stdin.write('go\n'); p.stdin.flush()
    mine = [int(p.communicate(timeout=120)[0]) for p in both]
    assert [p.returncode for p in both] == [0, 0] and sum(mine) > 150 and len(found(tmp_path)) == 150  # they did meet
    keep = Cache(tmp_path)
    for i in range(150): assert keep('scores', dict(i=i), lambda: 1/0)['a'].eq(i).all()

# --- progress ---

def test_what_the_rest_will_take():
    "By kind where that is known; what was done before is not waited for"
    runs = [*grid(**SHORT, seed=[0, 1]), *grid(**SHORT, schedule='iterative', seed=[0, 1])]
    row_of = lambda r, seconds, **kw: dict(run_id=r.id, schedule=r.schedule, seconds=seconds, **dict(dict(status='done', accuracy=.5, error=''), **kw))
    from xprune_nb.experiments import Watch
    w = Watch('nowhere', runs, done=[runs[3].id], show=False)
    assert w.lines() == ['1 of 4 runs · 0:00:00 so far']
    w.done(row_of(runs[2], 100.)); w.done(row_of(runs[0], 10.))
    assert w.lines() == ['3 of 4 runs · 0:00:00 so far · about 0:00:10 left']
    w.done(row_of(runs[1], 20., status='failed', error='no'))
    assert w.lines() == ['4 of 4 runs · 1 failed · 0:00:00 so far']
    w.catch_up([row_of(runs[1], 20.)]); assert len(w.rows) == 3
    assert remaining([('a', 10.)], ['a']*10, n_jobs=5) == 20 and remaining([('a', 10.)], ['b', 'a'], [30.]) == 0 and remaining([], []) == 0 and math.isnan(remaining([], ['a']))

def test_a_log_says_at_once_how_far_it_is(toy, tmp_path):
    "No terminal: the first line within a second (two, where others want the processor), then what is under way, and in which epoch"
    from xprune_nb.experiments import progress
    assert progress._Plain.every == 30  # seconds; fewer here
    toy.hold(0, 1)
    study = start(RUNS[:2], tmp_path, backend='sequential', progress=True)
    try:
        assert study.stdout.readline() == 'ready\n'
        begin = time.monotonic(); lines = [study.stderr.readline()]; first = time.monotonic() - begin
        assert lines[0].startswith('0 of 2 runs · 0:00:0') and first < 2, (lines, first)
        for seed in 0, 1:
            while f'oneshot-random-0.5-seed{seed}: retraining, epoch 3 of 15 (0:00:' not in lines[-1]: lines.append(study.stderr.readline()); assert lines[-1] and len(lines) < 500, lines
            (toy.folder/f'hold-{seed}').unlink()
        assert '1 of 2 runs' in lines[-1] and 'about 0:00:' in lines[-1]
        lines += study.communicate(timeout=60)[1].splitlines()
    finally: kill_all(study)
    assert sum(bool(re.match(r'oneshot-random-0\.5-seed[01]: 0\.2[56]0 \(0:0', o)) for o in lines) == 2 and lines[-1].startswith('2 of 2 runs') and 'retraining' not in lines[-1]

def screen(text):
    "What a terminal shows in the end: a cursor that goes up, a screen that is cleared below it"
    rows, row, col = [''], 0, 0
    for token in re.findall(r'\x1b\[\d*[A-Za-z]|\r|\n|[^\x1b\r\n]+', text):
        if m := re.fullmatch(r'\x1b\[(\d*)A', token): row -= int(m[1]); assert row >= 0
        elif token == '\x1b[J': rows = rows[:row] + [rows[row][:col]]
        elif token == '\r': col = 0
        elif token == '\n': row += 1; rows += ['']*(row + 1 - len(rows))
        else:
            assert not token.startswith('\x1b'), token
            rows[row] = rows[row][:col].ljust(col) + token + rows[row][col+len(token):]; col += len(token)
    return rows

def terminal(width):
    "Both ends of one that is so wide"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 50, width, 0, 0))
    return ours, theirs

def test_a_terminal_is_written_over(toy, tmp_path):
    toy.hold(0, 1); toy.tell(2, '1/0')
    ours, theirs = terminal(100)
    args = [sys.executable, '-c', STUDY, str(tmp_path), json.dumps([asdict(r) for r in RUNS[:3]]), json.dumps(dict(backend='threading', n_jobs=2))]
    study, seen = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs), bytearray(); os.close(theirs)
    def read():
        try:
            while part := os.read(ours, 65_536): seen.extend(part)
        except OSError: pass  # the other end is closed
    reader = threading.Thread(target=read, daemon=True); reader.start(); text = lambda: seen.decode()
    try:
        until(lambda: len(toy.begun()) == 2, what='the runs begin')
        doing = until(lambda: [s for s in [screen(text())] if sum('epoch 3 of 15' in o for o in s) == 2], 20, 'both runs are shown')[0]
        until(lambda: len(set(re.findall(r'0 of 3 runs · (\S+) so far', text()))) >= 3, 20, 'time is seen to go by')
        toy.release(); assert study.wait(60) == 0
    finally: kill_all(study); reader.join(10); os.close(ours)
    assert doing[0].startswith('0 of 3 runs') and [o[:len(o)-10] for o in doing[1:]] == ['  oneshot-random-0.5-seed0: retraining, epoch 3 of 15', '  oneshot-random-0.5-seed1: retraining, epoch 3 of 15', '']
    last = [o for o in screen(text()) if o]
    assert sorted(o.split(':')[0] for o in last[:-1]) == [f'oneshot-random-0.5-seed{i}' for i in range(3)] and 'seed2: failed: ZeroDivisionError: division by zero (0:00:' in ''.join(last) and last[-1].startswith('3 of 3 runs · 1 failed'), last

def test_lines_are_cut_to_a_narrow_terminal(tmp_path, monkeypatch):
    "One that wrapped would be written over too late; what stays to be read is not cut"
    from xprune_nb.experiments import Watch, progress
    for r in RUNS: (tmp_path/f'{r.id}.progress').write_text(json.dumps(dict(what='retraining', step=2, steps=3, epoch=1, epochs=15, begin=time.time())))
    ours, theirs = terminal(40)
    with os.fdopen(theirs, 'w') as err, monkeypatch.context() as m:
        m.setattr(sys, 'stderr', err)
        assert isinstance(progress._view(), progress._Terminal)
        with Watch(tmp_path, RUNS) as w:
            for i, r in enumerate(RUNS[:2]): (tmp_path/f'{r.id}.progress').unlink(); w.done(dict(run_id=r.id, schedule='oneshot', status='failed', error='a long story that goes on and on', seconds=1.)); w.view.show(w.lines())
        text = os.read(ours, 65_536).decode()
    os.close(ours)
    last = screen(text)
    assert last[0] == 'oneshot-random-0.5-seed0: failed: a long story that goes on and on (0:00:01)' and last[2].startswith('2 of 4 runs · 2 failed') and [o[:37] for o in last[3:5]] == [f'  oneshot-random-0.5-seed{i}: retraining' [:37] for i in (2, 3)] and last[5:] == [''] and max(map(len, last[2:])) == 39

# --- warm: bit for bit what a fresh process gives ---

LAST = Run(criterion='conductance', path_steps=2, epochs=1, images=10, ratio=.6)
TEN = [Run(**SHORT), Run(**dict(SHORT, criterion='magnitude')), Run(**dict(SHORT, criterion='taylor')), Run(**dict(SHORT, criterion='lrp', ratio=.7)), Run(**dict(SHORT, criterion='conductance', path_steps=2)),
       Run(**dict(SHORT, criterion='magnitude', schedule='iterative', steps=2, coupling='coupled')), Run(**dict(SHORT, ratio=.99))]  # the last leaves a layer without a filter
SPOILT = """import os, random, sys, warnings
import numpy as np, torch, pandas as pd
torch.set_default_dtype(torch.float64); torch.set_num_threads(2); torch.manual_seed(99); torch.set_grad_enabled(False); torch.backends.mkldnn.enabled = False; torch.use_deterministic_algorithms(True)
np.random.seed(99); random.seed(99); os.environ['XPRUNE_CACHE'] = '/nowhere'; os.chdir('/'); sys.path.clear(); warnings.simplefilter('error'); pd.set_option('display.precision', 2)
from xprune_nb import criteria, data, training
from xprune_nb.experiments import run as r
criteria.CRITERIA['conductance'] = criteria.CRITERIA['random']; r.sample = None; training.evaluate = None; r.CALIBRATION = 3
data.load('cifar10-mini').train.x.zero_(); data.load('cifar10-mini').test.y.zero_()"""

@pytest.fixture(scope='module')
def served(tmp_path_factory):
    "Ten runs in one warm server and then `LAST`, in a store; what was said of each, and in which server; and a store with `LAST` from a kernel of its own"
    store, other, own = (tmp_path_factory.mktemp(n) for n in ('warm', 'fresh', 'toy'))
    fresh, toy, said = start([LAST], other, backend='sequential', fresh=True), Toy(own), []
    toy.tell(7, SPOILT); toy.tell(8, '1/0'); toy.tell(9, 'os.kill(os.getpid(), 9)')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('TOY', str(own))
        try:
            for r in [*TEN, *(Run(**SHORT, seed=s) for s in (7, 8, 9)), LAST]:
                if r.seed: m.setenv('XPRUNE_NBS', str(own))  # a page of its own, in the same server
                else: m.delenv('XPRUNE_NBS', raising=False)
                said.append((execute_one(r, store), room._mine.warm.server.pid))
            end(fresh)
        finally: kill_all(fresh); room._stop_servers()
    return store, other, said

def test_a_warm_run_is_a_fresh_one_bit_for_bit(served):
    "After ten others in the same server: of other criteria; one that failed, one that was killed, one that changed torch, the images and this package under its feet"
    store, other, said = served
    table, servers = [r for r, _ in said], {pid for _, pid in said}
    assert len(servers) == 1 and [r['status'] for r in table] == ['done']*6 + ['failed', 'done', 'failed', 'failed', 'done']
    assert [r['error'][:60] for r in table if r['error']] == ["ValueError: ratio 0.99 would leave layer 'features.0.0' (32 ", 'ZeroDivisionError: division by zero', 'the run was killed (signal 9, SIGKILL, as when memory is sho']
    warm, fresh = (read_row(s/f'{LAST.id}.json') for s in (store, other))
    assert timeless(warm) == timeless(fresh) and warm['accuracy'] > .2 and len(warm['accuracy_epochs']) == 1 and set(FIELDS) < set(warm)
    assert not Path(f'/proc/{servers.pop()}').exists()

def test_a_warm_run_is_the_same_run_by_hand(served):
    "In this process, without papermill and without a cache"
    store, _, said = served
    r = read_row(store/f'{TEN[5].id}.json')
    if torch.cuda.is_available() or torch.get_num_threads() != 1: pytest.skip('another number of threads, or a GPU: equal only up to rounding')
    net, data = baseline(TEN[5].baseline).net(), load(TEN[5].data)
    assert timeless(row(TEN[5], net, data, list(prune_steps(TEN[5], net, data, progress=False)))) == timeless(r)
    assert 0 < r['latency'] < 1.5*r['latency_dense']

def test_what_runs_share_is_worked_out_once(served):
    "The dense network for all of them; scores for each criterion, and for the second step of the iterative run, whose first is that of the one-shot run"
    store, other, _ = served
    kept = lambda s: {k: len(list((s/HIDDEN/'cache').glob(f'{k}-*.safetensors'))) for k in ('dense', 'val', 'scores', 'macs')}
    assert kept(store) == dict(dense=1, val=1, scores=6, macs=5) and kept(other) == dict(dense=1, val=1, scores=1, macs=1) and len(list((store/HIDDEN/'cache').iterdir())) == 13
    names = lambda s: {p.name for p in (s/HIDDEN/'cache').glob('[!d]*')}
    assert names(other) < names(store)  # by the same names, in another process

@pytest.mark.parametrize('where', ['warm', 'fresh'])
def test_the_page_of_a_run(served, where):
    "What was asked, each field of it; no error, no warning; pictures; and the row, which is the one in the store"
    store, run = served[where == 'fresh'], LAST
    nb, r = nbformat.read(store/f'{run.id}.ipynb', 4), read_row(store/f'{run.id}.json')
    asked, = (c.source for c in nb.cells if 'injected-parameters' in c.metadata.get('tags', []))
    names = {}; exec(asked, names)
    assert {k: v for k, v in names.items() if k in FIELDS} == asdict(run)
    outputs = [o for c in nb.cells for o in c.get('outputs', [])]
    assert all(o.output_type != 'error' for o in outputs) and not any(c.execution_count is None for c in nb.cells if c.cell_type == 'code')
    assert sum('image/png' in o.get('data', {}) for o in outputs) >= 3 and [o for o in outputs if o.get('name') == 'stderr'] == []
    assert row_of(nb) == {k: v for k, v in r.items() if k not in ('seconds', 'written', 'page')} and {k: r[k] for k in FIELDS} == asdict(run)
    assert nbformat.validate(nb) is None

def test_a_run_that_fails_under_way(served):
    "Its page shows where"
    store, _, said = served
    assert re.search(says("ratio 0.99 would leave layer 'features.0.0' (32 filters) without a filter"), said[6][0]['error'])
    nb = nbformat.read(store/f'{TEN[6].id}.ipynb', 4)
    assert any(o.output_type == 'error' for c in nb.cells for o in c.get('outputs', [])) and rows(store, TEN).alive.round(2).tolist()[:6] == [.5, .5, .5, .3, .5, .5]

@pytest.mark.slow
def test_two_threads_warm_are_two_threads_fresh(tmp_path):
    "A server has one thread, as more can't be forked; its runs have as many as they were asked for"
    run = Run(**dict(SHORT, epochs=1, threads=2))
    fresh = start([run], tmp_path/'fresh', backend='sequential', fresh=True)
    try: execute([Run(**SHORT), run, Run(**dict(SHORT, epochs=1))], tmp_path/'warm', backend='sequential', progress=False); end(fresh)
    finally: kill_all(fresh)
    warm, fresh = (read_row(tmp_path/s/f'{run.id}.json') for s in ('warm', 'fresh'))
    assert timeless(warm) == timeless(fresh) and warm['threads'] == 2 and warm['macs_spent'] == read_row(tmp_path/'warm'/f'{Run(**dict(SHORT, epochs=1)).id}.json')['macs_spent']

@pytest.mark.parametrize('parameter,value,said', [('criterium', 'magnitude', "no parameter of a run called 'criterium'; did you mean 'criterion'?")])
def test_a_page_by_papermill_refuses_a_misspelt_name(tmp_path, parameter, value, said):
    "It used to run the defaults, and to end as if all were well"
    done = subprocess.run([sys.executable, '-m', 'papermill', 'nbs/run.ipynb', str(tmp_path/'out.ipynb'), '-p', parameter, value, '--cwd', 'nbs', '--no-progress-bar'], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode and said in done.stderr and 'criterion' in done.stderr
    with pytest.raises(ValueError, match='ended without a row'): row_of(nbformat.read(tmp_path/'out.ipynb', 4))
