"""How much faster a training step of MobileNetV2 is with `fast_routes` (32x32 images, batch 128): python tests/benchmarks/training_step.py [threads]

Both ways run in turn in one process, so that what else the machine does hits both; the ratio of medians is what counts."""
import sys, time
from statistics import median

import torch
from torch.nn import functional as F

from xprune_nb.model import build
from xprune_nb.training import fast_routes

torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
net = build('mobilenet_v2').train().to(memory_format=torch.channels_last)
opt = torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=1e-4)
x, y = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, (128,))

def step():
    start = time.perf_counter()
    opt.zero_grad(); F.cross_entropy(net(x), y).backward(); opt.step()
    return time.perf_counter() - start

def fast_step():
    with fast_routes(net): return step()

times = {'plain': [], 'fast': []}
for i in range(15):
    for name, f in (('plain', step), ('fast', fast_step)):
        t = f()
        if i > 2: times[name].append(t)
for name, t in times.items(): print(f'{name:6s} median {median(t)*1e3:6.1f} ms, fastest {min(t)*1e3:6.1f} ms a step')
print(f"ratio  {median(times['plain'])/median(times['fast']):.2f} (medians), {min(times['plain'])/min(times['fast']):.2f} (fastest); {torch.get_num_threads()} thread(s)")
