"""What a run costs beyond its own work, how long the quick study takes, and how much faster an epoch of what is left is:

    python tests/benchmarks/run.py [--only overhead|quick|epoch] [--data cifar10]

Speeds are ratios within one process, each network in its turn; `epoch` trains real epochs (validation included) with `fit`, as a run does: of a tenth of the set, unless --whole is given."""
import argparse, statistics, tempfile, time
from dataclasses import replace

import torch

from xprune_nb.criteria import score
from xprune_nb.data import load, sample
from xprune_nb.experiments import Run, execute, grid
from xprune_nb.model import baseline
from xprune_nb.pruning import Live, groups, plan, silence, silencer
from xprune_nb.training import Recipe, fit

def overhead(runs=6):
    "The smallest runs, in one warm worker: seconds less scoring and retraining; the first also pays for what all share"
    with tempfile.TemporaryDirectory() as d:
        table = execute(grid(criterion=['random', 'magnitude'], seed=list(range(runs)), epochs=0, images=20), d, n_jobs=1, progress=False)
    beyond = (table.seconds - table.seconds_score - table.seconds_retrain).tolist()[2:]
    print(f'beyond scoring and retraining: median {statistics.median(beyond):.2f} s, fastest {min(beyond):.2f} s, slowest {max(beyond):.2f} s of {len(beyond)} runs (goal: 2 s)')

def quick():
    "The quick study's runs, from an empty store, on two workers; each worker imports once"
    from xprune_nb.cli import preset
    with tempfile.TemporaryDirectory() as d:
        begin = time.perf_counter(); table = execute(preset('quick'), d, n_jobs=2)
        print(f'quick study: {len(table)} runs in {time.perf_counter()-begin:.0f} s on 2 workers (goal: 90 s); all done: {(table.status == "done").all()}')

def epoch(name, whole):
    "Seconds an epoch, one thread: the dense network, the silenced one and what is left of it"
    torch.set_num_threads(1)
    data, net = load(name), baseline().net()
    if not whole: data = replace(data, train=data.train.take(torch.arange(len(data.train.y)//10)), val=data.val.take(torch.arange(len(data.val.y)//10)))
    gs, s = groups(net), score('conductance', net, *sample(data, 64), steps=5)
    plans = {(c, r): plan(s, r, coupling=c, groups=gs) for c in ('independent', 'coupled') for r in (.5, .9)}
    def seconds(model, hold):
        return fit(model, data, Recipe(epochs=1), progress=False, after_step=hold).frame.seconds.iloc[0]
    times = {}
    for _ in range(3):
        times.setdefault('dense', []).append(seconds(baseline().net(), None))
        for k, p in plans.items():
            quiet, live = silence(baseline().net(), p), Live(net, p)
            if k[1] == .9: times.setdefault(('silenced', *k), []).append(seconds(quiet, silencer(quiet, p)))
            times.setdefault(('live', *k), []).append(seconds(live.net, live.hush))
    best = {k: min(v) for k, v in times.items()}
    for k, v in best.items(): print(f"{k if k == 'dense' else ' '.join(map(str, k)):28s} {v:7.2f} s an epoch of {len(data.train.y):,} images, {best['dense']/v:5.2f} times as fast as dense")
    print('goals: live independent 0.9 at least 4 times, live coupled 0.5 at least 2 times')

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--only', choices=('overhead', 'quick', 'epoch')); a.add_argument('--data', default='cifar10-mini'); a.add_argument('--whole', action='store_true')
    a = a.parse_args()
    if a.only in (None, 'overhead'): overhead()
    if a.only in (None, 'quick'): quick()
    if a.only in (None, 'epoch'): epoch(a.data, a.whole or a.data.endswith('mini'))
