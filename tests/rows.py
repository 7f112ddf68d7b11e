"""Rows made up so that the answer is known, and what a chart draws."""
import re
from dataclasses import asdict
from itertools import product

import numpy as np
import pandas as pd

from xprune_nb.experiments import Run
from xprune_nb.results import BY

DEFAULTS = asdict(Run())
CRITERIA, SCHEDULES = ('conductance', 'lrp', 'magnitude', 'random'), ('oneshot', 'iterative')
SMALL = dict(criteria=('conductance', 'random'), ratios=(.5, .9)) # where what is drawn doesn't matter
says = lambda *parts: '.*'.join(map(re.escape, parts))

def made(accuracy=lambda s, c, r, k: .5, schedules=SCHEDULES, criteria=CRITERIA, ratios=(.5, .7, .9), seeds=(0, 1, 2), **also):
    "Rows as a store gives them; `accuracy` says what each run reached"
    return pd.DataFrame([DEFAULTS | dict(
        schedule=s, criterion=c, ratio=r, seed=k, run_id=f'{s}-{c}-{r}-{k}', status='done', error=None, accuracy_dense=.74, accuracy_pruned=.1, accuracy_recalibrated=.2,
        accuracy=accuracy(s, c, r, k), params=2e6*(1-r), macs=6e6*(1-r), alive=1-r, seconds=60.) | also
        for s, c, r, k in product(schedules, criteria, ratios, seeds)])

def noisy(seed=0, **kw):
    "Accuracies without any order"
    rng = np.random.default_rng(seed)
    return made(lambda *_: rng.uniform(.1, .8), **kw)

def won_by(winner, **kw): return made(lambda s, c, r, k: .9 - r/2 + .002*k + (.1 if c == winner else 0) - .01*CRITERIA.index(c), **kw)

def spec(chart):
    "What a chart draws; Altair numbers its views anew each time"
    return re.sub(r'view_\d+', 'view', str(chart.to_dict(validate=False)))

def data(chart):
    "Every table inside a chart"
    return [pd.DataFrame(d) for d in chart.to_dict(validate=False)['datasets'].values()]

def points(chart):
    "The plotted means, once each"
    keep = [*BY, 'mean', 'n'] # `of` tells ours from the thesis' in `entries_chart`
    frames = [d[[c for c in (*keep, 'sd', 'cost', 'of') if c in d]] for d in data(chart) if 'mean' in d]
    return pd.concat(frames).drop_duplicates().reset_index(drop=True)
