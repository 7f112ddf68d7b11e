"""What reading, grouping, planning and cutting MobileNetV2 take, the first time in a process and after: python tests/benchmarks/reading.py

Seconds by the clock and, in brackets, of the processor: what else the machine does does not count there. Medians of seven after the first."""
import time
from statistics import median

import torch

from xprune_nb.criteria import magnitude
from xprune_nb.model import build
from xprune_nb.pruning import cut, groups, plan

def timed(step):
    "What it gives, and how long it took"
    clock, cpu = time.perf_counter(), time.process_time()
    out = step()
    return out, (time.perf_counter()-clock, time.process_time()-cpu)

def all_three(net):
    gs, a = timed(lambda: groups(net))
    p, b = timed(lambda: plan(scores, .5, coupling='coupled', groups=gs))
    _, c = timed(lambda: cut(net, p, strict=True))
    return dict(groups=a, plan=b, cut=c, together=[sum(t) for t in zip(a, b, c)])

scores, net = magnitude(build()), build()
print(f'torch {torch.__version__}, {torch.get_num_threads()} thread(s)')
rows = {'the first time': [all_three(net)], 'again': [all_three(net) for _ in range(7)],
        'another of this kind': [all_three(build(seed=i)) for i in range(1, 8)]}
for what, found in rows.items():
    middle = {k: [median(r[k][i] for r in found) for i in (0, 1)] for k in found[0]}
    print(f'{what:22}' + '  '.join(f'{k} {clock:.3f} ({cpu:.3f})' for k, (clock, cpu) in middle.items()))
