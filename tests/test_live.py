"""Law 8: what is left of a silenced network learns what the silenced one would have learnt; a run trains only that."""
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from networks import restless
from xprune_nb.criteria import CRITERIA, score
from xprune_nb.data import load
from xprune_nb.experiments import Run, prune_steps, row, stream
from xprune_nb.experiments.run import CALIBRATION
from xprune_nb.model import baseline, build, convs
from xprune_nb.pruning import COUPLINGS, Live, classifier, groups, plan, silence, silencer
from xprune_nb.training import evaluate, fit, recalibrate

SHAPE = 3, 32, 32

def vgg(norm):
    "Narrow, with dropout between linear layers of its own"
    body = models.vgg.make_layers([8, 'M', 12, 12, 'M', 16, 'M'], norm)
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(.3), nn.Linear(64, 20), nn.ReLU(True), nn.Dropout(), nn.Linear(20, 4))

class Wide(nn.Module):
    "Concatenation, a grouped convolution, a bias in front of batch normalisation, PReLU, dropout of whole channels"
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1, bias=False)
        self.norm, self.act, self.drop = nn.BatchNorm2d(16), nn.PReLU(16), nn.Dropout2d(.2)
        self.mix, self.mixed = nn.Conv2d(16, 8, 1, groups=2), nn.BatchNorm2d(8, affine=False)
        self.end, self.out = nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
    def forward(self, x):
        h = self.drop(self.act(self.norm(torch.cat([self.a(x), self.b(x)], 1))))
        return self.out(self.end(torch.sigmoid(self.mixed(self.mix(h)))).mean((2, 3)))

NETS = dict(
    mobilenet_v2=lambda: models.mobilenet_v2(num_classes=4, width_mult=.5, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]), resnet=lambda: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], 4, width_per_group=64),
    bottleneck=lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 0 + 1, 1], 4, groups=4, width_per_group=8), vgg=lambda: vgg(False), vgg_bn=lambda: vgg(True), wide=Wide)

@pytest.fixture(scope='module')
def net(request):
    torch.manual_seed(0)
    return restless(NETS[request.param]()).double()

def images(n=24):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, *SHAPE, generator=g, dtype=torch.double), torch.arange(n) % 4

def learn(net, after_step, steps=3):
    "SGD written out: momentum, weight decay, the same dropout each time"
    (x, y), velocity = images(), {}
    net.train(); after_step()
    for i in range(steps):
        torch.manual_seed(i)
        params = dict(net.named_parameters())
        grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(params.values()), allow_unused=True)
        with torch.no_grad():
            for (k, p), g in zip(params.items(), grads):
                g = (torch.zeros_like(p) if g is None else g) + 1e-2*p
                velocity[k] = g if k not in velocity else .9*velocity[k] + g
                p -= .005*velocity[k]
        after_step()

def seen(net, mode):
    "What it puts out: in training mode, or in eval mode with statistics measured anew"
    x, _ = images()
    if mode == 'eval':
        bns = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        net.eval()
        for m in bns: m.reset_running_stats(); m.momentum = None; m.train()
        with torch.no_grad(): net(x)
        net.eval()
    torch.manual_seed(7)
    with torch.no_grad(): return net.train(mode == 'train')(x)

def same(a, b):
    for mode in 'train', 'eval':
        x, y = seen(a, mode), seen(b, mode)
        assert (x - y).abs().max() < 1e-9 and x.std() > 1e-3, mode

@pytest.mark.parametrize('ratio', [.4, .7])
@pytest.mark.parametrize('norm', ['silent', 'alive'])
@pytest.mark.parametrize('coupling', COUPLINGS)
@pytest.mark.parametrize('net', NETS, indirect=True)
@pytest.mark.filterwarnings('ignore:Dropout2d')
def test_what_is_left_learns_the_same(net, coupling, norm, ratio):
    gs = groups(net, SHAPE)
    scores = {n: torch.rand(c.out_channels, generator=torch.Generator().manual_seed(len(n))) for n, c in convs(net).items()}
    p = plan(scores, ratio, coupling=coupling, groups=gs, protect=classifier(net))
    whole = silence(copy.deepcopy(net), p, norm)
    before = {k: v.clone() for k, v in whole.state_dict().items()}
    live = Live(whole, p, SHAPE, norm)
    assert all(v.equal(before[k]) for k, v in whole.state_dict().items())
    with torch.no_grad():  # as it was cut, before any recalibration
        torch.testing.assert_close(live.net.eval()(images()[0]), whole.eval()(images()[0]), rtol=0, atol=1e-9)
    size = lambda m: sum(q.numel() for q in m.parameters())
    assert size(live.net) < size(whole) or norm == 'alive'  # there a silent filter is a constant, and zeros are padded around it
    laid = copy.deepcopy(whole)
    learn(whole, silencer(whole, p, norm)), learn(live.net, live.hush)
    if live.connected: same(live.net, whole); same(live.give(laid), whole)
    again = {k: v.clone() for k, v in live.net.state_dict().items()}
    for k, v in live.take(live.give(laid)).state_dict().items(): assert v.equal(again[k])

@pytest.mark.parametrize('padding,stays', [(0, False), (1, True)])
def test_a_constant_that_training_can_change_stays_where_it_matters(padding, stays):
    "A channel without input is the constant of its bias: batch normalisation takes it out of a convolution's outputs, unless zeros are padded around it"
    torch.manual_seed(0)
    net = restless(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=padding, bias=False), nn.BatchNorm2d(2),
                                 nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4))).double()
    every = {n: torch.ones(c.out_channels, dtype=torch.bool) for n, c in convs(net).items()}
    live = Live(net, every | {'0': torch.tensor([False, True, True, True])}, SHAPE)
    assert live.net[1].out_channels == 3 + stays

def test_a_constant_in_front_of_a_linear_layer_goes_on_learning():
    "Its bias could take the constant in, and would then learn in its place, at another rate"
    torch.manual_seed(0)
    net = restless(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))).double()
    every = {n: torch.ones(c.out_channels, dtype=torch.bool) for n, c in convs(net).items()}
    p = every | {'0': torch.tensor([False, True, True, True])}
    live, whole = Live(net, p, SHAPE), silence(copy.deepcopy(net), p)
    assert live.net[5].in_features == 4
    learn(live.net, live.hush), learn(whole, silencer(whole, p))
    same(live.net, whole)

@pytest.mark.parametrize('clipped', [-2., 2.])
def test_a_constant_that_is_zero_today_is_not_taken_for_silence(clipped):
    "What an activation clips may come back: it is dropped only where any constant would be"
    torch.manual_seed(0)
    net = restless(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2),
                                 nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4))).double()
    net[1].bias.data[0] = 0; net[2].running_mean[0] = 0; net[2].bias.data[0] = clipped
    every = {n: torch.ones(c.out_channels, dtype=torch.bool) for n, c in convs(net).items()}
    assert Live(net, every | {'0': torch.tensor([False, True, True, True])}, SHAPE).net[1].out_channels == 4

# --- a run ---

@pytest.fixture(scope='module')
def tiny():
    data = load()
    return replace(data, **{s: getattr(data, s).take(torch.arange(n)) for s, n in dict(train=128, val=40, test=40).items()})

def silenced_run(run, data, plans):
    "The same run by silencing: algorithms 1 to 4 with the whole network, from the plans that were made"
    net, base = baseline(run.baseline).net().double(), baseline(run.baseline)
    for i, p in enumerate(plans, 1):
        if run.retrain == 'weights': net.load_state_dict(base.weights(run.rewind))
        recalibrate(silence(net, p, run.norm), data, run.seed, CALIBRATION)
        fit(net, data, run.recipe(i == len(plans)), stream(run, i), progress=False, after_step=silencer(net, p, run.norm))
    return net

def outputs(net, data, train):
    torch.manual_seed(3)
    with torch.no_grad(): return net.train(train)(data.normalise(data.train.x[:40]).double())

CASES = [dict(criterion=c, coupling=k) for k in COUPLINGS for c in ('random', 'magnitude', 'conductance', 'lrp')]
@pytest.mark.parametrize('kw', [*CASES, dict(criterion='magnitude', schedule='iterative', steps=2, retrain='lr'), dict(criterion='conductance', schedule='iterative', steps=2, epochs_between=2, rewind=5),
                                dict(criterion='taylor', schedule='iterative', steps=2, coupling='coupled', norm='alive')], ids=str)
def test_a_run_trains_what_is_left_as_if_the_rest_were_there(tiny, kw):
    run = Run(**dict(dict(ratio=.6, epochs=2, images=16, path_steps=3, lr=1e-3), **kw))
    net = baseline(run.baseline).net().double()
    steps = list(prune_steps(run, net, tiny, progress=False))
    live, whole = steps[-1].live.net, silenced_run(run, tiny, [s.plan for s in steps])
    assert steps[-1].live.connected
    torch.testing.assert_close(outputs(live, tiny, True), outputs(whole, tiny, True), rtol=0, atol=1e-9)
    for m in live, whole: recalibrate(m, tiny)
    torch.testing.assert_close(outputs(live, tiny, False), outputs(whole, tiny, False), rtol=0, atol=1e-9)
    recalibrate(net, tiny)  # the whole network has got what was learnt
    torch.testing.assert_close(outputs(net, tiny, False), outputs(whole, tiny, False), rtol=0, atol=1e-9)

@pytest.mark.slow
@pytest.mark.parametrize('criterion', [c for c in CRITERIA if c not in ('ablation', 'random', 'magnitude', 'conductance', 'lrp')])
@pytest.mark.parametrize('coupling', COUPLINGS)
def test_every_other_criterion_too(tiny, criterion, coupling): test_a_run_trains_what_is_left_as_if_the_rest_were_there(tiny, dict(criterion=criterion, coupling=coupling))

@pytest.mark.parametrize('coupling', COUPLINGS)
def test_a_gradual_run_keeps_momentum(tiny, coupling):
    "Against one training of the whole network, in which more and more is zeroed; its optimiser never changes"
    run = Run(criterion='magnitude', schedule='gradual', steps=3, epochs=4, ratio=.6, images=16, coupling=coupling, lr=1e-3)
    steps = list(prune_steps(run, baseline().net().double(), tiny, progress=False))
    whole, ends = baseline().net().double(), [4*i//3 for i in (1, 2, 3)]
    obey = lambda p: lambda model, opt: (model, opt, silencer(model, p))
    fit(whole, tiny, run.recipe(), stream(run, 1), progress=False, change={e: obey(s.plan) for e, s in zip(ends, steps)})
    torch.testing.assert_close(outputs(steps[-1].live.net, tiny, True), outputs(whole, tiny, True), rtol=0, atol=1e-9)
    for m in steps[-1].live.net, whole: recalibrate(m, tiny)
    torch.testing.assert_close(outputs(steps[-1].live.net, tiny, False), outputs(whole, tiny, False), rtol=0, atol=1e-9)

def test_a_network_with_nothing_left_to_train_says_so(tiny):
    run = Run(criterion='random', ratio=.9, epochs=50, images=10, seed=next(s for s in range(20) if not left(s)))
    net = baseline().net()
    step, = prune_steps(run, net, tiny, progress=False)
    r = row(run, net, tiny, [step])
    assert not step.live.connected and not r['connected'] and r['epochs_spent'] == 0 and r['accuracy_epochs'] == []
    x = tiny.normalise(tiny.test.x)
    assert step.live.net(x).std(0).max() < 1e-4 < baseline().net()(x).std(0).min()  # every image is the same to it

def left(seed):
    "By counting: whether block 1, which has no shortcut, keeps a channel in both of its layers"
    net = baseline().net()
    p = plan(score('random', net, None, None, seed=stream(Run(seed=seed), 1)), .9)
    return bool((p['features.0.0'] & p['features.1.conv.0.0']).any())

def test_a_run_is_fair_to_what_does_not_know_the_dead(tiny):
    """Dead filters that scored 0 because they are gone would be removed first: at 0.9, iterative and at random, three times as many channels would be alive in
    two layers of a block as chance leaves them"""
    net, gs = baseline().net(), groups(baseline().net())
    run = Run(criterion='random', schedule='iterative', ratio=.9, steps=3, epochs=0, images=10)
    steps = list(prune_steps(run, net, tiny, progress=False))
    r = row(run, net, tiny, steps)
    told, draws = None, [score('random', net, None, None, seed=stream(run, i)) for i in (1, 2, 3)]
    for ratio, s in zip([st.ratio for st in steps], draws):
        if told: s = {n: v*(~dead_of(net, told, gs)[n]) for n, v in s.items()}
        told = plan(s, ratio, within=told)
    from xprune_nb.pruning import alive_in_both
    assert abs(r['alive_in_both'] - .01) < .004 and alive_in_both(net, told, gs) > 3*r['alive_in_both']

def dead_of(net, p, gs):
    "By hand: a filter of a group is dead when another member has lost its channel"
    out = {n: torch.zeros(len(k), dtype=torch.bool) for n, k in p.items()}
    for g in gs:
        if len(g) == 2:
            both = p[g[0]] & p[g[1]]
            for n in g: out[n] = ~both
    return out
