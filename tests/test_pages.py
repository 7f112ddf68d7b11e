"""The pages for readers: every word once, every link to somewhere, nothing left unrun without a reason, the Portuguese README in step with the English one."""
import ast, json, re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import readme

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
READER = sorted([NBS/'start.ipynb', NBS/'glossary.ipynb', *NBS.glob('howto/*.ipynb'), *NBS.glob('explain/*.ipynb')])
EVERY = sorted(o for o in NBS.rglob('*.ipynb') if not re.search(r'[/\\][._]', str(o.relative_to(ROOT))))
READMES = ROOT/'README.md', ROOT/'README.pt.md'
name = lambda o: o.relative_to(ROOT).as_posix()
each_page = pytest.mark.parametrize('path', READER, ids=name)

@cache
def cells(path, kind): return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]

# --- the pages that there are ---

def test_the_pages_are_there():
    assert {name(o) for o in READER} >= {'nbs/start.ipynb', 'nbs/glossary.ipynb', *(f'nbs/howto/{o}.ipynb' for o in ('criterion', 'network', 'own_cnn', 'cluster', 'gpu')),
                                         *(f'nbs/explain/{o}.ipynb' for o in ('attribution', 'coupling', 'numbers'))}

@each_page
def test_a_page_begins_with_its_question(path):
    first = cells(path, 'markdown')[0]
    assert re.match(r'# \S.*\n\n> .*\?( .*\?)*$', first, re.M), 'a title, then the question in a quote'

UNRUN = {} # page -> how many of its cells say `#| eval: false`; each with a reason in the text in front of it
SLOW = {}  # likewise, a flag of nbdev_test: the class of pages that are not run each time

@each_page
def test_every_cell_of_a_page_runs_each_time(path):
    said = lambda pattern: sum(bool(re.search(pattern, c, re.M)) for c in cells(path, 'code'))
    assert said(r'^#\| *eval: *false') == UNRUN.get(name(path), 0)
    assert said(r'^#\| *slow') + any(re.search(r'^skip_exec: *true', c, re.M) for c in cells(path, 'markdown')) == SLOW.get(name(path), 0)
    assert said('skip-execution') == 0

@each_page
def test_a_page_checks_what_it_says(path):
    calls = {getattr(n.func, 'id', getattr(n.func, 'attr', '')) for c in cells(path, 'code') for n in ast.walk(ast.parse(c)) if isinstance(n, ast.Call)}
    asserts = sum(isinstance(n, ast.Assert) for c in cells(path, 'code') for n in ast.walk(ast.parse(c)))
    assert asserts or calls & {'test_eq', 'test_close', 'assert_close'}

@each_page
def test_a_page_exports_nothing(path): assert not any(re.search(r'^#\| *(export|default_exp)', c, re.M) for c in cells(path, 'code'))

@pytest.mark.parametrize('path', [o for o in EVERY if o.stem != 'index'], ids=name)
def test_a_page_shows_what_it_worked_out(path):
    "The stored outputs are there: a page is read on the web, too, where nothing runs"
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert any(c.get('outputs') for c in nb['cells'])

# --- words ---

WORDS = 'filter', 'score', 'attribution', 'ratio', 'group', 'coupling', 'silence', 'cut', 'plan', 'rewind', 'run', 'row'
ENTRY = re.compile(r'^\| \*\*(.+?)\*\* \(\*(.+?)\*\) \| (.+) \| `(\w+)` in \[([\w/]+)\]\((\S+)\) \|$', re.M)

@cache
def entries(): return [m.groups() for c in cells(NBS/'glossary.ipynb', 'markdown') for m in ENTRY.finditer(c)]

@pytest.mark.parametrize('word', WORDS)
def test_each_word_of_the_design_is_there_once(word): assert [w for w, *_ in entries()].count(word) == 1

def test_the_glossary_has_no_word_twice_and_no_line_of_another_form():
    words = [w.lower() for w, *_ in entries()]
    lines = [line for c in cells(NBS/'glossary.ipynb', 'markdown') for line in c.splitlines() if line.startswith('| ') and not re.match(r'\| (word|---)', line)]
    assert [w for w, n in Counter(words).items() if n > 1] == [] and len(lines) == len(words) > 12

def test_each_word_leads_to_the_room_that_makes_it():
    for word, _, _, made_by, room, link in entries():
        assert link == f'{room}.ipynb' and (NBS/link).exists(), word
        module = next(m[1] for c in cells(NBS/link, 'code') if (m := re.search(r'^#\| *default_exp ([\w.]+)', c, re.M)))
        names = next(ast.literal_eval(n.value) for n in ast.parse((ROOT/'xprune_nb'/f'{module.replace(".", "/")}.py').read_text(encoding='utf-8')).body
                     if isinstance(n, ast.Assign) and n.targets[0].id == '__all__')
        assert made_by in names, f'{word}: {room} makes no {made_by}'

# --- links ---

def links(text): return [m[2] for m in readme.LINK.finditer(text) if not readme.OUTSIDE.match(m[2]) and not m[2].startswith('attachment:')]
def outside_code(text): return re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)
def page_text(path): return path.read_text(encoding='utf-8') if path.suffix == '.md' else '\n\n'.join(cells(path, 'markdown'))

@pytest.mark.parametrize('path', [*READMES, *EVERY], ids=name)
def test_links_lead_somewhere(path):
    assert {o for o in links(outside_code(page_text(path))) if not (path.parent/o.split('#')[0]).exists()} == set()

@pytest.mark.parametrize('path', READMES, ids=name)
def test_anchors_of_a_readme_are_its_headings(path):
    text = outside_code(page_text(path))
    anchors = {re.sub(r'[^\w\- ]', '', h.lower()).strip().replace(' ', '-') for h in re.findall(r'^#+ (.*)$', text, re.M)}
    assert set(re.findall(r'\]\(#(.*?)\)', text)) <= anchors

def test_every_page_is_reached_from_the_tutorial():
    "By links, from page to page"
    seen, todo = set(), [NBS/'start.ipynb']
    while todo:
        page = todo.pop()
        if page in seen or not page.exists(): continue
        seen.add(page)
        if page in READER: todo += [(page.parent/o.split('#')[0]).resolve() for o in links(outside_code(page_text(page))) if '.ipynb' in o]
    assert {name(o) for o in READER} <= {name(o) for o in seen}

# --- the README in two languages ---

FENCED = re.compile(r'^```.*?^```$', re.M | re.S)
code = lambda text: FENCED.findall(text) + re.findall(r'^(?: {4}.*\n)+', FENCED.sub('', text), re.M)
headings = lambda text: [m[1] for m in re.finditer(r'^(#+) ', FENCED.sub('', text), re.M)]
inline = lambda text: Counter(re.findall(r'`[^`\n]+`', FENCED.sub('', text)))
targets = lambda text: Counter(t for t in re.findall(r'\]\(([^)\s]+)\)', FENCED.sub('', text)) if not re.match(r'#|README', t))
rows = lambda text: [line.count('|') for line in text.splitlines() if line.startswith('|')]

def numbers(text):
    "The digits of each number: 3.3 and 4,500 are written 3,3 and 4.500 in Portuguese"
    plain = re.sub(r'<!--.*?-->|\]\([^)]*\)|`[^`\n]*`', ' ', FENCED.sub('', text))
    return Counter(re.sub(r'\D', '', n) for n in re.findall(r'\d+(?:[.,]\d+)*', plain))

@pytest.mark.parametrize('what', [headings, code, inline, targets, rows, numbers], ids=['headings', 'code', 'inline', 'targets', 'rows', 'numbers'])
def test_the_readmes_say_the_same(what):
    english, portuguese = (what(o.read_text(encoding='utf-8')) for o in READMES)
    assert english and portuguese == english

def test_the_portuguese_readme_links_the_english_one(): assert '](README.md)' in READMES[1].read_text(encoding='utf-8')

@pytest.mark.parametrize('what,old,new', [
    (headings, '\n## ', '\n### '), (code, '--preset quick', '--preset cpu'), (code, '0.780 before', '0.790 before'), (inline, '`XPRUNE_DATA`', '`XPRUNE_DIR`'),
    (targets, '(figures/cpu/beside.png)', '(figures/cpu/stages.png)'), (rows, '\n| [study]', '\n[study]'), (numbers, ' 342 ', ' 341 '), (numbers, '3,3 s', '3,4 s')], ids=lambda o: getattr(o, '__name__', None) or str(o).strip())
def test_a_drift_would_be_seen(what, old, new):
    text = READMES[1].read_text(encoding='utf-8')
    assert old in text and what(text.replace(old, new, 1)) != what(text)
