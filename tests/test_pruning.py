"""Groups, plans, silence and cuts: against torch.nn.utils.prune, Torch-Pruning and torch.fx, and by random plans on networks whose signals do not die out."""
import copy, math, re, time
from functools import cache

import numpy as np
import pytest
import torch
import torch_pruning
import torchvision
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.testing import assert_close
from torchvision.models import densenet, mobilenetv2, resnet, vgg

from xprune_nb.criteria import magnitude
from xprune_nb.model import MODELS, baseline, build, convs, cost
from xprune_nb.pruning import (COUPLINGS, NORMALISATIONS, NORMS, REDUCTIONS, SCOPES, agreed, alive_in_both, classifier, costing, cut, dead, gradual, groups,
                               groups_chart, kept, mask, masks, plan, plan_chart, plan_macs, random_alive_as, ratio_for, rewind, shares, silence,
                               silenced, silencer, vanished)

says = lambda *parts: '.*'.join(map(re.escape, parts))
same = lambda a, b: a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
snapshot = lambda net: {k: v.clone() for k, v in net.state_dict().items()}

def restless(net):
    "Batch norms far from the identity, so that a channel that is not silent behind them shows"
    torch.manual_seed(5)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, lo, hi in (m.running_mean, -.3, .3), (m.running_var, .3, 1.5), (m.weight, .7, 1.5), (m.bias, -.3, .3): t is None or nn.init.uniform_(t, lo, hi)
    return net.double().eval()

class Twins(nn.Module):
    "Biases, no batch normalisation at one place, a shortcut, a grouped depthwise convolution, two linear layers"
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.deep = nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10), nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.a, self.b, self.out = nn.Conv2d(10, 7, 1), nn.Conv2d(7, 7, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(7*16, 6), nn.ReLU(), nn.Linear(6, 4))
    def forward(self, x):
        x = torch.relu(self.a(torch.relu(self.deep(torch.relu(self.norm(self.stem(x)))))))
        return self.out(nn.functional.adaptive_avg_pool2d(x + torch.relu(self.b(x)), 4))

NETS = dict(imagenet=lambda: build(), cifar=lambda: build(stem='cifar'), trained=lambda: baseline().net(), resnet18=lambda: torchvision.models.resnet18(num_classes=4), twins=Twins)

@cache
def net_of(name): return restless(MORE[name]()) if name != 'trained' else NETS[name]().double()
@cache
def groups_of(name): return groups(net_of(name))
def scores_of(name, seed): g = torch.Generator().manual_seed(seed); return {n: torch.rand(c.out_channels, generator=g) for n, c in convs(net_of(name)).items()}

# --- groups ---

def ties(net):
    "Another reading of the graph, by torch.fx: which convolutions put out the same channels (a depthwise one its inputs', a sum those of both), and take in whose"
    graph, mods, of, parent = torch.fx.symbolic_trace(net).graph, dict(net.named_modules()), {}, {}
    def root(c):
        while parent.get(c, c) != c: c = parent[c]
        return c
    outs, ins = {}, {}
    for node in graph.nodes:
        froms = [of[a] for a in node.all_input_nodes if a in of]
        m = mods.get(str(node.target)) if node.op == 'call_module' else None
        if isinstance(m, nn.Conv2d):
            ins[node.target] = froms[0] if froms else None
            of[node] = outs[node.target] = froms[0] if m.groups > 1 else node.target
        elif froms:
            for f in froms[1:]: parent[root(f)] = root(froms[0])
            of[node] = froms[0]
    return {n: root(c) for n, c in outs.items()}, {n: c and root(c) for n, c in ins.items()}

@pytest.mark.parametrize('name', NETS)
def test_groups_are_those_of_the_traced_graph(name):
    outs, _ = ties(net_of(name))
    want = {}
    for n, c in outs.items(): want.setdefault(c, []).append(n)
    assert sorted(groups_of(name)) == sorted(map(tuple, want.values()))
    assert [g[0] for g in groups_of(name)] == sorted((g[0] for g in groups_of(name)), key=list(convs(net_of(name))).index)

@pytest.mark.parametrize('name', NETS)
def test_groups_are_all_of_torch_prunings(name):
    net = net_of(name)
    names = {m: n for n, m in convs(net).items()}
    graph = torch_pruning.DependencyGraph().build_dependency(net, torch.zeros(1, 3, 32, 32).double())
    theirs = [{names[d.target.module] for d, _ in g if d.target.module in names and graph.is_out_channel_pruning_fn(d.handler)}
              for g in graph.get_all_groups(root_module_types=[nn.Conv2d])]
    assert sorted(map(sorted, theirs)) == sorted(map(sorted, groups_of(name)))
    if name in ('imagenet', 'cifar'): assert len(theirs) == 25

# --- plans ---

@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60), st.floats(0, 1, exclude_max=True))
@settings(max_examples=300, deadline=None)
def test_a_plan_keeps_the_largest_and_of_equals_the_first(values, ratio):
    s, gone = torch.tensor(values), round(ratio*len(values))
    if gone == len(values):
        with pytest.raises(ValueError, match=says(f"ratio {ratio} would leave layer 'a' ({len(values)} filters) without a filter")): plan({'a': s}, ratio)
        return
    keep = plan({'a': s}, ratio)['a']
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:len(values)-gone]
    assert keep.nonzero().flatten().tolist() == sorted(best) and keep.dtype == torch.bool
    assert kept({'a': keep}) == (len(values)-gone)/len(values)

@pytest.mark.parametrize('stem', ['imagenet', 'cifar'])
@pytest.mark.parametrize('ratio', [0, 0.1, 0.33, 0.5, 0.7, 0.9, 0.96])
def test_magnitude_plan_is_torchs_structured_pruning(stem, ratio):
    net = build(stem=stem, seed=3).double()
    have = plan(magnitude(net), ratio)
    for n, c in convs(net).items():
        if ratio: prune.ln_structured(c, 'weight', amount=ratio, n=1, dim=0)
        mask = c.weight_mask.flatten(1).all(1) if ratio else torch.ones(c.out_channels, dtype=torch.bool)
        assert have[n].equal(mask) and (~mask).sum() == round(ratio*c.out_channels), n

@given(st.floats(0, .98), st.integers(1, 6), st.sampled_from(['geometric', 'linear', 'cubic']))
@settings(max_examples=200, deadline=None)
def test_shares_lead_to_the_ratio_in_like_steps(ratio, steps, share):
    r = shares(ratio, steps, share)
    assert len(r) == steps and r[-1] == ratio
    path = np.array([0, *r])
    if share == 'cubic': path = -np.cbrt(1-path/ratio) if ratio > 1e-3 else path[:1]
    parts = np.diff(path)/(1-path[:-1]) if share == 'geometric' else np.diff(path)
    if not len(parts): return
    np.testing.assert_allclose(parts, parts.mean(), rtol=0, atol=1e-9 if share != 'cubic' else 1e-4)  # a cube root near 0

@given(st.data())
@settings(max_examples=60, deadline=None)
def test_iterative_plans_are_nested_and_end_with_the_same_counts(data):
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    ratio, steps, share, seed = data.draw(st.floats(0, .9)), data.draw(st.integers(1, 5)), data.draw(st.sampled_from(['geometric', 'linear'])), data.draw(st.integers(0, 99))
    sizes = [o for o in sizes if round(ratio*o) < o] or [40]
    coupling, gs = data.draw(st.sampled_from(COUPLINGS)), [(f'{i}', f'{i}b') for i in range(len(sizes))]
    g, p = torch.Generator().manual_seed(seed), None
    for r in shares(ratio, steps, share):
        new = plan({n: torch.randn(o, generator=g) for pair, o in zip(gs, sizes) for n in pair}, r, coupling=coupling, groups=gs, within=p)
        for n in new: assert p is None or not (new[n] & ~p[n]).any()
        p = new
    for pair, o in zip(gs, sizes):
        for n in pair: assert p[n].sum() == o - round(ratio*o)
        if coupling == 'coupled': assert p[pair[0]].equal(p[pair[1]])

@given(st.integers(0, 10**6), st.floats(0, .9))
@settings(max_examples=25, deadline=None)
def test_coupled_plans_agree_and_are_the_sums_of_shares(seed, ratio):
    net, gs, scores = net_of('imagenet'), groups_of('imagenet'), scores_of('imagenet', seed)
    p = plan(scores, ratio, coupling='coupled', groups=gs)
    for g in gs:
        s = sum(scores[n].double().numpy()/scores[n].double().numpy().mean() for n in g)
        want = np.zeros(len(s), bool); want[np.argsort(-s, kind='stable')[:len(s)-round(ratio*len(s))]] = True
        for n in g: assert (p[n].numpy() == want).all(), n
    assert all(a.equal(p[g[0]]) for a, g in zip(agreed(p, gs), gs))
    depthwise = [p[n] for n, c in convs(net).items() if c.groups > 1]
    assert alive_in_both(net, p, gs) == pytest.approx(torch.cat(depthwise).double().mean().item())
    grown = {n: s*(i+1)*10. for i, (n, s) in enumerate(scores.items())}  # no layer outshouts another
    assert same(plan(grown, ratio, coupling='coupled', groups=gs), p) and same(plan(grown, ratio), plan(scores, ratio))

def test_alive_in_both_by_hand():
    net, gs = net_of('twins'), groups_of('twins')
    p = {n: torch.ones(c.out_channels, dtype=torch.bool) for n, c in convs(net).items()}
    p['stem'][:4] = False; p['deep'][2:7] = False
    assert alive_in_both(net, p, gs) == pytest.approx(3/10) and [int((~a).sum()) for a, g in zip(agreed(p, gs), gs) if 'deep' in g] == [2]
    assert math.isnan(alive_in_both(net_of('resnet18'), plan(scores_of('resnet18', 0), .5), groups_of('resnet18')))

# --- the law: silenced and cut, the same outputs ---

def random_plan(name, seed, ratio, coupling): return plan(scores_of(name, seed), ratio, coupling=coupling, groups=groups_of(name))

def law(name, p, shape=(3, 32, 32), norm='silent', fold=True):
    net, x = net_of(name), torch.randn(3, *shape).double()
    small = cut(net, p, shape, norm, fold)
    with torch.no_grad(), silenced(net, p, norm): want = net(x)
    with torch.no_grad(): have = small(x)
    assert want.isfinite().all() and have.dtype == torch.float64
    assert_close(have, want, rtol=1e-9, atol=1e-9*want.abs().max().item())
    return small

@given(st.integers(0, 10**6), st.floats(0, .95), st.sampled_from(COUPLINGS))
@settings(max_examples=8, deadline=None)
def test_silenced_and_cut_networks_agree_on_random_plans(seed, ratio, coupling): law('imagenet', random_plan('imagenet', seed, ratio, coupling))

@pytest.mark.parametrize('coupling', COUPLINGS)
@pytest.mark.parametrize('name', [n for n in NETS if n != 'imagenet'])
def test_silenced_and_cut_networks_agree(name, coupling):
    for seed, ratio in enumerate((.3, .8)): law(name, random_plan(name, seed, ratio, coupling))

def test_silenced_and_cut_networks_agree_on_wide_images(): law('imagenet', random_plan('imagenet', 1, .6, 'coupled'), (3, 48, 64))

@given(st.data())
@settings(max_examples=40, deadline=None)
def test_silenced_and_cut_networks_agree_on_any_plan_of_a_small_one(data):
    "Also a different number of filters in each layer, down to one"
    p = {n: torch.tensor(data.draw(st.lists(st.booleans(), min_size=c.out_channels, max_size=c.out_channels).filter(any))) for n, c in convs(net_of('twins')).items()}
    law('twins', p)

@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('coupling', COUPLINGS)
def test_what_is_cut_is_counted_on_paper(name, coupling):
    "Each convolution keeps the channels that its own group does not give up altogether, over those of the group that it takes in"
    net, gs = net_of(name), groups_of(name)
    p = random_plan(name, 2, .7, coupling)
    small, stays = cut(net, p, fold=False), dict(zip(gs, (int(a.sum()) for a in agreed(p, gs))))
    outs, ins = ties(net)
    width = {outs[g[0]]: w for g, w in stays.items()}
    for n, c in convs(small).items():
        assert tuple(c.weight.shape[:2]) == (width[outs[n]], 1 if c.groups > 1 else width[ins[n]] if ins[n] else 3), n
        assert c.groups in (1, width[outs[n]])
    assert cost(small).params.sum() == sum(q.numel() for q in small.parameters()) < sum(q.numel() for q in net.parameters())

def test_the_original_is_left_as_it_was():
    net = copy.deepcopy(net_of('imagenet'))
    net(torch.randn(2, 3, 32, 32).double()).sum().backward()
    before, grads, modules = snapshot(net), [q.grad.clone() for q in net.parameters()], list(net.modules())
    groups(net); cut(net, random_plan('imagenet', 0, .5, 'coupled'))
    assert same(net.state_dict(), before) and all(q.grad.equal(g) for q, g in zip(net.parameters(), grads)) and all(a is b for a, b in zip(net.modules(), modules))
    assert [m.out_channels for m in convs(net).values()] == [m.out_channels for m in convs(build()).values()] and not any(m._forward_hooks for m in net.modules())

@pytest.mark.parametrize('state', ['training', 'partly training', 'frozen', 'partly frozen', 'no_grad'])
def test_cut_in_whatever_state_the_network_is(state):
    "It is in the midst of something: what it was is left to it, and what comes out is ready for use and asks for gradients where it did"
    net, p = copy.deepcopy(net_of('twins')), random_plan('twins', 0, .5, 'coupled')
    if state == 'training': net.train()
    if state == 'partly training': net.norm.train()
    if 'frozen' in state:
        for n, q in net.named_parameters(): q.requires_grad_(state == 'partly frozen' and not n.startswith('stem'))
    was, wants = [m.training for m in net.modules()], {n: q.requires_grad for n, q in net.named_parameters()}
    with torch.set_grad_enabled(state != 'no_grad'): small, gs = cut(net, p), groups(net)
    assert gs == groups_of('twins') and [m.training for m in net.modules()] == was
    assert {n: q.requires_grad for n, q in net.named_parameters()} == wants == {n: q.requires_grad for n, q in small.named_parameters()}
    assert not any(m.training for m in small.modules()) and same(small.state_dict(), cut(net_of('twins'), p).state_dict())

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_cut_network_is_one_like_any_other(dtype):
    "It keeps its type, hands its weights to its like, and learns"
    p, net = random_plan('imagenet', 0, .8, 'coupled'), copy.deepcopy(net_of('imagenet')).to(dtype)
    small, x, y = cut(net, p), torch.randn(8, 3, 32, 32, dtype=dtype), torch.arange(8)
    assert {v.dtype for v in small.state_dict().values() if v.is_floating_point()} == {dtype}
    other = cut(restless(build(seed=9)).to(dtype), p)
    assert not other(x).equal(small(x))
    other.load_state_dict(small.state_dict())
    assert other(x).equal(small(x))
    opt, losses = torch.optim.SGD(small.parameters(), 1e-3), []
    for _ in range(3):
        opt.zero_grad(); loss = nn.functional.cross_entropy(small(x), y); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0] and all(q.grad is not None and q.grad.isfinite().all() and q.grad.shape == q.shape for q in small.parameters())

# --- silence ---

@pytest.mark.parametrize('error', [None, RuntimeError('out of memory'), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_silenced_gives_everything_back_to_the_bit(error):
    net, p = copy.deepcopy(net_of('imagenet')).float(), random_plan('imagenet', 3, .5, 'independent')
    with torch.no_grad(): net.features[0][0].weight[0, 0, 0, 0] = -0.  # a bit that == does not see
    net.train(); before, bits = snapshot(net), net.features[0][0].weight.view(torch.int32).clone()
    net(torch.randn(4, 3, 32, 32)).sum().backward()
    grads, before = [q.grad.clone() for q in net.parameters()], snapshot(net)
    def use():
        with silenced(net, p) as quiet:
            assert quiet is net and all(c.weight[~p[n]].eq(0).all() and c.weight[p[n]].equal(before[f'{n}.weight'][p[n]]) for n, c in convs(net).items())
            with torch.no_grad(): net.features[3].conv[0][0].weight.add_(1)  # whatever happens in the midst
            if error: raise error
    if error:
        with pytest.raises(type(error)): use()
    else: use()
    assert same(net.state_dict(), before) and net.features[0][0].weight.view(torch.int32).equal(bits) and net.training
    assert all(q.grad.equal(g) for q, g in zip(net.parameters(), grads))

@pytest.mark.parametrize('name', NETS)
def test_a_silent_filter_puts_out_nothing_behind_its_normalisation(name):
    net, p = copy.deepcopy(net_of(name)), random_plan(name, 1, .5, 'independent')
    traced, after = torch.fx.Interpreter(torch.fx.symbolic_trace(silence(net, p))), {}
    mods, run = dict(net.named_modules()), traced.run_node
    def watched(node):
        out = run(node)
        if isinstance(mods.get(str(node.target)), (nn.Conv2d, nn.BatchNorm2d)): after[node.target, node.all_input_nodes[0].target] = out.clone()
        return out
    traced.run_node = watched
    with torch.no_grad(): traced.run(torch.randn(2, 3, 32, 32).double())
    ends = {n: o for (n, _), o in after.items() if n in p} | {conv: o for (n, conv), o in after.items() if n not in p}
    assert ends.keys() == p.keys()
    for n, out in ends.items(): assert out[:, ~p[n]].eq(0).all() and out[:, p[n]].abs().amax((0, 2, 3)).min() > 0, n

def test_a_silencer_can_be_called_again():
    net, p = copy.deepcopy(net_of('twins')), random_plan('twins', 1, .5, 'independent')
    hush = silencer(net, p)
    for _ in range(3):
        with torch.no_grad():
            for q in net.parameters(): q.add_(1)
        hush()
        for n, c in convs(net).items(): assert c.weight[~p[n]].eq(0).all() and c.bias[~p[n]].eq(0).all() and c.weight[p[n]].ne(0).any()
    assert net.norm.weight[~p['stem']].eq(0).all() and net.norm.weight[p['stem']].ne(0).all()

@pytest.mark.parametrize('e', [0, 1, -1])
def test_rewinding_gives_survivors_their_earlier_weights(e):
    base, p = baseline(), random_plan('imagenet', 4, .7, 'independent')
    w = base.weights(base.epochs[e])
    net = rewind(base.net(), w, p)
    want = {k: v.clone() for k, v in w.items()}
    for n in p:
        parts = [f'{n}.weight', *(n[:-1] + str(int(n[-1])+1) + s for s in ('.weight', '.bias'))]  # torchvision numbers a normalisation after its convolution
        for k in parts: want[k][~p[n]] = 0
    assert same(net.state_dict(), want) and same(silence(baseline().net(), p).state_dict(), rewind(base.net(), base.weights(), p).state_dict())

# --- cutting by other means, and more kinds of networks ---

def cbr(i, o, k=3, **kw): return nn.Sequential(nn.Conv2d(i, o, k, **(dict(padding=k//2) | kw), bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))

class Inception(nn.Module):
    "Concatenation in front of a depthwise and of a grouped convolution, a depthwise one with two filters a channel, flatten of 4x4 positions, no batch normalisation at some places"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.deep, self.two = cbr(3, 6), nn.Conv2d(3, 4, 1), cbr(10, 10, groups=10), nn.Conv2d(10, 20, 3, groups=10)
        self.grouped, self.point, self.out = cbr(20, 12, groups=4), nn.Conv2d(12, 5, 1), nn.Linear(5*16, 4)
    def forward(self, x):
        x = self.deep(torch.cat([self.a(x), F.hardswish(self.b(x))], dim=1))
        x = self.point(self.grouped(torch.sigmoid(self.two(x))))
        return self.out(F.adaptive_avg_pool2d(x, 4).view(x.size(0), -1))

class Squeeze(nn.Module):
    "Squeeze-and-excitation by linear layers and by convolutions, a spatial gate, PReLU, reflecting padding, pools"
    def __init__(self):
        super().__init__()
        self.stem, self.deep, self.act = cbr(3, 8, padding_mode='reflect'), nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode='replicate', bias=False), nn.PReLU(8)
        self.norm, self.s1, self.s2 = nn.BatchNorm2d(8), nn.Linear(8, 3), nn.Linear(3, 8)
        self.c1, self.c2, self.point, self.gate = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), cbr(8, 6, 1), nn.Conv2d(6, 1, 1)
        self.pool, self.out = nn.AvgPool2d(3, 2, 1), nn.Linear(6, 4)
    def forward(self, x):
        x = self.act(self.norm(self.deep(self.stem(x))))
        b, c = x.shape[:2]
        x = x*torch.sigmoid(self.s2(F.relu(self.s1(x.mean((2, 3)))))).view(b, c, 1, 1)
        x = self.pool(x*torch.sigmoid(self.c2(F.relu(self.c1(F.adaptive_avg_pool2d(x, 1))))))
        x = self.point(F.max_pool2d(x, 2))
        return self.out(F.dropout((x*torch.sigmoid(self.gate(x))).mean([2, 3]), .5, self.training))

class PreAct(nn.Module):
    "Batch normalisation before the convolution: behind a sum, behind a concatenation, and one without scale and shift"
    def __init__(self):
        super().__init__()
        self.stem, self.n1, self.c1, self.n2, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 8, 1)
        self.n3, self.c3, self.n4, self.out = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 4)
    def forward(self, x):
        x = self.stem(x)
        y = self.c1(F.relu(self.n1(x)))
        z = x + self.c2(F.relu(self.n2(y)))
        z = self.c3(F.relu(self.n3(torch.cat([z, y], 1))))
        return self.out(F.relu(self.n4(z)).mean((2, 3)))

class Unknown(nn.Module):
    "What is not followed: a channel shuffle, group normalisation, a module called twice, shared weights, a sum over channels, an operation in place on what is read again"
    def __init__(self):
        super().__init__()
        self.a, self.gn, self.b, self.twice, self.c, self.d, self.out = cbr(3, 8), nn.GroupNorm(2, 8), cbr(8, 8), cbr(8, 8), cbr(8, 8), cbr(8, 8, 1), nn.Linear(8*4, 4)
        self.e, self.f = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1); self.f.weight = self.e.weight
    def forward(self, x):
        x = self.b(self.gn(self.a(x)))
        b, c, h, w = x.shape
        x = self.twice(self.twice(x.view(b, 2, c//2, h, w).transpose(1, 2).reshape(b, c, h, w)))
        x = self.f(F.relu(self.e(self.c(x))))
        y = x + 1
        z = y.relu_()
        x = self.d(y - z*.5) * x.sum(1, keepdim=True).sigmoid()
        return self.out(torch.flatten(F.adaptive_max_pool2d(x, 2), 1))

class AllConv(nn.Module):
    def __init__(self): super().__init__(); self.body, self.head = nn.Sequential(cbr(3, 8), cbr(8, 8, groups=8), cbr(8, 6, 1)), nn.Conv2d(6, 4, 1)
    def forward(self, x): return F.adaptive_avg_pool2d(self.head(self.body(x)), 1).flatten(1)

def narrow_vgg(bn): return nn.Sequential(vgg.make_layers([8, 'M', 12, 12, 'M', 16, 'M'], bn), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(16*9, 12), nn.ReLU(True), nn.Dropout(), nn.Linear(12, 4))
def narrow_mobilenet(): return mobilenetv2.MobileNetV2(4, .25, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 1]], 4)
SMALL = dict(twins=Twins, inception=Inception, squeeze=Squeeze, preact=PreAct, unknown=Unknown, allconv=AllConv, vgg=lambda: narrow_vgg(False), vgg_bn=lambda: narrow_vgg(True),
             mobilenet=narrow_mobilenet, resnext=lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], 4, groups=4, width_per_group=2),
             densenet=lambda: densenet.DenseNet(4, (2, 2), 6, num_classes=4))
MORE = NETS | SMALL

def draw_plan(data, name, norm='silent'):
    "Any plan: each filter by itself, by ratio and scope, or by groups; the classifier stays"
    net, kind = net_of(name), data.draw(st.sampled_from(['any', 'few', 'plan', 'plan']))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    if kind == 'plan':
        s = {n: torch.rand(c.out_channels, generator=g) for n, c in convs(net).items()}
        how = dict(scope=data.draw(st.sampled_from([*SCOPES])), coupling=data.draw(st.sampled_from(COUPLINGS)), round_to=data.draw(st.sampled_from([1, 2])))
        return plan(s, data.draw(st.floats(0, .48)), groups=groups_of(name), **how)
    share = data.draw(st.floats(.05, .95))
    p = {n: torch.rand(c.out_channels, generator=g) < (share if kind == 'any' else .15) for n, c in convs(net).items()}
    for k in p.values(): k[torch.randint(len(k), (1,), generator=g)] = True
    for n in classifier(net): p[n][:] = True
    return p

@given(st.data())
@settings(max_examples=30, deadline=None)
def test_silenced_and_cut_networks_agree_whatever_the_network_and_the_plan(data):
    name = data.draw(st.sampled_from([*SMALL]))
    norm, fold = data.draw(st.sampled_from(NORMS)), data.draw(st.sampled_from([True, True, False]))
    p = draw_plan(data, name)
    small, gone = law(name, p, norm=norm, fold=fold), dead(net_of(name), p, norm=norm, fold=fold)
    for n, c in convs(small).items(): assert c.out_channels == len(c.weight) == int((~gone[n]).sum()) and c.in_channels == c.weight.shape[1]*c.groups, n
    assert costing(net_of(name), norm=norm, fold=fold)(p) == cost(small)[['params', 'macs']].sum().to_dict()

@given(st.data())
@settings(max_examples=15, deadline=None)
def test_the_law_in_single_precision(data):
    name = data.draw(st.sampled_from([*SMALL]))
    p, norm, x = draw_plan(data, name), data.draw(st.sampled_from(NORMS)), torch.randn(3, 3, 32, 32)
    net = copy.deepcopy(net_of(name)).float()
    with torch.no_grad(), silenced(net, p, norm): want = net(x)
    with torch.no_grad(): have = cut(net, p, norm=norm)(x)
    assert (have-want).abs().max() <= 1e-5*want.abs().max().clamp_min(1e-3)

@pytest.mark.parametrize('name', ['imagenet', 'resnet18', 'twins', 'mobilenet', 'vgg_bn', 'vgg'])
@pytest.mark.parametrize('coupling', COUPLINGS)
def test_what_the_groups_agree_on_is_cut_as_torch_pruning_cuts_it(name, coupling):
    "Tensor by tensor, to the bit"
    net, p = net_of(name), random_plan(name, 2, .6, coupling)
    theirs, ours = silence(copy.deepcopy(net), p), cut(net, p, fold=False)
    graph, mods = torch_pruning.DependencyGraph().build_dependency(theirs, torch.zeros(1, 3, 32, 32).double()), convs(theirs)
    for g, stays in zip(groups_of(name), agreed(p, groups_of(name))):
        gone = (~stays).nonzero().flatten().tolist()
        if gone: graph.get_pruning_group(mods[g[0]], torch_pruning.prune_conv_out_channels, gone).prune()
    assert same(ours.state_dict(), theirs.state_dict()) and list(ours.state_dict()) == list(net.state_dict())
    for a, b in zip(ours.modules(), theirs.modules()): assert str(a) == str(b)

@pytest.mark.parametrize('name', ['imagenet', 'mobilenet', 'resnet18', 'resnext', 'twins', 'preact', 'vgg', 'vgg_bn', 'densenet'])
@pytest.mark.parametrize('scope', SCOPES)
def test_coupled_plans_are_cut_wholly(name, scope):
    "Nothing silent stays: each convolution has the filters of the plan, and no weight is 0"
    net, gs = net_of(name), groups_of(name)
    p = plan(scores_of(name, 3), .4, scope, 'coupled', gs)
    if name == 'resnext':  # a grouped convolution keeps as many in each group
        for n, c in convs(net).items():
            for m in (n, n.replace('conv2', 'conv1')) if c.groups > 1 else (): p[m][:] = True; p[m].view(c.groups, -1)[:, 0] = False
    small = cut(net, p, strict=True)
    assert {n: c.out_channels for n, c in convs(small).items()} == {n: int(k.sum()) for n, k in p.items()}
    assert all(c.weight.flatten(1).abs().sum(1).min() > 0 for c in convs(small).values())

@pytest.mark.parametrize('seed', range(3))
def test_of_independent_plans_only_what_lives_in_both_is_left_inside_a_block(seed):
    net, gs, p = net_of('imagenet'), groups_of('imagenet'), random_plan('imagenet', seed, .5, 'independent')
    small, mods = convs(cut(net, p)), convs(net)
    hidden = [g for g in gs if any(mods[n].groups > 1 for n in g)]
    assert len(hidden) == 17
    for g in hidden: assert {small[n].out_channels for n in g} == {int(torch.stack([p[n] for n in g]).all(0).sum())}
    assert sum(len(g) for g in hidden) == 34

def test_dead_channels_are_those_that_do_not_move():
    "Numerically: behind its activation a hidden channel is dead if it, or its partner, is the same number at all positions of all images"
    net, p = copy.deepcopy(net_of('mobilenet')), random_plan('mobilenet', 5, .5, 'independent')
    block, gone, seen = net.features[3].conv, dead(net, p), []
    for i in (0, 1): block[i].register_forward_hook(lambda m, x, out: seen.append(out))
    with torch.no_grad(), silenced(net, p): seen.clear(); net(torch.randn(16, 3, 32, 32).double()*3)  # whoever watches has seen the proof
    still = [o.flatten(2).transpose(0, 1).flatten(1).std(1) < 1e-12 for o in seen]
    a, b = gone['features.3.conv.0.0'], gone['features.3.conv.1.0']
    assert a.equal(b) and a.equal(~p['features.3.conv.0.0'] | ~p['features.3.conv.1.0']) and not (a & ~still[0] & ~still[1]).any() and not a.all()

@pytest.mark.parametrize('name', ['preact', 'densenet'])
def test_batch_norms_that_are_not_right_behind_are_silenced_where_all_is_silent(name):
    "Behind a sum or a concatenation: what reaches the next convolution is 0 in the channels of which every source is silent"
    net, p = copy.deepcopy(net_of(name)), plan(scores_of(name, 1), .5, 'local', 'coupled', groups_of(name))
    reads = {}
    layer = net.c3 if name == 'preact' else net.features.denseblock1.denselayer2.conv1
    layer.register_forward_pre_hook(lambda m, x: reads.update(x=x[0]))
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad(): silence(net, p)(x)
    stays = torch.cat([p['stem'], p['c1']]) if name == 'preact' else torch.cat([p['features.conv0'], p['features.denseblock1.denselayer1.conv2']])
    assert reads['x'][:, ~stays].eq(0).all() and reads['x'][:, stays].abs().amax((0, 2, 3)).min() > 0

def test_batch_norm_left_alive_puts_out_its_constant():
    net, p = net_of('vgg_bn'), random_plan('vgg_bn', 1, .5, 'independent')
    out, bn, gone = {}, net[0][1], ~p['0.0']
    hook = bn.register_forward_hook(lambda m, x, y: out.update(y=y.clone()))
    with torch.no_grad(), silenced(net, p, 'alive'): net(torch.randn(2, 3, 32, 32).double())
    hook.remove()
    want = bn.bias - bn.weight*bn.running_mean/(bn.running_var+bn.eps).sqrt()
    assert_close(out['y'][:, gone], want[gone].detach()[:, None, None].expand_as(out['y'][:, gone]))
    assert want[gone].abs().min() > 0

@pytest.mark.parametrize('norm', NORMS)
def test_silenced_gives_back_running_means_too(norm):
    net = copy.deepcopy(net_of('preact')); before = snapshot(net)
    with silenced(net, plan(scores_of('preact', 1), .5, 'local', 'coupled', groups_of('preact')), norm): assert not same(net.state_dict(), before)
    assert same(net.state_dict(), before)

def test_a_cut_network_keeps_what_is_not_a_number():
    "channels_last, hooks, training mode of the original, keys and their order, and nothing of the original's memory"
    net = copy.deepcopy(net_of('squeeze')).float().to(memory_format=torch.channels_last)
    small = cut(net, random_plan('squeeze', 0, .5, 'coupled'))
    assert list(small.state_dict()) == list(net.state_dict()) and small.act.num_parameters == len(small.act.weight) < 8
    assert small.stem[0].weight.is_contiguous(memory_format=torch.channels_last) and not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())
    assert not {q.data_ptr() for q in small.parameters()} & {q.data_ptr() for q in net.parameters()}

def test_retraining_a_folded_network_is_retraining_the_silenced_one():
    "In training mode batch normalisation takes a constant out: the cut network puts out what the silenced one does, and gets its gradients"
    net, x, y = copy.deepcopy(net_of('mobilenet')), torch.randn(8, 3, 32, 32).double(), torch.arange(8) % 4
    p = random_plan('mobilenet', 3, .4, 'independent')
    small = cut(net, p)
    silence(net, p)
    for m in (small, net):
        m.train()
        for d in m.modules():
            if isinstance(d, nn.Dropout): d.eval()
    outs = [m(x) for m in (small, net)]
    gone = dead(net, p)
    assert gone['features.2.conv.0.0'].sum() > (~p['features.2.conv.0.0']).sum()
    a, b = (torch.autograd.grad(F.cross_entropy(o, y), m.features[2].conv[2].weight)[0] for o, m in zip(outs, (small, net)))
    assert_close(outs[0], outs[1], rtol=1e-9, atol=1e-9)
    assert_close(a, b[~gone['features.2.conv.2']][:, ~gone['features.2.conv.0.0']], rtol=1e-7, atol=1e-9)

BIG = ['vgg16', 'vgg19', 'vgg16_bn', 'vgg19_bn', 'resnet18', 'resnet50', 'mobilenet_v2']

@pytest.mark.slow
@pytest.mark.parametrize('name,stem', [(n, s) for n in BIG for s in ('imagenet', 'cifar')])
def test_the_law_on_the_networks_of_the_study(name, stem):
    if stem == 'cifar' and MODELS[name][1] is None: pytest.skip(f'{name} has no stem for small images')
    net, x = restless(build(name, 10, stem)).float(), torch.randn(2, 3, 32, 32)
    gs, s = groups(net), {n: torch.rand(c.out_channels) for n, c in convs(net).items()}
    for scope, coupling, norm, ratio in (('local', 'coupled', 'silent', .5), ('global', 'coupled', 'silent', .3), ('local', 'independent', 'silent', .4), ('global', 'independent', 'alive', .3)):
        p = plan(s, ratio, scope, coupling, gs)
        small = cut(net, p, norm=norm, strict=coupling == 'coupled')
        with torch.no_grad(), silenced(net, p, norm): want = net(x)
        with torch.no_grad(): have = small(x)
        assert (have-want).abs().max() <= 1e-5*want.abs().max(), (scope, coupling)
        assert costing(net, norm=norm)(p) == cost(small)[['params', 'macs']].sum().to_dict() and plan_macs(net, p, norm=norm) == cost(small).macs.sum()

# --- groups of one's own networks ---

def test_groups_of_concatenations():
    assert groups_of('inception') == [
        ('a.0', 'deep.0[0:6]'), ('b', 'deep.0[6:10]'), *((f'two[{i}:{i+5}]',) for i in (0, 5, 10, 15)), *((f'grouped.0[{i}:{i+3}]',) for i in (0, 3, 6, 9)), ('point',)]  # four parts

    p = plan(scores_of('inception', 0), .5, coupling='coupled', groups=groups_of('inception'))
    assert p['deep.0'].equal(torch.cat([p['a.0'], p['b']])) and p['deep.0'].sum() == 5
    assert alive_in_both(net_of('inception'), p, groups_of('inception')[:2]) == .5

def test_an_all_convolutional_network_keeps_its_classes():
    net = net_of('allconv')
    assert classifier(net) == ('head',) and groups_of('allconv') == [('body.0.0', 'body.1.0'), ('body.2.0',)]
    for coupling in COUPLINGS:
        p = plan(scores_of('allconv', 0), .5, coupling=coupling, groups=groups_of('allconv'))
        assert p['head'].all() and p['body.2.0'].sum() == 3 and cut(net, p)(torch.zeros(1, 3, 32, 32).double()).shape == (1, 4)
    with pytest.raises(ValueError, match=says("the plan removes filters of 'head', whose channels are the classes")): cut(net, plan(scores_of('allconv', 0), .5))
    assert classifier(net_of('imagenet')) == ()

def test_the_picture_of_the_groups_has_them_all():
    rows = groups_chart(build()).to_dict()
    data = next(iter(rows['datasets'].values()))
    assert len({r['group'] for r in data}) == 25 and len(data) == 52
    assert sum(r['tie'] == 'with its depthwise' for r in data) == 34 and [r['convolution'] for r in data if r['tie'] == 'by itself'][-1] == 'features.18.0'

class Loops(nn.Module):
    def __init__(self): super().__init__(); self.c = nn.Conv2d(3, 3, 1)
    def forward(self, x):
        while x.abs().max() > 1: x = self.c(x)/2
        return x

@pytest.mark.parametrize('use', [groups, lambda n: silence(n, {'c': torch.tensor([True, True, False])}), lambda n: cut(n, {'c': torch.tensor([True, True, False])})], ids=['groups', 'silence', 'cut'])
def test_networks_that_can_not_be_traced_are_refused_with_the_line(use):
    with pytest.raises(ValueError, match=says('the graph of Loops cannot be read at test_pruning.py:', 'while x.abs().max() > 1: x = self.c(x)/2')): use(Loops())

# --- scopes, floors, protection ---

def by_sorting(scores, ratio, normalise, floor, protect):
    "Global pruning of independent layers, filter by filter"
    norm = {n: NORMALISATIONS[normalise](s.double()).numpy() for n, s in scores.items()}
    left, gone = {n: len(s) for n, s in norm.items()}, {n: [] for n in norm}
    order = sorted(((v, -i, -j, n) for i, (n, s) in enumerate(norm.items()) for j, v in enumerate(s)))
    for v, _, j, n in order:
        if sum(map(len, gone.values())) == round(ratio*sum(len(s) for s in norm.values())): break
        if n not in protect and left[n] > min(floor, len(norm[n])): gone[n].append(-j); left[n] -= 1
    return {n: [j not in gone[n] for j in range(len(s))] for n, s in norm.items()}

@given(st.data())
@settings(max_examples=150, deadline=None)
def test_global_plans_are_those_of_one_sorted_list(data):
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    s = {f'l{i}': torch.tensor(data.draw(st.lists(st.floats(0, 10, width=16), min_size=o, max_size=o))) for i, o in enumerate(sizes)}
    ratio, normalise, floor = data.draw(st.floats(0, .95)), data.draw(st.sampled_from([*NORMALISATIONS])), data.draw(st.integers(0, 4))
    protect = data.draw(st.lists(st.sampled_from([*s]), unique=True, max_size=2))
    target, free = round(ratio*sum(sizes)), sum(max(0, o-floor) for o, n in zip(sizes, s) if n not in protect)
    if target > free:
        with pytest.raises(ValueError, match='floors and protected layers keep'): plan(s, ratio, 'global', normalise=normalise, floor=floor, protect=protect)
        return
    p = plan(s, ratio, 'global', normalise=normalise, floor=floor, protect=protect)
    assert {n: k.tolist() for n, k in p.items()} == by_sorting(s, ratio, normalise, floor, protect)
    assert vanished(p) == [n for n, k in p.items() if not k.any()] and (floor == 0 or not vanished(p))

@given(st.data())
@settings(max_examples=60, deadline=None)
def test_floors_protection_and_rounding_hold_in_every_mode(data):
    name = data.draw(st.sampled_from(['twins', 'inception', 'resnext', 'mobilenet']))
    gs, s = groups_of(name), scores_of(name, data.draw(st.integers(0, 99)))
    scope, coupling, k = data.draw(st.sampled_from([*SCOPES])), data.draw(st.sampled_from(COUPLINGS)), data.draw(st.sampled_from([1, 2, 4, 8]))
    floor, ratio, reduce = data.draw(st.sampled_from([1, 2, 3, .25, .5])), data.draw(st.floats(0, .6)), data.draw(st.sampled_from([*REDUCTIONS]))
    protect = data.draw(st.sampled_from([(), [next(iter(s))], [next(iter(s))[:-1] + '*'], ['*']]))
    how = dict(scope=scope, coupling=coupling, groups=gs, floor=floor, reduce=reduce, normalise=data.draw(st.sampled_from([*NORMALISATIONS])), protect=protect)
    try: bare, p = plan(s, ratio, **how), plan(s, ratio, round_to=k, **how)
    except ValueError as e: assert 'floor' in str(e) or 'without a filter' in str(e); return
    for n, keep in p.items():
        o, was = len(keep), int(bare[n].sum())
        if coupling == 'independent': assert keep.sum() == min(o, -(-was//k)*k) and keep.sum() >= min(o, math.ceil(floor*o) if isinstance(floor, float) else floor)
        assert not (bare[n] & ~keep).any() and (keep.all() or protect != ['*'])
    if protect: assert p[next(iter(s))].all()
    if coupling == 'coupled':
        from xprune_nb.pruning import _of
        for g in gs: assert all(_of(p, m).equal(_of(p, g[0])) for m in g) and _of(p, g[0]).sum() == min(len(_of(p, g[0])), -(-int(_of(bare, g[0]).sum())//k)*k)
    if not protect and scope == 'global': assert 0 <= round(ratio*sum(map(len, s.values()))) - sum(int((~b).sum()) for b in bare.values()) < max(len(g) for g in gs)

@pytest.mark.parametrize('scope', SCOPES)
@pytest.mark.parametrize('coupling', COUPLINGS)
def test_steps_are_nested_in_either_scope(scope, coupling):
    gs, p = groups_of('mobilenet'), None
    for i, r in enumerate(gradual(.6, 4)):
        new = plan(scores_of('mobilenet', i), r, scope, coupling, gs, within=p)
        assert p is None or (all(not (new[n] & ~p[n]).any() for n in new) and kept(new) < kept(p))
        p = new
    assert kept(p) == pytest.approx(.4, abs=.03)
    with pytest.raises(ValueError, match='than the earlier plan has removed|is to remove'):
        q = plan(scores_of('mobilenet', 9), .1, scope, coupling, gs, within=p)
        assert kept(q) > .8

@pytest.mark.parametrize('normalise', [n for n in NORMALISATIONS if n != 'none'])
def test_depth_does_not_decide_in_the_global_scope(normalise):
    "Layers whose scores are on other scales: the plan is the same"
    s = scores_of('mobilenet', 1)
    grown = {n: v*10.**(i % 7 - 3) for i, (n, v) in enumerate(s.items())}
    assert same(plan(grown, .5, 'global', normalise=normalise), plan(s, .5, 'global', normalise=normalise))
    assert vanished(plan(grown, .5, 'global', normalise='none', floor=0)) and not vanished(plan(grown, .5, 'global', normalise='none'))

# --- equal cost, and the control of the confound ---

@pytest.mark.parametrize('coupling', COUPLINGS)
@pytest.mark.parametrize('want', [.8, .15])
def test_ratio_for_a_share_of_macs(coupling, want):
    net, s, gs = net_of('imagenet'), scores_of('imagenet', 4), groups_of('imagenet')
    r = ratio_for(net, s, want, coupling=coupling, groups=gs)
    full, at = cost(net).macs.sum(), lambda r: cost(cut(net, plan(s, r, coupling=coupling, groups=gs))).macs.sum()
    assert at(r)/full == pytest.approx(want, abs=.02) and at(max(0, r-.03)) > at(r) > at(r+.03)

@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_plans_with_the_same_agreement(data):
    m, o = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    p = {f'l{i}': torch.rand(o, generator=g) < data.draw(st.floats(.1, .9)) for i in range(m)}
    q = random_alive_as(p, [tuple(p)], data.draw(st.integers(0, 99)))
    assert {n: int(k.sum()) for n, k in p.items()} == {n: int(k.sum()) for n, k in q.items()}
    assert torch.stack([*p.values()]).all(0).sum() == torch.stack([*q.values()]).all(0).sum()

def test_random_plans_are_random():
    "Each channel is alive in both as often as any other: 30 of 96, over 400 draws"
    p = {n: torch.zeros(96, dtype=torch.bool) for n in 'ab'}
    p['a'][:48], p['b'][18:66] = True, True
    draws = [random_alive_as(p, [('a', 'b')], i) for i in range(400)]
    for often in (torch.stack([q['a'] & q['b'] for q in draws]).double().mean(0) - 30/96, torch.stack([q['a'] for q in draws]).double().mean(0) - .5):
        assert often.abs().max() < 5*(.25/400)**.5 and often.std() == pytest.approx((.25/400)**.5, rel=.25)
    assert same(draws[3], random_alive_as(p, [('a', 'b')], 3))

# --- unstructured masks ---

@pytest.mark.parametrize('scope', SCOPES)
@pytest.mark.parametrize('ratio', [0, .2, .5, .93])
def test_masks_are_those_of_torch(scope, ratio):
    net = build(seed=2).double()
    have = masks(net, ratio, scope)
    quiet = mask(copy.deepcopy(net), have)
    if scope == 'global': prune.global_unstructured([(c, 'weight') for c in convs(net).values()], prune.L1Unstructured, amount=ratio)
    else: [prune.l1_unstructured(c, 'weight', ratio) for c in convs(net).values()]
    for n, c in convs(net).items(): assert have[n].equal(c.weight_mask.bool()) and convs(quiet)[n].weight.equal(c.weight), n
    assert cost(quiet).macs.sum() == cost(build()).macs.sum()

def test_masks_of_another_network_change_nothing():
    net = build(); before = snapshot(net)
    with pytest.raises(ValueError, match=says("the masks are another network's: for 'features.0.0' they have nothing, expected (32, 3, 3, 3)")): mask(net, masks(net_of('twins'), .5) and {})
    with pytest.raises(ValueError, match="another network's: for 'stem' they have"): mask(net, masks(net_of('twins'), .5))
    assert same(net.state_dict(), before)

# --- what is asked for wrongly ---

A, FULL = {'a': torch.arange(5.)}, lambda name='twins': {n: torch.ones(c.out_channels, dtype=torch.bool) for n, c in convs(net_of(name)).items()}

@pytest.mark.parametrize('ask,message', [
    (dict(ratio=1), 'ratio is 1, expected a share of filters to remove in [0, 1)'), (dict(ratio=-.1), 'ratio is -0.1, expected'),
    (dict(ratio=math.nan), 'ratio is nan, expected'), (dict(ratio=math.inf), 'ratio is inf, expected'),
    (dict(ratio=.95), "ratio 0.95 would leave layer 'a' (5 filters) without a filter; the largest possible there is below 0.900"),
    (dict(scope='golbal'), "no scope called 'golbal'"), (dict(coupling='couple'), "no coupling called 'couple'; did you mean 'coupled'?"),
    (dict(coupling='coupled'), "coupling='coupled' needs groups=groups(model)"),
    (dict(coupling='coupled', groups=[('a', 'b')]), "the groups name 'b', of which there are no scores"),
    (dict(scores={'a': torch.tensor([1., -math.inf])}), "the scores of layer 'a' are not finite"), (dict(scores={'a': torch.ones(2, 2)}), "the scores of layer 'a' are not finite numbers, one a filter"),
    (dict(within={'a': torch.tensor([True, False, False, False, False])}), 'ratio 0.5 is less than the earlier plan has removed')], ids=str)
def test_plans_that_can_not_be_are_refused(ask, message):
    with pytest.raises(ValueError, match=says(message)): plan(**dict(dict(scores=A, ratio=.5), **ask))

@pytest.mark.parametrize('wrong,message', [
    (lambda p: {**p, 'c': p['a']}, "the plan names 'c', which is no convolution of this network. There are: stem, deep, a, b"),
    (lambda p: {n: k for n, k in p.items() if n != 'b'}, "the plan says nothing of layer 'b'"),
    (lambda p: {**p, 'a': p['a'][:3]}, "the plan for layer 'a' has shape (3,) and type torch.bool, expected (7,) and torch.bool"),
    (lambda p: {**p, 'a': p['a'].float()}, "the plan for layer 'a' has shape (7,) and type torch.float32"),
    (lambda p: {**p, 'a': ~p['a']}, "the plan leaves layer 'a' without a filter")], ids=range(5))
@pytest.mark.parametrize('use', [silence, cut, lambda net, p: silenced(net, p).__enter__(), lambda net, p: rewind(net, net.state_dict(), p)], ids=['silence', 'cut', 'silenced', 'rewind'])
def test_plans_of_other_networks_change_nothing(use, wrong, message):
    net = copy.deepcopy(net_of('twins')); before = snapshot(net)
    with pytest.raises(ValueError, match=says(message)): use(net, wrong(FULL()))
    assert same(net.state_dict(), before)

@pytest.mark.parametrize('steps', [0, -2])
def test_schedules_without_a_step(steps):
    with pytest.raises(ValueError, match=f'{steps} pruning steps asked for, expected at least 1'): shares(.5, steps)

def test_the_chart_counts_the_plan():
    p = random_plan('twins', 0, .4, 'independent')
    rows = plan_chart(p).data
    assert {(r.layer, r.what): r.filters for r in rows.itertuples()} == {(n, w): int((k if w == 'kept' else ~k).sum()) for n, k in p.items() for w in ('kept', 'removed')}

# --- ways in which a forward pass can hide what it does to a channel ---

conv = lambda i, o, k=3, **kw: nn.Conv2d(i, o, k, padding=k//2, **kw)
def odd(forward, shape=(3, 8, 8), **layers):
    "A small network of these layers and this forward pass, its own last layer being `end`"
    net = nn.Module()
    for n, m in layers.items(): setattr(net, n, m)
    kind = type('Odd', (nn.Module,), dict(forward=forward))
    net.__class__ = kind
    return restless(net)

def twice(s, x): y = F.relu(s.a(x)); return s.end(F.relu(s.b(torch.cat([y, y], 1))).mean((2, 3)))
def around(s, x): y, z = F.relu(s.a(x)), s.c(x); return s.end(F.relu(s.b(torch.cat([y, z, y], 1))).mean((2, 3)))
def viewed(s, x): y = s.n(s.a(x)); z = y.contiguous(); F.relu(y, inplace=True); return s.end(F.relu(s.b(z)).mean((2, 3)))
def viewed_after(s, x): y = s.n(s.a(x)); F.relu(y, inplace=True); return s.end(F.relu(s.b(y.contiguous())).mean((2, 3)))
def chunked(s, x): y = s.n(s.a(x)); u, v = y.chunk(2, 1); F.relu(u, inplace=True); return s.end(F.relu(s.b(y)).mean((2, 3)))
def weight_read(s, x): y = F.relu(s.a(x))*s.a.weight.abs().mean(); return s.end(F.relu(s.b(y)).mean((2, 3)))
def tied(s, x): y = F.relu(s.b(F.relu(s.a(x)))); return s.end(F.relu(F.conv2d(y, s.b.weight, padding=1)).mean((2, 3)))
def optional(s, x, skip=None, feats=False):
    y = F.relu(s.a(x))
    if skip is not None: y = y + skip
    return y if feats else s.end(F.relu(s.b(y)).mean((2, 3)))
ODD = dict(twice=lambda: odd(twice, a=conv(3, 8), b=conv(16, 6), end=nn.Linear(6, 4)), around=lambda: odd(around, a=conv(3, 8), c=conv(3, 4), b=conv(20, 6), end=nn.Linear(6, 4)),
           viewed=lambda: odd(viewed, a=conv(3, 8), n=nn.BatchNorm2d(8), b=conv(8, 6, 1), end=nn.Linear(6, 4)), viewed_after=lambda: odd(viewed_after, a=conv(3, 8), n=nn.BatchNorm2d(8), b=conv(8, 6, 1), end=nn.Linear(6, 4)),
           chunked=lambda: odd(chunked, a=conv(3, 8), n=nn.BatchNorm2d(8), b=conv(8, 6, 1, groups=2), end=nn.Linear(6, 4)), weight_read=lambda: odd(weight_read, a=conv(3, 8), b=conv(8, 6), end=nn.Linear(6, 4)),
           tied=lambda: odd(tied, a=conv(3, 8), b=conv(8, 8), end=nn.Linear(8, 4)), optional=lambda: odd(optional, a=conv(3, 8), b=conv(8, 6), end=nn.Linear(6, 4)))

@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('name', ODD)
def test_the_law_holds_where_a_forward_pass_hides_what_it_does(name, norm):
    net, x = ODD[name](), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        p = plan({n: torch.rand(c.out_channels, generator=g) for n, c in convs(net).items()}, (.3, .5, .7)[seed % 3])
        with torch.no_grad():
            small = cut(net, p, (3, 8, 8), norm)
            assert_close(small(x), silence(copy.deepcopy(net), p, norm)(x), rtol=1e-9, atol=1e-9)
    cuts = sum(q.numel() for q in net.parameters()) > sum(q.numel() for q in small.parameters())
    assert cuts or name not in ('twice', 'around', 'optional', 'viewed_after') # these are followed, the others left whole where it matters

@pytest.mark.parametrize('reduce', ['sum', 'mean'])
def test_the_size_of_a_group_does_not_decide_in_a_global_plan(reduce):
    "Scores by chance say nothing, so that about the ratio goes from groups of one, two, three and four members alike"
    net, gs, gone = net_of('imagenet'), groups_of('imagenet'), {}
    p = plan(scores_of('imagenet', 3), .5, 'global', 'coupled', gs, reduce=reduce)
    for g in gs: gone.setdefault(len(g), []).append((~p[g[0]]).double())
    shares = {k: torch.cat(v).mean().item() for k, v in gone.items()}
    assert len(shares) == 4 and all(abs(s - .5) < .09 for s in shares.values()), shares

def test_channels_tied_to_the_classes_stay_when_the_rest_of_their_layer_is_in_a_group():
    def forward(s, x): a, b = s.a(x), s.b(x); y = torch.cat([a, b], 1) + s.c(x); return a.mean((2, 3)), s.d(y).mean((2, 3))
    net = odd(forward, a=conv(3, 8), b=conv(3, 8), c=conv(3, 16), d=conv(16, 6), end=nn.Linear(6, 4))
    gs = groups(net, (3, 8, 8)); assert ('b', 'c[8:16]') in gs
    scores = {n: torch.rand(c.out_channels, generator=torch.Generator().manual_seed(1)) for n, c in convs(net).items()}
    for scope in SCOPES:
        assert kept(plan(scores, 0., scope, 'coupled', gs)) == 1
        p = plan(scores, .25, scope, 'coupled', gs)
        assert p['a'].all() and p['c'][:8].all() and p['b'].equal(p['c'][8:]) and not p['b'].all()

def test_what_another_network_or_an_earlier_plan_says_is_refused():
    scores = {n: torch.arange(8.) for n in 'abc'}
    whole = {n: torch.ones(8, dtype=torch.bool) for n in 'abc'}
    with pytest.raises(ValueError, match=says("says of 4 filters of layer 'b' whether they stay, and there are 8 scores")): plan(scores, .5, within=dict(whole, b=whole['b'][:4]))
    apart = dict(whole, a=torch.arange(8) > 0)
    with pytest.raises(ValueError, match=says("the earlier plan is not coupled: 'a' and 'b' share channels")): plan(scores, .5, coupling='coupled', groups=[('a', 'b')], within=apart)
    with pytest.raises(ValueError, match=says("the groups are another network's: 'a' has 8 scores, 'd' has 5 scores")): plan(dict(scores, d=torch.rand(5)), .5, coupling='coupled', groups=[('a', 'd')])
    with pytest.raises(ValueError, match=says("the groups name 'x', of which the plan says nothing. There are: a, b, c")): random_alive_as(whole, [('a', 'x')], 0)
    with pytest.raises(ValueError, match=says('there are no scores')): plan({}, .5, 'global')
    for bad in dict(floor=math.nan), dict(round_to=2.5): 
        with pytest.raises(ValueError, match=says('expected a number of filters or a share')): plan(scores, .5, **bad)
    assert same(plan(scores, .5, floor=np.int64(2)), plan(scores, .5, floor=2)) and kept(plan(scores, .5, coupling='coupled', groups=[])) == 1

def test_a_weight_that_is_worked_out_from_others_is_refused():
    net = restless(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4*16, 2)))
    p = plan({n: torch.rand(c.out_channels) for n, c in convs(net).items()}, .5)
    prune.random_unstructured(net[0], 'weight', .5)
    with pytest.raises(ValueError, match=says("the weight of '0' is worked out from others", 'torch.nn.utils.prune.remove')): silence(net, p)
    prune.remove(net[0], 'weight')
    assert dict(cut(net, p, (3, 8, 8)).named_modules())['0'].out_channels == 4

def test_a_shape_or_an_operation_that_cannot_be_followed_is_named_and_nothing_stays_on_the_network():
    net = restless(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8*36, 2)))
    for f in groups, lambda n, shape: cut(n, plan({'0': torch.rand(8)}, .5), shape):
        with pytest.raises(ValueError, match=says('Sequential does not take an image of shape (1, 8, 8)')): f(net, (1, 8, 8))
    assert not any(m._forward_hooks for m in net.modules()) and all(q.requires_grad for q in net.parameters())

def test_a_ratio_for_the_macs_goes_on_from_an_earlier_plan():
    net, scores = net_of('twins'), scores_of('twins', 0)
    first = plan(scores, .3, coupling='coupled', groups=groups_of('twins'))
    how = dict(within=first, coupling='coupled', groups=groups_of('twins'))
    ratio = ratio_for(net, scores, .3, **how)
    assert ratio > .3 and abs(plan_macs(net, plan(scores, ratio, **how))/cost(net).macs.sum() - .3) < .06
