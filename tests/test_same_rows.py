"""Eight small runs give the rows that they gave when they were written down: what moves inside the package moves no number.
`python tests/test_same_rows.py` writes them anew; do so only when a number is meant to change, and say so."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from xprune_nb.data import load
from xprune_nb.experiments import Run, processor, prune_steps, row
from xprune_nb.experiments import run as room
from xprune_nb.model import baseline

FILE = Path(__file__).with_suffix('.json')
RUNS = dict(
    random=dict(criterion='random', ratio=.7, epochs=1),
    magnitude=dict(criterion='magnitude', coupling='coupled', schedule='iterative', steps=2, epochs=0, scope='global', ratio=.4),
    alive=dict(criterion='bn_scale', ratio=.6, norm='alive', epochs=1, round_to=4),
    conductance=dict(criterion='conductance', coupling='coupled', epochs=1, path_steps=3),
    lrp=dict(criterion='lrp', schedule='iterative', steps=2, epochs=1, epochs_between=0, composite='epsilon-plus'),
    taylor=dict(criterion='taylor', coupling='coupled', schedule='gradual', steps=2, epochs=1, ratio=.6),
    deeplift=dict(criterion='deeplift', ratio=.9, scope='global', epochs=1, retrain='finetune'),
    activation=dict(criterion='activation', ratio=0, macs_left=.4, epochs=1, rewind=0, augment=False))
ALWAYS = dict(random=True, magnitude=True, alive=True) # their order is not within the rounding of another machine
DISCRETE = 'plan', 'live', 'params', 'macs', 'params_live', 'macs_live', 'connected', 'alive', 'alive_in_both'
EXACT = 'predicted', 'confidence', 'accuracy', 'accuracy_pruned', 'accuracy_recalibrated', 'val_dense', 'val_epochs'

def small():
    data, sizes = load('cifar10-mini'), dict(train=384, val=100, test=200)
    return replace(data, **{s: getattr(data, s).take(torch.arange(n)) for s, n in sizes.items()})

def made(how, data):
    "The row of a run, as it is written down"
    run = Run(data='cifar10-mini', images=20, **how)
    net = baseline(run.baseline).net()
    steps = list(prune_steps(run, net, data, progress=False))
    r = row(run, net, data, steps)
    return json.loads(json.dumps({k: r[k] for k in (*DISCRETE, *EXACT)}))

def machine(): return dict(processor=processor(), torch=torch.__version__, threads=1)

@pytest.fixture(scope='module')
def data():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(room, 'latencies', lambda models, *a, **kw: [[.001] for _ in models])
        yield small()

@pytest.mark.parametrize('name', RUNS)
def test_same_rows(name, data):
    threads, there = torch.get_num_threads(), json.loads(FILE.read_text())
    try: have, want = made(RUNS[name], data), there['rows'][name]
    finally: torch.set_num_threads(threads)
    same = machine() == there['machine']
    checked = [k for k in want if same or k in DISCRETE and name in ALWAYS]
    if not checked: pytest.skip(f'rounded otherwise than on {there["machine"]}')
    assert {k: have[k] for k in checked} == {k: want[k] for k in checked}

if __name__ == '__main__':
    rows = {name: made(how, small()) for name, how in RUNS.items()}
    FILE.write_text(json.dumps(dict(machine=machine(), rows=rows), indent=1) + '\n')
