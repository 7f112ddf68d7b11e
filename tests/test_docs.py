"""The site is built by its one command, served on loopback, and looked at: every link, every page, every chart, wide and narrow."""
import ast, functools, http.server, importlib, importlib.util, json, re, subprocess, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import nbformat, pytest
from fastcore.docments import docments

ROOT = Path(__file__).resolve().parent.parent
FILES = {p.relative_to(ROOT/'nbs').with_suffix('').as_posix(): p for p in sorted((ROOT/'nbs').rglob('*.ipynb'))
         if not re.search(r'[/\\][._]', str(p.relative_to(ROOT)))}
PAGES = [*FILES, 'api', 'figures']
MODULES = [p for p in sorted((ROOT/'xprune_nb').glob('*.py')) if p.stem[0] != '_']
each_page = pytest.mark.parametrize('name', PAGES)

@pytest.fixture(scope='session')
def build():
    spec = importlib.util.spec_from_file_location('docs_build', ROOT/'docs'/'build.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

# --- the one command ---

@pytest.fixture(scope='session')
def made(tmp_path_factory):
    "The site, and what its command said"
    out = tmp_path_factory.mktemp('docs')/'site'
    return out, subprocess.run([sys.executable, str(ROOT/'docs'/'build.py'), str(out)], capture_output=True, text=True, cwd=out.parent)

@pytest.fixture(scope='session')
def site(made): return made[0]

@functools.cache
def text(path): return path.read_text(encoding='utf-8')

def test_builds_without_a_warning(made):
    assert made[1].stderr.splitlines() == []
    assert made[1].returncode == 0

@each_page
def test_page_is_there_and_in_the_sidebar(site, name):
    assert (site/f'{name}.html').is_file()
    if name != 'index': assert f'href="{name}.html"' in text(site/'index.html')

@pytest.mark.parametrize('name', FILES)
def test_title_and_question_are_the_notebooks(site, name):
    first = nbformat.read(FILES[name], 4).cells[0].source
    page = text(site/f'{name}.html')
    plain = lambda s: re.sub(r'[^\w ]', '', re.sub(r'<[^>]*>', '', s)).strip()
    assert plain(re.search(r'<h1>(.*?)<a', page, re.S)[1]) == plain(re.match(r'# (.+)', first)[1])
    if question := re.search(r'^> (.+(?:\n> .+)*)', first, re.M):
        shown = re.search(r'</h1>\s*<blockquote>(.*?)</blockquote>', page, re.S)[1]
        assert plain(shown).replace('\n', ' ').split()[:4] == plain(question[1]).replace('\n', ' ').split()[:4]

@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_every_public_name_is_described_and_in_the_index(site, path):
    tree = ast.parse(path.read_text(encoding='utf-8'))
    names = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__'), [])
    index = text(site/'api.html')
    anchors = {n: re.search(rf'href="([\w/.-]+)#xprune_nb\.{path.stem}\.{n}"', index) for n in names}
    assert [n for n in names if not anchors[n]] == [], 'not in the index'
    assert [n for n in names if f'id="xprune_nb.{path.stem}.{n}"' not in text(site/anchors[n][1])] == [], 'not on the page that the index names'

@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_parameters_are_those_that_docments_finds(build, path):
    "fastcore reads the imported function, the site the notebook's text: names, comments and which have a default must agree"
    module, source = importlib.import_module(f'xprune_nb.{path.stem}'), path.read_text(encoding='utf-8')
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef) or node.name[0] == '_': continue
        cell = ast.get_source_segment(source, node)
        ours = {p.name.lstrip('*'): p for p in build.parameters(ast.parse(cell).body[0], cell)}
        theirs = docments(getattr(module, node.name), full=True, args_kwargs=True)
        assert {n: p.doc for n, p in ours.items()} == {n: ' '.join((d.docment or '').split()) for n, d in theirs.items()
                                                       if n in ours}, node.name
        assert set(theirs) - set(ours) <= {'return'}, node.name
        empty = lambda v: getattr(v, '__name__', '') == '_empty'
        assert {n for n, p in ours.items() if p.default is not None} == {n for n, d in theirs.items() if not empty(d.default)}, node.name

def test_a_type_that_is_imported_late_is_shown_like_any_other(build):
    cell = """def f(
    a:'pd.DataFrame', # rows
    b:str='x', # a name
) -> list['Run']: ..."""
    assert [(p.type, p.default) for p in build.parameters(ast.parse(cell).body[0], cell)] == [('pd.DataFrame', None), ('str', "'x'"), ("list['Run']", None)]

def test_source_of_what_is_exported_is_there_and_what_is_hidden_is_not(site):
    page = re.sub(r'<[^>]*>', '', text(site/'00_data.html'))
    hidden = [c.source for c in nbformat.read(FILES['00_data'], 4).cells if c.cell_type == 'code' and re.match(r'#\| *hide', c.source)]
    assert 'hashlib.md5(content).hexdigest()' in page
    assert hidden and all(s.splitlines()[-1] not in page for s in hidden)
    assert '#|' not in page

def test_a_notebook_without_a_section_is_refused(build):
    with pytest.raises(ValueError, match=r'^no section of the site holds nbs/odd/stray\.ipynb; put it into one of Start, Rooms, '):
        build.conf.sections(['index', '00_data', 'odd/stray'])

def test_another_folder_is_not_overwritten(build, tmp_path):
    (tmp_path/'mine.txt').write_text('mine')
    done = subprocess.run([sys.executable, ROOT/'docs'/'build.py', tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and 'is not a site that was built here' in done.stderr and (tmp_path/'mine.txt').exists()

# --- links ---

class Links(HTMLParser):
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.to, self.ids = [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        self.to += [a[k] for k in ('href', 'src') if a.get(k)]

@functools.cache
def links(path): return Links(text(path))

def test_every_link_and_anchor_leads_somewhere(site):
    "From the home page on, as far as links go"
    todo, seen, lost = ['index.html'], set(), []
    while todo:
        page = todo.pop()
        if page in seen: continue
        seen.add(page)
        for to in links(site/page).to:
            target, anchor = urldefrag(urljoin(f'http://site/{page}', to))
            if not target.startswith('http://site/'):
                if not target.startswith(('https://', 'http://', 'mailto:', 'data:')): lost.append((page, to))
                continue
            path = unquote(target.removeprefix('http://site/').split('?')[0]) or 'index.html'
            if not (site/path).is_file(): lost.append((page, to)); continue
            if path.endswith('.html'):
                todo.append(path)
                if anchor and unquote(anchor) not in links(site/path).ids: lost.append((page, to))
    assert lost == []
    assert {f'{p}.html' for p in PAGES} <= seen

# --- in a browser ---

@pytest.fixture(scope='session')
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()

@pytest.fixture(scope='session')
def visit(chrome, address):
    "A page at a width, with what went wrong on it"
    contexts = {}
    def go(path, width=1280, **how):
        key = width, *sorted(how.items())
        if key not in contexts: contexts[key] = chrome.new_context(viewport=dict(width=width, height=900), **how)
        page, wrong = contexts[key].new_page(), []
        page.set_default_timeout(120_000) # a busy machine
        here = address, 'data:', 'blob:'
        page.on('request', lambda r: None if r.url.startswith(here) else wrong.append(f'asked for {r.url}'))
        page.on('console', lambda m: wrong.append(f'console: {m.text}') if m.type in ('error', 'warning') else None) # Vega's advice, too
        page.on('pageerror', lambda e: wrong.append(f'error: {e}'))
        page.on('response', lambda r: wrong.append(f'{r.status} {r.url}') if r.status >= 400 else None)
        page.goto(address + path, wait_until='load')
        if how.get('java_script_enabled', True) and page.query_selector('.chart'):
            page.wait_for_function('document.documentElement.dataset.charts == "drawn"')
        return page, wrong
    yield go
    for c in contexts.values(): c.close()

def charts(name):
    "How many charts a notebook's cells show"
    if name not in FILES: return 0
    code = [c for c in nbformat.read(FILES[name], 4).cells if c.cell_type == 'code' and not re.match(r'#\| *hide', c.source)]
    return sum(any(k.startswith('application/vnd.vegalite') for k in o.get('data', {})) for c in code for o in c.outputs)

@each_page
def test_page_looks_right(visit, name):
    "On a phone, and wide: charts are laid out when a page is opened, so a page of charts is opened twice"
    page, wrong = visit(f'{name}.html', 390)
    looks_right(page, wrong, name)
    if charts(name): page.close(); page, wrong = visit(f'{name}.html', 1280)
    else: page.set_viewport_size(dict(width=1280, height=900))
    looks_right(page, wrong, name)
    page.close()

def looks_right(page, wrong, name):
    assert wrong == []
    assert page.evaluate('[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)') == []
    assert page.evaluate('''[...document.querySelectorAll('.chart')].filter(c => c.classList.contains('drawn')
        && [...c.querySelectorAll('svg')].some(s => s.querySelectorAll('path').length > 3)).length''') == charts(name)
    assert page.locator('.chart').count() == charts(name)
    # furo hides what sticks out of <html> on a phone and lets .content scroll: so ask that one, too
    assert page.evaluate('''[document.documentElement, document.querySelector('.content')].map(
        e => e.scrollWidth - e.clientWidth)''') == [0, 0], 'the page is wider than the screen'
    assert page.evaluate('''[...document.querySelectorAll('article p, article td, article h1, article h2')].filter(
        e => e.offsetParent && parseFloat(getComputedStyle(e).fontSize) < 12).length''') == 0, 'text too small to read'

def test_the_two_with_stored_charts_have_them(): assert charts('study') >= 8 and charts('tutorials/ranking') >= 5

def test_charts_answer_the_mouse(visit):
    page, wrong = visit('study.html')
    mark = page.locator('.chart svg .mark-symbol.role-mark path').last
    mark.scroll_into_view_if_needed()
    mark.hover(force=True)
    page.wait_for_selector('#vg-tooltip-element.visible')
    assert page.inner_text('#vg-tooltip-element').strip() and wrong == []
    page.close()

def test_without_scripts_charts_are_pictures(visit):
    page, _ = visit('study.html', java_script_enabled=False)
    pictures = page.locator('.chart > img')
    assert pictures.count() == charts('study')
    assert all(p.bounding_box()['width'] > 100 and p.evaluate('i => i.naturalWidth') > 100 for p in pictures.all())
    page.close()

def test_search_finds_pages_offline(visit):
    page, wrong = visit('index.html')
    box = page.locator('input[name=q]').first
    box.fill('conductance')
    box.press('Enter')
    page.wait_for_selector('#search-results li a')
    page.wait_for_function('document.querySelector(".search-summary")?.textContent.match(/\\d+/)')
    found = page.locator('#search-results li a').evaluate_all('all => all.map(a => a.getAttribute("href").split(/[?#]/)[0])')
    assert {'criteria/attribution.html', 'criteria/scores.html', 'study.html'} <= set(found) and wrong == []
    page.close()

CONTRAST = '''() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number)
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4)
    .reduce((s, v, i) => s + v*[.2126, .7152, .0722][i], 0)
  const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor)
    if (c.length == 3 || c[3] == 1) return c } return [255, 255, 255] }
  const bad = new Set()
  for (const e of document.querySelectorAll('article p, article a, article li, article td, article th, '
      + 'article h1, article h2, article code, dt.sig span, summary')) {
    if (!e.offsetParent || !e.textContent.trim() || e.closest('.chart')) continue
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x)
    if ((a + .05)/(b + .05) < 4.5) bad.add(`${e.tagName}.${e.className}: ${((a + .05)/(b + .05)).toFixed(1)}`)
  }
  return [...bad]
}'''

@pytest.mark.parametrize('name', ['index', 'criteria/scores', 'study', 'api'])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_stands_out_from_its_ground(visit, name, scheme):
    "WCAG AA: 4.5 to 1; charts lie on white, in the dark too"
    page, wrong = visit(f'{name}.html', color_scheme=scheme)
    ground = page.evaluate('getComputedStyle(document.body).backgroundColor')
    assert sum(map(int, re.findall(r'\d+', ground)[:3])) > 700 if scheme == 'light' else sum(map(int, re.findall(r'\d+', ground)[:3])) < 120
    assert page.evaluate(CONTRAST) == [] and wrong == []
    if page.query_selector('.chart'):
        assert page.locator('.chart').first.evaluate('c => getComputedStyle(c).backgroundColor') == 'rgb(255, 255, 255)'
    page.close()

def test_formulas_are_drawn(visit):
    page, wrong = visit('criteria/scores.html')
    sizes = page.locator('article math').evaluate_all('all => all.map(m => m.getBoundingClientRect()).map(r => [r.width, r.height])')
    assert len(sizes) > 20 and all(w > 3 and h > 5 for w, h in sizes) and wrong == []
    assert page.locator('article merror').count() == 0
    page.close()

# --- outputs are stored by the other command ---

VEGA, WIDGET = 'application/vnd.vegalite.v5+json', 'application/vnd.jupyter.widget-view+json'

def notebook(*sources):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# Two'), *map(nbformat.v4.new_code_cell, sources)])
    nb.metadata = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    return nb

BUNDLE = f"""from IPython.display import display
display({{'{VEGA}': dict(mark='bar'), 'image/png': 'iVBORw0KGgo=', 'text/plain': 'a chart'}}, raw=True)
display({{'{WIDGET}': dict(model_id='gone'), 'text/plain': 'a slider'}}, raw=True)"""

def run(*paths): return subprocess.run([sys.executable, ROOT/'docs'/'build.py', '--execute', *paths], capture_output=True, text=True, cwd=ROOT)

def test_execute_stores_the_same_twice_and_leaves_a_failure_alone(tmp_path):
    good, bad = tmp_path/'good.ipynb', tmp_path/'bad.ipynb'
    nbformat.write(notebook("import sys; print('said', file=sys.stderr); print('shown')", BUNDLE,
        '#| slow\nraise ValueError("left out, as nbdev_test does")'), good)
    nbformat.write(notebook('1/0'), bad)
    before = bad.read_bytes()
    done = run(good, bad)
    assert done.returncode == 1 and 'bad.ipynb failed, and was left as it was: ZeroDivisionError' in done.stderr
    assert bad.read_bytes() == before and '1 of 2 notebooks ran' in done.stdout
    first = good.read_bytes()
    outputs = [o for c in json.loads(first)['cells'] for o in c.get('outputs', [])]
    assert [o.get('name') or sorted(o['data']) for o in outputs] == [
        'stdout', [VEGA, 'image/png', 'text/plain']]
    assert run(good).returncode == 0 and good.read_bytes() == first
