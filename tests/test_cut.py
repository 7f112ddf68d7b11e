"""Cut and silenced give the same on other people's networks, what can go goes, and what can't is said; with random networks out of the table's operations."""
import copy, warnings

import pytest, torch, torchvision
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from networks import restless
from test_graph import CASES, Net, conv, drawn
from xprune_nb.model import convs, cost
from xprune_nb.pruning import AsGraph, Live, cut, groups, plan, silence, silenced, silencer

images = lambda n=3, size=8: torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.double)
widths = lambda net: {n: m.out_channels for n, m in convs(net).items()}
numel = lambda net: sum(p.numel() for p in net.parameters())

def unsettled(net):
    "No scale is 1 and no shift 0"
    net = restless(copy.deepcopy(net)) # some share a layer
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d, nn.SyncBatchNorm)) and m.weight is not None:
            nn.init.uniform_(m.weight, .5, 1.5); nn.init.uniform_(m.bias, -.5, .5)
    return net.double()

def drawn_plan(net, ratio=.5, coupling='coupled', seed=0, shape=(3, 8, 8)):
    g = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(m.out_channels, generator=g) for n, m in convs(net).items()}
    return plan(scores, ratio, coupling=coupling, groups=groups(net, shape))

def same(net, small, p, x=None, norm='silent'):
    x = images() if x is None else x
    with torch.no_grad(), silenced(net, p, norm): want = net(x)
    with torch.no_grad(): have = small(x)
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)

# --- the networks of test_graph ---

STOPPED = dict(in_place_on_views=None, standardised='conv2d of b', view_of_a_width='softmax of', hook=None, negative_shift=None) # None: a constant in front of padding is no constant
WRITTEN = {'shapes_read', 'view_of_a_width', 'patches', 'sliced', 'padded', 'shuffled'}
REFUSED = {'weight_norm', 'old_weight_norm', 'spectral_norm', 'prune_mask'}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', [n for n in CASES if n not in REFUSED])
def test_what_goes_of_other_peoples_networks(name):
    net = unsettled(CASES[name][0]())
    p = drawn_plan(net)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        small = cut(net, p, (3, 8, 8))
    said = ' '.join(str(w.message) for w in said)
    same(net, small, p)
    assert isinstance(small, AsGraph) == (name in WRITTEN) == ('has widths written into it' in said)
    if name in STOPPED: assert (STOPPED[name] or '') in said and numel(small) <= numel(net)
    else: assert widths(small) == {n: int(k.sum()) for n, k in p.items()} and numel(small) < numel(net)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', sorted(REFUSED))
def test_weights_that_are_worked_out_are_refused(name):
    net = CASES[name][0]().eval()
    p = {n: torch.arange(m.out_channels) > 2 for n, m in convs(net).items()}
    for use in cut, Live:
        with pytest.raises(ValueError, match="the weight of 'a' is worked out from others"): use(net, p, (3, 8, 8))

# --- layers that were left whole ---

head = lambda c: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 4)]
class LayerNorm2d(nn.LayerNorm):
    def forward(self, x): return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
class Scaled(nn.Module):
    def __init__(self, form): super().__init__(); self.gamma, self.form = nn.Parameter(torch.rand(8).view(form if form != 'later' else -1)), form
    def forward(self, x): return x*(self.gamma.view(1, -1, 1, 1) if self.form == 'later' else self.gamma)
between = lambda *layers, c=8: lambda: nn.Sequential(conv(3, 8), *layers, nn.ReLU(), conv(c, 6), nn.ReLU(), *head(6))
LAYERS = dict(
    group_norm=between(nn.GroupNorm(2, 8)), group_norm_of_one=between(nn.GroupNorm(8, 8)), layer_norm=between(LayerNorm2d(8)), instance_norm=between(nn.InstanceNorm2d(8)), instance_norm_affine=between(nn.InstanceNorm2d(8, affine=True)),
    instance_norm_tracking=between(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), sync_batch_norm=between(nn.SyncBatchNorm(8)), prelu=between(nn.PReLU(8)), transposed=between(nn.ConvTranspose2d(8, 8, 2, 2)),
    transposed_depthwise=between(nn.ConvTranspose2d(8, 8, 2, 2, groups=8, bias=False)), pixel_shuffle=between(nn.PixelShuffle(2), c=2), pixel_unshuffle=between(nn.PixelUnshuffle(2), c=32), layer_scale=between(Scaled((8, 1, 1))), layer_scale_1=between(Scaled((1, 8, 1, 1))),
    layer_scale_viewed=between(Scaled('later')), upsample=between(nn.Upsample(scale_factor=2)), channel_shuffle=between(nn.ChannelShuffle(2)),
    flat_norm=lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), nn.Flatten(), nn.BatchNorm1d(384), nn.Linear(384, 4)),
    means=lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), Mean(), nn.Linear(6, 4)))
class Mean(nn.Module):
    def forward(self, x): return x.mean(-1).mean(-1)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('norm', ['silent', 'alive'])
@pytest.mark.parametrize('coupling', ['coupled', 'independent'])
@pytest.mark.parametrize('name', LAYERS)
def test_layers_that_were_left_whole(name, coupling, norm):
    net = unsettled(LAYERS[name]())
    p = drawn_plan(net, coupling=coupling)
    small = cut(net, p, (3, 8, 8), norm)
    same(net, small, p, norm=norm)
    transposed = name == 'transposed' # its own eight filters are in no plan
    if norm == 'silent' and coupling == 'coupled': assert widths(small) == {n: int(k.sum()) for n, k in p.items()} and (transposed or numel(small) < .75*numel(net))

@pytest.mark.parametrize('kind', [nn.BatchNorm2d, nn.SyncBatchNorm, lambda c: nn.GroupNorm(2, c), lambda c: nn.InstanceNorm2d(c, affine=True)])
def test_a_silent_filter_is_0_behind_whatever_normalises_it(kind):
    net = unsettled(nn.Sequential(conv(3, 8), kind(8), nn.ReLU(), conv(8, 4), *head(4)))
    p = drawn_plan(net)
    silence(net, p)
    out = net[:2](images())
    assert out[:, ~p['0']].eq(0).all() and out[:, p['0']].abs().amax((0, 2, 3)).min() > 0

# --- as a graph ---

def written():
    "A slice and a view with their widths written in; batch norm and dropout"
    def f(s, x):
        h = F.relu(s.n(s.a(x)))
        return s.drop(s.b(torch.cat([h[:, 4:], F.relu(s.d(h[:, :4]))], 1)).view(len(x), 8*64))
    return unsettled(Net(f, 512, a=conv(3, 8), n=nn.BatchNorm2d(8), d=conv(4, 4), b=conv(8, 8), drop=nn.Dropout(.2)))

@pytest.mark.filterwarnings('ignore')
def test_a_network_that_runs_as_its_graph_is_one_like_any_other():
    net = written()
    p = drawn_plan(net)
    small = cut(net, p, (3, 8, 8))
    assert isinstance(small, AsGraph) and isinstance(small, Net) and 'as its exported graph' in repr(small) and list(small.state_dict()) == list(net.state_dict())
    for n in 1, 5: same(net, small, p, images(n))
    again = copy.deepcopy(small)
    for q in again.parameters(): nn.init.zeros_(q)
    again.load_state_dict(small.state_dict())
    assert again(images()).equal(small(images()))
    assert cost(small, (3, 8, 8)).macs.sum() == 64*27*4 + 64*18*2 + 64*36*4 + 256*4 and groups(small, (3, 8, 8)) == groups(again, (3, 8, 8)) != []
    smaller = cut(small, q := drawn_plan(small), (3, 8, 8)) # and once more
    same(small, smaller, q)
    mean_before = small.n.running_mean.clone()
    small.train()
    a, b = small(images()), small(images())
    assert not a.equal(b) and not small.n.running_mean.equal(mean_before)  # dropout draws, batch norm learns
    opt, losses = torch.optim.SGD(small.parameters(), .05), []
    small.drop.eval()
    for _ in range(4):
        opt.zero_grad(); loss = F.cross_entropy(small(images()), torch.arange(3)); loss.backward(); opt.step(); losses.append(loss.item())
    assert losses[-1] < losses[0] and all(q.grad is not None for q in small.parameters())

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['shapes_read', 'view_of_a_width', 'sliced', 'padded', 'chunked', 'shuffled', 'halves', 'in_place', 'lenet'])
def test_what_is_left_learns_the_same(name):
    "By the user's own code, which may need its widths: then they stay"
    net, x, y = unsettled(CASES[name][0]()), images(6), torch.arange(6) % 4
    p = drawn_plan(net)
    whole = silence(copy.deepcopy(net), p)
    live, zero = Live(net, p, (3, 8, 8)), silencer(whole, p)
    for m, after in (whole, zero), (live.net, live.hush):
        opt = torch.optim.SGD(m.train().parameters(), .05, momentum=.9)
        for _ in range(3): opt.zero_grad(); F.cross_entropy(m(x), y).backward(); opt.step(); after()
    torch.testing.assert_close(live.net(x), whole(x), rtol=1e-9, atol=1e-9)
    assert not isinstance(live.net, AsGraph)

# --- random networks ---

def law(seed, ratio, coupling):
    net = drawn(seed)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    try: p = drawn_plan(net, ratio, coupling, seed)
    except ValueError as e:
        assert 'without a filter' in str(e) or 'cannot be read' in str(e); return
    small = cut(net, p, (3, 8, 8))
    assert all(v.equal(before[k]) for k, v in net.state_dict().items())
    same(net, small, p)

@pytest.mark.filterwarnings('ignore')
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.sampled_from([.3, .6]), st.sampled_from(['coupled', 'independent']))
def test_random_networks(seed, ratio, coupling): law(seed, ratio, coupling)

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.floats(.1, .8), st.sampled_from(['coupled', 'independent']))
def test_many_random_networks(seed, ratio, coupling): law(seed, ratio, coupling)

# --- torchvision's ---

VISION = dict(mobilenet_v2=.50, shufflenet_v2_x0_5=.51, squeezenet1_1=.50, googlenet=.72, regnet_y_400mf=.54, densenet121=.49, efficientnet_b0=.51, resnext50_32x4d=.49)
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['shufflenet_v2_x0_5', *(pytest.param(n, marks=pytest.mark.slow) for n in VISION if n != 'shufflenet_v2_x0_5')])
def test_torchvision(name):
    "Cut = silenced, and at most this share of the parameters is left at coupled 0.3"
    torch.manual_seed(0)
    net = unsettled(torchvision.models.get_model(name, weights=None, num_classes=4, **({'init_weights': False} if name == 'googlenet' else {}))).float()
    p = drawn_plan(net, .3, shape=(3, 64, 64))
    small, x = cut(net, p, (3, 64, 64)), images(2, 64).float()
    with torch.no_grad(), silenced(net, p): want = net(x)
    with torch.no_grad(): assert (small(x)-want).abs().max() <= 1e-5*want.abs().max()
    assert numel(small)/numel(net) <= VISION[name]
