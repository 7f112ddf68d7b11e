"""Criteria as importances of Torch-Pruning: against our own coupled plans, by every kind of its pruners, and what makes scores be taken anew."""
import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision import models

from networks import restless
from xprune_nb.criteria import importance as room
from xprune_nb.criteria import CRITERIA, Importance, score
from xprune_nb.data import load, sample
from xprune_nb.model import baseline, convs, cost
from xprune_nb.pruning import groups, plan

QUICK = [c for c in CRITERIA if c not in ('ablation', 'integrated_gradients')]

class Forked(nn.Module):
    "Two convolutions whose channels are joined one behind the other, one of them grouped; a hidden layer in the classifier"
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.last, self.hidden, self.out = nn.BatchNorm2d(20), nn.Conv2d(20, 16, 3), nn.Linear(16, 12), nn.Linear(12, 4)
    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1)))
        return self.out(F.relu(self.hidden(F.relu(self.last(x)).mean((2, 3)))))

NETWORKS = dict(mobilenet_v2=lambda: baseline().net(), resnet18=lambda: models.resnet18(num_classes=4), forked=Forked)

def network(name):
    "MobileNetV2 is the embedded one: untrained, its signals die out and scores are ties"
    torch.manual_seed(0)
    return NETWORKS[name]() if name == 'mobilenet_v2' else restless(NETWORKS[name]())
def images(n=3, size=32): return torch.randn(n, 3, size, size), torch.arange(n) % 4
def pruner(net, importance, **kw):
    kw = dict(dict(pruning_ratio=.5, ignored_layers=[m for m in net.modules() if isinstance(m, nn.Linear)]), **kw)
    return tp.pruner.BasePruner(net, torch.zeros(1, 3, 32, 32), importance, **kw)
def taken(net, p):
    "Which output channels of each convolution a pruner's step takes away"
    names, gone = {m: n for n, m in convs(net).items()}, {}
    for group in p.step(interactive=True):
        for dep, idxs in group:
            if dep.target.module in names and p.DG.is_out_channel_pruning_fn(dep.handler): gone[names[dep.target.module]] = sorted(set(idxs))
        group.prune()
    return gone

# --- what it says of a group ---

@pytest.mark.parametrize('criterion', QUICK)
@pytest.mark.parametrize('name', ['mobilenet_v2', 'resnet18'])
def test_a_local_pruner_takes_what_a_coupled_plan_does(name, criterion):
    net, (x, y) = network(name), images()
    s, gs = score(criterion, net, x, y), groups(net)
    want = plan(s, .5, coupling='coupled', groups=gs)
    p = pruner(net, Importance(criterion, net, x, y))
    got = taken(net, p)
    assert set(got) == set(convs(net))
    for g in gs: # of equal scores (APoZ counts) either may go: what is kept must be worth as much
        worth, gone = sum(s[n].double()/s[n].double().abs().mean() for n in g), {n: torch.zeros(len(s[n]), dtype=torch.bool) for n in g}
        for n in g: gone[n][got[n]] = True; assert gone[n].equal(gone[g[0]]), n
        assert_close(worth[~gone[g[0]]].sum(), worth[want[g[0]]].sum())
    assert len(net(x)) == 3 and all(c.out_channels == len(want[n])//2 for n, c in convs(net).items())

def test_a_group_by_hand():
    net, (x, y) = network('resnet18'), images()
    graph, importance = tp.DependencyGraph().build_dependency(net, x[:1]), Importance('taylor', net, x, y, what='logit')
    s = {n: v.double()/v.double().mean() for n, v in score('taylor', net, x, y, what='logit').items()}
    group = lambda n, idxs: graph.get_pruning_group(convs(net)[n], tp.prune_conv_out_channels, idxs)
    assert_close(importance(group('layer1.0.conv1', list(range(64)))), s['layer1.0.conv1'])
    stage = 'conv1', 'layer1.0.conv2', 'layer1.1.conv2'
    whole = importance(group('conv1', list(range(64))))
    assert_close(whole, sum(s[n] for n in stage)/3)
    assert whole.mean().item() == pytest.approx(1)
    assert_close(importance(group('layer1.0.conv2', [7, 3, 40])), whole[[7, 3, 40]])  # a part of it, from another root, in that order

def test_groups_that_join_channels_and_groups_without_a_convolution():
    net, (x, y) = network('forked'), images()
    graph, importance = tp.DependencyGraph().build_dependency(net, x[:1]), Importance('conductance', net, x, y)
    s = {n: v.double()/v.double().mean() for n, v in score('conductance', net, x, y).items()}
    full = lambda m, fn, n: importance(graph.get_pruning_group(m, fn, list(range(n))))
    assert_close(full(net.a, tp.prune_conv_out_channels, 12), s['a'])  # joined with others behind it, cut by itself
    assert_close(full(net.stem, tp.prune_conv_out_channels, 8), (s['stem'] + s['b'])/2)  # a depthwise convolution goes along
    assert full(net.hidden, tp.prune_linear_out_channels, 12) is None  # no convolution loses a filter
    p = tp.pruner.BasePruner(net, x[:1], importance, pruning_ratio=.5, ignored_layers=[net.out])
    p.step()
    assert net.hidden.out_features == 12 and {n: c.out_channels for n, c in convs(net).items()} == dict(stem=4, a=6, b=4, last=8) and net(x).shape == (3, 4)

def test_signed_and_constant_scores():
    net, (x, y) = network('resnet18'), images()
    graph = tp.DependencyGraph().build_dependency(net, x[:1])
    group = graph.get_pruning_group(net.layer1[0].conv1, tp.prune_conv_out_channels, list(range(64)))
    s = score('lrp', net, x, y, aggregate='signed')['layer1.0.conv1'].double()
    assert_close(Importance('lrp', net, x, y, aggregate='signed')(group), s/s.abs().mean()); assert (s < 0).any()
    net.layer1[0].conv1.weight.data.zero_()
    assert (Importance('magnitude', net, x, y)(group) == 0).all()

# --- every kind of pruner ---

@pytest.mark.parametrize('kind', [tp.pruner.BasePruner, tp.pruner.MetaPruner, tp.pruner.MagnitudePruner, tp.pruner.GroupNormPruner], ids=lambda k: k.__name__)
@pytest.mark.parametrize('options', [dict(), dict(iterative_steps=3), dict(global_pruning=True, max_pruning_ratio=.9), dict(global_pruning=True, iterative_steps=2, max_pruning_ratio=.9),
                                     dict(round_to=8), dict(global_pruning=True, isomorphic=True, max_pruning_ratio=.9)], ids=lambda o: '-'.join(o) or 'plain')
def test_pruners(kind, options):
    net, (x, y) = network('resnet18'), images()
    before, steps = cost(net).sum(), options.get('iterative_steps', 1)
    p = kind(net, x[:1], Importance('gradient_activation', net, x, y), pruning_ratio=.5, ignored_layers=[net.fc], **options)
    for _ in range(steps): p.step()
    after = cost(net).sum()
    assert .05*before.params < after.params < .6*before.params and net(x).shape == (3, 4) and net(x).isfinite().all()
    if not options.get('global_pruning'): assert all(c.out_channels*2 == d.out_channels for c, d in zip(convs(net).values(), convs(network('resnet18')).values()))

def test_a_global_pruner_takes_the_lowest_of_all_groups():
    net, (x, y) = network('mobilenet_v2'), images()
    s, gs = score('conductance', net, x, y), groups(net)
    ranks = {g[0]: sum(s[n].double()/s[n].double().mean() for n in g)/len(g) for g in gs}
    line = torch.cat([*ranks.values()]).sort().values
    gone = len(line) - int(len(line)*.7)
    got = taken(net, pruner(net, Importance('conductance', net, x, y), global_pruning=True, pruning_ratio=.3))
    for g in gs:
        want = (ranks[g[0]] <= line[gone-1]).nonzero().flatten().tolist()
        for n in g: assert got.get(n, []) == want, n

# --- scores are taken once for each state of the network ---

@pytest.fixture
def counted(monkeypatch):
    calls, whole = [], room.score
    monkeypatch.setattr(room, 'score', lambda *a, **kw: (calls.append(a[0]), whole(*a, **kw))[1])
    return calls

@pytest.mark.parametrize('options', [dict(), dict(global_pruning=True, max_pruning_ratio=.9)], ids=['local', 'global'])
def test_one_scoring_a_step(counted, options):
    net, (x, y) = network('mobilenet_v2'), images()
    p = pruner(net, Importance('taylor', net, x, y), iterative_steps=3, **options)
    for i in 1, 2, 3:
        p.step()
        assert counted == ['taylor']*i or options and i == 3 and counted == ['taylor']*2  # a global pruner may be there in two
    whole = network('mobilenet_v2')
    assert sum(c.out_channels for c in convs(net).values()) < .7*sum(c.out_channels for c in convs(whole).values())

def test_what_makes_scores_be_taken_anew(counted):
    net, (x, y) = network('resnet18'), images()
    importance = Importance('taylor', net, x, y)
    first = importance.scores()
    assert importance.scores() is first and len(counted) == 1
    def changed(how):
        before = len(counted)
        with torch.no_grad(): how()
        importance.scores(); importance.scores()
        return len(counted) - before
    assert changed(lambda: net.conv1.weight.mul_(1.01)) == 1  # training
    assert changed(lambda: net.conv1.weight.data.mul_(1.01)) == 1  # behind autograd's back
    assert changed(lambda: setattr(net.conv1, 'weight', nn.Parameter(net.conv1.weight.clone()))) == 0  # the same in another place
    assert changed(lambda: net.layer4[0].bn1.running_mean.add_(1e-3)) == 1  # recalibration
    assert changed(lambda: net(x)) == 0
    with torch.enable_grad(): graph = tp.DependencyGraph().build_dependency(net, x[:1])
    assert changed(lambda: graph.get_pruning_group(net.layer4[0].conv1, tp.prune_conv_out_channels, [5]).prune()) == 1
    assert len(importance.scores()['layer4.0.conv1']) == 511

def test_second_step_scores_the_smaller_network(counted):
    net, (x, y) = network('resnet18'), images()
    p = pruner(net, importance := Importance('conductance', net, x, y), iterative_steps=2)
    p.step()
    smaller = copy.deepcopy(net)
    p.step()
    assert_close(importance.kept, score('conductance', smaller, x, y))

@pytest.mark.parametrize('mode', [True, False])
def test_the_network_is_left_in_its_mode(mode):
    net, (x, y) = network('resnet18').train(mode), images()
    net.bn1.eval()
    modes, state = [m.training for m in net.modules()], copy.deepcopy(net.state_dict())
    importance = Importance('conductance', net, x, y)
    with torch.no_grad(): importance.scores()
    assert [m.training for m in net.modules()] == modes and all(state[k].equal(v) for k, v in net.state_dict().items())
    assert_close(importance.kept, score('conductance', network('resnet18'), x, y))

def test_wrong_is_refused_in_a_sentence():
    net, (x, y) = network('resnet18'), images()
    with pytest.raises(ValueError, match="no criterion called 'conduct'; did you mean 'conductance'"): Importance('conduct', net, x, y)
    with pytest.raises(ValueError, match="no option called 'stepz'; did you mean 'steps'"): Importance('conductance', net, x, y, stepz=3).scores()
    with pytest.raises(ValueError, match='bn_scale: 4 of 4 convolutions have no batch norm'): pruner(n := network('forked'), Importance('bn_scale', n, x, y)).step()

def test_the_baseline_keeps_more_by_conductance_than_by_chance():
    x, y = sample(data := load(), 64)
    x_val, y_val = data.normalise(data.val.x[:300]), data.val.y[:300]
    def right(criterion):
        net = baseline().net()
        pruner(net, Importance(criterion, net, x, y), pruning_ratio=.1, ignored_layers=[net.classifier]).step()
        with torch.no_grad(): return (net(x_val).argmax(1) == y_val).float().mean().item()
    assert right('conductance') > right('random') + .1
