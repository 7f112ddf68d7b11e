"""`xprune` from its words to its last line; what papermill would do is played, but for the slow tests and one kill."""
import argparse, errno, json, math, os, re, shutil, signal, subprocess, sys, time
from collections import Counter
from dataclasses import asdict, fields, replace
from importlib.metadata import entry_points
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
from PIL import Image

from xprune_nb import cli, experiments
from xprune_nb.cli import COMMANDS, PRESETS, Study, lacking, main, preset, read_grid, runs_of
from xprune_nb.criteria import CRITERIA
from xprune_nb.data import DATASETS, read_about, write_about
from xprune_nb.experiments import BACKENDS, ROW_MIME, HIDDEN, Run, asked_for, execute, grid, read_table, row_of, status, store as room
from xprune_nb.model import MODELS, baseline, baselines
from xprune_nb.experiments.thesis import thesis

ROOT = Path(__file__).resolve().parent.parent
says = lambda *parts: '.*'.join(map(re.escape, parts))
found = lambda folder: sorted(p.name for p in Path(folder).iterdir() if p.name != HIDDEN) if Path(folder).exists() else []
TINY = dict(criterion=['random', 'magnitude'], ratio=[.5, .9], epochs=0, images=10)
BOTH = [dict(TINY, schedule=s) for s in ('oneshot', 'iterative')]

# --- presets ---

def cells(g): return Counter((r.schedule, r.criterion, r.ratio) for r in g)

@pytest.mark.parametrize('name', PRESETS)
def test_presets_are_balanced_grids_of_the_four_criteria(name):
    runs = runs_here(name)
    assert len(runs) == len({r.id for r in runs}) == PRESETS[name].runs
    assert {r.criterion for r in runs} == {'random', 'magnitude', 'conductance', 'lrp'} <= set(CRITERIA)
    assert len(set(cells(runs).values())) == 1  # each entry as often as any other
    paired = Counter(json.dumps(dict(asdict(r), criterion='')) for r in runs)
    assert set(paired.values()) == {4}  # each setting with each criterion: rows compare in pairs
    ends = [(r.seed, r.schedule == 'iterative') for r in runs]
    assert ends == sorted(ends)  # what is quick comes first, and whole baselines before the next

def runs_here(name):
    "The runs of a preset, as if all its baselines were there: one stands for those that are not"
    there = lambda g: g | dict(baseline=g['baseline'] if g['baseline'] in baselines() else baselines()[0]) if 'baseline' in g else g
    return [r for g in PRESETS[name].grids for r in grid(**there(g))]

def test_quick_and_cpu_ask_what_they_asked_before():
    asked = dict(criterion=['random', 'magnitude', 'conductance', 'lrp'], schedule=['oneshot', 'iterative'])
    quick = grid(**asked, data='cifar10-mini', ratio=[.5, .9], images=64)
    cpu = grid(**asked, data='cifar10', ratio=[.5, .7, .9], images=128)
    for name, runs in dict(quick=quick, cpu=cpu).items(): assert preset(name) == sorted(runs, key=lambda r: r.schedule == 'iterative')
    assert {r.id for r in cpu} == set(pd.read_csv(ROOT/'figures'/'cpu'/'rows.csv').run_id)

PROTOCOL = dict(data='cifar10', rewind=5, augment=False, epochs=15, images=512, path_steps=20)
ORDER = [(r, c) for r in (.5, .9, .7, .6, .8) for c in ('conductance', 'random', 'magnitude', 'lrp')]

def test_the_thesis_preset_is_the_thesis_grid():
    runs = runs_here('thesis')
    assert set(cells(runs)) == set(thesis()[['schedule', 'criterion', 'ratio']].itertuples(index=False, name=None)) and len(runs) == 120
    assert {(r.data, r.scope, r.coupling, r.steps, r.lr, r.epochs, r.rewind, r.augment) for r in runs} == {('cifar10', 'local', 'independent', 3, .01, 15, 5, False)}
    assert [r.recipe(last=False).epochs for r in runs if r.schedule == 'iterative'] == [5]*60
    assert [g['baseline'] for g in PRESETS['thesis'].grids[::2]] == ['mobilenet_v2-cifar10', 'mobilenet_v2-cifar10-seed1', 'mobilenet_v2-cifar10-seed2']
    assert [(r.seed, r.schedule, r.ratio, r.criterion) for r in runs] == [(k, s, *o) for k in range(3) for s in ('oneshot', 'iterative') for o in ORDER]

def test_the_first_runs_of_the_thesis_are_those_that_are_under_way():
    "The grid was begun before there was this preset: its rows count"
    want = [Run(**PROTOCOL, schedule='oneshot', ratio=r, criterion=c, baseline='mobilenet_v2-cifar10', seed=0) for r, c in ORDER]
    assert preset('thesis')[:20] == want and want[0].id == 'oneshot-conductance-0.5-seed0-ed7c5ce7'
    second = [Run(**PROTOCOL, schedule='iterative', epochs_between=5, ratio=r, criterion=c, baseline='mobilenet_v2-cifar10', seed=0) for r, c in ORDER]
    assert preset('thesis')[20:40] == second

def test_the_coupled_half_is_the_same_protocol():
    runs = runs_here('thesis-coupled')
    assert runs[:12] == [Run(**PROTOCOL, coupling='coupled', ratio=r, criterion=c, baseline='mobilenet_v2-cifar10', seed=0) for r in (.3, .5, .7) for c in ('conductance', 'random', 'magnitude', 'lrp')]
    assert len(runs) == 36 and {(r.seed, r.coupling, r.schedule) for r in runs} == {(k, 'coupled', 'oneshot') for k in range(3)}

@pytest.fixture
def one_more_baseline(monkeypatch, tmp_path):
    "Only the embedded baseline, and one beside the study"
    monkeypatch.setenv('XPRUNE_BASELINES', str(tmp_path/'beside'))
    about = read_about(baseline().folder/f'baseline-{baseline().name}.json')
    write_about(tmp_path/'beside'/'baseline-mobilenet_v2-cifar10-seed1.json', {**about, 'name': 'mobilenet_v2-cifar10-seed1'})

def test_runs_whose_baseline_is_not_there_are_left_out_and_it_is_said(one_more_baseline, monkeypatch, tmp_path, capsys):
    assert lacking('thesis') == lacking('thesis-coupled') == ['mobilenet_v2-cifar10-seed2'] and lacking('quick') == []
    assert {(r.baseline, r.seed) for r in preset('thesis')} == {('mobilenet_v2-cifar10', 0), ('mobilenet_v2-cifar10-seed1', 1)} and len(preset('thesis')) == 80
    monkeypatch.setattr(experiments, 'execute', lambda runs, *args, **kw: pd.DataFrame([dict(run_id=r.id, status='failed', error='') for r in runs])); monkeypatch.chdir(tmp_path)
    assert main(['study', '--preset', 'thesis']) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith('120 runs of preset thesis (about ') and out[1] == '80 of them for now: no baseline mobilenet_v2-cifar10-seed2 yet'

def test_what_a_preset_costs_is_said_everywhere(capsys):
    for ask in [], ['--help'], ['study', '--help']:
        try: main(ask)
        except SystemExit as e: assert e.code == 0
        out = capsys.readouterr().out
        assert all(f'{n}: {s.runs} runs, {s.about}; {s.cost}' in out for n, s in PRESETS.items())
    assert PRESETS['quick'].cost in ' '.join((ROOT/'README.md').read_text().split()), 'README.md says another time for the quick study'

# --- a study: papermill played ---

def figures_of(run):
    "A row that might be"
    a = .6 - .4*run.ratio**2 + .01*(run.criterion == 'magnitude')
    return dict(asdict(run), run_id=run.id, status='done', error='', accuracy_dense=.6, accuracy_pruned=a/2, accuracy_recalibrated=a*.8, accuracy=a, params_dense=2236682, params=10**6,
                macs_dense=6*10**6, macs=3*10**6, alive=1-run.ratio, alive_in_both=(1-run.ratio)**2, seconds_score=.1, seconds_retrain=1., device='cpu', versions=dict(torch='2'), accuracy_epochs=[.1, a])

class Player:
    "Plays papermill; `breaks` says whether a run dies, and of what"
    def __init__(self): self.runs, self.breaks, self.fresh = [], lambda run: None, set()
    def __call__(self, run, out, work, wanted, fresh):
        self.runs.append(run); self.fresh.add(fresh)
        if e := self.breaks(run): raise e
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('emit(row)', outputs=[nbformat.v4.new_output('display_data', {ROW_MIME: figures_of(run)})])])
        nbformat.write(nb, out)
        return row_of(nb)

@pytest.fixture
def player(monkeypatch, tmp_path):
    monkeypatch.setattr(room, 'carry_out', p := Player()); monkeypatch.setitem(PRESETS, 'tiny', Study(BOTH, 'tiny', 'nothing')); monkeypatch.chdir(tmp_path)
    return p

def study(*args): return main(['study', '--preset', 'tiny', '--backend', 'sequential', *args])

def test_a_study_draws_its_figures_and_says_what_it_found(player, capsys):
    assert study() == 0
    out = capsys.readouterr().out
    assert len(player.runs) == 8 and len(found('runs/tiny')) == 16 and player.fresh == {False}
    pictures = re.findall(r'^  (figures/tiny/\S+\.png)$', out, re.M)
    assert out.startswith('8 runs of preset tiny (nothing); rows and notebooks go to runs/tiny/, figures to figures/tiny/\n')
    assert '8 of 8 runs done' in out and 'runs/tiny/*.ipynb' in out
    said = out[out.index('What was found:'):out.index('Where to look:')]
    assert said.count('\n  - ') >= 3 and 'magnitude' in said and f'{.6 - .4*.25 + .01:.3f}' in said
    assert {'oneshot', 'iterative', 'beside', 'stages'} == {Path(p).stem for p in pictures}
    for p in map(Path, pictures):
        Image.open(p).verify(); assert p.with_suffix('.svg').read_text().startswith('<svg') and len(pd.read_csv(p.with_suffix('.csv')))
    rows = read_table('figures/tiny/rows.csv').set_index('run_id')
    assert set(rows.index) == {r.id for r in preset('tiny')} and all(rows.accuracy[r.id] == figures_of(r)['accuracy'] and rows.accuracy_epochs[r.id] == figures_of(r)['accuracy_epochs'] for r in player.runs)
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
    said, bad = capsys.readouterr(), {r.id for r in player.runs if player.breaks(r)}
    assert set(re.findall(r'^failed: (\S+): this one is odd$', said.err, re.M)) == bad and f'{8-len(bad)} of 8 runs done' in said.out and 'Where to look' in said.out
    assert len(pd.read_csv('figures/tiny/rows.csv')) == 8 and {f'{s}.png' for s in ('oneshot', 'iterative') if s != schedule} <= set(found('figures/tiny'))

def test_a_study_of_failures_draws_nothing(player, capsys):
    player.breaks = lambda run: ValueError('all of them')
    assert study() == 1 and capsys.readouterr().err.count('failed: oneshot') >= 4 and found('figures/tiny') == []

def test_charts_that_these_rows_do_not_have_are_left_out_and_said(player, capsys, monkeypatch):
    "A grid of one's own need not share an entry with the thesis"
    monkeypatch.setitem(PRESETS, 'tiny', Study([dict(TINY, criterion=['taylor', 'random'], ratio=[.2, .3])]))
    assert study() == 0
    said = capsys.readouterr()
    assert re.search(says('not drawn: beside: ', 'is in the thesis'), said.err) and {'oneshot.png', 'rows.csv', 'stages.png'} <= set(found('figures/tiny'))
    assert '4 of 4 runs done' in said.out and 'Where to look' in said.out

def test_the_words_are_passed_on(player, tmp_path, monkeypatch):
    asked = {}
    def execute(runs, store, backend, n_jobs, **kw): asked.update(kw, runs=runs, store=store, backend=backend, n_jobs=n_jobs); return pd.DataFrame([figures_of(r) for r in runs])
    monkeypatch.setattr(experiments, 'execute', execute); monkeypatch.setattr(cli, 'figures', lambda rows, folder: asked.update(figures=folder) or [])
    words = 'study --preset tiny --store a/b --figures c --jobs 3 --threads 2 --backend dask --address tcp://here:1 --fresh'
    assert main(words.split()) == 0
    assert asked == dict(runs=[replace(r, threads=2) for r in preset('tiny')], store=Path('a/b'), backend='dask', n_jobs=3, figures=Path('c'), known=None, address='tcp://here:1', fresh=True)
    assert main(['study', '--preset', 'tiny']) == 0
    assert asked == dict(runs=preset('tiny'), store=Path('runs/tiny'), backend='loky', n_jobs=None, figures=Path('figures/tiny'), known=None, address=None, fresh=False)

@pytest.mark.parametrize('kind', ['csv', 'parquet'])
def test_rows_that_are_known_are_not_made_again(player, capsys, kind):
    if kind == 'parquet': pytest.importorskip('pyarrow')
    known = preset('tiny')[:3]
    experiments.export(pd.DataFrame([dict(figures_of(r), accuracy=.125) for r in known]), f'known.{kind}')
    assert study('--known', f'known.{kind}') == 0
    assert [r.id for r in player.runs] == [r.id for r in preset('tiny')[3:]] and len(found('runs/tiny')) == 10
    rows = read_table('figures/tiny/rows.csv')
    assert rows.run_id.tolist() == [r.id for r in preset('tiny')] and (rows.accuracy == .125).tolist() == [True]*3 + [False]*5
    assert main(['status', 'runs/tiny']) == 0 and 'of 8 runs 8 done\n' in capsys.readouterr().out

def test_a_known_table_that_is_not_whole_is_refused(player, capsys):
    "A row of another run would count as this one"
    table = pd.DataFrame([figures_of(r) for r in preset('tiny')[:2]])
    for odd, message in ({'ratio': .7}, "row 1 of known.csv is not whole: it holds another run, "), ({'accuracy': 7.}, 'row 1 of known.csv is not whole: its accuracy is 7.0'), ({'ratio': 2}, 'row 1 of known.csv is not whole: ratio is 2'):
        experiments.export(table.assign(**odd), 'known.csv')
        assert study('--known', 'known.csv') == 2 and message in capsys.readouterr().err
    Path('known.csv').write_text('a,b\n1,2\n')
    assert study('--known', 'known.csv') == 2 and 'known.csv has no column run_id: it is no table of rows' in capsys.readouterr().err
    assert player.runs == []

@pytest.mark.parametrize('path', ['cpu', 'coupling'])
def test_the_committed_tables_are_whole(path): assert set(read_table(ROOT/'figures'/path/'rows.csv').status) == {'done'}

# --- a grid from a file ---

TOML = """images = 10
epochs = 0
rewind = ["last", 5]

[[grid]]
criterion = ["random", "magnitude"]

[[grid]]
criterion = "lrp"
ratio = [0.25, 0.5]
rewind = 5
"""
YAML = """images: 10
epochs: 0
rewind: [last, 5]
grid:
- criterion: [random, magnitude]
- criterion: lrp
  ratio: [0.25, 0.5]
  rewind: 5
"""

@pytest.mark.parametrize('name,text', [('g.toml', TOML), ('g.yaml', YAML), ('g.yml', YAML)], ids=['toml', 'yaml', 'yml'])
def test_a_grid_from_a_file(tmp_path, name, text):
    if name != 'g.toml': pytest.importorskip('yaml')
    (tmp_path/name).write_text(text)
    study = read_grid(tmp_path/name)
    rest = dict(images=10, epochs=0)
    assert runs_of(study) == [*grid(**rest, rewind=['last', 5], criterion=['random', 'magnitude']), *grid(**rest, rewind=5, criterion='lrp', ratio=[.25, .5])] and study.runs == 6

def test_a_study_of_a_file(player, capsys):
    Path('mine.toml').write_text('epochs = 0\nimages = 10\ncriterion = ["random", "magnitude"]\nratio = [0.5, 0.9]')
    assert main('study --grid mine.toml --backend sequential'.split()) == 0
    out = capsys.readouterr().out
    assert out.startswith('4 runs of mine.toml; rows and notebooks go to runs/mine/, figures to figures/mine/\n') and len(found('runs/mine')) == 8 and 'rows.csv' in found('figures/mine')
    assert player.runs == grid(**TINY)
    assert main('study --grid mine.toml --backend sequential --threads 2'.split()) == 0 and {r.threads for r in player.runs[4:]} == {2}

@pytest.mark.parametrize('text,message', [
    ('criteria = "lrp"', "g.toml: no field of Run called 'criteria'; did you mean 'criterion'? There are: data, baseline, criterion, "), ('criterion = ["lrp", "lpr"]', "g.toml: no criterion called 'lpr'; did you mean 'lrp'?"),
    ('ratio = [0.5', 'g.toml is no TOML: '), ('', 'g.toml says nothing, expected fields of Run, such as ratio = [0.5, 0.9]'), ('ratio = []', 'g.toml has an empty list'), ('[[grid]]\nratio = []\n[[grid]]\nratio = 0.5', 'g.toml has an empty list'),
    ('grid = 3', "g.toml says {'grid': 3}, expected fields of Run"), ('[ratio]\na = 1', "g.toml says {'ratio': {'a': 1}}, expected"), ('seed = [[1, 2]]', 'g.toml: seed is [1, 2] (list), expected int'), ('epochs = "3"', "g.toml: epochs is '3' (str), expected int"),
    ('epochs_between = 2', 'g.toml: epochs_between is 2 and schedule'), ('baseline = "other"', "g.toml: no baseline called 'other'"), ('threads = 2', '--threads is 2 and the grid has threads'), ('ratio = 1979-05-27', 'g.toml: ratio is datetime.date(1979, 5, 27)')], ids=str)
def test_a_file_that_is_no_grid_is_refused_by_its_name(player, capsys, text, message):
    Path('g.toml').write_text(text)
    assert main(['study', '--grid', 'g.toml', *(['--threads', '2'] if text.startswith('threads') else [])]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1 and player.runs == []

@pytest.mark.parametrize('name,message', [('none.toml', 'none.toml could not be read (No such file or directory)'), ('here.toml', 'here.toml could not be read (Is a directory)'), ('g.json', "no kind of grid file called '.json'")])
def test_a_file_that_is_not_there(player, capsys, name, message):
    Path('here.toml').mkdir()
    assert main(['study', '--grid', name]) == 2 and message in capsys.readouterr().err

def test_what_reads_a_file_and_is_not_installed_is_named(monkeypatch, tmp_path):
    (tmp_path/'g.yaml').write_text('ratio: 0.5'); (tmp_path/'g.toml').write_text('ratio = 0.5')
    for name in 'yaml', 'tomllib', 'tomli': monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OSError, match=says('g.yaml is YAML, which needs pip install pyyaml')): read_grid(tmp_path/'g.yaml')
    with pytest.raises(OSError, match=says('g.toml is TOML, which needs Python 3.11, or pip install tomli')): read_grid(tmp_path/'g.toml')

def test_a_yaml_file_makes_no_objects(tmp_path):
    pytest.importorskip('yaml')
    (tmp_path/'g.yaml').write_text(f'ratio: !!python/object/apply:os.mkdir ["{tmp_path}/made"]')
    with pytest.raises(ValueError, match='g.yaml is no YAML'): read_grid(tmp_path/'g.yaml')
    assert not (tmp_path/'made').exists()

# --- what one does with a study ---

@pytest.fixture
def broken(player):
    "A study of eight runs: two failed, the last two were never reached"
    player.breaks = lambda run: KeyboardInterrupt() if len(player.runs) == 7 else ValueError('this one is odd') if len(player.runs) in (2, 5) else None
    assert study() == 130
    player.breaks = lambda run: None
    player.bad, player.runs = [r for i, r in enumerate(player.runs) if i in (1, 4)], []
    return player

def test_status_says_what_is_done_failed_and_waits(broken, capsys):
    capsys.readouterr()
    assert main(['status', 'runs/tiny']) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r'runs/tiny: of 8 runs 4 done, 2 failed, 2 waiting; about \d:\d\d:\d\d left', first) or first == 'runs/tiny: of 8 runs 4 done, 2 failed, 2 waiting'
    assert rest == [f'  {r.id}: failed: this one is odd' for r in broken.bad]  # this process is still there, so somebody is at it

def test_status_says_what_is_running_and_what_the_rest_takes(broken, capsys, monkeypatch):
    waiting = preset('tiny')[6:]
    about = dict(what='retraining', step=2, steps=3, epoch=4, epochs=15, begin=time.time()-60, host=experiments.store.socket.gethostname(), pid=os.getpid())
    Path(f'runs/tiny/{HIDDEN}/{waiting[0].id}.progress').write_text(json.dumps(about))
    for p in Path('runs/tiny').glob('*.json'): p.write_text(json.dumps(json.loads(p.read_text()) | dict(seconds=100.)))
    capsys.readouterr(); main(['status', 'runs/tiny'])
    out = capsys.readouterr().out.splitlines()
    jobs = json.loads(Path(f'runs/tiny/{HIDDEN}/study.json').read_text())['n_jobs']
    assert jobs == 1 and out[0] == 'runs/tiny: of 8 runs 4 done, 1 running, 2 failed, 1 waiting; about 0:02:19 left' or out[0].endswith('about 0:02:20 left')
    assert out[1].startswith(f'  {waiting[0].id}: retraining, step 2 of 3, epoch 4 of 15 (0:01:0')

def test_a_study_that_was_killed_is_not_said_to_run(broken, capsys):
    "A run's last word outlives it where it was killed"
    ended = subprocess.Popen([sys.executable, '-c', '']); ended.wait()
    gone = dict(host=experiments.store.socket.gethostname(), pid=ended.pid)
    work, r = Path('runs/tiny')/HIDDEN, preset('tiny')[6]
    (work/f'{r.id}.progress').write_text(json.dumps(dict(gone, what='scoring', begin=0.)))
    (work/'study.json').write_text(json.dumps(json.loads((work/'study.json').read_text()) | gone))
    capsys.readouterr(); main(['status', 'runs/tiny'])
    out = capsys.readouterr().out
    assert '4 done, 2 failed, 2 waiting' in out and out.endswith('\nNobody is at it: the command that began it goes on from here.\n')

def test_retry_takes_up_what_failed_and_nothing_else(broken, capsys):
    assert main(['retry', 'runs/tiny', '--backend', 'sequential']) == 0
    assert broken.runs == broken.bad and '2 of 2 runs done now' in capsys.readouterr().out
    assert len(asked_for('runs/tiny')) == 8 and status('runs/tiny').state.tolist() == ['done']*6 + ['waiting']*2  # the study is what it was
    assert main(['retry', 'runs/tiny', '--backend', 'sequential']) == 0 and 'no run of runs/tiny has failed' in capsys.readouterr().out
    assert len(broken.runs) == 2

def test_retry_that_fails_again_says_so(broken, capsys):
    broken.breaks = lambda run: ValueError('still odd') if run == broken.bad[0] else None
    assert main(['retry', 'runs/tiny', '--backend', 'sequential']) == 1
    said = capsys.readouterr()
    assert '1 of 2 runs done now' in said.out and f'failed: {broken.bad[0].id}: still odd' in said.err

@pytest.mark.parametrize('kind', ['csv', 'parquet'])
def test_export_writes_one_table(broken, capsys, kind):
    if kind == 'parquet': pytest.importorskip('pyarrow')
    assert main(['export', 'runs/tiny', f'out/all.{kind}']) == 0 and f'6 rows: out/all.{kind}' in capsys.readouterr().out
    table, want = read_table(f'out/all.{kind}'), experiments.rows('runs/tiny')
    assert table.status.value_counts().to_dict() == dict(done=4, failed=2)
    same = lambda a, b: a == b or a != a and b != b
    for a, b in zip(table.to_dict('records'), want.to_dict('records')): assert all(same(a[k], b[k]) for k in b)

def test_a_table_of_many_kinds_can_be_parquet(player):
    "`rewind` is a number or a word, and some rows are older than a column"
    pytest.importorskip('pyarrow')
    runs = grid(**SHORT, rewind=['last', 5, 0], floor=[1, .1])
    rows = pd.DataFrame([figures_of(r) for r in runs]); rows.loc[0, 'accuracy_dense'] = math.nan
    for kind in 'csv', 'parquet':
        back = read_table(experiments.export(rows, f'all.{kind}'))
        assert back.run_id.tolist() == [r.id for r in runs] and back.rewind.tolist() == [r.rewind for r in runs] and back.accuracy_dense.isna().tolist() == [True] + [False]*5

SHORT = dict(criterion='random', epochs=0, images=10)

def test_clean_only_says_until_it_is_told(broken, capsys):
    work, r = Path('runs/tiny')/HIDDEN, preset('tiny')[0]
    left = work/f'{r.id}.there-1-2.part.ipynb'; left.write_text('half a page')
    (work/'cache').mkdir(exist_ok=True); (work/'cache'/'scores-1.safetensors').write_text('x')
    before = found('runs/tiny'); capsys.readouterr()
    assert main(['clean', 'runs/tiny']) == 0 and left.exists()
    dry = capsys.readouterr().out
    assert str(left) in dry and 'cache' not in dry and dry.endswith('would go, rows and pages stay; --yes removes them\n')
    assert main(['clean', 'runs/tiny', '--yes']) == 0 and not left.exists() and (work/'cache').exists() and found('runs/tiny') == before
    assert main(['clean', 'runs/tiny', '--yes', '--cache']) == 0 and not (work/'cache').exists()
    capsys.readouterr(); assert main(['clean', 'runs/tiny', '--cache']) == 0 and capsys.readouterr().out == 'nothing is left over in runs/tiny\n'
    assert experiments.last_study('runs/tiny') and found('runs/tiny') == before

@pytest.mark.parametrize('words', ['status none', 'retry none', 'export none all.csv', 'clean none'])
def test_a_store_that_is_not_there(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert re.fullmatch(r'xprune: there is no (store|study in) none: nothing was run there\n', capsys.readouterr().err) and not Path('none').exists()

def test_list_has_every_name(capsys):
    assert main(['list']) == 0
    out = capsys.readouterr().out
    there = {k: v.split(', ') for k, v in re.findall(r'^  (\w+)\b(?: = \S+)? +(.*(?:\n {13,}.*)*)', re.sub(r'\n {13,}', ' ', out), re.M)}
    assert there['criterion'] == list(CRITERIA) and there['data'] == list(DATASETS) and there['networks'] == list(MODELS) and there['baseline'] == baselines()
    assert there['presets'] == list(PRESETS) and there['backends'] == list(BACKENDS) and max(map(len, out.splitlines())) <= 110
    assert re.findall(r'^  (\w+) = ', out, re.M) == [f.name for f in fields(Run)]

# --- what is asked for wrongly ---

@pytest.mark.parametrize('args,message', [
    (['--preset', 'tinny'], "no preset called 'tinny'; did you mean 'tiny'? There are: quick, cpu, thesis, thesis-coupled, tiny"),
    (['--backend', 'loki'], "no backend called 'loki'; did you mean 'loky'?"), (['--store', 'file'], 'file'), (['--store', 'file/below'], 'file'),
    (['--jobs', '0'], "argument --jobs: '0' is given, expected a whole number, at least 1"), (['--jobs', 'two'], "argument --jobs: 'two' is given"), (['--jobs', '-1'], "argument --jobs: '-1' is given"), (['--jobs', '1.5'], "argument --jobs: '1.5' is given"),
    (['--threads', '0'], "argument --threads: '0' is given"), (['--threads', '9999'], 'threads is 9999, expected at most 1024'), (['--known', 'none.csv'], 'there is no table none.csv'), (['--known', 'file'], "no kind of table called ''"),
    (['--backend', 'dask'], "backend is 'dask' without address, expected --address tcp://HOST:8786"), (['--address', 'tcp://here:1'], "address is 'tcp://here:1' and backend is 'threading', expected one of a cluster: dask, ray"),
    (['--grid', 'a.toml'], 'not allowed with argument'), (['--prset', 'quick'], 'unrecognized arguments: --prset quick'), (['--jobs'], 'expected one argument')], ids=str)
def test_what_can_not_be_ends_in_one_line(player, tmp_path, capsys, args, message):
    (tmp_path/'file').write_text('')
    assert main(['study', '--preset', 'tiny', '--backend', 'threading', *args]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith('xprune: ')]
    assert len(err) == 1 and message in err[0] and player.runs == []

@pytest.mark.parametrize('words,message', [('studdy', "no command called 'studdy'; did you mean 'study'? There are: study, status, retry, export, clean, list"), ('status', 'the following arguments are required: STORE; xprune status --help says what there is'),
    ('export runs', 'the following arguments are required: FILE'), ('retry runs --jobs 0', "argument --jobs: '0' is given"), ('retry runs --backend dask', 'without address'), ('--verson', 'unrecognized arguments: --verson'), ('clean a b', 'unrecognized arguments: b')])
def test_words_that_are_none_end_in_one_line(capsys, words, message):
    assert main(words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith('xprune: ') and message in err and err.count('\n') == 1

def test_a_store_that_is_no_table_is_refused_by_export(broken, capsys):
    assert main(['export', 'runs/tiny', 'all.xlsx']) == 2 and "no kind of table called '.xlsx'" in capsys.readouterr().err
    assert main(['export', 'runs/tiny', 'runs/tiny']) == 2

@pytest.mark.parametrize('command', COMMANDS)
def test_each_command_has_help_that_fits_a_terminal(capsys, command, monkeypatch):
    monkeypatch.setenv('COLUMNS', '100')
    with pytest.raises(SystemExit) as e: main([command, '--help'])
    out = capsys.readouterr().out
    assert e.value.code == 0 and COMMANDS[command] in ' '.join(out.split()) and max(map(len, out.splitlines())) <= 100

def test_help_has_examples_that_can_be_said(capsys):
    with pytest.raises(SystemExit): main(['--help'])
    examples = re.findall(r'^  xprune (.+?)(?:   .*)?$', capsys.readouterr().out.partition('examples')[2], re.M)
    assert len(examples) >= 5 and {e.split()[0] for e in examples} >= {'study', 'status', 'export'}
    for e in examples: assert cli._parser().parse_args(e.split()).command == e.split()[0]

def test_help_names_the_backends_that_there_are():
    words = cli._parser()._subparsers._group_actions[0].choices['study'].format_help()
    said = words[words.index('  --backend BACKEND'):words.index('  --address ADDRESS')]
    assert all(b in said for b in BACKENDS)

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

# --- at once ---

HEAVY = {'torch', 'numpy', 'pandas', 'altair', 'joblib', 'yaml', 'xprune_nb.experiments'}

def shell(*words, cwd=ROOT, **env):
    code = ['-X', 'importtime', '-m', 'xprune_nb', *words] # what is imported goes to stderr
    done = subprocess.run([sys.executable, *code], cwd=cwd, env={**os.environ, 'PYTHONPATH': str(ROOT), **env}, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if not line.startswith('import time:')]
    return done.returncode, done.stdout, '\n'.join(said), {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}

@pytest.mark.parametrize('words,code', [('', 0), ('--version', 0), ('--help', 0), ('study --help', 0), ('studdy', 2), ('study --preset qick', 2), ('study --jobs 0', 2), ('study --grid none.toml', 2), ('study --known none.csv', 2), ('study --backend dask', 2)])
def test_who_mistypes_does_not_wait_for_torch(words, code, tmp_path):
    got, out, err, imported = shell(*words.split(), cwd=tmp_path)
    assert got == code and 'xprune_nb.cli' in imported and imported & HEAVY == set()
    assert (err.count('\n'), err[:8]) == (0, 'xprune: ') if code else not err
    assert not any(tmp_path.iterdir())

def test_it_answers_in_a_fifth_of_a_second():
    "The quickest of a few: a busy machine only ever adds"
    def seconds(*words):
        begin = time.perf_counter(); subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True); return time.perf_counter() - begin
    quickest = lambda *words: min(seconds(*words) for _ in range(7))
    for words in [], ['--version'], ['study', '--preset', 'qick']: assert quickest('-m', 'xprune_nb', *words) < .2

def test_the_first_line_of_a_study_comes_before_torch(tmp_path):
    "Asked of the process itself: when its first line is there, torch is not mapped yet"
    asked = subprocess.Popen([sys.executable, '-m', 'xprune_nb', 'study', '--store', str(tmp_path/'runs'), '--figures', str(tmp_path/'figures')], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        begin = time.perf_counter(); first = asked.stdout.readline(); took = time.perf_counter() - begin
        mapped = [m.path for m in psutil.Process(asked.pid).memory_maps()]
        assert first.startswith('16 runs of preset quick (about ') and took < 1
        assert [m for m in mapped if 'torch' in m] == []
    finally: os.killpg(asked.pid, signal.SIGKILL); asked.wait(); asked.stdout.close()

def test_version(capsys):
    with pytest.raises(SystemExit) as e: main(['--version'])
    assert e.value.code == 0 and capsys.readouterr().out == f'xprune_nb {cli.__version__}\n'

# --- the front door ---

def sections(text):
    "What stands under `What there is` and under `What to do next`, by its first word"
    there, todo = re.split(r'\n\nWhat to do next.*\n', text.partition('\nWhat there is\n')[2])
    entries = re.findall(r'^  (\w+) +(.*(?:\n {13}.*)*)', there, re.M)
    return {k: ' '.join(v.split()) for k, v in entries}, dict(re.findall(r'^  (\w+) +(.*)$', todo, re.M))

def test_without_a_word_it_says_what_there_is(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    have, todo = sections(out)
    assert have['commands'] == ' '.join(f'{k} {v}' for k, v in COMMANDS.items())
    assert have['presets'] == ' '.join(f'{n}: {s.runs} runs, {s.about}; {s.cost}' for n, s in PRESETS.items())
    assert have['baselines'] == ' '.join(f'{n}: {baseline(n).test_accuracy:.4f} on test' for n in baselines())
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

def test_it_says_so_from_anywhere(tmp_path, capsys):
    main([])
    there, todo = sections(capsys.readouterr().out)
    code, out, err, _ = shell(cwd=tmp_path)
    assert (code, err, sections(out)) == (0, '', (there, todo)) and f'(cd {os.path.relpath(ROOT, tmp_path)})' in out

def test_python_m_passes_words_on():
    code, _, err, _ = shell('study', '--preset', 'quik')
    assert (code, err) == (2, "xprune: no preset called 'quik'; did you mean 'quick'? There are: quick, cpu, thesis, thesis-coupled")

def test_a_wheel_has_no_notebooks_and_says_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, 'HOME', tmp_path/'xprune_nb')
    have, _ = sections(cli.there())
    assert have['notebooks'] == 'in the repository, not in a wheel' # there is no nbs/ beside this one

# --- the real thing ---

def test_status_of_a_study_that_is_under_way_then_killed(tmp_path):
    "A study in a process of its own, asked from this one while it runs, and again when it was killed with all that it started"
    (tmp_path/'two.toml').write_text('criterion = "random"\nepochs = [3, 4]\nimages = 10\n')
    asked = subprocess.Popen([sys.executable, '-m', 'xprune_nb', 'study', '--grid', 'two.toml', '--jobs', '1'], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    store, deadline = tmp_path/'runs'/'two', time.monotonic() + 120
    seen = lambda: cli.report(store) if (store/HIDDEN/'study.json').exists() else ''
    try:
        while 'epoch ' not in (said := seen()): assert time.monotonic() < deadline and asked.poll() is None; time.sleep(.2)
        assert re.search(r'of 2 runs 1 running, 1 waiting', said) and re.search(r'\n  oneshot-random-0.5-seed0-\w+: retraining, epoch \d of 3 \(0:0', said) and 'Nobody' not in said
    finally:
        started = psutil.Process(asked.pid).children(recursive=True)
        os.killpg(asked.pid, signal.SIGKILL); asked.wait()
    psutil.wait_procs(started, timeout=20)
    assert (said := seen()).splitlines()[0].endswith('of 2 runs 2 waiting') and said.endswith('goes on from here.')

@pytest.mark.slow
def test_a_study_through_papermill_and_loky(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PRESETS, 'tiny', Study([dict(TINY, ratio=[.5, .7])]))
    ask = ['study', '--preset', 'tiny', '--store', str(tmp_path/'runs'), '--figures', str(tmp_path/'figures')]
    assert main(ask) == 0
    out, before = capsys.readouterr().out, {p: p.stat().st_mtime_ns for p in (tmp_path/'runs').iterdir() if p.name != HIDDEN}
    assert '4 of 4 runs done' in out and len(before) == 8 and {'oneshot.png', 'beside.svg', 'rows.csv'} <= set(found(tmp_path/'figures'))
    table = pd.read_csv(tmp_path/'figures'/'rows.csv')
    assert table.accuracy.between(0, 1).all() and (table.groupby('ratio').accuracy_dense.nunique() == 1).all() and (abs(table.alive + table.ratio - 1) < .01).all()
    assert main(ask) == 0 and {p: p.stat().st_mtime_ns for p in (tmp_path/'runs').iterdir() if p.name != HIDDEN} == before
