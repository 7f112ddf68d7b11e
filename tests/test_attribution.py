"""The engine and the path methods against captum, against numbers without autograd, and under every kind of mistreatment."""
import copy, subprocess, sys
from functools import cache

import numpy as np
import pytest
import torch
from captum import attr as captum
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close
from torchvision import models

from networks import NEAR, Twice, Untraceable, close, head, images, mobile, out_of_place, restless, sequential, small, torchvisions, whole
from xprune_nb.criteria.attribution import (AGGREGATIONS, BASELINES, QUADRATURES, aggregated, completeness, conductance, conductance_maps, folded,
                                   gradient_activation_maps, gradient_shap_maps, integrated_gradients_maps, internal_influence_maps,
                                   on_every_path, outputs_of, rest, start_of)
from xprune_nb.graph import Ref, read
from xprune_nb.model import batch_norms, convs

METHODS = dict(gradient_activation=gradient_activation_maps, internal_influence=internal_influence_maps, conductance=conductance_maps,
               integrated_gradients=integrated_gradients_maps, gradient_shap=gradient_shap_maps)
each_method = pytest.mark.parametrize('maps', METHODS.values(), ids=METHODS.keys())

def norms(net): return {n: net.get_submodule(b) for n, b in batch_norms(net).items()}
def at_norms(net): return {**convs(net), **norms(net)}  # the place where ours measures: behind the batch norm, if there is one

# --- captum, one layer a call ---

NETS = dict(sequential=sequential, mobile=small)
each_net = pytest.mark.parametrize('make', NETS.values(), ids=NETS.keys())
each_dtype = pytest.mark.parametrize('dtype', NEAR)

def by_captum(kind, layers, net, x, y, start, **kw): return {n: kind(net, m).attribute(x, start, target=y, **kw).detach() for n, m in layers(net).items()}

@each_net
@each_dtype
def test_gradient_times_activation_is_captums(make, dtype):
    net, (x, y) = out_of_place(make().to(dtype)), images(dtype=dtype)
    theirs = {n: captum.LayerGradientXActivation(net, m).attribute(x, target=y).detach() for n, m in at_norms(net).items()}
    close(whole(gradient_activation_maps(net, x, y)), theirs, NEAR[dtype])

CAPTUMS = dict(gauss='gausslegendre', left='riemann_left', right='riemann_right', middle='riemann_middle')
# captum keeps points and weights as float32 numbers, also for a float64 network: 6e-8 relative each
each_rule = pytest.mark.parametrize('rule,method', CAPTUMS.items())

@each_net
@each_dtype
@each_rule
def test_internal_influence_is_captums(make, dtype, rule, method):
    net, (x, y), start = out_of_place(make().to(dtype)), images(dtype=dtype), torch.randn(1, 3, 16, 16, dtype=dtype)
    theirs = by_captum(captum.InternalInfluence, at_norms, net, x, y, start, n_steps=7, method=method)
    close(whole(internal_influence_maps(net, x, y, steps=7, rule=rule, baseline=start)), theirs, max(2e-7, NEAR[dtype]))

@each_net
@each_dtype
@each_rule
def test_integrated_gradients_are_captums(make, dtype, rule, method):
    net, (x, y), start = out_of_place(make().to(dtype)), images(dtype=dtype), torch.randn(1, 3, 16, 16, dtype=dtype)
    theirs = by_captum(captum.LayerIntegratedGradients, convs, net, x, y, start, n_steps=7, method=method)
    close(whole(integrated_gradients_maps(net, x, y, steps=7, rule=rule, baseline=start)), theirs, max(2e-7, NEAR[dtype]))

def layer_gradients(net, layer, x, k):
    "By autograd, for one layer"
    with outputs_of({'it': layer}) as acts: logits = net(x)
    return acts['it'].detach(), torch.autograd.grad(logits.gather(1, k[:, None]).sum(), acts['it'])[0]

@each_net
def test_internal_influence_by_its_formula(make):
    "With numpy's nodes and weights in float64: to 1e-10"
    net, (x, y) = out_of_place(make().double()), images()
    nodes, weights = np.polynomial.legendre.leggauss(5)
    theirs = {n: sum(w/2*layer_gradients(net, m, (t+1)/2*x, y)[1] for t, w in zip(nodes, weights)) for n, m in at_norms(net).items()}
    close(whole(internal_influence_maps(net, x, y, steps=5, rule='gauss')), theirs, 1e-10)

@each_net
def test_integrated_gradients_by_their_formula(make):
    "The layer's output replaced by hand, in float64: to 1e-10"
    net, (x, y) = out_of_place(make().double()), images()
    nodes, weights = np.polynomial.legendre.leggauss(4)
    def at(layer, value):
        value = value.clone().requires_grad_()
        handle = layer.register_forward_hook(lambda *_: value)
        try: return torch.autograd.grad(net(x).gather(1, y[:, None]).sum(), value)[0]
        finally: handle.remove()
    theirs = {}
    for n, m in at_norms(net).items():
        a, a0 = (layer_gradients(net, m, v, y)[0] for v in (x, 0*x))
        theirs[n] = (a - a0)*sum(w/2*at(m, a0 + (t+1)/2*(a - a0)) for t, w in zip(nodes, weights))
    close(whole(integrated_gradients_maps(net, x, y, steps=4, rule='gauss')), theirs, 1e-10)

@each_net
@each_dtype
@pytest.mark.parametrize('rule,method', [('captum', 'gausslegendre'), ('left', 'riemann_trapezoid')])
def test_conductance_is_captums(make, rule, method, dtype):
    net, (x, y), start = out_of_place(make().to(dtype)), images(dtype=dtype), torch.randn(1, 3, 16, 16, dtype=dtype)
    theirs = by_captum(captum.LayerConductance, convs, net, x, y, start, n_steps=7, method=method)
    near = 1e-5 if method == 'riemann_trapezoid' else NEAR[dtype]  # captum's even points are float32 numbers
    for fold in True, False: close(whole(conductance_maps(net, x, y, steps=7, rule=rule, baseline=start, fold=fold)), theirs, near)

SOME = ['features.0.0', 'features.2.conv.1.0', 'features.5.conv.0.0', 'features.12.conv.2', 'features.18.0']

@each_dtype
def test_conductance_is_captums_on_mobilenet(dtype):
    "In float32 with the norms where captum has them: folded, some gates that stand on a kink fall to the other side"
    net, x, y = mobile(2, dtype)
    ours = whole(conductance_maps(net, x, y, steps=4, rule='captum', fold=dtype == torch.float64))
    theirs = {n: captum.LayerConductance(out_of_place(net), convs(net)[n]).attribute(x, target=y, n_steps=4).detach() for n in SOME}
    close({n: ours[n] for n in SOME}, theirs, NEAR[dtype])

def test_what_folding_does_in_single_precision():
    "Float64 is the truth; folded weights are rounded once more, and a few gates that stand on a kink fall to the other side"
    net, x, y = mobile(8, torch.float32)
    single = {fold: whole(conductance_maps(net, x, y, steps=5, fold=fold)) for fold in (True, False)}
    double = whole(conductance_maps(net.double(), x.double(), y, steps=5))
    off = {fold: max(((m[n] - double[n]).abs().sum()/double[n].abs().sum()).item() for n in double) for fold, m in single.items()}
    assert off[True] < 1e-3 and off[False] < 1e-3

@pytest.mark.parametrize('name', ['vgg', 'vgg_bn', 'resnet18', 'resnet50'])
def test_all_of_torchvisions_networks_agree_with_captum(name):
    "Shared activations in place, functional sums, float64: the first, a middle and the last convolution"
    torch.manual_seed(0)
    net, (x, y) = torchvisions()[name]().double(), images(2, 32)
    ours = {m: whole(maps(net, x, y, **kw)) for m, maps, kw in [('gxa', gradient_activation_maps, {}), ('cond', conductance_maps, dict(steps=3, rule='captum'))]}
    names = list(convs(net)); names = [names[0], names[len(names)//2], names[-1]]
    net = out_of_place(net)
    close({n: ours['gxa'][n] for n in names}, {n: captum.LayerGradientXActivation(net, at_norms(net)[n]).attribute(x, target=y).detach() for n in names}, 1e-10)
    close({n: ours['cond'][n] for n in names}, {n: captum.LayerConductance(net, convs(net)[n]).attribute(x, target=y, n_steps=3).detach() for n in names}, 1e-10)

@pytest.mark.parametrize('name', ['vgg16', 'vgg19_bn', 'resnet18', 'resnet50'])
def test_networks_of_full_size(name):
    "torchvision's, as they are: every method gives finite maps for every convolution, and the output stays"
    net, (x, y) = getattr(models, name)(num_classes=4).eval(), images(1, 32, dtype=torch.float32)
    assert_close(folded(net)(x), net(x), rtol=1e-4, atol=1e-4)
    for method, kw in [('gradient_activation', {}), ('conductance', dict(steps=1)), ('gradient_shap', dict(samples=1, background=0*x))]:
        maps = whole(METHODS[method](net, x, y, **kw))
        assert list(maps) and set(maps) == set(convs(net)) and all(m.isfinite().all() for m in maps.values())

# --- GradientSHAP ---

@each_net
def test_gradient_shap_is_captums_draw_by_draw(make, monkeypatch):
    "The same draws: ours are taken down and given to captum, image by image and sample by sample"
    net, (x, y), background = out_of_place(make().double()), images(), torch.randn(4, 3, 16, 16).double()
    draw, samples = torch.Generator().manual_seed(3), 5
    which, place = torch.randint(4, (3, samples), generator=draw), torch.rand(3, samples, generator=draw, dtype=torch.float64)
    theirs = {n: torch.zeros_like(m) for n, m in whole(gradient_activation_maps(net, x, y)).items()}
    from captum.attr._core.layer import layer_gradient_shap
    for s in range(samples):
        monkeypatch.setattr(np.random, 'uniform', lambda *a, s=s: place[:, s].numpy())
        for n, m in convs(net).items():
            method = layer_gradient_shap.LayerInputBaselineXGradient(net, m)
            theirs[n] += method.attribute(x, background[which[:, s]], target=y).detach()/samples
    for chunk in 256, 5, 2: close(whole(gradient_shap_maps(net, x, y, background, samples, seed=3, chunk=chunk)), theirs, 1e-10)

def test_gradient_shap_is_complete_on_average():
    net, (x, y) = small().double(), images()
    s = whole(gradient_shap_maps(net, x, y, x[:2] + 1, samples=4000))
    with torch.no_grad(): change = net(x).gather(1, y[:, None])[:, 0] - net(x[:2] + 1)[:, y].mean(0)
    assert_close(s['2.0'].sum((1, 2, 3)), change, rtol=.1, atol=.02)

# --- conductance without autograd, and its limits ---

def test_conductance_of_a_smooth_network_by_central_differences():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Softplus(), nn.Flatten(), nn.Linear(20, 2)).double().eval()
    x, (name, unit) = images(1, 6)[0], ('2', (3, 1, 0))
    @torch.no_grad()
    def unit_at(t):
        with outputs_of(convs(net)) as acts: net(t*x)
        return acts[name][(0, *unit)].item()
    @torch.no_grad()
    def logit_at(t, nudge):
        def push(module, inputs, out): out = out.clone(); out[(0, *unit)] += nudge; return out
        hook = convs(net)[name].register_forward_hook(push)
        try: return net(t*x)[0, 1].item()
        finally: hook.remove()
    h, ts = 1e-4, (np.arange(200) + .5)/200
    want = np.mean([(logit_at(t, h) - logit_at(t, -h))/(2*h) * (unit_at(t+h) - unit_at(t-h))/(2*h) for t in ts])
    for rule, steps, near in ('trapezoid', 200, 1e-4), ('middle', 200, 1e-4), ('gauss', 12, 1e-4):
        assert whole(conductance_maps(net, x, target=1, steps=steps, rule=rule))[name][(0, *unit)].item() == pytest.approx(want, rel=near)

def test_gauss_needs_few_steps_where_a_network_is_smooth():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Softplus(), nn.Flatten(), nn.Linear(20, 2)).double().eval()
    x, _ = images(2, 6)
    fine = whole(conductance_maps(net, x, target=1, steps=40, rule='gauss'))
    close(whole(conductance_maps(net, x, target=1, steps=20, rule='gauss')), fine, 1e-8)
    with pytest.raises(AssertionError): close(whole(conductance_maps(net, x, target=1, steps=20)), fine, 1e-8)

@pytest.mark.parametrize('rule', QUADRATURES)
def test_conductance_is_complete_in_the_limit(rule):
    net, (x, y) = small().double(), images()
    coarse, fine = (completeness(net, x, y, baseline=torch.ones(1).double(), steps=s, rule=rule) for s in (10, 1000))
    assert fine.gap.max() < 0.01*fine.change.abs().max() and fine.gap.max() < coarse.gap.max()/5
    assert fine.every_path.tolist() == [True, False, False, False, True] and fine.gap.isna().tolist() == [False, True, True, True, False]

def test_integrated_gradients_are_complete_and_so_is_the_loss():
    net, (x, y) = small().double(), images()
    for kw in dict(method=integrated_gradients_maps, steps=500), dict(method=integrated_gradients_maps, steps=500, target='loss'), dict(steps=2000, target='loss'):
        table = completeness(net, x, y, **kw)
        assert table.gap.max() < 5e-3*table.change.abs().max()

def test_flow_through_shared_channels_is_the_same():
    "Expanding and depthwise convolution are joined channel by channel: what flows through one flows through the other"
    net, (x, y) = small().double(), images()
    s = conductance(net, x, y, steps=2000, aggregate='signed')
    assert_close(s['1.conv.0.0'], s['1.conv.1.0'], rtol=0, atol=2e-3*s['1.conv.0.0'].abs().max().item())

def test_all_path_methods_of_a_linear_network_agree():
    "One convolution, no biases, no activations: each is weight times input, and any path does"
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(64, 4, bias=False)).double().eval()
    x, y = images(3, 6)
    want = whole(gradient_activation_maps(net, x, y))
    for maps in whole(conductance_maps(net, x, y, steps=1)), whole(integrated_gradients_maps(net, x, y, steps=1)), whole(gradient_shap_maps(net, x, y, 0*x[:1], samples=2)):
        assert_close(maps, want)

# --- laws ---

OPTIONS = dict(conductance=dict(steps=9), internal_influence=dict(steps=9), integrated_gradients=dict(steps=3), gradient_shap=dict(samples=4), gradient_activation={})
each = pytest.mark.parametrize('name', METHODS)
def run(name, net, x, y, **kw): return whole(METHODS[name](net, x, y, **OPTIONS[name], **kw))

@each
@pytest.mark.parametrize('chunk', [1, 2, 3, 7, 30, 10**6])
def test_chunks_change_nothing(name, chunk):
    net, (x, y) = small().double(), images(5)
    assert_close(run(name, net, x, y, chunk=chunk), run(name, net, x, y), rtol=1e-10, atol=1e-12)

@pytest.mark.parametrize('rule', QUADRATURES)
@settings(max_examples=20, deadline=None)
@given(steps=st.integers(1, 12), chunk=st.integers(1, 40), n=st.integers(1, 4))
def test_chunks_change_nothing_whatever_the_rule(rule, steps, chunk, n):
    net, x, y = tiny_and_images()
    want = whole(conductance_maps(net, x[:n], y[:n], steps=steps, rule=rule))
    assert_close(whole(conductance_maps(net, x[:n], y[:n], steps=steps, rule=rule, chunk=chunk)), want, rtol=1e-10, atol=1e-12)

@cache
def tiny_and_images():
    torch.manual_seed(0)
    return restless(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU6(), *head())).double(), *images(4, 5)

@each
def test_shuffled_filters_and_a_dead_one(name):
    net, (x, y) = small().double(), images()
    conv, norm, linear = net[2][0], net[2][1], net[-1]
    with torch.no_grad():
        for t in conv.weight, norm.weight, norm.bias: t[3] = 0
    order, before = torch.randperm(10), run(name, net, x, y)
    assert name == 'internal_influence' or before['2.0'][:, 3].abs().max() == 0  # influence asks what a unit could do
    with torch.no_grad():
        for t in conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var: t.copy_(t[order].clone())
        linear.weight.copy_(linear.weight[:, order].clone())
    assert_close(run(name, net, x, y), {**before, '2.0': before['2.0'][:, order]})

@each
def test_scaling_the_images_and_the_first_layer_back(name):
    "Images, baseline and background three times as large, the first weights a third: the same network, the same explanations"
    net, (x, y) = sequential().double(), images()
    start = {} if name == 'gradient_activation' else dict(background=x.flip(0)) if name == 'gradient_shap' else dict(baseline=x.flip(0))
    before = run(name, net, x, y, **start)
    with torch.no_grad(): net[0].weight /= 3
    assert_close(run(name, net, 3*x, y, **{k: 3*v for k, v in start.items()}), before)

@each
def test_activations_in_place_are_not_seen(name):
    net, (x, y) = sequential().double(), images()
    before = run(name, net, x, y)
    assert_close(run(name, out_of_place(net), x, y), before, rtol=0, atol=0)

@each
def test_a_convolution_that_runs_twice_adds_up(name):
    "As if there were two with the same weights"
    net, (x, y) = Twice().double().eval(), images()
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.one, self.two, self.out = net.conv, copy.deepcopy(net.conv), net.out
        def forward(self, x): return self.out(torch.relu(self.two(torch.relu(self.one(x)))))
    two = run(name, Two().eval(), x, y)
    assert_close(run(name, net, x, y), {'conv': two['one'] + two['two']})
    with pytest.raises(ValueError, match="layer 'conv' runs more than once a pass, on maps of different sizes"): run(name, Twice(stride=2).double().eval(), x, y)

def test_what_cannot_be_read_is_explained_where_that_can_be_done():
    "A branch on values: no graph says what the network does for another image"
    net, (x, y) = Untraceable().double().eval(), images()
    ours = whole(conductance_maps(net, x, y, steps=5, rule='captum'))
    net = out_of_place(net)
    close(ours, {n: captum.LayerConductance(net, m).attribute(x, target=y, n_steps=5).detach() for n, m in convs(net).items()}, 1e-10)
    normed = Untraceable(norm=True).double().eval()
    whole(conductance_maps(normed, x, y)); whole(gradient_shap_maps(normed, x, y))  # the place does not matter to them
    for maps in gradient_activation_maps, internal_influence_maps, integrated_gradients_maps:  # here it does
        with pytest.raises(ValueError, match=r'the graph of Untraceable cannot be read at networks.py:\d+ return self.out\(self.second'): whole(maps(normed, x, y))

def test_aggregations_by_numpy():
    a = torch.randn(5, 3, 4, 2).double()
    v = a.numpy()
    want = dict(l1=abs(v).sum((2, 3)), l2=(v**2).sum((2, 3))**.5, max=abs(v).max((2, 3)), net=abs(v.sum((2, 3))), signed=v.sum((2, 3)))
    assert set(want) == set(AGGREGATIONS)
    for how in AGGREGATIONS: np.testing.assert_allclose(aggregated([{'c': a[:2]}, {'c': a[2:]}], how)['c'], want[how].mean(0))

def test_targets():
    net, (x, _) = small().double(), images(4)
    predicted = net(x).argmax(1)
    for name in METHODS:
        assert_close(run(name, net, x, None, target='predicted'), run(name, net, x, predicted))
        assert_close(run(name, net, x, None, target=2), run(name, net, x, torch.full((4,), 2)))

@each_net
def test_the_loss_is_captums(make):
    net, (x, y) = out_of_place(make().double()), images()
    forward = lambda v: -nn.functional.cross_entropy(net(v), y, reduction='none')  # captum wants one output an image
    theirs = {n: -captum.LayerGradientXActivation(forward, m).attribute(x).detach() for n, m in at_norms(net).items()}
    close(whole(gradient_activation_maps(net, x, y, target='loss')), theirs, 1e-10)

def test_baselines():
    net, (x, y) = small().double(), images(4)
    same = lambda a, b: assert_close(conductance(net, x, y, baseline=a), conductance(net, x, y, baseline=b))
    same('mean', torch.zeros(1).double()); same('black', x.amin((0, 2, 3)).view(3, 1, 1)); same('other', x[[2, 3, 0, 1]])
    assert all((s == 0).all() for s in conductance(net, x, y, baseline=x).values())  # a path of no length
    flat = torch.ones(1, 3, 16, 16).double()
    assert_close(start_of(flat, 'blurred'), flat)  # nothing to blur
    spot = torch.zeros(1, 1, 17, 17).double(); spot[..., 8, 8] = 1
    assert start_of(spot, 'blurred').sum() == pytest.approx(1) and start_of(spot, 'blurred').max() < .1
    scores = {b: conductance(net, x, y, baseline=b)['2.0'] for b in BASELINES}
    assert all(not torch.allclose(scores[a], scores[b]) for a in scores for b in scores if a < b)
    with pytest.raises(ValueError, match="baseline 'other' takes another of the images given, and there is 1"): conductance(net, x[:1], y[:1], baseline='other')

def again(program, x, name, copies):
    "The rest of the network, on copies of what an operation puts out"
    kept, (after, needed) = program.values(x), rest(program, name)
    more = {n: kept[n].repeat(copies, *[1]*(kept[n].ndim-1)) for n in [*needed, name]}
    return after, after.goes_on(more, copies*len(x))

def test_the_rest_of_the_network():
    for net in sequential(), small(), torchvisions()['resnet18']():
        program, (x, _) = folded(net.double(), x := images(2, 32)[0]), images(2, 32)
        for name in program.filters:
            after, out = again(program, x, name, 3)
            assert_close(out, net(x).repeat(3, 1))
            assert name not in [o.name for o in after.ops] and len(after.ops) < len(program.ops)

def test_the_rest_finds_sizes_anew_and_knows_whose_rows_are_whose():
    class Viewed(nn.Module):
        "Rows that are no images stand between the image and the end of the network"
        def __init__(self): super().__init__(); self.a, self.b, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4*16, 4)
        def forward(self, x):
            n, x = x.shape[0], self.a(x)
            turned = x.transpose(0, 1).relu() # (C,n,H,W)
            return self.out((self.b(x) + turned.transpose(0, 1)).view(n, -1))
    net, x = Viewed().double().eval(), images(2, 4)[0]
    program = folded(net, x)
    for name in program.filters: assert_close(again(program, x, name, 3)[1], net(x).repeat(3, 1))

def test_half_precision_is_near():
    net, x, y = mobile(8, torch.float32)
    full, half = (conductance(net, x, y, precision=p) for p in (None, torch.bfloat16))
    assert all(h.dtype == torch.float32 for h in half.values())
    assert 1e-5 < np.median([((half[n] - full[n]).abs().mean()/full[n].mean()).item() for n in full]) < .1

def test_memory_depends_on_the_chunk_and_not_on_the_images():
    "Peak of a fresh process with few images, and with eight times as many"
    code = ('import resource, sys, torch; torch.set_num_threads(1)\n'
            'from xprune_nb.criteria.attribution import conductance; from xprune_nb.model import baseline\n'
            'net, x = baseline().net(), torch.randn(256, 3, 32, 32)\n'
            'conductance(net, x[:int(sys.argv[1])], target=0, steps=3, chunk=64)\n'
            'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)')
    few, many = (float(subprocess.run([sys.executable, '-W', 'ignore', '-c', code, n], capture_output=True, text=True, check=True).stdout) for n in ('32', '256'))
    assert many < few + 60  # MB; the maps of 224 more images would be 144 MB, their outputs and gradients many times that

# --- the model is left as it was ---

def state(net):
    return ({n: t.clone() for n, t in net.state_dict().items()}, [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()],
            [m.training for m in net.modules()], [[*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks] for m in net.modules()], [*net.named_modules()])

def used():
    "A model that somebody is in the middle of using: some weights frozen, some with a gradient"
    net, (x, y) = small().double(), images(6)
    with torch.enable_grad(): net(x).sum().backward()
    net[0][0].weight.requires_grad_(False)
    return net, x, y

@each
@pytest.mark.parametrize('mode', [torch.no_grad, torch.enable_grad])
def test_model_is_left_as_it_was(name, mode):
    net, x, y = used()
    before = state(net)
    with mode(): run(name, net, x, y)
    assert_same(state(net), before)

def assert_same(now, before):
    assert_close(now[0], before[0], rtol=0, atol=0)
    for (w, g), (want, grad) in zip(now[1], before[1]):
        assert w == want and (g is None) == (grad is None)
        if g is not None: assert_close(g, grad, rtol=0, atol=0)
    assert now[2:] == before[2:]

class Fails(torch.utils._python_dispatch.TorchDispatchMode):
    "The classifier fails in the midst of a later pass"
    def __init__(self, passes, error): super().__init__(); self.left, self.error = passes, error
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm.default:
            if not self.left: raise self.error
            self.left -= 1
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('passes', [1, 2])
@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('out of memory')])
def test_model_is_left_as_it_was_after_an_interruption(name, passes, error, monkeypatch):
    net, x, y = used()
    before = state(net)
    folded(net, x)  # it is read
    with pytest.raises(type(error)), Fails(passes, error): run(name, net, x, y, chunk=3)
    assert_same(state(net), before)

def test_model_is_left_as_it_was_when_a_consumer_fails():
    net, x, y = used()
    before = state(net)
    maps = conductance_maps(net, x, y, chunk=11)
    next(maps)  # and the generator is left hanging
    assert_same(state(net), before)

# --- programs ---

@pytest.mark.parametrize('name', ['small', *torchvisions()])
def test_folding_keeps_the_output_and_shares_what_it_can(name):
    net, (x, _) = (small if name == 'small' else torchvisions()[name])().double(), images(2, 32)
    look = folded(net, x)
    assert not any(o.op == 'batch_norm' for o in look.ops) and not any(t.requires_grad for t in look.held.values())
    assert_close(look(x), net(x), rtol=1e-9, atol=1e-9)
    kept = folded(net, x, norms=False)
    assert {p.data_ptr() for p in net.parameters()} <= {t.data_ptr() for t in kept.held.values()}
    assert list(look.filters.values()) == list(kept.filters.values()) and set(look.filters.values()) == set(convs(net))

def test_a_norm_is_folded_only_where_it_is_the_convolutions_own():
    class Both(nn.Module):
        "A norm whose convolution is used elsewhere as well"
        def __init__(self): super().__init__(); self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(*head())
        def forward(self, x): a = self.conv(x); return self.out(self.norm(a) + a)
    net, (x, y) = restless(Both()).double(), images()
    assert any(o.op == 'batch_norm' for o in folded(net, x).ops)
    assert_close(folded(net, x)(x), net(x))
    close(whole(conductance_maps(net, x, y, steps=3, rule='captum')), {'conv': captum.LayerConductance(net, net.conv).attribute(x, target=y, n_steps=3).detach()}, 1e-10)

def test_which_layers_are_on_every_path():
    for make, want in (small, {'0.0', '2.0'}), (sequential, {'0', '3'}):
        program = folded(make(), (3, 16, 16))
        assert {program.filters[o] for o in on_every_path(program) if o in program.filters} == want

def test_a_program_that_is_not_the_network_is_refused(monkeypatch):
    "Folding that forgets the shift"
    from xprune_nb.criteria import attribution
    whole_fuse = attribution.fuse_conv_bn_weights
    monkeypatch.setattr(attribution, 'fuse_conv_bn_weights', lambda w, b, mean, var, eps, scale, shift: whole_fuse(w, b, mean, var, eps, scale, 0*shift))
    with pytest.raises(ValueError, match=r'the program is not the network: `batch_norm` \(conv2d\) of 0.0 .* Nothing is returned'): folded(small().double(), (3, 16, 16))

def test_values_are_dropped_when_nobody_needs_them():
    "Of a chain of ten layers, no more than two outputs are there at a time"
    import gc, weakref
    net, seen, most = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(10)], *head(3)).eval(), [], []
    def watch(out):
        seen.append(weakref.ref(out)); most.append(sum(r() is not None for r in seen))
        return out
    program = folded(net, (3, 8, 8))
    with torch.no_grad(): program(images(2, 8, dtype=torch.float32)[0], dict.fromkeys(program.filters, watch))
    assert len(most) == 10 and max(most) == 2

# --- what is asked for wrongly ---

X, Y = images(4)
def d(*layers): return nn.Sequential(*layers).double().eval()
def nan(i): x = X.clone(); x[i, 0, 0, 0] = float('nan'); return x

@each
@pytest.mark.parametrize('wrong,message', [
    (dict(chunk=0), 'chunk is 0, expected at least 1 image at a time'),
    (dict(model=small().double().train()), 'the model is in training mode'),
    (dict(model=d(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), *head())), "layer '1' normalises by the batch it is in"),
    (dict(model=d(nn.Flatten(), nn.Linear(768, 4))), 'Sequential has no 2-D convolution'),
    (dict(model=d(nn.Conv2d(3, 4, 3))), r'Sequential puts out \(1, 4, 14, 14\) for one image; expected \(1, classes\)'),
    (dict(x=(X*9).to(torch.uint8)), r'images are shape \(4, 3, 16, 16\), torch.uint8.*expected .*torch.float64.*Data.normalise'),
    (dict(x=X.float()), 'torch.float32, on cpu; expected .*torch.float64'),
    (dict(x=X.numpy()), 'images are ndarray; expected shape'),
    (dict(x=X[0]), r'images are shape \(3, 16, 16\)'),
    (dict(x=X[:0], y=Y[:0]), r'images are shape \(0, 3, 16, 16\).*with N > 0'),
    (dict(x=X[:, :1]), r'Sequential does not take images of shape \(1, 16, 16\): '),
    (dict(x=nan(2)), r'1 of 4 images hold NaN or infinity \(first: image 2\)'),
    (dict(y=Y[:3]), r'labels are shape \(3,\), torch.int64; expected shape \(4,\), torch.int64: one class number per image'),
    (dict(y=Y.float()), 'labels are shape .*torch.float32; expected'),
    (dict(y=None), 'labels are NoneType; expected'),
    (dict(y=None, target='loss'), 'labels are NoneType; expected'),
    (dict(y=Y+2), 'target 4 is out of range: the model has 4 classes, 0 to 3'),
    (dict(y=Y-1), 'target -1 is out of range'),
    (dict(target=4), 'target 4 is out of range'),
    (dict(target='ture'), "called 'ture'; did you mean 'true'?"),
], ids=lambda o: o[:40] if isinstance(o, str) else '')
def test_wrong_is_refused_in_a_sentence(name, wrong, message):
    given = dict(dict(model=small().double(), x=X, y=Y), **wrong)
    with pytest.raises(ValueError, match=message): list(METHODS[name](given.pop('model'), given.pop('x'), given.pop('y'), **given))

@pytest.mark.parametrize('maps,wrong,message', [
    (conductance_maps, dict(rule='simpson'), "no path rule called 'simpson'"),
    (conductance_maps, dict(steps=0), 'steps is 0, expected at least 1'),
    (internal_influence_maps, dict(steps=0), 'steps is 0, expected at least 1'),
    (integrated_gradients_maps, dict(rule='gaus'), "no path rule called 'gaus'; did you mean 'gauss'?"),
    (conductance_maps, dict(baseline='blak'), "no baseline called 'blak'; did you mean 'black'?"),
    (conductance_maps, dict(baseline=torch.zeros(4, 1, 16, 15)), r'the baseline has shape \(4, 1, 16, 15\), which does not broadcast to \(4, 3, 16, 16\)'),
    (gradient_shap_maps, dict(samples=0), 'samples is 0, expected at least 1'),
    (gradient_shap_maps, dict(background=X[:0]), r'the background is shape \(0, 3, 16, 16\); expected images of shape \(B, 3, 16, 16\) with B > 0'),
    (gradient_shap_maps, dict(background=X[0]), r'the background is shape \(3, 16, 16\); expected'),
    (gradient_shap_maps, dict(background='train'), 'the background is str; expected'),
    (gradient_shap_maps, dict(background=nan(0)), 'the background holds NaN or infinity'),
])
def test_wrong_options_are_refused_in_a_sentence(maps, wrong, message):
    with pytest.raises(ValueError, match=message): list(maps(small().double(), X, Y, **wrong))

def test_a_scored_method_takes_its_options_and_no_others():
    assert conductance.__name__ == 'conductance' and 'flows through' in conductance.__doc__
    with pytest.raises(ValueError, match="no aggregation called 'l3'"): conductance(small().double(), X, Y, aggregate='l3')
    with pytest.raises(TypeError, match='step'): conductance(small().double(), X, Y, step=3)
