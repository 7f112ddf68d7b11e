"""A study on a real cluster of two workers, one of which is killed in the middle of a run: every row is there once, and whole."""
import json, os, re, subprocess, sys, threading, time, warnings
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from xprune_nb.cli import main
from xprune_nb.experiments import HIDDEN, execute, grid, read_row, read_table, rows, run_of

ROOT = Path(__file__).resolve().parent.parent
RUNS = grid(criterion='random', epochs=0, images=10, seed=[0, 1, 2])
GRID = 'criterion = "random"\nepochs = 0\nimages = 10\nseed = [0, 1, 2]\n'
needs = lambda library: pytest.mark.skipif(not find_spec(library), reason=f"{library} is not installed: pip install -e '.[dask,ray]'")

class Killer(threading.Thread):
    "Kills the worker of a run that is under way when the first row is there: a run's page is forked by a server, which its worker started"
    def __init__(self, store): super().__init__(daemon=True); self.store, self.worker, self.run_id, self.died = store, None, '', []
    def run(self):
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not self.worker:
            time.sleep(.02)
            for path in (self.store/HIDDEN).glob('*.progress') if [*self.store.glob('*.json')] else ():
                try: page = psutil.Process(json.loads(path.read_text())['pid']); server = page.parent(); worker = server.parent()
                except (OSError, ValueError, AttributeError, psutil.Error): continue # it has ended meanwhile
                assert os.getpid() not in (server.pid, worker.pid)
                worker.kill()
                self.worker, self.run_id, self.died = worker, path.stem, psutil.wait_procs([worker, server, page], timeout=20)[0]
                break

def a_worker_killed(folder, *words):
    "`xprune study`, a command of its own, on a cluster that is up, one of whose workers is killed: each row once, whole, and of the run that was asked for"
    (folder/'three.toml').write_text(GRID)
    store, ids, killer = folder/'runs'/'three', [r.id for r in RUNS], Killer(folder/'runs'/'three')
    killer.start()
    done = subprocess.run([sys.executable, '-m', 'xprune_nb', 'study', '--grid', 'three.toml', *words], cwd=folder, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=300)
    killer.join(25)
    assert done.returncode == 0, done.stderr
    assert killer.run_id in ids and len(killer.died) == 3, 'the worker, its server and the page end together'
    assert done.stdout.startswith('3 runs of three.toml; ') and '3 of 3 runs done' in done.stdout
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = [read_row(store/f'{i}.json') for i in ids]
    assert [run_of(r) for r in found] == RUNS and {r['status'] for r in found} == {'done'}
    assert sorted(p.name for p in store.iterdir()) == sorted([HIDDEN, *(f'{i}.json' for i in ids), *(f'{i}.ipynb' for i in ids)])
    assert [p.name for p in (store/HIDDEN).iterdir() if 'part' in p.name or p.suffix == '.progress'] == []
    assert read_table(folder/'figures'/'three'/'rows.csv').run_id.tolist() == ids and rows(store, RUNS).accuracy.between(0, 1).all()
    for i in ids: assert len(re.findall(rf"^{i.rpartition('-')[0]}: 0\.\d+ \(", done.stderr, re.M)) == 1, 'each run is told of once'

@pytest.mark.cluster
@needs('distributed')
def test_dask(tmp_path):
    from distributed import LocalCluster
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as c:
        a_worker_killed(tmp_path, '--backend', 'dask', '--address', c.scheduler_address)

@pytest.mark.cluster
@needs('ray')
def test_ray(tmp_path):
    import ray
    here = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try: a_worker_killed(tmp_path, '--backend', 'ray', '--address', here.address_info['gcs_address'], '--jobs', '2')
    finally: ray.shutdown()

@pytest.mark.parametrize('backend,library', [('dask', 'distributed'), ('ray', 'ray')])
def test_a_library_that_is_not_there_is_named(tmp_path, monkeypatch, capsys, backend, library):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.chdir(tmp_path); Path('three.toml').write_text(GRID)
    assert main(['study', '--grid', 'three.toml', '--backend', backend, '--address', 'tcp://127.0.0.1:9']) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith(f"xprune: backend '{backend}' needs what is not installed (") and err[-1].endswith(f"pip install 'xprune_nb[{backend}]'")

@pytest.mark.parametrize('backend', ['loky', 'threading', 'sequential'])
def test_an_address_that_nobody_would_look_at_is_refused(tmp_path, backend):
    with pytest.raises(ValueError, match=f"address is 'tcp://here:1' and backend is '{backend}', expected one of a cluster: dask, ray"): execute(RUNS, tmp_path/'runs', backend, address='tcp://here:1')
    assert not (tmp_path/'runs').exists()
