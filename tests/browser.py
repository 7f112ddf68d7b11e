"""A real browser for tests: find Chromium, open pages that can reach nothing but this machine, start JupyterLab, run a notebook in it."""
import os, shutil, socket, subprocess, sys, threading, uuid
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = 'chromium', 'chromium-browser', 'google-chrome'
LOOPBACK = '127.0.0.1', 'localhost', '::1'

def chromium() -> str|None: return os.environ.get('XPRUNE_CHROMIUM') or next(filter(None, map(shutil.which, NAMES)), None)

def playwright():
    "Playwright's entrance, or the test is skipped with the reason"
    api = pytest.importorskip('playwright.sync_api', reason="playwright is not installed: pip install -e '.[dev]'")
    if not chromium(): pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH, and XPRUNE_CHROMIUM names none")
    return api

@contextmanager
def browser():
    "Headless Chromium that finds no host but this machine"
    api = playwright()
    args = ['--disable-background-networking', f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {', EXCLUDE '.join(LOOPBACK)}"]
    if hasattr(os, 'geteuid') and os.geteuid() == 0: args.append('--no-sandbox') # Chromium refuses root otherwise
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium(), args=args)
        try: yield b
        finally: b.close()

class Watch:
    "What a page asked for outside this machine (nothing is let through), and what it complained of"
    def __init__(self, context):
        self.outside, self.errors = [], []
        context.route(lambda url: not self.here(url), lambda route: (self.outside.append(route.request.url), route.abort()))
        context.on('page', self.follow)

    def here(self, url): return urlsplit(url).scheme in ('data', 'blob', 'about') or urlsplit(url).hostname in LOOPBACK

    def follow(self, page):
        page.on('websocket', lambda s: None if self.here(s.url) else self.outside.append(s.url))
        page.on('pageerror', lambda e: self.errors.append(f'uncaught: {e}'))
        page.on('console', lambda m: self.errors.append(f"{m.text} ({m.location.get('url', '')})") if m.type == 'error' else None)
        page.on('response', lambda r: self.errors.append(f'{r.status} {r.url}') if r.status >= 400 else None)

    def check(self, mild=()):
        "Fail if there was anything; `mild`: parts of messages that are not ours"
        assert self.outside == [], 'the page asked for something outside this machine'
        ours = [e for e in self.errors if not any(m in e for m in mild)]
        assert ours == [], f'the page complained: {ours}'

@contextmanager
def page(browser, width=1280, height=800, mild=(), **kw):
    "A page of its own, its `watch` beside it; leaving it, what it asked for and complained of is checked"
    context = browser.new_context(viewport=dict(width=width, height=height), **kw)
    watch = Watch(context)
    try:
        yield context.new_page(), watch
        watch.check(mild)
    finally: context.close()

# --- JupyterLab ---

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

@contextmanager
def jupyterlab(folder:Path, tmp:Path, token='a-token-of-the-test', seconds=120):
    "JupyterLab on loopback over a folder, with settings of its own in `tmp`; gives its address"
    where = {f'JUPYTER_{k}_DIR': tmp/k.lower() for k in ('CONFIG', 'DATA', 'RUNTIME')} | {
        f'JUPYTERLAB_{k}_DIR': tmp/k.lower() for k in ('SETTINGS', 'WORKSPACES')} | dict(IPYTHONDIR=tmp/'ipython')
    for p in where.values(): p.mkdir(parents=True, exist_ok=True)
    (tmp/'config'/'labconfig').mkdir()
    (tmp/'config'/'labconfig'/'page_config.json').write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    env = os.environ | {k: str(p) for k, p in where.items()} | dict(PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE='1')
    port = free_port()
    options = ['--no-browser', '--ServerApp.ip=127.0.0.1', f'--ServerApp.port={port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={token}',
               f'--ServerApp.root_dir={folder}', '--LabApp.expose_app_in_browser=True', '--LabApp.extension_manager=readonly', '--LabServerApp.news_url=null',
               '--ServerApp.allow_root=True']
    server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', *options], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    clock, said = threading.Timer(seconds, server.kill), []
    clock.start()
    try:
        for line in server.stdout: # blocks until the server says something, or is dead
            said.append(line)
            if 'is running at' in line: break
        else: raise RuntimeError('JupyterLab did not start:\n' + ''.join(said[-20:]))
        clock.cancel()
        threading.Thread(target=lambda: said.extend(server.stdout), daemon=True).start() # or a full pipe would stop it
        yield f'http://127.0.0.1:{port}', token
    finally:
        clock.cancel(); server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill(); server.wait()

RUN = """async seconds => {
    const panel = jupyterapp.shell.currentWidget, late = new Promise((_, no) => setTimeout(() => no(new Error(`not done in ${seconds} s`)), 1000*seconds));
    const run = async () => {
        await panel.context.ready; await panel.sessionContext.ready;
        await jupyterapp.commands.execute('notebook:run-all-cells'); await panel.sessionContext.session.kernel.requestKernelInfo() };
    await Promise.race([run(), late]) }"""
OUTPUTS = """() => [...jupyterapp.shell.currentWidget.content.model.cells].filter(c => c.type === 'code').map(c => ({
    source: c.sharedModel.getSource(), count: c.executionCount,
    outputs: Array.from({length: c.outputs.length}, (_, i) => c.outputs.get(i).toJSON())}))"""

class Notebook:
    "A notebook in JupyterLab, as its reader has it on the screen"
    def __init__(self, page, lab, path, seconds=120):
        address, token = lab
        self.page, self.path = page, path
        page.set_default_timeout(1000*seconds)
        own = f"{Path(path).stem}-{uuid.uuid4().hex[:8]}" # a workspace of its own: JupyterLab opens again what was open in the last one
        page.goto(f'{address}/lab/workspaces/{own}/tree/{path}?token={token}')
        page.wait_for_function('window.jupyterapp'); page.evaluate('jupyterapp.restored')
        page.wait_for_function('path => jupyterapp.shell.currentWidget?.context?.path === path', arg=path)
        page.wait_for_selector('.jp-Notebook .jp-Cell')
        page.evaluate("async () => { await jupyterapp.commands.execute('application:toggle-left-area') }")

    def run(self, seconds=120):
        "Run all cells, to the end"
        self.page.evaluate(RUN, seconds)
        return self

    def cells(self): return self.page.evaluate(OUTPUTS) # source, count, outputs of each code cell

    def errors(self): return [f"{o['ename']}: {o['evalue']}" for c in self.cells() for o in c['outputs'] if o['output_type'] == 'error']

    def show(self, text):
        "Bring the cell whose source has this text to the top of the screen: JupyterLab draws what is near"
        found = self.page.evaluate("""async text => {
            const nb = jupyterapp.shell.currentWidget.content, i = nb.widgets.findIndex(c => c.model.sharedModel.getSource().includes(text));
            if (i >= 0) { nb.activeCellIndex = i; await nb.scrollToItem(i, 'start'); }
            return i }""", text)
        assert found >= 0, f'no cell of {self.path} has {text!r}'
        return self.page.locator('.jp-Notebook .jp-Cell').nth(0) if found == 0 else self.page.locator(f'.jp-Notebook [data-windowed-list-index="{found}"]')

    def close(self):
        "End its kernel"
        self.page.evaluate('jupyterapp.serviceManager.sessions.shutdownAll()')
