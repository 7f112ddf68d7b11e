"""Runs and grids: every way a run can be wrong, what happens in one step by step, what its row says and what it cost."""
import functools, itertools, json, math, re
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from xprune_nb.criteria import CRITERIA
from xprune_nb.data import load
from xprune_nb.experiments import CONTROLS, LATER, RETRAINS, USUAL, Run, asked, digest, grid, images_met, options, pack, predictions, processor, prune_steps, row, run as room, scoring_macs, shuffled, stream, unpack
from xprune_nb.model import baseline, build, convs, cost
from xprune_nb.pruning import cut, groups, kept, shares, silence
from xprune_nb.training import Recipe, evaluate

says = lambda *parts: '.*'.join(map(re.escape, parts))
FIELDS = [f.name for f in fields(Run)]
timeless = lambda r: {k: v for k, v in r.items() if not k.startswith(('seconds', 'latency'))}
SHORT = dict(criterion='random', epochs=0, images=10)  # as short as a run can be

@pytest.fixture(autouse=True, scope='module')
def stopwatch():
    "Rows made in this process are not timed, for speed: what was asked, and milliseconds that can be told apart"
    asked = []
    def latencies(models, shape, batch, device, **how):
        asked.append(([cost(m, shape).params.sum() for m in models], batch))
        return [[.003, .001, .5] if n == 2_236_682 else [.002, .001, .004] for n in asked[-1][0]]
    with pytest.MonkeyPatch.context() as m: m.setattr(room, 'latencies', latencies); yield asked

# --- a run ---

OTHER = dict(data='cifar10', baseline='mobilenet_v2-cifar10-seed1', criterion='lrp', schedule='iterative', ratio=.7, steps=2, share='linear', scope='global', coupling='coupled', reduce='max', normalise='rank', floor=2, control='shuffled',
             retrain='scratch', rewind=0, epochs=2, lr=.02, decay='step', augment=False, images=32, path_steps=20, baseline_input='black', target='predicted', aggregate='max', seed=1, protect='features.0.0', round_to=8, norm='alive', composite='epsilon-plus', epsilon=1e-3, threads=2)

def test_each_field_decides_the_id():
    runs = [Run(), *(Run(**{k: v}) for k, v in OTHER.items()), Run(ratio=0), Run(ratio=0, macs_left=.3), Run(ratio=0, macs_left=.4), Run(floor=.1), *(Run(schedule='iterative', epochs_between=n) for n in (0, 1, 5))]
    assert set(OTHER) | {'macs_left', 'epochs_between'} == set(FIELDS)  # these two are not alone
    assert len({r.id for r in runs}) == len(set(runs)) == len(runs) and Run().id == Run(**asdict(Run())).id
    assert all(re.fullmatch(r'[\w.-]+', r.id) for r in runs)  # a name for a file anywhere

@pytest.mark.parametrize('a,b', [(dict(ratio=0), dict(ratio=0.)), (dict(lr=1), dict(lr=1.)), (dict(seed=np.int64(3)), dict(seed=3)), (dict(ratio=np.float64(.7)), dict(ratio=.7)),
                                 (dict(rewind=np.int64(0)), dict(rewind=0)), (dict(epsilon=1), dict(epsilon=1.)), (dict(augment=np.bool_(False)), dict(augment=False)), (dict(ratio=-0.), dict(ratio=0))], ids=str)
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
    (dict(steps=2.5), 'steps is 2.5 (float), expected int'), (dict(rewind=5.5), 'rewind is 5.5 (float), expected int or str'),
    (dict(threads=0), 'threads is 0, expected at least 1'), (dict(threads='2'), "threads is '2' (str), expected int"), (dict(threads=True), 'threads is True (bool), expected int'), (dict(threads=10**6), 'threads is 1000000, expected at most 1024'),
    (dict(steps=10**30), f'steps is {10**30}, expected at most 1000'), (dict(schedule='gradual', steps=1001), 'steps is 1001, expected at most 1000'), (dict(epochs=10**30), 'expected at most 100000'), (dict(path_steps=10**30), 'expected at most 100000'), (dict(seed=2**63), 'expected a number below 2**63'),
    (dict(epochs_between=2), "epochs_between is 2 and schedule is 'oneshot', expected 'iterative'"), (dict(epochs_between=0, schedule='gradual'), "epochs_between is 0 and schedule is 'gradual'"), (dict(epochs_between=-2, schedule='iterative'), 'epochs_between is -2, expected at least -1'),
    (dict(round_to=0), 'round_to is 0, expected at least 1'), (dict(round_to=2.), 'round_to is 2.0 (float), expected int'), (dict(protect=['a']), "protect is ['a'] (list), expected str"), (dict(norm='dead'), "no treatment of batch normalisation called 'dead'"), (dict(norm='silence'), "did you mean 'silent'?"),
    (dict(composite='epsilon_plus'), "no composite called 'epsilon_plus'; did you mean 'epsilon-plus'?"), (dict(epsilon=0.), 'epsilon is 0.0, expected a small number above 0'), (dict(epsilon=-1e-6), 'epsilon is -1e-06, expected'), (dict(epsilon=math.nan), 'epsilon is nan, expected'), (dict(epsilon=math.inf), 'epsilon is inf, expected')], ids=str)
@pytest.mark.parametrize('criterion', ['conductance', 'random'])
def test_each_field_is_checked_at_once(wrong, message, criterion):
    "Also where this criterion would not look at it"
    with pytest.raises(ValueError, match=says(message)): Run(**dict(dict(criterion=criterion), **wrong))

def test_a_run_has_no_other_fields():
    for f in FIELDS:
        with pytest.raises(AttributeError): setattr(Run(), f, None)  # frozen
    with pytest.raises(TypeError): Run(device='cuda')

def test_a_field_that_joined_later_counts_in_a_name_only_where_it_was_chosen():
    "So that the rows of earlier studies keep theirs"
    assert set(LATER) < set(FIELDS) and all(USUAL[k] == getattr(Run(), k) for k in LATER)
    assert Run(criterion='lrp', ratio=.7).id == Run(criterion='lrp', ratio=.7, **{k: USUAL[k] for k in LATER}).id == 'oneshot-lrp-0.7-seed0-d9d9cb8a'  # as it was when there were fewer

@pytest.mark.parametrize('kw,between,last', [(dict(epochs=5), 5, 5), (dict(epochs=15, epochs_between=5), 5, 15), (dict(epochs=3, epochs_between=0), 0, 3), (dict(epochs=0, epochs_between=2), 2, 0)], ids=str)
def test_epochs_between_steps(kw, between, last):
    run = Run(schedule='iterative', **kw)
    assert (run.recipe(last=False).epochs, run.recipe().epochs) == (between, last)

# --- what a page was asked for ---

PAGE = dict(vars(Run()), In=[''], Out={}, _ih=[''], _oh={}, _1='x', exit=None, quit=None, get_ipython=print, open=open, asked=asked)

@pytest.mark.parametrize('extra,said', [(dict(criterium='magnitude'), "no parameter of a run called 'criterium'; did you mean 'criterion'?"), (dict(sead=3), "did you mean 'seed'?"), (dict(verbose=True), "no parameter of a run called 'verbose'"),
                                        (dict(lrs=[.1]), "'lrs'"), (dict(options={}), "'options'"), (dict(x=None), "'x'"), (dict(y=.5), "'y'")], ids=str)
def test_a_page_refuses_what_it_does_not_know(extra, said):
    assert asked(PAGE) == Run() and asked(PAGE | dict(ratio=.7, seed=3)) == Run(ratio=.7, seed=3)
    with pytest.raises(ValueError, match=says(said)): asked(PAGE | extra)
    with pytest.raises(ValueError, match='ratio is 2'): asked(PAGE | dict(ratio=2))

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
    net = baseline(run.baseline).net()
    steps = list(prune_steps(run, net, data, progress=False))
    nets = [net, steps[-1].live.net, *steps[-1].nets.values()]
    learnt = [{k: v.clone() for k, v in m.state_dict().items()} for m in nets]
    r = row(run, net, data, steps)
    assert all(v.equal(state[k]) for m, state in zip(nets, learnt) for k, v in m.state_dict().items())  # the networks are left as they have learnt
    return r, steps, net

@pytest.mark.parametrize('kw', [dict(), dict(epochs=1), dict(schedule='iterative', steps=2), dict(rewind=0), dict(schedule='iterative', steps=2, share='linear', rewind=0, coupling='coupled')], ids=str)
def test_a_row_says_the_same_of_test_and_validation_images(tiny, kw):
    run = Run(**dict(SHORT, criterion='magnitude', ratio=.3, **kw))
    r, steps, net = by_hand(run, tiny)
    live = steps[-1].live.net
    for k in 'dense', 'pruned', 'recalibrated': assert r[f'accuracy_{k}'] == r[f'val_{k}'], k
    assert r['accuracy'] == r['val_retrained'] == evaluate(live, tiny.test, tiny)[0] and list(steps[-1].nets) == ['pruned', 'recalibrated']
    assert r['val_epochs'] == [s.history.frame.val_accuracy.tolist() for s in steps] and r['accuracy_epochs'] == r['val_epochs'][-1] and len(r['accuracy_epochs']) == run.epochs
    if run.epochs: assert r['accuracy_epochs'][-1] == r['accuracy']
    assert [s.ratio for s in steps] == shares(.3, 2 if kw.get('schedule') else 1, run.share)
    assert list(r)[:len(FIELDS)] == FIELDS and {k: r[k] for k in FIELDS} == asdict(run) and r['run_id'] == run.id and r['status'] == 'done'
    assert r == json.loads(json.dumps(r)) and all(type(v) in (str, int, float, bool, dict, list) for v in r.values())
    assert r['threads'] == torch.get_num_threads() and r['processor'] == processor() and set(r['versions']) == {'xprune_nb', 'torch', 'torchvision', 'torch-pruning', 'numpy'}

def test_a_row_carries_plan_and_predictions(tiny):
    "So that two networks can be compared image by image, and filter by filter, when they are long gone"
    r, steps, net = by_hand(Run(**dict(SHORT, criterion='magnitude', ratio=.3, epochs=1)), tiny)
    live, p, x = steps[-1].live.net, steps[-1].plan, tiny.normalise(tiny.test.x)
    with torch.no_grad(): sure, classes = live(x).softmax(1).max(1)
    assert unpack(r['predicted']).tolist() == classes.tolist() and np.abs(unpack(r['confidence'])/255 - sure.numpy()).max() <= .5/255 + 1e-4
    assert r['accuracy'] == (unpack(r['predicted']) == tiny.test.y.numpy()).mean()
    assert unpack(r['plan'], sum(map(len, p.values()))).tolist() == torch.cat([*p.values()]).tolist() and r['live'] == [c.out_channels for c in convs(live).values()]
    assert r['params_live'] == sum(q.numel() for q in live.parameters()) and r['macs_live'] == cost(live).macs.sum() and r['connected'] is True

@given(st.lists(st.integers(0, 255), min_size=1, max_size=300))
@settings(max_examples=50, deadline=None)
def test_what_is_packed_comes_back(values):
    t = torch.tensor(values)
    assert unpack(pack(t)).tolist() == values and unpack(pack(t > 100), len(values)).tolist() == [v > 100 for v in values]

def test_predictions_leave_the_network_alone(tiny):
    net = baseline().net().train()
    classes, sure = predictions(net, tiny.test, tiny)
    assert net.training and classes.shape == sure.shape == (40,) and sure.dtype == torch.uint8 and (classes == tiny.test.y).double().mean().item() == evaluate(net, tiny.test, tiny)[0]

def test_the_digest_of_tensors():
    "Of names, types, shapes and numbers; not of order, memory or who keeps the gradient"
    t = torch.arange(12.).view(3, 4); same = dict(a=t, b=t)
    others = [dict(a=t), dict(a=t, c=t), dict(a=t, b=t.double()), dict(a=t, b=t.view(4, 3)), dict(a=t, b=t + 0.*t - 1e-6*(t == 5)), dict(a=t, b=t.flip(0))]
    assert len({digest(o) for o in [same, *others]}) == 7
    assert digest(dict(b=t, a=t)) == digest(dict(a=torch.cat([t, t], 1)[:, :4], b=t.T.contiguous().T)) == digest(dict(a=t.clone().requires_grad_(), b=t)) == digest(same)

def test_what_a_run_tells(tiny):
    "Which step it is in, and which epoch: enough for a line of a study"
    told = []
    list(prune_steps(Run(**dict(SHORT, criterion='magnitude', ratio=.3, schedule='iterative', steps=2, epochs=2, epochs_between=1)), baseline().net(), tiny, tell=lambda **what: told.append(what), progress=False))
    said = [(t['what'], t['step'], t['steps'], t['epoch'], t['epochs']) for t in told]
    assert said == [('scoring', 1, 2, 0, 0), ('retraining', 1, 2, 0, 1), ('retraining', 1, 2, 1, 1), ('scoring', 2, 2, 0, 0), ('retraining', 2, 2, 0, 2), ('retraining', 2, 2, 1, 2), ('retraining', 2, 2, 2, 2)]
    told.clear()
    list(prune_steps(Run(**dict(SHORT, criterion='magnitude', ratio=.3, schedule='gradual', steps=2, epochs=2)), baseline().net(), tiny, tell=lambda **what: told.append(what), progress=False))
    said = [(t['what'], t['step'], t['epoch']) for t in told]
    assert [s for s in said if s[0] == 'scoring'] == [('scoring', 1, 0), ('scoring', 2, 0)] and [s[2] for s in said if s[0] == 'training'] == [1, 2]

def test_runs_that_differ_in_criterion_share_everything_else(tiny, monkeypatch):
    "The images explained, and seed, order and recipe of each retraining"
    calls = {}
    for name in 'sample', 'fit', 'recalibrate':
        def watched(*args, real=getattr(room, name), name=name, **kw):
            calls.setdefault(criterion, []).append((name, [a for a in args if isinstance(a, (int, Recipe))], kw.get('seed')))
            return real(*args, **kw)
        monkeypatch.setattr(room, name, watched)
    for criterion in 'random', 'magnitude': by_hand(Run(**dict(SHORT, criterion=criterion, ratio=.3, schedule='iterative', steps=2, seed=4)), tiny)
    assert calls['random'] == calls['magnitude'] and len(calls['random']) == 1 + 2*2 + 1  # and the whole network is measured for the second scores
    assert len({str(c) for c in calls['random'] if c[0] == 'fit'}) == 2  # each retraining has an order of its own

def test_random_scores_are_new_in_each_step_and_the_seeds(tiny):
    steps = {s: by_hand(Run(**dict(SHORT, ratio=.3, schedule='iterative', steps=2, seed=s)), tiny)[1] for s in (0, 1)}
    first = [step.scores['features.0.0'] for s in steps.values() for step in s]
    assert len({tuple(f.tolist()) for f in first}) == 4
    for before, after in steps.values(): assert not any((after.plan[n] & ~before.plan[n]).any() for n in after.plan)  # yet what is gone stays gone

# --- retraining, controls, cost ---

@pytest.fixture(scope='module')
def seen(tiny):
    "A run carried out once: its row, steps and network"
    memory = {}
    def carried(**kw):
        run = Run(**{**SHORT, 'criterion': 'magnitude', **kw})
        if run not in memory:
            net = baseline(run.baseline).net()
            steps = list(prune_steps(run, net, tiny, progress=False))
            memory[run] = row(run, net, tiny, steps), steps, net
        return memory[run]
    return carried

measured = lambda r: {k: v for k, v in timeless(r).items() if k not in FIELDS and k != 'run_id'}
@pytest.mark.parametrize('coupling', ['independent', 'coupled'])
def test_what_is_timed(seen, stopwatch, coupling):
    "The whole network, and what was left and retrained"
    stopwatch.clear()
    r = seen(coupling=coupling, ratio=.6)[0]
    assert stopwatch == [([r['params_dense']], 128), ([r['params_live']], 128)] and (r['latency_dense'], r['latency']) == (3., 2.)

weights = lambda state, p: {n: state[f'{n}.weight'][p[n]] for n in p}  # of the survivors
alike = lambda a, b: all(a[n].equal(b[n]) for n in a)

@pytest.mark.slow
def test_one_shot_at_a_fixed_rate_three_protocols_are_one(seen):
    "To the bit; a decay tells fine-tuning from the rewinding of rates, and both from nothing else"
    one, *others = (measured(seen(retrain=r, epochs=1)[0]) for r in ('weights', 'lr', 'finetune'))
    assert others == [one, one]
    lr, tuned = (Run(retrain=r, epochs=20, decay='cosine').recipe() for r in ('lr', 'finetune'))
    assert lr == Run(retrain='weights', epochs=20, decay='cosine').recipe() and tuned.rates() == [lr.rates()[-1]]*20 and lr.rates()[0] > lr.rates()[-1]

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
    have = {r: Run(retrain=r, epochs=epochs, decay=decay, lr=.02).recipe().rates() for r in RETRAINS}
    for r in 'weights', 'lr': np.testing.assert_allclose(have[r], rates(total)[-epochs:], rtol=1e-9)
    np.testing.assert_allclose(have['finetune'], [rates(total)[-1]]*epochs, rtol=1e-9); np.testing.assert_allclose(have['scratch'], rates(epochs), rtol=1e-9)

def placed(step, state):
    "What a state of the whole network is, silenced, where the live one lies in it: convolutions' weights"
    return {n: torch.where(k.view(-1, 1, 1, 1), state[f'{n}.weight'], 0.)[step.live.index.get(f'{n}.weight', (...,))] for n, k in step.plan.items()}

def laid(live, learnt):
    "A state of the whole network in which only what `live` has learnt is a number"
    whole = {k: torch.full_like(v, math.nan) for k, v in baseline().net().state_dict().items() if v.is_floating_point()}
    for k in whole: whole[k][live.index.get(k, (...,))] = learnt[k]
    return whole

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
    first, second = prune_steps(run, net, tiny, progress=False)
    have, base = {n: starts[1][f'{n}.weight'] for n in convs(net)}, baseline()
    assert alike(have, placed(second, laid(first.live, ends[0]))) == (retrain in ('lr', 'finetune'))
    assert alike(have, placed(second, base.weights('last'))) == (retrain == 'weights')
    new = build(seed=stream(run, 2)).state_dict()
    assert alike(have, placed(second, new)) == (retrain == 'scratch')
    assert all(net.state_dict()[f'{n}.weight'][~k].eq(0).all() for n, k in second.plan.items()) and not alike(have, {n: ends[1][f'{n}.weight'] for n in have})
    assert alike({n: ends[1][f'{n}.weight'] for n in have}, placed(second, net.state_dict()))  # the whole network has got what was learnt
    if retrain == 'scratch': assert not alike(have, placed(second, base.weights(0))) and not alike(have, placed(second, build(seed=stream(run, 1)).state_dict()))

@pytest.mark.parametrize('e', [0, 5, 50])
def test_weights_of_any_stored_epoch(tiny, seen, e):
    _, steps, net = seen(rewind=e, ratio=.3)
    live, epoch = steps[0].live.net, baseline().weights(e)
    assert alike(weights(net.state_dict(), steps[0].plan), weights(epoch, steps[0].plan)) and alike({n: c.weight for n, c in convs(live).items()}, placed(steps[0], epoch))

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
    r, steps, net = seen(schedule='gradual', epochs=2, steps=4, ratio=.8, coupling='coupled')
    assert [s.ratio for s in steps] == pytest.approx([.8*(1 - (1 - i/4)**3) for i in (1, 2, 3, 4)]) and kept(steps[-1].plan) == pytest.approx(.2, abs=.01)
    for a, b in itertools.pairwise(steps): assert not any((b.plan[n] & ~a.plan[n]).any() for n in a.plan) and kept(b.plan) < kept(a.plan)
    last = steps[-1].live
    learnt = {k for k, v in steps[-1].nets['pruned'].state_dict().items() if not v.equal(last.net.state_dict()[k])}
    assert learnt and all(re.search('running_(mean|var)|num_batches', k) for k in learnt) and r['accuracy'] == r['accuracy_recalibrated'] == r['val_retrained']
    assert not alike(weights(net.state_dict(), steps[-1].plan), weights(baseline().weights('last'), steps[-1].plan))  # it has learnt before
    assert list(steps[-1].history.frame.epoch) == [1, 2] and r['epochs_spent'] == 2 and len(r['accuracy_epochs']) == 2
    with pytest.raises(ValueError, match=says('5 growths of the plan asked for, expected at most 4: the steps of the training')): seen(schedule='gradual', epochs=2, steps=5)

def test_gradual_training_before_the_first_growth_is_training(tiny, monkeypatch):
    "The network that the first growth is shown has learnt with all of its filters, as by `fit` alone"
    met = []
    real = room.score
    def watched(criterion, net, *args, **kw): met.append({k: v.clone() for k, v in net.state_dict().items()}); return real(criterion, net, *args, **kw)
    monkeypatch.setattr(room, 'score', watched); monkeypatch.setattr(room, 'scoring_macs', lambda *a: 0)
    run = Run(**dict(SHORT, schedule='gradual', epochs=2, steps=2, rewind=5))
    list(prune_steps(run, baseline().net(), tiny, progress=False))
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
    with room._Flops() if hooked else FlopCounterMode(display=False) as counter: score(criterion, net, x, y, **options(run))
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
    "130 images; recalibration meets them once, a retraining three times an epoch, each in the network that is alive then; before each later scoring the whole is recalibrated"
    n = 130
    r, steps, net = seen(schedule='iterative', steps=2, epochs=2, ratio=.5, coupling='coupled')
    alive = [cost(cut(baseline().net(), s.plan)).macs.sum() for s in steps]
    assert r['macs_retrain'] == sum((3*2 + 1)*n*a for a in alive) + n*r['macs_dense'] and alive[-1] == r['macs_live'] and (r['epochs_spent'], r['macs_score'], r['macs_spent']) == (4, 0, r['macs_retrain'])
    r, steps, *_ = seen(schedule='gradual', epochs=2, steps=4, ratio=.8, coupling='coupled')
    alive = [cost(cut(baseline().net(), s.plan)).macs.sum() for s in steps]
    assert r['macs_retrain'] == pytest.approx(3*n/2*(r['macs_dense'] + sum(alive[:3])) + n*alive[3] + 3*n*r['macs_dense'], abs=4)
    r, *_ = seen(); assert r['macs_retrain'] == n*r['macs_live'] and r['epochs_spent'] == 0
    one = replace(tiny, train=tiny.train.take(torch.arange(129)))
    assert images_met(one, Recipe(epochs=2)) == 2*128 and images_met(one, Recipe(epochs=2, batch_size=64)) == 2*128 and images_met(one, Recipe(epochs=1, batch_size=200)) == 129

def test_scoring_costs_as_much_in_each_step(seen):
    "It is the whole network that is scored, with what has gone silent"
    r, steps, *_ = seen(criterion='lrp', schedule='iterative', steps=2, ratio=.7, coupling='coupled', images=4)
    assert 0 < steps[1].macs['score'] == steps[0].macs['score'] and r['macs_score'] == sum(s.macs['score'] for s in steps) and r['macs_spent'] == r['macs_score'] + r['macs_retrain']

@pytest.mark.parametrize('coupling,share', [('independent', .6), ('coupled', .3)])
def test_equal_macs(seen, coupling, share):
    r, steps, *_ = seen(ratio=0, macs_left=share, coupling=coupling)
    assert r['macs_live']/r['macs_dense'] == pytest.approx(share, rel=.03) and r['ratio'] == 0 and 1 - r['alive'] == pytest.approx(steps[0].ratio, abs=.02) and f'macs{share:g}' in r['run_id']

def test_floors_and_global_plans(seen):
    r, steps, *_ = seen(scope='global', coupling='coupled', floor=.25, ratio=.6)
    assert min(k.float().mean() for k in steps[0].plan.values()) >= .25 and r['alive'] == pytest.approx(.4, abs=.01)
    assert {float(k.float().mean()) for k in steps[0].plan.values()} != {.4}

def test_what_is_protected_and_rounded(seen):
    r, steps, *_ = seen(ratio=.6, protect='features.0.*, features.18.0', round_to=8, coupling='coupled')
    p, gs = steps[0].plan, groups(baseline().net())
    first = next(g for g in gs if 'features.0.0' in g)
    assert all(p[n].all() for n in (*first, 'features.18.0')) and all(int(k.sum()) % 8 == 0 for k in p.values()) and r['alive'] < .6
    with pytest.raises(ValueError, match='features.99'): seen(protect='features.99.*')

def test_batch_normalisation_left_alive_is_another_network(seen):
    "Its constants are still there, and cost what they cost"
    silent, alive = seen(ratio=.5)[0], seen(ratio=.5, norm='alive')[0]
    assert silent['plan'] == alive['plan'] and silent['params_live'] < alive['params_live'] and silent['predicted'] != alive['predicted']

def test_rules_of_lrp_reach_the_scores(seen):
    scores = [seen(criterion='lrp', ratio=.5, images=4, **kw)[1][0].scores for kw in (dict(), dict(composite='epsilon-plus'), dict(epsilon=.1))]
    for a, b in itertools.combinations(scores, 2): assert not alike(a, b)

def test_the_threads_are_those_of_the_run(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, 'set_num_threads', asked.append)
    room.Protocol(Run(**SHORT, threads=3), baseline().net(), tiny)
    assert asked == [3]

def test_epochs_between_the_steps_are_spent_there(seen):
    r, steps, *_ = seen(schedule='iterative', steps=3, ratio=.5, epochs=2, epochs_between=1, coupling='coupled')
    assert [len(s.history.frame) for s in steps] == [1, 1, 2] and r['epochs_spent'] == 4 and [len(v) for v in r['val_epochs']] == [1, 1, 2] and len(r['accuracy_epochs']) == 2

# --- what runs share ---

class Memory:
    "A cache in which each result lies under what it is and depends on; `worked` says what was worked out"
    def __init__(self): self.kept, self.worked = {}, []
    def __call__(self, name, about, make):
        key = json.dumps([name, about], sort_keys=True)  # so it is plain JSON
        if key not in self.kept: self.worked.append(name); self.kept[key] = make()
        return {k: v.clone() for k, v in self.kept[key].items()}

def cached(run, tiny, memory):
    net = baseline(run.baseline).net()
    return row(run, net, tiny, list(prune_steps(run, net, tiny, memory, progress=False)), memory)

BASE = dict(SHORT, criterion='conductance', path_steps=2, ratio=.3)
@pytest.mark.parametrize('kw', [dict(), dict(criterion='magnitude', schedule='iterative', steps=2), dict(criterion='random', schedule='gradual', steps=2, epochs=1)], ids=str)
def test_a_row_is_the_same_with_and_without_a_cache(tiny, kw):
    "Bit for bit, cold and warm"
    run, memory = Run(**dict(BASE, **kw)), Memory()
    plain, cold = by_hand(run, tiny)[0], cached(run, tiny, memory)
    worked = list(memory.worked); warm = cached(run, tiny, memory)
    assert timeless(plain) == timeless(cold) == timeless(warm) and worked and memory.worked == worked

@pytest.mark.parametrize('kw,again', [
    (dict(ratio=.5), ''), (dict(coupling='coupled', norm='alive', floor=2, round_to=2), ''), (dict(rewind=5, retrain='weights'), ''), (dict(lr=.1, augment=False, decay='cosine'), ''), (dict(control='shuffled'), ''),
    (dict(seed=1), 'scores macs'), (dict(images=11), 'scores macs'), (dict(path_steps=3), 'scores macs'), (dict(baseline_input='black'), 'scores macs'), (dict(target='predicted'), 'scores macs'), (dict(aggregate='max'), 'scores macs'),
    (dict(criterion='magnitude'), 'scores macs')], ids=str)
def test_what_depends_on_something_else_is_worked_out_again(tiny, kw, again):
    "And nothing besides"
    memory = Memory()
    cached(Run(**BASE), tiny, memory); memory.worked.clear()
    cached(Run(**dict(BASE, **kw)), tiny, memory)
    assert sorted(memory.worked) == sorted(again.split())

def test_other_weights_images_and_threads_are_something_else(tiny, monkeypatch):
    memory, run = Memory(), Run(**BASE)
    cached(run, tiny, memory); first = set(memory.worked); memory.worked.clear()
    other = replace(tiny, test=tiny.test.take(torch.arange(39)), val=tiny.val.take(torch.arange(38)))
    cached(run, other, memory); measured = set(memory.worked); memory.worked.clear()
    list(prune_steps(run, baseline().net(5), tiny, memory, progress=False)); moved = set(memory.worked); memory.worked.clear()
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: None)  # here it is the name alone that counts
    cached(replace(run, threads=2), tiny, memory)
    assert measured == first - {'scores', 'macs'} and moved == first - {'dense', 'macs'} and set(memory.worked) == first  # what scoring costs does not depend on the weights
