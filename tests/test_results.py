"""Tables and charts against scipy and plain numpy, on rows made up so that the answer is known; saving when the disk is full."""
import errno, hashlib, os, re
from itertools import product
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from xprune_nb.charts import COLOURS
from xprune_nb.experiments.thesis import claims, entries, entries_chart, findings, rank_agreement
from xprune_nb.results import BY, chart, frontier, markdown, paired, read, save, stages, summary, table, tidy

from rows import CRITERIA, DEFAULTS, SCHEDULES, SMALL, data, made, noisy, points, says, spec, won_by

# --- means and intervals ---

@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=2, max_size=8), st.floats(.5, .999))
def test_summary_is_numpys_and_scipys(accuracies, level):
    rows = made(lambda s, c, r, k: accuracies[k], schedules=['oneshot'], criteria=['lrp'], ratios=[.5], seeds=range(len(accuracies)))
    line = summary(rows, level=level).iloc[0]
    mean, sd = np.mean(accuracies), np.std(accuracies, ddof=1)
    assert line.n == len(accuracies) and np.allclose([line['mean'], line.sd], [mean, sd], atol=1e-9)
    if sd > 1e-6: assert np.allclose([line.low, line.high], stats.t.interval(level, len(accuracies)-1, mean, stats.sem(accuracies)), atol=1e-9)
    assert line.low <= line['mean'] <= line.high

def test_summary_of_every_cell():
    rows = noisy()
    s = summary(rows)
    assert len(s) == 24 and list(s[list(BY)].itertuples(index=False, name=None)) == [*product(SCHEDULES, CRITERIA, (.5, .7, .9))]
    for line in s.itertuples():
        a = rows.query('schedule == @line.schedule and criterion == @line.criterion and ratio == @line.ratio').accuracy
        assert (line.n, line.mean, line.sd) == (3, pytest.approx(a.mean()), pytest.approx(a.std()))

def test_other_columns_are_summed_up_too():
    assert summary(noisy(), value='macs')['mean'].tolist() == pytest.approx([3e6, 1.8e6, .6e6]*8)

@pytest.mark.parametrize('seed', [0, 2])
def test_one_run_has_no_spread(seed):
    s = summary(noisy(seeds=[seed]))
    assert (s.n == 1).all() and s[['sd', 'low', 'high']].isna().all(axis=None) and s['mean'].notna().all()
    assert '±' not in table(noisy(seeds=[seed])).to_string() and 'no spread to show' in str(chart(noisy(seeds=[seed])).to_dict(validate=False)['title'])
    assert 'errorbar' not in str(chart(noisy(seeds=[seed])).to_dict(validate=False)) and 'errorbar' in str(chart(noisy()).to_dict(validate=False))

def test_equal_runs_have_a_spread_of_nought():
    s = summary(made())
    assert (s.sd == 0).all() and (s.low == s['mean']).all() and '0.500 ± 0.000' in table(made()).to_string()

@settings(max_examples=3, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_nothing(random):
    rows, order = noisy(), list(range(72))
    random.shuffle(order)
    shuffled = rows.iloc[order]
    for f in (tidy, summary, paired, table): pd.testing.assert_frame_equal(f(shuffled), f(rows), check_exact=True)

def test_the_order_of_the_rows_changes_nothing_that_is_said_or_drawn():
    rows, shuffled = noisy(**SMALL), noisy(**SMALL).sample(frac=1, random_state=5)
    for f in (entries, rank_agreement, claims): pd.testing.assert_frame_equal(f(shuffled), f(rows), check_exact=True)
    assert findings(shuffled) == findings(rows)
    for f in (chart, stages, frontier, entries_chart): assert spec(f(shuffled)) == spec(f(rows))

def test_rows_are_not_changed():
    rows = noisy(**SMALL); before = rows.copy()
    for f in (tidy, summary, paired, table, entries, rank_agreement, claims, findings, chart, stages, frontier, entries_chart): f(rows)
    pd.testing.assert_frame_equal(rows, before)

def test_unknown_names_come_after_the_known_ones():
    rows = noisy()
    rows = pd.concat([rows.assign(criterion=rows.criterion.replace('random', c)) for c in ('zebra', 'aardvark', 'deeplift', 'random')]).drop_duplicates([*BY, 'seed'])
    known = [c for c in COLOURS if c in ('conductance', 'lrp', 'magnitude', 'random', 'deeplift')]
    assert list(dict.fromkeys(summary(rows).criterion)) == [*known, 'aardvark', 'zebra']
    scale = chart(rows).to_dict(validate=False)['layer'][-1]['encoding']['color']['scale']
    assert scale['domain'] == [*known, 'aardvark', 'zebra'] and scale['range'][:5] == [COLOURS[c] for c in known] and len(set(scale['range'])) == 7

# --- refusals ---

@pytest.mark.parametrize('spoil,message', [
    (lambda r: r[:0], says('there are no rows')),
    (lambda r: r.drop(columns=['accuracy', 'seed']), says('have no column seed, accuracy; there are: ')),
    (lambda r: r.assign(status='failed', error='disk full'), says('none of the 72 runs is done; the first error: disk full')),
    (lambda r: r.assign(status='failed').drop(columns='error'), 'not recorded'),
    (lambda r: r.assign(accuracy=r.accuracy*100), says('72 done rows have an accuracy outside [0, 1]')),
    (lambda r: r.assign(accuracy=np.nan), says('outside [0, 1], the first one nan')),
    (lambda r: pd.concat([r, r[5:7]]), says('2 runs are there twice', 'drop_duplicates first')),
])
def test_tidy_refuses(spoil, message):
    with pytest.raises(ValueError, match=message): tidy(spoil(noisy()))

def test_tidy_leaves_out_what_is_not_done():
    rows = noisy()
    rows.loc[:9, ['status', 'accuracy']] = 'failed', np.nan
    assert len(tidy(rows)) == 62 and (tidy(rows).status == 'done').all() and '62 runs, 10 runs not done' in findings(rows)[0]

def test_a_column_that_nothing_filled():
    with pytest.raises(ValueError, match=says('no done row has a accuracy_pruned')): chart(noisy(accuracy_pruned=np.nan), value='accuracy_pruned')
    assert len(stages(noisy(accuracy_pruned=np.nan)).to_dict(validate=False)['hconcat']) == 2

def test_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=says('no rows at', 'xprune study')): read(tmp_path/'rows.csv')
    rows = noisy()
    rows.to_csv(tmp_path/'rows.csv', index=False)
    again = read(tmp_path/'rows.csv')
    assert again.rewind.map(type).eq(str).all() and again.seed.dtype.kind == 'i'
    pd.testing.assert_frame_equal(summary(again), summary(rows))

@pytest.mark.parametrize('column,other', [('coupling', 'coupled'), ('epochs', 5), ('rewind', 3), ('data', 'cifar10')])
def test_settings_are_not_mixed_until_named(column, other):
    rows = pd.concat([noisy(), noisy(1).assign(**{column: other})])
    for f in (summary, paired, chart, entries, findings):
        with pytest.raises(ValueError, match=says(f'the rows differ in {column} (')): f(rows)
    assert len(summary(rows, by=(*BY, column))) == 48
    assert len(paired(rows, by=('schedule', 'ratio', column))) == 12
    with pytest.raises(ValueError, match='the rows differ'): summary(rows.drop_duplicates([*BY, 'seed', 'run_id', column]).query(
        f"{column} == @other or criterion != 'lrp'")) # also where no single cell mixes: criteria of different settings

def test_an_option_that_a_criterion_does_not_take_is_no_difference():
    rows = noisy()
    rows['path_steps'] = rows.path_steps.where(rows.criterion == 'conductance')
    assert len(summary(rows)) == 24

def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=says("no column called 'rato'; did you mean 'ratio'?")): summary(noisy(), by=('schedule', 'criterion', 'rato'))
    with pytest.raises(ValueError, match=says("no schedule in these rows called 'oneshoot'; did you mean 'oneshot'?")): table(noisy(), 'oneshoot')
    with pytest.raises(ValueError, match=says('the rows have no column latency')): chart(noisy(), value='latency')

# --- pairs ---

@pytest.mark.parametrize('seeds', [2, 7])
@pytest.mark.parametrize('b', ['random', 'lrp'])
def test_paired_is_scipys(seeds, b):
    rows = noisy(seeds, seeds=range(seeds))
    out = paired(rows, 'conductance', b)
    assert len(out) == 6 and (out.n == seeds).all() and (out.pairs == seeds).all()
    for line in out.itertuples():
        here = rows[(rows.schedule == line.schedule) & (rows.ratio == line.ratio)].sort_values('seed')
        u, v = (here[here.criterion == c].accuracy.values for c in ('conductance', b))
        test = stats.ttest_rel(u, v)
        assert line.difference == pytest.approx((u-v).mean()) and line.sd == pytest.approx((u-v).std(ddof=1)) and line.p == pytest.approx(test.pvalue)
        assert (line.low, line.high) == pytest.approx((*test.confidence_interval(),))

def test_a_seed_is_averaged_before_it_counts():
    rows = noisy(); wide = rows.query("schedule == 'iterative'").pivot(index='seed', columns=['criterion', 'ratio'], values='accuracy')
    d = (wide['magnitude'] - wide['lrp']).mean(axis=1)
    line = paired(rows, 'magnitude', 'lrp', by=('schedule',)).set_index('schedule').loc['iterative']
    assert (line.n, line.pairs, line.difference) == (3, 9, pytest.approx(d.mean())) and line.p == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
    whole = paired(rows, 'magnitude', 'lrp', by=()).iloc[0]
    assert (whole.n, whole.pairs) == (3, 18)

def test_only_cells_that_every_seed_has_are_averaged():
    rows = noisy().query("not (criterion == 'random' and seed == 2 and ratio == .9)")
    two = paired(rows, by=('schedule',))
    assert (two.n == 3).all() and (two.pairs == 6).all()
    pd.testing.assert_frame_equal(two, paired(rows.query('ratio != .9'), by=('schedule',)))
    assert paired(rows).query('ratio == .9').n.tolist() == [2, 2]

def test_pairs_cancel_the_luck_of_a_seed():
    rows = made(lambda s, c, r, k: .3 + .1*k + (.02 if c == 'conductance' else 0))
    out = paired(rows)
    assert np.allclose(out.difference, .02) and (out.sd < 1e-9).all() and (summary(rows).sd > .09).all()

def test_without_a_pair_there_is_no_comparison():
    rows = noisy()
    apart = rows[(rows.criterion == 'lrp') & (rows.seed == 0) | (rows.criterion == 'random') & (rows.seed > 0)]
    with pytest.raises(ValueError, match=says('no pair: no run with lrp has one with random at the same')): paired(apart, 'lrp', 'random')
    with pytest.raises(ValueError, match='no pair'): paired(rows, 'lrp', 'lrp')
    with pytest.raises(ValueError, match=says("called 'tailor'", 'There are: conductance, lrp')): paired(rows, 'tailor')
    one = paired(rows.query('seed == 1'))
    assert (one.n == 1).all() and one[['sd', 'low', 'high', 'p']].isna().all(axis=None)
    scattered = rows[rows.seed.map({0: .5, 1: .7, 2: .9}) == rows.ratio]
    with pytest.raises(ValueError, match='share no entry'): paired(scattered, by=('schedule',))

# --- charts ---

@pytest.mark.parametrize('seeds', [(0,), (0, 1, 2)])
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_a_chart_holds_the_summary(schedule, seeds):
    rows = noisy(seeds=seeds)
    s = summary(rows).query('schedule == @schedule').set_index(['criterion', 'ratio'])
    for c in chart(rows, schedule), frontier(rows, schedule):
        p = points(c).set_index(['criterion', 'ratio'])
        assert len(p) == 12 and set(p.schedule) == {schedule}
        for k, line in p.iterrows():
            assert line['mean'] == s.loc[k, 'mean'] and line.n == len(seeds)
            assert line.sd == s.loc[k, 'sd'] if len(seeds) > 1 else pd.isna(line.sd)
    assert np.allclose(points(frontier(rows, schedule)).set_index('ratio').cost.loc[.9], .6)

def test_stages_hold_three_summaries():
    rows = noisy(accuracy_pruned=.15)
    panels = stages(rows).to_dict(validate=False)
    assert [p['title']['text'] for p in panels['hconcat']] == ['right after pruning', 'batch norm recalibrated', 'retrained']
    means = [d['mean'].tolist() for d in data(stages(rows)) if 'mean' in d]
    for value in 'accuracy_pruned', 'accuracy_recalibrated', 'accuracy': assert summary(rows[rows.schedule == 'oneshot'], value=value)['mean'].tolist() in means

def test_the_rules_are_chance_and_the_dense_network():
    texts = {r for d in data(chart(noisy())) if 'text' in d for r in d.text}
    assert texts == {'dense network 0.740', 'chance 0.10'}
    assert not any('text' in d for d in data(chart(noisy(), value='alive'))) # no accuracy, no such lines

def test_everything_drawn_is_within_the_axes():
    rows = made(lambda s, c, r, k: [.2, .99, 1.][k])
    y = chart(rows).to_dict(validate=False)['layer'][-1]['encoding']['y']['scale']['domain']
    assert y == [0, 1]
    s = summary(noisy())
    assert chart(noisy()).to_dict(validate=False)['layer'][-1]['encoding']['y']['scale']['domain'][1] >= min(1, s.query("schedule == 'oneshot'").eval('mean + sd').max())

def test_markdown():
    text = markdown(table(noisy()))
    lines = text.split('\n')
    assert len(lines) == 6 and lines[0].startswith('| criterion | 0.5 | 0.7 | 0.9 | n |') and len({l.count('|') for l in lines}) == 1
    for name, line in zip(CRITERIA, lines[2:]): assert line.startswith(f'| {name} | ') and line.endswith(' | 3 |')

def test_table_tells_uneven_numbers_of_seeds():
    rows = noisy().query("not (criterion == 'lrp' and ratio == .9 and seed > 0)").query("not (criterion == 'random' and ratio == .7)")
    t = table(rows)
    assert t.loc['lrp', 'n'] == '1 to 3' and '±' not in t.loc['lrp', .9] and t.loc['random', .7] == '–'

# --- saving ---

digests = lambda paths: {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}

def test_save_is_deterministic(tmp_path):
    rows = noisy(**SMALL)
    first = save(chart(rows), summary(rows), tmp_path/'a'/'b', 'oneshot')
    again = save(chart(rows.sample(frac=1, random_state=3)), summary(rows.sample(frac=1, random_state=4)), tmp_path/'c', 'oneshot')
    assert [p.name for p in first] == ['oneshot.svg', 'oneshot.png', 'oneshot.csv'] and digests(first) == digests(again)
    assert first[1].read_bytes().startswith(b'\x89PNG') and first[0].read_text().startswith('<svg')
    pd.testing.assert_frame_equal(pd.read_csv(first[2]), summary(rows))
    assert sorted(p.name for p in (tmp_path/'a'/'b').iterdir()) == sorted(p.name for p in first)

def test_a_table_with_names_keeps_them(tmp_path):
    assert save(chart(noisy(**SMALL)), table(noisy(**SMALL)), tmp_path, 't')[2].read_text().startswith('criterion,0.5,0.9,n\nconductance,')

@pytest.mark.parametrize('call', ['replace', 'fsync'])
def test_a_full_disk(tmp_path, monkeypatch, call):
    rows = noisy(**SMALL)
    old = save(chart(rows), summary(rows), tmp_path, 'kept')
    before = digests(old)
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, call, full)
    for name in 'kept', 'new':
        with pytest.raises(OSError, match=says(f'{name}.svg could not be written (No space left on device); nothing was changed', 'Free some space')) as e:
            save(chart(noisy(1, **SMALL)), summary(noisy(1, **SMALL)), tmp_path, name)
        assert e.value.errno == errno.ENOSPC
    assert digests(tmp_path.iterdir()) == before # nothing new, nothing half, nothing lost

def test_nothing_is_written_for_a_chart_that_cannot_be_drawn(tmp_path):
    broken = alt.Chart(summary(noisy(**SMALL))).mark_point().encode(x='nowhere')
    with pytest.raises(ValueError): save(broken, summary(noisy(**SMALL)), tmp_path/'out', 'x')
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('name', ['', '.', '/', 'a/b', '../up', '/abs', 'a/'])
def test_odd_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=says(f"'{name}' is no file name")): save(chart(noisy(**SMALL)), summary(noisy(**SMALL)), tmp_path/'out', name)
    assert not (tmp_path/'out').exists()

def test_a_name_may_have_dots_and_spaces(tmp_path):
    assert [p.name for p in save(chart(noisy(**SMALL)), summary(noisy(**SMALL)), tmp_path, 'ratio 0.5 ü')] == [f'ratio 0.5 ü.{e}' for e in ('svg', 'png', 'csv')]

def test_the_readme_says_what_the_tables_of_coupling_say():
    "Advantage, agreement, what coupling leaves of it over random and over magnitude, LRP over conductance: mean and interval, in this order"
    folder = Path(__file__).resolve().parent.parent/'figures'/'coupling'
    parts, over, than, lrp = (pd.read_csv(folder/f'{n}.csv') for n in ('parts', 'over_random', 'over_magnitude', 'over_conductance'))
    line = lambda t, part, c='conductance': t[(t.data == 'embedded images') & (t.criterion == c) & (t.part == part)].iloc[0]
    want = [line(parts, 'advantage'), line(parts, 'agreement'), line(over, 'coupled, equal ratio'), line(than, 'coupled, equal ratio'), line(lrp, 'coupled, equal ratio', 'lrp')]
    for text, to in ((folder.parents[1]/'README.md').read_text(), 'to'), ((folder.parents[1]/'README.pt.md').read_text().replace(',', '.'), 'a'):
        found = re.findall(rf'(\d\.\d{{3}}) \((\d\.\d{{3}}) {to} (\d\.\d{{3}})\)', text)
        assert found == [tuple(f'{w[c]:.3f}' for c in ('mean', 'low', 'high')) for w in want]
    assert {*parts[parts.data == 'embedded images'].n} == {5}

# --- what a run does not ask for, and what decides its row all the same ---

@pytest.mark.parametrize('f', [summary, paired], ids=lambda f: f.__name__)
@pytest.mark.parametrize('column,values', [('processor', ['a', 'b']), ('processor', ['a', None]), ('device', ['cpu', 'cuda']), ('threads', [1, 2])], ids=str)
def test_rows_of_two_machines_are_not_averaged_or_paired(f, column, values):
    both = pd.concat([made(**{column: v}).assign(seed=lambda t: t.seed + 10*i) for i, v in enumerate(values)])
    with pytest.raises(ValueError, match=f'the rows differ in {column}'): f(both)
    if column != 'threads': assert len(f(both.drop(columns=column))) == len(f(made()))  # told to
    assert len(f(both[both[column] == values[0]])) == len(f(made()))

def test_networks_are_what_a_mean_runs_over_where_each_seed_has_its_own():
    rows = noisy()
    own = rows.assign(baseline=rows.seed.map('net {}'.format))
    for f in summary, paired: pd.testing.assert_frame_equal(f(own), f(rows))
    with pytest.raises(ValueError, match='the rows differ in baseline'): summary(rows.assign(baseline=np.where(rows.seed == 2, 'b', 'a'), seed=rows.seed.replace(2, 1))[lambda t: ~t.duplicated([*BY, 'seed', 'baseline'])])
