"""Criteria against other libraries and numbers without autograd, laws that all of them keep, and every kind of mistreatment."""
import re
from functools import cache

import numpy as np
import pandas as pd
import pytest
import scipy.spatial.distance, scipy.stats
import torch
import torch_pruning as tp
from captum.attr import LayerGradientXActivation
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision import models

from networks import NEAR, close, images, restless, sequential, small
from xprune_nb.criteria.attribution import folded
from xprune_nb.criteria import (ACTIVATIONS, ATTRIBUTIONS, CRITERIA, ablation, activated, activation_mean, aggregated, apoz, attributions, bn_scale, check_criterion,
                                check_scores, geometric_median, lrp, magnitude, magnitude_l2, options_of, overlap, score, spearman, taylor)
from xprune_nb.charts import COLOURS
from xprune_nb.model import batch_norms, build, convs
from xprune_nb.pruning import plan

EXPLAIN, WEIGHTS = tuple(ATTRIBUTIONS), ('random', 'magnitude', 'magnitude_l2', 'fpgm', 'bn_scale')
IMAGES = tuple(c for c in CRITERIA if c not in WEIGHTS)
class Twice(nn.Module):
    "One convolution that runs twice, sums by a function, an activation by a method"
    def __init__(self):
        super().__init__()
        self.first, self.conv, self.out = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1), nn.Linear(5, 4)
    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        x = self.conv(x).relu_()
        x = torch.add(x, self.conv(x).relu())
        return self.out(x.mean((2, 3)))

def thin(cfg, bn):
    "A VGG with an eighth of the channels and one linear layer"
    return nn.Sequential(models.vgg.make_layers([c if c == 'M' else c//8 for c in models.vgg.cfgs[cfg]], bn), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))

NETWORKS = dict(
    mobilenet_v2=lambda: build('mobilenet_v2', 4), vgg16=lambda: thin('D', False), vgg16_bn=lambda: thin('D', True), vgg19=lambda: thin('E', False),
    vgg19_bn=lambda: thin('E', True), resnet18=lambda: models.resnet18(num_classes=4),
    resnet50=lambda: models.resnet50(num_classes=4),
    sequential=sequential, small=small, twice=Twice)

def network(name, dtype=torch.float64):
    net = restless(NETWORKS[name]()).to(dtype)
    for m in net.modules(): # so that signals neither die out nor blow up on the way
        if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight)
    return net

def quick(criterion): return dict(filters=1) if criterion == 'ablation' else dict(steps=2) if 'steps' in options_of(CRITERIA[criterion]) else {}

# --- weights ---

def test_weights_alone_are_numpys_and_scipys():
    net = network('vgg19_bn')
    for n, c in convs(net).items():
        w = c.weight.detach().flatten(1).numpy()
        np.testing.assert_allclose(magnitude(net)[n], np.linalg.norm(w, 1, 1), rtol=1e-12)
        np.testing.assert_allclose(magnitude_l2(net)[n], np.linalg.norm(w, 2, 1), rtol=1e-12)
        np.testing.assert_allclose(geometric_median(net)[n], scipy.spatial.distance.cdist(w, w).sum(1), rtol=1e-10)

@pytest.mark.parametrize('ours,theirs', [
    ('magnitude', tp.importance.GroupMagnitudeImportance(1, 'first', None)), ('magnitude_l2', tp.importance.GroupMagnitudeImportance(2, 'first', lambda s: s.sqrt())),
    ('fpgm', tp.importance.FPGMImportance(1, 'first', None)), ('bn_scale', tp.importance.BNScaleImportance('first', None))], ids=lambda o: o if isinstance(o, str) else '')
def test_weights_alone_are_torch_prunings(ours, theirs):
    "The first layer of a group of Torch-Pruning's, each convolution being the first of its own"
    net = network('vgg16_bn')
    for c in convs(net).values(): c.weight.data.abs_()  # Torch-Pruning's FPGM takes absolute values first, the paper does not
    graph, s = tp.DependencyGraph().build_dependency(net, torch.zeros(1, 3, 32, 32).double()), score(ours, net, None, None)
    for n, c in convs(net).items():
        want = theirs(graph.get_pruning_group(c, tp.prune_conv_out_channels, list(range(c.out_channels))))
        assert_close(s[n], want.to(s[n]), rtol=1e-6, atol=0)  # theirs are made in float64, and then summed in float32

def test_a_batch_norm_without_scale_is_refused_by_name():
    net = sequential()
    with pytest.raises(ValueError, match='bn_scale: 2 of 2 convolutions have no batch norm with a scale behind them: 0, 3'): bn_scale(net)
    mixed = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False))
    with pytest.raises(ValueError, match='1 of 2 convolutions have no batch norm with a scale behind them: 2$'): score('bn_scale', mixed, None, None)

def test_random_is_the_seeds():
    net = small()
    assert_close(score('random', net, None, None, seed=5), score('random', net, None, None, seed=5), rtol=0, atol=0)
    assert not torch.equal(score('random', net, None, None, seed=5)['0.0'], score('random', net, None, None, seed=6)['0.0'])
    torch.manual_seed(1); a = torch.rand(1)
    torch.manual_seed(1); score('random', net, None, None); assert torch.equal(a, torch.rand(1))  # the global generator is left alone

# --- activations ---

def put_out(net, x, layers):
    "What layers put out, by plain hooks: name -> all runs, (N,O,-1)"
    kept, hooks = {}, [m.register_forward_hook(lambda m, i, out, n=n: kept.setdefault(n, []).append(out.clone().flatten(2))) for n, m in layers.items()]
    try:
        with torch.no_grad(): net(x)
    finally:
        for h in hooks: h.remove()
    return {n: torch.cat(v, 2).numpy() for n, v in kept.items()}

@pytest.mark.parametrize('name,act', [('vgg16_bn', F.relu), ('vgg16', F.relu), ('twice', F.relu), ('mobilenet_v2', F.relu6), ('resnet18', F.relu)])
def test_activations_by_plain_hooks(name, act):
    net, (x, y) = network(name), images(3, 32)
    norms = batch_norms(net)
    out = put_out(net, x, {n: net.get_submodule(norms.get(n, n)) for n in convs(net)})
    bare = lambda n: name == 'mobilenet_v2' and re.fullmatch(r'features\.\d+\.conv\.(2|1)', n) or name == 'resnet18' and re.search(r'conv2|downsample', n)
    assert sum(bool(bare(n)) for n in convs(net)) == dict(mobilenet_v2=17, resnet18=11).get(name, 0)
    mean, share = activation_mean(net, x, chunk=2), apoz(net, x, chunk=2)
    for n, a in out.items():
        if not bare(n): a = act(torch.from_numpy(a)).numpy()
        np.testing.assert_allclose(mean[n], abs(a).mean((0, 2)), rtol=1e-10, atol=1e-12*abs(a).max())  # a small output is a sum of large terms, rounded, 52 layers deep
        np.testing.assert_allclose(share[n], (a > 0).mean((0, 2)), rtol=1e-12)
        if not bare(n): np.testing.assert_allclose(share[n], 1 - (a == 0).mean((0, 2)), rtol=1e-12)  # the paper's

def test_which_activation_belongs_to_a_filter():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d, self.relu = *(nn.Conv2d(3, 3, 1) for _ in range(4)), nn.ReLU(inplace=True)
        def forward(self, x):
            x = F.leaky_relu(self.a(x), .2, inplace=True)
            b = self.b(x)
            x = torch.relu(b) + b  # used twice: it goes on by itself, too
            x = self.relu(self.c(x)).sigmoid()
            return self.d(x).flatten(1)
    net = Net().eval()
    program = folded(net, (3, 4, 4))
    found = {program.filters[run]: (run, act) for run, act in activated(program).items()}
    assert {n: program.graph[act].op for n, (_, act) in found.items()} == dict(a='leaky_relu', b='conv2d', c='relu', d='conv2d')
    assert found['c'][1] != found['b'][1] == found['b'][0]
    with torch.no_grad(): net.a.weight[1] = 0; net.a.bias[1] = -1
    assert activation_mean(net, torch.randn(2, 3, 4, 4))['a'][1].item() == pytest.approx(.2)
    assert 'conv2d' not in ACTIVATIONS and 'prelu' in ACTIVATIONS

# --- taylor ---

@pytest.mark.parametrize('dtype', NEAR)
@pytest.mark.parametrize('name', ['small', 'resnet18', 'vgg16_bn'])
def test_taylor_is_captums(name, dtype):
    "Gate behind the batch norm; the loss by way of a network that puts it out"
    net, (x, y) = network(name, dtype), images(3, 32, dtype=dtype)
    for m in net.modules():
        if isinstance(m, (nn.ReLU, nn.ReLU6)): m.inplace = False  # captum's hooks keep what an activation then overwrites
    class Loss(nn.Module):
        def __init__(self): super().__init__(); self.net = net
        def forward(self, x): return F.cross_entropy(self.net(x), y, reduction='none')
    norms, loss, logit = batch_norms(net), taylor(net, x, y), taylor(net, x, y, what='logit', per_image=False)
    for n in list(convs(net))[::3]:
        layer = net.get_submodule(norms[n])
        theirs = [LayerGradientXActivation(m, layer).attribute(x, target=t).detach().mean((2, 3)) for m, t in ((Loss().eval(), None), (net, y))]
        close({n: loss[n]}, {n: theirs[0].abs().mean(0)}, 10*NEAR[dtype])  # images' gates cancel over positions: a digit goes
        close({n: logit[n]}, {n: theirs[1].mean(0).abs()}, 10*NEAR[dtype])

@pytest.mark.parametrize('name,what', [('twice', 'loss'), ('twice', 'logit'), ('resnet18', 'loss'), ('small', 'logit')])
def test_taylor_by_central_differences(name, what):
    "A gate is on every run of its filter; for the runs' sum of positions, over the positions of one run"
    net, (x, y) = network(name), images(2, 32)
    norms = batch_norms(net)
    @torch.no_grad()
    def watch(n, i, gate):
        def turn(m, inputs, out): out = out.clone(); out[:, i] *= gate; sizes.append(out[0, 0].numel()); return out
        sizes, hook = [], net.get_submodule(norms.get(n, n)).register_forward_hook(turn)
        try: logits = net(x)
        finally: hook.remove()
        return (F.cross_entropy(logits, y, reduction='none') if what == 'loss' else logits.gather(1, y[:, None])[:, 0])/sizes[0]
    for per_image in True, False:
        s = taylor(net, x, y, what=what, per_image=per_image, chunk=1)
        for n in list(convs(net))[::12 if name == 'resnet18' else 2] + ['conv']*(name == 'twice'):
            for i in 0, 4:
                change = (watch(n, i, 1+1e-6) - watch(n, i, 1-1e-6))/2e-6
                assert s[n][i].item() == pytest.approx((change.abs().mean() if per_image else change.mean().abs()).item(), rel=1e-5, abs=1e-9), n
    for n, v in taylor(net, x, y, normalise=True, what=what).items():
        w = taylor(net, x, y, what=what)[n].numpy()
        np.testing.assert_allclose(v, w/np.linalg.norm(w), rtol=1e-10)

# --- ablation ---

@pytest.mark.parametrize('name', ['small', 'sequential', 'twice', 'resnet18', 'vgg16', 'vgg19_bn', 'mobilenet_v2'])
def test_ablation_by_hand(name):
    "Weights, bias and batch norm set to zero in the network itself; some filters, spread over the layers"
    net, (x, y) = network(name), images(3, 32)
    norms = batch_norms(net)
    with torch.no_grad(): before = net(x)
    loss = lambda logits: F.cross_entropy(logits, y, reduction='none')
    logit = lambda logits: logits.gather(1, y[:, None])[:, 0]
    tried = 1 if name == 'mobilenet_v2' else 2
    some = {w: ablation(net, x, y, what=w, filters=tried, seed=3) for w in ('loss', 'logit')}
    sizes = {w: ablation(net, x, y, what=w, filters=tried, seed=3, per_image=True, chunk=2) for w in ('loss', 'logit')
             if (name, w) != ('mobilenet_v2', 'logit')} # 52 layers of it take seconds
    layers, scale = list(convs(net))[::max(1, len(convs(net))//4)], loss(before).mean().item()
    assert all((~s.isnan()).sum() == tried for t in (some, sizes) for v in t.values() for s in v.values())
    for n in layers:
        for i in (~some['loss'][n].isnan()).nonzero().flatten().tolist():
            parts = [p for m in (n, norms[n] if n in norms else n) for p in net.get_submodule(m).parameters()]
            were = [p.detach().clone() for p in parts]
            with torch.no_grad():
                for p in parts: p[i] = 0
                after = net(x)
                for p, w in zip(parts, were): p.copy_(w)
            for w, change in dict(loss=loss(after) - loss(before), logit=logit(before) - logit(after)).items():
                assert some[w][n][i].item() == pytest.approx(change.mean().item(), rel=1e-9, abs=1e-11*scale), (n, i)
                if w in sizes: assert sizes[w][n][i].item() == pytest.approx(change.abs().mean().item(), rel=1e-9, abs=1e-11*scale), (n, i)

def test_ablation_sees_both_runs_and_forgets_none():
    "In a network that is linear, silencing takes away what goes through the filter, and with two runs what is left is worked out on paper"
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.out = nn.Conv2d(1, 1, 1, bias=False), nn.Flatten()
        def forward(self, x): a = self.conv(x); return self.out(a + self.conv(a) + 10*x)
    net = Net().double().eval()
    net.conv.weight.data.fill_(3.)
    x, y = torch.full((1, 1, 1, 1), 2.).double(), torch.zeros(1, dtype=torch.int64)
    assert net(x).item() == 6 + 18 + 20 and ablation(net, x, y, what='logit')['conv'].item() == 6 + 18

def test_ablation_runs_only_what_can_change():
    net, (x, y) = network('small'), images(4)
    whole = ablation(net, x, y)
    with torch.no_grad(): net[2][1].weight[3] = 0; net[2][1].bias[3] = -1; net[0][1].weight[2] = 0; net[0][1].bias[2] = 7  # shut for ever; stuck at 6
    s = ablation(net, x, y)
    assert s['2.0'][3] == 0 and s['0.0'][2] != 0 and not torch.allclose(s['0.0'], whole['0.0'])

def test_ablation_of_some_filters():
    net, (x, y) = network('small'), images(4)
    whole, some, more, other = ablation(net, x, y), *(ablation(net, x, y, **kw) for kw in (dict(filters=3), dict(filters=100), dict(filters=3, seed=1)))
    for n, s in some.items():
        there = ~s.isnan()
        assert there.sum() == 3
        assert_close(s[there], whole[n][there], rtol=1e-10, atol=1e-12)
        assert_close(more[n], whole[n])
    assert any((some[n].isnan() != other[n].isnan()).any() for n in some)
    asked = score('ablation', net, x, y, filters=3)
    for n in some: assert_close(asked[n], some[n], equal_nan=True)
    with pytest.raises(ValueError, match='are not finite numbers, one a filter'): plan(asked, .5)  # what was left open decides nothing
    with pytest.raises(ValueError, match='scores of layer .* are not finite'): check_scores(some, net)
    with pytest.raises(ValueError, match='filters is 0, expected at least 1 of each layer, or None for all'): ablation(net, x, y, filters=0)

# --- laws ---

@pytest.mark.parametrize('criterion', IMAGES)
@pytest.mark.parametrize('chunk', [1, 2, 3, 7, 30, 10**6])
def test_chunks_change_nothing(criterion, chunk):
    net, (x, y) = network('small'), images(5)
    assert_close(score(criterion, net, x, y, steps=9, chunk=chunk), score(criterion, net, x, y, steps=9), rtol=1e-9, atol=1e-12)
    if criterion in EXPLAIN: assert [len(m) for m in attributions(criterion, net, x, y, chunk=chunk).values()] == [5]*5

@st.composite
def orders(draw): return draw(st.permutations(range(10))), draw(st.permutations(range(12))), draw(st.integers(0, 99))

@pytest.mark.parametrize('criterion', [c for c in CRITERIA if c != 'random'])
@settings(max_examples=6, deadline=None, database=None)
@given(orders())
def test_scores_follow_shuffled_filters(criterion, drawn):
    "The filters of a layer, and those of the expanding and depthwise layers of a block together, with all that takes their output"
    outer, inner, seed = drawn
    torch.manual_seed(seed)
    net, (x, y) = network('small'), images()
    before = score(criterion, net, x, y)
    with torch.no_grad():
        for conv, norm, order in (net[2][0], net[2][1], outer), (net[1].conv[0][0], net[1].conv[0][1], inner), (net[1].conv[1][0], net[1].conv[1][1], inner):
            for t in conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var: t.copy_(t[order].clone())
        for w, order in (net[-1].weight, outer), (net[1].conv[2].weight, inner): w.copy_(w[:, order].clone())
    want = {**before, '2.0': before['2.0'][outer], '1.conv.0.0': before['1.conv.0.0'][inner], '1.conv.1.0': before['1.conv.1.0'][inner]}
    if criterion in ('magnitude', 'magnitude_l2', 'fpgm'): assert_close(score(criterion, net, x, y), want, rtol=1e-12, atol=0)
    else: assert_close(score(criterion, net, x, y), want, rtol=1e-7, atol=1e-10)

@pytest.mark.parametrize('criterion', [c for c in CRITERIA if c not in ('random', 'fpgm')])
def test_dead_filters_score_zero(criterion):
    net, (x, y) = network('small'), images()
    with torch.no_grad():
        for t in net[2][0].weight, net[2][1].weight, net[2][1].bias, net[1].conv[2].weight, net[1].conv[3].weight, net[1].conv[3].bias: t[3] = 0
    for options in {}, dict(epsilon=0, per_image=True, aggregate='net', normalise=True):
        s = score(criterion, net, x, y, **options)
        assert s['2.0'][3] == 0 and (s['2.0'] != 0).sum() >= 5
        if criterion != 'internal_influence': assert s['1.conv.2'][3] == 0
        else: assert s['1.conv.2'][3] != 0  # where no activation holds it, the gradient does not know that a filter is dead: it asks what if it were not

def test_the_geometric_median_does_not_know_the_dead():
    w = torch.randn(9, 3, 2, 2); w[4] = 0
    conv = nn.Conv2d(3, 9, 2); conv.weight.data = w
    assert geometric_median(conv)[''][4].item() == pytest.approx(w.flatten(1).norm(dim=1).sum().item(), rel=1e-6)

@pytest.mark.parametrize('criterion', IMAGES)
@pytest.mark.parametrize('scale', [.01, 7.])
def test_scaling_the_images_and_the_first_weights_changes_nothing(criterion, scale):
    net, (x, y), start = network('small'), images(), torch.randn(1, 3, 16, 16).double()
    options = dict(baseline=start, background=start.expand(2, -1, -1, -1)) if criterion in EXPLAIN else {}
    before = score(criterion, net, x, y, **options)
    with torch.no_grad(): net[0][0].weight /= scale
    assert_close(score(criterion, net, scale*x, y, **{k: scale*v for k, v in options.items()}), before, rtol=1e-8, atol=1e-11)

@pytest.mark.parametrize('criterion', CRITERIA)
@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n == 'resnet50' else n for n in NETWORKS])
def test_networks(name, criterion):
    net, (x, y) = network(name, torch.float32), images(2, 32, dtype=torch.float32)
    if criterion == 'bn_scale' and (bare := [n for n in convs(net) if n not in batch_norms(net)]):
        with pytest.raises(ValueError, match=f'{len(bare)} of {len(convs(net))} convolutions have no batch norm with a scale behind them: {re.escape(", ".join(bare))}'):
            score(criterion, net, x, y)
        return
    def f(model, x, y):
        f.scores = {n: v.nan_to_num(nan=0.) if criterion == 'ablation' else v for n, v in CRITERIA[criterion](model, x, y, **quick(criterion)).items()}
        return f.scores
    check_criterion(f, net, x, y)
    assert any(v.std() > 0 for v in f.scores.values())

@pytest.mark.parametrize('criterion', IMAGES)
def test_activations_in_place_are_not_seen(criterion):
    net, (x, y) = network('sequential'), images()
    before = score(criterion, net, x, y)
    for m in net:
        if isinstance(m, nn.ReLU): m.inplace = False
    assert_close(score(criterion, net, x, y), before, rtol=0, atol=0)

@pytest.mark.parametrize('criterion', EXPLAIN)
def test_targets(criterion):
    net, (x, y) = network('small'), images(4)
    with torch.no_grad(): predicted = net(x).argmax(1)
    assert_close(score(criterion, net, x, None, target='predicted'), score(criterion, net, x, predicted))
    assert_close(score(criterion, net, x, None, target=2), score(criterion, net, x, torch.full((4,), 2)))
    assert not torch.allclose(score(criterion, net, x, y, target='loss')['0.0'], score(criterion, net, x, y)['0.0'])

def test_attributions_are_what_scores_are_made_of():
    net, (x, y) = network('small'), images(4)
    for c in EXPLAIN:
        maps = attributions(c, net, x, y, chunk=3)
        assert list(maps) == list(convs(net))
        for how in 'l1', 'signed': assert_close(aggregated([maps], how), score(c, net, x, y, aggregate=how))
    assert list(attributions('lrp', net, x, y, pixels=True)) == ['input', *convs(net)]

def test_tables_and_colours():
    assert list(CRITERIA) == ['random', 'magnitude', 'magnitude_l2', 'fpgm', 'bn_scale', 'activation', 'apoz', 'taylor', 'gradient_activation', 'integrated_gradients',
                              'internal_influence', 'conductance', 'lrp', 'deeplift', 'deeplift_shap', 'gradient_shap', 'ablation']
    assert set(ATTRIBUTIONS) < set(CRITERIA) and set(COLOURS) == set(CRITERIA) and len(set(COLOURS.values())) == len(CRITERIA)
    for c in EXPLAIN: assert {'target', 'chunk', 'aggregate'} <= set(options_of(CRITERIA[c])), c
    for f in CRITERIA.values(): assert f.__doc__

# --- the model is left as it was ---

@cache
def used():
    "A model that somebody is in the middle of using: some weights frozen, some with a gradient"
    net, (x, y) = network('small'), images(6)
    with torch.enable_grad(): net(x).sum().backward()
    net[0][0].weight.requires_grad_(False)
    return net, x, y

@pytest.mark.parametrize('criterion', CRITERIA)
@pytest.mark.parametrize('mode', [torch.no_grad, torch.enable_grad])
def test_model_is_left_as_it_was(criterion, mode):
    with mode(): check_criterion(CRITERIA[criterion], *used())

class Stopped(Exception): pass

class Fails(torch.utils._python_dispatch.TorchDispatchMode):
    "The classifier fails in the midst of a later pass forward, or of the pass back through it"
    def __init__(self, passes, back, error): super().__init__(); self.left, self.error, self.stopped = passes, error, False; self.op = torch.ops.aten.mm.default if back else torch.ops.aten.addmm.default
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.op:
            self.left -= 1
            if self.left < 0: self.stopped = True; raise self.error
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('criterion', IMAGES)
@pytest.mark.parametrize('error', [KeyboardInterrupt, Stopped])
@pytest.mark.parametrize('passes,back', [(1, False), (2, False), (3, False), (1, True), (2, True)])
def test_model_is_left_as_it_was_after_an_interruption(criterion, passes, back, error):
    net, x, y = used()
    folded(net, x)  # it is read and proved
    fails = Fails(passes, back, error)
    def interrupted(model, x, y):
        try:
            with fails: CRITERIA[criterion](model, x, y, chunk=2, **({} if criterion == 'ablation' else quick(criterion)))
        except error: pass
        return magnitude(model)
    check_criterion(interrupted, net, x, y)
    backwards = criterion not in ('activation', 'apoz', 'ablation')
    assert fails.stopped == (backwards or not back)  # it was interrupted, that is to say

def test_model_is_left_as_it_was_when_a_consumer_fails():
    net, x, y = used()
    for c in EXPLAIN:
        def careless(model, x, y):
            for maps in ATTRIBUTIONS[c](model, x, y, chunk=11): break  # and the generator is left hanging
            careless.maps = maps
            return magnitude(model)
        check_criterion(careless, net, x, y)

# --- what is asked for wrongly ---

X, Y = images(4)
CONV = lambda **kw: nn.Conv2d(3, 4, 3, **kw)
head = lambda c=4: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 4)]

class Idle(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.idle, self.out = CONV(), CONV(), nn.Sequential(*head())
    def forward(self, x): return self.out(self.conv(x))

class Fork(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.norm, self.out = CONV(), nn.BatchNorm2d(4), nn.Sequential(*head())
    def forward(self, x): return self.out(self.norm(self.conv(x if x.mean() > 9 else -x)))

class Sums(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.out = CONV(), nn.Sequential(*head())
    def forward(self, x): x = self.conv(x); return self.out(x.cumsum(1))

def d(net): return net.double().eval()
def nan(x, i): x = x.clone(); x[i, 0, 0, 0] = float('nan'); return x

def says(message, call):
    with pytest.raises(ValueError) as e: call()
    assert re.search('.*'.join(map(re.escape, message.split('…'))), str(e.value)) and '\n' not in message, str(e.value)

BAD = [
    (dict(model=small().double().train()), 'the model is in training mode…call model.eval() first'),
    (dict(model=nn.Sequential(nn.Flatten(), nn.Linear(768, 4)).double().eval()), 'Sequential has no 2-D convolution'),
    (dict(model=d(nn.Sequential(CONV()))), 'Sequential puts out (1, 4, 14, 14) for one image; expected (1, classes)'),
    (dict(model=d(nn.Sequential(CONV(), nn.BatchNorm2d(4, track_running_stats=False), *head()))), "layer '1' normalises by the batch it is in"),
    (dict(x=(X*9).to(torch.uint8)), 'images are shape (4, 3, 16, 16), torch.uint8…expected …torch.float64…Data.normalise'),
    (dict(x=X.float()), 'torch.float32, on cpu; expected …torch.float64'),
    (dict(x=X.numpy()), 'images are ndarray; expected shape'),
    (dict(x=X[0]), 'images are shape (3, 16, 16)'),
    (dict(x=X[:0], y=Y[:0]), 'images are shape (0, 3, 16, 16)…with N > 0'),
    (dict(x=X[:, :1]), 'Sequential does not take images of shape (1, 16, 16): '),
    (dict(x=nan(X, 2)), '1 of 4 images hold NaN or infinity (first: image 2)'),
    (dict(chunk=0), 'chunk is 0, expected at least 1 image at a time'),
    (dict(model=d(Idle())), "layer 'idle' has no scores; does it run when the model does?")]
BAD_LABELS = [
    (dict(y=Y[:3]), 'labels are shape (3,), torch.int64; expected shape (4,), torch.int64: one class number per image'),
    (dict(y=Y.float()), 'labels are shape …torch.float32; expected'),
    (dict(y=None), 'labels are NoneType; expected'),
    (dict(y=Y+2), 'target 4 is out of range: the model has 4 classes, 0 to 3'),
    (dict(y=Y-1), 'target -1 is out of range')]
BAD_TARGETS = [
    (dict(target=4), 'target 4 is out of range'),
    (dict(target='ture'), "called 'ture'; did you mean 'true'?"),
    (dict(aggregate='l3'), "no aggregation called 'l3'")]
ids = lambda o: o if isinstance(o, str) else ''
def bad(criterion, wrong): return lambda: score(criterion, **{**dict(model=small().double(), x=X, y=Y), **wrong})

@pytest.mark.parametrize('criterion', IMAGES)
@pytest.mark.parametrize('wrong,message', BAD, ids=ids)
def test_every_criterion_refuses(criterion, wrong, message): says(message, bad(criterion, wrong))

@pytest.mark.parametrize('criterion', [c for c in IMAGES if c not in ('activation', 'apoz')])
@pytest.mark.parametrize('wrong,message', BAD_LABELS, ids=ids)
def test_every_criterion_with_labels_refuses(criterion, wrong, message): says(message, bad(criterion, wrong))

@pytest.mark.parametrize('criterion', EXPLAIN)
@pytest.mark.parametrize('wrong,message', BAD_TARGETS, ids=ids)
def test_every_criterion_that_explains_refuses(criterion, wrong, message): says(message, bad(criterion, wrong))

@pytest.mark.parametrize('criterion', [c for c in IMAGES if c not in ('conductance', 'gradient_shap')])
def test_a_network_whose_batch_norms_cannot_be_found_is_refused(criterion):
    "Where an output is taken matters to these: in front of a batch norm the number is another one"
    says('the graph of Fork cannot be read at test_criteria.py:…return self.out(self.norm(self.conv(x if x.mean() > 9 else -x)))', bad(criterion, dict(model=d(Fork()))))

@pytest.mark.parametrize('criterion', ['lrp', 'deeplift', 'deeplift_shap'])
def test_a_step_without_a_rule_is_refused_by_name(criterion):
    rule = f'{dict(lrp="LRP").get(criterion, "DeepLIFT")} has no rule for '
    says(rule + "'cumsum' (cumsum) of test_criteria.py:…return self.out(x.cumsum(1))", bad(criterion, dict(model=d(Sums()))))
    says(rule + "'softmax' (softmax) of 1", bad(criterion, dict(model=d(nn.Sequential(CONV(), nn.Softmax(1), *head())))))

@pytest.mark.parametrize('criterion', ['gradient_shap', 'deeplift_shap'])
@pytest.mark.parametrize('background,message', [
    (X[:, :, :8], 'the background is shape (4, 3, 8, 16); expected images of shape (B, 3, 16, 16) with B > 0'), (X[0], 'the background is shape (3, 16, 16)'),
    (X[:0], 'the background is shape (0, 3, 16, 16)'), (7, 'the background is int'), (nan(X, 1), 'the background holds NaN or infinity')], ids=ids)
def test_a_wrong_background_is_refused(criterion, background, message): says(message, bad(criterion, dict(background=background)))

@pytest.mark.parametrize('criterion,wrong,message', [
    ('lp', {}, "no criterion called 'lp'; did you mean 'lrp'? There are: random, magnitude, magnitude_l2, "),
    ('lrp', dict(epsilon=-1), 'epsilon is -1, expected at least 0'),
    ('lrp', dict(epsilom=1), "no option called 'epsilom'; did you mean 'epsilon'?"),
    ('magnitude', dict(stepz=1), "no option called 'stepz'; did you mean 'steps'?"),
    ('taylor', dict(what='loss_'), "no thing to watch called 'loss_'; did you mean 'loss'? There are: loss, logit"),
    ('ablation', dict(what=1), "no thing to watch called '1'. There are: loss, logit"),
    ('conductance', dict(rule='simpson'), "no path rule called 'simpson'"),
    ('conductance', dict(steps=0), 'steps is 0, expected at least 1'),
    ('deeplift', dict(baseline='blak'), "no baseline called 'blak'; did you mean 'black'?"),
    ('internal_influence', dict(baseline=torch.zeros(4, 1, 16, 15)), 'the baseline has shape (4, 1, 16, 15), which does not broadcast to (4, 3, 16, 16)'),
], ids=ids)
def test_wrong_options_are_refused(criterion, wrong, message): says(message, bad(criterion, wrong))

@pytest.mark.parametrize('criterion', [c for c in CRITERIA if c not in ('random', 'bn_scale', 'apoz')])
def test_a_score_that_is_not_finite_names_layer_and_criterion(criterion):
    net = d(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), *head()))
    net[2].weight.data[1] = float('inf')
    with pytest.raises(ValueError, match=rf"{criterion}: \d of 4 scores of layer '\d' are not finite \(first: filter \d\)"): score(criterion, net, X, Y)

def test_scores_of_no_layer_are_refused():
    net = small()
    good = score('magnitude', net, None, None)
    with pytest.raises(ValueError, match="there are scores of 'fc', which is no convolution"): check_scores({**good, 'fc': torch.ones(4)}, net)
    with pytest.raises(ValueError, match=r"shape \(4, 1\), expected \(6,\): one score per filter"): check_scores({**good, '0.0': torch.ones(4, 1)}, net)
    assert list(check_scores(dict(reversed(good.items())), net)) == list(convs(net))

# --- two opinions compared ---

SCORES = st.lists(st.integers(-3, 9), min_size=2, max_size=30)

@settings(deadline=None, database=None)
@given(SCORES, st.randoms(use_true_random=False))
def test_spearman_is_scipys_and_pandas(values, random):
    a, b = torch.tensor(values).double(), torch.tensor(random.choices(values, k=len(values))).double()
    ours = spearman(dict(c=a), dict(c=b))['c']
    if len(set(a.tolist())) == 1 or len(set(b.tolist())) == 1: assert np.isnan(ours)
    else:
        assert ours == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
        assert ours == pytest.approx(pd.Series(a).corr(pd.Series(b), 'spearman'), abs=1e-12)

@settings(deadline=None, database=None)
@given(SCORES, st.randoms(use_true_random=False), st.floats(.01, .99))
def test_overlap_is_of_what_plan_would_remove(values, random, ratio):
    a, b = torch.tensor(values).double(), torch.tensor(random.choices(values, k=len(values))).double()
    k, ours, fair = round(ratio*len(a)), overlap(dict(c=a), dict(c=b), ratio)['c'], overlap(dict(c=a), dict(c=b), ratio, corrected=True)['c']
    if k == 0: assert np.isnan(ours) and np.isnan(fair)
    elif k == len(a): assert ours == 1 and np.isnan(fair)
    else:
        gone = [~plan(dict(c=v), ratio)['c'].numpy() for v in (a, b)]
        assert ours == pytest.approx((gone[0] & gone[1]).sum()/k) and fair == pytest.approx((ours - k/len(a))/(1 - k/len(a)))
        assert overlap(dict(c=a), dict(c=a), ratio, corrected=True)['c'] == pytest.approx(1)

def test_overlap_by_chance_is_zero_when_corrected():
    draw = lambda: {str(i): torch.rand(40) for i in range(400)}
    a, b = draw(), draw()
    assert overlap(a, b, .3).mean() == pytest.approx(.3, abs=.02) and overlap(a, b, .3, corrected=True).mean() == pytest.approx(0, abs=.02)
    assert spearman(a, b).mean() == pytest.approx(0, abs=.03) and list(spearman(a, b).index) == list(a)

def test_filters_without_a_score_are_passed_over():
    a, b = torch.tensor([1., torch.nan, 3., 2., 9.]), torch.tensor([2., 7., torch.nan, 4., 5.])
    assert spearman(dict(c=a), dict(c=b))['c'] == scipy.stats.spearmanr([1, 2, 9], [2, 4, 5]).statistic
    assert overlap(dict(c=a), dict(c=b), .34)['c'] == 1
    assert np.isnan(spearman(dict(c=a), dict(c=torch.full((5,), torch.nan)))['c'])
    says("layer 'c' has 5 scores in one and 4 in the other", lambda: spearman(dict(c=a), dict(c=b[:4])))
    says("the scores are of different layers: 'd' is in one of them only", lambda: overlap(dict(c=a), dict(c=a, d=a), .5))
    for ratio in 0, 1, -.5: says(f'ratio is {ratio}, expected a share of filters to remove in (0, 1)', lambda: overlap(dict(c=a), dict(c=b), ratio))
