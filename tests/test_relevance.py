"""LRP and DeepLIFT against zennit, captum and their definitions, and under every kind of mistreatment."""
import re
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import zennit.canonizers as zc
import zennit.composites as zo
import zennit.rules as zr
from captum.attr import LRP, LayerDeepLift, LayerDeepLiftShap
from captum.attr._core import deep_lift
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision import models
from torchvision.models.mobilenetv2 import InvertedResidual
from zennit.attribution import Gradient
from zennit.core import Stabilizer
from zennit.layer import Sum as ZennitSum
from zennit.torchvision import ResNetCanonizer
from zennit.types import Activation, AvgPool, Convolution, Linear

from networks import close, images, mobile, restless, sequential, small, NEAR
from xprune_nb import relevance
from xprune_nb.attribution import folded, gradient_activation_maps, on_every_path
from xprune_nb.graph import OPS
from xprune_nb.model import baseline, convs
from xprune_nb.relevance import (COMPOSITES, AlphaBeta, Epsilon, Flat, Gamma, ZBox, Zero, ZPlus, conservation, deeplift, deeplift_maps, deeplift_shap,
                                 deeplift_shap_maps, Multipliers, loss_slope, lrp, lrp_maps, relevance_net)

MAPS = dict(lrp=lrp_maps, deeplift=deeplift_maps, deeplift_shap=deeplift_shap_maps)
SCORES = dict(lrp=lrp, deeplift=deeplift, deeplift_shap=deeplift_shap)

def maps_of(f, *args, **kw):
    parts = list(f(*args, **kw))
    return {n: torch.cat([p[n] for p in parts]) for n in parts[0]}

def logits_of(net, x, k): return net(x).gather(1, k[:, None])[:, 0].detach()
def losses_of(net, x, k): return F.cross_entropy(net(x), k, reduction='none').detach()

# --- LRP against zennit ---

class MobileCanonizer(zc.AttributeCanonizer):
    "zennit's way to make the sum of a shortcut a layer"
    def __init__(self): super().__init__(lambda name, m: dict(forward=self.forward.__get__(m), canonizer_sum=ZennitSum()) if isinstance(m, InvertedResidual) else None)
    @staticmethod
    def forward(self, x): return self.canonizer_sum(torch.stack([x, self.conv(x)], -1)) if self.use_res_connect else self.conv(x)

class Pooled(nn.Module):
    "MobileNetV2's average pooling as a layer, for zennit's sake"
    def __init__(self, net): super().__init__(); self.features, self.pool, self.classifier = net.features, nn.AdaptiveAvgPool2d(1), net.classifier
    def forward(self, x): return self.classifier(self.pool(self.features(x)).flatten(1))

def zennit_says(net, composite, x, y):
    "Relevance at the output of each convolution, and of the pixels"
    kept, hooks = {}, []
    def keep(name):
        def hook(module, inputs, out): kept[name] = out; out.retain_grad()
        return hook
    with Gradient(net, composite) as attributor:
        try:
            for n, m in convs(net).items(): hooks.append(m.register_forward_hook(keep(n)))
            _, pixels = attributor(x, lambda out: torch.zeros_like(out).scatter(1, y[:, None], out.gather(1, y[:, None])))
        finally:
            for h in hooks: h.remove()
    return {**{n: a.grad for n, a in kept.items()}, 'input': pixels}

def zennit_epsilon(epsilon, canonizers):
    norm = zr.Norm(epsilon)
    return zo.LayerMapComposite([(Activation, zr.Pass()), (ZennitSum, norm), (AvgPool, norm), (Convolution, zr.Epsilon(epsilon)), (Linear, zr.Epsilon(epsilon))],
                                canonizers=canonizers)

def zennit_depth(net, low, high, canonizers):
    "The composite `depth`, layer by layer"
    names = list(convs(net))
    rule = lambda i: zr.ZBox(low, high) if not i else zr.Gamma(.25) if i < len(names)/2 else zr.Epsilon(Stabilizer(.25, norm_scale=True))
    base = zo.layer_map_base() + [(nn.Linear, zr.Epsilon(0))]
    return zo.NameLayerMapComposite([((n,), rule(i)) for i, n in enumerate(names)], base, canonizers=canonizers)

THEIRS = {
    'epsilon': lambda net, low, high, c: zennit_epsilon(1e-6, c),
    'epsilon-plus': lambda net, low, high, c: zo.EpsilonPlus(canonizers=c),
    'epsilon-alpha2-beta1': lambda net, low, high, c: zo.EpsilonAlpha2Beta1(canonizers=c),
    'epsilon-plus-flat': lambda net, low, high, c: zo.EpsilonPlusFlat(canonizers=c),
    'epsilon-alpha2-beta1-flat': lambda net, low, high, c: zo.EpsilonAlpha2Beta1Flat(canonizers=c),
    'epsilon-gamma-box': lambda net, low, high, c: zo.EpsilonGammaBox(low, high, canonizers=c),
    'depth': lambda net, low, high, c: zennit_depth(net, low, high, c)}

def alive(net):
    "Weights by which signals do not die out"
    for m in net.modules():
        if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight, nonlinearity='relu')
    return net

def vgg(bn):
    layers = models.vgg.make_layers([16, 'M', 32, 'M', 64, 64, 'M', 64, 64, 'M', 64, 64, 'M'], bn)
    return restless(alive(nn.Sequential(layers, nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4))))

NETWORKS = dict(
    sequential=(sequential, []),
    vgg11=(lambda: vgg(False), []),
    vgg11_bn=(lambda: vgg(True), [zc.SequentialMergeBatchNorm()]),
    resnet18=(lambda: restless(models.resnet18(num_classes=4)), [ResNetCanonizer()]),
    mobilenet_v2=(lambda: Pooled(baseline().net()), [zc.SequentialMergeBatchNorm(), MobileCanonizer()]))

def network(name, dtype=torch.float64):
    make, canonizers = NETWORKS[name]
    net = make().to(dtype).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_var += m.eps; m.eps = 0  # the same function; what zennit leaves of a merged norm still divides by sqrt(1+eps)
    return net, canonizers

def box(x): return x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)

@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('composite', THEIRS)
def test_lrp_is_zennits(name, composite):
    (net, canonizers), (x, y) = network(name), images(2, 32)
    theirs = zennit_says(net, THEIRS[composite](net, *box(x), canonizers), x, y)
    close(maps_of(lrp_maps, net, x, y, composite=composite, pixels=True), theirs, NEAR[torch.float64])

@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('epsilon', [0, 0.1])
def test_lrp_is_zennits_by_another_epsilon(name, epsilon):
    (net, canonizers), (x, y) = network(name), images(2, 32)
    theirs = zennit_says(net, zennit_epsilon(epsilon or 1e-18, canonizers), x, y)
    close(maps_of(lrp_maps, net, x, y, epsilon=epsilon), theirs, 1e-10)

@pytest.mark.parametrize('name', ['sequential', 'vgg11', 'vgg11_bn'])
@pytest.mark.parametrize('composite', THEIRS)
def test_lrp_is_zennits_in_single_precision(name, composite):
    (net, canonizers), (x, y) = network(name, torch.float32), images(2, 32, dtype=torch.float32)
    theirs = zennit_says(net, THEIRS[composite](net, *box(x), canonizers), x, y)
    close(maps_of(lrp_maps, net, x, y, composite=composite, pixels=True), theirs, NEAR[torch.float32])

@pytest.mark.parametrize('composite', COMPOSITES)
def test_single_and_double_precision_agree_on_mobilenet(composite):
    "A unit within rounding of a kink may switch, and then what flows below it differs: a little, on a deep network"
    net, x, y = mobile(4, torch.float32)
    single, double = maps_of(lrp_maps, net, x, y, composite=composite), maps_of(lrp_maps, net.double(), x.double(), y, composite=composite)
    for n, a in double.items(): assert (single[n] - a).abs().sum() <= 1e-2*a.abs().sum(), n

def test_lrp_is_captums():
    "At the input, where captum puts all of it together"
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.body, self.head = sequential()[:6], sequential()[7:]
        def forward(self, x): return self.head(self.body(x).flatten(1))  # captum has no rule for nn.Flatten
    net, (x, y) = Net().double().eval(), images()
    ours = maps_of(lrp_maps, net, x, y, epsilon=1e-3, pixels=True)['input']
    for m in net.modules():
        if isinstance(m, nn.ReLU): m.inplace = False
        elif not list(m.children()): m.rule = EpsilonRule(1e-15 if isinstance(m, nn.MaxPool2d) else 1e-3)  # to captum, the winner of a maximum is a sum, too
    close({'input': ours}, {'input': LRP(net).attribute(x.clone().requires_grad_(), target=y).detach()}, 1e-10)

# --- LRP by hand, and by the definition ---

def test_lrp_without_epsilon_is_gradient_times_activation_on_relu():
    net, (x, y) = sequential().double(), images()
    plain = maps_of(gradient_activation_maps, net, x, y)
    close(maps_of(lrp_maps, net, x, y, epsilon=0), plain, 1e-10)
    close(maps_of(lrp_maps, net, x, y, epsilon=1e-12), plain, 1e-8)
    six = small().double()
    assert not torch.allclose(maps_of(lrp_maps, six, 4*x, y, epsilon=0)['0.0'], maps_of(gradient_activation_maps, six, 4*x, y)['0.0'])

class Shortcut(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b, self.out = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1, bias=False), nn.Linear(1, 1)
    def forward(self, x):
        x = self.a(x)
        x += self.b(x)
        return self.out(x.mean((2, 3)))

def test_lrp_through_a_shortcut_and_an_average_by_hand():
    net = Shortcut().double().eval()
    for p, v in zip(net.parameters(), (1., 1., 2., 3., 5.)): p.data.fill_(v)
    x = torch.tensor([[[[1., 3.]]]]).double()
    # a = (2, 4); b = (4, 8); sum = (6, 12); mean 9; logit 3*9+5 = 32. The mean gets 27 of it, its parts 27*(6, 12)/18 = (9, 18), b two thirds: (6, 12), a all: (9, 18)
    maps = maps_of(lrp_maps, net, x, target=0, epsilon=0, pixels=True)
    assert_close(maps['b'].flatten().tolist(), [6., 12.]); assert_close(maps['a'].flatten().tolist(), [9., 18.]); assert_close(maps['input'].flatten().tolist(), [4.5, 13.5])
    table = conservation(net, x, target=0, epsilon=0)
    assert table.bias['out'] == pytest.approx(5) and table.bias['a'] == pytest.approx(9/2 + 18/4) and table.gap.max() < 1e-12
    assert list(table.index) == ['input', 'a', 'b', 'add_', 'mean', 'out'] and table.relevance['input'] == pytest.approx(18)

RULES = [Zero(), Epsilon(.3), Epsilon(.3, relative=True), Gamma(.4), AlphaBeta(2, 1), AlphaBeta(1.5, .5), ZPlus(), ZBox(-3., 2.), Flat()]

def by_definition(rule, w, b, a, R, eps=1e-6):
    "Relevance of inputs a (J,) of z = w a + b from that of the outputs, term by term"
    c, out = w*a, torch.zeros_like(a)
    for k in range(len(w)):
        z, stab = c[k].sum() + b[k], lambda v, e=eps: v + e*(1 if v >= 0 else -1)
        pos, neg = c[k].clamp(min=0), c[k].clamp(max=0)
        if isinstance(rule, Epsilon):
            e = rule.epsilon*(((w@a + b)**2).mean().sqrt() if rule.relative else 1)
            out += c[k]/stab(z, e)*R[k]
        elif isinstance(rule, Gamma):
            part, own = (pos, b[k].clamp(min=0)) if z > 0 else (neg, b[k].clamp(max=0))
            out += (c[k] + rule.gamma*part)/stab(z + rule.gamma*(part.sum() + own))*R[k]
        elif isinstance(rule, AlphaBeta):
            out += rule.alpha*pos/stab(pos.sum() + b[k].clamp(min=0))*R[k]
            if rule.beta: out -= rule.beta*neg/stab(neg.sum() + b[k].clamp(max=0))*R[k]
        elif isinstance(rule, ZBox):
            q = c[k] - rule.low*w[k].clamp(min=0) - rule.high*w[k].clamp(max=0)
            out += q/stab(q.sum())*R[k]
        else: out += R[k]/stab(len(a))
    return out

@pytest.mark.parametrize('rule', RULES, ids=repr)
@pytest.mark.parametrize('kind', ['conv', 'linear', 'grouped'])
@pytest.mark.parametrize('signed', [True, False])
def test_rules_by_definition(rule, kind, signed):
    "One layer whose output is the logits, behind another that is rectified, or not"
    groups, act = 2 if kind == 'grouped' else 1, nn.Identity() if signed else nn.ReLU()
    last = [nn.Flatten(), nn.Linear(6, 4)] if kind == 'linear' else [nn.Conv2d(6, 4, 1, groups=groups), nn.Flatten()]
    net = nn.Sequential(nn.Conv2d(3, 6, 1), act, *last).double().eval()
    x, y = torch.randn(5, 3, 1, 1).double(), torch.arange(5) % 4
    layer, name = next((m, n) for n, m in reversed(list(net.named_modules())) if hasattr(m, 'weight'))
    w = layer.weight.detach().flatten(1)
    if groups == 2: w = torch.block_diag(w[:2], w[2:])
    a, logits = act(net[0](x)).flatten(1).detach(), net(x).detach()
    ours = maps_of(lrp_maps, net, x, y, composite={name: rule})['0'].flatten(1)
    keep = (w != 0) if groups == 2 else torch.ones_like(w, dtype=torch.bool)
    for i in range(5):
        R = logits[i]*F.one_hot(y[i], 4)
        if groups == 2 and isinstance(rule, Flat): want = keep[y[i]]*R.sum()/(3 + 1e-6)
        else: want = by_definition(rule, w, layer.bias.detach(), a[i], R)
        assert_close(ours[i], want, rtol=1e-10, atol=1e-12)

@pytest.mark.parametrize('make', [small, lambda: restless(models.mobilenet_v2(num_classes=4)), lambda: restless(models.resnet18(num_classes=4)),
                                  lambda: restless(models.resnet50(num_classes=4)), lambda: vgg(True)])
def test_rewriting_keeps_the_output(make):
    net, (x, _) = make().double(), images(2, 32)
    of = Multipliers(net, x)
    for twin in [relevance_net(net, x, composite=c, box=box(x)) for c in ('epsilon', 'epsilon-alpha2-beta1', 'depth')] + [of.against(of.reference(x.flip(0), 1))]:
        assert not any(o.op == 'batch_norm' for o in twin.ops)
        with torch.no_grad(): assert_close(twin(x), net(x), rtol=1e-9, atol=1e-9)
        assert_close(twin(x.clone().requires_grad_()), net(x), rtol=1e-9, atol=1e-9)

# --- operations, unit by unit ---

class Between(nn.Module):
    "A convolution whose output goes through `f`; what comes of that is added up with weights"
    def __init__(self, f, c=6, **layers):
        super().__init__()
        self.conv, self.f = nn.Conv2d(3, c, 3, padding=1), f
        for n, m in layers.items(): self.add_module(n, m)
        self.out = nn.LazyLinear(4)
    def forward(self, x): return self.out(self.f(self, self.conv(x)).flatten(1))

def between(f, **kw):
    torch.manual_seed(3)
    net, (x, y) = Between(f, **kw), images(3, 4, dtype=torch.float32)
    with torch.no_grad(): net(x)
    return restless(net).double(), x.double(), y

def parts(net, x, i):
    "Of one image: what goes into `f`, what comes out, and the class's weights"
    with torch.no_grad():
        a = net.conv(x[i:i+1])
        o = net.f(net, a)
    return a, o

def matrix_of(f, a):
    "A linear (affine) function of one image's units: M (units in, units out), and what is added"
    units = torch.eye(a.numel()).double().view(-1, *a.shape[1:])
    with torch.no_grad():
        b = f(torch.zeros_like(a)).flatten()
        return torch.stack([f(u[None]).flatten() - b for u in units]), b

def relevance_of_out(net, o, k, eps=1e-6):
    c = o.flatten()*net.out.weight[k].detach()
    z = c.sum() + net.out.bias[k].detach()
    return c/(z + eps*torch.sign(z))*z

def norm_as_sum(kind, a, layer):
    "Mean taken off, divided by the standard deviation that this image has: a function that is affine in its argument"
    groups = dict(group=lambda v: v.reshape(1, 2, -1), instance=lambda v: v.reshape(1, 6, -1), layer=lambda v: v.reshape(1, 6*4, 4))[kind]
    deviation = (groups(a).var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
    w, b = layer.weight.detach(), layer.bias.detach()
    if kind != 'layer': w, b = w.view(-1, 1, 1), b.view(-1, 1, 1)
    return lambda v: ((groups(v) - groups(v).mean(-1, keepdim=True))/deviation).reshape(v.shape)*w + b

def noisy(layer):
    for p in layer.parameters(): nn.init.uniform_(p, .5, 1.5)
    return layer

SUMS = dict( # f, layers; the affine function that it is at an image
    average=(lambda s, h: F.avg_pool2d(h, 2), {}, None),
    mean=(lambda s, h: h.mean((2, 3)), {}, None),
    adaptive=(lambda s, h: F.adaptive_avg_pool2d(h, 3), {}, None),
    bilinear=(lambda s, h: F.interpolate(h, scale_factor=2, mode='bilinear'), {}, None),
    batch_norm=(lambda s, h: s.norm(h + 0), dict(norm=nn.BatchNorm2d(6)), lambda s, a: lambda v: s.norm(v)),
    group_norm=(lambda s, h: s.norm(h), dict(norm=noisy(nn.GroupNorm(2, 6))), lambda s, a: norm_as_sum('group', a, s.norm)),
    layer_norm=(lambda s, h: s.norm(h), dict(norm=noisy(nn.LayerNorm(4))), lambda s, a: norm_as_sum('layer', a, s.norm)),
    instance_norm=(lambda s, h: s.norm(h), dict(norm=noisy(nn.InstanceNorm2d(6, affine=True))), lambda s, a: norm_as_sum('instance', a, s.norm)),
    transposed=(lambda s, h: s.up(h), dict(up=nn.ConvTranspose2d(6, 5, 2, 2)), None),
    one_dimensional=(lambda s, h: s.line(h.flatten(2)), dict(line=nn.Conv1d(6, 5, 3)), None),
    matrix=(lambda s, h: h@s.other.weight, dict(other=nn.Linear(4, 4)), None))

@pytest.mark.parametrize('name', SUMS)
def test_relevance_of_a_sum_by_definition(name):
    f, layers, at = SUMS[name]
    net, x, y = between(f, **layers)
    ours = maps_of(lrp_maps, net, x, y)['conv']
    for i in range(3):
        a, o = parts(net, x, i)
        M, b = matrix_of(at(net, a) if at else lambda v: net.f(net, v), a)
        c = a.flatten()[:, None]*M
        z = c.sum(0) + b
        assert_close(z, o.flatten(), rtol=1e-10, atol=1e-10)
        R = (c/(z + 1e-6*torch.copysign(torch.ones_like(z), z))*relevance_of_out(net, o, y[i])).sum(1)
        if name == 'batch_norm': R = R*a.flatten()/(a.flatten() + 1e-6*torch.sign(a.flatten())) # the sum with 0 that keeps it apart
        assert_close(ours[i].flatten(), R, rtol=1e-8, atol=1e-12)

MOVES = dict(
    chunk=lambda s, h: torch.cat(h.chunk(3, 1)[::-1], 1), shuffle=lambda s, h: h.view(len(h), 2, 3, 4, 4).transpose(1, 2).flatten(1),
    pad=lambda s, h: F.pad(h, (1, 2, 0, 1)), nearest=lambda s, h: F.interpolate(h, scale_factor=2), slice=lambda s, h: h[:, 1:4, ::2],
    pixel_shuffle=lambda s, h: F.pixel_shuffle(h[:, :4], 2), stack=lambda s, h: torch.stack([h, h], 1), repeated=lambda s, h: h.repeat(1, 2, 1, 1))

@pytest.mark.parametrize('name', MOVES)
def test_relevance_goes_where_the_value_came_from(name):
    net, x, y = between(MOVES[name])
    ours = maps_of(lrp_maps, net, x, y)['conv']
    for i in range(3):
        a, o = parts(net, x, i)
        M, _ = matrix_of(lambda v: net.f(net, v), a)
        assert ((M == 0) | (M == 1)).all()
        assert_close(ours[i].flatten(), M@relevance_of_out(net, o, y[i]), rtol=1e-9, atol=1e-12)

WHOLE = dict(silu=F.silu, hardswish=F.hardswish, gelu=F.gelu, leaky=lambda h: F.leaky_relu(h, .2), elu=F.elu, tanh=torch.tanh, mish=F.mish, relu6=F.relu6,
             gate_written_out=lambda h: h*torch.sigmoid(h), scaled=lambda h: 3*h/2, negative=lambda h: -h, detached=lambda h: h.detach(), hard_gate=lambda h: h*F.hardsigmoid(h))

@pytest.mark.parametrize('name', WHOLE)
def test_relevance_passes_whole(name):
    "An activation, whether it is one operation or a product of a unit and its gate"
    net, x, y = between(lambda s, h: WHOLE[name](h))
    ours = maps_of(lrp_maps, net, x, y)['conv']
    for i in range(3):
        a, o = parts(net, x, i)
        assert_close(ours[i].flatten(), relevance_of_out(net, o, y[i]), rtol=1e-9, atol=1e-12)

def test_a_gate_gets_half():
    "h times a gate for each channel: h has its half in place, the gate's half is what all positions gave it, and goes on through its average"
    net, x, y = between(lambda s, h: h*F.adaptive_avg_pool2d(h, 1).sigmoid())
    ours = maps_of(lrp_maps, net, x, y)['conv']
    for i in range(3):
        a, o = parts(net, x, i)
        R = relevance_of_out(net, o, y[i]).view_as(a)/2
        mean = a.mean((2, 3), keepdim=True)
        of_gate = R.sum((2, 3), keepdim=True)*(a/16)/(mean + 1e-6*mean.sign())
        assert_close(ours[i:i+1], R + of_gate, rtol=1e-9, atol=1e-12)

def test_a_product_of_matrices_gives_half_to_each():
    net, x, y = between(lambda s, h: (h.flatten(2)@h.flatten(2).transpose(1, 2)))
    ours = maps_of(lrp_maps, net, x, y)['conv']
    for i in range(3):
        a, o = parts(net, x, i)
        h, R, z = a[0].flatten(1), relevance_of_out(net, o, y[i]).view(6, 6), o[0]
        want = torch.zeros_like(h)
        for p, q in np.ndindex(6, 6): # z_pq = sum_j h_pj h_qj
            for j in range(16):
                term = h[p, j]*h[q, j]/(z[p, q] + 1e-6*z[p, q].sign())*R[p, q]/2
                want[p, j] += term; want[q, j] += term
        assert_close(ours[i].flatten(1), want, rtol=1e-8, atol=1e-12)

@pytest.mark.parametrize('composite', ['epsilon-plus', 'epsilon-alpha2-beta1'])
@pytest.mark.parametrize('shift', [.5, -.05, -.5])
def test_what_is_added_can_make_inputs_negative(shift, composite):
    "z-plus and alpha-beta of the second convolution, by hand, behind a ReLU and a learnt shift"
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.Linear(5, 4)
            self.shift = nn.Parameter(torch.full((1, 6, 1, 1), shift))
        def forward(self, x): return self.fc(F.relu(self.b(F.relu(self.a(x)) + self.shift)).mean((2, 3)))
    torch.manual_seed(0)
    net, (x, y) = Shifted().double().eval(), images(3, 4)
    m = maps_of(lrp_maps, net, x, y, composite=composite)
    rule = dict(COMPOSITES[composite](1e-6)[0][1].__dict__)
    with torch.no_grad(): r = F.relu(net.a(x)); h = r + net.shift
    for i, u, v in np.ndindex(3, 4, 4):
        R = by_definition(AlphaBeta(rule['alpha'], rule['beta']), net.b.weight.detach().flatten(1), net.b.bias.detach(), h[i, :, u, v], m['b'][i, :, u, v])
        assert_close(m['a'][i, :, u, v], r[i, :, u, v]*R/(h[i, :, u, v] + 1e-6*torch.copysign(torch.ones_like(R), h[i, :, u, v])), rtol=1e-8, atol=1e-12)

def slope(f, v, v0): return torch.where((v - v0).abs() < 1e-12, torch.zeros_like(v), (f(v) - f(v0))/(v - v0))

@pytest.mark.parametrize('name', [n for n in WHOLE if n not in ('gate_written_out', 'hard_gate', 'detached')])
def test_multipliers_of_activations_are_secants(name):
    net, x, y = between(lambda s, h: WHOLE[name](h))
    start = images(3, 4)[0]
    ours = maps_of(deeplift_maps, net, x, y, baseline=start)['conv']
    with torch.no_grad(): a, a0 = net.conv(x), net.conv(start)
    m = net.out.weight[y].detach().view_as(a)*slope(WHOLE[name], a, a0)
    assert_close(ours, m*(a - a0), rtol=1e-7, atol=1e-12)

PRODUCTS = dict( # two factors that the image decides
    product=lambda s, h: h*s.other(h), gate=lambda s, h: h*s.other(h).mean((2, 3), keepdim=True), matrices=lambda s, h: h@s.other(h), square=lambda s, h: h*h,
    quotient=lambda s, h: h/(s.other(h).sigmoid() + 1), over=lambda s, h: 2/(h.sigmoid() + 1), softplus=lambda s, h: F.softplus(h)*h, root=lambda s, h: (h*h + 1).sqrt(),
    power=lambda s, h: h.pow(3), maximum=lambda s, h: h.amax((2, 3)), adaptive_maximum=lambda s, h: F.adaptive_max_pool2d(h, 2),
    group=lambda s, h: s.group(h), layer=lambda s, h: F.layer_norm(h, (4, 4), eps=.1), instance=lambda s, h: s.instance(h))

@pytest.mark.parametrize('name', PRODUCTS)
@pytest.mark.parametrize('n', [1, 3])
def test_multipliers_are_complete(name, n):
    norms = dict(group=noisy(nn.GroupNorm(2, 6)), instance=noisy(nn.InstanceNorm2d(6, affine=True)))
    net, x, y = between(PRODUCTS[name], other=nn.Conv2d(6, 6, 1), **norms)
    start = images(3, 4)[0]
    maps = maps_of(deeplift_maps, net, x[:n], y[:n], baseline=start[:n])
    change = logits_of(net, x[:n], y[:n]) - logits_of(net, start[:n], y[:n])
    assert_close(maps['conv'].flatten(1).sum(1), change, rtol=1e-8, atol=1e-10)
    many = maps_of(deeplift_shap_maps, net, x[:n], y[:n], background=start)
    alone = [maps_of(deeplift_maps, net, x[:n], y[:n], baseline=s[None]) for s in start]
    assert_close(many['conv'], sum(m['conv'] for m in alone)/3, rtol=1e-8, atol=1e-12)

def test_multipliers_of_a_product_and_a_norm_by_definition():
    net, x, y = between(PRODUCTS['gate'], other=nn.Conv2d(6, 6, 1))
    start = images(3, 4)[0]
    ours = maps_of(deeplift_maps, net, x, y, baseline=start)
    with torch.no_grad():
        a, a0 = net.conv(x), net.conv(start)
        g, g0 = (net.other(v).mean((2, 3), keepdim=True) for v in (a, a0))
        m = net.out.weight[y].detach().view_as(a)
        m_gate = (m*(a + a0)/2).sum((2, 3), keepdim=True).expand_as(a)/16
        m_a = m*(g + g0)/2 + torch.einsum('noij,oc->ncij', m_gate, net.other.weight.detach()[:, :, 0, 0])
    assert_close(ours['other'], m_gate*(net.other(a) - net.other(a0)).detach(), rtol=1e-9, atol=1e-12)
    assert_close(ours['conv'], m_a*(a - a0), rtol=1e-9, atol=1e-12)

    net, x, y = between(lambda s, h: F.group_norm(h, 2, eps=.1))
    ours = maps_of(deeplift_maps, net, x, y, baseline=start)
    with torch.no_grad():
        h, h0 = (net.conv(v).reshape(3, 2, -1) for v in (x, start))
        d, d0 = (v - v.mean(-1, keepdim=True) for v in (h, h0))
        v, v0 = ((u*u).mean(-1, keepdim=True) for u in (d, d0))
        r, r0 = ((u + .1).rsqrt() for u in (v, v0))
        m = net.out.weight[y].detach().view_as(d)
        m_v = (m*(d + d0)/2).sum(-1, keepdim=True)*(r - r0)/(v - v0)
        m_d = m*(r + r0)/2 + m_v*(d + d0)/d.shape[-1]
        m_h = m_d - m_d.mean(-1, keepdim=True)
    assert_close(ours['conv'].reshape(h.shape), m_h*(h - h0), rtol=1e-8, atol=1e-12)

def test_references_know_their_images_whatever_rows_are():
    "A channel's rows in front of an activation: the reference is spread over all images, and each has its own"
    net, x, y = between(lambda s, h: F.silu(h.transpose(0, 1)).transpose(0, 1))
    start = images(2, 4)[0]
    for i in range(3): # an image alone can be mixed up with no other
        for f, kw in (deeplift_maps, dict(baseline=start[:1])), (deeplift_shap_maps, dict(background=start)):
            assert_close(maps_of(f, net, x, y, **kw)['conv'][i:i+1], maps_of(f, net, x[i:i+1], y[i:i+1], **kw)['conv'], rtol=1e-9, atol=1e-12)

# --- conservation ---

@pytest.mark.parametrize('composite', COMPOSITES)
def test_lrp_is_conserved_on_mobilenet(composite):
    net, x, y = mobile(3)
    table = conservation(net, x, y, epsilon=1e-3, composite=composite)
    assert table.gap.max() < 1e-10 and len(table) == 1 + 52 + 10 + 1 + 1  # pixels, convolutions, shortcuts, average, classifier
    assert table.every_path.sum() == 1 + 22 + 10 + 1 + 1  # pixels, stem, 2 + 6*3 in blocks without a shortcut, head: by the table of the paper
    maps = maps_of(lrp_maps, net, x, y, epsilon=1e-3, composite=composite, pixels=True)
    for n, m in maps.items(): assert m.sum().item()/3 == pytest.approx(table.relevance[n], rel=1e-9, abs=1e-12)
    assert_close(conservation(net, x, y, epsilon=1e-3, composite=composite, chunk=2).drop(columns='every_path').to_numpy(dtype=float),
                 table.drop(columns='every_path').to_numpy(dtype=float), rtol=1e-8, atol=1e-10, equal_nan=True)

@pytest.mark.parametrize('name', ['vgg11_bn', 'resnet18'])
@pytest.mark.parametrize('composite', COMPOSITES)
def test_lrp_is_conserved(name, composite):
    (net, _), (x, y) = network(name), images(2, 32)
    table = conservation(net, x, y, composite=composite)
    assert table.gap.max() < 1e-9*max(1, table.relevance.abs().max()) and table.relevance['input'] != 0

def test_relevance_of_the_loss_adds_up():
    "It starts as z times the mean gradient on the way from no logits at all: together, L(z) - L(0)"
    net, (x, y) = sequential().double(), images()
    table = conservation(net, 10*x, y, target='loss')
    assert table.relevance['9'] == pytest.approx((losses_of(net, 10*x, y) - np.log(4)).mean().item(), rel=1e-12) and table.gap.max() < 1e-12
    z = torch.tensor([[3., -1., 20.], [.5, 200., 0.]]).double()
    fine = torch.stack([F.softmax(t*z, 1) for t in (torch.arange(100_000).double() + .5)/100_000]).mean(0) - F.one_hot(torch.tensor([0, 2]), 3)
    assert_close(loss_slope(0*z, z, torch.tensor([0, 2])), fine, rtol=0, atol=1e-7)
    assert_close((loss_slope(0*z, z, torch.tensor([0, 2]))*z).sum(1), F.cross_entropy(z, torch.tensor([0, 2]), reduction='none') - np.log(3), rtol=1e-11, atol=1e-11)

# --- composites ---

def test_composites_of_ones_own():
    net, (x, y) = small().double(), images()
    def at(composite, **kw): return maps_of(lrp_maps, net, x, y, composite=composite, pixels=True, **kw)
    plus = at('epsilon-plus')
    assert_close(at({'conv': ZPlus()}), plus); assert_close(at([('conv', ZPlus())]), plus)
    assert_close(at(lambda p: ZPlus() if p.kind == 'conv' else None), plus)
    assert_close(at([(lambda p: p.name == '2.0', Gamma()), ('conv', ZPlus()), ('linear', Zero())]), at({'2.0': Gamma(), 'conv': ZPlus(), 'linear': Zero()}))
    assert_close(at(Zero(), epsilon=0), at('zero'))
    assert_close(at('epsilon', epsilon=.5), at({k: Epsilon(.5) for k in ('conv', 'linear', 'pool', 'sum')}))
    assert not torch.allclose(at({'2.0': Gamma()})['1.conv.2'], at('epsilon')['1.conv.2'])
    low, high = box(x)
    assert_close(at({'0.0': ZBox(low, high)}), at({'0.0': ZBox()})); assert_close(at({'0.0': ZBox()})['0.0'], at('epsilon')['0.0'], rtol=0, atol=0)

class Odd(nn.Module):
    "Layers of one name and steps of another, run twice, in place, functional"
    def __init__(self):
        super().__init__()
        self.add, self.act, self.lin, self.out = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)]), nn.ReLU6(True), nn.Linear(8, 8), nn.Linear(8, 4)
    def forward(self, x):
        x = self.act(self.add[0](x))
        y = self.add[1](x)
        y += x
        y = torch.cat([F.relu(y + 1, inplace=True), torch.add(x, y, alpha=2)], 1)
        y = F.max_pool2d(y, 2) + F.avg_pool2d(y, 2)
        y = F.adaptive_avg_pool2d(y, 1)
        y = self.act(self.lin(y.view(y.size(0), -1)))
        return self.out(self.act(self.lin(y)))

@pytest.mark.parametrize('composite', COMPOSITES)
def test_odd_networks_conserve(composite):
    net, (x, y) = Odd().double().eval(), images()
    table = conservation(net, x, y, composite=composite)
    assert table.gap.max() < 1e-10 and table.every_path['add.0'] and len(table.index) == len(set(table.index))
    assert any(abs(table.bias[n]) > 0 for n in table.index if 'add' in n and '.' not in n)  # the 1 that is added is nobody's

def test_odd_networks_are_complete():
    net, (x, y) = Odd().double().eval(), images()
    for m, start in (maps_of(deeplift_maps, net, x, y, baseline=.3*torch.ones(1).double()), .3 + 0*x), (maps_of(deeplift_maps, net, x, y, baseline=x.flip(0)), x.flip(0)):
        assert_close(m['add.0'].flatten(1).sum(1), logits_of(net, x, y) - logits_of(net, start, y), rtol=1e-10, atol=1e-12)

# --- DeepLIFT against captum ---

class Six(nn.Module):
    "ReLU6, of parts that captum knows, each with an input of its own (captum replaces all of an input's gradient)"
    def __init__(self): super().__init__(); self.lower, self.upper = nn.ReLU(), nn.ReLU()
    def forward(self, x): return self.lower(x + 0) - self.upper(x - 6)

def with_pool(act=nn.ReLU):
    "No maximum next to an activation: between those, captum's multipliers do not add up (its issue 1104)"
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), act(), nn.Conv2d(8, 8, 3, stride=2), act(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)).eval()

def apart(net):
    for m in net.modules():
        if isinstance(m, nn.ReLU): m.inplace = False  # captum's hooks keep what an activation then overwrites
    return net

@pytest.mark.parametrize('dtype', NEAR)
@pytest.mark.parametrize('many', [True, False])
def test_deeplift_is_captums(dtype, many):
    net, (x, y) = with_pool().to(dtype), images(dtype=dtype)
    start = torch.randn(3 if many else 1, 3, 16, 16, dtype=dtype)
    theirs = {n: LayerDeepLift(net, m).attribute(x, start, target=y).detach() for n, m in convs(net).items()}
    close(maps_of(deeplift_maps, net, x, y, baseline=start), theirs, NEAR[dtype])

def rescale_by_definition(net, x, x0, k):
    "Multipliers at the output of the first convolution of `sequential`, layer by layer, each as a matrix (one image, one reference)"
    layers = [m for m in apart(net)]
    a, a0 = [layers[0](x)], [layers[0](x0)]
    for m in layers[1:]: a.append(m(a[-1])); a0.append(m(a0[-1]))
    m = F.one_hot(k, a[-1].shape[1]).to(x).flatten()
    for layer, v, v0, w, w0 in reversed(list(zip(layers[1:], a, a0, a[1:], a0[1:]))):
        if isinstance(layer, nn.ReLU): m = m*torch.where(v == v0, (v > 0).to(x), (w - w0)/(v - v0)).flatten()
        elif isinstance(layer, nn.MaxPool2d):
            part = torch.zeros_like(v)
            for n, (c, i, j) in enumerate(np.ndindex(*w.shape[1:])):
                at, out, out0 = (0, c, slice(2*i, 2*i+2), slice(2*j, 2*j+2)), w[0, c, i, j], w0[0, c, i, j]
                now, then = (t[at] == o for t, o in ((v, out), (v0, out0)))
                top = max(out, out0)
                part[at] += m[n]*((top - out0)*now/now.sum() + (out - top)*then/then.sum())
            m = torch.where(v == v0, 0, part/(v - v0)).flatten()
        else:
            units = torch.eye(v.numel()).to(x).view(-1, *v.shape[1:])
            m = (layer(units) - layer(0*v)).flatten(1) @ m
    return m.view(a[0].shape)*(a[0] - a0[0])

def test_deeplift_by_definition():
    "With a maximum behind ReLU, where captum is of no help"
    net, (x, y) = sequential().double(), images(2)
    start = torch.randn(1, 3, 16, 16).double()
    ours = maps_of(deeplift_maps, net, x, y, baseline=start)['0']
    with torch.no_grad(): close({'0': ours}, {'0': torch.cat([rescale_by_definition(net, x[i:i+1], start, y[i:i+1]) for i in range(2)])}, 1e-10)
    theirs = LayerDeepLift(net, net[0]).attribute(x, start, target=y).detach().flatten(1).sum(1)
    change = logits_of(net, x, y) - logits_of(net, start.expand_as(x), y)
    assert_close(ours.flatten(1).sum(1), change, rtol=1e-10, atol=1e-12)
    assert ((theirs - change).abs() > .01*change.abs()).any()  # if this fails, captum has been mended: make it the oracle

@pytest.mark.parametrize('dtype', NEAR)
def test_deeplift_of_relu6_is_captums(dtype):
    "Written as two ReLUs; and by captum's own rescale rule, told that ReLU6 is an activation"
    torch.manual_seed(1)
    net, theirs_net, (x, y) = with_pool(nn.ReLU6).to(dtype), with_pool(Six).to(dtype), images(dtype=dtype)
    theirs_net.load_state_dict(net.state_dict())
    x, start = 20*x, 20*torch.randn(1, 3, 16, 16, dtype=dtype)
    assert all((net[:3](v) > 6).any() for v in (x, start))
    ours = maps_of(deeplift_maps, net, x, y, baseline=start)
    deep_lift.SUPPORTED_NON_LINEAR[nn.ReLU6] = deep_lift.nonlinear
    try: told = {n: LayerDeepLift(net, m).attribute(x, start, target=y).detach() for n, m in convs(net).items()}
    finally: del deep_lift.SUPPORTED_NON_LINEAR[nn.ReLU6]
    close(ours, told, NEAR[dtype])
    # both secants of one input: (relu(z)-relu(z0))/(z-z0) - (relu(z-6)-relu(z0-6))/(z-z0), which is ReLU6's
    close(ours, {n: LayerDeepLift(theirs_net, m).attribute(x, start, target=y).detach() for n, m in convs(theirs_net).items()}, NEAR[dtype])

@pytest.mark.parametrize('dtype', NEAR)
def test_deeplift_shap_is_captums(dtype):
    net, (x, y) = with_pool().to(dtype), images(dtype=dtype)
    background = torch.randn(5, 3, 16, 16, dtype=dtype)
    theirs = {n: LayerDeepLiftShap(net, m).attribute(x, background, target=y).detach() for n, m in convs(net).items()}
    for chunk in (1, 4, 100): close(maps_of(deeplift_shap_maps, net, x, y, background=background, chunk=chunk), theirs, NEAR[dtype])

def test_deeplift_shap_is_deeplift_on_average():
    net, (x, y) = small().double(), images(4)
    background = torch.randn(6, 3, 16, 16).double()
    want = {n: sum(maps_of(deeplift_maps, net, x, y, baseline=b)[n] for b in background)/6 for n in convs(net)}
    close(maps_of(deeplift_shap_maps, net, x, y, background=background), want, 1e-10)
    close(maps_of(deeplift_shap_maps, net, x, y, background=background, samples=6), want, 1e-10)  # all, in another order
    single = maps_of(deeplift_shap_maps, net, x, y, background=background, samples=1, seed=3)
    which = torch.rand(4, 6, generator=torch.Generator().manual_seed(3)).argsort(1)[:, 0]
    close(single, maps_of(deeplift_maps, net, x, y, baseline=background[which]), 1e-10)
    close(maps_of(deeplift_shap_maps, net, x, y), maps_of(deeplift_shap_maps, net, x, y, background=x), 1e-14)

@pytest.mark.parametrize('act', [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU])
def test_deeplift_of_smooth_activations_is_captums(act):
    net, (x, y) = nn.Sequential(nn.Conv2d(3, 4, 3), act(), nn.Conv2d(4, 5, 3), act(), nn.Flatten(), nn.Linear(5*144, 4)).double().eval(), images()
    start = torch.randn(1, 3, 16, 16).double()
    close(maps_of(deeplift_maps, net, x, y, baseline=start), {n: LayerDeepLift(net, m).attribute(x, start, target=y).detach() for n, m in convs(net).items()}, 1e-9)

def test_deeplift_without_a_step_is_the_gradient():
    "Next to the baseline, the secants are derivatives"
    net, (x, y) = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.MaxPool2d(3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(196, 4)).double().eval(), images()
    h, at = 1e-6, maps_of(deeplift_maps, net, x, y, baseline=x - 1e-6)['0']
    with torch.enable_grad():
        a = net[0](x).detach().requires_grad_()
        g, = torch.autograd.grad(net[1:](a).gather(1, y[:, None]).sum(), a)
    close({'0': at/h}, {'0': g*(net[0](x) - net[0](x - h)).detach()/h}, 1e-5)

@pytest.mark.parametrize('target', ['true', 'loss', 2])
@pytest.mark.parametrize('name', ['sequential', 'vgg11_bn', 'resnet18', 'mobilenet_v2'])
def test_deeplift_is_complete(name, target):
    (net, _), (x, y) = network(name), images(3, 32)
    start = torch.randn(3, 3, 32, 32).double()
    k = torch.full_like(y, target) if isinstance(target, int) else y
    value = losses_of if target == 'loss' else logits_of
    program = folded(net, x)
    cut = [program.filters[o] for o in on_every_path(program) if o in program.filters]
    assert len(cut) >= (1 if name == 'resnet18' else 2)
    for maps, change in ((maps_of(deeplift_maps, net, x, y, baseline=start, target=target), value(net, x, k) - value(net, start, k)),
                         (maps_of(deeplift_shap_maps, net, x, y, background=start, target=target),
                          torch.stack([value(net, x, k) - value(net, start[i:i+1].expand_as(x), k) for i in range(3)]).mean(0))):
        for n in cut: assert_close(maps[n].flatten(1).sum(1), change, rtol=1e-9, atol=1e-9)

# --- laws ---

@pytest.mark.parametrize('method', MAPS)
@pytest.mark.parametrize('chunk', [1, 2, 3, 7, 10**6])
def test_chunks_change_nothing(method, chunk):
    net, (x, y) = small().double(), images(5)
    for kw in (dict(), dict(target='loss')) + ((dict(composite='depth'), dict(composite='epsilon-alpha2-beta1')) if method == 'lrp' else ()):
        assert_close(maps_of(MAPS[method], net, x, y, chunk=chunk, **kw), maps_of(MAPS[method], net, x, y, **kw), rtol=1e-10, atol=1e-12)
    if method == 'deeplift_shap':
        assert_close(maps_of(deeplift_shap_maps, net, x, y, samples=3, chunk=chunk), maps_of(deeplift_shap_maps, net, x, y, samples=3), rtol=1e-10, atol=1e-12)
    if method == 'deeplift':
        assert_close(maps_of(deeplift_maps, net, x, y, baseline='other', chunk=chunk), maps_of(deeplift_maps, net, x, y, baseline='other'), rtol=1e-10, atol=1e-12)

WAYS = [(lrp, dict(composite=c)) for c in COMPOSITES] + [(lrp, dict(epsilon=0)), (lrp, dict(target='loss')), (deeplift, {}), (deeplift_shap, {})]

@pytest.mark.parametrize('f,options', WAYS, ids=lambda o: getattr(o, '__name__', str(o)))
def test_scores_follow_shuffled_filters(f, options):
    net, (x, y) = small().double(), images()
    order, before = torch.randperm(10), f(net, x, y, **options)
    conv, norm, linear = net[2][0], net[2][1], net[-1]
    with torch.no_grad():
        for t in conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var: t.copy_(t[order].clone())
        linear.weight.copy_(linear.weight[:, order].clone())
    assert_close(f(net, x, y, **options), {**before, '2.0': before['2.0'][order]})

@pytest.mark.parametrize('f,options', WAYS, ids=lambda o: getattr(o, '__name__', str(o)))
def test_dead_filters_score_zero(f, options):
    net, (x, y) = small().double(), images()
    conv, norm = net[2][0], net[2][1]
    with torch.no_grad():
        for t in conv.weight, norm.weight, norm.bias: t[3] = 0
    s = f(net, x, y, **options)['2.0']
    assert s[3] == 0 and (s > 0).sum() >= 5

@pytest.mark.parametrize('method', SCORES)
def test_targets(method):
    net, (x, y) = small().double(), images(4)
    f, predicted = SCORES[method], net(x).argmax(1)
    assert_close(f(net, x, None, target='predicted'), f(net, x, predicted))
    assert_close(f(net, x, None, target=2), f(net, x, torch.full((4,), 2)))
    assert not torch.allclose(f(net, x, y, target='loss')['0.0'], f(net, x, y)['0.0'])

@pytest.mark.parametrize('method', MAPS)
def test_activations_in_place_are_not_seen(method):
    net, (x, y) = sequential().double(), images()
    before = maps_of(MAPS[method], net, x, y)
    assert_close(maps_of(MAPS[method], apart(net), x, y), before, rtol=0, atol=0)

@pytest.mark.parametrize('make', [lambda: models.vgg19(num_classes=4), lambda: models.vgg16_bn(num_classes=4), lambda: models.resnet50(num_classes=4)])
def test_torchvisions_networks(make):
    net, (x, y) = restless(make()), images(2, 32, dtype=torch.float32)
    for f in SCORES.values():
        s = f(net, x, y)
        assert list(s) == [n for n in convs(net)] or set(s) == set(convs(net))
        assert all(v.shape == (convs(net)[n].out_channels,) and v.isfinite().all() for n, v in s.items())

# --- the model is left as it was ---

@cache
def used():
    "A model that somebody is in the middle of using: some weights frozen, some with a gradient"
    net, (x, y) = small().double(), images(6)
    with torch.enable_grad(): net(x).sum().backward()
    net[0][0].weight.requires_grad_(False)
    return net, x, y

def state(net):
    content = lambda t: t.detach().flatten().view(torch.uint8).numpy().tobytes() if isinstance(t, torch.Tensor) else t
    return (list(net.named_modules()), {n: content(t) for n, t in net.state_dict().items()}, [(p.requires_grad, content(p.grad)) for p in net.parameters()],
            [m.training for m in net.modules()], [[*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks] for m in net.modules()],
            [getattr(m, 'inplace', None) for m in net.modules()])

@pytest.mark.parametrize('f,options', [*WAYS, (conservation, {}), (conservation, dict(composite='depth'))], ids=lambda o: getattr(o, '__name__', str(o)))
@pytest.mark.parametrize('mode', [torch.no_grad, torch.enable_grad])
def test_model_is_left_as_it_was(f, options, mode):
    net, x, y = used()
    before = state(net)
    with mode(): f(net, x, y, **options)
    assert state(net) == before

@contextmanager
def breaks(passes, error):
    "A sweep that fails in the midst of a later step"
    count, whole = iter(range(10**6)), relevance.OwnBackward.backward
    def backward(ctx, carried):
        if next(count) >= passes: raise error
        return whole(ctx, carried)
    relevance.OwnBackward.backward = staticmethod(backward)
    try: yield
    finally: relevance.OwnBackward.backward = staticmethod(whole)

@pytest.mark.parametrize('method', SCORES)
@pytest.mark.parametrize('passes', [0, 5])
@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_model_is_left_as_it_was_after_an_interruption(method, passes, error):
    net, x, y = used()
    before = state(net)
    with breaks(passes, error('out of memory')), pytest.raises(error): SCORES[method](net, x, y, chunk=2)
    assert state(net) == before
    for maps in MAPS[method](net, x, y, chunk=2): break  # and the generator is left hanging
    assert state(net) == before

# --- what is asked for wrongly ---

CONV = lambda **kw: nn.Conv2d(3, 4, 3, **kw)
head = lambda c=4: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 4)]

class Over(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.out = CONV(), nn.Sequential(*head())
    def forward(self, x): x = self.conv(x); return self.out(x/x.sigmoid())

class Soft(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.out = CONV(), nn.Sequential(*head())
    def forward(self, x): return F.softmax(self.out(self.conv(x)), 1)

class Named(nn.Module):
    def __init__(self): super().__init__(); self.input, self.out = CONV(), nn.Sequential(*head())
    def forward(self, x): return self.out(self.input(x))

def d(net): return net.double().eval()

@pytest.mark.parametrize('f,options,message', [
    (lrp, dict(epsilon=-1), 'epsilon is -1, expected at least 0'),
    (lrp, dict(composite='epsilon-pluss'), "no composite called 'epsilon-pluss'; did you mean 'epsilon-plus'?"),
    (lrp, dict(composite={'9.0': Gamma()}), "no layer or kind of layer called '9.0'"),
    (lrp, dict(composite={'conv': 'gamma'}), "the composite gives '0.0' 'gamma', expected one of the rules: Zero, Epsilon, Gamma, AlphaBeta, ZPlus, ZBox, Flat"),
    (lrp, dict(composite=lambda p: Gamma()), "Gamma needs weights, and 'add' (sum) has none: expected Epsilon or Zero"),
    (lrp, dict(composite={'2.0': ZBox()}), "ZBox needs bounds (low, high) at '2.0'"),
    (lrp, dict(model=d(nn.Sequential(CONV(), nn.BatchNorm2d(4, track_running_stats=False), *head()))), "layer '1' normalises by the batch it is in"),
    (lrp, dict(model=d(Soft())), "LRP has no rule for 'softmax' (softmax) of test_relevance.py:"),
    (lrp, dict(model=d(Over())), "LRP has no rule for 'div' (div with what the image decides in another place than usual) of test_relevance.py:"),
    (deeplift, dict(model=d(Soft())), "DeepLIFT has no rule for 'softmax' (softmax) of test_relevance.py:"),
    (deeplift, dict(model=d(nn.Sequential(CONV(), nn.BatchNorm2d(4, track_running_stats=False), *head()))), "layer '1' normalises by the batch it is in"),
    (deeplift, dict(baseline='meen'), "no baseline called 'meen'; did you mean 'mean'?"),
    (deeplift, dict(target='los'), "called 'los'; did you mean 'loss'?"),
    (deeplift_shap, dict(samples=9), 'samples is 9, expected 1 to 4, the images of the background'),
    (deeplift_shap, dict(samples=0), 'samples is 0, expected 1 to 4'),
    (deeplift_shap, dict(background=torch.zeros(2, 3, 8, 8).double()), 'the background is shape (2, 3, 8, 8); expected images of shape (B, 3, 16, 16)'),
    (deeplift_shap, dict(chunk=0), 'chunk is 0, expected at least 1 image at a time'),
    *[(f, dict(model=small().double().train()), 'the model is in training mode') for f in SCORES.values()],
], ids=lambda o: '')
def test_wrong_is_refused_in_a_sentence(f, options, message):
    x, y = images(4)
    with pytest.raises(ValueError) as e: f(**{**dict(model=small().double(), x=x, y=y), **options})
    assert re.search('.*'.join(map(re.escape, message.split('…'))), str(e.value)), str(e.value)

@pytest.mark.parametrize('make', [lambda: AlphaBeta(2, 2), lambda: AlphaBeta(0, -1), lambda: Gamma(-1), lambda: Epsilon(-1e-6), lambda: Epsilon(float('nan'))])
def test_rules_that_cannot_be(make):
    with pytest.raises(ValueError, match='expected'): make()

def test_a_layer_called_input_is_no_obstacle_to_its_own_relevance():
    net, (x, y) = d(Named()), images()
    assert set(lrp(net, x, y)) == {'input'}
    with pytest.raises(ValueError, match="a module of this model is called 'input'"): lrp(net, x, y, pixels=True)

def test_a_rule_is_an_entry_in_a_table():
    "Another operation, taught"
    class Rounded(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.out = CONV(), nn.Sequential(*head())
        def forward(self, x): return self.out(self.conv(x).floor())
    net, (x, y) = d(Rounded()), images()
    with pytest.raises(ValueError, match=r"LRP has no rule for 'floor' \(floor\) of test_relevance.py:\d+ def forward"): lrp(net, x, y)
    before = OPS['floor']
    OPS['floor'] = replace(before, lrp=OPS['relu'].lrp)
    try: assert conservation(net, x, y).gap.max() < 1e-12
    finally: OPS['floor'] = before
