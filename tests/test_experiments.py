"""Runs, grids and stores: a study killed by the system and taken up again, every way a run or a row can break, and papermill's page against the same run by hand."""
import errno, itertools, json, math, os, re, signal, subprocess, sys, time
from dataclasses import asdict, fields, replace
from pathlib import Path

import joblib
import nbformat
import numpy as np
import pandas as pd
import papermill
import psutil
import pytest
import torch
from hypothesis import given, settings, strategies as st
from joblib.externals.loky import get_reusable_executor
from papermill.exceptions import PapermillExecutionError

from xprune_nb import experiments as room
from xprune_nb.criteria import CRITERIA
from xprune_nb.data import load
from xprune_nb.experiments import CONTROLS, RETRAINS, ROW_MIME, Run, carry_out, execute, execute_one, grid, images_met, read_row, row, row_of, rows, run_notebook, scoring_macs, shuffled, stream
from xprune_nb.model import baseline, build, convs, cost
from xprune_nb.pruning import cut, groups, kept, shares
from xprune_nb.training import Recipe, evaluate

says = lambda *parts: '.*'.join(map(re.escape, parts))
found = lambda folder: sorted(p.name for p in Path(folder).iterdir())
FIELDS = [f.name for f in fields(Run)]
timeless = lambda r: {k: v for k, v in r.items() if not k.startswith(('seconds', 'latency'))}

@pytest.fixture(autouse=True, scope='module')
def stopwatch():
    "Rows made in this process are not timed, for speed: what was asked, and milliseconds that can be told apart"
    asked = []
    def latencies(models, shape, batch, device, **how):
        asked.append(([cost(m, shape).params.sum() for m in models], batch))
        return [[.003, .001, .5], [.002, .001, .004]]
    with pytest.MonkeyPatch.context() as m: m.setattr(room, 'latencies', latencies); yield asked
SHORT = dict(criterion='random', epochs=0, images=10)  # as short as a run can be

# --- a run ---

OTHER = dict(data='cifar10', criterion='lrp', schedule='iterative', ratio=.7, steps=2, share='linear', scope='global', coupling='coupled', reduce='max', normalise='rank', floor=2, control='shuffled',
             retrain='scratch', rewind=0, epochs=2, lr=.02, decay='step', augment=False, images=32, path_steps=20, baseline_input='black', target='predicted', aggregate='max', seed=1)

def test_each_field_decides_the_id():
    runs = [Run(), *(Run(**{k: v}) for k, v in OTHER.items()), Run(ratio=0), Run(ratio=0, macs_left=.3), Run(ratio=0, macs_left=.4), Run(floor=.1)]
    assert set(OTHER) | {'baseline', 'macs_left'} == set(FIELDS)  # of the first there is one so far, the other is not alone
    assert len({r.id for r in runs}) == len(set(runs)) == len(runs) and Run().id == Run(**asdict(Run())).id
    assert all(re.fullmatch(r'[\w.-]+', r.id) for r in runs)  # a name for a file anywhere

@pytest.mark.parametrize('a,b', [(dict(ratio=0), dict(ratio=0.)), (dict(lr=1), dict(lr=1.)), (dict(seed=np.int64(3)), dict(seed=3)), (dict(ratio=np.float64(.7)), dict(ratio=.7)),
                                 (dict(rewind=np.int64(0)), dict(rewind=0))], ids=str)
def test_equal_runs_have_one_id(a, b): assert Run(**a) == Run(**b) and Run(**a).id == Run(**b).id

def test_rows_of_earlier_studies_still_belong_to_their_runs():
    "The committed ones were made when there were fewer fields"
    from xprune_nb.results import read
    table = read(Path(__file__).parent.parent/'figures'/'cpu'/'rows.csv')
    assert len(table) == 24 and set(table) & set(FIELDS) < set(FIELDS)
    for r in table.to_dict('records'): assert Run(**{k: v for k, v in r.items() if k in FIELDS}).id == r['run_id']

@pytest.mark.parametrize('wrong,message', [
    (dict(data='cifar11'), "no data set called 'cifar11'; did you mean 'cifar10'? There are: cifar10-mini, cifar10, cifar100"),
    (dict(baseline='mobilenet'), "no baseline called 'mobilenet'; did you mean 'mobilenet_v2-cifar10'?"),
    (dict(criterion='random_scores'), "no criterion called 'random_scores'"), (dict(schedule='one shot'), "no schedule called 'one shot'; did you mean 'oneshot'?"),
    (dict(share='linaer'), "no share called 'linaer'; did you mean 'linear'?"), (dict(scope='globe'), "no scope called 'globe'; did you mean 'global'?"),
    (dict(reduce='median'), "no reduction called 'median'"), (dict(normalise='means'), "no normalisation called 'means'; did you mean 'mean'?"), (dict(control='shuffle'), "no control called 'shuffle'; did you mean 'shuffled'?"),
    (dict(retrain='weight'), "no retraining called 'weight'; did you mean 'weights'?"), (dict(decay='steps'), "no decay called 'steps'; did you mean 'step'?"),
    (dict(floor=-1), 'floor is -1, expected a number of filters (int) or a share'), (dict(floor=1.), 'floor is 1.0, expected'), (dict(floor=0.), 'floor is 0.0, expected'), (dict(floor=math.nan), 'floor is nan, expected'), (dict(floor='1'), "floor is '1' (str), expected int or float"),
    (dict(macs_left=0., ratio=0), 'macs_left is 0.0, expected a share of the MACs to leave in (0, 1]'), (dict(macs_left=1.1), 'macs_left is 1.1, expected'), (dict(macs_left=math.nan, ratio=0), 'macs_left is nan, expected'),
    (dict(macs_left=.3), 'ratio is 0.5 and macs_left is 0.3, expected ratio=0 where the MACs decide'),
    (dict(macs_left=.3, ratio=0, schedule='iterative'), "macs_left is 0.3 and schedule is 'iterative', expected 'oneshot'"),
    (dict(retrain='lr', rewind=5), "rewind is 5 and retrain is 'lr', expected rewind='last'"), (dict(retrain='scratch', rewind=0), "rewind is 0 and retrain is 'scratch'"),
    (dict(schedule='gradual', epochs=0), 'epochs is 0, expected at least 1: the gradual schedule prunes during training'),
    (dict(control='alive', schedule='gradual'), "control is 'alive' and schedule is 'gradual', expected 'oneshot'"),
    (dict(data='cifar100'), "data is 'cifar100' and baseline is 'mobilenet_v2-cifar10', which has learnt cifar10: expected the same"), (dict(data='imagenet'), "data is 'imagenet' and baseline is"),
    (dict(images=4501), 'images is 4501, expected at most 4500: cifar10-mini has no more to train on'), (dict(data='cifar10', images=45_001), 'images is 45001, expected at most 45000'),
    (dict(coupling='couple'), "no coupling called 'couple'; did you mean 'coupled'?"),
    (dict(ratio=-.1), 'ratio is -0.1, expected a share'), (dict(ratio=1), 'ratio is 1', ), (dict(ratio=math.nan), 'ratio is nan, expected a share'),
    (dict(steps=0), '0 pruning steps asked for'), (dict(rewind=-1), 'keeps no weights of epoch -1. There are: 0, '), (dict(rewind='first'), "keeps no weights of epoch 'first'"),
    (dict(epochs=-1), 'epochs is -1, expected at least 0'), (dict(lr=-1.), 'lr is -1.0, expected at least 0'), (dict(lr=math.nan), 'lr is nan'),
    (dict(images=0), 'images is 0, expected at least 1'), (dict(path_steps=0), 'path_steps is 0, expected at least 1'),
    (dict(baseline_input='blak'), "no baseline input called 'blak'; did you mean 'black'?"), (dict(target='ture'), "no target called 'ture'; did you mean 'true'?"),
    (dict(aggregate='l3'), "no aggregation called 'l3'"),
    (dict(ratio='0.5'), "ratio is '0.5' (str), expected float"), (dict(seed=1.5), 'seed is 1.5 (float), expected int'), (dict(seed=None), 'seed is None (NoneType), expected int'),
    (dict(augment='no'), "augment is 'no' (str), expected bool"), (dict(criterion=3), 'criterion is 3 (int), expected str'), (dict(epochs=True), 'epochs is True (bool), expected int'),
    (dict(steps=2.5), 'steps is 2.5 (float), expected int'), (dict(rewind=5.5), 'rewind is 5.5 (float), expected int or str')], ids=str)
@pytest.mark.parametrize('criterion', ['conductance', 'random'])
def test_each_field_is_checked_at_once(wrong, message, criterion):
    "Also where this criterion would not look at it"
    with pytest.raises(ValueError, match=says(message)): Run(**dict(dict(criterion=criterion), **wrong))

def test_a_run_has_no_other_fields():
    for f in FIELDS:
        with pytest.raises(AttributeError): setattr(Run(), f, None)  # frozen
    with pytest.raises(TypeError): Run(device='cuda')

# --- a grid ---

@given(st.fixed_dictionaries({}, optional=dict(criterion=st.lists(st.sampled_from(list(CRITERIA)), unique=True, max_size=4), ratio=st.lists(st.sampled_from([0., .5, .7, .9]), unique=True, max_size=3),
                                               seed=st.one_of(st.integers(0, 9), st.lists(st.integers(0, 9), unique=True, max_size=3)), schedule=st.sampled_from(['oneshot', 'iterative', 'gradual']))))
@settings(max_examples=60, deadline=None)
def test_a_grid_is_every_combination_once(lists):
    runs, listed = grid(**lists), {k: v if isinstance(v, list) else [v] for k, v in lists.items()}
    assert [tuple(getattr(r, k) for k in lists) for r in runs] == list(itertools.product(*listed.values()))
    assert len({r.id for r in runs}) == len(runs) == math.prod(map(len, listed.values()))
    assert all(getattr(r, f.name) == f.default for r in runs for f in fields(Run) if f.name not in lists)

@pytest.mark.parametrize('many', [range(2), (0, 1), np.array([0, 1]), pd.Series([0, 1])], ids=lambda o: type(o).__name__)
def test_a_list_is_anything_that_holds_several(many): assert [r.id for r in grid(seed=many)] == [Run(seed=0).id, Run(seed=1).id]

def test_a_field_that_there_is_not():
    with pytest.raises(ValueError, match=says("no field of Run called 'ratios'; did you mean 'ratio'? There are: ", *FIELDS)): grid(ratios=[.5])

# --- what happens in a run ---

@pytest.fixture(scope='module')
def tiny():
    "Small, and its test images are its validation images, so that what is measured on the one must be what is measured on the other"
    data = load(); few = data.val.take(torch.arange(40))
    return replace(data, train=data.train.take(torch.arange(130)), val=few, test=few)

def by_hand(run, data):
    net, snapshots = baseline(run.baseline).net(), {}
    steps = list(carry_out(run, net, data, snapshots, progress=False))
    learnt = {k: v.clone() for k, v in net.state_dict().items()}
    r = row(run, net, data, steps, snapshots)
    assert all(v.equal(learnt[k]) for k, v in net.state_dict().items())  # the network is left as it has learnt
    return r, steps, net

@pytest.mark.parametrize('kw', [dict(), dict(epochs=1), dict(schedule='iterative', steps=2), dict(rewind=0), dict(schedule='iterative', steps=2, share='linear', rewind=0, coupling='coupled')], ids=str)
def test_a_row_says_the_same_of_test_and_validation_images(tiny, kw):
    run = Run(**dict(SHORT, criterion='magnitude', ratio=.3, **kw))
    r, steps, net = by_hand(run, tiny)
    for k in 'dense', 'pruned', 'recalibrated': assert r[f'accuracy_{k}'] == r[f'val_{k}'], k
    assert r['accuracy'] == r['val_retrained'] == evaluate(net, tiny.test, tiny)[0]
    assert [s.ratio for s in steps] == shares(.3, 2 if kw.get('schedule') else 1, run.share)
    assert list(r)[:len(FIELDS)] == FIELDS and {k: r[k] for k in FIELDS} == asdict(run) and r['run_id'] == run.id and r['status'] == 'done'
    assert r == json.loads(json.dumps(r)) and all(type(v) in (str, int, float, bool, dict) for v in r.values())

def test_runs_that_differ_in_criterion_share_everything_else(tiny, monkeypatch):
    "The images explained, and seed, order and recipe of each retraining"
    calls = {}
    for name in 'sample', 'fit', 'recalibrate':
        def watched(*args, real=getattr(room, name), name=name, **kw):
            calls.setdefault(criterion, []).append((name, [a for a in args if isinstance(a, (int, Recipe))], kw.get('seed')))
            return real(*args, **kw)
        monkeypatch.setattr(room, name, watched)
    for criterion in 'random', 'magnitude': by_hand(Run(**dict(SHORT, criterion=criterion, ratio=.3, schedule='iterative', steps=2, seed=4)), tiny)
    assert calls['random'] == calls['magnitude'] and len(calls['random']) == 1 + 2*2
    assert len({str(c) for c in calls['random'] if c[0] == 'fit'}) == 2  # each retraining has an order of its own

def test_random_scores_are_new_in_each_step_and_the_seeds(tiny):
    steps = {s: by_hand(Run(**dict(SHORT, ratio=.3, schedule='iterative', steps=2, seed=s)), tiny)[1] for s in (0, 1)}
    first = [step.scores['features.0.0'] for s in steps.values() for step in s]
    assert len({tuple(f.tolist()) for f in first}) == 4
    for before, after in steps.values(): assert not any((after.plan[n] & ~before.plan[n]).any() for n in after.plan)  # yet what is gone stays gone

# --- retraining, controls, cost ---

@pytest.fixture(scope='module')
def seen(tiny):
    "A run carried out once: its row, steps, network and snapshots"
    memory = {}
    def carried(**kw):
        run = Run(**{**SHORT, 'criterion': 'magnitude', **kw})
        if run not in memory:
            net, shots = baseline(run.baseline).net(), {}
            steps = list(carry_out(run, net, tiny, shots, progress=False))
            memory[run] = row(run, net, tiny, steps, shots), steps, net, shots
        return memory[run]
    return carried

measured = lambda r: {k: v for k, v in timeless(r).items() if k not in FIELDS and k != 'run_id'}
@pytest.mark.parametrize('coupling', ['independent', 'coupled'])
def test_what_is_timed(seen, stopwatch, coupling):
    "The whole network, and the one from which all that is dead was cut"
    stopwatch.clear()
    r = seen(coupling=coupling, ratio=.6)[0]
    assert stopwatch == [([r['params_dense'], r['params_live']], 128)] and (r['latency_dense'], r['latency']) == (3., 2.)

weights = lambda state, p: {n: state[f'{n}.weight'][p[n]] for n in p}  # of the survivors
alike = lambda a, b: all(a[n].equal(b[n]) for n in a)

@pytest.mark.slow
def test_one_shot_at_a_fixed_rate_three_protocols_are_one(seen):
    "To the bit; a decay tells fine-tuning from the rewinding of rates, and both from nothing else"
    one, *others = (measured(seen(retrain=r, epochs=1)[0]) for r in ('weights', 'lr', 'finetune'))
    assert others == [one, one]
    lr, tuned = (Run(retrain=r, epochs=20, decay='cosine').recipe for r in ('lr', 'finetune'))
    assert lr == Run(retrain='weights', epochs=20, decay='cosine').recipe and tuned.rates() == [lr.rates()[-1]]*20 and lr.rates()[0] > lr.rates()[-1]

@pytest.mark.parametrize('epochs', [1, 7, 50, 60])
@pytest.mark.parametrize('decay', ['constant', 'cosine', 'step'])
def test_rates_of_retraining(epochs, decay):
    "By torch's schedulers, over the 50 epochs of the baseline's training"
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], .02); total, S = max(50, epochs), torch.optim.lr_scheduler
    of = lambda n: dict(constant=lambda: S.ConstantLR(opt, 1.), cosine=lambda: S.CosineAnnealingLR(opt, n), step=lambda: S.MultiStepLR(opt, [math.ceil(n/2), math.ceil(3*n/4)]))[decay]()
    def rates(n):
        opt.param_groups[0].update(lr=.02); opt.param_groups[0].pop('initial_lr', None); schedule, out = of(n), []
        for _ in range(n): out.append(opt.param_groups[0]['lr']); opt.step(); schedule.step()
        return out
    have = {r: Run(retrain=r, epochs=epochs, decay=decay, lr=.02).recipe.rates() for r in RETRAINS}
    for r in 'weights', 'lr': np.testing.assert_allclose(have[r], rates(total)[-epochs:], rtol=1e-9)
    np.testing.assert_allclose(have['finetune'], [rates(total)[-1]]*epochs, rtol=1e-9); np.testing.assert_allclose(have['scratch'], rates(epochs), rtol=1e-9)

@pytest.mark.parametrize('retrain', ['weights', pytest.param('lr', marks=pytest.mark.slow), 'finetune', 'scratch'])
def test_what_survivors_set_out_from(tiny, monkeypatch, retrain):
    "At the second step of an iterative run, in which the first has learnt"
    starts, ends, real = [], [], room.fit
    def watched(net, *args, **kw):
        starts.append({k: v.clone() for k, v in net.state_dict().items()}); out = real(net, *args, **kw)
        ends.append({k: v.clone() for k, v in net.state_dict().items()}); return out
    monkeypatch.setattr(room, 'fit', watched)
    run = Run(**dict(SHORT, criterion='magnitude', schedule='iterative', steps=2, ratio=.3, epochs=1, retrain=retrain, seed=3))
    net = baseline().net()
    first, second = carry_out(run, net, tiny, progress=False)
    have, p, base = weights(starts[1], second.plan), second.plan, baseline()
    assert alike(have, weights(ends[0], p)) == (retrain in ('lr', 'finetune'))
    assert alike(have, weights(base.weights('last'), p)) == (retrain == 'weights')
    assert alike(have, weights(build(seed=stream(run, 2)).state_dict(), p)) == (retrain == 'scratch')
    assert all(starts[1][f'{n}.weight'][~k].eq(0).all() for n, k in p.items()) and not alike(weights(starts[1], p), weights(ends[1], p))
    if retrain == 'scratch': assert not alike(have, weights(base.weights(0), p)) and not alike(weights(starts[0], p), have)

@pytest.mark.parametrize('e', [0, 5, 50])
def test_weights_of_any_stored_epoch(tiny, seen, e):
    _, steps, net, _ = seen(rewind=e, ratio=.3)
    assert alike(weights(net.state_dict(), steps[0].plan), weights(baseline().weights(e), steps[0].plan))

def test_streams_of_seeds_do_not_meet():
    seeds = [0, 1, 999, 1000, 1001, 2000, 12_345, -1, -1000]
    drawn = [stream(Run(seed=s), i) for s in seeds for i in range(1, 30)]
    assert len(set(drawn)) == len(drawn) and min(drawn) >= 1000 and max(drawn) < 2**40
    assert [stream(Run(seed=s), i) for s in (0, 7, 999) for i in (1, 3)] == [1000, 3000, 1007, 3007, 1999, 3999]  # as ever

@given(st.integers(0, 10**6), st.booleans(), st.lists(st.floats(-9, 9, width=32), min_size=8, max_size=8, unique=True))
@settings(max_examples=60, deadline=None)
def test_shuffling_deals_the_same_numbers(seed, earlier, values):
    s = dict(a=torch.tensor(values), b=torch.tensor(values[::-1]), c=torch.tensor(values[:3]))
    within = dict(a=torch.arange(8) % 3 > 0, b=torch.arange(8) % 3 > 0, c=torch.tensor([True, False, True])) if earlier else None
    for gs in None, [('a', 'b'), ('c',)], [('a[0:4]', 'b[4:8]'), ('c',)]:
        before, out = {n: v.clone() for n, v in s.items()}, shuffled(s, seed, gs, within)
        assert list(out) == list(s) and alike(before, s)
        for n in s:
            assert out[n].sort().values.equal(s[n].sort().values)
            if within and not (gs and '[' in gs[0][0]): assert out[n][~within[n]].equal(s[n][~within[n]])
        if gs == [('a', 'b'), ('c',)]: assert sorted(zip(out['a'].tolist(), out['b'].tolist())) == sorted(zip(s['a'].tolist(), s['b'].tolist()))
        if gs and '[' in gs[0][0]: assert out['a'][4:].equal(s['a'][4:]) and out['b'][:4].equal(s['b'][:4])
        assert alike(out, shuffled(s, seed, gs, within))

def test_shuffling_is_chance():
    s = {'a': torch.arange(4.)}
    first = np.bincount([int(shuffled(s, i)['a'][0]) for i in range(400)], minlength=4)
    assert first.min() > 60  # 100 expected, standard deviation 8.7

alive_by_group = lambda p: [(int(torch.stack([p[n] for n in g]).all(0).sum()), *(int(p[n].sum()) for n in g)) for g in groups(baseline().net())]

@pytest.mark.parametrize('coupling', [pytest.param('independent', marks=pytest.mark.slow), 'coupled'])
def test_controls_leave_as_much_and_choose_by_chance(seen, coupling):
    plans = {c: seen(control=c, coupling=coupling, ratio=.4)[1][0].plan for c in CONTROLS}
    sizes = {c: [int(k.sum()) for k in p.values()] for c, p in plans.items()}
    assert sizes['shuffled'] == sizes['alive'] == sizes['none'] and alive_by_group(plans['alive']) == alive_by_group(plans['none'])
    if coupling == 'coupled': assert alive_by_group(plans['shuffled']) == alive_by_group(plans['none'])
    else: assert seen(control='shuffled', ratio=.4)[0]['alive_in_both'] < .4 < seen(ratio=.4)[0]['alive_in_both'] + .04  # .36 if by chance
    for a, b in itertools.combinations(plans.values(), 2): assert np.mean([a[n].eq(b[n]).float().mean() for n in a]) < .75  # .52 if by chance

def test_gradual_pruning_ends_with_the_training(tiny, seen):
    "Cubic, nested, and not one weight moves after the last growth"
    r, steps, net, shots = seen(schedule='gradual', epochs=2, steps=4, ratio=.8, coupling='coupled')
    assert [s.ratio for s in steps] == pytest.approx([.8*(1 - (1 - i/4)**3) for i in (1, 2, 3, 4)]) and kept(steps[-1].plan) == pytest.approx(.2, abs=.01)
    for a, b in itertools.pairwise(steps): assert not any((b.plan[n] & ~a.plan[n]).any() for n in a.plan) and kept(b.plan) < kept(a.plan)
    learnt = {k for k, v in shots['pruned'].items() if not v.equal(net.state_dict()[k])}
    assert learnt and all(re.search('running_(mean|var)|num_batches', k) for k in learnt) and r['accuracy'] == r['accuracy_recalibrated'] == r['val_retrained']
    assert not alike(weights(net.state_dict(), steps[-1].plan), weights(baseline().weights('last'), steps[-1].plan))  # it has learnt before
    assert list(steps[-1].history.frame.epoch) == [1, 2] and r['epochs_spent'] == 2
    with pytest.raises(ValueError, match=says('5 growths of the plan asked for, expected at most 4: the steps of the training')): seen(schedule='gradual', epochs=2, steps=5)

def test_gradual_training_before_the_first_growth_is_training(tiny, monkeypatch):
    "The network that the first growth is shown has learnt with all of its filters, as by `fit` alone"
    met = []
    real = room.score
    def watched(criterion, net, *args, **kw): met.append({k: v.clone() for k, v in net.state_dict().items()}); return real(criterion, net, *args, **kw)
    monkeypatch.setattr(room, 'score', watched); monkeypatch.setattr(room, 'scoring_macs', lambda *a: 0)
    run = Run(**dict(SHORT, schedule='gradual', epochs=2, steps=2, rewind=5))
    list(carry_out(run, baseline().net(), tiny, progress=False))
    net = baseline().net(5)
    room.fit(net, tiny, Recipe(epochs=1, augment=True), stream(run, 1), progress=False)
    assert all(v.equal(met[0][k]) for k, v in net.state_dict().items())

@pytest.mark.parametrize('criterion', [c for c in CRITERIA if c != 'ablation'])
@pytest.mark.parametrize('small', [False, True])
def test_scoring_is_counted(seen, criterion, small):
    "All five images at once, not one, two and three; where torch's own counter can follow (it hooks modules), by that"
    from torch.utils.flop_counter import FlopCounterMode
    from xprune_nb.criteria import score
    from xprune_nb.data import sample
    net, run = baseline().net(), Run(criterion=criterion, path_steps=3)
    if small: net = cut(net, seen(coupling='coupled')[1][0].plan)
    x, y = sample(load(), 5)
    have, forward = scoring_macs(run, net, x, y), cost(net).macs.sum()
    hooked = criterion in ('lrp', 'integrated_gradients')
    with room._Flops() if hooked else FlopCounterMode(display=False) as counter: score(criterion, net, x, y, **run.options())
    assert have == (counter.total if hooked else counter.get_total_flops())//2
    assert (have == 0) == (criterion in ('random', 'magnitude', 'magnitude_l2', 'fpgm', 'bn_scale'))
    if criterion == 'conductance': assert 1.8*4 < have/5/forward < 2*4 + 1  # on paper: a path of k+1 points goes forth and back at each
    if criterion == 'lrp': assert have == (2*5 + 1)*forward - 5*cost(net).macs.iloc[0]  # there and back, not to the pixels; once for the shapes

def test_scoring_by_ablation_is_nearly_counted(seen):
    "Each filter of each layer is silenced, and what lies behind the layer is worked out again"
    net, run = cut(baseline().net(), seen(coupling='coupled')[1][0].plan), Run(criterion='ablation')
    x, y = room.sample(load(), 5)
    with room._Flops() as counter: room.score('ablation', net, x, y)
    assert 0 < scoring_macs(run, net, x, y) == pytest.approx(counter.total//2, rel=.03)

def test_the_budget_on_paper(tiny, seen):
    "130 images; recalibration meets them once, a retraining three times an epoch, each in the network that is alive then"
    n = 130
    r, steps, net, _ = seen(schedule='iterative', steps=2, epochs=2, ratio=.5, coupling='coupled')
    alive = [cost(cut(baseline().net(), s.plan)).macs.sum() for s in steps]
    assert r['macs_retrain'] == sum((3*2 + 1)*n*a for a in alive) and alive[-1] == r['macs_live'] and (r['epochs_spent'], r['macs_score'], r['macs_spent']) == (4, 0, r['macs_retrain'])
    r, steps, *_ = seen(schedule='gradual', epochs=2, steps=4, ratio=.8, coupling='coupled')
    alive = [cost(cut(baseline().net(), s.plan)).macs.sum() for s in steps]
    assert r['macs_retrain'] == pytest.approx(3*n/2*(r['macs_dense'] + sum(alive[:3])) + n*alive[3], abs=4)
    r, *_ = seen(); assert r['macs_retrain'] == n*r['macs_live'] and r['epochs_spent'] == 0
    one = replace(tiny, train=tiny.train.take(torch.arange(129)))
    assert images_met(one, Recipe(epochs=2)) == 2*128 and images_met(one, Recipe(epochs=2, batch_size=64)) == 2*128 and images_met(one, Recipe(epochs=1, batch_size=200)) == 129

@pytest.mark.slow
def test_scoring_in_the_second_step_costs_less(seen):
    r, steps, *_ = seen(criterion='lrp', schedule='iterative', steps=2, ratio=.7, coupling='coupled', images=4)
    assert 0 < steps[1].macs['score'] < .6*steps[0].macs['score'] and r['macs_score'] == sum(s.macs['score'] for s in steps) and r['macs_spent'] == r['macs_score'] + r['macs_retrain']

@pytest.mark.parametrize('coupling,share', [('independent', .6), ('coupled', .3)])
def test_equal_macs(seen, coupling, share):
    r, steps, *_ = seen(ratio=0, macs_left=share, coupling=coupling)
    assert r['macs_live']/r['macs_dense'] == pytest.approx(share, rel=.03) and r['ratio'] == 0 and 1 - r['alive'] == pytest.approx(steps[0].ratio, abs=.02) and f'macs{share:g}' in r['run_id']

def test_floors_and_global_plans(seen):
    r, steps, *_ = seen(scope='global', coupling='coupled', floor=.25, ratio=.6)
    assert min(k.float().mean() for k in steps[0].plan.values()) >= .25 and r['alive'] == pytest.approx(.4, abs=.01)
    assert {float(k.float().mean()) for k in steps[0].plan.values()} != {.4}

# --- a store: what papermill would do is played here ---

def page(r=None):
    "An executed notebook, with its row if it has one"
    outputs = [] if r is None else [nbformat.v4.new_output('display_data', {ROW_MIME: r, 'text/plain': 'row'})]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# One run'), nbformat.v4.new_code_cell('emit(row)', outputs=outputs), nbformat.v4.new_code_cell('1')])

class Player:
    "Plays papermill: writes the page, and returns it; `breaks` says for which seeds it dies of what"
    def __init__(self): self.runs, self.breaks = [], {}
    def __call__(self, run, out, threads):
        self.runs.append(run)
        nb = page(dict(asdict(run), run_id=run.id, status='done', error='', accuracy=run.seed/100))
        nbformat.write(page() if run.seed in self.breaks else nb, out)
        if isinstance(e := self.breaks.get(run.seed), BaseException): raise e
        return page() if run.seed in self.breaks else nb

@pytest.fixture
def player(monkeypatch): monkeypatch.setattr(room, '_papermill', p := Player()); return p

def play(runs, store, **kw): return execute(runs, store, **dict(dict(backend='threading', n_jobs=2, progress=False), **kw))

RUNS = grid(**SHORT, seed=[0, 1, 2, 3])
error_of = lambda e: PapermillExecutionError(0, 1, 'cell', 'ValueError', e, [f'ValueError: {e}'])

def test_done_runs_are_not_done_again(player, tmp_path):
    first = play(RUNS[:3], tmp_path)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    second = play([*RUNS, *RUNS[:2]], tmp_path)
    assert [r.seed for r in player.runs[3:]] == [3] and {n: ((tmp_path/n).stat().st_mtime_ns, (tmp_path/n).read_bytes()) for n in before} == before
    assert first.equals(second[:3]) and second.run_id.tolist() == [r.id for r in RUNS]  # in the order asked for, each once
    assert found(tmp_path) == sorted(r.id + s for r in RUNS for s in ('.ipynb', '.json')) and set(FIELDS) <= set(second)
    assert sorted(rows(tmp_path).run_id) == sorted(second.run_id) and rows(tmp_path, RUNS[2:0:-1]).seed.tolist() == [2, 1]

def test_a_failed_run_is_recorded_and_the_rest_go_on(player, tmp_path):
    player.breaks = {1: error_of('ratio 0.99 would leave a layer without a filter'), 2: 'no row', 3: RuntimeError()}
    table = play(RUNS, tmp_path)
    assert table.status.tolist() == ['done', 'failed', 'failed', 'failed'] and sorted(r.seed for r in player.runs) == [0, 1, 2, 3]
    assert table.error[0] == '' and 'would leave a layer without a filter' in table.error[1] and 'ended without a row' in table.error[2] and table.error[3] == 'RuntimeError'
    assert table[FIELDS].to_dict('records') == [asdict(r) for r in RUNS] and len(found(tmp_path)) == 8  # its page is kept beside it
    assert play(RUNS, tmp_path, retry_failed=False).status.tolist() == table.status.tolist() and len(player.runs) == 4
    player.breaks = {3: player.breaks[3]}
    assert play(RUNS, tmp_path).status.tolist() == ['done', 'done', 'done', 'failed'] and sorted(r.seed for r in player.runs[4:]) == [1, 2, 3]

@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '"row"', '{}', '{"run_id": 1}', '{"accuracy": 0.5}', '\0'*500, 'NaN'], ids=repr)
def test_what_is_no_row_is_run_again(player, tmp_path, text):
    (tmp_path/f'{RUNS[0].id}.json').write_text(text)
    assert len(rows(tmp_path)) == 0
    assert play(RUNS[:1], tmp_path).status.tolist() == ['done'] and len(player.runs) == 1
    (tmp_path/f'{RUNS[0].id}.json').write_bytes(b'\xff\xfe\x80')
    assert read_row(tmp_path/f'{RUNS[0].id}.json') is None

def test_no_half_row_is_taken_for_a_whole_one(player, tmp_path):
    path, = (tmp_path/f"{r}.json" for r in play(RUNS[:1], tmp_path).run_id)
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        assert read_row(path) is None, whole[:n]
    assert play(RUNS[:1], tmp_path).seed.tolist() == [0] and len(player.runs) == 2 and read_row(path).keys() == json.loads(whole).keys()

@pytest.mark.parametrize('way,nth', list(itertools.product(['fsync', 'replace'], [1, 2, 3, 4])))
def test_a_full_disk_stops_the_study_in_a_sentence(player, tmp_path, monkeypatch, way, nth):
    "While a page or its row is written: no half file, nothing done is lost, and it goes on when there is room"
    with monkeypatch.context() as m:
        calls, real = iter(range(1, 100)), getattr(os, way)
        def full(*args):
            if next(calls) == nth: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)
        m.setattr(os, way, full)
        with pytest.raises(OSError, match=says('could not be written (No space left on device)', 'Free some space')): play(RUNS[:2], tmp_path, n_jobs=1)
    done = [n for n in found(tmp_path) if n.endswith('.json')]
    assert len(done) == (nth > 2) and not [n for n in found(tmp_path) if 'part' in n] and all(read_row(tmp_path/n) for n in done)
    assert play(RUNS[:2], tmp_path).status.tolist() == ['done', 'done'] and len(player.runs) == 3

def test_a_full_disk_while_papermill_writes(player, tmp_path):
    player.breaks = {0: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))}
    with pytest.raises(OSError, match=says('could not be written (No space left on device)', 'Free some space')): play(RUNS[:1], tmp_path)
    assert found(tmp_path) == []

def test_an_interruption_leaves_nothing_half(player, tmp_path):
    player.breaks = {0: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt): execute_one(RUNS[0], tmp_path)
    assert found(tmp_path) == []

def test_stores_that_are_not_there(tmp_path):
    with pytest.raises(OSError, match=says('there is no store', 'nowhere', 'nothing was run there')): rows(tmp_path/'nowhere')
    assert len(rows(tmp_path)) == 0
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError): play(RUNS, tmp_path/'file')

def test_a_package_without_its_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv('XPRUNE_NBS', str(tmp_path))
    with pytest.raises(OSError, match=says('there is no ', 'run.ipynb. Install from a clone', 'XPRUNE_NBS')): execute_one(RUNS[0], tmp_path)
    assert found(tmp_path) == []  # it is no run that failed
    monkeypatch.delenv('XPRUNE_NBS'); assert run_notebook().name == 'run.ipynb'

@pytest.mark.parametrize('deaths,message', [(['Kernel died before replying to kernel_info']*2, None), (['Kernel died before replying to kernel_info']*3, 'Kernel died before replying'),
                                            (['Kernel did not respond in 180 seconds'], 'did not respond'), ([error_of('Kernel died before replying, said the cell')], 'said the cell')], ids=range(4))
def test_a_kernel_that_dies_while_starting_is_started_again(tmp_path, monkeypatch, deaths, message):
    asked = []
    def start(nb, out, parameters, **kw):
        asked.append((Path(nb), parameters, kw, dict(os.environ)))
        if len(asked) <= len(deaths): raise e if isinstance(e := deaths[len(asked)-1], Exception) else RuntimeError(e)
        return page(dict(parameters, run_id=RUNS[0].id, status='done', error=''))
    monkeypatch.setattr(papermill, 'execute_notebook', start); monkeypatch.setenv('OMP_NUM_THREADS', '7'); monkeypatch.delenv('TQDM_DISABLE', raising=False); before = dict(os.environ)
    r = execute_one(RUNS[0], tmp_path, threads=3)
    assert (r['status'] == 'done') == (message is None) and (message or '') in r['error'] and len(asked) == min(len(deaths)+1, 3 if 'before' in str(deaths[0]) and len(deaths) > 1 else 1)
    assert all(nb == run_notebook() and kw['cwd'] == nb.parent and p == asdict(RUNS[0]) for nb, p, kw, _ in asked)
    assert os.environ == before and all(e.get('OMP_NUM_THREADS') == '3' and e.get('TQDM_DISABLE') == '1' for *_, e in asked)
    asked = [a[:3] for a in asked]
    sockets = [kw['config'].KernelManager.ip for *_, kw in asked]
    assert all(kw['config'].KernelManager.transport == 'ipc' for *_, kw in asked) and len(set(sockets)) == len(sockets)

def test_threads_that_overlap_give_the_environment_back(tmp_path, monkeypatch):
    "The last to leave restores what the first found"
    monkeypatch.setenv('OMP_NUM_THREADS', '5'); before, met = dict(os.environ), []
    def slowly(nb, out, parameters, **kw):
        time.sleep(.05 + .1*(parameters['seed'] % 2)); met.append(os.environ['OMP_NUM_THREADS'])
        if parameters['seed'] == 2: raise error_of('no')
        return page(dict(parameters, run_id=str(parameters['seed']), status='done', error='', accuracy=.5))
    monkeypatch.setattr(papermill, 'execute_notebook', slowly)
    assert play(RUNS, tmp_path, n_jobs=4, threads=2).status.tolist() == ['done', 'done', 'failed', 'done']
    assert met == ['2']*4 and dict(os.environ) == before

def test_the_callers_own_pool_is_left_alone(tmp_path, monkeypatch):
    "loky keeps one pool a process; the run fails at once here, since its notebook is none"
    (tmp_path/'run.ipynb').write_text('{}'); monkeypatch.setenv('XPRUNE_NBS', str(tmp_path))
    def work():
        "Who there is, not who happened to be asked: one of two quick workers can take all four"
        asked = set(joblib.Parallel(n_jobs=2)(joblib.delayed(os.getpid)() for _ in range(4)))
        there = set(get_reusable_executor(reuse=True)._processes)
        assert asked <= there and len(there) == 2; return there
    try:
        mine = work()
        assert execute(RUNS[:1], tmp_path/'store', n_jobs=2, backend='loky', progress=False).status.tolist() == ['failed']
        assert room._pool_is_up() and work() == mine and os.getpid() not in mine
    finally: get_reusable_executor(reuse=True).shutdown()
    assert not room._pool_is_up()

def test_rows_written_before_there_was_a_choice(tmp_path):
    "They have the defaults"
    r = dict(asdict(RUNS[0]), run_id=RUNS[0].id, status='done', error='', accuracy=.5, seconds=1.)
    (tmp_path/f'{RUNS[0].id}.json').write_text(json.dumps({k: v for k, v in r.items() if k not in room.LATER}))
    assert rows(tmp_path)[FIELDS].to_dict('records') == [asdict(RUNS[0])] and play(RUNS[:1], tmp_path).run_id.tolist() == [RUNS[0].id]

def test_a_backend_that_gives_all_results_at_the_end(tmp_path, monkeypatch):
    "Such as Ray's"
    class AtTheEnd(joblib.parallel.ThreadingBackend): supports_return_generator = False
    joblib.register_parallel_backend('at the end', AtTheEnd)
    (tmp_path/'run.ipynb').write_text('{}'); monkeypatch.setenv('XPRUNE_NBS', str(tmp_path))
    with pytest.raises(ValueError, match='does not support return_as'), joblib.parallel_config('at the end'): joblib.Parallel(return_as='generator_unordered')
    assert execute(RUNS[:2], tmp_path/'store', n_jobs=2, backend='at the end', progress=False).status.tolist() == ['failed']*2

def test_row_of_takes_the_last_and_wants_one():
    nb = page(dict(run_id='a')); nb.cells += page(dict(run_id='b')).cells
    assert row_of(nb)['run_id'] == 'b'
    with pytest.raises(ValueError, match='ended without a row'): row_of(page())

# --- the real thing ---

PAIR = [Run(**SHORT), Run(**dict(SHORT, ratio=.7))]
EMPTY = Run(**dict(SHORT, ratio=.99)) # leaves a layer without a filter
STUDY = 'import sys; from xprune_nb.experiments import *; execute([Run(**dict({short}, ratio=r)) for r in (.5, .7)], sys.argv[1], n_jobs=1, progress=False)'.format(short=SHORT)

def killed(store):
    "Start a study of two runs in a process of its own, and kill it without a warning in the midst of the second: what there was then, and who outlived it"
    study = subprocess.Popen([sys.executable, '-c', STUDY, str(store)], start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 900
        while not ((store/f'{PAIR[0].id}.json').exists() and (store/f'.{PAIR[1].id}.part.ipynb').exists()):
            assert study.poll() is None and time.monotonic() < deadline, 'the study did not come to its second run'
            time.sleep(.1)
        family = psutil.Process(study.pid).children(recursive=True)
    finally:
        os.killpg(study.pid, signal.SIGKILL); study.wait()
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in store.iterdir()}, family

@pytest.fixture(scope='module')
def study(tmp_path_factory):
    "A store, what it held when the study was killed, the processes that the study had, and the rows after it was taken up again, with one run more that fails"
    store = tmp_path_factory.mktemp('store')
    at_death, family = killed(store)
    outlived = psutil.wait_procs(family, timeout=30)[1]
    left = rows(store)
    return store, at_death, outlived, left, execute([*PAIR, EMPTY], store, n_jobs=2, progress=False)

def test_killed_study_goes_on_with_nothing_lost(study):
    store, at_death, outlived, left, table = study
    first, second = (r.id for r in PAIR)
    assert {n for n in at_death if not n.startswith('.')} == {f'{first}.ipynb', f'{first}.json'} and left.run_id.tolist() == [first] and outlived == []
    assert table.status.tolist() == ['done', 'done', 'failed'] and found(store) == sorted(f'{r}{s}' for r in (first, second, EMPTY.id) for s in ('.ipynb', '.json'))
    for n in f'{first}.ipynb', f'{first}.json': assert ((store/n).stat().st_mtime_ns, (store/n).read_bytes()) == at_death[n]  # what was done was not touched

def test_papermills_row_is_the_same_run_by_hand(study):
    "Bit for bit, in another process"
    r, device = study[4].iloc[1].to_dict(), 'cuda' if torch.cuda.is_available() else 'cpu'
    if r['threads'] != torch.get_num_threads() or device != 'cpu': pytest.skip('another number of threads, or a GPU: equal only up to rounding')
    mine = by_hand(PAIR[1], load())[0]
    assert timeless(mine) == timeless(r)
    assert 0 < r['latency'] < 1.5*r['latency_dense'] and (mine['latency_dense'], mine['latency']) == (3., 2.)  # ms; the first was really timed

def test_the_page_of_a_run(study):
    "What was asked, each field of it; no error; pictures; and the row, which is the one in the store"
    store, *_, table = study
    for run in PAIR:
        nb, r = nbformat.read(store/f'{run.id}.ipynb', 4), read_row(store/f'{run.id}.json')
        asked, = (c.source for c in nb.cells if 'injected-parameters' in c.metadata.get('tags', []))
        names = {}; exec(asked, names)
        assert {k: v for k, v in names.items() if k in FIELDS} == asdict(run)
        outputs = [o for c in nb.cells for o in c.get('outputs', [])]
        assert all(o.output_type != 'error' for o in outputs) and not any(c.execution_count is None for c in nb.cells if c.cell_type == 'code')
        assert sum('image/png' in o.get('data', {}) for o in outputs) >= 3 and not any(o.get('name') == 'stderr' for o in outputs)
        assert dict(row_of(nb), seconds=r['seconds']) == r and {k: r[k] for k in FIELDS} == asdict(run)
    assert set(FIELDS) <= set(table) and table.ratio.tolist() == [.5, .7, .99] and (table.alive - (1 - table.ratio))[:2].abs().max() < .01

def test_a_run_that_fails_under_way(study):
    "Through papermill and loky: a ratio that leaves a layer without a filter"
    store, *_, table = study
    failed = table.iloc[2]
    assert failed.status == 'failed' and re.search(says("ratio 0.99 would leave layer 'features.0.0' (32 filters) without a filter"), failed.error)
    nb = nbformat.read(store/f'{EMPTY.id}.ipynb', 4)  # its page shows where
    assert any(o.output_type == 'error' for c in nb.cells for o in c.get('outputs', []))
