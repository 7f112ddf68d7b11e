"""The package is what its notebooks export; the notebooks are fit to be committed; settings.ini says what is true."""
import ast, importlib, json, os, re, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from dataclasses import MISSING, fields
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import readme

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(o for o in (ROOT/'nbs').rglob('*.ipynb') if not re.search(r'[/\\][._]', str(o.relative_to(ROOT))))
SETTINGS = ConfigParser(); SETTINGS.read(ROOT/'settings.ini', encoding='utf-8'); SETTINGS = SETTINGS['DEFAULT']
each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda o: o.relative_to(ROOT/'nbs').with_suffix('').as_posix())

read = cache(lambda path: json.loads(path.read_text(encoding='utf-8')))
code = lambda path: [''.join(c['source']) for c in read(path)['cells'] if c['cell_type'] == 'code']

# --- the package and its notebooks ---

@pytest.fixture(scope='module')
def remade(tmp_path_factory):
    "A copy of the sources in which the modules were exported, and the notebooks cleaned, anew"
    to = tmp_path_factory.mktemp('remade')
    shutil.copy(ROOT/'settings.ini', to)
    shutil.copytree(ROOT/'nbs', to/'nbs', ignore=shutil.ignore_patterns('.*'))
    for o in (ROOT/'xprune_nb').rglob('__init__.py'):  # what is written by hand
        (home := to/o.parent.relative_to(ROOT)).mkdir(parents=True, exist_ok=True); shutil.copy(o, home)
    for command in 'nbdev_export', 'nbdev_clean':
        subprocess.run([sys.executable, '-c', f'from nbdev.cli import *; from nbdev.doclinks import *; from nbdev.clean import *; {command}()'],
                       cwd=to, check=True)
    return to

def test_package_is_what_the_notebooks_export(remade):
    texts = lambda root: {o.relative_to(root).as_posix(): o.read_text(encoding='utf-8') for o in (root/'xprune_nb').rglob('*.py')}
    made, kept = texts(remade), texts(ROOT)
    assert set(kept) == set(made), 'a module without a notebook, or a notebook without its module: nbdev_export'
    assert [o for o in kept if kept[o] != made[o]] == [], 'these differ from their notebooks: nbdev_export'

@each_notebook
def test_notebook_is_clean(path, remade):
    assert path.read_bytes() == (remade/path.relative_to(ROOT)).read_bytes(), 'nbdev_clean changes it'

@each_notebook
def test_notebook_can_be_run_and_read(path):
    nb = read(path)
    assert {'name','language'} <= set(nb['metadata'].get('kernelspec', {})), 'papermill needs both in the kernelspec'
    kinds = {(o['output_type'], o.get('name')) for c in nb['cells'] for o in c.get('outputs', [])}
    assert 'error' not in {kind for kind,_ in kinds}, 'an error is stored'
    assert ('stream','stderr') not in kinds, 'a warning is stored'
    assert nb['cells'][0]['cell_type'] == 'markdown' and ''.join(nb['cells'][0]['source']).startswith('# '), 'it begins with its title'

HOME = re.compile(r'(?<![\w.:/+<~-])/(?:home|root|tmp|work|opt|usr|Users|mnt|var|private|content)/\w[^\s"\']*|\b[A-Z]:\\{1,2}Users\b')

@each_notebook
def test_notebook_names_no_machine(path):
    def texts(o):  # every string but the encoded pictures
        if isinstance(o, str): yield o
        elif isinstance(o, list): yield ''.join(o) if all(isinstance(s, str) for s in o) else ''; yield from (t for s in o for t in texts(s))
        elif isinstance(o, dict): yield from (t for k,v in o.items() if not (k.startswith('image/') and k != 'image/svg+xml') for t in texts(v))
    assert {m[0] for t in texts(read(path)) for m in HOME.finditer(t)} == set()

def test_parameters_of_run_are_the_fields_of_Run():
    import papermill
    from xprune_nb.experiments import Run
    cells = [c for c in read(ROOT/'nbs'/'run.ipynb')['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    assert len(cells) == 1, 'one cell of run.ipynb has the tag `parameters`'
    asked = papermill.inspect_notebook(str(ROOT/'nbs'/'run.ipynb'))
    assert list(asked) == [f.name for f in fields(Run)]
    defaults = {f.name: f.default for f in fields(Run)}
    assert MISSING not in defaults.values()
    assert {n: ast.literal_eval(p['default']) for n,p in asked.items()} == defaults

def test_readme_is_the_index(): assert readme.differing() == [], '`python tests/readme.py --write` makes it so'

@pytest.mark.parametrize('path', [ROOT/'README.md', *NOTEBOOKS], ids=lambda o: o.stem)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding='utf-8') if path.suffix == '.md' else '\n'.join(
        ''.join(c['source']) for c in read(path)['cells'] if c['cell_type'] == 'markdown')
    targets = {m[2].split('#')[0] for m in readme.LINK.finditer(text) if not readme.OUTSIDE.match(m[2])}
    assert {o for o in targets if not re.match('attachment:', o) and not (path.parent/o).exists()} == set()

@pytest.mark.parametrize('target,moved', [('(00_data.ipynb)','(nbs/00_data.ipynb)'), ('(../figures/a.png)','(figures/a.png)'), ('(#data)','(#data)'),
    ('(https://arxiv.org/abs/1805.12233)',)*2, ('(../LICENSE)','(LICENSE)')])
def test_readme_moves_links_to_the_root(target, moved): assert readme.from_root('['+target.join(['a]', ''])) == '['+'a]'+moved

# --- what an import brings along ---

ROOMS = sorted('.'.join(o.relative_to(ROOT).with_suffix('').parts) for o in (ROOT/'xprune_nb').rglob('*.py') if o.stem[0] != '_')
DRAW = re.compile(r'xprune_nb\.(charts|results|compare|widgets|experiments\.thesis)$')
WITHOUT_TORCH = {'xprune_nb.core', 'xprune_nb.cli'}
LATE = {'torchvision', 'torch_pruning', 'captum', 'scipy', 'matplotlib', 'joblib', 'papermill', 'onnx', 'onnxruntime'} # nobody asks for these before they are used
PICTURES = {'altair', 'vl_convert', 'IPython', 'ipywidgets'} # the rooms that draw alone

def after(code:str, **env)->set[str]:
    "What a fresh process has imported when it has run some code"
    env = {k: v for k, v in {**os.environ, **env}.items() if v is not None}
    done = subprocess.run([sys.executable, '-c', code+'\nimport sys; print(*sys.modules)'], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())

@pytest.mark.parametrize('room', ROOMS)
def test_a_room_imports_what_it_needs_at_once_and_the_rest_when_it_is_used(room):
    "Tested by names, not by seconds: torch alone takes 1.4 s, and took 4.4 s with all that a run never used"
    have = after(f'import {room}')
    assert ('torch' in have) == (room not in WITHOUT_TORCH)
    assert have & (LATE if DRAW.match(room) else LATE|PICTURES) == set()

def test_the_package_by_itself_imports_nothing(): assert {o for o in after('import xprune_nb') if o.startswith(('xprune_nb.', 'torch', 'numpy', 'pandas'))} == set()

@pytest.mark.parametrize('yours,then', [(None, 'PASSIVE'), ('ACTIVE', 'ACTIVE')])
@pytest.mark.parametrize('room', ['data', 'criteria', 'charts', 'experiments'])
def test_threads_that_wait_sleep_unless_you_say_otherwise(room, yours, then):
    "The variable is read when torch is imported, so it has to be there before, whichever room comes first"
    look = f"""import os, sys
class Look:
    def find_spec(self, name, *more):
        if name == 'torch': assert os.environ.get('OMP_WAIT_POLICY') == '{then}'
sys.meta_path.insert(0, Look())
import xprune_nb.{room}"""
    assert 'torch' in after(look, OMP_WAIT_POLICY=yours)

# --- settings.ini ---

def requirements(*keys): return [Requirement(o) for k in keys for o in SETTINGS[k].splitlines() if o]

EXTRAS = [k.removesuffix('_requirements') for k in SETTINGS if k.endswith('_requirements') and k != 'dev_requirements'] # imported by name where they are asked for
ALL = ['requirements', 'dev_requirements', *(f'{o}_requirements' for o in EXTRAS)]

name = lambda r: canonicalize_name(r.name if isinstance(r, Requirement) else r)
owners = cache(packages_distributions) # module -> the distributions that bring it; it reads every installed file list, so once

def imported(source:str)->set[str]:
    "The distributions, standard library and this package aside, that a piece of Python imports anywhere in it"
    source = re.sub(r'^\s*[%!].*$', 'pass', source, flags=re.M)  # IPython's own lines
    nodes = list(ast.walk(ast.parse(source)))
    tops = {a.name.split('.')[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    tops |= {n.module.split('.')[0] for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
    tops -= {*sys.stdlib_module_names, 'xprune_nb', *(o.stem for o in (ROOT/'tests').glob('*.py'))}
    return {name(o) for t in tops for o in set(owners().get(t, [t]))}

MODULES = sorted((ROOT/'xprune_nb').rglob('*.py'))
UNNAMED = {'ipykernel': 'the kernel in which papermill runs a notebook', 'jupyterlab': 'where the notebooks are read', 'ipywidgets': 'tqdm.auto draws its bars there',
           'vl-convert-python': 'altair draws PNG and SVG with it', 'onnxscript': 'torch exports to ONNX with it'}

@pytest.mark.parametrize('path', MODULES, ids=lambda o: o.relative_to(ROOT/'xprune_nb').with_suffix('').as_posix())
def test_module_imports_what_is_declared(path):
    assert imported(path.read_text(encoding='utf-8')) <= {name(r) for r in requirements('requirements')}

@each_notebook
def test_notebook_imports_what_is_declared(path):
    allowed = requirements('requirements') if path == ROOT/'nbs'/'run.ipynb' else requirements(*ALL)
    assert set().union(*map(imported, code(path))) <= {name(r) for r in allowed}

def test_tests_import_what_is_declared():
    used = set().union(*(imported(o.read_text(encoding='utf-8')) for o in (ROOT/'tests').glob('*.py')))
    assert used <= {name(r) for r in requirements(*ALL)}

def test_declared_is_used():
    used = set().union(*(imported(o.read_text(encoding='utf-8')) for o in MODULES), *(imported(s) for o in NOTEBOOKS for s in code(o)))
    assert {name(r) for r in requirements('requirements')} - used - set(UNNAMED) == set()

@pytest.mark.parametrize('req', requirements('requirements'), ids=str)
def test_requirement_can_be_imported(req):
    tops = [t for t,dists in owners().items() if name(req) in map(name, dists) and not t.startswith('_') and t.isidentifier()]
    assert tops, 'not installed'
    for top in tops: importlib.import_module(top)

def test_installed_package_asks_for_what_settings_say():
    extra = lambda r: str(r.marker or '').partition('extra == ')[2].strip('"')
    want = {(str(r), k.removesuffix('requirements').strip('_')) for k in ALL for r in requirements(k)}
    have = {(re.sub(r';.*', '', str(r)).strip(), extra(r)) for r in map(Requirement, requires('xprune_nb'))}
    assert have == want, 'installed from an older settings.ini: pip install -e .'

def test_constraints_meet_the_requirements():
    pins = dict(o.split('==') for o in (ROOT/'constraints.txt').read_text().splitlines() if o and o[0] != '#')
    pins = {name(k): v for k,v in pins.items()}
    assert [str(r) for r in requirements(*ALL) if not r.specifier.contains(pins.get(name(r), '0'))] == []

def test_one_version_and_one_licence_everywhere():
    import xprune_nb
    version, licence = SETTINGS['version'], SETTINGS['license']
    cff = (ROOT/'CITATION.cff').read_text(encoding='utf-8')
    assert xprune_nb.__version__ == version and f'\nversion: {version}\n' in cff
    assert f'\nlicense: {licence}\n' in cff and 'Apache License' in (ROOT/'LICENSE').read_text()

def test_wheel_carries_modules_and_assets(tmp_path):
    source = tmp_path/'source'
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns('.*', 'nbs', 'tests', 'figures', 'build', 'runs', '*.egg-info', '__pycache__'))
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path, source], check=True)
    inside = set(zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist())
    mine = {o.relative_to(ROOT).as_posix() for o in (ROOT/'xprune_nb').rglob('*') if o.is_file() and '__pycache__' not in o.parts}
    assert mine <= inside
