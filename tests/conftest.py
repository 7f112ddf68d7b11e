import os
os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch is imported; runs and kernels started by a test inherit it

import asyncio, random
import numpy as np, pytest, torch

def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: minutes, not seconds; run by `pytest -m slow`')
    config.addinivalue_line('markers', 'cluster: starts a real cluster of two workers on this machine, where dask or ray is installed')

def pytest_collection_modifyitems(config, items):
    "Slow tests wait until they are asked for, by `-m` or by name"
    if config.getoption('-m') or any('::' in o for o in config.args): return
    for item in items:
        if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason='slow: `pytest -m slow` runs it'))

@pytest.fixture(autouse=True)
def seeded():
    "Whatever a test draws without saying how, it draws the same each time, in any order of tests"
    random.seed(0), np.random.seed(0), torch.manual_seed(0)

@pytest.fixture(autouse=True)
def apart(request):
    "A browser that an earlier test of this process has opened leaves an event loop running: other tests are not to see it"
    if 'chrome' in request.fixturenames: yield; return
    loop = asyncio._get_running_loop(); asyncio._set_running_loop(None)
    yield
    asyncio._set_running_loop(loop)

@pytest.fixture(scope='session')
def chrome():
    "One browser for all tests of a process: Playwright has room for no second one"
    from browser import browser
    with browser() as b: yield b
