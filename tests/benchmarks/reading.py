"""What reading, grouping, planning and cutting MobileNetV2 take, the first time in a process and after: python tests/benchmarks/reading.py"""
import time

import torch

from xprune_nb.criteria import magnitude
from xprune_nb.model import build
from xprune_nb.pruning import cut, groups, plan

def seconds(net):
    "groups, plan, cut"
    at = [time.perf_counter()]
    gs = groups(net); at.append(time.perf_counter())
    p = plan(scores, .5, coupling='coupled', groups=gs); at.append(time.perf_counter())
    cut(net, p, strict=True); at.append(time.perf_counter())
    return [b-a for a, b in zip(at, at[1:])]

scores = magnitude(build())
print(f'torch {torch.__version__}, {torch.get_num_threads()} thread(s)')
net = build()
for what, each in ('the first time', net), ('again', net), ('another of this kind', build(seed=1)):
    s = seconds(each)
    print(f'{what:22}' + ''.join(f'{n} {t:.3f} s  ' for n, t in zip(('groups', 'plan', 'cut'), s)) + f'together {sum(s):.3f} s')
