"""The explorer without a browser: answers against the rooms' own, nothing worked out twice, clicks, files, networks of one's own. The real browser is in test_lab."""
import asyncio, copy, io, re, socket
from datetime import datetime
from itertools import product

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import xprune_nb.widgets as widgets
from networks import Untraceable, sequential, small, torchvisions
from xprune_nb.criteria import ATTRIBUTIONS, CRITERIA, attributions, score
from xprune_nb.charts import COLOURS
from xprune_nb.data import Data, Images, load, sample
from xprune_nb.model import cost
from xprune_nb.pruning import cut, groups, plan, silence
from xprune_nb.training import evaluate, recalibrate
from xprune_nb.widgets import (PARTS, WHOLE, Cache, Choice, FilterExplorer, LiveChart, Picture, Workbench, bars_chart, cost_html, disagreement_chart, grid_of, maps_image,
                               network_strip, own_images, size_of, strip_of, tiles, top_images)

class Untouchable:
    "A test set that no one may look at"
    def to(self, device): return self
    def __getattr__(self, name): raise AssertionError(f'the test set was asked for its {name}')

def some_images(n=80, size=16, classes=4):
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8), torch.arange(n) % classes

def own_data(**kw):
    from dataclasses import replace
    return replace(own_images(*some_images(**kw)), test=Untouchable())

def tiny(): torch.manual_seed(3); return small()

def bench(net=None, **kw): return Workbench(net or tiny(), own_data(), images=16, search=40, **kw)

class Passes(TorchDispatchMode):
    "Counts convolutions and matrix products"
    def __init__(self): super().__init__(); self.n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.n += any(w in str(f) for w in ('convolution', 'addmm', '.mm', 'bmm', 'linear'))
        return f(*args, **(kwargs or {}))

@pytest.fixture
def still(monkeypatch): monkeypatch.setattr(FilterExplorer, 'rest', 0)

@pytest.fixture
def explorer(still): return FilterExplorer(tiny(), own_data(), images=16, search=40, layer='1.conv.0.0')

# --- the cache ---

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40)), max_size=40), st.integers(1, 100))
def test_the_cache_never_holds_more_than_its_bound(asks, limit):
    c, sizes = Cache(limit), {}
    for key, n in asks:
        value = c.get((key,), lambda: torch.zeros(n, dtype=torch.uint8))
        if len(value) != n: assert len(value) == sizes[key] # an older one, still there
        if (key,) in c: sizes[key] = len(value)
        assert c.bytes == sum(size_of(v) for v, _ in c.kept.values()) <= limit and c.peak <= limit

def test_a_value_is_made_once_and_what_was_used_least_lately_goes():
    c, made = Cache(80), []
    def ask(k): return c.get(k, lambda: made.append(k) or torch.zeros(10))
    for k in 'ababca': ask(k)
    assert made == ['a', 'b', 'c', 'a'] and [*c.kept] == ['c', 'a']  # 'a' was the oldest when 'c' came

def test_an_error_is_not_kept():
    c = Cache()
    with pytest.raises(ZeroDivisionError): c.get('k', lambda: 1/0)
    assert c.get('k', lambda: b'12') == b'12' and c.bytes == 2

@pytest.mark.parametrize('value, n', [(torch.zeros(5), 20), (torch.zeros(1000)[:5], 4000), (np.zeros(3), 24), (b'1234', 4),
                                      ({'a': torch.zeros(1)}, 68), ((torch.zeros(1), torch.zeros(1)), 72), (Image.new('RGB', (4, 5)), 60)],
                         ids=['tensor', 'view', 'array', 'bytes', 'dict', 'tuple', 'picture'])
def test_sizes_count_what_is_kept_alive(value, n): assert size_of(value) == n

def test_a_small_cache_gives_the_same_answers():
    roomy, tight, how = bench(), bench(memory=3000), Choice(ratio=.4)
    view = roomy.image(2, 1)
    for n in roomy.layers: assert torch.equal(roomy.maps('conductance', view, n).values, tight.maps('conductance', view, n).values)
    assert roomy.accuracy(how) == tight.accuracy(how) and roomy.cost(how) == tight.cost(how) and 0 < tight.cache.peak <= 3000

# --- answers are the rooms' own ---

@pytest.mark.parametrize('criterion', [*CRITERIA])
def test_scores_are_the_rooms_own(criterion):
    b = bench()
    x, y = sample(b.data, 16)
    want = score(criterion, b.model, x, y)
    assert [*b.scores(criterion)] == [*want]
    for n, s in b.scores(criterion).items(): torch.testing.assert_close(s, want[n], rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('scope, coupling, ratio', [*product(('local', 'global'), ('independent', 'coupled'), (.2, .5))])
def test_the_plan_is_the_rooms_own(scope, coupling, ratio):
    b = bench()
    want = plan(score('lrp', b.model, *sample(b.data, 16)), ratio, scope, coupling, groups(b.model, b.shape))
    if coupling == 'independent': want = plan(score('lrp', b.model, *sample(b.data, 16)), ratio, scope)
    got = b.plan(Choice(criterion='lrp', ratio=ratio, scope=scope, coupling=coupling))
    assert all(got[n].equal(k) for n, k in want.items()) and [*got] == [*want]

@pytest.mark.parametrize('name', ['vgg', 'vgg_bn', 'resnet18', 'mobilenet_v2'])
def test_the_cost_is_that_of_the_cut_network(name):
    b = Workbench(torchvisions()[name](), own_data(size=32), images=4, search=4)
    for ratio, coupling in product((.0, .3, .8), ('independent', 'coupled')):
        how = Choice(criterion='magnitude', ratio=ratio, coupling=coupling)
        there = cost(cut(b.model, b.plan(how), b.shape), b.shape)
        assert b.cost(how) == dict(params=there.params.sum(), macs=there.macs.sum()), (ratio, coupling)
    assert b.cost(Choice(criterion='magnitude', ratio=0.)) == b.dense()

def test_accuracy_is_measured_on_held_out_images_after_recalibration():
    b, how = bench(), Choice(criterion='taylor', ratio=.5)
    net = recalibrate(silence(copy.deepcopy(b.model), b.plan(how)), b.data, images=b.sizes()[0])
    assert b.accuracy(how) == pytest.approx(evaluate(net, b.data.val, b.data)[0]) and len(b.held_out().y) == len(b.data.val.y)
    assert b.accuracy() == pytest.approx(evaluate(b.model, b.data.val, b.data)[0])

def test_measuring_goes_in_steps_and_ends_at_one():
    b = bench()
    steps = [*b.measuring(Choice(ratio=.5))]
    assert steps == sorted(steps) and steps[-1] == 1 and len(steps) >= 3 and [*b.measuring(Choice(ratio=.5))] == []

@pytest.mark.parametrize('criterion', [*ATTRIBUTIONS])
def test_maps_are_the_attributions(criterion):
    b = bench()
    view, options = b.image(1, 2), {'background': b.x} if 'shap' in criterion else {}
    want = attributions(criterion, b.model, b.inputs(view.pixels), view.labels, **options)
    for n, O in b.layers.items():
        m = b.maps(criterion, view, n)
        assert m.kind == 'attribution' and m.values.shape[0] == O
        torch.testing.assert_close(m.values, want[n][0], rtol=1e-4, atol=1e-6)

def test_a_class_shows_the_mean_map():
    b = bench()
    view = b.of_class(2, 3)
    singles = [b.maps('lrp', b.image(2, i), '1.conv.1.0').values for i in range(3)]
    torch.testing.assert_close(b.maps('lrp', view, '1.conv.1.0').values, torch.stack(singles).mean(0), rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('criterion', [c for c in CRITERIA if c not in ATTRIBUTIONS])
def test_criteria_without_maps_say_what_they_show(criterion):
    b = bench()
    m = b.maps(criterion, b.image(0), '0.0')
    weights = criterion in ('random', 'magnitude', 'magnitude_l2', 'fpgm', 'bn_scale')
    assert m.kind == ('weights' if weights else 'activation') and f'{criterion} has no maps' in m.says and m.kind[:6] in m.says
    if weights: assert torch.equal(m.values, b.model[0][0].weight.detach().mean(1))

def test_weights_of_a_1x1_convolution_are_a_square_an_input():
    b = bench()
    w = next(m for n, m in b.model.named_modules() if n == '1.conv.0.0').weight.detach()
    shown = b.weights('1.conv.0.0')
    assert w.shape[1:] == (6, 1, 1) and shown.shape == (12, 2, 3) and torch.equal(shown.flatten(1), w.flatten(1))

def test_activations_are_those_behind_the_batch_norm():
    b = bench()
    view, seen = b.image(3, 1), {}
    hook = b.model[0][1].register_forward_hook(lambda m, i, o: seen.update(o=o.clone()))
    b.model(b.inputs(view.pixels)); hook.remove()
    torch.testing.assert_close(b.activations(view)['0.0'], seen['o'][0].detach(), rtol=1e-4, atol=1e-5)

def test_top_images_by_trying_all():
    b = bench()
    x, y = sample(b.data, 40)
    with torch.no_grad(): out = b.model[0][1](b.model[0][0](x))
    for f in (0, 5):
        pixels, labels, maps, peaks = b.top('0.0', f, 3)
        value, which = out[:, f].flatten(1).amax(1).topk(3)
        torch.testing.assert_close(peaks, value, rtol=1e-4, atol=1e-5); torch.testing.assert_close(maps.flatten(1).amax(1), value, rtol=1e-4, atol=1e-5)
        assert labels.equal(y[which]) and (b.data.normalise(pixels) - x[which]).abs().max() < 1e-5

# --- nothing twice, nothing changed, nothing from the test set ---

ASKS = dict(scores=lambda b: b.scores('conductance'), maps=lambda b: b.maps('conductance', b.image(1), '0.0'), class_maps=lambda b: b.maps('lrp', b.of_class(1), '0.0'),
            activations=lambda b: b.maps('taylor', b.image(1), '1.conv.1.0'), predicted=lambda b: b.predicted(b.image(1)), top=lambda b: b.top('0.0', 3),
            accuracy=lambda b: b.accuracy(Choice(ratio=.5)), dense=lambda b: b.accuracy(), cost=lambda b: (b.cost(Choice(ratio=.5)), b.dense()),
            plan=lambda b: b.plan(Choice(ratio=.3, coupling='coupled')), table=lambda b: b.table('0.0', Choice(), 'lrp'), rho=lambda b: b.agreement('0.0', 'conductance', 'lrp'))

@pytest.mark.parametrize('ask', [*ASKS])
def test_a_second_request_runs_nothing(ask):
    b = bench()
    with Passes() as first: ASKS[ask](b)
    with Passes() as second: ASKS[ask](b)
    assert first.n > 0 and second.n == 0

def test_another_layer_or_filter_explains_nothing_anew():
    b = bench()
    b.maps('conductance', b.image(1), '0.0'), b.top('0.0', 0)
    with Passes() as again: b.maps('conductance', b.image(1), '1.conv.1.0')
    assert again.n == 0
    before = b.cache.kept[('top', 8)]
    b.top('1.conv.1.0', 2)
    assert b.cache.kept[('top', 8)] is before

def test_the_network_is_a_copy_and_stays_as_it_was():
    net = tiny().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    b = bench(net)
    for ask in ASKS.values(): ask(b)
    assert net.training and all(torch.equal(before[k], v) for k, v in net.state_dict().items()) and all(torch.equal(before[k], v) for k, v in b.model.state_dict().items())
    with torch.no_grad(): net[0][0].weight.zero_()
    assert b.model[0][0].weight.abs().sum() > 0 and not any(m._forward_hooks for m in b.model.modules())

def test_no_network_and_no_download(monkeypatch, tmp_path, still):
    def refuse(*a, **k): raise OSError('no network here')
    monkeypatch.setattr(socket.socket, 'connect', refuse); monkeypatch.setattr(socket, 'getaddrinfo', refuse); monkeypatch.setenv('XPRUNE_DATA', str(tmp_path))
    e = FilterExplorer(criterion='magnitude', second='random', images=8, search=8)
    assert 'M' in e.cost.value and '0.' in e.accuracy.value and not e.wrong and not [*tmp_path.iterdir()]

# --- networks and images of one's own ---

class Grey(nn.Module):
    "A network of one's own, whose filters have biases and which takes oblong images"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 1, 3), nn.Linear(1, 3)
    def forward(self, x): return self.out(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))

def test_a_network_and_images_of_ones_own(still):
    x = torch.randint(0, 256, (30, 3, 12, 20), dtype=torch.uint8)
    e = FilterExplorer(Grey(), (x, torch.arange(30) % 3), criterion='taylor', second='lrp', images=10)
    assert e.bench.data.classes == ('0', '1', '2') and len(e.bench.data.val.y) == 6 and '0.' in e.accuracy.value and not e.wrong
    e.layer.value = 'b'
    assert not e.wrong and e.order == [0] and 'no other layer' in e.coupled.value

def test_scores_of_ones_own_are_a_criterion(still):
    net = tiny()
    own = {n: torch.arange(m.out_channels).float() for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    e = FilterExplorer(net, own_data(), scores=dict(mine=own), criterion='mine', layer='0.0', images=8, search=8)
    assert e.order == [*reversed(range(6))] and e.bench.plan(e.choice)['0.0'].tolist() == [False]*3 + [True]*3 and 'mine has no maps' in e.caption.value
    with pytest.raises(ValueError, match='mine: layer .0.0. have shape|mine: scores of layer .0.0. have shape'): Workbench(net, own_data(), scores=dict(mine={**own, '0.0': torch.zeros(2)}))

def test_a_network_without_a_graph_can_still_be_looked_at(still):
    e = FilterExplorer(Untraceable().eval(), own_data(), criterion='conductance', images=8, search=8)
    assert 'groups are not known' in e.coupled.value and e.wrong and 'cannot be read at' in e.status.value
    assert e.maps.png and '…' in e.cost.value and e.shown.kind == 'attribution'

def test_slow_criteria_are_scored_part_by_part():
    b = bench()
    assert len([*b.scoring('integrated_gradients')]) == 16 and [*b.scoring('integrated_gradients')] == [] and len([*b.scoring('lrp')]) == 1

@pytest.mark.parametrize('criterion', [c for c in CRITERIA if c not in PARTS])
def test_a_large_network_is_scored_part_by_part(criterion, monkeypatch):
    "And the mean over the parts is the criterion's own"
    b, whole = bench(), bench()
    monkeypatch.setattr(b, 'dense', lambda: dict(macs=100_000_000)) # five images a second
    assert len([*b.scoring(criterion)]) == (1 if criterion in WHOLE else 4) and len([*whole.scoring(criterion)]) == 1
    for n, s in whole.scores(criterion).items(): torch.testing.assert_close(b.scores(criterion)[n], s, rtol=1e-4, atol=1e-6*s.abs().max().item())

@pytest.mark.parametrize('wrong, says', [
    (lambda: Workbench(tiny(), own_data()).maps('tailor', None, '0.0'), "no criterion called 'tailor'; did you mean 'taylor'"),
    (lambda: bench().weights('0.1'), "no convolution called '0.1'; did you mean '0.0'"),
    (lambda: bench().image(1, 99), 'image 99 of class 1 was asked for, and there are 16 training images of it'),
    (lambda: bench().of_class(9), 'class 9 was asked for'), (lambda: bench().top('0.0', 6), "filter 6 was asked for, and '0.0' has 6"),
    (lambda: Choice(ratio=1), 'ratio is 1, expected'), (lambda: Choice(scope='all'), "no scope called 'all'"), (lambda: Choice(coupling='tied'), "no coupling called 'tied'"),
    (lambda: own_images(torch.zeros(4, 3, 8, 8), torch.zeros(4)), r'torch.float32 with labels \(4,\); expected \(N,3,H,W\), torch.uint8'),
    (lambda: FilterExplorer(tiny(), own_data(), criterion='lpr'), "no criterion called 'lpr'; did you mean 'lrp'"),
    (lambda: FilterExplorer(tiny(), own_data(), layer='0'), "no convolution called '0'"), (lambda: FilterExplorer(ratio=1.2), 'ratio is 1.2')], ids=range(12))
def test_wrong_arguments_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says): wrong()

@pytest.mark.parametrize('content', [b'', b'not a picture', b'\x89PNG\r\n\x1a\n'], ids=['empty', 'text', 'stump'])
def test_a_file_that_is_no_picture(content):
    with pytest.raises(OSError, match="'x.png' cannot be read as a picture; expected a PNG"): bench().file(content, 'x.png')

@pytest.mark.parametrize('size', [(16, 16), (300, 40), (7, 90), (1, 1)])
def test_files_are_cut_to_size(size):
    buffer = io.BytesIO(); Image.new('L', size, 77).save(buffer, 'png')
    view = bench().file(buffer.getvalue())
    assert view.pixels.shape == (1, 3, 16, 16) and (view.pixels == 77).all() and view.labels is None

# --- pictures and charts ---

@settings(max_examples=80, deadline=None)
@given(st.integers(1, 2000), st.integers(200, 1000), st.integers(150, 700), st.floats(.5, 2))
def test_every_tile_is_found_where_it_lies(n, width, height, aspect):
    g = grid_of(n, width, height, aspect)
    places = [0, n//2, n-1]
    for p in places:
        x, y = g.corner(p)
        assert g.at(x+.5, y+.5, n) == g.at(x+g.width-1, y+g.height-1, n) == p and 0 <= x and x + g.width <= max(width, g.width)
    if g.width > 8: assert g.corner(n-1)[1] + g.height + g.under <= height
    assert g.at(-1, 0, n) is None and g.at(0, 1e6, n) is None and g.at(1e6, 0, n) is None

def test_signs_have_colours_and_strength():
    maps = torch.tensor([[[1., -1.], [0., .2]]])
    t = tiles(maps, size=(2, 2))[0].astype(int)
    assert t[0, 0, 0] > t[0, 0, 2] + 60 and t[0, 1, 2] > t[0, 1, 0] + 60 and (t[1, 0] == 255).all() and t[1, 1].sum() > t[0, 0].sum()
    weak, own = tiles(torch.stack([maps[0], maps[0]/10]), size=(2, 2), same=True), tiles(torch.stack([maps[0], maps[0]/10]), size=(2, 2))
    assert np.array_equal(own[0], own[1]) and weak[1].sum() > weak[0].sum()

def test_maps_of_one_position_share_a_scale():
    t = tiles(torch.tensor([1., .1]).view(2, 1, 1), size=(2, 2)).astype(int)
    assert t[1].sum() > t[0].sum() + 500

@pytest.mark.parametrize('value', [0., 255.])
def test_black_and_white_images_stay_in_range(value):
    image = torch.full((3, 8, 8), value).to(torch.uint8)
    image[:, ::2] = 255 - image[:, ::2]
    t = tiles(torch.zeros(1, 1, 1), image, (40, 40))[0].astype(int)
    assert np.abs(np.diff(t[..., 0], axis=0)).max() < 140 and t.min() >= 100 and t.max() <= 255 and np.ptp(t, axis=2).max() == 0

@pytest.mark.parametrize('layers, filters', [(1, 1), (2, 3), (52, 4), (160, 2)])
def test_strips_of_small_and_large_networks(layers, filters):
    s = {f'l{i}': torch.rand(filters)-.2 for i in range(layers)}
    p, at, names = {n: v > 0 for n, v in s.items()}, strip_of(layers), [*s]
    picture = network_strip(s, p, layer=names[-1], coupled=names[:1])
    assert picture.width == 1070 and at.left + at.column*layers <= 1070
    a = np.asarray(picture).astype(int)
    for i in {0, layers-1}:
        x = int(at.left + at.column*(i+.45))
        order = s[names[i]].argsort(descending=True, stable=True)
        assert at.layer(x, names) == names[i]
        for r in range(filters):
            y = int(at.top + at.height*(r+.5)/filters)
            assert at.place(y, filters) == r and (np.ptp(a[y, x]) > 3) == p[names[i]][order[r]].item() # colour where it stays, grey where it goes

def rows(chart): return max((pd.DataFrame(d) for d in chart.to_dict()['datasets'].values()), key=len)
def params(chart): return {p['name']: p.get('value') for p in chart.to_dict()['params'] if 'select' not in p}

@pytest.mark.parametrize('s', [[3., 1., 2., 1.], [0., 0.], [-1., -3.], [5.]], ids=['ties', 'zero', 'negative', 'one'])
def test_bars_are_the_scores_in_order(s):
    s = torch.tensor(s); keep = torch.zeros(len(s)).bool(); keep[s.argmax()] = True
    d, p = rows(bars_chart(s, keep, 'taylor', 'l')), params(bars_chart(s, keep, 'taylor', 'l'))
    assert d.score.is_monotonic_decreasing and [s[f].item() for f in d['filter']] == d.score.tolist() and d['rank'].tolist() == [*range(1, len(s)+1)]
    assert p == dict(gone=(~keep).nonzero().flatten().tolist(), line=1.5, picked=-1) and (d.low < d.high).all()

def test_disagreement_is_who_keeps_what():
    one, two = torch.tensor([4., 3., 2., 1.]), torch.tensor([1., 4., 3., 2.])
    c = disagreement_chart(one, two, one > 2, two > 2, 'lrp', 'taylor')
    assert rows(c)[['filter', 'one', 'two']].values.tolist() == [[0, 1, 4], [1, 2, 1], [2, 3, 2], [3, 4, 3]]
    assert params(c) == dict(gone=[2, 3], also_gone=[0, 3], picked=-1) and 'Spearman -0.20; kept by one only: 1 + 1 of 4' in str(c.to_dict()['title'])
    assert 'nan' in str(disagreement_chart(one, one*0, one > 2, two > 2).to_dict()['title']) and len(params(disagreement_chart(one, one, one > 2, one > 2, 'lrp', 'lrp'))) == 3

def test_each_criterion_has_its_own_colour_and_unit():
    assert len({COLOURS[c] for c in CRITERIA}) == len(CRITERIA) and set(widgets.UNITS) == {*CRITERIA} and widgets.GONE not in COLOURS.values()

def test_charts_name_their_units():
    for c in CRITERIA: assert widgets.UNITS[c] in str(bars_chart(torch.rand(3), torch.ones(3).bool(), c).to_dict())

def test_cost_in_words():
    t = cost_html(dict(params=1_118_000, macs=3_062_000, accuracy=.5), dict(params=2_236_000, macs=6_124_000, accuracy=.78), images=500)
    assert '<b>1.12 M</b> of 2.24 M (50%)' in t and '<b>0.500</b> (dense: 0.780)' in t and '500 validation images' in t and 'width:50.0%' in t
    assert '…' in cost_html({}, {})

# --- the widgets ---

def chosen(f): return {'value': {'vlPoint': {'or': [{'filter': f}]}, 'filter': [f]}, 'store': [{'unit': '', 'fields': [{'type': 'E', 'field': 'filter'}], 'values': [f]}]}
def click(widget, x, y): widget.clicked = [x, y, np.random.rand()]

def test_the_first_picture_has_everything(explorer):
    e = explorer
    assert not e.wrong and all(p.png[:4] == b'\x89PNG' and p.label for p in (e.maps, e.strip, e.top)) and e.bars.spec and e.scatter.spec
    assert e.cost.value.count('<b>') == 2 and '<b>' in e.accuracy.value and 'layer 2' not in e.status.value and e.filter.value == e.order[0]
    assert 'lay' in e.coupled.value and 'Spearman' in e.caption.value

def test_every_control_has_words_and_a_hook(explorer):
    hooks = 'ratio layer criterion second filter cost accuracy maps bars disagreement strip top hand-over save scope coupling source class image upload status'.split()
    found = {c: w for w in explorer.__dict__.values() if hasattr(w, '_dom_classes') for c in w._dom_classes}
    assert {f'xp-{h}' for h in hooks} <= {*found}
    for w in found.values():
        if hasattr(w, 'description') and 'value' in w.traits() and not hasattr(w, 'bar_style'): assert w.description or getattr(w, 'tooltips', None) or 'HTML' in type(w).__name__ or 'Image' in type(w).__name__, w

def test_the_slider_draws_without_a_pass(explorer, monkeypatch):
    monkeypatch.setattr(explorer, '_start', lambda job: job.close())
    before = explorer.maps.png, explorer.strip.png, dict(explorer.bars._params)
    with Passes() as p: explorer.ratio.value = .8
    assert p.n == 0 and before[0] != explorer.maps.png and before[1] != explorer.strip.png and explorer.bars._params != before[2]
    assert explorer.bars._params['line'] == int(explorer.bench.plan(explorer.choice)['1.conv.0.0'].sum()) + .5

def test_the_slider_sends_no_new_chart(explorer):
    spec = explorer.bars.spec
    explorer.ratio.value = .7
    assert explorer.bars.spec is spec

def test_layer_criterion_image_and_scale(explorer):
    e, seen = explorer, [explorer.maps.png]
    for name, value in dict(layer='1.conv.2', criterion='lrp', second='random', which=2, number=3, source='class').items():
        setattr(getattr(e, name), 'value', value)
        assert not e.wrong, (name, e.status.value)
        seen.append(e.maps.png)
    e.same.value = True
    assert len({*seen, e.maps.png}) == len(seen) + 1 and e.at == '1.conv.2' and e.view.key[0] == 'class'

def test_an_old_filter_number_does_not_outlive_its_layer(explorer):
    explorer.layer.value = '2.0'; explorer.filter.value = 9
    explorer.layer.value = '0.0'
    assert explorer.filter.value == explorer.order[0] and explorer.filter.max == 5 and not explorer.wrong

def test_clicks_on_tiles_and_strip(explorer):
    e = explorer
    x, y = e.grid.corner(4)
    click(e.maps, x+3, y+3)
    assert e.filter.value == e.order[4] and f'filter {e.order[4]}: rank 5' in e.top.label
    click(e.maps, 5000, 3)
    assert e.filter.value == e.order[4]
    at = strip_of(len(e.bench.layers))
    click(e.strip, at.left + at.column*2.5, at.top + at.height*.4)
    assert e.layer.value == [*e.bench.layers][2] and e.filter.value == e.order[int(.4*12)]
    e.strip.stepped = [1, 1]; assert e.layer.value == [*e.bench.layers][3]
    e.maps.stepped = [1, 2]; assert e.filter.value == e.order[1]

def test_a_click_and_a_brush_in_the_charts(explorer):
    e = explorer
    e.bars.set_state({'_vl_selections': {'bar': chosen(7)}})
    assert e.filter.value == 7 and e.bars.params.picked == e.scatter.params.picked == 7 and 'filter 7:' in e.top.label
    shown = e.maps.png
    e.scatter.set_state({'_vl_selections': {'point': chosen(3), 'brush': {'value': {'one': [.5, 3.5], 'two': [0, 99]}, 'store': []}}})
    assert e.filter.value == 3 and e.brushed == e.order[:3] and e.maps.png != shown and '3 filters chosen' in e.status.value

def test_a_browser_that_reports_an_older_state_is_told_again(explorer):
    c = explorer.bars
    old = dict(c._params)
    explorer.ratio.value = .8
    want = dict(c._params)
    c.set_state({'_params': old})
    assert old != want and dict(c._params) == want

def test_your_own_picture(explorer):
    e, buffer = explorer, io.BytesIO()
    Image.effect_noise((40, 30), 90).save(buffer, 'png')
    e.source.value = 'file'
    assert 'Choose a picture first' in e.status.value and not e.wrong
    e.upload.value = ({'name': 'a.png', 'type': 'image/png', 'size': 1, 'content': memoryview(buffer.getvalue()), 'last_modified': datetime(2026, 1, 1)},)
    assert e.view.key[0] == 'file' and 'a.png' in e.about.value and not e.wrong
    e.upload.value = ({'name': '<b>.png', 'type': 'image/png', 'size': 1, 'content': memoryview(b'nonsense'), 'last_modified': datetime(2026, 1, 1)},)
    assert e.wrong and '&lt;b&gt;.png' in e.status.value and e.view.name == 'a.png'

def test_what_went_wrong_is_said_and_forgotten(explorer, monkeypatch):
    e = explorer
    def broken(choice): raise ValueError('the plan <cannot> be made')
    with monkeypatch.context() as m:
        m.setattr(e.bench, 'plan', broken)
        e.ratio.value = .66
        assert e.wrong and 'the plan &lt;cannot&gt; be made' in e.status.value
    e.ratio.value = .67
    assert not e.wrong and 'cannot' not in e.status.value

def test_the_plan_is_handed_over(still):
    got = []
    e = FilterExplorer(tiny(), own_data(), images=8, search=8, on_plan=got.append)
    assert e.plan is None
    e.coupling.value = 'coupled'
    e.button.click()
    assert got == [e.plan] and all(k.equal(e.plan[n]) for n, k in e.bench.plan(e.choice).items()) and 'explorer.plan keeps' in e.status.value
    e.ratio.value = .3
    assert 'keeps' not in e.status.value # that was another plan
    e.ratio.value = .5
    next(iter(e.plan.values()))[:] = False
    assert any(next(iter(e.bench.plan(e.choice).values())))  # a copy
    cut(e.bench.model, {**e.bench.plan(e.choice)}, e.bench.shape)

def test_saving_writes_the_picture_beside_its_numbers(explorer, tmp_path):
    explorer.folder = tmp_path/'pictures'
    explorer.saver.click()
    files = sorted(p.name for p in explorer.folder.iterdir())
    stem = '1_conv_0_0-conductance-magnitude-0.5'
    assert files == [f'{stem}-maps.png', f'{stem}.csv', f'{stem}.png', f'{stem}.svg'] and stem in explorer.status.value
    table = pd.read_csv(explorer.folder/f'{stem}.csv').set_index('filter')
    assert table.index.tolist() == explorer.order and table.first_keeps.tolist() == explorer.keep[explorer.order].tolist()
    assert Image.open(explorer.folder/f'{stem}-maps.png').width == explorer.picture().width

def test_a_full_disk_is_said(explorer, monkeypatch):
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(widgets, 'save', full)
    explorer.saver.click()
    assert explorer.wrong and 'No space left' in explorer.status.value

# --- in a kernel's loop ---

def test_only_the_place_where_the_slider_rests_is_measured(still, monkeypatch):
    async def moved():
        e = FilterExplorer(tiny(), own_data(), images=8, search=8)
        for r in (.2, .3, .4): e.ratio.value = r
        await e.task
        return e
    e = asyncio.run(moved())
    done = [k[1].ratio for k in e.bench.cache.kept if k[0] == 'accuracy' and k[1]]
    assert done == [.4] and '<b>' in e.accuracy.value and e.progress.layout.visibility == 'hidden'

def test_others_get_their_turn_while_accuracy_is_measured(still):
    async def meanwhile():
        e, turns = FilterExplorer(tiny(), own_data(), images=8, search=8), 0
        while not e.task.done(): await asyncio.sleep(0); turns += 1
        return turns
    assert asyncio.run(meanwhile()) >= 5

def test_a_slow_criterion_is_scored_behind_a_bar(still):
    async def slowly():
        e = FilterExplorer(tiny(), own_data(), images=6, search=8)
        await e.task
        e.criterion.value = 'integrated_gradients'
        first, shares = e.caption.value, []
        e.progress.observe(lambda c: shares.append(c['new']), 'value')
        await e.task # scored; drawing follows at once, and begins to measure
        await e.task
        return e, first, shares
    e, first, shares = asyncio.run(slowly())
    assert 'integrated_gradients' in e.caption.value and 'integrated_gradients' not in first and len(shares) >= 6 and not e.wrong

def test_what_is_set_while_a_criterion_is_scored_is_drawn_when_it_is(still):
    async def impatient():
        e, said = FilterExplorer(tiny(), own_data(), images=6, search=8), []
        await e.task
        e.status.observe(lambda c: said.append(c['new']), 'value')
        e.criterion.value = 'integrated_gradients'
        scoring = e.task
        await asyncio.sleep(0)
        e.ratio.value, e.layer.value = .8, [*e.bench.layers][2]
        e.button.click()
        pictured = 'still scoring by integrated_gradients' in e.status.value and e.wrong, e.plan, e.task is scoring
        await scoring
        await e.task
        return e, pictured, said
    e, (refused, plan, same), said = asyncio.run(impatient())
    assert refused and plan is None and same and not e.wrong and e.status.value.endswith('></span>')
    parts = [m[1] for t in said if (m := re.search(r'integrated_gradients: (\d+)%', t))]
    assert parts == [f'{100*i/6:.0f}' for i in range(1, 7)] # once, from the start to the end
    assert e.order == e.bench.scores('integrated_gradients')[e.layer.value].argsort(descending=True, stable=True).tolist()
    assert int(e.keep.sum()) == round(.2*len(e.keep)) and e.layer.value in e.top.label

def test_scores_that_cannot_be_kept_are_not_worked_out_for_ever(still):
    e = FilterExplorer(tiny(), own_data(), criterion='integrated_gradients', images=6, search=8, memory=100)
    assert e.wrong and 'the scores by integrated_gradients do not fit into 100 bytes' in e.status.value

def test_coming_back_to_a_slow_criterion_while_accuracy_is_measured(still):
    "What runs then is no scoring"
    async def back_and_forth():
        e = FilterExplorer(tiny(), own_data(), images=6, search=8)
        await e.task
        for c in ('integrated_gradients', 'magnitude', 'integrated_gradients'):
            e.criterion.value = c
            await asyncio.sleep(0)
        for _ in range(2):
            if e.task: await e.task
        return e
    e = asyncio.run(back_and_forth())
    assert ('scores', 'integrated_gradients') in e.bench.cache and 'integrated_gradients' in e.caption.value and not e.wrong

def test_an_explorer_that_still_scores_is_shown_without_a_picture(still):
    async def first():
        e = FilterExplorer(tiny(), own_data(), criterion='integrated_gradients', images=6, search=8)
        before = e._repr_mimebundle_()
        await e.task
        return before, e._repr_mimebundle_()
    before, after = asyncio.run(first())
    assert 'image/png' not in before and 'image/png' in after

def test_leaving_a_slow_criterion_stops_it(still):
    async def leave():
        e = FilterExplorer(tiny(), own_data(), images=6, search=8)
        e.criterion.value = 'deeplift_shap'
        await asyncio.sleep(0)
        e.criterion.value = 'magnitude'
        await e.task
        return e
    e = asyncio.run(leave())
    assert ('scores', 'deeplift_shap') not in e.bench.cache and 'magnitude' in e.caption.value and e.progress.layout.visibility == 'hidden'
