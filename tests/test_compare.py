"""Points, differences and the explorer's state against scipy and plain pandas, on rows made up so that the answer is known; no browser."""
import hashlib, json, re
from dataclasses import asdict, fields
from itertools import product

import altair as alt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from xprune_nb.compare import StudyExplorer, as_html, axes, choices, choose, comparison, difference, differing, in_words, points, run_table, runs_at, study_rows
from xprune_nb.charts import COLOURS
from xprune_nb.experiments import LATER, Run, run_of
from xprune_nb.results import paired

says = lambda *parts: '.*'.join(map(re.escape, parts))
CRITERIA, RATIOS = ('conductance', 'lrp', 'random'), (.5, .9)

def made(seeds=(0, 1, 2), criteria=CRITERIA, ratios=RATIOS, schedules=('oneshot', 'iterative'), accuracy=None, **also):
    "Rows as a store gives them, without any order in their accuracies"
    rng = np.random.default_rng(0)
    return pd.DataFrame([asdict(Run()) | dict(
        criterion=c, ratio=r, schedule=s, seed=k, run_id=f'{s}-{c}-{r}-{k}', status='done', error='', accuracy_dense=.77, accuracy_pruned=.1,
        accuracy=accuracy(s, c, r, k) if accuracy else rng.uniform(.1, .8), params=2e6*(1-r) + k, macs=6e6*(1-r), seconds=90., device='cpu', threads=1,
        versions=dict(torch='2.14.1')) | also for s, c, r, k in product(schedules, criteria, ratios, seeds)])

def store_of(rows, folder):
    "A store with these rows, each beside its page"
    for r in rows.to_dict('records'):
        r |= dict(run_id=run_of(r).id, page=hashlib.sha256(b'{}').hexdigest())
        (folder/f"{r['run_id']}.json").write_text(json.dumps(r, default=float)); (folder/f"{r['run_id']}.ipynb").write_text('{}')
    return folder

def tables(chart): return [pd.DataFrame(d) for d in chart.to_dict(validate=False)['datasets'].values()]
def spec(chart): return re.sub(r'(view|param)_\d+', r'\1', json.dumps(chart.to_dict(validate=False), default=str))

# --- rows and choices ---

def test_a_frame_a_file_and_a_store_give_the_same_points(tmp_path):
    rows = made(); rows.to_csv(tmp_path/'rows.csv', index=False)
    (tmp_path/'store').mkdir(); store_of(rows, tmp_path/'store')
    frame = points(study_rows(rows))
    for source in (tmp_path/'rows.csv', str(tmp_path/'store')): pd.testing.assert_frame_equal(points(study_rows(source)), frame, rtol=1e-12)

@pytest.mark.parametrize('source,error,message', [
    (7, ValueError, says('the rows are given as int, expected a data frame, a rows.csv or the folder of a store')), ('nowhere/rows.csv', FileNotFoundError, says('no rows at')),
    (made()[:0], ValueError, says('there are no rows')), (pd.concat([made(), made()[:1]]), ValueError, says('1 runs are there twice')),
    (made().assign(status='failed', error='disk full'), ValueError, says('the first error: disk full'))], ids=['number', 'no-file', 'none', 'twice', 'failed'])
def test_what_are_no_rows_is_refused(source, error, message):
    with pytest.raises(error, match=message): study_rows(source)
    with pytest.raises(error, match=message): StudyExplorer(source)

def test_a_point_is_one_for_all_seeds_and_no_two_share_a_name():
    rows = study_rows(pd.concat([made(), made(coupling='coupled'), made(epochs=3)]))
    same = [c for c in (f.name for f in fields(Run)) if c != 'seed']
    assert (rows.groupby('point')[same].nunique(dropna=False) == 1).all(axis=None) and rows.point.nunique() == 3*2*2*3
    assert set(rows.line) == {f'{s}, {c}, epochs {e}' for s in ('oneshot', 'iterative') for c, e in (('independent', 1), ('coupled', 1), ('independent', 3))}

def test_a_field_that_another_one_implies_is_not_named():
    rows = study_rows(pd.concat([made(schedules=['oneshot'], epochs=1), made(schedules=['iterative'], epochs=3)]))
    assert set(rows.line) == {'oneshot', 'iterative'}

def test_rows_from_before_there_was_a_choice_are_filled_in():
    old = study_rows(made().drop(columns=list(LATER)))
    assert old.macs_left.eq(1).all() and old.point.tolist() == study_rows(made()).point.tolist()

def test_choices_are_what_is_there_defaults_first():
    c = choices(study_rows(pd.concat([made(coupling='coupled'), made(), made(epochs=3)])))
    assert list(c) == ['criterion', 'ratio', 'schedule', 'coupling', 'baseline', 'epochs']
    assert c['coupling'] == ['independent', 'coupled'] and c['schedule'] == ['oneshot', 'iterative'] and c['ratio'] == [.5, .9] and c['criterion'] == list(CRITERIA)

def test_choose():
    rows = study_rows(made())
    assert len(choose(rows, criterion=['lrp', 'random'], ratio=.5)) == 12 and len(choose(rows, criterion=[])) == 0 and len(choose(rows)) == 36
    assert len(choose(rows[rows.ratio == .5], criterion='lrp')) == 6
    with pytest.raises(ValueError, match=says("no ratio in these rows called '0.6'", 'There are: 0.5, 0.9')): choose(rows, ratio=.6)
    with pytest.raises(ValueError, match=says("no column called 'ratoi'; did you mean 'ratio'?")): choose(rows, ratoi=.5)

# --- points ---

@pytest.mark.parametrize('x,divided', [('ratio', 1), ('macs', 1e6), ('params', 1e6)])
def test_points_are_pandas_and_scipys(x, divided):
    raw = made()
    s = points(study_rows(raw), x)
    assert len(s) == 12
    for p in s.itertuples():
        g = raw.query('criterion == @p.criterion and schedule == @p.schedule and ratio == @p.ratio')
        assert [p.mean, p.low, p.high, p.x, p.n] == pytest.approx([g.accuracy.mean(), *stats.t.interval(.95, 2, g.accuracy.mean(), stats.sem(g.accuracy)), g[x].mean()/divided, 3])

def test_one_seed_has_no_interval_two_have():
    assert points(study_rows(made(seeds=[4])))[['sd', 'low', 'high']].isna().all(axis=None)
    assert points(study_rows(made(seeds=[4, 5])))[['sd', 'low', 'high']].notna().all(axis=None)

def test_latency_only_where_it_was_measured():
    with pytest.raises(ValueError, match=says('no row has a latency: it was not measured in these runs; there are: ratio, macs, params')): points(study_rows(made()), 'latency')
    timed = study_rows(made(latency_cpu=12.5))
    assert axes(timed)['latency_cpu'] == ('latency cpu', 'ms a batch', 1) and (points(timed, 'latency_cpu').x == 12.5).all()
    assert 'latency_cpu' not in axes(study_rows(made(latency_cpu=np.nan)))
    half = made(latency=3.); half.loc[half.schedule == 'iterative', 'latency'] = np.nan
    half['latency_dense'] = 9.
    rows = study_rows(half)
    assert len(points(rows, 'latency')) == 6 and axes(rows)['latency'] == ('latency of the cut network', 'ms a batch of 128', 1) and 'latency_dense' not in axes(rows)
    e = StudyExplorer(half)
    assert 'without' not in e.note.value
    e.x.value = 'latency'
    assert '18 runs of these without latency of the cut network: not drawn' in e.note.value and 'latency of the cut network, ms a batch of 128' in json.dumps(e.view.spec)

def test_a_share_of_macs_has_no_ratio():
    shares = pd.concat([made(ratios=[0.], macs_left=m) for m in (.3, .6)])
    rows = study_rows(shares)
    assert 'ratio' not in axes(rows) and 'lrp, oneshot, MACs left 0.3' in set(rows.point) and len(points(rows, 'macs')) == 12
    with pytest.raises(ValueError, match=says("draw them against 'macs'")): points(rows)
    both = study_rows(pd.concat([shares, made()]))
    assert len(points(both)) == 12 and len(points(both, 'macs')) == 24
    e = StudyExplorer(both)
    assert 'have no ratio: draw against MACs' in e.note.value
    assert StudyExplorer(shares).x.value == 'macs'

@pytest.mark.parametrize('kw,message', [(dict(x='ratoi'), says("no axis in these rows called 'ratoi'; did you mean 'ratio'?")),
                                        (dict(y='acuracy'), says("no accuracy in these rows called 'acuracy'; did you mean 'accuracy'?"))], ids=['x', 'y'])
def test_points_of_no_column(kw, message):
    with pytest.raises(ValueError, match=message): points(study_rows(made()), **kw)

# --- the chart ---

def test_the_chart_draws_the_points():
    rows = study_rows(made())
    for x in axes(rows):
        drawn = max((d for d in tables(comparison(rows, x)) if 'said' in d), key=len).sort_values('point')
        s = points(rows, x).sort_values('point')
        assert drawn.point.tolist() == s.point.tolist() and np.allclose(drawn['mean'], s['mean']) and np.allclose(drawn['x'], s.x)

def test_the_chart_says_what_its_bars_are():
    text = lambda rows: spec(comparison(study_rows(rows)))
    assert 'each point one run: no interval' in text(made(seeds=[0])) and 'errorbar' not in text(made(seeds=[0]))
    assert 'bars: 95 % t-interval over the seeds"' in text(made()) and 'errorbar' in text(made())
    assert 't-interval over the seeds; one run has none' in text(made()[1:].query('not (criterion == "lrp" and seed > 0)'))
    assert '80 % t-interval' in spec(comparison(study_rows(made()), level=.8))

def scales(chart):
    "Colour of each criterion"
    layers = [l['encoding']['color'] for l in chart.to_dict(validate=False)['layer'] if 'scale' in l.get('encoding', {}).get('color', {})]
    return dict(zip(layers[0]['scale']['domain'], layers[0]['scale']['range']))

def test_a_criterion_keeps_its_colour_whatever_is_chosen():
    rows = study_rows(made(criteria=('lrp', 'mine', 'aardvark')))
    names = ['lrp', 'mine', 'aardvark']
    whole = scales(comparison(rows, names=names))
    assert whole['lrp'] == COLOURS['lrp'] and len(set(whole.values())) == 3
    for n in names: assert scales(comparison(choose(rows, criterion=n), names=names)) == {n: whole[n]}

def test_the_line_nearest_to_the_defaults_is_solid():
    rows = study_rows(pd.concat([made(coupling='coupled'), made()]))
    dash = next(l['encoding']['strokeDash'] for l in comparison(rows).to_dict(validate=False)['layer'] if 'strokeDash' in l.get('encoding', {}))
    assert dash['scale']['domain'][0] == 'oneshot, independent' and dash['scale']['range'][0] == [1, 0] and dash['title'] == 'schedule, coupling'

def test_dense_network_only_where_there_is_one():
    import xprune_nb.compare as compare
    one = study_rows(made())
    assert compare._rulers(one, 'accuracy') == pytest.approx({'dense network': .77, 'chance': .1}) and compare._rulers(one, 'alive') == {}
    assert compare._rulers(study_rows(pd.concat([made(), made(baseline='another', accuracy_dense=.5)])), 'accuracy') == pytest.approx({'chance': .1})

def test_the_order_of_the_rows_changes_nothing():
    rows = made()
    assert spec(comparison(study_rows(rows.sample(frac=1, random_state=1)), 'macs')) == spec(comparison(study_rows(rows), 'macs'))

# --- differences ---

def pair(a, b, rows=None):
    rows = study_rows(made()) if rows is None else rows
    return runs_at(rows, a), runs_at(rows, b)

def test_a_difference_in_criterion_is_results_paired():
    raw = made(); rows = study_rows(raw)
    for line in paired(raw, 'lrp', 'random').itertuples():
        d = difference(*pair(f'lrp, {line.schedule}, ratio {line.ratio:g}', f'random, {line.schedule}, ratio {line.ratio:g}', rows))
        assert d['how'] == 'paired by seed' and [d[k] for k in ('difference', 'low', 'high', 'p', 'n')] == pytest.approx([line.difference, line.low, line.high, line.p, 3])

@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=6, max_size=6), st.integers(0, 4))
def test_paired_where_seeds_are_shared_else_welch(v, apart):
    runs = lambda v, first: pd.DataFrame(dict(seed=range(first, first+3), accuracy=v))
    a, b = runs(v[:3], 0), runs(v[3:], apart)
    d, back = difference(a, b), difference(b, a)
    shared = max(0, 3-apart)
    assert d['how'] == ('paired by seed' if shared else 'not paired') and d['n'] == (shared or 3) and d['difference'] == pytest.approx(-back['difference'], abs=1e-11)
    if shared == 1: assert np.isnan([d['low'], d['high'], d['p']]).all()
    u, w = np.array(v[:3])[apart:], np.array(v[3:])[:shared]
    if shared > 1 and np.std(u-w) > 1e-6:
        t = stats.ttest_rel(u, w)
        assert [d['p'], d['low'], d['high']] == pytest.approx([t.pvalue, *t.confidence_interval()], abs=1e-6)
    if not shared and np.std(v[:3]) + np.std(v[3:]) > 1e-6:
        t = stats.ttest_ind(v[:3], v[3:], equal_var=False)
        assert [d['p'], d['low'], d['high']] == pytest.approx([t.pvalue, *t.confidence_interval()], abs=1e-6)

def test_the_difference_in_words():
    even = study_rows(made(accuracy=lambda s, c, r, k: .5 + .1*(c == 'lrp') + .01*k))
    assert in_words('lrp, oneshot, ratio 0.5', 'random, oneshot, ratio 0.5', even) == 'A − B in test accuracy after retraining: +0.100 (95 % interval +0.100 to +0.100; paired by seed, n = 3)'
    alone = even[even.seed == 0]
    assert '−0.100 (one seed: no interval; paired by seed, n = 1)' in in_words('random, oneshot, ratio 0.5', 'lrp, oneshot, ratio 0.5', alone)
    apart = even[(even.criterion == 'lrp') == (even.seed < 2)].query('seed != 3')
    assert 'no seed in common: not paired' in in_words('lrp, oneshot, ratio 0.5', 'random, oneshot, ratio 0.5', apart)

def test_what_differs_is_named_and_nothing_else():
    d = differing(*pair('lrp, oneshot, ratio 0.5', 'random, iterative, ratio 0.9')).set_index('field')
    assert d.to_dict('index') == dict(criterion=dict(a='lrp', b='random'), schedule=dict(a='oneshot', b='iterative'), ratio=dict(a='0.5', b='0.9'))
    a, b = pair('lrp, oneshot, ratio 0.5', 'lrp, oneshot, ratio 0.5')
    assert differing(a, b).empty and list(differing(a, b)) == ['field', 'a', 'b']
    other = b.assign(device='cuda', versions=[json.dumps(dict(torch='2.4.0'))]*3, epochs=[1, 3, 3], seed=[0, 1, 7])
    assert differing(a, other).set_index('field').T.to_dict('list') == {
        'epochs': ['1', '1, 3'], 'seed': ['0, 1, 2', '0, 1, 7'], 'device': ['cpu', 'cuda'], 'version of torch': ['2.14.1', '2.4.0']}
    with pytest.raises(ValueError, match=says("no point in these rows called 'lrp, oneshot, ratio 0.6'")): runs_at(study_rows(made()), 'lrp, oneshot, ratio 0.6')

# --- runs and their notebooks ---

def test_runs_link_to_the_notebooks_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'a store').mkdir(); store = store_of(made(), tmp_path/'a store')
    rows = study_rows(store)
    first = rows[rows.run_id == run_of(made().iloc[0]).id]
    for p in store.glob('*.ipynb'):
        if p.stem != first.run_id.iloc[0]: p.unlink()  # of the others they were taken away since
    runs = runs_at(rows, first.point.iloc[0])
    table = run_table(runs, store)
    assert (table.notebook != '').tolist() == [r == first.run_id.iloc[0] for r in runs.run_id] and table.seed.tolist() == ['0', '1', '2'] and (table.minutes == '1.5').all()
    path, = table.notebook[table.notebook != '']
    assert path == f'a store/{first.run_id.iloc[0]}.ipynb' and f'href="a%20store/{first.run_id.iloc[0]}.ipynb"' in as_html(table, 'runs')
    assert (run_table(runs).notebook == '').all()
    e = StudyExplorer(rows, store='a store'); e.a.value = first.point.iloc[0]
    assert e.runs['a'].outputs[0]['data']['text/html'].count('<a href=') == 1

def test_a_table_shows_text_as_text():
    page = as_html(pd.DataFrame({'<i>': ['<script>', '&']}), '<b>')
    assert '<script>' not in page and '&lt;script&gt;' in page and '&amp;' in page and '<caption>&lt;b&gt;</caption>' in page

# --- the explorer, without a browser ---

def send(e, name, point):
    "What the browser sends when a point is clicked"
    value = dict(value={}, store=[])
    if point: value = dict(value=dict(point=[point], vlPoint={'or': [dict(point=point)]}), store=[dict(fields=[dict(field='point', type='E')], values=[point])])
    e.view._vl_selections = {**e.view._vl_selections, name: value}

def shown(out): return out.outputs[0]['data']['text/html'] if out.outputs else ''

def test_clicks_lists_and_rings_say_the_same():
    e = StudyExplorer(made())
    p, q = 'lrp, oneshot, ratio 0.5', 'random, oneshot, ratio 0.5'
    send(e, 'click', p)
    assert (e.a.value, e.b.value, e.view.params.a, e.view.params.b) == (p, '', p, '') and f'<caption>A: {p}</caption>' in shown(e.runs['a']) and shown(e.runs['b']) == ''
    before = e.view.spec
    send(e, 'shift_click', q)
    assert (e.a.value, e.b.value, e.view.params.b) == (p, q, q) and e.view.spec is before # drawn once, ringed twice
    assert in_words(p, q, e.rows) in e.said.value and 'criterion' in shown(e.fields)
    send(e, 'click', None); send(e, 'click', 'no such point') # beside all points
    assert (e.a.value, e.b.value) == (p, q)
    e.b.value = p # from the list
    assert e.view.params.b == p and shown(e.fields) == '' and 'To compare' in e.said.value
    e.a.value = ''
    assert shown(e.runs['a']) == '' and 'Click a point' in e.said.value and e.view.params.a == ''
    send(e, 'click', p)
    assert e.a.value == p

def test_controls_choose_rows():
    e = StudyExplorer(made())
    e.a.value, e.b.value = 'lrp, oneshot, ratio 0.5', 'random, oneshot, ratio 0.9'
    e.boxes['criterion']['random'].value = False
    assert set(e.chosen().criterion) == {'conductance', 'lrp'} and (e.a.value, e.b.value) == ('lrp, oneshot, ratio 0.5', '') and '24 runs of 36, 8 points' in e.note.value
    e.x.value = 'params'
    assert 'parameters, millions' in json.dumps(e.view.spec) and e.a.value == 'lrp, oneshot, ratio 0.5' and e.view.params.a == e.a.value
    e.y.value = 'accuracy_pruned'
    assert 'test accuracy right after pruning' in json.dumps(e.view.spec)
    for box in e.boxes['schedule'].values(): box.value = False
    assert 'nothing is chosen of schedule' in json.dumps(e.view.spec) and len(e.a.options) == 1 and '0 runs of 36' in e.note.value
    e.boxes['schedule']['oneshot'].value = True
    assert '12 runs of 36, 4 points' in e.note.value
    send(e, 'click', 'conductance, oneshot, ratio 0.9')
    assert e.a.value == 'conductance, oneshot, ratio 0.9'

def test_choices_that_no_run_has_together():
    rows = pd.concat([made(criteria=['lrp'], ratios=[.5]), made(criteria=['random'], ratios=[.9])])
    e = StudyExplorer(rows)
    e.boxes['criterion']['lrp'].value = e.boxes['ratio'][.9].value = False
    assert 'no run has all of this' in json.dumps(e.view.spec)

def test_notes_say_what_is_missing():
    rows = made(seeds=[0])
    rows.loc[rows.index[:2], ['status', 'accuracy']] = 'failed', np.nan
    note = StudyExplorer(rows).note.value
    assert '10 runs of 10, 10 points' in note and '2 runs not done' in note and 'no latency' in note and 'no intervals' in note
    note = StudyExplorer(made(latency=3.)).note.value
    assert 'latency' not in note and 'no intervals' not in note and 'not done' not in note

def test_the_only_value_of_a_field_is_shown_and_cannot_be_taken_away():
    e = StudyExplorer(made())
    assert [(b.value, b.disabled) for b in e.boxes['coupling'].values()] == [(True, True)] and not any(b.disabled for b in e.boxes['criterion'].values())

def test_hooks_for_styles_and_tests():
    def walk(w):
        yield w
        for c in getattr(w, 'children', ()): yield from walk(c)
    e = StudyExplorer(made())
    classes = {c for w in walk(e) for c in getattr(w, '_dom_classes', ())}
    assert {'xs', 'xs-x', 'xs-y', 'xs-criteria', 'xs-ratios', 'xs-schedule', 'xs-coupling', 'xs-network', 'xs-chart', 'xs-a', 'xs-b', 'xs-runs', 'xs-runs-a', 'xs-runs-b',
            'xs-difference', 'xs-differ', 'xs-note', 'xs-criterion-lrp', 'xs-ratio-0_5'} <= classes
    assert sum(isinstance(w, alt.JupyterChart) for w in walk(e)) == 1 # the bundle is near a megabyte

def test_the_chart_brings_its_own_vega():
    view = StudyExplorer(made()).view
    assert not re.search(r'(?:from|import)\s*\(?["\']https?://', view._esm) and len(view._esm) > 500_000 and view.embed_options['actions']['editor'] is False
