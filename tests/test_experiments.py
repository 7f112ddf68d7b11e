"""Runs, grids and stores: a study killed by the system and taken up again, every way a run or a row can break, and papermill's page against the same run by hand."""
import errno, itertools, json, math, os, re, signal, subprocess, sys, time
from dataclasses import asdict, fields, replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import psutil
import pytest
import torch
from hypothesis import given, settings, strategies as st
from papermill.exceptions import PapermillExecutionError

from xprune_nb import experiments as room
from xprune_nb.criteria import CRITERIA
from xprune_nb.data import load
from xprune_nb.experiments import ROW_MIME, Run, carry_out, execute, execute_one, grid, read_row, row, row_of, rows, run_notebook
from xprune_nb.model import baseline
from xprune_nb.pruning import shares
from xprune_nb.training import Recipe, evaluate

says = lambda *parts: '.*'.join(map(re.escape, parts))
found = lambda folder: sorted(p.name for p in Path(folder).iterdir())
FIELDS = [f.name for f in fields(Run)]
SHORT = dict(criterion='random', epochs=0, images=10)  # as short as a run can be

# --- a run ---

OTHER = dict(data='cifar10', criterion='lrp', schedule='iterative', ratio=.7, steps=2, share='linear', coupling='coupled', rewind=0, epochs=2, lr=.02, augment=False, images=32,
             path_steps=20, baseline_input='black', target='predicted', aggregate='max', seed=1)

def test_each_field_decides_the_id():
    runs = [Run(), *(Run(**{k: v}) for k, v in OTHER.items())]
    assert set(OTHER) | {'baseline', 'scope'} == set(FIELDS)  # of those two there is one so far
    assert len({r.id for r in runs}) == len(set(runs)) == len(runs) and Run().id == Run(**asdict(Run())).id
    assert all(re.fullmatch(r'[\w.-]+', r.id) for r in runs)  # a name for a file anywhere

@pytest.mark.parametrize('a,b', [(dict(ratio=0), dict(ratio=0.)), (dict(lr=1), dict(lr=1.)), (dict(seed=np.int64(3)), dict(seed=3)), (dict(ratio=np.float64(.7)), dict(ratio=.7)),
                                 (dict(rewind=np.int64(0)), dict(rewind=0))], ids=str)
def test_equal_runs_have_one_id(a, b): assert Run(**a) == Run(**b) and Run(**a).id == Run(**b).id

@pytest.mark.parametrize('wrong,message', [
    (dict(data='cifar100'), "no data set called 'cifar100'; did you mean 'cifar10'? There are: cifar10-mini, cifar10"),
    (dict(baseline='mobilenet'), "no baseline called 'mobilenet'; did you mean 'mobilenet_v2-cifar10'?"),
    (dict(criterion='random_scores'), "no criterion called 'random_scores'"), (dict(schedule='one shot'), "no schedule called 'one shot'; did you mean 'oneshot'?"),
    (dict(share='linaer'), "no share called 'linaer'; did you mean 'linear'?"), (dict(scope='global'), "no scope called 'global'"),
    (dict(coupling='couple'), "no coupling called 'couple'; did you mean 'coupled'?"),
    (dict(ratio=-.1), 'ratio is -0.1, expected a share'), (dict(ratio=1), 'ratio is 1', ), (dict(ratio=math.nan), 'ratio is nan, expected a share'),
    (dict(steps=0), '0 pruning steps asked for'), (dict(rewind=-1), 'keeps no weights of epoch -1. There are: 0, '), (dict(rewind='first'), "keeps no weights of epoch 'first'"),
    (dict(epochs=-1), 'epochs is -1, expected at least 0'), (dict(lr=-1.), 'lr is -1.0, expected at least 0'), (dict(lr=math.nan), 'lr is nan'),
    (dict(images=0), 'images is 0, expected at least 1'), (dict(path_steps=0), 'path_steps is 0, expected at least 1'),
    (dict(baseline_input='blak'), "no baseline input called 'blak'; did you mean 'black'?"), (dict(target='ture'), "no target called 'ture'; did you mean 'true'?"),
    (dict(aggregate='l3'), "no aggregation called 'l3'"),
    (dict(ratio='0.5'), "ratio is '0.5' (str), expected float"), (dict(seed=1.5), 'seed is 1.5 (float), expected int'), (dict(seed=None), 'seed is None (NoneType), expected int'),
    (dict(augment='no'), "augment is 'no' (str), expected bool"), (dict(criterion=3), 'criterion is 3 (int), expected str'), (dict(epochs=True), 'epochs is True (bool), expected int'),
    (dict(steps=2.5), 'steps is 2.5 (float), expected int'), (dict(rewind=5.5), 'rewind is 5.5 (float), expected int or str')], ids=str)
@pytest.mark.parametrize('criterion', ['conductance', 'random'])
def test_each_field_is_checked_at_once(wrong, message, criterion):
    "Also where this criterion would not look at it"
    with pytest.raises(ValueError, match=says(message)): Run(**dict(dict(criterion=criterion), **wrong))

def test_a_run_has_no_other_fields():
    for f in FIELDS:
        with pytest.raises(AttributeError): setattr(Run(), f, None)  # frozen
    with pytest.raises(TypeError): Run(device='cuda')

# --- a grid ---

@given(st.fixed_dictionaries({}, optional=dict(criterion=st.lists(st.sampled_from(list(CRITERIA)), unique=True, max_size=4), ratio=st.lists(st.sampled_from([0., .5, .7, .9]), unique=True, max_size=3),
                                               seed=st.one_of(st.integers(0, 9), st.lists(st.integers(0, 9), unique=True, max_size=3)), schedule=st.sampled_from(['oneshot', 'iterative']))))
@settings(max_examples=60, deadline=None)
def test_a_grid_is_every_combination_once(lists):
    runs, listed = grid(**lists), {k: v if isinstance(v, list) else [v] for k, v in lists.items()}
    assert [tuple(getattr(r, k) for k in lists) for r in runs] == list(itertools.product(*listed.values()))
    assert len({r.id for r in runs}) == len(runs) == math.prod(map(len, listed.values()))
    assert all(getattr(r, f.name) == f.default for r in runs for f in fields(Run) if f.name not in lists)

@pytest.mark.parametrize('many', [range(2), (0, 1), np.array([0, 1]), pd.Series([0, 1])], ids=lambda o: type(o).__name__)
def test_a_list_is_anything_that_holds_several(many): assert [r.id for r in grid(seed=many)] == [Run(seed=0).id, Run(seed=1).id]

def test_a_field_that_there_is_not():
    with pytest.raises(ValueError, match=says("no field of Run called 'ratios'; did you mean 'ratio'? There are: ", *FIELDS)): grid(ratios=[.5])

# --- what happens in a run ---

@pytest.fixture(scope='module')
def tiny():
    "Small, and its test images are its validation images, so that what is measured on the one must be what is measured on the other"
    data = load(); few = data.val.take(torch.arange(60))
    return replace(data, train=data.train.take(torch.arange(300)), val=few, test=few)

def by_hand(run, data):
    net, snapshots = baseline(run.baseline).net(), {}
    steps = list(carry_out(run, net, data, snapshots, progress=False))
    learnt = {k: v.clone() for k, v in net.state_dict().items()}
    r = row(run, net, data, steps, snapshots)
    assert all(v.equal(learnt[k]) for k, v in net.state_dict().items())  # the network is left as it has learnt
    return r, steps, net

@pytest.mark.parametrize('kw', [dict(), dict(epochs=1), dict(schedule='iterative', steps=2), dict(rewind=0), dict(schedule='iterative', steps=2, share='linear', rewind=0, coupling='coupled')], ids=str)
def test_a_row_says_the_same_of_test_and_validation_images(tiny, kw):
    run = Run(**dict(SHORT, criterion='magnitude', ratio=.3, **kw))
    r, steps, net = by_hand(run, tiny)
    for k in 'dense', 'pruned', 'recalibrated': assert r[f'accuracy_{k}'] == r[f'val_{k}'], k
    assert r['accuracy'] == r['val_retrained'] == evaluate(net, tiny.test, tiny)[0]
    assert [s.ratio for s in steps] == shares(.3, 2 if kw.get('schedule') else 1, run.share)
    assert list(r)[:len(FIELDS)] == FIELDS and {k: r[k] for k in FIELDS} == asdict(run) and r['run_id'] == run.id and r['status'] == 'done'
    assert r == json.loads(json.dumps(r)) and all(type(v) in (str, int, float, bool, dict) for v in r.values())

def test_runs_that_differ_in_criterion_share_everything_else(tiny, monkeypatch):
    "The images explained, and seed, order and recipe of each retraining"
    calls = {}
    for name in 'sample', 'fit', 'recalibrate':
        def watched(*args, real=getattr(room, name), name=name, **kw):
            calls.setdefault(criterion, []).append((name, [a for a in args if isinstance(a, (int, Recipe))], kw.get('seed')))
            return real(*args, **kw)
        monkeypatch.setattr(room, name, watched)
    for criterion in 'random', 'magnitude': by_hand(Run(**dict(SHORT, criterion=criterion, ratio=.3, schedule='iterative', steps=2, seed=4)), tiny)
    assert calls['random'] == calls['magnitude'] and len(calls['random']) == 1 + 2*2
    assert len({str(c) for c in calls['random'] if c[0] == 'fit'}) == 2  # each retraining has an order of its own

def test_random_scores_are_new_in_each_step_and_the_seeds(tiny):
    steps = {s: by_hand(Run(**dict(SHORT, ratio=.3, schedule='iterative', steps=2, seed=s)), tiny)[1] for s in (0, 1)}
    first = [step.scores['features.0.0'] for s in steps.values() for step in s]
    assert len({tuple(f.tolist()) for f in first}) == 4
    for before, after in steps.values(): assert not any((after.plan[n] & ~before.plan[n]).any() for n in after.plan)  # yet what is gone stays gone

# --- a store: what papermill would do is played here ---

def page(r=None):
    "An executed notebook, with its row if it has one"
    outputs = [] if r is None else [nbformat.v4.new_output('display_data', {ROW_MIME: r, 'text/plain': 'row'})]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# One run'), nbformat.v4.new_code_cell('emit(row)', outputs=outputs), nbformat.v4.new_code_cell('1')])

class Player:
    "Plays papermill: writes the page, and returns it; `breaks` says for which seeds it dies of what"
    def __init__(self): self.runs, self.breaks = [], {}
    def __call__(self, run, out, threads):
        self.runs.append(run)
        nb = page(dict(asdict(run), run_id=run.id, status='done', error='', accuracy=run.seed/100))
        nbformat.write(page() if run.seed in self.breaks else nb, out)
        if isinstance(e := self.breaks.get(run.seed), BaseException): raise e
        return page() if run.seed in self.breaks else nb

@pytest.fixture
def player(monkeypatch): monkeypatch.setattr(room, '_papermill', p := Player()); return p

def play(runs, store, **kw): return execute(runs, store, **dict(dict(backend='threading', n_jobs=2, progress=False), **kw))

RUNS = grid(**SHORT, seed=[0, 1, 2, 3])
error_of = lambda e: PapermillExecutionError(0, 1, 'cell', 'ValueError', e, [f'ValueError: {e}'])

def test_done_runs_are_not_done_again(player, tmp_path):
    first = play(RUNS[:3], tmp_path)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    second = play([*RUNS, *RUNS[:2]], tmp_path)
    assert [r.seed for r in player.runs[3:]] == [3] and {n: ((tmp_path/n).stat().st_mtime_ns, (tmp_path/n).read_bytes()) for n in before} == before
    assert first.equals(second[:3]) and second.run_id.tolist() == [r.id for r in RUNS]  # in the order asked for, each once
    assert found(tmp_path) == sorted(r.id + s for r in RUNS for s in ('.ipynb', '.json')) and set(FIELDS) <= set(second)
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

@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '"row"', '{}', '{"run_id": 1}', '{"accuracy": 0.5}', '\0'*500, 'NaN'], ids=repr)
def test_what_is_no_row_is_run_again(player, tmp_path, text):
    (tmp_path/f'{RUNS[0].id}.json').write_text(text)
    assert len(rows(tmp_path)) == 0
    assert play(RUNS[:1], tmp_path).status.tolist() == ['done'] and len(player.runs) == 1
    (tmp_path/f'{RUNS[0].id}.json').write_bytes(b'\xff\xfe\x80')
    assert read_row(tmp_path/f'{RUNS[0].id}.json') is None

def test_no_half_row_is_taken_for_a_whole_one(player, tmp_path):
    path, = (tmp_path/f"{r}.json" for r in play(RUNS[:1], tmp_path).run_id)
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        assert read_row(path) is None, whole[:n]
    assert play(RUNS[:1], tmp_path).seed.tolist() == [0] and len(player.runs) == 2 and read_row(path).keys() == json.loads(whole).keys()

@pytest.mark.parametrize('way,nth', list(itertools.product(['fsync', 'replace'], [1, 2, 3, 4])))
def test_a_full_disk_stops_the_study_in_a_sentence(player, tmp_path, monkeypatch, way, nth):
    "While a page or its row is written: no half file, nothing done is lost, and it goes on when there is room"
    with monkeypatch.context() as m:
        calls, real = iter(range(1, 100)), getattr(os, way)
        def full(*args):
            if next(calls) == nth: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)
        m.setattr(os, way, full)
        with pytest.raises(OSError, match=says('could not be written (No space left on device)', 'Free some space')): play(RUNS[:2], tmp_path, n_jobs=1)
    done = [n for n in found(tmp_path) if n.endswith('.json')]
    assert len(done) == (nth > 2) and not [n for n in found(tmp_path) if 'part' in n] and all(read_row(tmp_path/n) for n in done)
    assert play(RUNS[:2], tmp_path).status.tolist() == ['done', 'done'] and len(player.runs) == 3

def test_a_full_disk_while_papermill_writes(player, tmp_path):
    player.breaks = {0: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))}
    with pytest.raises(OSError, match=says('could not be written (No space left on device)', 'Free some space')): play(RUNS[:1], tmp_path)
    assert found(tmp_path) == []

def test_an_interruption_leaves_nothing_half(player, tmp_path):
    player.breaks = {0: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt): execute_one(RUNS[0], tmp_path)
    assert found(tmp_path) == []

def test_stores_that_are_not_there(tmp_path):
    with pytest.raises(OSError, match=says('there is no store', 'nowhere', 'nothing was run there')): rows(tmp_path/'nowhere')
    assert len(rows(tmp_path)) == 0
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError): play(RUNS, tmp_path/'file')

def test_a_package_without_its_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv('XPRUNE_NBS', str(tmp_path))
    with pytest.raises(OSError, match=says('there is no ', 'run.ipynb. Install from a clone', 'XPRUNE_NBS')): execute_one(RUNS[0], tmp_path)
    assert found(tmp_path) == []  # it is no run that failed
    monkeypatch.delenv('XPRUNE_NBS'); assert run_notebook().name == 'run.ipynb'

@pytest.mark.parametrize('deaths,message', [(['Kernel died before replying to kernel_info']*2, None), (['Kernel died before replying to kernel_info']*3, 'Kernel died before replying'),
                                            (['Kernel did not respond in 180 seconds'], 'did not respond'), ([error_of('Kernel died before replying, said the cell')], 'said the cell')], ids=range(4))
def test_a_kernel_that_dies_while_starting_is_started_again(tmp_path, monkeypatch, deaths, message):
    asked = []
    def start(nb, out, parameters, **kw):
        asked.append((Path(nb), parameters, kw))
        if len(asked) <= len(deaths): raise e if isinstance(e := deaths[len(asked)-1], Exception) else RuntimeError(e)
        return page(dict(parameters, run_id=RUNS[0].id, status='done', error=''))
    monkeypatch.setattr(papermill, 'execute_notebook', start); monkeypatch.setattr(os, 'environ', os.environ.copy())
    r = execute_one(RUNS[0], tmp_path, threads=3)
    assert (r['status'] == 'done') == (message is None) and (message or '') in r['error'] and len(asked) == min(len(deaths)+1, 3 if 'before' in str(deaths[0]) and len(deaths) > 1 else 1)
    assert all(nb == run_notebook() and kw['cwd'] == nb.parent and p == asdict(RUNS[0]) for nb, p, kw in asked)
    sockets = [kw['config'].KernelManager.ip for *_, kw in asked]
    assert all(kw['config'].KernelManager.transport == 'ipc' for *_, kw in asked) and len(set(sockets)) == len(sockets)

def test_row_of_takes_the_last_and_wants_one():
    nb = page(dict(run_id='a')); nb.cells += page(dict(run_id='b')).cells
    assert row_of(nb)['run_id'] == 'b'
    with pytest.raises(ValueError, match='ended without a row'): row_of(page())

# --- the real thing ---

PAIR = [Run(**SHORT), Run(**dict(SHORT, ratio=.7))]
STUDY = 'import sys; from xprune_nb.experiments import *; execute([Run(**dict({short}, ratio=r)) for r in (.5, .7)], sys.argv[1], n_jobs=1, progress=False)'.format(short=SHORT)

def killed(store):
    "Start a study of two runs in a process of its own, and kill it without a warning in the midst of the second: what there was then, and who outlived it"
    study = subprocess.Popen([sys.executable, '-c', STUDY, str(store)], start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 900
        while not ((store/f'{PAIR[0].id}.json').exists() and (store/f'.{PAIR[1].id}.part.ipynb').exists()):
            assert study.poll() is None and time.monotonic() < deadline, 'the study did not come to its second run'
            time.sleep(.1)
        family = psutil.Process(study.pid).children(recursive=True)
    finally:
        os.killpg(study.pid, signal.SIGKILL); study.wait()
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in store.iterdir()}, family

@pytest.fixture(scope='module')
def study(tmp_path_factory):
    "A store, what it held when the study was killed, the processes that the study had, and the rows after it was taken up again"
    store = tmp_path_factory.mktemp('store')
    at_death, family = killed(store)
    outlived = psutil.wait_procs(family, timeout=30)[1]
    left = rows(store)
    return store, at_death, outlived, left, execute(PAIR, store, n_jobs=1, progress=False)

def test_killed_study_goes_on_with_nothing_lost(study):
    store, at_death, outlived, left, table = study
    first, second = (r.id for r in PAIR)
    assert {n for n in at_death if not n.startswith('.')} == {f'{first}.ipynb', f'{first}.json'} and left.run_id.tolist() == [first] and outlived == []
    assert table.status.tolist() == ['done', 'done'] and found(store) == sorted(f'{r}{s}' for r in (first, second) for s in ('.ipynb', '.json'))
    for n in f'{first}.ipynb', f'{first}.json': assert ((store/n).stat().st_mtime_ns, (store/n).read_bytes()) == at_death[n]  # what was done was not touched

def test_papermills_row_is_the_same_run_by_hand(study):
    "Bit for bit, in another process"
    r, device = study[4].iloc[1].to_dict(), 'cuda' if torch.cuda.is_available() else 'cpu'
    if r['threads'] != torch.get_num_threads() or device != 'cpu': pytest.skip('another number of threads, or a GPU: equal only up to rounding')
    mine = by_hand(PAIR[1], load())[0]
    assert {k: v for k, v in mine.items() if not k.startswith('seconds')} == {k: v for k, v in r.items() if not k.startswith('seconds')}

def test_the_page_of_a_run(study):
    "What was asked, each field of it; no error; pictures; and the row, which is the one in the store"
    store, *_, table = study
    for run in PAIR:
        nb, r = nbformat.read(store/f'{run.id}.ipynb', 4), read_row(store/f'{run.id}.json')
        asked, = (c.source for c in nb.cells if 'injected-parameters' in c.metadata.get('tags', []))
        names = {}; exec(asked, names)
        assert {k: v for k, v in names.items() if k in FIELDS} == asdict(run)
        outputs = [o for c in nb.cells for o in c.get('outputs', [])]
        assert all(o.output_type != 'error' for o in outputs) and not any(c.execution_count is None for c in nb.cells if c.cell_type == 'code')
        assert sum('image/png' in o.get('data', {}) for o in outputs) >= 3 and not any(o.get('name') == 'stderr' for o in outputs)
        assert dict(row_of(nb), seconds=r['seconds']) == r and {k: r[k] for k in FIELDS} == asdict(run)
    assert set(FIELDS) <= set(table) and table.ratio.tolist() == [.5, .7] and (table.alive - (1 - table.ratio)).abs().max() < .01

def test_a_run_that_fails_under_way(tmp_path):
    "Through papermill and loky: a ratio that leaves a layer without a filter"
    run = Run(**dict(SHORT, ratio=.99))
    table = execute([run], tmp_path, n_jobs=1, progress=False)
    assert table.status.tolist() == ['failed'] and re.search(says("ratio 0.99 would leave layer 'features.0.0' (32 filters) without a filter"), table.error[0])
    nb = nbformat.read(tmp_path/f'{run.id}.ipynb', 4)  # its page shows where
    assert any(o.output_type == 'error' for c in nb.cells for o in c.get('outputs', [])) and found(tmp_path) == [f'{run.id}.ipynb', f'{run.id}.json']
