"""Groups, plans, silence and cuts: against torch.nn.utils.prune, Torch-Pruning and torch.fx, and by random plans on networks whose signals do not die out."""
import copy, math, re
from functools import cache

import numpy as np
import pytest
import torch
import torch_pruning
import torchvision
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close

from xprune_nb.criteria import magnitude
from xprune_nb.model import baseline, build, convs, cost
from xprune_nb.pruning import COUPLINGS, agreed, alive_in_both, cut, groups, kept, plan, plan_chart, rewind, shares, silence, silenced, silencer

says = lambda *parts: '.*'.join(map(re.escape, parts))
same = lambda a, b: a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
snapshot = lambda net: {k: v.clone() for k, v in net.state_dict().items()}

def restless(net):
    "Batch norms far from the identity, so that a channel that is not silent behind them shows"
    torch.manual_seed(5)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, lo, hi in (m.running_mean, -.3, .3), (m.running_var, .3, 1.5), (m.weight, .7, 1.5), (m.bias, -.3, .3): nn.init.uniform_(t, lo, hi)
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
def net_of(name): return restless(NETS[name]()) if name != 'trained' else NETS[name]().double()
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

@given(st.floats(0, .98), st.integers(1, 6), st.sampled_from(['geometric', 'linear']))
@settings(max_examples=200, deadline=None)
def test_shares_lead_to_the_ratio_in_like_steps(ratio, steps, share):
    r = shares(ratio, steps, share)
    assert len(r) == steps and r[-1] == ratio
    path = np.array([0, *r])
    parts = np.diff(path)/(1-path[:-1]) if share == 'geometric' else np.diff(path)
    np.testing.assert_allclose(parts, parts.mean(), rtol=0, atol=1e-9)

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

def law(name, p, shape=(3, 32, 32)):
    net, x = net_of(name), torch.randn(3, *shape).double()
    small = cut(net, p, shape)
    with torch.no_grad(), silenced(net, p): want = net(x)
    with torch.no_grad(): have = small(x)
    assert want.std() > 0 and have.dtype == torch.float64
    assert_close(have, want, rtol=1e-9, atol=1e-9)
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
    small, stays = cut(net, p), dict(zip(gs, (int(a.sum()) for a in agreed(p, gs))))
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
