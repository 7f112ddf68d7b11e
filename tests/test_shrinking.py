"""What the cut is worth, and files: a fresh process, damage at every place, onnxruntime."""
import copy, json, math, re, subprocess, sys, textwrap
from functools import cache

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torchvision.models.mobilenetv2 import MobileNetV2

from xprune_nb.criteria import magnitude
from xprune_nb.data import load as load_data
from xprune_nb.model import build, convs, cost
from xprune_nb.pruning import cut, groups, plan, silenced
from xprune_nb.shrinking import KEY, described, export_onnx, latencies, load, report, save, size_on_disk

says = lambda *parts: '.*'.join(map(re.escape, parts))
same = lambda a, b: a.keys() == b.keys() and all(a[k].equal(b[k]) and a[k].dtype == b[k].dtype for k in a)

class Own(nn.Module):
    "Biases, a depthwise and a grouped convolution, PReLU, batch normalisation, flatten to a linear layer"
    def __init__(self):
        super().__init__()
        self.a, self.deep, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.PReLU(8)
        self.grouped, self.out = nn.Conv2d(8, 12, 1, groups=2), nn.Linear(12*4, 5)
    def forward(self, x):
        x = self.grouped(self.act(self.norm(self.deep(torch.relu(self.a(x))))))
        return self.out(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))

def restless(net):
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, lo, hi in (m.running_mean, -.3, .3), (m.running_var, .3, 1.5), (m.weight, .7, 1.5), (m.bias, -.3, .3): nn.init.uniform_(t, lo, hi)
    return net.eval()

@cache
def shrunk(coupling='independent', ratio=.5):
    torch.manual_seed(1)
    net = restless(build()); s = {n: torch.rand(c.out_channels) for n, c in convs(net).items()}
    p = plan(s, ratio, coupling=coupling, groups=groups(net))
    return net, p, cut(net, p)

@cache
def narrow():
    torch.manual_seed(2)
    net = restless(MobileNetV2(4, .25, [[1, 16, 1, 1], [6, 24, 2, 2]], 4))
    p = plan({n: torch.rand(c.out_channels) for n, c in convs(net).items()}, .5, groups=groups(net))
    return net, p, cut(net, p)

@cache
def own(seed=0):
    torch.manual_seed(seed)
    net = restless(Own()); p = plan({n: torch.rand(c.out_channels) for n, c in convs(net).items()}, .5, groups=groups(net))
    return net, p, cut(net, p)

# --- files ---

def test_a_fresh_process_loads_what_was_cut(tmp_path):
    "Of an independent plan, with constants folded; the process imports nothing but `load`, and gets the logits of the silenced network"
    net, p, small = shrunk()
    path = save(small, tmp_path/'net.safetensors', p, name='mobilenet_v2', classes=10)
    x = torch.randn(4, 3, 32, 32)
    np.save(tmp_path/'x.npy', x.numpy())
    code = "import sys, numpy as np, torch; from xprune_nb.shrinking import load; net = load('net.safetensors'); " \
           "np.save('out.npy', net(torch.from_numpy(np.load('x.npy'))).detach().numpy())"
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)
    with torch.no_grad(), silenced(net, p): want = net(x)
    have = torch.from_numpy(np.load(tmp_path/'out.npy'))
    assert (have-want).abs().max() <= 1e-5*want.abs().max()
    with torch.no_grad(): assert have.equal(small(x))
    assert {n: len(k) for n, k in described(path)['plan'].items()} == {n: c.out_channels for n, c in convs(net).items()}

def test_a_fresh_process_loads_a_class_of_ones_own(tmp_path):
    net, p, small = own()
    save(small, tmp_path/'own.safetensors', p)
    (tmp_path/'theirs.py').write_text('import torch\nfrom torch import nn\n' + textwrap.dedent(__import__('inspect').getsource(Own)))
    code = 'import torch; from theirs import Own; from xprune_nb.shrinking import load; print(load("own.safetensors", Own)(torch.ones(1, 3, 8, 8)).tolist())'
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert json.loads(out) == small(torch.ones(1, 3, 8, 8)).tolist()
    with pytest.raises(ValueError, match=says('own.safetensors holds a Own, which is not among the networks of `build`; expected make=')): load(tmp_path/'own.safetensors')

@given(st.integers(0, 10**6), st.floats(0, .9), st.sampled_from(['independent', 'coupled']), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cut_network_comes_back_to_the_bit(tmp_path, seed, ratio, coupling, dtype):
    torch.manual_seed(seed)
    net = restless(Own()).to(dtype)
    net.a.weight.requires_grad_(False)
    try: p = plan({n: torch.rand(c.out_channels) for n, c in convs(net).items()}, ratio, coupling=coupling, groups=groups(net))
    except ValueError: return
    small = cut(net, p)
    again = load(save(small, tmp_path/'own.safetensors', p, dict(seed=seed)), Own)
    assert same(again.state_dict(), small.state_dict()) and str(again) == str(small) and not again.training
    assert [q.requires_grad for q in again.parameters()] == [q.requires_grad for q in small.parameters()]
    with torch.no_grad(): assert again(torch.ones(2, 3, 8, 8, dtype=dtype)).equal(small(torch.ones(2, 3, 8, 8, dtype=dtype)))
    again(torch.ones(2, 3, 8, 8, dtype=dtype)).sum().backward()  # and it learns
    assert again.out.weight.grad.shape == again.out.weight.shape and again.a.weight.grad is None

def test_a_whole_network_can_be_saved_too(tmp_path):
    net = build(classes=3)
    assert same(load(save(net, tmp_path/'n.safetensors', name='mobilenet_v2', classes=3)).state_dict(), net.state_dict())

@pytest.mark.parametrize('where', [0, 3, 8, 40, .2, .5, .9, -1])
def test_no_bit_can_be_flipped_unseen(tmp_path, where):
    path = save(own()[2], tmp_path/'own.safetensors', own()[1])
    content = bytearray(path.read_bytes())
    i = int(where*len(content)) if isinstance(where, float) else where
    content[i] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises((OSError, ValueError), match=r'own\.safetensors'): load(path, Own)

@pytest.mark.parametrize('size', [0, 5, 100, .3, .99])
def test_files_cut_short(tmp_path, size):
    path = save(own()[2], tmp_path/'own.safetensors', own()[1])
    content = path.read_bytes()
    path.write_bytes(content[:int(size*len(content)) if isinstance(size, float) else size])
    with pytest.raises(OSError, match=says('own.safetensors is damaged (')): load(path, Own)

def test_foreign_files_are_refused(tmp_path):
    path, small = tmp_path/'f.safetensors', own()[2]
    for content, message in ((safetensors.torch.save(small.state_dict()), 'f.safetensors holds numbers and does not say of which network'),
                             (safetensors.torch.save(small.state_dict(), {KEY: '[1]'}), 'does not say of which network'),
                             (safetensors.torch.save(small.state_dict(), {KEY: '{"format": 7, "version": "9.0"}'}), 'f.safetensors has format 7, expected 1: it was written by xprune_nb 9.0'),
                             (b'\x80\x04\x95' + bytes(100), 'f.safetensors is damaged')):
        path.write_bytes(content)
        with pytest.raises((OSError, ValueError), match=says(message)): load(path, Own)
    save(small, path, own()[1])
    class Other(Own): pass
    with pytest.raises(ValueError, match='holds a Own, and what was made is a Other'): load(path, Other)
    def narrower():
        net = Own(); net.grouped, net.out = nn.Conv2d(8, 4, 1), nn.Linear(16, 5)
        return net
    with pytest.raises(ValueError, match="the plan for layer 'grouped' has shape|does not hold a cut Own"): load(path, narrower)
    with pytest.raises(ValueError, match=says("makes a MobileNetV2, and the network to save is a Own")): save(small, path, name='mobilenet_v2')

def test_nothing_is_pickled(tmp_path, monkeypatch):
    import pickle
    for name in ('load', 'loads', 'dump', 'dumps'): monkeypatch.setattr(pickle, name, lambda *a, **k: pytest.fail('pickle was used'))
    load(save(own()[2], tmp_path/'own.safetensors', own()[1]), Own)

# --- what it is worth ---

def test_report_counts_and_measures():
    net, p, small = shrunk('coupled')
    before = [copy.deepcopy(m.state_dict()) for m in (net, small)]
    t = report(net, small, batches=(1, 4), repeats=4, warmup=1, devices=['cpu'])
    assert list(t.index) == ['parameters', 'multiply-accumulates', 'size on disk', 'latency, cpu, batch 1', 'latency, cpu, batch 4']
    for k, m in (('before', net), ('after', small)):
        assert t.loc['parameters', k] == sum(q.numel() for q in m.parameters()) and t.loc['multiply-accumulates', k] == cost(m).macs.sum()
        assert sum(v.numel()*v.element_size() for v in m.state_dict().values()) < t.loc['size on disk', k] == size_on_disk(m)
    assert (t.ratio - t.before/t.after).abs().max() < 1e-12 and (t.iloc[3:][['before', 'after', 'spread_before', 'spread_after']] >= 0).all(axis=None)
    assert all(same(b, m.state_dict()) for b, m in zip(before, (net, small))) and net.features[0][0].weight.is_contiguous()

class Sleeps(nn.Module):
    "Slow at first, then as slow as it says"
    def __init__(self, seconds, log): super().__init__(); self.seconds, self.log, self.w, self.n = seconds, log, nn.Parameter(torch.zeros(1)), 0
    def __deepcopy__(self, memo): return self
    def forward(self, x):
        import time
        self.log.append((self.seconds, tuple(x.shape), x.is_contiguous(memory_format=torch.channels_last), self.training, torch.is_inference_mode_enabled()))
        self.n += 1; time.sleep(self.seconds if self.n > 2 else .05)
        return x

def test_latencies_take_turns_and_leave_the_warm_up_out():
    log = []
    times = latencies([Sleeps(.002, log), Sleeps(.006, log)], (3, 5, 5), 7, repeats=5, warmup=2)
    assert [len(t) for t in times] == [5, 5] and .002 <= np.median(times[0]) < .006 <= np.median(times[1]) < .04
    rounds = [tuple(l[0] for l in log[i:i+2]) for i in range(0, 14, 2)]
    assert {*map(frozenset, rounds)} == {frozenset((.002, .006))} and len({*rounds}) == 2 and {l[1:] for l in log} == {((7, 3, 5, 5), True, False, True)}

# --- ONNX ---

@pytest.mark.parametrize('which', ['own', 'folded'])
def test_onnxruntime_agrees_on_real_images(tmp_path, which):
    net, p, small = own() if which == 'own' else narrow()
    before = copy.deepcopy(small.state_dict())
    small.train()
    path = export_onnx(small, tmp_path/'net.onnx')
    assert small.training and same(small.eval().state_dict(), before)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=['CPUExecutionProvider'])
    data = load_data('cifar10-mini')
    x = data.normalise(data.test.x[:200])
    for some in (x, x[:1], x[:7]):
        have = torch.from_numpy(session.run(['logits'], {'images': some.numpy()})[0])
        with torch.no_grad(): want = small(some)
        assert have.shape == want.shape and (have-want).abs().max() <= 1e-5*want.abs().max()

def test_a_network_is_not_saved_under_what_makes_another(tmp_path):
    "Strides are no numbers: only the architecture tells a stem from the other"
    net = build('mobilenet_v2', 10, 'cifar').eval()
    p = plan(magnitude(net), .5, coupling='coupled', groups=groups(net))
    for how, said in (dict(name='mobilenet_v2'), 'makes another network than the one to save'), (dict(name='resnet18'), 'makes a ResNet'), (dict(name='mobilenet_v2', classes=5, stem='cifar'), 'does not hold a cut MobileNetV2'):
        with pytest.raises(ValueError, match=said): save(cut(net, p), tmp_path/'a.safetensors', p, **how)
    with pytest.raises(ValueError, match="says nothing of layer|is no convolution"): save(cut(net, p), tmp_path/'a.safetensors', {'x': p['features.0.0']}, name='mobilenet_v2', stem='cifar')
    assert not list(tmp_path.iterdir())

def test_tied_tensors_and_mixed_types_come_back(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__(); self.a, self.b, self.n = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.b.weight = self.a.weight
        def forward(self, x): return self.b(self.n(self.a(x)))
    net = Tied().eval(); net.a.half(); net.b.bias.data = net.b.bias.data.half()
    back = load(save(net, tmp_path/'own.safetensors'), Tied)
    assert {k: v.dtype for k, v in back.state_dict().items()} == {k: v.dtype for k, v in net.state_dict().items()}
    assert all(v.equal(net.state_dict()[k]) for k, v in back.state_dict().items())
