"""How long the explorer takes to answer: `python tests/benchmarks/explorer.py [threads]`. Needs a quiet machine; the network and images are the embedded ones.

Times are those of the kernel: the browser adds its own. `_start`, which begins to measure the accuracy in the background, is left out where only
the drawing is timed, and timed by itself."""
import sys, time
from statistics import median

import torch
if len(sys.argv) > 1: torch.set_num_threads(int(sys.argv[1]))
begin = time.perf_counter()
from xprune_nb.widgets import Choice, FilterExplorer, LiveChart, Workbench
loaded = time.perf_counter() - begin

def once(f): begin = time.perf_counter(); f(); return (time.perf_counter() - begin)*1e3
def say(what, times, limit=None):
    late = f'   over {limit} ms!' if limit and median(times) > limit else ''
    print(f'{what:58s} {median(times):8.0f} ms (slowest {max(times):.0f}, n = {len(times)}){late}')

FilterExplorer._start = lambda self, job: job.close()
print(f'torch {torch.__version__}, {torch.get_num_threads()} thread(s); importing the package takes {loaded:.1f} s')
say('the bundle that draws charts without a network, once', [once(LiveChart.enable_offline)])
made = []
say('first picture: load, score twice, explain, search, draw', [once(lambda: made.append(FilterExplorer()))])
e, = made
names, start = [*e.bench.layers], .2
for layer in ('features.1.conv.0.0', 'features.11.conv.0.0', 'features.18.0'):
    e.layer.value = layer
    for scope, coupling in (('local', 'independent'), ('local', 'coupled'), ('global', 'independent')):
        e.scope.value, e.coupling.value = scope, coupling
        start += .001 # no plan is asked for twice
        say(f'slider, {e.bench.layers[layer]} filters, {scope}, {coupling}', [once(lambda: setattr(e.ratio, 'value', start + .02*i)) for i in range(15)], 100)
    e.scope.value, e.coupling.value = 'local', 'independent'
say('slider, at a ratio where it has been', [once(lambda: setattr(e.ratio, 'value', .201 + .02*i)) for i in range(15)], 100)
say('parameters and MACs of another plan', [once(lambda: e.bench.cost(Choice(ratio=.205 + .02*i))) for i in range(15)])
b = Workbench()
say('accuracy of another plan', [once(lambda: b.accuracy(Choice(criterion='magnitude', ratio=.205 + .05*i))) for i in range(9)], 1000)
print(f'   recalibrated on {b.sizes()[0]} training images, measured on {b.sizes()[1]} validation images')
say('another filter', [once(lambda: setattr(e.filter, 'value', f)) for f in e.order[1:10]])
say('another layer', [once(lambda: setattr(e.layer, 'value', n)) for n in names[5:50:4]])
say('another image', [once(lambda: setattr(e.number, 'value', i)) for i in range(1, 10)])
for c in e.criterion.options:
    if c not in ('conductance', 'magnitude', 'integrated_gradients', 'deeplift_shap'): say(f'another criterion: {c}', [once(lambda: setattr(e.criterion, 'value', c))])
for c in ('conductance', 'magnitude'): say(f'a criterion seen before: {c}', [once(lambda: setattr(e.criterion, 'value', c))])
print(f'the cache holds {e.bench.cache.bytes/2**20:.1f} MB, at most {e.bench.cache.peak/2**20:.1f} of {e.bench.cache.limit/2**20:.0f} MB')
