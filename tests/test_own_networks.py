"""Networks that other people write: every criterion against autograd and differences on the network itself, without our graph."""
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

from networks import close, images, restless
from test_graph import drawn
from xprune_nb.criteria.attribution import completeness
from xprune_nb.criteria import ATTRIBUTIONS, CRITERIA, ablation, attributions, score
from xprune_nb.model import convs
from xprune_nb.criteria.relevance import conservation, deeplift_maps

conv = lambda i, o, s=1, **k: nn.Conv2d(i, o, 3, s, 1, **k)
mean = lambda h: h.mean((2, 3))

class Net(nn.Module):
    "A function and layers; `fc` classifies, unless there is a mask or features are wanted"
    def __init__(self, f, c=6, **layers):
        super().__init__()
        self.f, self.fc = f, nn.Linear(c, 4)
        for k, m in layers.items(): self.add_module(k, m)
    def forward(self, x, mask=None, features=False):
        h = self.f(self, x)
        if mask is not None: h = h*mask
        return h if features else self.fc(mean(h) if h.ndim == 4 else h)

class Own(nn.Conv2d): pass

class Standardised(nn.Conv2d):
    def _conv_forward(self, x, w, b):
        return super()._conv_forward(x, (w - w.mean((1, 2, 3), keepdim=True))/(w.std((1, 2, 3), keepdim=True) + 1e-5), b)

def plain(s, x): return F.relu(s.b(F.relu(s.a(x))))

def lenet(s, x):
    x = F.max_pool2d(F.relu(s.a(x)), 2)
    x = F.max_pool2d(F.relu(s.b(x)), 2)
    return x.view(x.size(0), -1)

def statements(s, x):
    h = s.a(x)
    F.relu(h, inplace=True)
    o = s.b(h)
    o.add_(h)
    o += 1
    return o.relu_()

def squeezed(s, x):
    h = F.relu(s.a(x))
    gate = s.up(F.silu(s.down(F.adaptive_avg_pool2d(h, 1)))).sigmoid()
    return F.hardswish(s.b(h*gate))

def dense(s, x):
    h = s.a(x)
    h = torch.cat([h, s.b(F.relu(s.norm(h)))], 1)
    return F.relu(s.last(h))

def shuffled(s, x):
    p, q = F.relu(s.a(x)).chunk(2, 1)
    h = torch.cat([p, F.relu(s.b(q))], 1)
    return h.view(len(h), 2, 3, *h.shape[2:]).transpose(1, 2).reshape(h.shape)

def padded(s, x):
    h = F.relu(s.a(x))
    return F.relu(s.b(h) + F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))

def upsampled(s, x):
    h = F.max_pool2d(F.relu(s.a(x)), 2)
    return F.leaky_relu(s.b(F.interpolate(h, scale_factor=2, mode='bilinear') + s.d(x)), .1)

def normed(s, x): return F.gelu(s.b(F.relu(s.group(s.a(x)))))

def gated(s, x):
    h = F.relu(s.a(x))
    with torch.no_grad(): g = mean(h)[:, :, None, None].sigmoid()
    return F.relu(s.b(h*g + h.detach()))

def twice(s, x): return F.relu(s.b(F.relu(s.b(F.relu(s.a(x))))))

def hooked():
    net = Net(plain, a=conv(3, 6), b=conv(6, 6))
    net.a.register_forward_hook(lambda m, i, o: o + 1)
    return net

def shared():
    "Two convolutions with one weight"
    net = Net(lambda s, x: F.relu(s.d(F.relu(s.b(F.relu(s.a(x)))))), a=conv(3, 6), b=conv(6, 6), d=conv(6, 6))
    net.d.weight = net.b.weight
    return net

two = lambda f, **k: lambda: Net(f, **{**dict(a=conv(3, 6), b=conv(6, 6)), **k})
NETS = dict( # name -> network; whether everything but sums with weights is a ReLU, a maximum or a move
    lenet=(lambda: Net(lenet, 96, a=conv(3, 6), b=conv(6, 6)), True),
    optional_arguments=(two(plain), True),
    in_place=(two(statements), True),
    subclass=(lambda: Net(plain, a=Own(3, 6, 3), b=Own(6, 6, 3)), True),
    standardised=(lambda: Net(plain, a=conv(3, 6), b=Standardised(6, 6, 3)), True),
    weight_norm=(lambda: Net(plain, a=weight_norm(conv(3, 6)), b=conv(6, 6)), True),
    hook=(hooked, True),
    one_weight=(shared, True),
    squeeze_and_excitation=(two(squeezed, down=nn.Conv2d(6, 3, 1), up=nn.Conv2d(3, 6, 1)), False),
    dense=(lambda: Net(dense, a=conv(3, 4), norm=nn.BatchNorm2d(4), b=conv(4, 3), last=conv(7, 6)), False),
    shuffled=(lambda: Net(shuffled, a=conv(3, 6), b=conv(3, 3)), True),
    padded=(lambda: Net(padded, a=conv(3, 4), b=conv(4, 6, 2)), True),
    upsampled=(two(upsampled, d=conv(3, 6)), False),
    group_norm=(two(normed, group=nn.GroupNorm(2, 6)), False),
    no_gradient=(two(gated), False),
    padding_of_ones_own=(lambda: Net(plain, a=conv(3, 6, padding_mode='circular'), b=nn.Conv2d(6, 6, 3, padding='same')), True),
    runs_twice=(two(twice), True))
each_net = pytest.mark.parametrize('name', NETS)

def network(name):
    torch.manual_seed(1)
    net = restless(NETS[name][0]()).double()
    return net, *images(4)

class At:
    "Looks at each run of each convolution of the network itself, or changes what it puts out, before any hook of the user's"
    def __init__(self, net, change=lambda name, run, out: out):
        self.net, self.change, self.outs = net, change, {}
    def __enter__(self):
        def hook(name):
            def see(module, inputs, out):
                runs = self.outs.setdefault(name, [])
                out = self.change(name, len(runs), out)
                runs.append(out)
                return out.clone()
            return see
        self.hooks = [m.register_forward_hook(hook(n), prepend=True) for n, m in convs(self.net).items()]
        return self
    def __exit__(self, *error):
        for h in self.hooks: h.remove()

def passes(net, x, y, value='logit'):
    "conv -> [(output, gradient) of each run], by autograd"
    with torch.enable_grad(), At(net) as at:
        logits = net(x)
        out = logits.gather(1, y[:, None]).sum() if value == 'logit' else F.cross_entropy(logits, y, reduction='sum')
    flat = [(n, a) for n, runs in at.outs.items() for a in runs]
    found = {}
    for (n, a), g in zip(flat, torch.autograd.grad(out, [a for _, a in flat], allow_unused=True)):
        found.setdefault(n, []).append((a.detach(), torch.zeros_like(a) if g is None else g))
    return found

def added(runs_of): return {n: sum(runs) for n, runs in runs_of.items()}

@each_net
def test_gradient_times_activation(name):
    net, x, y = network(name)
    theirs = added({n: [a*g for a, g in runs] for n, runs in passes(net, x, y).items()})
    assert set(theirs) == set(convs(net))
    close(attributions('gradient_activation', net, x, y), theirs, 1e-10)

@each_net
def test_taylor(name):
    net, x, y = network(name)
    theirs = {n: sum((a*g).mean((2, 3)) for a, g in runs).abs().mean(0) for n, runs in passes(net, x, y, 'loss').items()}
    close(score('taylor', net, x, y), theirs, 1e-10)

@each_net
def test_paths(name):
    "Conductance and internal influence by the trapezoid, from a black image"
    net, x, y = network(name)
    points = [passes(net, t*x, y) for t in np.linspace(0, 1, 6)]
    influence = {n: sum((p[n][r][1]*(.1 if i in (0, 5) else .2) for i, p in enumerate(points) for r in range(len(runs)))) for n, runs in points[0].items()}
    steps = lambda n, r: sum((p[n][r][1] + q[n][r][1])/2*(q[n][r][0] - p[n][r][0]) for p, q in zip(points, points[1:]))
    flow = {n: sum(steps(n, r) for r in range(len(runs))) for n, runs in points[0].items()}
    close(attributions('internal_influence', net, x, y, steps=5), influence, 1e-10)
    close(attributions('conductance', net, x, y, steps=5), flow, 1e-10)
    close(attributions('conductance', net, x, y, steps=5, fold=False), flow, 1e-10)

@each_net
def test_integrated_gradients(name):
    "Each run's output replaced by hand, on the way from the black image's to the image's"
    net, x, y = network(name)
    (nodes, weights), theirs = np.polynomial.legendre.leggauss(3), {}
    with torch.no_grad(), At(net) as here: net(x)
    with torch.no_grad(), At(net) as there: net(0*x)
    for n, runs in here.outs.items():
        for r, (a, a0) in enumerate(zip(runs, there.outs[n])):
            total = 0
            for t, w in zip(nodes, weights):
                way = (a0 + (t+1)/2*(a - a0)).clone().requires_grad_()
                with torch.enable_grad(), At(net, lambda m, i, out: way if (m, i) == (n, r) else out):
                    out = net(x).gather(1, y[:, None]).sum()
                g, = torch.autograd.grad(out, way, allow_unused=True, materialize_grads=True)
                total = total + w/2*g
            theirs[n] = theirs.get(n, 0) + total*(a - a0)
    close(attributions('integrated_gradients', net, x, y, steps=3), theirs, 1e-10)

@each_net
def test_gradient_shap(name):
    "With the very same draws"
    net, x, y = network(name)
    draw = torch.Generator().manual_seed(2)
    which, place = torch.randint(4, (4, 3), generator=draw), torch.rand(4, 3, generator=draw, dtype=torch.float64)
    theirs, here = {}, passes(net, x, y)
    for s in range(3):
        start, t = x[which[:, s]], place[:, s].view(-1, 1, 1, 1)
        there, between = passes(net, start, y), passes(net, start + t*(x - start), y)
        for n in here:
            step = sum(between[n][r][1]*(here[n][r][0] - there[n][r][0]) for r in range(len(here[n])))
            theirs[n] = theirs.get(n, 0) + step/3
    close(attributions('gradient_shap', net, x, y, samples=3, seed=2), theirs, 1e-10)

@each_net
def test_ablation(name):
    "Every run of a filter's output set to 0; two filters of each layer"
    net, x, y = network(name)
    loss = lambda: F.cross_entropy(net(x), y)
    with torch.no_grad():
        before = loss()
        for n, s in ablation(net, x, y, filters=2, seed=5).items():
            for i in (~s.isnan()).nonzero().flatten().tolist():
                def silent(m, r, out): return torch.cat([out[:, :i], 0*out[:, i:i+1], out[:, i+1:]], 1) if m == n else out
                with At(net, silent): assert_close(s[i], loss() - before, rtol=1e-9, atol=1e-12)

ACTIVE = dict(squeeze_and_excitation=dict(b=F.hardswish, down=F.silu, up=torch.sigmoid, a=F.relu), upsampled=dict(a=F.relu, d=None, b=lambda t: F.leaky_relu(t, .1)),
              group_norm=dict(a=None, b=F.gelu), dense=dict(a=None, b=None, last=F.relu), padded=dict(a=F.relu, b=None), in_place=dict(a=F.relu, b=None),
              hook=dict(a=None, b=F.relu))

@each_net
def test_activations(name):
    net, x, y = network(name)
    with torch.no_grad(), At(net) as at: net(x)
    mean_size, share = score('activation', net, x, y), score('apoz', net, x, y)
    for n, runs in at.outs.items():
        f = ACTIVE.get(name, {}).get(n, F.relu)
        a = torch.cat([(f(r) if f else r).flatten(2) for r in runs], 2)
        assert_close(mean_size[n], a.abs().mean((0, 2)), rtol=1e-9, atol=1e-12)
        assert_close(share[n], (a > 0).double().mean((0, 2)), rtol=1e-12, atol=0)

# --- relevance ---

@each_net
def test_relevance_of_rectifiers_is_gradient_times_activation(name):
    "Where everything but sums with weights is a ReLU, a maximum or a move"
    net, x, y = network(name)
    if not NETS[name][1]: pytest.skip('it has other operations')
    close(attributions('lrp', net, x, y, composite='zero'), attributions('gradient_activation', net, x, y), 1e-9)

@each_net
@pytest.mark.parametrize('composite', ['epsilon', 'epsilon-plus', 'epsilon-alpha2-beta1', 'depth'])
def test_relevance_is_conserved(name, composite):
    net, x, y = network(name)
    table = conservation(net, x, y, composite=composite)
    assert table.every_path.sum() >= 3 and table.gap.max() < 1e-10*max(1, table.relevance.abs().max())

@each_net
@pytest.mark.parametrize('n', [1, 4])
def test_deeplift_is_complete(name, n):
    "Also for one image, whose strides channels_last leaves open"
    net, x, y = network(name)
    start = images(4)[0]
    table = completeness(net, x[:n], y[:n], baseline=start[:n], method=deeplift_maps)
    assert table.every_path.any() and table.gap.max() < 1e-10*max(1, table.change.abs().max())

@each_net
def test_single_and_double_precision_agree(name):
    net, x, y = network(name)
    for c in ATTRIBUTIONS:
        wide, single = score(c, net.double(), x, y), score(c, net.float(), x.float(), y)
        for n, s in wide.items(): assert (s - single[n]).abs().max() <= 1e-3*s.abs().max(), (c, n)

# --- random programs ---

@pytest.mark.parametrize('seed', range(16))
def test_random_programs(seed):
    "Out of the table's operations, in place or not: gradients are autograd's, relevance is conserved, contributions are complete"
    net, (x, y) = drawn(seed), images(3, 8)
    try: theirs = added({n: [a*g for a, g in runs] for n, runs in passes(net, x, y).items()})
    except RuntimeError: theirs = {}  # what it overwrites is needed on the way back: it has no gradient of its own
    ours = attributions('gradient_activation', net, x, y)
    for n, g in theirs.items():
        if n in ours: assert (ours[n] - g).abs().max() <= 1e-9*g.abs().max(), n
        else: assert not g.any(), n  # it does not reach the output, and is no operation of the graph
    kept = conservation(net, x, y)
    assert not kept.gap.max() > 1e-9*max(1, kept.relevance.abs().max())
    whole_way = completeness(net, x, y, method=deeplift_maps, baseline=images(3, 8)[0])
    assert not whole_way.gap.max() > 1e-9*max(1, whole_way.change.abs().max())

# --- what cannot be explained ---

class Autoencoder(nn.Sequential):
    def __init__(self): super().__init__(conv(3, 8, 2), nn.ReLU(), conv(8, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 8, 2, 2), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2, 2))

class Patches(nn.Module):
    "Four parts of an image, one after another in the batch"
    def __init__(self): super().__init__(); self.a, self.fc = conv(3, 8), nn.Linear(8, 4)
    def forward(self, x):
        p = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 8, 8)
        return self.fc(mean(self.a(p).relu()).view(len(x), -1, 8).mean(1))

IMAGES = [c for c in CRITERIA if c not in ('random', 'magnitude', 'magnitude_l2', 'fpgm', 'bn_scale')]

@pytest.mark.parametrize('criterion', IMAGES)
def test_an_image_for_an_output_is_no_class(criterion):
    with pytest.raises(ValueError, match=r'Autoencoder puts out \(1, 3, 16, 16\) for one image; expected \(1, classes\)'):
        score(criterion, Autoencoder().double().eval(), *images(4))

@pytest.mark.parametrize('criterion', IMAGES)
def test_parts_of_images_in_the_batch_are_refused_by_name(criterion):
    with pytest.raises(ValueError, match="layer 'a' does not put out one map an image and filter"):
        score(criterion, Patches().double().eval(), *images(4))

def test_a_wrapper_is_looked_through():
    net, x, y = network('optional_arguments')
    for c in 'lrp', 'taylor', 'magnitude': assert_close(score(c, nn.DataParallel(net), x, y), score(c, net, x, y))
