"""`xprune study` from its arguments to its last line; what papermill would do is played, but for one slow test."""
import errno, json, os, re, shutil, subprocess, sys
from collections import Counter
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from PIL import Image

from xprune_nb import cli, experiments
from xprune_nb.cli import PRESETS, main, preset
from xprune_nb.criteria import CRITERIA
from xprune_nb.data import DATASETS, read_about, write_about
from xprune_nb.experiments import ROW_MIME, Run
from xprune_nb.model import MODELS, baseline, baselines
from xprune_nb.results import thesis

says = lambda *parts: '.*'.join(map(re.escape, parts))
found = lambda folder: sorted(p.name for p in Path(folder).iterdir()) if Path(folder).exists() else []
TINY = dict(criterion=['random', 'magnitude'], schedule=['oneshot', 'iterative'], ratio=[.5, .9], epochs=0, images=10)

# --- presets ---

@pytest.mark.parametrize('name', PRESETS)
def test_presets_are_balanced_grids_of_the_four_criteria(name):
    runs = preset(name)
    cells = Counter((r.schedule, r.criterion, r.ratio) for r in runs)
    assert len({r.id for r in runs}) == len(runs) and set(cells.values()) == {len({r.seed for r in runs})} and len(cells) == 2*4*len({r.ratio for r in runs})
    assert {r.criterion for r in runs} == {'random', 'magnitude', 'conductance', 'lrp'} <= set(CRITERIA)
    paired = Counter(json.dumps(dict(asdict(r), criterion='')) for r in runs)
    assert set(paired.values()) == {4}  # each setting with each criterion: rows compare in pairs
    ends = [(r.seed, r.schedule) for r in runs]
    assert ends == sorted(ends, key=lambda e: (e[0], e[1] == 'iterative'))  # what is quick comes first, and whole seeds before the next

def test_the_thesis_preset_is_the_thesis_grid():
    runs, cells = preset('thesis'), thesis()
    assert {(r.schedule, r.criterion, r.ratio) for r in runs} == set(cells[['schedule', 'criterion', 'ratio']].itertuples(index=False, name=None)) and len(runs) == 120
    assert {(r.data, r.scope, r.coupling, r.steps, r.lr) for r in runs} == {('cifar10', 'local', 'independent', 3, .01)} and {r.seed for r in runs} == {0, 1, 2}

# --- a study: papermill played ---

def figures_of(run):
    "A row that might be"
    a = .6 - .4*run.ratio**2 + .01*(run.criterion == 'magnitude')
    return dict(asdict(run), run_id=run.id, status='done', error='', accuracy_dense=.6, accuracy_pruned=a/2, accuracy_recalibrated=a*.8, accuracy=a, params_dense=2236682, params=10**6,
                macs_dense=6*10**6, macs=3*10**6, alive=1-run.ratio, alive_in_both=(1-run.ratio)**2, seconds_score=.1, seconds_retrain=1., device='cpu', threads=1, versions=dict(torch='2'))

class Player:
    "Plays papermill; `breaks` says whether a run dies, and of what"
    def __init__(self): self.runs, self.breaks = [], lambda run: None
    def __call__(self, run, out, threads):
        self.runs.append(run)
        if e := self.breaks(run): raise e
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('emit(row)', outputs=[nbformat.v4.new_output('display_data', {ROW_MIME: figures_of(run)})])])
        nbformat.write(nb, out)
        return nb

@pytest.fixture
def player(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, '_papermill', p := Player()); monkeypatch.setitem(PRESETS, 'tiny', TINY); monkeypatch.chdir(tmp_path)
    return p

def study(*args): return main(['study', '--preset', 'tiny', '--backend', 'threading', '--jobs', '1', *args])

def test_a_study_draws_its_figures_and_says_what_it_found(player, tmp_path, capsys):
    assert study() == 0
    out = capsys.readouterr().out
    assert len(player.runs) == 8 and len(found('runs/tiny')) == 16
    pictures = re.findall(r'^  (figures/tiny/\S+\.png)$', out, re.M)
    assert re.search(says('8 runs of preset tiny; rows and notebooks go to runs/tiny/, figures to figures/tiny/'), out) and '8 of 8 runs done' in out and 'runs/tiny/*.ipynb' in out
    said = out[out.index('What was found:'):out.index('Where to look:')]
    assert said.count('\n  - ') >= 3 and 'magnitude' in said and f'{.6 - .4*.25 + .01:.3f}' in said
    assert {'oneshot', 'iterative', 'beside'} <= {Path(p).stem for p in pictures}
    for p in map(Path, pictures):
        Image.open(p).verify(); assert p.with_suffix('.svg').read_text().startswith('<svg') and len(pd.read_csv(p.with_suffix('.csv')))
    rows = pd.read_csv('figures/tiny/rows.csv').set_index('run_id')
    assert set(rows.index) == {r.id for r in preset('tiny')} and all(rows.accuracy[r.id] == pytest.approx(figures_of(r)['accuracy']) for r in player.runs)
    table = pd.read_csv('figures/tiny/oneshot.csv').set_index('criterion')
    assert table.loc['magnitude', '0.9'] == pytest.approx(.6 - .4*.81 + .01, abs=5e-4)

def test_a_study_is_taken_up_where_it_stopped(player, capsys, monkeypatch):
    monkeypatch.setattr(cli, 'figures', lambda rows, folder: drawn.append(len(rows)) or []); drawn = []
    player.breaks = lambda run: KeyboardInterrupt() if len(player.runs) == 4 else None
    assert study() == 130 and 'the same command goes on from here' in capsys.readouterr().err
    player.breaks = lambda run: None
    stopped, kept = len(player.runs), [n for n in found('runs/tiny') if n.endswith('.json')]
    assert study() == 0 and len(player.runs) == stopped + 8 - len(kept) and len(kept) == 3
    assert study() == 0 and len(player.runs) == stopped + 8 - len(kept) and drawn == [8, 8]  # nothing is left to do, but the figures are drawn
    assert '8 of 8 runs done' in capsys.readouterr().out

@pytest.mark.parametrize('schedule', ['oneshot', 'iterative', None])
def test_failed_runs_are_named_and_the_others_drawn(player, capsys, schedule):
    player.breaks = lambda run: ValueError('this one is odd') if run.schedule == schedule or (schedule is None and run.criterion == 'random' and run.ratio == .9) else None
    assert study() == 1
    said, bad = capsys.readouterr(), [r for r in player.runs if player.breaks(r)]
    assert set(re.findall(r'^failed: (\S+): this one is odd$', said.err, re.M)) == {r.id for r in bad} and f'{8-len(bad)} of 8 runs done' in said.out and 'Where to look' in said.out
    assert len(pd.read_csv('figures/tiny/rows.csv')) == 8 and {f'{s}.png' for s in ('oneshot', 'iterative') if s != schedule} <= set(found('figures/tiny'))

def test_a_study_of_failures_draws_nothing(player, capsys):
    player.breaks = lambda run: ValueError('all of them')
    assert study() == 1 and capsys.readouterr().err.count(': all of them') == 8 and found('figures/tiny') == []

def test_folders_jobs_and_threads_are_passed_on(player, tmp_path, monkeypatch):
    asked = {}
    def execute(runs, store, backend, n_jobs, threads): asked.update(runs=runs, store=store, backend=backend, n_jobs=n_jobs, threads=threads); return pd.DataFrame([figures_of(r) for r in runs])
    monkeypatch.setattr(experiments, 'execute', execute); monkeypatch.setattr(cli, 'figures', lambda rows, folder: asked.update(figures=folder) or [])
    assert main(['study', '--preset', 'tiny', '--store', 'a/b', '--figures', 'c', '--jobs', '3', '--threads', '2', '--backend', 'dask']) == 0
    assert asked == dict(runs=preset('tiny'), store=Path('a/b'), backend='dask', n_jobs=3, threads=2, figures=Path('c'))
    assert main(['study', '--preset', 'tiny']) == 0
    assert asked == dict(runs=preset('tiny'), store=Path('runs/tiny'), backend='loky', n_jobs=None, threads=1, figures=Path('figures/tiny'))

# --- what is asked for wrongly ---

@pytest.mark.parametrize('args,message', [
    (['--preset', 'tinny'], "no preset called 'tinny'; did you mean 'tiny'? There are: quick, cpu, thesis, tiny"),
    (['--backend', 'loki'], 'loki'), (['--store', 'file'], 'file'), (['--store', 'file/below'], 'file')], ids=str)
def test_what_can_not_be_ends_in_one_line(player, tmp_path, capsys, args, message):
    (tmp_path/'file').write_text('')
    assert main(['study', '--preset', 'tiny', '--backend', 'threading', *args]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith('xprune: ')]
    assert len(err) == 1 and message in err[0] and player.runs == []

@pytest.mark.parametrize('args', [['studdy'], ['study', '--jobs', 'two'], ['study', '--prset', 'quick']], ids=str)
def test_arguments_that_are_none_show_the_usage(capsys, args):
    with pytest.raises(SystemExit) as e: main(args)
    assert e.value.code == 2 and 'usage: xprune' in capsys.readouterr().err

def test_help_names_the_presets(capsys):
    with pytest.raises(SystemExit) as e: main(['study', '--help'])
    out = capsys.readouterr().out
    assert e.value.code == 0 and all(p in out for p in PRESETS)

def test_a_full_disk_ends_in_one_line(player, monkeypatch, capsys):
    def full(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        assert study() == 2
    assert re.search(says('xprune: ', 'could not be written (No space left on device)', 'Free some space'), capsys.readouterr().err)
    assert [n for n in found('runs/tiny') if 'part' in n or n.endswith('.json')] == []

def test_the_command_is_installed():
    command, = entry_points(group='console_scripts', name='xprune')
    assert command.load() is main

# --- the front door ---

ROOT = Path(__file__).resolve().parent.parent

def sections(text):
    "What stands under `What there is` and under `What to do next`, by its first word"
    there, todo = re.split(r'\n\nWhat to do next.*\n', text.partition('\nWhat there is\n')[2])
    entries = re.findall(r'^  (\w+) +(.*(?:\n {13}.*)*)', there, re.M)
    return {k: ' '.join(v.split()) for k, v in entries}, dict(re.findall(r'^  (\w+) +(.*)$', todo, re.M))

def test_without_a_word_it_says_what_there_is(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    have, todo = sections(out)
    assert have['criteria'] == ', '.join(CRITERIA) and have['networks'] == ', '.join(MODELS)
    assert have['presets'] == ', '.join(f'{n} ({len(preset(n))} runs)' for n in PRESETS)
    assert have['baselines'] == ' '.join(f'{n}: {baseline(n).test_accuracy:.4f} on test' for n in baselines())
    embedded, others = re.fullmatch(r'(.*) \(in the package\) (.*) \(fetched, or brought by you\)', have['data']).groups()
    assert [*embedded.split(', '), *others.split(', ')] == list(DATASETS) and embedded == 'cifar10-mini'
    stems = [p.stem for p in (ROOT/'nbs').rglob('*.ipynb') if not re.search(r'[/\\][._]', str(p.relative_to(ROOT)))]
    assert Counter(re.findall(r'\b[\w.-]+\b(?!/:)', re.sub(r'\S+/:', '', have['notebooks']))) == Counter(stems)
    assert list(todo) == ['look', 'study', 'docs'] and todo['study'].startswith('xprune study ')
    assert len(out.splitlines()) < 40 and max(map(len, out.splitlines())) <= 110

def test_baselines_beside_the_study_are_named(capsys, monkeypatch, tmp_path):
    about = read_about(baseline().folder/f'baseline-{baseline().name}.json'); monkeypatch.setenv('XPRUNE_BASELINES', str(tmp_path))
    for name, accuracy in dict(zoo=.7, ant=.71234).items(): write_about(tmp_path/f'baseline-{name}.json', {**about, 'name': name, 'test_accuracy': accuracy})
    assert main([]) == 0
    assert sections(capsys.readouterr().out)[0]['baselines'] == f'ant: 0.7123 on test {baseline().name}: {baseline().test_accuracy:.4f} on test zoo: 0.7000 on test'
    assert baselines() == ['ant', baseline().name, 'zoo']

@pytest.mark.parametrize('how', [['-m', 'xprune_nb'], ['-c', 'from xprune_nb.cli import main; main()']], ids=['module', 'command'])
def test_it_says_so_from_anywhere_and_without_torch(how, tmp_path, capsys):
    code = ['-X', 'importtime', *how] # what is imported goes to stderr
    done = subprocess.run([sys.executable, *code], cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    imported = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and 'xprune_nb.cli' in imported and not imported & {'torch', 'numpy', 'pandas', 'altair', 'joblib'}
    main([])
    body = lambda text: sections(text)
    assert body(done.stdout) == body(capsys.readouterr().out)
    assert f'(cd {os.path.relpath(ROOT, tmp_path)})' in done.stdout

def test_python_m_passes_words_on():
    done = subprocess.run([sys.executable, '-m', 'xprune_nb', 'study', '--preset', 'quik'], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "xprune: no preset called 'quik'; did you mean 'quick'? There are: quick, cpu, thesis\n")

def test_what_is_added_to_a_room_is_there(tmp_path, monkeypatch):
    shutil.copytree(ROOT/'xprune_nb', tmp_path/'xprune_nb', ignore=shutil.ignore_patterns('*.safetensors', '*.webp', '__pycache__'))
    monkeypatch.setattr(cli, 'HOME', tmp_path/'xprune_nb')
    room = tmp_path/'xprune_nb'/'criteria.py'
    room.write_text(room.read_text().replace('CRITERIA = dict(\n', 'CRITERIA = dict(brand_new=None,\n'))
    have, _ = sections(cli.there())
    assert have['criteria'] == ', '.join(['brand_new', *CRITERIA])
    assert have['notebooks'] == 'in the repository, not in an installed wheel: clone it' # there is no nbs/ beside this one

@pytest.mark.parametrize('source,keys', [
    ("T = dict(a=1, b=f(2))", ['a', 'b']), ("T = {'a-b': 1, **dict(c=2)}", ['a-b', 'c']), ("T = dict(a=1, **{n: g(n) for n in ('x', 'y')}, z=0)", ['a', 'x', 'y', 'z']),
    ("T = {}", []), ("U = dict(a=1)", "'room' has no table T"), ("T = dict(OTHER)", '`dict(OTHER)` is no table of names'), ("T = {n: 0 for n in names}", '`{n: 0 for n in names}` is no table')], ids=str)
def test_names_are_read_off_the_source(tmp_path, monkeypatch, source, keys):
    monkeypatch.setattr(cli, 'HOME', tmp_path)
    (tmp_path/'room.py').write_text(f'import nothing_of_that_name\n{source}\n')
    if isinstance(keys, list): assert cli.names('room', 'T') == keys
    else:
        with pytest.raises(ValueError, match=re.escape(keys)): cli.names('room', 'T')

# --- the real thing ---

@pytest.mark.slow
def test_a_study_through_papermill_and_loky(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PRESETS, 'tiny', dict(TINY, schedule='oneshot', ratio=[.5, .7]))
    ask = ['study', '--preset', 'tiny', '--store', str(tmp_path/'runs'), '--figures', str(tmp_path/'figures')]
    assert main(ask) == 0
    out, before = capsys.readouterr().out, {p: p.stat().st_mtime_ns for p in (tmp_path/'runs').iterdir()}
    assert '4 of 4 runs done' in out and len(before) == 8 and {'oneshot.png', 'beside.svg', 'rows.csv'} <= set(found(tmp_path/'figures'))
    table = pd.read_csv(tmp_path/'figures'/'rows.csv')
    assert table.accuracy.between(0, 1).all() and (table.groupby('ratio').accuracy_dense.nunique() == 1).all() and (abs(table.alive + table.ratio - 1) < .01).all()
    assert main(ask) == 0 and {p: p.stat().st_mtime_ns for p in (tmp_path/'runs').iterdir()} == before
