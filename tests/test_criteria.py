"""Attributions against other libraries (captum, zennit), against numbers without autograd, and under every kind of mistreatment."""
import re
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
import zennit.canonizers as zc
from captum.attr import LRP, LayerConductance
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import nn
from torch.testing import assert_close
from torchvision import models
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import Conv2dNormActivation
from zennit.attribution import Gradient
from zennit.composites import LayerMapComposite
from zennit.layer import Sum as ZennitSum
from zennit.rules import Epsilon, Norm, Pass
from zennit.torchvision import ResNetCanonizer
from zennit.types import Activation, AvgPool, Convolution, Linear

from xprune_nb.criteria import (AGGREGATIONS, ATTRIBUTIONS, CRITERIA, RULES, aggregated, attributions, check_criterion, check_scores, completeness, conductance,
                                conservation, cuts, folded, frozen, lrp, outputs_of, relevance_net, score, sweep, traced)
from xprune_nb.data import load, sample
from xprune_nb.model import baseline, convs

EXPLAIN = tuple(ATTRIBUTIONS)
NEAR = {torch.float32: 1e-5, torch.float64: 1e-10}

def restless(net):
    "Batch norms far from the identity, so that forgetting one shows"
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, lo, hi in (m.running_mean, -.3, .3), (m.running_var, .3, 1.5), (m.weight, .7, 1.5), (m.bias, -.3, .3): nn.init.uniform_(t, lo, hi)
    return net.eval()

def sequential():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(inplace=True),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)).eval()

def small():
    "A MobileNetV2 with one block"
    cna = lambda i, o, k, s=1: Conv2dNormActivation(i, o, k, s, activation_layer=nn.ReLU6)
    return restless(nn.Sequential(cna(3, 6, 3, 2), InvertedResidual(6, 6, 1, 2), cna(6, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)))

def images(n=3, size=16, classes=4, dtype=torch.float64): return torch.randn(n, 3, size, size, dtype=dtype), torch.arange(n) % classes

def mobile(n, dtype=torch.float64):
    "The embedded baseline, with images of its own kind: a network whose signals do not die out"
    x, y = sample(load(), n)
    return baseline().net().to(dtype), x.to(dtype), y

def close(ours, theirs, near):
    "Within `near` of the largest value of the layer"
    for n, a in ours.items(): assert (a - theirs[n]).abs().max() <= near*theirs[n].abs().max(), n

# --- conductance ---

@pytest.mark.parametrize('dtype', NEAR)
@pytest.mark.parametrize('rule,method', [('captum', 'gausslegendre'), ('left', 'riemann_trapezoid')])
@pytest.mark.parametrize('make', [sequential, small])
def test_conductance_is_captums(make, rule, method, dtype):
    net, (x, y) = make().to(dtype), images(dtype=dtype)
    start = torch.randn(1, 3, 16, 16, dtype=dtype)
    for m in net.modules():
        if isinstance(m, (nn.ReLU, nn.ReLU6)): m.inplace = False  # captum's hooks keep what an activation then overwrites
    theirs = {n: LayerConductance(net, m).attribute(x, start, target=y, n_steps=7, method=method).detach() for n, m in convs(net).items()}
    near = 1e-5 if method == 'riemann_trapezoid' else NEAR[dtype]  # captum's even points are float32 numbers
    close(attributions('conductance', net, x, y, steps=7, rule=rule, baseline=start), theirs, near)

@pytest.mark.parametrize('dtype', NEAR)
def test_conductance_is_captums_on_mobilenet(dtype):
    net, x, y = mobile(2, dtype)
    ours = attributions('conductance', net, x, y, steps=4, rule='captum')
    names = ['features.0.0', 'features.2.conv.1.0', 'features.5.conv.0.0', 'features.12.conv.2', 'features.18.0']
    theirs = {n: LayerConductance(net, convs(net)[n]).attribute(x, target=y, n_steps=4).detach() for n in names}
    close({n: ours[n] for n in names}, theirs, NEAR[dtype])

def test_conductance_of_a_smooth_network_by_central_differences():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Softplus(), nn.Flatten(), nn.Linear(20, 2)).double().eval()
    x, (name, unit) = images(1, 6)[0], ('2', (3, 1, 0))
    @torch.no_grad()
    def unit_at(t):
        with outputs_of(convs(net)) as acts: net(t*x)
        return acts[name][(0, *unit)].item()
    @torch.no_grad()
    def logit(t, nudge):
        def push(module, inputs, out): out = out.clone(); out[(0, *unit)] += nudge; return out
        hook = convs(net)[name].register_forward_hook(push)
        try: return net(t*x)[0, 1].item()
        finally: hook.remove()
    h, ts = 1e-4, (np.arange(200) + .5)/200
    want = np.mean([(logit(t, h) - logit(t, -h))/(2*h) * (unit_at(t+h) - unit_at(t-h))/(2*h) for t in ts])
    assert attributions('conductance', net, x, target=1, steps=200)[name][(0, *unit)].item() == pytest.approx(want, rel=1e-4)

@pytest.mark.parametrize('rule', RULES)
def test_conductance_is_complete_in_the_limit(rule):
    net, (x, y) = small().double(), images()
    coarse, fine = (completeness(net, x, y, baseline=torch.ones(1).double(), steps=s, rule=rule) for s in (10, 1000))
    assert fine.gap.max() < 0.01*fine.change.abs().max() and fine.gap.max() < coarse.gap.max()/10
    assert fine.cuts.tolist() == [True, False, False, False, True] and fine.gap.isna().tolist() == [False, True, True, True, False]

def test_flow_through_shared_channels_is_the_same():
    "Expanding and depthwise convolution are joined channel by channel: what flows through one flows through the other"
    net, (x, y) = small().double(), images()
    s = conductance(net, x, y, steps=2000, aggregate='signed')
    assert_close(s['1.conv.0.0'], s['1.conv.1.0'], rtol=0, atol=2e-3*s['1.conv.0.0'].abs().max().item())

# --- lrp ---

class MobileCanonizer(zc.AttributeCanonizer):
    "zennit's way to make the sum of a shortcut a layer"
    def __init__(self): super().__init__(lambda name, m: dict(forward=self.forward.__get__(m), canonizer_sum=ZennitSum()) if isinstance(m, InvertedResidual) else None)
    @staticmethod
    def forward(self, x): return self.canonizer_sum(torch.stack([x, self.conv(x)], -1)) if self.use_res_connect else self.conv(x)

class Pooled(nn.Module):
    "MobileNetV2's average pooling as a layer, for zennit's sake"
    def __init__(self, net): super().__init__(); self.features, self.pool, self.classifier = net.features, nn.AdaptiveAvgPool2d(1), net.classifier
    def forward(self, x): return self.classifier(self.pool(self.features(x)).flatten(1))

def zennit_says(net, canonizers, x, y, epsilon):
    "Relevance at the output of each convolution"
    norm = Norm(epsilon)
    composite = LayerMapComposite([(Activation, Pass()), (ZennitSum, norm), (AvgPool, norm), (Convolution, Epsilon(epsilon)), (Linear, Epsilon(epsilon))], canonizers=canonizers)
    kept, hooks = {}, []
    def keep(name):
        def hook(module, inputs, out): kept[name] = out; out.retain_grad()
        return hook
    with Gradient(net, composite) as attributor:
        try:
            for n, m in convs(net).items(): hooks.append(m.register_forward_hook(keep(n)))
            attributor(x, lambda out: torch.zeros_like(out).scatter(1, y[:, None], out.gather(1, y[:, None])))
        finally:
            for h in hooks: h.remove()
    return {n: a.grad for n, a in kept.items()}

def vgg(bn): return restless(nn.Sequential(models.vgg.make_layers(models.vgg.cfgs['A'], bn), nn.Flatten(), nn.Linear(512, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4)))

NETWORKS = dict(
    sequential=(sequential, []),
    vgg11=(lambda: vgg(False), []),
    vgg11_bn=(lambda: vgg(True), [zc.SequentialMergeBatchNorm()]),
    resnet18=(lambda: restless(models.resnet18(num_classes=4)), [ResNetCanonizer()]),
    mobilenet_v2=(lambda: Pooled(baseline().net()), [zc.SequentialMergeBatchNorm(), MobileCanonizer()]))

@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('epsilon', [1e-6, 0.1])
def test_lrp_is_zennits(name, epsilon):
    make, canonizers = NETWORKS[name]
    net, (x, y) = make().double().eval(), images(2, 32)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_var += m.eps; m.eps = 0  # the same function; what zennit leaves of a merged norm still divides by sqrt(1+eps)
    close(attributions('lrp', net, x, y, epsilon=epsilon), zennit_says(net, canonizers, x, y, epsilon), NEAR[torch.float64])

@pytest.mark.parametrize('name,near', [('sequential', 1e-5), ('mobilenet_v2', 1e-2)])
def test_lrp_in_single_precision(name, near):
    "A unit within rounding of ReLU's kink may switch, and then what flows below it differs: a little, on a deep network"
    make, canonizers = NETWORKS[name]
    net, (x, y) = make().eval(), images(2, 32, dtype=torch.float32)
    if near < 1e-3: close(attributions('lrp', net, x, y), zennit_says(net, canonizers, x, y, 1e-6), near)
    single, double = attributions('lrp', net, x, y), attributions('lrp', net.double(), x.double(), y)
    for n, a in double.items(): assert (single[n] - a).abs().sum() <= near*a.abs().sum(), n

def test_lrp_is_captums():
    "At the input, where captum puts all of it together"
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.body, self.head = sequential()[:6], sequential()[7:]
        def forward(self, x): return self.head(self.body(x).flatten(1))  # captum has no rule for nn.Flatten
    net, (x, y) = Net().double().eval(), images()
    for m in net.modules():
        if isinstance(m, nn.ReLU): m.inplace = False
        elif not list(m.children()): m.rule = EpsilonRule(1e-15 if isinstance(m, nn.MaxPool2d) else 1e-3)  # to captum, the winner of a maximum is a sum, too
    at, twin = x.clone().requires_grad_(), relevance_net(net, 1e-3)
    ours = x*torch.autograd.grad(twin(at).gather(1, y[:, None]).sum(), at)[0]
    close({'input': ours}, {'input': LRP(net).attribute(at, target=y).detach()}, 1e-10)

def test_lrp_without_epsilon_is_gradient_times_activation_on_relu():
    net, (x, y) = sequential().double(), images()
    plain = {n: a*g for n, (a, g) in sweep(net, convs(net), x, y).items()}
    close(attributions('lrp', net, x, y, epsilon=0), plain, 1e-10)
    close(attributions('lrp', net, x, y, epsilon=1e-12), plain, 1e-8)
    six = small().double()
    gradient = {n: a*g for n, (a, g) in sweep(six, convs(six), 4*x, y).items()}
    assert not torch.allclose(attributions('lrp', six, 4*x, y, epsilon=0)['0.0'], gradient['0.0'])

def test_lrp_through_a_shortcut_and_an_average_by_hand():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.out = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1, bias=False), nn.Linear(1, 1)
        def forward(self, x):
            x = self.a(x)
            x += self.b(x)
            return self.out(x.mean((2, 3)))
    net = Net().double().eval()
    for p, v in zip(net.parameters(), (1., 1., 2., 3., 5.)): p.data.fill_(v)
    x = torch.tensor([[[[1., 3.]]]]).double()
    # a = (2, 4); b = (4, 8); sum = (6, 12); mean 9; logit 3*9+5 = 32. The mean gets 27 of it, its parts 27*(6, 12)/18 = (9, 18), b two thirds: (6, 12), a all: (9, 18)
    maps = attributions('lrp', net, x, target=0, epsilon=0)
    assert_close(maps['b'].flatten().tolist(), [6., 12.]); assert_close(maps['a'].flatten().tolist(), [9., 18.])
    table = conservation(net, x, target=0, epsilon=0)
    assert table.bias['out'] == pytest.approx(5) and table.bias['a'] == pytest.approx(9/2 + 18/4) and table.gap.max() < 1e-12

@pytest.mark.parametrize('make', [small, lambda: restless(models.mobilenet_v2(num_classes=4)), lambda: restless(models.resnet18(num_classes=4))])
def test_folding_and_rewriting_keep_the_output(make):
    net, (x, _) = make().double(), images(2, 32)
    for twin in folded(net), relevance_net(net):
        assert not any(isinstance(m, nn.BatchNorm2d) for m in twin.modules())
        assert_close(twin(x), net(x), rtol=1e-9, atol=1e-9)

def test_lrp_is_conserved_on_mobilenet():
    net, x, y = mobile(4)
    table = conservation(net, x, y, epsilon=1e-3)
    assert table.gap.max() < 1e-10 and len(table) == 52 + 10 + 1 + 1  # convolutions, shortcuts, average, classifier
    assert table.cuts.sum() == 22 + 10 + 1 + 1  # stem, 2 + 6*3 in blocks without a shortcut, head: by the table of the paper
    maps = attributions('lrp', net, x, y, epsilon=1e-3)
    for n, m in maps.items(): assert m.sum().item()/4 == pytest.approx(table.relevance[n], rel=1e-9, abs=1e-12)

# --- laws ---

@pytest.mark.parametrize('criterion', EXPLAIN)
@pytest.mark.parametrize('chunk', [1, 2, 3, 7, 30, 10**6])
def test_chunks_change_nothing(criterion, chunk):
    net, (x, y) = small().double(), images(5)
    whole = score(criterion, net, x, y, steps=9)
    assert_close(score(criterion, net, x, y, steps=9, chunk=chunk), whole, rtol=1e-10, atol=1e-12)
    parts = attributions(criterion, net, x, y, chunk=chunk)
    assert [len(m) for m in parts.values()] == [5]*5

@pytest.mark.parametrize('criterion', ['magnitude', *EXPLAIN])
def test_scores_follow_shuffled_filters(criterion):
    net, (x, y) = small().double(), images()
    order, before = torch.randperm(10), score(criterion, net, x, y)
    conv, norm, linear = net[2][0], net[2][1], net[-1]
    with torch.no_grad():
        for t in conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var: t.copy_(t[order].clone())
        linear.weight.copy_(linear.weight[:, order].clone())
    after = score(criterion, net, x, y)
    assert_close(after, {**before, '2.0': before['2.0'][order]})

@pytest.mark.parametrize('criterion', ['magnitude', *EXPLAIN])
@pytest.mark.parametrize('epsilon', [0, 1e-6])
def test_dead_filters_score_zero(criterion, epsilon):
    net, (x, y) = small().double(), images()
    conv, norm = net[2][0], net[2][1]
    with torch.no_grad():
        for t in conv.weight, norm.weight, norm.bias: t[3] = 0
    s = score(criterion, net, x, y, epsilon=epsilon)['2.0']
    assert s[3] == 0 and (s > 0).sum() >= 5

def test_lrp_and_conductance_of_a_linear_network_from_zero_agree():
    "One convolution, no biases, no activations: both are weight times input, and any path does"
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(64, 4, bias=False)).double().eval()
    x, y = images(3, 6)
    assert_close(attributions('lrp', net, x, y, epsilon=0), attributions('conductance', net, x, y, steps=1))

def test_aggregations_by_numpy():
    a = torch.randn(5, 3, 4, 2).double()
    v = a.numpy()
    want = dict(l1=abs(v).sum((2, 3)), l2=(v**2).sum((2, 3))**.5, max=abs(v).max((2, 3)), net=abs(v.sum((2, 3))), signed=v.sum((2, 3)))
    assert set(want) == set(AGGREGATIONS)
    for how in AGGREGATIONS: np.testing.assert_allclose(aggregated([{'c': a[:2]}, {'c': a[2:]}], how)['c'], want[how].mean(0))

def test_targets_and_baselines():
    net, (x, y) = small().double(), images(4)
    predicted = net(x).argmax(1)
    for c in EXPLAIN:
        assert_close(score(c, net, x, None, target='predicted'), score(c, net, x, predicted))
        assert_close(score(c, net, x, None, target=2), score(c, net, x, torch.full((4,), 2)))
    assert_close(conductance(net, x, y, baseline='mean'), conductance(net, x, y, baseline=torch.zeros(1).double()))
    black = x.amin((0, 2, 3)).view(3, 1, 1)
    assert_close(conductance(net, x, y, baseline='black'), conductance(net, x, y, baseline=black))
    assert not torch.allclose(conductance(net, x, y)['0.0'], conductance(net, x, y, baseline='black')['0.0'])
    assert all((s == 0).all() for s in conductance(net, x, y, baseline=x).values())  # a path of no length

def test_activations_in_place_are_not_seen():
    net, (x, y) = sequential().double(), images()
    before = {c: score(c, net, x, y) for c in EXPLAIN}
    for m in net:
        if isinstance(m, nn.ReLU): m.inplace = False
    for c in EXPLAIN: assert_close(score(c, net, x, y), before[c], rtol=0, atol=0)

def test_random_is_the_seeds():
    net = small()
    assert_close(score('random', net, None, None, seed=5), score('random', net, None, None, seed=5), rtol=0, atol=0)
    assert not torch.equal(score('random', net, None, None, seed=5)['0.0'], score('random', net, None, None, seed=6)['0.0'])
    torch.manual_seed(1); a = torch.rand(1)
    torch.manual_seed(1); score('random', net, None, None); assert torch.equal(a, torch.rand(1))  # the global generator is left alone

# --- the model is left as it was ---

@cache
def used():
    "A model that somebody is in the middle of using: some weights frozen, some with a gradient"
    net, (x, y) = small().double(), images(6)
    with torch.enable_grad(): net(x).sum().backward()
    net[0][0].weight.requires_grad_(False)
    return net, x, y

@pytest.mark.parametrize('criterion', CRITERIA)
@pytest.mark.parametrize('mode', [torch.no_grad, torch.enable_grad])
def test_model_is_left_as_it_was(criterion, mode):
    with mode(): check_criterion(CRITERIA[criterion], *used())

@contextmanager
def breaks_after(net, passes, error):
    "A convolution that fails in the midst of a later pass"
    conv, count = net[1].conv[2], iter(range(100))
    whole = type(conv).forward
    def forward(x):
        if next(count) >= passes: raise error
        return whole(conv, x)
    conv.forward = forward
    try: yield
    finally: del conv.forward

@pytest.mark.parametrize('passes', [1, 3])
@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('out of memory')])
def test_model_is_left_as_it_was_after_an_interruption(passes, error):
    net, x, y = used()
    def interrupted(model, x, y):
        with breaks_after(net, passes, error), pytest.raises(type(error)): conductance(model, x, y, chunk=11)
        return CRITERIA['magnitude'](model)
    check_criterion(interrupted, net, x, y)

def test_model_is_left_as_it_was_when_a_consumer_fails():
    net, x, y = used()
    def careless(model, x, y):
        for maps in ATTRIBUTIONS['conductance'](model, x, y, chunk=11): break  # and the generator is left hanging
        careless.maps = maps
        return CRITERIA['magnitude'](model)
    check_criterion(careless, net, x, y)

def test_frozen_gives_back_what_was():
    net, _, _ = used()
    before = [p.requires_grad for p in net.parameters()]
    with pytest.raises(KeyError), frozen(net):
        assert not any(p.requires_grad for p in net.parameters())
        raise KeyError
    assert [p.requires_grad for p in net.parameters()] == before and not all(before)

# --- what is asked for wrongly ---

def bad(**kw):
    x, y = images(4)
    return dict(dict(criterion='lrp', model=small().double(), x=x, y=y), **kw)

X, Y = images(4)
CONV = lambda **kw: nn.Conv2d(3, 4, 3, **kw)
head = lambda c=4: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 4)]

class Twice(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.out = nn.Conv2d(3, 3, 1), nn.Sequential(*head(3))
    def forward(self, x): return self.out(self.conv(self.conv(x)))

class Idle(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.idle, self.out = CONV(), CONV(), nn.Sequential(*head())
    def forward(self, x): return self.out(self.conv(x))

class Fork(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.out = CONV(), nn.Sequential(*head())
    def forward(self, x): return self.out(self.conv(x)) if x.mean() > 9 else self.out(self.conv(-x))

class Gate(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.out = CONV(), nn.Sequential(*head())
    def forward(self, x): x = self.conv(x); return self.out(x*x)

def d(net): return net.double().eval()
def nan(x, i): x = x.clone(); x[i, 0, 0, 0] = float('nan'); return x

@pytest.mark.parametrize('wrong,message', [
    (dict(criterion='lp'), "no criterion called 'lp'; did you mean 'lrp'? There are: random, magnitude, conductance, lrp"),
    (dict(epsilon=-1), 'epsilon is -1, expected at least 0'),
    (dict(epsilom=1), "no option called 'epsilom'; did you mean 'epsilon'?"),
    (dict(criterion='magnitude', stepz=1), "no option called 'stepz'; did you mean 'steps'?"),
    (dict(aggregate='l3'), "no aggregation called 'l3'"),
    (dict(criterion='conductance', rule='simpson'), "no path rule called 'simpson'"),
    (dict(criterion='conductance', steps=0), 'steps is 0, expected at least 1'),
    (dict(criterion='conductance', baseline='blak'), "no baseline called 'blak'; did you mean 'black'?"),
    (dict(criterion='conductance', baseline=torch.zeros(4, 1, 16, 15)), 'the baseline has shape (4, 1, 16, 15), which does not broadcast to (4, 3, 16, 16)'),
    (dict(chunk=0), 'chunk is 0, expected at least 1 image at a time'),
    (dict(model=small().double().train()), 'the model is in training mode…call model.eval() first'),
    (dict(model=nn.Sequential(nn.Flatten(), nn.Linear(768, 4)).double().eval()), 'Sequential has no 2-D convolution'),
    (dict(model=d(nn.Sequential(CONV()))), 'Sequential puts out (1, 4, 14, 14) for one image; expected (1, classes)'),
    (dict(x=(X*9).to(torch.uint8)), 'images are shape (4, 3, 16, 16), torch.uint8…expected …torch.float64…Data.normalise'),
    (dict(x=X.float()), 'torch.float32, on cpu; expected …torch.float64'),
    (dict(x=X.numpy()), 'images are ndarray; expected shape'),
    (dict(x=X[0]), 'images are shape (3, 16, 16)'),
    (dict(x=X[:0], y=Y[:0]), 'images are shape (0, 3, 16, 16)…with N > 0'),
    (dict(x=X[:, :1]), 'Sequential does not take images of shape (1, 16, 16): '),
    (dict(x=nan(X, 2)), '1 of 4 images hold NaN or infinity (first: image 2)'),
    (dict(y=Y[:3]), 'labels are shape (3,), torch.int64; expected shape (4,), torch.int64: one class number per image'),
    (dict(y=Y.float()), 'labels are shape …torch.float32; expected'),
    (dict(y=None), 'labels are NoneType; expected'),
    (dict(y=Y+2), 'target 4 is out of range: the model has 4 classes, 0 to 3'),
    (dict(y=Y-1), 'target -1 is out of range'),
    (dict(target=4), 'target 4 is out of range'),
    (dict(target='ture'), "called 'ture'; did you mean 'true'?"),
    (dict(model=d(nn.Sequential(CONV(), nn.SiLU(), *head()))), "LRP has no rule for '1' (SiLU). There are rules for: AdaptiveAvgPool2d, …ReLU6"),
    (dict(model=d(nn.Sequential(nn.BatchNorm2d(3), CONV(), *head()))), "LRP has no rule for '0' (BatchNorm2d)"),
    (dict(model=d(nn.Sequential(CONV(), nn.BatchNorm2d(4, track_running_stats=False), *head()))), "LRP has no rule for '1' (BatchNorm2d)"),
    (dict(model=d(Gate())), "LRP has no rule for 'mul' (mul)"),
    (dict(model=d(Fork())), 'Fork cannot be traced into a graph by torch.fx'),
    (dict(model=d(Twice())), "layer 'conv' runs more than once a pass"),
    (dict(model=d(Twice()), criterion='conductance'), "layer 'conv' runs more than once a pass"),
    (dict(model=d(Idle())), "lrp: layer 'idle' has no scores; does it run when the model does?"),
    (dict(model=d(Idle()), criterion='conductance'), "conductance: layer 'idle' has no scores"),
], ids=lambda o: o if isinstance(o, str) else '')
def test_wrong_is_refused_in_a_sentence(wrong, message):
    with pytest.raises(ValueError) as e: score(**bad(**wrong))
    assert re.search('.*'.join(map(re.escape, message.split('…'))), str(e.value)), str(e.value)

@pytest.mark.parametrize('criterion', ['magnitude', *EXPLAIN])
def test_a_score_that_is_not_finite_names_layer_and_criterion(criterion):
    net = d(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), *head()))
    net[2].weight.data[1] = float('inf')
    with pytest.raises(ValueError, match=rf"{criterion}: \d of 4 scores of layer '\d' are not finite \(first: filter \d\)"): score(criterion, net, X, Y)

def test_hooks_that_a_graph_would_leave_out_are_refused():
    net = small().double()
    handle = net[0][1].register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="layer '0.1' has a forward hook"): lrp(net, X, Y)
    handle.remove(); lrp(net, X, Y)

def test_scores_of_no_layer_are_refused():
    net = small()
    good = score('magnitude', net, None, None)
    with pytest.raises(ValueError, match="there are scores of 'fc', which is no convolution"): check_scores({**good, 'fc': torch.ones(4)}, net)
    with pytest.raises(ValueError, match=r"shape \(4, 1\), expected \(6,\): one score per filter"): check_scores({**good, '0.0': torch.ones(4, 1)}, net)

def test_which_layers_cut():
    assert {n for n in cuts(traced(small())) if n in convs(small())} == {'0.0', '2.0'}
    assert {n for n in cuts(traced(sequential())) if n in convs(sequential())} == {'0', '3'}
