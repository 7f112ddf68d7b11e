"""The graph is the network, whatever way it is written in; what it says of channels and costs is right; the network is left as it was."""
import copy, random, time

import pytest, torch, torch_pruning, torchvision
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune, weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.flop_counter import FlopCounterMode

from networks import restless
from xprune_nb import graph as room
from xprune_nb.graph import OPS, cost, follow, groups, may_be_negative, prove, read, run, stopped, tied, values

conv = lambda i, o, s=1, **k: nn.Conv2d(i, o, 3, s, 1, **k)
mean = lambda h: h.mean((2, 3))
images = lambda n=3, size=8: torch.randn(n, 3, size, size)

class Net(nn.Module):
    "A function and layers; `fc` classifies"
    def __init__(self, f, c=8, **layers):
        super().__init__()
        self.f, self.fc = f, nn.Linear(c, 4)
        for k, m in layers.items(): self.add_module(k, m)
    def forward(self, x, mask=None, features=False):
        h = self.f(self, x)
        if mask is not None: h = h*mask
        return h if features else self.fc(mean(h) if h.ndim == 4 else h)

# --- other people's networks: what each does, and the groups that are right ---

def statement(s, x):
    h = s.a(x)
    F.relu(h, inplace=True)
    o = s.b(h)
    o.add_(h)
    return o

def viewed(s, x):
    h = s.a(x)
    h[:, :4].relu_()
    h[:, 4:] += 1
    torch.sigmoid_(h.view(len(h), -1))
    return s.b(h)

def gated(s, x):
    h = s.a(x)
    with torch.no_grad(): g = mean(h)[:, :, None, None].sigmoid()
    return s.b(h*g + h.detach())

def width(s, x):
    h = F.relu(s.a(x))
    return s.b(h)/h.shape[1]**.5/s.a.out_channels

def flat(s, x):
    h = F.relu(s.a(x))
    n, c = h.shape[:2]
    return s.b(h).view(n, c, -1).softmax(-1).amax(-1)

def patches(s, x):
    p = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 4, 4)
    return mean(s.a(p).relu()).view(len(x), -1, 8).mean(1)

def chunked(s, x): p, q = F.relu(s.a(x)).chunk(2, 1); return torch.cat([p, F.relu(s.b(q))], 1)
def sliced(s, x): h = F.relu(s.a(x)); return torch.cat([F.relu(s.b(h[:, :4])), h[:, 4:]], 1)
def padded(s, x): h = F.relu(s.a(x)); return F.relu(s.b(h) + F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
def halves(s, x): p, q = s.a(x).chunk(2, 1); return s.b(p + q)
def shuffled(s, x): return s.b(s.a(x).view(len(x), 2, 4, 8, 8).transpose(1, 2).reshape(len(x), 8, 8, 8))
def shifted(s, x): return s.b(F.relu(s.a(x)) + s.shift)
def plain(s, x): return s.b(F.relu(s.a(x)))
def again(s, x): return s.b(s.a(s.a(x)))

class Standardised(nn.Conv2d):
    def _conv_forward(self, x, w, b):
        w = (w - w.mean((1, 2, 3), keepdim=True))/(w.std((1, 2, 3), keepdim=True) + 1e-5)
        return super()._conv_forward(x, w, b)

class Own(nn.Conv2d): pass

def hooked():
    net = Net(plain, a=conv(3, 8), b=conv(8, 8))
    net.a.register_forward_hook(lambda m, i, o: o + 1)
    return net

def masked():
    net = Net(plain, a=conv(3, 8), b=conv(8, 8))
    prune.l1_unstructured(net.a, 'weight', .5)
    return net

def shift():
    net = Net(shifted, a=conv(3, 8), b=conv(8, 8))
    net.shift = nn.Parameter(torch.full((1, 8, 1, 1), -.5))
    return net

def lenet():
    return Net(lambda s, x: F.relu(s.b(F.max_pool2d(F.relu(s.a(x)), 2)).view(x.size(0), -1)), 128, a=conv(3, 6), b=conv(6, 8))

two = lambda f, *more, **k: lambda: Net(f, a=conv(3, 8), b=conv(8, 8), **k)
sync = lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(
    conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(True), nn.Flatten(), nn.Linear(512, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)))
shared = conv(3, 3)
CASES = dict( # name -> network, groups
    in_place=(two(statement), [('a', 'b')]),
    in_place_on_views=(two(viewed), [('a',), ('b',)]),
    no_gradient=(two(gated), [('a',), ('b',)]),
    shapes_read=(two(width), [('a',), ('b',)]),
    view_of_a_width=(two(flat), [('a',), ('b',)]),
    optional_arguments=(two(plain), [('a',), ('b',)]),
    subclass=(lambda: Net(plain, a=Own(3, 8, 3), b=Own(8, 8, 3)), [('a',), ('b',)]),
    standardised=(lambda: Net(plain, a=conv(3, 8), b=Standardised(8, 8, 3)), [('a',), ('b',)]),
    weight_norm=(lambda: Net(plain, a=weight_norm(conv(3, 8)), b=conv(8, 8)), [('a',), ('b',)]),
    old_weight_norm=(lambda: Net(plain, a=old_weight_norm(conv(3, 8)), b=conv(8, 8)), [('a',), ('b',)]),
    spectral_norm=(lambda: Net(plain, a=spectral_norm(conv(3, 8)), b=conv(8, 8)), [('a',), ('b',)]),
    prune_mask=(masked, [('a',), ('b',)]),
    hook=(hooked, [('a',), ('b',)]),
    sync_batch_norm=(sync, [('0',)]),
    negative_shift=(shift, [('a',), ('b',)]),
    lenet=(lenet, [('a',), ('b',)]),
    patches=(lambda: Net(patches, a=conv(3, 8)), [('a',)]),
    chunked=(lambda: Net(chunked, a=conv(3, 8), b=conv(4, 4)), [('a',), ('b',)]),
    sliced=(lambda: Net(sliced, a=conv(3, 8), b=conv(4, 4)), [('a',), ('b',)]),
    padded=(lambda: Net(padded, a=conv(3, 4), b=conv(4, 8, 2)), [('a', 'b[2:6]'), ('b[0:2]',), ('b[6:8]',)]),
    halves=(lambda: Net(halves, a=conv(3, 8), b=conv(4, 8)), [('a[0:4]', 'a[4:8]'), ('b',)]),
    shuffled=(lambda: Net(shuffled, a=conv(3, 8), b=conv(8, 8, groups=8)), None),
    runs_twice=(lambda: Net(again, a=conv(3, 3), b=conv(3, 8)), [('b',)]),  # a's channels are those that it reads, the image's
    one_weight=(lambda: Net(lambda s, x: s.d(s.b(s.a(x))), a=shared, b=shared, d=conv(3, 8)), [('d',)]),
    autoencoder=(lambda: nn.Sequential(conv(3, 8, 2), nn.ReLU(), conv(8, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 8, 2, 2), nn.ReLU(),
                                       nn.ConvTranspose2d(8, 3, 2, 2)), [('0',), ('2',)]),
    pixel_shuffle=(lambda: nn.Sequential(conv(3, 8), nn.PixelShuffle(2), conv(2, 4), nn.ReLU(), conv(4, 2)), None),
    all_convolutional=(lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()), [('0',)]))

@pytest.mark.parametrize('name', CASES)
def test_graph_is_the_network(name):
    make, right = CASES[name]
    net = restless(make())
    graph = read(net, (3, 8, 8))
    assert graph.batch is None
    for n in 1, 5: assert prove(graph, net, images(n)) < 1e-6  # any number of images
    last = images(4).contiguous(memory_format=torch.channels_last)
    if name == 'lenet': torch.testing.assert_close(run(graph, net, last), net(last.contiguous()))
    if right is not None: assert groups(graph) == right

def test_shuffles_go_by_steps():
    assert groups(read(CASES['shuffled'][0]().eval(), (3, 8, 8))) == [('a[0:4]', 'b[0:7:2]'), ('a[4:8]', 'b[1:8:2]')]
    four = groups(read(CASES['pixel_shuffle'][0]().eval(), (3, 8, 8)))
    assert four == [('0[0:5:4]', '0[1:6:4]', '0[2:7:4]', '0[3:8:4]'), ('2',)]

def test_any_arguments():
    class Any(Net):
        def forward(self, *xs, **flags): return super().forward(xs[0]) + torch.tensor([0., 1, 2, 3])
    net = Any(plain, a=conv(3, 8), b=conv(8, 8)).eval()
    assert prove(read(net, (3, 8, 8)), net, images()) == 0

def test_without_numbers_shapes_are_compared():
    with torch.device('meta'): net = CASES['in_place'][0]().eval()
    assert cost(read(net, (3, 8, 8))).equals(cost(read(CASES['in_place'][0]().eval(), (3, 8, 8))))

def test_wrappers_are_taken_off():
    net = CASES['in_place'][0]().eval()
    graph = read(net, (3, 8, 8))
    assert read(nn.DataParallel(net), (3, 8, 8)) is graph and read(torch.compile(net), (3, 8, 8)) is graph

def test_outputs_of_any_form():
    class Forms(Net):
        def forward(self, x): h = self.f(self, x); return dict(logits=self.fc(mean(h)), maps=(h, x))
    net = Forms(plain, a=conv(3, 8), b=conv(8, 8)).eval()
    x = images()
    torch.testing.assert_close(run(read(net, (3, 8, 8)), net, x), net(x))

def test_inference_mode_has_no_gradient_to_compare():
    net = CASES['in_place'][0]().eval()
    net.forward = torch.inference_mode()(net.forward)
    assert prove(read(net, (3, 8, 8)), net, images()) == 0

# --- proof ---

@pytest.mark.parametrize('op,wrong,line', [('relu', lambda x: x.clamp(min=-.01), 'values part at `relu_` (relu) of test_graph.py'),
                                           ('add', lambda a, b: a + 1.01*b, 'values part at `add_` (add) of test_graph.py')])
def test_a_broken_row_is_named(op, wrong, line, monkeypatch):
    net = CASES['in_place'][0]().eval()
    monkeypatch.setitem(OPS, op, room.Row('each', run=wrong))
    room._KEPT.clear()
    with pytest.raises(ValueError, match='is not the network') as e: read(net, (3, 8, 8))
    assert line in str(e.value)

def test_a_lost_region_is_named(monkeypatch):
    net = CASES['no_gradient'][0]().eval()
    monkeypatch.setitem(OPS, 'detach', room.Row('each', run=lambda x: x))
    room._KEPT.clear()
    with pytest.raises(ValueError, match='gradients part at `detach'): read(net, (3, 8, 8))

def test_what_cannot_be_read_is_refused_with_its_line():
    def branch(s, x):
        h = s.a(x)
        return s.b(h) if x.sum() > 0 else h
    with pytest.raises(ValueError, match=r'Net cannot be read at test_graph.py:\d+ return s.b\(h\) if x.sum'): read(two(branch)(), (3, 8, 8))
    with pytest.raises(ValueError, match='cannot be read'): read(two(lambda s, x: s.b(s.a(x).data))(), (3, 8, 8))

def test_a_loop_over_images_fixes_the_batch():
    net = two(lambda s, x: torch.stack([s.b(s.a(i[None]))[0] for i in x]))().eval()
    graph = read(net, (3, 8, 8))
    assert graph.batch == 2 and 'for batches of 2 only' in repr(graph)
    with pytest.raises(ValueError, match='a batch of 2 images written into it; this one has 5'): run(graph, net, images(5))

# --- read once ---

def test_one_structure_is_read_once(monkeypatch):
    net = CASES['in_place'][0]().eval()
    graph, read_anew, count = read(net, (3, 8, 8)), room._read, []
    monkeypatch.setattr(room, '_read', lambda *a: count.append(1) or read_anew(*a))
    nn.init.normal_(net.a.weight)
    other = CASES['in_place'][0]().train()
    assert read(net, (3, 8, 8)) is graph and read(other, (3, 8, 8)) is graph and other.training and not count
    handle = other.b.register_forward_hook(lambda m, i, o: 2*o)
    assert read(other, (3, 8, 8)) is not graph and len(count) == 1
    handle.remove()
    assert read(other, (3, 8, 8)) is graph
    other.a.stride = 2, 2
    other.b = conv(8, 8)
    with pytest.raises(Exception): other(images()) and read(other, (3, 8, 8)) and 1/0
    assert read(net, (3, 9, 9)) is not graph
    for i in range(2*room._MOST): room._KEPT[i] = None
    room._KEPT.clear()

def test_what_the_key_does_not_see_the_proof_does():
    class Sees(Net):
        def forward(self, x): return super().forward(x)*self.box[0]
    net = Sees(plain, a=conv(3, 8), b=conv(8, 8)).eval()
    class Box:
        value = 2.
        def __getitem__(self, i): return self.value
    net.box = Box()
    first = read(net, (3, 8, 8))
    net.box.value = 3.
    with torch.no_grad(): net.a.weight.add_(1)
    assert read(net, (3, 8, 8)) is not first and prove(read(net, (3, 8, 8)), net, images()) == 0

# --- left as it was ---

class Restless(Net):
    "Keeps, counts and appends; may be interrupted"
    stop = None
    def __init__(self):
        super().__init__(statement, a=conv(3, 8), b=conv(8, 8))
        self.log, self.calls, self.kept = [], 0, dict(old=1)
        self.register_buffer('count', torch.zeros(1))
        self.register_forward_hook(self.after)
    def after(self, m, i, o): self.log.append(o)
    def forward(self, x):
        self.calls += 1; self.count += 1
        self.seen = self.f(self, x); self.kept['new'] = self.seen
        if self.calls == self.stop: raise KeyboardInterrupt
        return self.fc(mean(self.seen))

def everything(net):
    plain = lambda v: dict(v) if isinstance(v, dict) else list(v) if isinstance(v, list) else v
    tensors = [(k, id(v), v.detach().clone(), v.requires_grad, v.grad) for k, v in net.state_dict(keep_vars=True).items()]
    return [{k: plain(v) for k, v in vars(m).items()} for m in net.modules()], tensors, torch.get_rng_state()

def same(a, b):
    assert a[0] == b[0]
    for p, q in zip(a[1], b[1]): assert p[:2] == q[:2] and p[2].equal(q[2]) and p[3:] == q[3:]
    assert a[2].equal(b[2])

@pytest.mark.parametrize('stop', [None, 1, 2, 3, 4])
def test_network_is_left_as_it_was(stop):
    net = Restless().train()
    net.a.eval(); net.b.weight.requires_grad_(False); net.stop = stop
    room._KEPT.clear()
    before = everything(net)
    try: read(net, (3, 8, 8))
    except KeyboardInterrupt: pass
    same(everything(net), before)

def test_watchers_see_no_stand_ins():
    net, met = CASES['in_place'][0]().eval(), []
    net.a.register_forward_hook(lambda m, i, o: met.append(type(o)))
    room._KEPT.clear()
    read(net, (3, 8, 8))
    assert {*met} <= {torch.Tensor}

# --- random networks ---

class Drawn(nn.Module):
    "A random program out of the table's operations, the same whenever it runs"
    def __init__(self, seed, steps=8):
        super().__init__()
        self.seed, self.steps, self.layers = seed, steps, nn.ModuleDict()
        self.built = False
        with torch.no_grad(): self(images(2))
        self.built = True
    def layer(self, make):
        name = f'l{self.n}'; self.n += 1
        if not self.built: self.layers[name] = make()
        return self.layers[name]
    def forward(self, x, mask=None):
        r, self.n = random.Random(self.seed), 0
        hs = [self.layer(lambda: conv(3, 8))(x)]
        for _ in range(self.steps): hs.append(self.step(r, r.choice(hs), hs))
        h = hs[-1] if mask is None else hs[-1]*mask
        return self.layer(lambda: nn.Linear(h.shape[1], 3))(mean(h))
    def step(self, r, h, hs):
        c = h.shape[1]
        fit = [o for o in hs if o.shape == h.shape]
        match r.randrange(20):
            case 0: return self.layer(lambda: conv(c, 8))(h)
            case 1: return self.layer(lambda: conv(c, c, groups=c))(h)
            case 2: return self.layer(lambda: conv(c, 8, groups=2 if c % 2 == 0 else 1))(h)
            case 3: return self.layer(lambda: restless(nn.BatchNorm2d(c)))(h)
            case 4: F.relu(h, inplace=True); return h
            case 5: return h.relu_()
            case 6: h += 1; return h
            case 7: o = h*1; o.add_(r.choice(fit)); return o
            case 8: return h + r.choice(fit)
            case 9: return torch.cat([h, r.choice([o for o in hs if o.shape[2:] == h.shape[2:]])], 1)[:, :16]
            case 10: return h.chunk(2, 1)[r.randrange(2)]*1 if c % 2 == 0 and c > 2 else h
            case 11: o = h*1; o[:, ::2].sigmoid_(); return o
            case 12: return h.view(h.shape[0], 2, c//2, *h.shape[2:]).transpose(1, 2).reshape(h.shape) if c % 2 == 0 else h.flip(1)
            case 13: return F.pad(h, (0, 0, 0, 0, 1, 1))[:, :c]
            case 14:
                with torch.no_grad(): g = h.mean(1, keepdim=True).sigmoid()
                return h*g
            case 15: return h*h.detach().tanh()
            case 16: return h*self.layer(lambda: nn.Conv2d(c, c, 1))(h.mean((2, 3), keepdim=True)).sigmoid()
            case 17: return self.layer(lambda: nn.Hardswish(inplace=True))(h)
            case 18: return F.leaky_relu(h - .1, .2)
            case 19: return F.hardtanh(h, 0, 6)

def drawn(seed):
    torch.manual_seed(seed)
    return Drawn(seed).double().eval()

def holds(seed):
    "Graph = network; what is never negative isn't; what changes is what the numbers say"
    net = drawn(seed)
    before = everything(net)
    graph = read(net, (3, 8, 8))
    same(everything(net), before)
    x = images().double()
    assert prove(graph, net, x) <= 1e-9
    found, signs = values(graph, net, x), may_be_negative(graph)
    for n, v in found.items():
        if not signs[n] and isinstance(v, torch.Tensor): assert not (v < 0).any(), n
    groups(graph), stopped(graph)
    reaches(graph, net, x, found)

@pytest.mark.parametrize('f', [lambda h: F.threshold(h, 0, -5.), lambda h: h.relu().clamp(max=-1), lambda h: h.relu().clamp_max(-1), lambda h: F.hardtanh(h.relu(), -2, -1)])
def test_a_bound_can_be_negative_itself(f):
    net = Net(lambda s, x: f(s.a(x)), a=conv(3, 8)).eval()
    graph = read(net, (3, 8, 8))
    last = graph['mean'].ins[0]
    assert (values(graph, net, images())[last] < 0).any() and may_be_negative(graph)[last]

def test_a_look_changes_no_version_of_a_buffer():
    "So that nobody takes the network for another one afterwards"
    net = restless(nn.Sequential(conv(3, 4), nn.BatchNorm2d(4)))
    before = [b._version for b in net.buffers()]
    with room.untouched(net): net(images())
    assert [b._version for b in net.buffers()] == before
    with room.untouched(net): net[1].running_mean += 1
    assert [b._version for b in net.buffers()] != before

def reaches(graph, net, x, found):
    "Another value in one channel that a convolution makes changes nothing but what has its number, up to the next that mixes"
    walk = follow(graph); one = tied(walk)
    made = [o for o in graph.ops if o.op == 'conv2d']
    op = made[len(made)//2]
    i = op.sizes[1]//2
    number = one[walk.who[op.name].flatten()[i].long()]
    def moved(*args, **kw): y = op.call(*args, **kw).clone(); y[:, i] += 1; return y
    other = room.replace(graph, ops=tuple(room.replace(o, call=moved) if o is op else o for o in graph.ops))
    behind, crossed = values(other, net, x), set()  # behind something that mixes, anything may change
    for o in graph.ops[graph.ops.index(op):]:
        mixes = o is not op and (room.row(o).kind in ('mixes', 'levels', 'stops') or o.name in walk.stops)
        if mixes or crossed & {*o.ins}: crossed.add(o.name); continue
        if not isinstance(found[o.name], torch.Tensor) or isinstance(walk.who[o.name], list): continue
        changed = (found[o.name] != behind[o.name]).any(0)
        mine = (one[walk.full(o.name)[0].long()] == number).expand_as(changed)
        assert not (changed & ~mine).any(), o

@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6))
def test_random_networks(seed): holds(seed)

@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6))
def test_many_random_networks(seed): holds(seed)

# --- torchvision's, with Torch-Pruning and torch's counter as oracles ---

def vision(name): return torchvision.models.get_model(name, weights=None, num_classes=4).eval()

def beside_torch_pruning(net, graph, size, each=3):
    "Channel by channel: what Torch-Pruning would remove together"
    together = {m: {*ms} for ms in room._members(follow(graph)).values() for m in ms}
    deps, names = torch_pruning.DependencyGraph().build_dependency(net, images(1, size), verbose=False), {m: n for n, m in net.named_modules()}
    for name in graph.convs:
        m = net.get_submodule(name)
        for i in random.sample(range(m.out_channels), min(each, m.out_channels)):
            group = deps.get_pruning_group(m, torch_pruning.prune_conv_out_channels, [i])
            theirs = {(names[d.target.module], j) for d, idx in group for j in idx
                      if deps.is_out_channel_pruning_fn(d.handler) and isinstance(d.target.module, nn.Conv2d)}
            assert together[name, i] == theirs, (name, i)

@pytest.mark.parametrize('name', ['mobilenet_v2', 'resnet18', *(pytest.param(n, marks=pytest.mark.slow) for n in (
    'densenet121', 'efficientnet_b0', 'mobilenet_v3_small', 'regnet_y_400mf', 'convnext_tiny', 'squeezenet1_1'))])
def test_torchvision(name):
    net = restless(vision(name))
    graph = read(net, (3, 64, 64))
    if name != 'squeezenet1_1': beside_torch_pruning(net, graph, 64)
    with FlopCounterMode(display=False) as counter: net(images(1, 64))
    table = cost(graph)
    assert table.macs.sum() == counter.get_total_flops()//2 and table.params.sum() == sum(p.numel() for p in net.parameters())
    start = time.perf_counter(); read(net, (3, 64, 64))
    assert time.perf_counter()-start < 1

@pytest.mark.parametrize('name', ['shufflenet_v2_x0_5'])
def test_what_torch_pruning_cannot_read(name):
    net = restless(vision(name))
    graph = read(net, (3, 64, 64))
    assert not stopped(graph)
    covered = {n: [] for n in graph.convs}
    for g in groups(graph):
        widths = set()
        for member in g:
            layer, _, part = member.partition('[')
            channels = range(net.get_submodule(layer).out_channels)
            if part: channels = channels[slice(*map(int, part[:-1].split(':')))]
            covered[layer] += channels; widths.add(len(channels))
        assert len(widths) == 1
    assert all(sorted(c) == [*range(net.get_submodule(n).out_channels)] for n, c in covered.items())

@pytest.mark.parametrize('net,macs', [
    (lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), 30_240),
    (lambda: Net(lambda s, x: F.relu(s.a(x)), a=weight_norm(nn.Conv2d(3, 8, 3, padding=1, bias=False))), 13_856),
    (lambda: Net(patches, a=conv(3, 8)), 13_856), (lambda: Net(plain, a=conv(3, 8), b=conv(8, 8, groups=4)), 13_824 + 9_216 + 32)])
def test_cost(net, macs):
    net = net().eval()
    with FlopCounterMode(display=False) as counter: net(images(1))
    assert cost(read(net, (3, 8, 8))).macs.sum() == macs == counter.get_total_flops()//2
