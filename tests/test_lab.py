"""JupyterLab for real: started on loopback, driven in headless Chromium, everything outside this machine out of reach. XPRUNE_SCREENSHOTS=figures/lab keeps the pictures."""
import hashlib, os, re, shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from browser import ROOT, Notebook, jupyterlab, page, playwright

SECONDS = 300 # no step waits longer than this, on the busiest machine
KERNEL = dict(name='python3', display_name='python3', language='python')
MILD = () # parts of the console's errors that JupyterLab is known for, and we are not
ROWS = pd.read_csv(ROOT/'figures'/'cpu'/'rows.csv')
PAGE, = ROWS.query("criterion == 'conductance' and schedule == 'oneshot' and ratio == .9").run_id
sha = lambda b: hashlib.sha256(b).hexdigest()
def expect(what):
    "Playwright's expectation, which waits until it holds"
    playwright().expect.set_options(timeout=60_000)
    return playwright().expect(what)

@pytest.fixture(scope='module')
def lab(chrome, tmp_path_factory):
    "JupyterLab over a copy of the notebooks: the repository stays as it is"
    tmp, copy = tmp_path_factory.mktemp('lab'), tmp_path_factory.mktemp('copy')
    for d in ('nbs', 'figures', 'xprune_nb'): shutil.copytree(ROOT/d, copy/d, ignore=shutil.ignore_patterns('.*', '__pycache__', 'lab'))
    shutil.copy(ROOT/'settings.ini', copy)
    cells = [nbformat.v4.new_code_cell(c) for c in (
        'from xprune_nb.compare import StudyExplorer', "explorer = StudyExplorer('../figures/cpu/rows.csv', store='a store')\nexplorer")]
    (copy/'nbs'/'a store').mkdir() # with the page of one run
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('This is what was run.')], metadata=dict(kernelspec=KERNEL)),
                   copy/'nbs'/'a store'/f'{PAGE}.ipynb')
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=KERNEL)), copy/'nbs'/'compare.ipynb')
    with jupyterlab(copy, tmp) as at: yield at

@pytest.fixture
def notebook(chrome, lab):
    "Opens a notebook and runs it; afterwards nothing may have been asked of the world, and nothing complained of"
    with page(chrome, mild=MILD) as (p, _):
        opened = []
        def run(path):
            opened.append(nb := Notebook(p, lab, path, SECONDS))
            return nb.run(SECONDS)
        yield run
        for nb in opened: nb.close()

@pytest.fixture
def keep(tmp_path):
    "Takes a picture, for the README if XPRUNE_SCREENSHOTS says where"
    folder = Path(os.environ['XPRUNE_SCREENSHOTS']) if os.environ.get('XPRUNE_SCREENSHOTS') else tmp_path
    if not folder.is_absolute(): folder = ROOT/folder
    folder.mkdir(parents=True, exist_ok=True)
    def take(what, name):
        page = getattr(what, 'page', what)
        page.mouse.move(2, 2) # no tooltip
        if what is page: page.screenshot(path=folder/f'{name}.png', animations='disabled'); return
        size, tall = page.viewport_size, what.bounding_box()['height']
        page.set_viewport_size(size | dict(height=max(size['height'], int(tall)+260))) # or what lies beyond the window stays grey
        what.scroll_into_view_if_needed()
        what.evaluate('e => new Promise(done => { e.scrollIntoView(); requestAnimationFrame(() => requestAnimationFrame(done)) })')
        box = what.bounding_box()
        clip = dict(box, x=box['x']-5, width=box['width']+5)
        page.screenshot(path=folder/f'{name}.png', animations='disabled', clip=clip)
        page.set_viewport_size(size)
    return take

def drawn(nb):
    "How many live charts each code cell has on the screen, going through the notebook from the top"
    found = {}
    for c in nb.cells():
        if any('application/vnd.vegalite.v5+json' in o.get('data', {}) for o in c['outputs']):
            cell = nb.show(c['source'][-120:])
            chart = cell.locator('.vega-embed :is(canvas, svg.marks)').first
            chart.wait_for()
            found[c['source'].splitlines()[-1]] = cell.locator('.vega-embed').count()
    return found

def test_a_page_that_asks_the_world_or_complains_is_caught(chrome):
    for body, message in (('<img src="http://example.com/x.png">', 'outside this machine'), ('<script>console.error("ours")</script>', 'ours')):
        with pytest.raises(AssertionError, match=message), page(chrome) as (p, _): p.set_content(body)
    with page(chrome) as (p, _): p.set_content('<p>quiet</p><img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">')

# --- one run, the study ---

@pytest.mark.slow # a minute of a kernel
def test_one_run_ends_in_its_row_and_its_charts_are_alive(notebook, keep):
    nb = notebook('nbs/run.ipynb')
    cells = nb.cells()
    assert nb.errors() == [] and all(c['count'] for c in cells)
    row, = (o['data']['application/vnd.xprune.row+json'] for c in cells for o in c['outputs'] if 'application/vnd.xprune.row+json' in o.get('data', {}))
    assert row['status'] == 'done' and row['criterion'] == 'conductance' and 0 < row['accuracy'] <= 1 and 0 < row['macs'] < row['macs_dense']
    charts = drawn(nb)
    assert len(charts) >= 3 and set(charts.values()) == {1}, charts
    shown = nb.show('scores_chart(last.scores')
    expect(shown.locator('.vega-embed')).to_be_visible()
    keep(nb.page, 'run')

@pytest.mark.slow # a minute of a kernel
def test_the_study_is_read_again_from_its_rows(notebook, keep):
    nb = notebook('nbs/study.ipynb')
    assert nb.errors() == [] and all(c['count'] for c in nb.cells())
    charts = drawn(nb)
    assert len(charts) >= 6, charts
    nb.show("chart(done, 'oneshot')")
    keep(nb.page, 'study')

# --- StudyExplorer ---

class Compare:
    "StudyExplorer on the screen"
    def __init__(self, nb):
        self.page, self.cell = nb.page, nb.show('explorer = StudyExplorer')
        self.at = self.page.locator('.xs')
        self.text = lambda what: self.at.locator(f'.xs-{what}')
        self.dots = self.at.locator('.xs-chart svg [aria-label*=", interval "]')

    def dot(self, point):
        "The middle of a point, on the screen"
        mark = self.at.locator(f'.xs-chart svg [aria-label^="{point}: "]')
        expect(mark).to_have_count(1)
        box = mark.bounding_box()
        return box['x'] + box['width']/2, box['y'] + box['height']/2

    def click(self, point, *keys):
        for k in keys: self.page.keyboard.down(k)
        self.page.mouse.click(*self.dot(point))
        for k in keys: self.page.keyboard.up(k)

def test_a_study_is_looked_through(notebook, keep):
    nb = notebook('nbs/compare.ipynb')
    assert nb.errors() == []
    x = Compare(nb)
    expect(x.dots).to_have_count(24)
    expect(x.text('note')).to_contain_text('24 runs of 24, 24 points')
    x.at.locator('.xs-schedule-iterative input').uncheck()
    expect(x.dots).to_have_count(12)
    expect(x.text('note')).to_contain_text('12 runs of 24')
    x.at.locator('.xs-schedule-iterative input').check()
    x.click('conductance, oneshot, ratio 0.9') # A, by the mouse
    expect(x.text('runs-a').locator('caption')).to_have_text('A: conductance, oneshot, ratio 0.9')
    expect(x.text('runs-a')).to_contain_text('0.260')
    expect(x.at.locator('.xs-a select option:checked')).to_have_text('conductance, oneshot, ratio 0.9: 0.260')
    x.click('lrp, oneshot, ratio 0.9', 'Shift') # B
    expect(x.text('difference')).to_contain_text('+0.160 (one seed: no interval; paired by seed, n = 1)')
    expect(x.text('differ').locator('tbody')).to_have_text('criterionconductancelrp')
    keep(x.at, 'compare')
    x.at.locator('.xs-b select').focus() # by the keyboard, the next one
    before = x.at.locator('.xs-b select option:checked').inner_text()
    x.page.keyboard.press('ArrowDown')
    expect(x.text('runs-b').locator('caption')).not_to_have_text('B: ' + before.split(':')[0])
    x.at.locator('.xs-x select').select_option('MACs an image')
    expect(x.at.locator('.xs-chart')).to_contain_text('MACs an image, millions')
    expect(x.text('runs-a').locator('caption')).to_have_text('A: conductance, oneshot, ratio 0.9') # A stays
    link = x.text('runs-a').locator('a')
    expect(link).to_have_count(1)
    link.click() # the page of the run, in a tab of its own
    nb.page.wait_for_function('jupyterapp.shell.currentWidget?.context?.path.endsWith(".ipynb") && !jupyterapp.shell.currentWidget.context.path.endsWith("compare.ipynb")')
    assert nb.page.evaluate('jupyterapp.shell.currentWidget.context.path') == f'nbs/a store/{PAGE}.ipynb'
    expect(nb.page.locator('.jp-Notebook').filter(has_text='This is what was run.')).to_be_visible()
    nb.page.evaluate("async path => { await jupyterapp.commands.execute('docmanager:open', {path}) }", 'nbs/compare.ipynb') # back
    nb.show('explorer = StudyExplorer')
    for box in x.at.locator('.xs-criteria input').all(): box.uncheck()
    expect(x.at.locator('.xs-chart')).to_contain_text('nothing is chosen of criteria')
    expect(x.text('runs-a').locator('table')).to_have_count(0)

# --- FilterExplorer ---

BYTES = """async img => { const b = new Uint8Array(await (await fetch(img.src)).arrayBuffer()); return Array.from(b) }"""

class Filters:
    "FilterExplorer on the screen"
    def __init__(self, nb):
        nb.show('explorer = FilterExplorer')
        self.page, self.at = nb.page, nb.page.locator('.xp')
        self.part = lambda name, inside='': self.at.locator(f'.xp-{name} {inside}'.strip())
        expect(self.part('accuracy')).to_contain_text('0.')

    def picture(self, name): return sha(bytes(self.part(name, 'img').evaluate(BYTES)))

    def redrawn(self, name, src):
        "Wait until a picture is another one; its bytes then"
        expect(self.part(name, 'img')).not_to_have_attribute('src', src)
        return self.picture(name)

    def source(self, name): return self.part(name, 'img').get_attribute('src')

def test_filters_are_looked_at_before_they_are_cut(notebook, keep):
    nb = notebook('nbs/explore.ipynb')
    assert nb.errors() == []
    x = Filters(nb)
    cost, accuracy = x.part('cost').inner_text(), x.part('accuracy').inner_text()
    maps, strip, src = x.picture('maps'), x.picture('strip'), x.source('strip')
    x.part('ratio', '.noUi-handle').focus() # the ratio, by the keyboard
    for _ in range(10): x.page.keyboard.press('ArrowRight')
    expect(x.part('ratio')).to_contain_text('0.60')
    expect(x.part('cost')).not_to_have_text(cost)
    assert x.redrawn('strip', src) != strip
    expect(x.part('accuracy')).to_have_text(re.compile(r'0\.\d+')), expect(x.part('accuracy')).not_to_have_text(accuracy)
    millions = lambda text: float(re.search(r'([\d.]+) M of', text)[1])
    assert millions(x.part('cost').inner_text()) < millions(cost) # more was pruned: fewer parameters
    maps, src = x.picture('maps'), x.source('maps')
    x.part('layer', 'select').select_option(index=3) # another layer
    assert x.redrawn('maps', src) != maps
    layer = x.part('layer', 'select option:checked').inner_text().split()[1]
    expect(x.part('bars', 'svg.marks')).to_contain_text(layer) # its bars are there
    number, alt, bars = x.part('filter', 'input').input_value(), x.part('maps', 'img').get_attribute('alt'), x.part('bars', 'svg.marks')
    box = bars.bounding_box()
    bars.click(position=dict(x=.3*box['width'], y=.5*box['height'])) # a bar that stays
    expect(x.part('filter', 'input')).not_to_have_value(number)
    expect(x.part('maps', 'img')).not_to_have_attribute('alt', alt)
    assert f"filter {x.part('filter', 'input').input_value()} is chosen" in x.part('maps', 'img').get_attribute('alt')
    x.part('hand-over', 'button').or_(x.at.locator('button.xp-hand-over')).click()
    expect(x.part('status')).to_contain_text('ratio 0.6')
    keep(x.at, 'explorer')
