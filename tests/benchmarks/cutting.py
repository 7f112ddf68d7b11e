"""What cutting MobileNetV2 is worth in time, and what it takes: python tests/benchmarks/cutting.py [batch] [repeats] [stem]

Latency of the dense network, of ours and of the same channels cut by Torch-Pruning, in turn in one process, so that what else the machine does
hits all of them: the ratios are what counts. Beside it, Torch-Pruning's own way from the network to a smaller one (MagnitudePruner, L1,
the same ratio). Then the time of groups, plan and cut."""
import copy, sys, time
from statistics import median, quantiles

import pandas as pd
import torch
import torch_pruning as tp

from xprune_nb.criteria import magnitude
from xprune_nb.model import build, convs, cost
from xprune_nb.pruning import agreed, cut, groups, plan
from xprune_nb.shrinking import latencies

batch, repeats = (int(v) for v in (sys.argv[1:3] + ['128', '15'][len(sys.argv)-1:]))
net = build('mobilenet_v2', stem=sys.argv[3] if len(sys.argv) > 3 else 'imagenet')
image, gs, scores = torch.zeros(1, 3, 32, 32), groups(net), magnitude(net)

def by_torch_pruning(p):
    "The same channels, removed by Torch-Pruning"
    small = copy.deepcopy(net)
    graph, mods = tp.DependencyGraph().build_dependency(small, image), convs(small)
    for g, stays in zip(gs, agreed(p, gs)):
        gone = (~stays).nonzero().flatten().tolist()
        if gone: graph.get_pruning_group(mods[g[0]], tp.prune_conv_out_channels, gone).prune()
    return small.eval()

def by_magnitude_pruner(ratio):
    "What Torch-Pruning makes of the network by itself"
    small = copy.deepcopy(net)
    pruner = tp.pruner.MagnitudePruner(small, image, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=ratio,
                                       ignored_layers=[small.classifier[-1]])
    pruner.step()
    return small.eval()

macs, rows = lambda m: cost(m).macs.sum(), []
for ratio in (.5, .7, .9):
    p = plan(scores, ratio, coupling='coupled', groups=gs)
    nets = dict(dense=net, ours=cut(net, p, strict=True), tp=by_torch_pruning(p), pruner=by_magnitude_pruner(ratio))
    alike = all(a.equal(b) for a, b in zip(nets['ours'].state_dict().values(), nets['tp'].state_dict().values()))
    times = dict(zip(nets, latencies([*nets.values()], (3, 32, 32), batch, repeats=repeats)))
    ms, least = ({k: f(t)*1e3 for k, t in times.items()} for f in (median, min))
    low, _, high = quantiles(times['ours'])
    rows.append({'ratio': ratio, 'dense ms': ms['dense'], 'ours ms': ms['ours'], 'IQR': (high-low)*1e3, 'times quicker': ms['dense']/ms['ours'],
                 'times fewer MACs': macs(net)/macs(nets['ours']), 'same cut by tp ms': ms['tp'], 'tensors equal': alike, 'tp/ours': ms['tp']/ms['ours'], 'by the fastest': least['tp']/least['ours'],
                 'MagnitudePruner ms': ms['pruner'], 'its times fewer MACs': macs(net)/macs(nets['pruner'])})
print(f'batch {batch}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, torch-pruning {tp.__version__}')
print(pd.DataFrame(rows).round(2).to_string(index=False))

def seconds(f):
    taken = []
    for _ in range(5):
        start = time.perf_counter(); out = f(); taken.append(time.perf_counter()-start)
    return median(taken), out
t_groups, gs = seconds(lambda: groups(net))
for coupling in ('coupled', 'independent'):
    t_plan, p = seconds(lambda: plan(scores, .5, coupling=coupling, groups=gs))
    t_cut, _ = seconds(lambda: cut(net, p))
    print(f'{coupling}: groups {t_groups*1e3:.0f} ms + plan {t_plan*1e3:.0f} ms + cut {t_cut*1e3:.0f} ms = {t_groups+t_plan+t_cut:.2f} s')
