"""Which networks are read, cut and explained rightly: python tests/coverage_table.py [NAMES] writes figures/coverage/networks.csv

A line a network, from a process of its own (`--seconds` at most); lines that are there are kept, so that a killed table goes on. In float64, two images,
weights drawn anew with batch norms that do something. Oracles: the silenced network for the cut one, Torch-Pruning for what is left, autograd on the
network itself (hooks, no graph of ours) for conductance; LRP and DeepLIFT are held to conservation and completeness."""
import argparse, json, multiprocessing, sys, time, warnings
from pathlib import Path

import pandas as pd
import torch
import torchvision
from torch import nn

from networks import restless
from xprune_nb.core import write_whole
from xprune_nb.criteria import attributions, completeness, conservation, score
from xprune_nb.criteria.relevance import deeplift_maps
from xprune_nb.model import convs, cost
from xprune_nb.pruning import classifier, cut, groups, plan, silence

TABLE = Path(__file__).parent.parent/'figures'/'coverage'/'networks.csv'
LARGE = {'inception_v3': 96, 'swin_v2_b': 256} # pixels, where 64 are too few
HEAVY = 'regnet_y_128gf', 'vit', 'swin', 'maxvit', 'convnext_large', 'convnext_base', 'efficientnet_b5', 'efficientnet_b6', 'efficientnet_b7', \
        'efficientnet_v2_l', 'efficientnet_v2_m', 'regnet_y_32gf', 'regnet_x_32gf', 'regnet_y_16gf', 'regnet_x_16gf', 'wide_resnet101', 'resnext101' # for two cores

class LeNet(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b, self.fc, self.out = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(16*13*13, 84), nn.Linear(84, 10)
    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.a(x)), 2)
        x = torch.max_pool2d(torch.relu(self.b(x)), 2)
        return self.out(torch.relu(self.fc(x.view(x.size(0), -1))))

class UNet(nn.Module):
    "Two levels, skip connections, and a head that classifies"
    def __init__(self):
        super().__init__()
        block = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(True))
        self.down, self.low, self.up, self.last, self.out = block(3, 8), block(8, 16), nn.ConvTranspose2d(16, 8, 2, 2), block(16, 8), nn.Linear(8, 10)
    def forward(self, x):
        a = self.down(x)
        b = self.up(self.low(torch.max_pool2d(a, 2)))
        return self.out(self.last(torch.cat([a, b], 1)).mean((2, 3)))

OWN = dict(lenet=LeNet, unet=UNet)

def names() -> list[str]:
    "torchvision's classifiers that fit two cores, and ours"
    every = torchvision.models.list_models(module=torchvision.models)
    return [*OWN, *(n for n in every if not n.startswith(HEAVY) and not n.startswith('quantized'))]

def network(name:str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    size, more = LARGE.get(name, 64), dict(init_weights=False) if name in ('googlenet', 'inception_v3') else {}
    net = OWN[name]() if name in OWN else torchvision.models.get_model(name, weights=None, num_classes=10, **more)
    draw = torch.Generator().manual_seed(1)
    return restless(net.eval()).double(), torch.randn(2, 3, size, size, dtype=torch.double, generator=draw), torch.tensor([3, 7])

def part(row:dict, name:str):
    "One column or more; what goes wrong is its first line"
    def carry(f):
        begin = time.perf_counter()
        try: row.update(f())
        except Exception as e: row[name] = f'{type(e).__name__}: {e}'.splitlines()[0][:200]
        row[f'seconds_{name}'] = round(time.perf_counter()-begin, 1)
        print(name, {k: v for k, v in row.items() if k.startswith(name)}, flush=True)
    return carry

def far(a:torch.Tensor, b:torch.Tensor) -> float: return ((a - b).abs().max()/b.abs().max().clamp_min(1e-30)).item()

def torch_pruning_left(net:nn.Module, x:torch.Tensor) -> float: # share of the parameters
    "What Torch-Pruning leaves at the same ratio, by its own magnitudes; the layers that put out the classes are left alone"
    import torch_pruning as tp
    last = [m for m in net.modules() if isinstance(m, nn.Linear) and m.out_features == 10] + [net.get_submodule(n) for n in classifier(net)]
    whole = sum(p.numel() for p in net.parameters())
    pruner = tp.pruner.BasePruner(net.float(), x[:1].float(), tp.importance.MagnitudeImportance(p=1), pruning_ratio=.3, ignored_layers=last)
    pruner.step()
    return sum(p.numel() for p in net.parameters())/whole

def passes(net:nn.Module, x:torch.Tensor, y:torch.Tensor) -> dict: # conv -> (output, gradient of the logit), each run added
    "By autograd, with hooks of its own"
    outs = {}
    def hook(n): return lambda m, i, o: outs.setdefault(n, []).append(o) or o.clone()
    hooks = [m.register_forward_hook(hook(n)) for n, m in convs(net).items()]
    try: logit = net(x).gather(1, y[:, None]).sum()
    finally:
        for h in hooks: h.remove()
    flat = [o for runs in outs.values() for o in runs]
    grads = iter(torch.autograd.grad(logit, flat, allow_unused=True, materialize_grads=True))
    return {n: [(o.detach(), next(grads)) for o in runs] for n, runs in outs.items()}

def conductance(net, x, y, steps=2) -> dict:
    "The trapezoid from a black image, from the definition"
    points = [passes(net, t*x, y) for t in torch.linspace(0, 1, steps+1, dtype=x.dtype)]
    step = lambda n, r, p, q: (p[n][r][1] + q[n][r][1])/2*(q[n][r][0] - p[n][r][0])
    return {n: sum(step(n, r, p, q) for p, q in zip(points, points[1:]) for r in range(len(runs))) for n, runs in points[0].items()}

def line(name:str) -> dict:
    "Everything that is asked of one network"
    net, x, y = network(name)
    shape, row = tuple(x.shape[1:]), dict(network=name, parameters=sum(p.numel() for p in net.parameters()), convolutions=len(convs(net)))
    left = {}

    @part(row, 'cut')
    def _():
        p = left['plan'] = plan(score('magnitude', net, x, y), .3, coupling='coupled', groups=groups(net, shape))
        with warnings.catch_warnings(record=True) as said: warnings.simplefilter('always'); small = cut(net, p, shape)
        with torch.no_grad(): off = far(small(x), silence(network(name)[0], p)(x))
        before, after = (cost(m, shape)[['params', 'macs']].sum() for m in (net, small))
        return dict(cut='right' if off < 1e-5 else 'wrong', cut_off=off, params_left=after.params/before.params, macs_left=after.macs/before.macs,
                    said=' '.join(str(w.message) for w in said)[:300])

    @part(row, 'torch_pruning')
    def _(): return dict(torch_pruning=torch_pruning_left(network(name)[0], x))

    @part(row, 'conductance')
    def _():
        ours, theirs = attributions('conductance', net, x, y, steps=2, baseline=torch.zeros_like(x)), conductance(net, x, y)
        off = max(far(ours[n], a) for n, a in theirs.items() if n in ours)
        return dict(conductance='right' if off < 1e-6 else 'wrong', conductance_off=off)

    @part(row, 'lrp')
    def _():
        t = conservation(net, x, y)
        off = float(t.gap.max()/t.relevance.abs().max())
        return dict(lrp='right' if off < 1e-6 else 'wrong', lrp_off=off)

    @part(row, 'deeplift')
    def _():
        t = completeness(net, x, y, method=deeplift_maps, baseline=torch.zeros_like(x))
        off = float(t.gap.max()/t.change.abs().max())
        return dict(deeplift='right' if off < 1e-6 else 'wrong', deeplift_off=off)
    return row

def child(name:str, pipe) -> None: torch.set_num_threads(1); pipe.send(line(name))

def main() -> None:
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument('names', nargs='*'); a.add_argument('--seconds', type=float, default=900)
    a = a.parse_args()
    table = pd.read_csv(TABLE).to_dict('records') if TABLE.exists() else []
    for name in a.names or [n for n in names() if n not in {r['network'] for r in table}]:
        ours, theirs = multiprocessing.get_context('spawn').Pipe()
        process = multiprocessing.get_context('spawn').Process(target=child, args=(name, theirs))
        print('==', name, flush=True); process.start(); theirs.close()
        try: row = ours.recv() if ours.poll(a.seconds) else dict(network=name, cut=f'took more than {a.seconds:g} s')
        except EOFError: row = dict(network=name, cut='the process ended without a word')
        process.kill(); process.join()
        table = [r for r in table if r['network'] != name] + [row]
        write_whole(TABLE, pd.DataFrame(table).sort_values('network').to_csv(index=False, float_format='%.4g', lineterminator='\n'))

if __name__ == '__main__': main()
