"""Training against a loop written out by hand, kills at every point, the fast paths against torch's own over shapes without end, statistics by numpy."""
import copy, errno, json, math, os, re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from xprune_nb.data import Images, load, loader
from xprune_nb.model import build, convs, save_weights
from xprune_nb.pruning import cut, groups, plan, silence, silenced, silencer
from xprune_nb.training import DECAYS, Recipe, evaluate, fast_routes, fit, recalibrate, steps_of

says = lambda *parts: '.*'.join(map(re.escape, parts))
same = lambda a, b: a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
snapshot = lambda net: {k: v.clone() for k, v in net.state_dict().items()}
timeless = lambda history: history.frame.drop(columns='seconds')
keep_silent = lambda net, p: dict(after_step=silencer(net, p)) if p else {}  # what `fit` is told, so that filters are silent and stay so

def small(dropout=.2, seed=0, bias=False, classes=10):
    "A MobileNet of three convolutions, the last one linear"
    torch.manual_seed(seed)
    conv = lambda i, o, k, s=1, groups=1: [nn.Conv2d(i, o, k, s, k//2, groups=groups, bias=bias), nn.BatchNorm2d(o)]
    return nn.Sequential(*conv(3, 8, 3, 4), nn.ReLU6(inplace=True), *conv(8, 8, 3, 4, groups=8), nn.ReLU6(inplace=True), *conv(8, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(12, classes)).eval()

mini = cache(load)

@cache
def some(train=150, val=40): data = mini(); return replace(data, train=data.train.take(torch.arange(train)), val=data.val.take(torch.arange(val)))

# --- the fast paths ---

@pytest.mark.parametrize('stem,size', [('imagenet', (32, 32)), ('imagenet', (40, 72)), ('cifar', (16, 24))])
@pytest.mark.parametrize('train', [True, False])
def test_fast_gradients_of_the_whole_network_are_torchs(stem, size, train):
    net = build(stem=stem).double().to(memory_format=torch.channels_last).train(train)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d) and not train: nn.init.uniform_(m.running_var, .01, .1)  # signals do not die out
    x, y = torch.randn(6, 3, *size).double().to(memory_format=torch.channels_last).requires_grad_(), torch.arange(6)
    def gradients():
        torch.manual_seed(3)  # dropout
        out = net(x)
        return out, dict(zip(['x', *dict(net.named_parameters())], torch.autograd.grad(F.cross_entropy(out, y), [x, *net.parameters()])))
    want, wants = gradients()
    with fast_routes(net): have, haves = gradients()
    assert_close(have, want, rtol=1e-9, atol=1e-12)
    for n in wants: assert (haves[n] - wants[n]).abs().max() <= 1e-9*wants[n].abs().max() + 1e-12, n  # in training mode some are 0 but for rounding: a shift in front of a normalisation
    assert not any('forward' in vars(c) for c in convs(net).values())

@given(st.data())
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings('ignore:Using padding')
def test_fast_convolutions_are_torchs_in_every_shape(data):
    pick = lambda *values: data.draw(st.sampled_from(values))
    pair = lambda low, high: (data.draw(st.integers(low, high)), data.draw(st.integers(low, high)))
    kernel, dilation = pair(1, 4), pick((1, 1), (1, 1), (1, 1), (2, 1))
    padding = pick('same', 'valid', *[pair(0, 3)]*6)
    stride = (1, 1) if padding == 'same' else pair(1, 3)
    groups, multiple = pick(1, 6, 6, 3), pick(1, 1, 2)
    conv = nn.Conv2d(6, 6*multiple, kernel, stride, padding, dilation, groups, bias=pick(False, False, True), padding_mode=pick('zeros', 'zeros', 'zeros', 'replicate')).double()
    net, size = nn.Sequential(conv), [max(s, (k-1)*d+1) for s, k, d in zip(pair(1, 7), kernel, dilation)]
    x = torch.randn(2, 6, *size).double().to(memory_format=pick(torch.channels_last, torch.contiguous_format)).requires_grad_()
    grads = lambda out: torch.autograd.grad((out*torch.arange(out.numel()).view_as(out).sin()).sum(), [x, *net.parameters()])
    want = net(x)
    with fast_routes(net): have = net(x)
    assert_close(have, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(grads(have), grads(want)): assert_close(a, b, rtol=1e-11, atol=1e-11)

def test_fast_paths_go_even_after_an_error_and_hooks_still_run():
    net, seen = small(), []
    for c in convs(net).values(): c.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    before = {n: vars(c).copy() for n, c in convs(net).items()}
    with pytest.raises(KeyError), fast_routes(net), fast_routes(net):
        net(torch.zeros(1, 3, 32, 32)); raise KeyError
    assert seen == [8, 8, 12] and {n: vars(c) for n, c in convs(net).items()} == before

# --- evaluate ---

@pytest.mark.parametrize('batch_size', [1, 7, 500])
def test_evaluation_is_a_mean_over_images(batch_size):
    net, data = small().train(), mini()
    images = data.test.take(torch.arange(101))
    with torch.no_grad(): out = net.eval()(data.normalise(images.x)).double()
    logits = out.numpy()
    log_p = logits - logits.max(1, keepdims=True); log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    net.train()
    accuracy, loss = evaluate(net, images, data, batch_size)
    assert accuracy == pytest.approx((logits.argmax(1) == images.y.numpy()).mean(), abs=1e-12) and loss == pytest.approx(-log_p[range(101), images.y].mean(), rel=1e-5)
    assert net.training

def test_evaluation_leaves_each_module_in_its_mode():
    net = small().train(); net[1].eval()  # a batch normalisation that somebody has frozen
    modes, before = [m.training for m in net.modules()], snapshot(net)
    evaluate(net, some().val, some())
    with pytest.raises(ValueError, match='images have shape'): evaluate(net, Images(torch.zeros(2, 3, 8, 8), torch.zeros(2)), some())
    assert [m.training for m in net.modules()] == modes and same(net.state_dict(), before)

# --- fit ---

@pytest.mark.parametrize('kw', [dict(), dict(augment=True, lr=.05), dict(momentum=0., weight_decay=0.), dict(batch_size=149, weight_decay=.1), dict(decay='step', lr=.05), dict(decay='cosine', of=6)], ids=str)
@pytest.mark.parametrize('silent', [False, True])
def test_fit_is_the_loop_of_the_textbook(kw, silent):
    recipe, data, seed = Recipe(epochs=2, **dict(dict(batch_size=64), **kw)), some(), 5
    net, twin = small(0.), small(0.)
    p = {n: torch.arange(c.out_channels) % 3 > 0 for n, c in convs(net).items()} if silent else None
    history = fit(net, data, recipe, seed, progress=False, **keep_silent(net, p)).frame
    if silent: silence(twin, p)
    velocity, rows, rates = {}, [], recipe.rates()
    for epoch in (1, 2):
        twin.train(); losses, hits = [], []
        for x, y in loader(data.train, data, recipe.batch_size, seed, epoch, recipe.augment):
            out = twin(x)
            log_p = out.log_softmax(1)[range(len(y)), y]
            for q in twin.parameters(): q.grad = None
            (-log_p.mean()).backward()
            for q in twin.parameters():
                step = q.grad + recipe.weight_decay*q.data
                velocity[q] = recipe.momentum*velocity[q] + step if q in velocity else step
                q.data = q.data - rates[epoch-1]*velocity[q]
            if silent: silence(twin, p)
            losses += (-log_p).tolist(); hits += (out.argmax(1) == y).tolist()
        twin.eval()
        with torch.no_grad(): val = (twin(data.normalise(data.val.x)).argmax(1) == data.val.y).double().mean().item()
        rows.append((np.mean(losses), np.mean(hits), val))
    assert_close(dict(net.state_dict()), dict(twin.state_dict()), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(history[['train_loss', 'train_accuracy', 'val_accuracy']], rows, rtol=1e-5)
    assert history.epoch.tolist() == [1, 2] and len(losses) == (149 if recipe.batch_size == 149 else 150) and not net.training

def test_fit_depends_on_nothing_that_was_before():
    "Not on the random numbers drawn, nor on gradients or the mode left over"
    nets = []
    for restless in False, True:
        net = small(.5)
        torch.manual_seed(int(restless)); torch.rand(7)
        if restless: net.train()(torch.randn(4, 3, 32, 32)).sum().backward(); net.load_state_dict(small(.5).state_dict())
        fit(net, some(), Recipe(epochs=2, batch_size=64, augment=True), 3, progress=False); nets.append(net.state_dict())
    assert same(*nets)

def test_no_epochs_change_nothing():
    net = small(); before = snapshot(net)
    history = fit(net, some(), Recipe(epochs=0), progress=False)
    assert same(net.state_dict(), before) and list(history.frame) == ['epoch', 'train_loss', 'train_accuracy', 'val_accuracy', 'seconds'] and not len(history.frame)

@pytest.mark.parametrize('bias', [False, True])
def test_silent_filters_stay_silent_at_every_step(bias):
    net = small(bias=bias)
    p = {n: torch.arange(c.out_channels) % 2 == 0 for n, c in convs(net).items()}
    quiet, steps = lambda: all(t[~p[n]].eq(0).all() for n, c in convs(net).items() for m in (c, net[int(n)+1]) for t in m.parameters()), []
    net.register_forward_pre_hook(lambda m, args: steps.append(quiet()))
    fit(net, some(), Recipe(epochs=2, batch_size=32, lr=.1, weight_decay=.01), progress=False, **keep_silent(net, p))
    assert all(steps) and len(steps) == 2*(5+1) and quiet()
    assert all(net[int(n)+1].bias[k].ne(0).all() for n, k in p.items())  # while the others learn

def test_a_silenced_network_learns_what_the_cut_one_learns():
    "The law of pruning, through training: filters that are silent have no part in it"
    net = small(0.); gs = groups(net)
    g = torch.Generator().manual_seed(1)
    p = plan({n: torch.rand(c.out_channels, generator=g) for n, c in convs(net).items()}, .5, coupling='coupled', groups=gs)
    little, recipe = cut(net, p), Recipe(epochs=3, batch_size=50, lr=.05)
    loud, quiet = fit(little, some(), recipe, progress=False), fit(net, some(), recipe, progress=False, **keep_silent(net, p))
    x = mini().normalise(mini().test.x[:50])
    with torch.no_grad(): assert_close(net(x), little(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(timeless(loud), timeless(quiet), rtol=1e-5)

@pytest.mark.parametrize('wrong', [dict(epochs=-1), dict(lr=-1e-9), dict(lr=math.nan), dict(momentum=-.1), dict(weight_decay=-1), dict(batch_size=1), dict(batch_size=0)], ids=str)
def test_recipes_that_can_not_be(wrong):
    (k, v), = wrong.items()
    with pytest.raises(ValueError, match=says(f'{k} is {v}, expected at least ')): Recipe(**wrong)

def test_a_loss_that_is_not_finite_ends_in_a_sentence_and_no_checkpoint(tmp_path):
    net = small(); net[-1].weight.data[0] = math.inf
    with pytest.raises(FloatingPointError, match=says('the training loss became nan in epoch 1 at lr=0.01: lower it')):
        fit(net, some(), Recipe(epochs=2), progress=False, checkpoint=tmp_path/'c.safetensors')
    assert list(tmp_path.iterdir()) == []

@given(st.integers(1, 40), st.integers(0, 40), st.floats(1e-4, 1))
@settings(max_examples=60, deadline=None)
def test_rates_are_those_of_torchs_schedulers(of, epochs, lr):
    "The last ones of them"
    epochs = min(epochs, of)
    def theirs(make):
        opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr); schedule, rates = make(opt), []
        for _ in range(of): rates.append(opt.param_groups[0]['lr']); opt.step(); schedule.step()
        return rates[of-epochs:]
    S = torch.optim.lr_scheduler
    want = dict(constant=lambda o: S.ConstantLR(o, 1.), cosine=lambda o: S.CosineAnnealingLR(o, of), step=lambda o: S.MultiStepLR(o, [math.ceil(of/2), math.ceil(3*of/4)]))
    for d in DECAYS: np.testing.assert_allclose(Recipe(epochs=epochs, lr=lr, decay=d, of=of).rates(), theirs(want[d]), rtol=1e-9, atol=1e-12)
    assert Recipe(epochs=epochs, lr=lr).rates() == [lr]*epochs

@given(st.integers(1, 300), st.integers(2, 70))
@settings(max_examples=100, deadline=None)
def test_steps_are_the_loaders(n, batch):
    pixels = Images(torch.zeros(n, 3, 1, 1, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64))
    assert steps_of(n, batch) == sum(1 for _ in loader(pixels, mini(), batch, seed=0))

# --- a network that changes while it learns ---

every = lambda k, r=0: {n: torch.arange(c.out_channels) % k != r for n, c in convs(small()).items()}
both = lambda a, b: {n: a[n] & b[n] for n in a}
obey = lambda p: lambda model, opt: (model, opt, silencer(model, p))  # a change: from here on, these filters are silent

def test_a_plan_that_grows_is_obeyed_from_that_step_on():
    "By the loop of the textbook; the plan is made in eval mode, by the plain network, and what it draws is nobody else's business"
    recipe, data, net, twin, met = Recipe(epochs=2, batch_size=40, lr=.05), some(), small(0.), small(0.), []
    plans = {2: every(4), 5: both(every(4), every(3)), 8: both(both(every(4), every(3)), every(2, 1))}
    def make(step):
        def f(model, opt):
            torch.rand(5); met.append((step, model.training, any('forward' in vars(c) for c in convs(model).values())))
            return obey(plans[step])(model, opt)
        return f
    fit(net, data, recipe, 1, progress=False, change={s: make(s) for s in plans})
    opt, step = torch.optim.SGD(twin.parameters(), .05, .9, weight_decay=1e-4), 0
    p = None
    for epoch in (1, 2):
        twin.train()
        for x, y in loader(data.train, data, 40, 1, epoch):
            loss = F.cross_entropy(twin(x), y); opt.zero_grad(); loss.backward(); opt.step(); step += 1
            if p: silence(twin, p)
            if step in plans: p = plans[step]; silence(twin, p)
    assert step == 8 and met == [(s, False, False) for s in plans] and not net.training
    assert_close(dict(net.state_dict()), dict(twin.state_dict()), rtol=1e-4, atol=1e-6)

def test_another_network_goes_on_where_one_has_ended():
    "It is the one that learns, is validated, shown and left in eval mode from there on, at the rates of the recipe; the first is left as it was then"
    recipe, data, first, heir, twin = Recipe(epochs=3, batch_size=64, lr=.05, decay='step'), some(), small(0.), small(0., 5), small(0., 5)
    shown, quiet, rates = [], [], []
    def heiress(model, opt):
        assert model is first and opt.param_groups[0]['lr'] == recipe.rates()[1] and not heir.training
        heir.register_forward_pre_hook(lambda m, args: rates.append(new.param_groups[0]['lr']) if m.training else None)
        shown.append(snapshot(first)); new = torch.optim.SGD(heir.train().parameters(), 77., .9, weight_decay=1e-4)
        return heir, new, lambda: quiet.append(len(rates))
    frame = fit(first, data, recipe, 2, progress=False, change={4: heiress}, each_epoch=lambda epoch, model: shown.append((epoch, model is first, model is heir))).frame
    assert shown[0] == (1, True, False) and shown[2:] == [(2, False, True), (3, False, True)] and same(first.state_dict(), shown[1])
    assert quiet == list(range(6)) and rates == [recipe.rates()[1]]*2 + [recipe.rates()[2]]*3  # at once, and after each of the steps 5 to 9
    opt, step = torch.optim.SGD(twin.parameters(), 1., .9, weight_decay=1e-4), 0
    for epoch in (1, 2, 3):
        for x, y in loader(data.train, data, 64, 2, epoch):
            step += 1
            if step <= 4: continue
            opt.param_groups[0]['lr'] = recipe.rates()[epoch-1]; loss = F.cross_entropy(twin.train()(x), y); opt.zero_grad(); loss.backward(); opt.step()
    assert_close(dict(heir.state_dict()), dict(twin.state_dict()), rtol=1e-4, atol=1e-6)
    assert frame.val_accuracy.tolist()[1:] == [frame.val_accuracy[1], evaluate(heir, data.val, data)[0]] and not heir.training and not first.training
    assert not any('forward' in vars(c) for net in (first, heir) for c in convs(net).values())

def test_after_the_last_step_nothing_is_learnt():
    "A plan that grows when all is over silences, to the bit, the network that learnt without it"
    nets = [small(.5), small(.5)]
    fit(nets[0], some(), Recipe(epochs=2, batch_size=64), 3, progress=False, change={6: obey(every(2))})
    fit(nets[1], some(), Recipe(epochs=2, batch_size=64), 3, progress=False)
    assert same(nets[0].state_dict(), silence(nets[1], every(2)).state_dict())

@pytest.mark.parametrize('steps', [0, -1, 7])
def test_a_change_at_a_step_that_there_is_not(steps):
    with pytest.raises(ValueError, match=says(f'the network shall change after step {steps}, expected 1 to 6')): fit(small(), some(), Recipe(epochs=2, batch_size=64), progress=False, change={steps: obey(every(2))})

def test_changes_and_checkpoints_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match='expected one of them: a checkpoint does not keep what has changed'): fit(small(), some(), Recipe(epochs=1), progress=False, checkpoint=tmp_path/'c', change={1: obey(every(2))})

def test_a_change_that_breaks_leaves_an_ordinary_network():
    net = small()
    with pytest.raises(ZeroDivisionError): fit(net, some(), Recipe(epochs=1, batch_size=64), progress=False, change={1: lambda m, opt: 1/0})
    assert not net.training and not any('forward' in vars(c) for c in convs(net).values())

# --- what training leaves alone ---

@pytest.mark.parametrize('kill', [False, True])
def test_random_numbers_of_others_are_left_alone_and_the_mode_is_eval(kill):
    "Also when somebody interrupts it"
    def die(epoch, model): torch.rand(3); model.train(); 1/(not kill)
    net = small(.5); torch.manual_seed(11); want = torch.rand(4); torch.manual_seed(11)
    try: fit(net, some(), Recipe(epochs=2, batch_size=64), progress=False, each_epoch=die)
    except ZeroDivisionError: assert kill
    assert torch.rand(4).equal(want) and not any(m.training for m in net.modules()) and not any('forward' in vars(c) for c in convs(net).values())

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_networks_of_other_precision(dtype):
    net, plain = small(0.).to(dtype), small(0.)
    for n in net, plain: fit(n, some(), Recipe(epochs=2, batch_size=50), progress=False); recalibrate(n, some(), images=100)
    assert {v.dtype for v in net.state_dict().values() if v.is_floating_point()} == {dtype}
    assert evaluate(net, some().val, some())[1] == pytest.approx(evaluate(plain, some().val, some())[1], rel=1e-5 if dtype == torch.float64 else .05)

def test_a_split_without_images():
    with pytest.raises(ValueError, match='a split of cifar10-mini without images was given, expected at least one'): evaluate(small(), some().val.take(torch.arange(0)), some())

@pytest.mark.parametrize('images,train', [(1, 150), (0, 150), (2048, 1)])
def test_one_image_has_no_statistics(images, train):
    net = small(); before = snapshot(net)
    with pytest.raises(ValueError, match=says(f'{min(images, train)} image(s) to recalibrate on, expected at least 2')): recalibrate(net, some(train), images=images)
    assert same(net.state_dict(), before)

# --- killed and taken up again ---

RECIPE = Recipe(epochs=4, batch_size=64, augment=True)
SILENT = {n: torch.arange(c.out_channels) % 4 > 0 for n, c in convs(small()).items()}
class Killed(Exception): pass

def train(path=None, kill_at=None, kill_after_steps=None, **kw):
    "Four epochs, with silent filters, dropout, crops and flips; killed after an epoch or in the midst of one"
    net, steps = small(.5), iter(range(1, 1000))
    def die(epoch, model):
        if epoch == kill_at: raise Killed
    def count(m, args):
        if m.training and next(steps) == kill_after_steps: raise Killed
    net.register_forward_pre_hook(count)
    history = fit(net, some(), **dict(dict(recipe=RECIPE, seed=3, progress=False, checkpoint=path, each_epoch=die, **keep_silent(net, SILENT)), **kw))
    return net.state_dict(), timeless(history)

@cache
def whole(): return train()

def is_whole(result): return same(result[0], whole()[0]) and result[1].equals(whole()[1])

@pytest.mark.parametrize('kill_at', [1, 2, 3, 4])
def test_killed_after_an_epoch(tmp_path, kill_at):
    with pytest.raises(Killed): train(tmp_path/'c.safetensors', kill_at)
    assert is_whole(train(tmp_path/'c.safetensors'))
    assert is_whole(train(tmp_path/'c.safetensors')) and [p.name for p in tmp_path.iterdir()] == ['c.safetensors']  # and once more when all is done

@pytest.mark.parametrize('steps', [1, 3, 4, 8, 11])
def test_killed_in_the_midst_of_an_epoch(tmp_path, steps):
    with pytest.raises(Killed): train(tmp_path/'c.safetensors', kill_after_steps=steps)
    assert (tmp_path/'c.safetensors').exists() == (steps > 3)
    assert is_whole(train(tmp_path/'c.safetensors'))

def test_killed_again_and_again(tmp_path):
    for epoch in (1, 2, 3, 4):
        with pytest.raises(Killed): train(tmp_path/'c.safetensors', epoch)
    assert is_whole(train(tmp_path/'c.safetensors'))

@pytest.mark.parametrize('where', ['fsync', 'replace'])
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path, monkeypatch, where):
    calls, real = iter(range(1, 100)), getattr(os, where)
    def full(*args):
        if next(calls) == 3: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)
    monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError, match=says('c.safetensors could not be written (No space left on device); nothing was changed', 'Free some space')): train(tmp_path/'c.safetensors')
    assert [p.name for p in tmp_path.iterdir()] == ['c.safetensors']
    with safetensors.safe_open(tmp_path/'c.safetensors', 'pt') as f: assert len(json.loads(f.metadata()['history'])) == 2
    assert is_whole(train(tmp_path/'c.safetensors'))

@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('checkpoint')/'c.safetensors'
    with pytest.raises(Killed): train(path, 1)
    return path.read_bytes()

@given(st.data())
@settings(max_examples=40, deadline=None)
def test_truncated_checkpoints_are_refused(checkpoint, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp()/'cut.safetensors'
    path.write_bytes(checkpoint[:data.draw(st.integers(0, len(checkpoint)-1))])
    with pytest.raises(OSError, match=says('cut.safetensors is damaged (', 'Delete it: training starts again at epoch 1')): train(path)

@given(st.data())
@settings(max_examples=40, deadline=None)
def test_checkpoints_with_a_flipped_bit_are_refused(checkpoint, tmp_path_factory, data):
    at, bit = data.draw(st.integers(8, len(checkpoint)-1)), data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp()/'flipped.safetensors'
    path.write_bytes(checkpoint[:at] + bytes([checkpoint[at] ^ 1 << bit]) + checkpoint[at+1:])
    with pytest.raises((OSError, ValueError), match=r'flipped\.safetensors is (damaged \(.*Delete it: training starts again at epoch 1|no checkpoint)'): train(path)

@pytest.mark.parametrize('other', [dict(seed=4), dict(recipe=replace(RECIPE, lr=.02)), dict(recipe=replace(RECIPE, epochs=5))], ids=str)
def test_checkpoints_of_another_training_are_refused(checkpoint, tmp_path, other):
    (tmp_path/'c.safetensors').write_bytes(checkpoint)
    with pytest.raises(ValueError, match=says('holds another training: ', 'seed 3', 'asked for', 'Name another checkpoint')): train(tmp_path/'c.safetensors', **other)

def test_checkpoints_of_another_network_plan_or_data_are_refused(checkpoint, tmp_path):
    path = tmp_path/'c.safetensors'; path.write_bytes(checkpoint)
    def refused(message, net, data=some(), p=None):
        before = snapshot(silence(net, p) if p else net)
        with pytest.raises(ValueError, match=message): fit(net, data, RECIPE, 3, progress=False, checkpoint=path, **keep_silent(net, p))
        assert same(net.state_dict(), before)
    refused('holds another training', small(.5), some(100), SILENT)
    refused('nothing held still after a step', small(.5))
    refused('set out from other weights', small(.5), p=every(3))
    refused('not of this architecture', small(.5, classes=7), p=SILENT)
    save_weights(small(), path)
    refused('c.safetensors is no checkpoint', small(.5))

def test_checkpoints_of_other_starting_weights_are_refused(checkpoint, tmp_path):
    path = tmp_path/'c.safetensors'; path.write_bytes(checkpoint)
    for harm in (lambda net: net[0].weight.data[1].flatten()[0].add_(1e-6), lambda net: net[1].running_mean.add_(1e-6)):
        net = silence(small(.5), SILENT); harm(net); before = snapshot(net)
        with pytest.raises(ValueError, match=says('c.safetensors holds a training that set out from other weights (SHA-256 ', 'Name another checkpoint')): fit(net, some(), RECIPE, 3, progress=False, checkpoint=path, **keep_silent(net, SILENT))
        assert same(net.state_dict(), before)

# --- recalibrate ---

@pytest.mark.parametrize('images', [2, 100, 256, 300, 512, 700])
def test_statistics_are_the_means_over_batches(images):
    "By numpy, from what each normalisation is shown"
    net, data, shown = small(), some(600), {}
    before, momenta = snapshot(net), [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for n, m in net.named_modules():
        if isinstance(m, nn.BatchNorm2d): m.register_forward_pre_hook(lambda m, args, n=n: shown.setdefault(n, []).append(args[0].detach().double().numpy()))
    assert recalibrate(net, data, images=images) is net
    for n, batches in shown.items():
        assert sum(map(len, batches)) == min(images, 600)
        m = dict(net.named_modules())[n]
        np.testing.assert_allclose(m.running_mean, np.mean([b.mean((0, 2, 3)) for b in batches], 0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(m.running_var, np.mean([b.var((0, 2, 3), ddof=1) for b in batches], 0), rtol=1e-4, atol=1e-6)
    statistics = {f'{n}.{k}' for n in shown for k in ('running_mean', 'running_var', 'num_batches_tracked')}
    assert not net.training and [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    assert {k for k, v in net.state_dict().items() if not v.equal(before[k])} == statistics

def test_one_batch_of_all_images_by_hand():
    net, data = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4096, 2)), some(200)
    recalibrate(net, data)
    out = np.einsum('nchw,oc->nohw', data.normalise(data.train.x).double().numpy(), net[0].weight.detach().double().numpy()[:, :, 0, 0])
    np.testing.assert_allclose(net[1].running_mean, out.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(net[1].running_var, out.var((0, 2, 3), ddof=1), rtol=1e-4)

@pytest.mark.parametrize('images', [257, 513])
def test_a_last_batch_of_one_image_is_left_out(images):
    "A batch normalisation behind a map of one position can't be measured on it"
    net, twin = build(), build()
    recalibrate(net, some(600), images=images); recalibrate(twin, some(600), images=images-1)
    assert same(net.state_dict(), twin.state_dict())

def test_recalibration_is_the_seeds_and_can_be_repeated():
    nets = [recalibrate(small(), some(600), seed=s, images=100).state_dict() for s in (0, 0, 1)]
    assert same(nets[0], nets[1]) and not same(nets[0], nets[2])
    net = small(); once = snapshot(recalibrate(net, some())); assert same(recalibrate(net, some()).state_dict(), once)

def test_silent_filters_are_silent_while_statistics_are_taken():
    "And the others' are those of the network without them"
    p = plan({n: torch.rand(c.out_channels, generator=torch.Generator().manual_seed(2)) for n, c in convs(small()).items()}, .5, coupling='coupled', groups=groups(small()))
    net, little = recalibrate(silence(small(), p), some()), recalibrate(cut(small(), p), some())
    for n, k in p.items():
        m, other = net[int(n)+1], little[int(n)+1]
        assert m.running_mean[~k].eq(0).all() and m.weight[~k].eq(0).all() and m.running_mean[k].ne(0).all()
        for key in 'running_mean', 'running_var': assert_close(getattr(m, key)[k], getattr(other, key), rtol=1e-4, atol=1e-6)

def test_recalibration_that_breaks_gives_the_momentum_back():
    net = small()
    net[-1].register_forward_pre_hook(lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): recalibrate(net, some())
    assert [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)] == [.1]*3 and not net.training and not any('forward' in vars(c) for c in convs(net).values())

def test_recalibration_of_a_dense_network_is_near_its_training_statistics():
    "One that learnt with batches of these images, and is measured on them"
    net = small(0.)
    fit(net, some(), Recipe(epochs=6, batch_size=150, lr=1e-6), progress=False)
    fitted = snapshot(net)
    recalibrate(net, some())
    for k, v in net.state_dict().items():
        if 'running_mean' in k: assert_close(fitted[k], v*(1-.9**6), rtol=1e-2, atol=1e-3)  # momentum 0.1, from zero
