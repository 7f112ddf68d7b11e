"""From a key on the ratio slider to another picture on the screen: `python tests/benchmarks/slider.py [steps]`. Needs a quiet machine and Chromium.

JupyterLab runs explore.ipynb in headless Chromium, as in tests/test_lab.py; time is the browser's own, from the key to the strip's new picture."""
import shutil, sys, tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from browser import ROOT, Notebook, browser, jupyterlab, page

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
WATCH = """() => {
    window.seen = [];
    const note = what => window.seen.push([what, performance.now()]), handle = document.querySelector('.xp-ratio .noUi-handle');
    new MutationObserver(() => note('drawn')).observe(document.querySelector('.xp-strip img'), {attributes: true, attributeFilter: ['src']});
    handle.addEventListener('keydown', () => note('key'), true); handle.focus() }"""
with tempfile.TemporaryDirectory() as copy, tempfile.TemporaryDirectory() as own:
    for d in ('nbs', 'figures', 'xprune_nb'): shutil.copytree(ROOT/d, Path(copy)/d, ignore=shutil.ignore_patterns('.*', '__pycache__', 'lab'))
    with browser() as chrome, jupyterlab(Path(copy), Path(own)) as lab, page(chrome) as (p, _):
        nb = Notebook(p, lab, 'nbs/explore.ipynb').run()
        nb.show('explorer = FilterExplorer')
        p.wait_for_selector('.xp-accuracy b')
        p.wait_for_timeout(2000)
        p.evaluate(WATCH)
        for _ in range(steps):
            p.keyboard.press('ArrowLeft')
            p.wait_for_timeout(1500) # the accuracy is measured in between
        seen = p.evaluate('window.seen')
        nb.close()
taken, key = [], None
for what, at in seen:
    if what == 'key': key = at
    elif key is not None: taken.append(at - key); key = None
print(f'{len(taken)} of {steps} steps redrew the strip: {median(taken):.0f} ms from the key (fastest {min(taken):.0f}, slowest {max(taken):.0f})')
