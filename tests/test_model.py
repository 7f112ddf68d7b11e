"""Networks against their definition counted another way (Torch-Pruning, torch.fx); weights and the baseline under every kind of damage."""
import hashlib, json, re, shutil, subprocess, sys
from dataclasses import replace

import pandas as pd
import pytest
import safetensors.torch
import torch
import torch_pruning
import torchvision
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.flop_counter import FlopCounterMode

from xprune_nb import model as room
from xprune_nb.model import MODELS, STEMS, baseline, baselines, batch_norms, beside_study, build, convs, cost, load_weights, read_weights, rounded, save_baseline, save_weights

says = lambda *parts: '.*'.join(map(re.escape, parts))
same = lambda a, b: a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
FILES = [(name, e) for name in baselines() for e in baseline(name).epochs[1:]]

# --- build ---

@pytest.mark.parametrize('stem', STEMS)
def test_build_is_torchvisions_and_the_seeds_alone(stem):
    torch.manual_seed(7); want = torchvision.models.mobilenet_v2(weights=None, num_classes=4).state_dict()
    torch.manual_seed(1); drawn = torch.rand(1)
    torch.manual_seed(1); net = build('mobilenet_v2', 4, stem, seed=7)
    assert torch.rand(1).equal(drawn)  # the random numbers of others are left alone
    assert same(net.state_dict(), want) and not net.training and {p.device.type for p in net.parameters()} == {'cpu'}
    assert not same(build('mobilenet_v2', 4, stem, seed=8).state_dict(), want)

def test_the_first_network_of_a_process_is_the_seeds_too():
    "torchvision is imported when a network is built, between the seed and the weights"
    code = "import sys; from xprune_nb.model import build; assert 'torchvision' not in sys.modules; print(build(seed=7).classifier[1].weight[0].tolist())"
    drawn = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert json.loads(drawn) == build(seed=7).classifier[1].weight[0].tolist()

@pytest.mark.parametrize('stem,sizes', [('imagenet', [16, 16, 8, 4, 2, 2, 1, 1, 1]), ('cifar', [32, 32, 32, 16, 8, 8, 4, 4, 4])])
def test_where_each_stage_works(stem, sizes):
    "Side of the maps after the stem, after each of the seven stages, and after the head; the paper's table has strides 2, 1, 2, 2, 2, 1, 2, 1, 1"
    net, x, seen = build(stem=stem), torch.zeros(1, 3, 32, 32), []
    with torch.inference_mode():
        for layer in net.features: x = layer(x); seen.append(x.shape[-1])
    assert [seen[i] for i in (0, 1, 3, 6, 10, 13, 16, 17, 18)] == sizes

@pytest.mark.parametrize('name', [n for n in MODELS if n != 'mobilenet_v2'])
def test_other_networks_are_torchvisions(name):
    if name.startswith('vgg19'): pytest.skip('as vgg16, and half a gigabyte')
    torch.manual_seed(3); want = getattr(torchvision.models, name)(weights=None, num_classes=4).state_dict()
    net = build(name, 4, seed=3)
    assert same(net.state_dict(), want) and not net.training
    with torch.inference_mode(): assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 4)

@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_residual_networks_for_small_images(name):
    "A 3x3 convolution at 32x32, then stages at 32, 16, 8 and 4; every weight but the first layer's is drawn as torchvision draws it, the first layer's from the seed alone"
    net, plain, x, sides = build(name, 4, 'cifar', seed=3), build(name, 4, seed=3), torch.zeros(1, 3, 32, 32), []
    with torch.inference_mode():
        x = net.maxpool(net.relu(net.bn1(net.conv1(x)))); sides.append(x.shape[-1])
        for stage in net.layer1, net.layer2, net.layer3, net.layer4: x = stage(x); sides.append(x.shape[-1])
    assert sides == [32, 32, 16, 8, 4] and net.conv1.weight.shape == (64, 3, 3, 3) and net.conv1.bias is None
    a, b = net.state_dict(), plain.state_dict()
    assert same({k: v for k, v in a.items() if k != 'conv1.weight'}, {k: v for k, v in b.items() if k != 'conv1.weight'})
    torch.rand(5); assert same(a, build(name, 4, 'cifar', seed=3).state_dict()) and not a['conv1.weight'].equal(build(name, 4, 'cifar', seed=4).conv1.weight)
    assert a['conv1.weight'].std().item() == pytest.approx((2/(64*9))**.5, rel=.1)  # fan out
    table = cost(net)
    assert table.macs['conv1'] == 64*27*32*32 and table.params.sum() == cost(plain).params.sum() - 64*3*(49 - 9)

@pytest.mark.parametrize('name', ['vgg16', 'vgg16_bn', 'vgg19', 'vgg19_bn'])
def test_networks_without_another_stem(name):
    with pytest.raises(ValueError, match=says(f"'{name}' has no stem for small images here; build it with stem='imagenet'")): build(name, stem='cifar')

# --- convolutions and costs ---

def on_meta(name):
    with torch.device('meta'): return MODELS[name][0](weights=None, num_classes=1000).eval()

@pytest.mark.parametrize('name', MODELS)
def test_costs_are_those_that_are_published(name):
    "With torchvision's weights: parameters to the unit, and billions of multiply-accumulates to the second digit"
    meta, table = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta, cost(on_meta(name), (3, 224, 224))
    assert table.params.sum() == meta['num_params'] and table.macs.sum()/1e9 == pytest.approx(meta['_ops'], abs=.012)

@pytest.mark.parametrize('name', MODELS)
def test_each_convolution_has_its_normalisation_or_none(name):
    net = on_meta(name); norms = batch_norms(net)
    assert list(norms) == ([] if name in ('vgg16', 'vgg19') else list(convs(net)))
    assert len({*norms.values()}) == len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    for c, b in norms.items(): assert dict(net.named_modules())[b].num_features == convs(net)[c].out_channels

def test_vgg_on_paper():
    "Thirteen convolutions of 3x3 with biases, halved after the 2nd, 4th, 7th, 10th and 13th; three linear layers behind 7x7"
    widths, sides = [64]*2 + [128]*2 + [256]*3 + [512]*6, [32]*2 + [16]*2 + [8]*3 + [4]*3 + [2]*3
    table = cost(on_meta('vgg16'))
    c = table[table.kind == 'Conv2d']
    assert c.params.tolist() == [9*i*o + o for i, o in zip([3, *widths], widths)] and c.macs.tolist() == [9*i*o*s*s for i, o, s in zip([3, *widths], widths, sides)]
    assert table[table.kind == 'Linear'].macs.tolist() == [25088*4096, 4096*4096, 4096*1000]


def plain_net(): return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, (1, 3), groups=4, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, dilation=2, padding=2),
                                      nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 9), nn.ReLU(), nn.Linear(9, 5, bias=False)).eval()

NETS = dict(imagenet=build, cifar=lambda: build(stem='cifar'), seven=lambda: build(classes=7), plain=plain_net,
            resnet18=lambda: torchvision.models.resnet18(num_classes=3).eval())

@pytest.mark.parametrize('name', NETS)
def test_parameters_are_the_networks_own(name):
    net = NETS[name]()
    table = cost(net, (3, 32, 32))
    assert table.params.sum() == sum(p.numel() for p in net.parameters())
    assert table.filters.to_dict() == {n: convs(net)[n].out_channels if n in convs(net) else 0 for n in table.index}

def test_a_tensor_that_layers_share_is_counted_once():
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1, bias=False))
    net[2].weight = net[0].weight
    table = cost(net, (3, 8, 8))
    assert table.params.tolist() == [3*3*9 + 3, 0] and table.macs.tolist() == [81*64, 81*64] and table.params.sum() == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('shape', [(3, 32, 32), (3, 40, 48)])
def test_macs_are_counted_position_by_position(name, shape):
    "Another count: each output of a convolution or linear layer, by its own inputs; the shapes come from torch.fx"
    net = NETS[name]()
    traced = torch.fx.symbolic_trace(net)
    torch.fx.passes.shape_prop.ShapeProp(traced).propagate(torch.zeros(1, *shape))
    want, mods = {}, dict(net.named_modules())
    for node in traced.graph.nodes:
        m, out = mods.get(str(node.target)), node.meta.get('tensor_meta')
        if isinstance(m, nn.Conv2d): want[node.target] = out.shape.numel()*m.in_channels//m.groups*m.kernel_size[0]*m.kernel_size[1]
        if isinstance(m, nn.Linear): want[node.target] = out.shape.numel()*m.in_features
    macs = cost(net, shape).macs
    assert macs[macs > 0].to_dict() == want

@pytest.mark.parametrize('name', ['imagenet', 'cifar', 'seven', 'resnet18'])
def test_costs_are_torch_prunings(name):
    "Its total also counts normalisation, activations and pooling, so it is asked layer by layer; the classifier's bias is an addition to it"
    net, table = NETS[name](), cost(NETS[name]())
    _, params, by_layer, _ = torch_pruning.utils.count_ops_and_params(net, torch.zeros(1, 3, 32, 32), layer_wise=True)
    theirs = {n: by_layer[m] - (len(m.bias) if isinstance(m, nn.Linear) else 0) for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert table.macs[table.macs > 0].to_dict() == theirs and table.params.sum() == params

class Patches(nn.Module):
    "Four patches of a picture, one after another in the batch"
    def __init__(self): super().__init__(); self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
    def forward(self, x):
        parts = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 4, 4)
        return self.fc(self.conv(parts).relu().mean((2, 3)).view(len(x), -1, 8).mean(1))

def with_head(*layers): return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
ODD = dict(transposed=lambda: with_head(nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, groups=4)), patches=Patches,
           weight_norm=lambda: with_head(weight_norm(nn.Conv2d(3, 8, 3, padding=1, bias=False))),
           spectral_norm=lambda: with_head(spectral_norm(nn.Conv2d(3, 8, 3, padding=1))),
           older_weight_norm=lambda: with_head(nn.utils.weight_norm(nn.Conv2d(3, 8, 3))),
           twice=lambda: with_head(conv := nn.Conv2d(3, 3, 3, padding=1), conv, nn.Conv2d(3, 8, 1)))

@pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning')
@pytest.mark.parametrize('name', ODD)
def test_layers_that_are_easily_miscounted_are_torchs_own_counters(name):
    net = ODD[name]().eval()
    table = cost(net, (3, 8, 8))
    with FlopCounterMode(display=False) as counter, torch.no_grad(): net(torch.zeros(1, 3, 8, 8))
    assert table.macs.sum() == counter.get_total_flops()//2 and table.params.sum() == sum(p.numel() for p in net.parameters())

def test_batch_norms_of_other_networks():
    net = torchvision.models.resnet18(num_classes=3).eval()
    assert len(batch_norms(net)) == 20 and all(b == (n[:-1] + '1' if n.endswith('downsample.0') else re.sub(r'conv(\d)$', r'bn\1', n)) for n, b in batch_norms(net).items())
    assert batch_norms(plain_net()) == {'2': '3'}
    first = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    assert batch_norms(first) == {}  # in front of the convolution, and behind an activation

def test_cost_leaves_the_network_as_it_was():
    net = build(); net.train(); net.features[3].eval(); net.features[0][0].weight.grad = torch.ones(32, 3, 3, 3)
    modes, state = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    cost(net)
    with pytest.raises(RuntimeError): cost(net, (1, 32, 32))
    assert [m.training for m in net.modules()] == modes and same(net.state_dict(), state)
    assert not any(m._forward_hooks for m in net.modules()) and net.features[0][0].weight.grad.eq(1).all()

# --- weights in a file ---

def tiny(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))

@pytest.fixture(scope='module')
def saved(tmp_path_factory): return save_weights(tiny(), tmp_path_factory.mktemp('weights')/'tiny.safetensors').read_bytes()

def test_weights_come_back_to_the_bit(tmp_path):
    net = tiny().double().to(memory_format=torch.channels_last)
    net[1].running_var.uniform_(); net[1].num_batches_tracked += 3
    path = save_weights(net, tmp_path/'a'/'w.safetensors')
    assert same(read_weights(path), net.state_dict()) and same(safetensors.torch.load_file(path), net.state_dict())
    assert same(load_weights(tiny().double(), path).state_dict(), net.state_dict())
    assert [p.name for p in path.parent.iterdir()] == [path.name]

@given(st.data())
@settings(max_examples=100, deadline=None)
def test_truncated_weights_are_refused(saved, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp()/'cut.safetensors'
    path.write_bytes(saved[:data.draw(st.integers(0, len(saved)-1))])
    with pytest.raises(OSError, match=says('cut.safetensors is damaged (', 'Get it anew, or train again')): read_weights(path)

@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_flipped_bit_is_noticed_where_the_digest_is_known(saved, tmp_path_factory, data):
    at, bit = data.draw(st.integers(0, len(saved)-1)), data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp()/'flipped.safetensors'
    path.write_bytes(saved[:at] + bytes([saved[at] ^ 1 << bit]) + saved[at+1:])
    with pytest.raises(OSError, match=says('flipped.safetensors is damaged (its SHA-256 is not the recorded one)')): read_weights(path, hashlib.sha256(saved).hexdigest())

@pytest.mark.parametrize('make', [lambda p: torch.save(tiny().state_dict(), p), lambda p: p.write_text('version https://git-lfs.github.com/spec/v1'), lambda p: p.write_bytes(b'\x80\x04.')])
def test_what_is_no_safetensors_is_refused_unread(tmp_path, make):
    "A pickle among them: no file from outside is unpickled"
    make(path := tmp_path/'w.safetensors')
    with pytest.raises(OSError, match='w.safetensors is damaged'): read_weights(path)

def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match=says('there is no file', 'none.safetensors')): load_weights(tiny(), tmp_path/'none.safetensors')

@pytest.mark.parametrize('wrong,message', [
    (lambda w: {k: v for k, v in w.items() if k != '1.running_mean'}, '(1 tensors differ; first: 1.running_mean: missing, expected (4,))'),
    (lambda w: {**w, '9.weight': torch.zeros(2)}, '(1 tensors differ; first: 9.weight: (2,), expected nothing)'),
    (lambda w: {**w, '0.weight': torch.zeros(5, 3, 3, 3), '0.bias': torch.zeros(5)}, '(2 tensors differ; first: 0.weight: (5, 3, 3, 3), expected (4, 3, 3, 3))'),
    (lambda w: {**w, '3.bias': torch.zeros(())}, '3.bias: (), expected (2,)'),
    (lambda w: {}, '(9 tensors differ')])
def test_weights_of_another_architecture_change_nothing(tmp_path, wrong, message):
    net, other = tiny(), wrong(tiny().state_dict())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for weights in other, save_weights(other, tmp_path/'other.safetensors'):
        with pytest.raises(ValueError, match=says('the weights are not of this architecture', message)): load_weights(net, weights)
        assert same(net.state_dict(), before)

# --- the baseline ---

@pytest.mark.parametrize('name,e', FILES)
def test_stored_weights_are_the_recorded_ones(name, e):
    base = baseline(name)
    path = base.folder/f'{name}-epoch{e}.safetensors'
    assert hashlib.sha256(path.read_bytes()).hexdigest() == base.files[e]
    w, net = base.weights(e), base.net(e)
    assert same(net.state_dict(), w) and not net.training and all(v.isfinite().all() for v in w.values())

@pytest.mark.parametrize('name', baselines())
def test_the_story_fits_together(name):
    from xprune_nb.data import DATASETS
    from xprune_nb.training import Recipe
    base = baseline(name)
    assert same(base.weights(0), build(base.model, base.classes, base.stem, base.seed).state_dict()) and same(base.net(0).state_dict(), base.weights(0))
    assert same(base.weights('last'), base.weights(base.epochs[-1])) and not same(base.weights(), base.weights(0))
    recipe = Recipe(**base.recipe)
    assert 0 == base.epochs[0] < base.epochs[1] and base.epochs[-1] <= recipe.epochs and base.data in DATASETS and base.name == name
    assert sorted(p.name for p in base.folder.glob(f'{name}-epoch*')) == sorted(f'{name}-epoch{e}.safetensors' for e in base.files)
    assert 0 < base.test_accuracy < 1 and {'epoch', 'train_accuracy', 'val_accuracy'} <= set(base.history) and {'torch', 'torchvision'} <= set(base.versions)

@pytest.mark.parametrize('name', baselines())
def test_first_weights_that_can_not_be_made_again_are_refused(name, monkeypatch):
    "As by a torch whose generator, or a torchvision whose initialisation, is another one; what is kept stays at hand"
    base = baseline(name)
    real = room.build
    monkeypatch.setattr(room, 'build', lambda *a: real(*a[:3], a[3] + 1))
    with pytest.raises(ValueError, match=says(f'the first weights of {name} can not be made again: torch ', 'Rewind to one of: 5, 50, last')): base.weights(0)
    with pytest.raises(ValueError, match='can not be made again'): base.net(0)
    assert same(base.net('last').state_dict(), base.weights('last'))

@pytest.mark.slow
@pytest.mark.parametrize('name', baselines())
def test_the_recorded_accuracy_is_that_of_what_is_stored(name):
    "On all test images; a processor that rounds in another way may turn a few of them"
    from xprune_nb.data import cache_dir, load
    from xprune_nb.training import evaluate
    base = baseline(name)
    if not (cache_dir()/base.data/'test_batch.bin').exists(): pytest.skip('the cache does not hold the whole set')
    data = load(base.data); assert evaluate(base.net(), data.test, data)[0] == pytest.approx(base.test_accuracy, abs=5e-4)

@pytest.mark.slow
@pytest.mark.parametrize('name', baselines())
def test_the_first_epoch_begins_where_the_history_says(name):
    "The recorded training, its first epoch again, from the seed's weights: a minute and a half"
    from dataclasses import replace
    from xprune_nb.data import cache_dir, load
    from xprune_nb.training import Recipe, fit
    base = baseline(name)
    if not (cache_dir()/base.data/'test_batch.bin').exists(): pytest.skip('the cache does not hold the whole set')
    again = fit(base.net(0), load(base.data), replace(Recipe(**base.recipe), epochs=1), base.seed, progress=False).frame.iloc[0]
    for k in 'train_loss', 'train_accuracy', 'val_accuracy': assert again[k] == pytest.approx(base.history[k][0], rel=1e-2), k

@pytest.mark.parametrize('e', ['first', -1, 10**6, '0', None, 0.5])
def test_epochs_that_are_not_kept(e):
    with pytest.raises(ValueError, match=says(f'keeps no weights of epoch {e!r}. There are: 0, ', ', last')): baseline().weights(e)

@pytest.mark.parametrize('harm', [lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.write_bytes(b''), lambda p: p.unlink(),
                                  lambda p: save_weights(build(seed=99), p)], ids=['last byte', 'empty', 'gone', 'others'])
def test_a_damaged_baseline_is_refused(tmp_path, monkeypatch, harm):
    for p in room.ASSETS.glob(f'*{baseline().name}*'): shutil.copy(p, tmp_path)
    monkeypatch.setattr(room, 'ASSETS', tmp_path)
    base = baseline()
    path = tmp_path/f'{base.name}-epoch{base.epochs[-1]}.safetensors'
    harm(path)
    with pytest.raises(OSError, match=f'{re.escape(path.name)}( is damaged|$)'): base.net()
    assert same(base.weights(0), base.net(0).state_dict()) and len(base.weights(base.epochs[1]))  # the others are as good as before

# --- baselines beside the study ---

@pytest.fixture
def beside(tmp_path, monkeypatch):
    monkeypatch.setenv('XPRUNE_BASELINES', str(tmp_path/'beside')); return tmp_path/'beside'

STATES = {2: build(seed=8).state_dict(), 10: build(seed=9).state_dict()}
def story(**kw): return dict(weights=STATES, history=pd.DataFrame(dict(epoch=[1, 2], train_accuracy=[.1, .25], val_accuracy=[.1, 1/3])), recipe=dict(epochs=10, lr=.1), measure=lambda net: .5, seed=4) | kw

def test_where_baselines_lie(monkeypatch, tmp_path):
    monkeypatch.delenv('XPRUNE_BASELINES', raising=False)
    assert beside_study() == room.ASSETS.parent.parent/'figures'/'thesis'/'baselines' and baseline().folder == room.ASSETS
    monkeypatch.setenv('XPRUNE_BASELINES', str(tmp_path)); assert beside_study() == tmp_path and baselines() == [baseline().name]
    monkeypatch.setenv('XPRUNE_BASELINES', str(tmp_path/'none')); assert baselines() == [baseline().name]

def test_what_is_stored_is_half_as_large_and_is_the_network(beside):
    "numpy does the rounding here; the measured network is the one that is read later, and neither the early nor the full one"
    measured = []
    base = save_baseline('fake', **story(measure=lambda net: (measured.append((net.training, {k: v.clone() for k, v in net.state_dict().items()})), .25)[1]))
    assert base == replace(baseline('fake'), history=base.history) and baseline('fake').history.equals(base.history) and base.history.val_accuracy[1] == 1/3
    assert (base.test_accuracy, base.seed, base.recipe, base.epochs, base.folder) == (.25, 4, dict(epochs=10, lr=.1), [0, 2, 10], beside)
    for e, full in STATES.items():
        stored, read = safetensors.torch.load_file(beside/f'fake-epoch{e}.safetensors'), base.weights(e)
        for k, v in full.items():
            assert stored[k].dtype == (torch.float16 if v.ndim > 1 else v.dtype) and read[k].dtype == v.dtype
            assert (read[k].numpy() == (v.numpy().astype('float16') if v.ndim > 1 else v.numpy())).all()
        assert (beside/f'fake-epoch{e}.safetensors').stat().st_size < .53*(room.ASSETS/f'{baseline().name}-epoch5.safetensors').stat().st_size
    (training, state), = measured
    assert not training and same(state, base.weights()) and same(base.net().state_dict(), state) and not same(state, STATES[10])
    assert same(base.weights(0), build(seed=4).state_dict()) and baselines() == ['fake', baseline().name] and set(base.versions) == {'torch', 'torchvision'}

def test_another_network_with_its_stem(beside):
    net = build('resnet18', 100, 'cifar', 3)
    base = save_baseline('small', **story(weights={1: net.state_dict()}, model='resnet18', stem='cifar', data='cifar100', classes=100, seed=3))
    assert list(base.first) == ['fc.weight'] and base.first['fc.weight'] == pytest.approx(net.fc.weight.flatten()[-4:].tolist(), abs=1e-7)
    assert base.net().conv1.weight.shape == (64, 3, 3, 3) and same(base.net('last').state_dict(), base.weights(1))

def test_numbers_that_would_vanish_stay():
    "One a channel, as small as running means are; a weight of that size is 0 then, in the file as in the network"
    half = rounded({'norm.running_mean': torch.tensor([1e-13, 3.]), 'conv.weight': torch.tensor([[1e-13, 3.]]), 'norm.num_batches_tracked': torch.tensor(7), 'table': torch.ones(2, 2, dtype=torch.int64)})
    assert half['norm.running_mean'].tolist() == [torch.tensor(1e-13).item(), 3] and half['conv.weight'].tolist() == [[0, 3]] and half['norm.num_batches_tracked'] == 7 and half['table'].dtype == torch.int64

@pytest.mark.parametrize('name', ['fake', baseline().name])
def test_a_name_that_is_taken_is_refused(beside, name):
    save_baseline('fake', **story()); before = {p.name: p.read_bytes() for p in beside.iterdir()}
    with pytest.raises(ValueError, match=says(f"there is a baseline called '{name}' already: choose another name")): save_baseline(name, **story(seed=5))
    assert {p.name: p.read_bytes() for p in beside.iterdir()} == before and len(before) == 3

@pytest.mark.parametrize('wrong,message', [
    (dict(model='mobilenet'), "no model called 'mobilenet'; did you mean 'mobilenet_v2'?"), (dict(data='cifar'), "no data set called 'cifar'"), (dict(classes=7), 'the weights are not of this architecture (2 tensors differ'),
    (dict(weights={2: STATES[2], 10: {**STATES[10], 'classifier.1.weight': STATES[10]['classifier.1.weight']*1e7}}), 'classifier.1.weight has numbers that half precision has not'),
    (dict(weights={2: {**STATES[2], 'classifier.1.bias': STATES[2]['classifier.1.bias']*torch.nan}, 10: STATES[10]}), 'classifier.1.bias has numbers that half precision has not'),
    (dict(weights={2: STATES[2], 10: {k: v for k, v in STATES[10].items() if 'running' not in k}}), 'the weights are not of this architecture (104 tensors differ')])
def test_what_can_not_be_a_baseline_leaves_no_file(beside, wrong, message):
    with pytest.raises(ValueError, match=says(message)): save_baseline('fake', **story(**wrong))
    assert not beside.exists() and baselines() == [baseline().name]

def test_a_baseline_that_was_not_written_to_its_end_is_not_listed(beside, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(room, 'write_about', lambda *a, **k: (_ for _ in ()).throw(OSError('the disk is full')))
        with pytest.raises(OSError, match='the disk is full'): save_baseline('fake', **story())
    assert baselines() == [baseline().name] and len(save_baseline('fake', **story()).files) == 2  # it can be made again

@pytest.mark.parametrize('harm,message', [
    (lambda d: (d/'fake-epoch10.safetensors').write_bytes((d/'fake-epoch10.safetensors').read_bytes()[:-1]), 'fake-epoch10.safetensors is damaged'), (lambda d: (d/'fake-epoch10.safetensors').unlink(), 'fake-epoch10.safetensors'),
    (lambda d: save_weights(STATES[10], d/'fake-epoch10.safetensors'), 'fake-epoch10.safetensors is damaged (its SHA-256 is not the recorded one)'), # as good, but not what was measured
    (lambda d: (d/'baseline-fake.json').write_text((d/'baseline-fake.json').read_text().replace('"test_accuracy": 0.5', '"test_accuracy": 0.6')), 'baseline-fake.json is damaged (its SHA-256 is not the recorded one). Get it anew'),
    (lambda d: (d/'baseline-fake.json').write_text(''), 'baseline-fake.json cannot be read')])
def test_damage_beside_the_study_is_refused_by_name(beside, harm, message):
    save_baseline('fake', **story()); harm(beside)
    with pytest.raises(OSError, match=says(message)): baseline('fake').net()
    assert same(baseline().weights(5), baseline().net(5).state_dict())

def test_first_weights_are_checked_by_what_the_page_says(beside):
    base = save_baseline('fake', **story())
    with pytest.raises(ValueError, match=says('the first weights of fake can not be made again', 'Rewind to one of: 2, 10, last')): replace(base, seed=5).weights(0)
    about = room.read_about(beside/'baseline-fake.json'); (k, v), = about['first'].items(); v[2] += 1e-4
    room.write_about(beside/'baseline-fake.json', about)
    with pytest.raises(ValueError, match='the first weights of fake can not be made again'): baseline('fake').net(0)
    assert same(baseline('fake').weights(2), base.weights(2))
