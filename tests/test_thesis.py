"""The forty printed entries; ours beside them, against scipy; claims that rows made up for it bear out or contradict."""
import re
from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from xprune_nb.experiments.thesis import (THESIS, claims, entries, entries_chart, findings, holm, missing_entries, rank_agreement, thesis, thesis_chart,
                                          thesis_table)
from xprune_nb.results import BY, chart, frontier, stages, summary

from rows import CRITERIA, SCHEDULES, made, noisy, points, won_by

# --- the thesis ---

def test_the_forty_entries():
    t = thesis()
    assert len(t) == 40 and not t.duplicated(list(BY)).any() and (t.n == 3).all()
    assert set(t[list(BY)].itertuples(index=False, name=None)) == {*product(SCHEDULES, CRITERIA, (.5, .6, .7, .8, .9))}
    assert t.accuracy_mean.between(.10, .66).all() and t.accuracy_std.between(0, .19).all() and t.accuracy_mean.max() < THESIS['dense'] == .7539
    for c in 'accuracy_mean', 'accuracy_std': assert (t[c]*100).map(lambda v: abs(v - round(v)) < 1e-9).all() # two decimals, as printed

def test_the_entries_say_what_the_thesis_concludes():
    t = thesis().set_index(list(BY)).accuracy_mean
    assert t['oneshot', 'magnitude', .9] == t['oneshot', 'random', .9] == .10
    for s, r in product(SCHEDULES, (.5, .6, .7, .8, .9)): assert t[s, 'conductance', r] == max(t[s, c, r] for c in CRITERIA)
    for c in 'lrp', 'magnitude': assert t['iterative', c, .9] > t['oneshot', c, .9]
    assert np.ptp([t['oneshot', c, .5] for c in CRITERIA]) < .04 < .3 < np.ptp([t['oneshot', c, .9] for c in CRITERIA])

@pytest.mark.parametrize('cell,mean,sd', [
    (('oneshot', 'conductance', .5), .66, .01), (('oneshot', 'conductance', .9), .48, .02), (('oneshot', 'lrp', .9), .27, .16),
    (('oneshot', 'magnitude', .8), .49, .01), (('oneshot', 'random', .8), .14, .05), (('iterative', 'conductance', .7), .61, .02),
    (('iterative', 'lrp', .9), .32, .19), (('iterative', 'magnitude', .9), .43, .01), (('iterative', 'random', .8), .40, .06),
    (('iterative', 'random', .9), .10, .00)])
def test_spot_cells(cell, mean, sd):
    line = thesis().set_index(list(BY)).loc[cell]
    assert (line.accuracy_mean, line.accuracy_std) == (mean, sd)
    assert thesis_table(cell[0]).loc[cell[1], cell[2]] == f'{mean:.2f} ± {sd:.2f}'

@pytest.mark.parametrize('schedule', SCHEDULES)
def test_its_table_and_its_chart_are_its_entries(schedule):
    t = thesis().query('schedule == @schedule')
    wide = thesis_table(schedule)
    assert list(wide.index) == list(CRITERIA) and list(wide.columns) == [.5, .6, .7, .8, .9, 'n'] and (wide.n == '3').all()
    for c in t.itertuples(): assert wide.loc[c.criterion, c.ratio] == f'{c.accuracy_mean:.2f} ± {c.accuracy_std:.2f}'
    drawn = points(thesis_chart(schedule)).set_index(['criterion', 'ratio'])
    assert len(drawn) == 20
    for c in t.itertuples(): assert (drawn.loc[(c.criterion, c.ratio), 'mean'], drawn.loc[(c.criterion, c.ratio), 'sd']) == (c.accuracy_mean, c.accuracy_std)

def as_thesis(change=lambda a, s, c, r: a, **kw):
    "Rows that reach what the thesis reports"
    t = thesis().set_index(list(BY)).accuracy_mean
    return made(lambda s, c, r, k: change(t[s, c, r], s, c, r), ratios=(.5, .6, .7, .8, .9), **kw)

def test_entries():
    rows = noisy(ratios=(.5, .75, .9))
    v, s, t = entries(rows), summary(rows).set_index(list(BY)), thesis().set_index(list(BY))
    assert len(v) == 16 and set(v.ratio) == {.5, .9} # .75 is not in the thesis
    for line in v.itertuples():
        k = line.schedule, line.criterion, line.ratio
        assert (line.ours, line.sd, line.n) == (s.loc[k, 'mean'], s.loc[k, 'sd'], 3) and (line.thesis, line.thesis_sd) == (*t.loc[k, ['accuracy_mean', 'accuracy_std']],)
        assert line.difference == pytest.approx(line.ours - line.thesis) and line.lost == pytest.approx(.74 - line.ours)
        assert line.thesis_lost == pytest.approx(.7539 - line.thesis)
    with pytest.raises(ValueError, match='none of these entries is in the thesis'): entries(noisy(ratios=(.55,)))

def test_rank_agreement_is_scipys():
    rows = noisy(ratios=(.5, .6, .7, .8, .9))
    a, v = rank_agreement(rows), entries(rows)
    assert len(a) == 1 + 2 + 10
    for line in a.itertuples():
        g = v[((v.schedule == line.schedule) | (line.schedule == 'all')) & ((v.ratio == line.ratio) | (line.ratio == 'all'))]
        assert line.entries == len(g) and line.off == pytest.approx(np.abs(g.ours - g.thesis).mean())
        assert (line.spearman, line.kendall) == pytest.approx((stats.spearmanr(g.ours, g.thesis)[0], stats.kendalltau(g.ours, g.thesis)[0]))
        if line.ratio != 'all': assert line.best == g.set_index('criterion').ours.idxmax()

def test_rank_agreement_at_its_ends():
    same, reverse = rank_agreement(as_thesis()), rank_agreement(as_thesis(lambda a, s, c, r: .9 - a))
    assert np.allclose(same[['spearman', 'kendall']], 1) and np.allclose(same.off, 0) and (same.best == same.thesis_best).all()
    assert np.allclose(reverse[['spearman', 'kendall']], -1)
    level = rank_agreement(made(ratios=(.5,)))
    assert level[['spearman', 'kendall']].isna().all(axis=None) # nothing is ranked where all are equal
    assert level[level.ratio == .5].best.tolist() == ['/'.join(CRITERIA)]*2

# --- what is said ---

def said(rows, word): return claims(rows).set_index('claim').here[lambda s: s.index.str.contains(word)].item()

@pytest.mark.parametrize('winner', CRITERIA)
def test_whoever_wins_is_said_to_win(winner):
    rows, wins = won_by(winner), winner == 'conductance'
    assert said(rows, 'best criterion').startswith('in 6 of 6' if wins else 'in 0 of 6')
    lines = [l for l in findings(rows) if ', best: ' in l]
    assert len(lines) == 2
    for line in lines:
        assert re.findall(r'(\w+) \d\.\d+ at', line) == [winner]*3
        assert ('conductance' in re.sub(r'\(next: .*?\)', '', line)) == wins
    for line in [l for l in findings(rows) if 'conductance − ' in l]:
        assert (float(re.search(r': ([+-]\d\.\d+)', line)[1]) > 0) == (wins or f'− {winner},' not in line)

def test_where_it_does_not_win_is_named():
    rows = won_by('conductance')
    rows.loc[(rows.criterion == 'random') & (rows.schedule == 'iterative') & (rows.ratio == .7), 'accuracy'] = .95
    assert said(rows, 'best criterion') == 'in 5 of 6 (schedule, ratio); not in iterative 0.7'

def test_a_tie_is_no_win():
    assert said(made(), 'best criterion').startswith('in 0 of 6') and said(made(), 'smallest spread').startswith('in 0 of 6')

@pytest.mark.parametrize('steady,count', [('conductance', 6), ('lrp', 0)])
def test_the_spread_is_compared(steady, count):
    assert said(made(lambda s, c, r, k: .5 + k*(.001 if c == steady else .02)), 'smallest spread').startswith(f'in {count} of 6')
    assert said(noisy(seeds=[0]), 'smallest spread').startswith('cannot be said')

@pytest.mark.parametrize('gain', [.1, -.1])
def test_the_schedules_are_compared(gain):
    assert said(made(lambda s, c, r, k: .5 + gain*(s == 'iterative')), 'iterative beats') == 'at 0.9: ' + ', '.join(f'{c} {gain:+.3f}' for c in CRITERIA)
    assert 'iterative beats one-shot at high ratios' not in set(claims(noisy(schedules=['oneshot'])).claim)

def test_chance_and_distance_are_numbers_of_these_rows():
    rows = made(lambda s, c, r, k: .3 if c == 'random' else .4 if c == 'magnitude' else .6)
    assert said(rows, 'fall to chance') == 'at 0.9: magnitude 0.400, random 0.300'
    assert said(rows, 'about the same') == 'oneshot: 0.300 apart at 0.5, 0.300 apart at 0.9; iterative: 0.300 apart at 0.5, 0.300 apart at 0.9'

@pytest.mark.parametrize('rows', [noisy(criteria=['random']), noisy(criteria=['lrp', 'random'], seeds=[0]), noisy(ratios=[.55]), noisy(schedules=['iterative'], ratios=[.9])])
def test_small_studies_have_findings_too(rows):
    lines = findings(rows)
    assert all(isinstance(l, str) and 'nan' not in l for l in lines) and lines[0].startswith(f'{len(rows)} run')
    for f in (chart, frontier, stages): assert f(rows, rows.schedule[0]).to_dict(validate=False)['datasets']

def test_one_seed_is_said_to_be_one():
    lines = findings(noisy(seeds=[0]))
    assert any(l.startswith('one seed: no interval') and '1,000 test images' in l and '±0.031' in l for l in lines) and not any('95 %' in l for l in lines)
    assert any('95 %' in l for l in findings(noisy()))

# --- tests and what is missing ---

@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_its_steps_reject(p):
    "The procedure as its author has it: from the smallest on, while p <= level/(m - i); the adjusted value is the level at which one still falls"
    for level in (.01, .05, .3):
        rejected, order = set(), np.argsort(p, kind='stable')
        for i, k in enumerate(order):
            if p[k] > level/(len(p)-i): break
            rejected.add(k)
        adjusted = holm(p)
        assert all(adjusted[k] <= level + 1e-12 for k in rejected) and all(adjusted[k] > level - 1e-12 for k in set(range(len(p))) - rejected)

def test_entries_are_tested_by_welch():
    rows = noisy(ratios=(.5, .9))
    for line in entries(rows).itertuples():
        ours = rows[(rows.schedule == line.schedule) & (rows.criterion == line.criterion) & (rows.ratio == line.ratio)].accuracy
        theirs = line.thesis + line.thesis_sd*np.array([-1, 0, 1])  # three numbers of that mean and spread
        assert line.p == pytest.approx(stats.ttest_ind(ours, theirs, equal_var=False).pvalue)
    assert np.allclose(entries(rows).p_holm, holm(entries(rows).p)) and entries(noisy(seeds=[0])).p.isna().all()

def test_what_is_missing_is_named():
    rows = noisy(ratios=(.5, .9), seeds=(0, 1))
    gone = missing_entries(rows)
    assert len(gone) == 40 and (gone.n == gone.ratio.isin([.5, .9])*2).all() and len(missing_entries(rows, 2)) == 24
    failed = rows.assign(status=np.where(rows.criterion == 'lrp', 'failed', 'done'))
    assert set(missing_entries(failed, 1).query('ratio == .5').criterion) == {'lrp'}
    assert missing_entries(noisy(ratios=(.5, .6, .7, .8, .9))).empty

# --- the chart ---

def test_the_chart_holds_both():
    rows = noisy()
    p, v = points(with_n(rows)), entries(rows)
    for of in 'ours', 'thesis':
        g = p[p.of == of].drop_duplicates(list(BY)).set_index(list(BY))['mean']
        assert len(g) == 24
        for line in v.itertuples(): assert g[line.schedule, line.criterion, line.ratio] == getattr(line, of)

def with_n(rows):
    "`entries_chart`, with what a panel lacks for `points`"
    spec = entries_chart(rows).to_dict(validate=False)
    for d in spec['datasets'].values():
        for r in d: r.setdefault('n', 3)
    return type('Spec', (), dict(to_dict=lambda self, **_: spec))()
