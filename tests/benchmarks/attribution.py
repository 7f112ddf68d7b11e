"""How fast is the engine? Ratios in one process, on the embedded MobileNetV2: 52 convolutions, 64 images. Run it on a quiet machine.

    python tests/benchmarks/attribution.py            # all of it, about ten minutes: captum takes most of them
    python tests/benchmarks/attribution.py --quick    # every fourth layer for captum, scaled up: a glance
"""
import argparse, statistics, subprocess, sys, time, warnings

import torch
from captum.attr import LayerConductance
from torch import nn

from xprune_nb import attribution, relevance
from xprune_nb.attribution import conductance_maps, folded, logit
from xprune_nb.criteria import score, spearman
from xprune_nb.data import load, sample
from xprune_nb.model import baseline, convs

warnings.filterwarnings('ignore')
IMAGES, STEPS = 64, 50

def seconds(f, times=3):
    "Median of some calls, after one to warm up"
    f()
    took = []
    for _ in range(times):
        began = time.perf_counter()
        f()
        took.append(time.perf_counter() - began)
    return statistics.median(took)

def captum(net, x, y, names, steps=STEPS):
    "Conductance as a user of captum would get it: a call a layer, its defaults, everything in one batch"
    return {n: LayerConductance(net, convs(net)[n]).attribute(x, target=y, n_steps=steps).detach() for n in names}

def for_captum(net, channels_last):
    "Activations not in place, since captum's hooks would see what they overwrite"
    for m in net.modules():
        if isinstance(m, nn.ReLU6): m.inplace = False
    return net.to(memory_format=torch.channels_last) if channels_last else net

def once(f):
    began = time.perf_counter()
    value = f()
    return time.perf_counter() - began, value

def against_captum(net, x, y, every):
    "Conductance: as fast as what, at equal values?"
    names = list(convs(net))[::every]
    ours = lambda **kw: list(conductance_maps(net, x, y, **kw))
    ways = dict(same=dict(steps=STEPS, rule='captum'), ten=dict(steps=10), norms=dict(steps=STEPS, rule='captum', fold=False))
    took_ours = {way: [] for way in ways}
    def ours_once_more(): # before, between and after captum's, so that what else the machine does hits all
        for way, kw in ways.items(): took_ours[way].append(seconds(lambda: ours(**kw), 1))
    ours_once_more()
    values, unfolded = ({n: torch.cat([m[n] for m in maps]) for n in names} for maps in
                        (ours(steps=STEPS, rule='captum'), ours(steps=STEPS, rule='captum', fold=False)))
    print(f'{"conductance, all 52 layers":46s} {"seconds":>9s} {"ours is faster, by rows":>20s}  largest difference / largest value, worst layer (median): folded, not folded')
    rows = []
    for what, images, last in (('captum, as it is called', x, False), ('captum, network and images channels_last', x.contiguous(memory_format=torch.channels_last), True)):
        took, theirs = once(lambda: captum(for_captum(baseline().net(), last), images, y, names))
        took *= len(convs(net))/len(names)
        off = [[((v[n] - t).abs().max()/t.abs().max()).item() for n, t in theirs.items()] for v in (values, unfolded)]
        rows.append((what, took, ', '.join(f'{max(o):.1e} ({statistics.median(o):.1e})' for o in off)))
        ours_once_more()
    same, ten, norms = (statistics.median(took_ours[way]) for way in ways)
    for what, took in {'ours, rule captum, 50 steps': same, 'ours, rule captum, 50 steps, fold=False': norms, 'ours, trapezoid, 10 steps': ten}.items(): print(f'{what:46s} {took:9.2f}')
    for what, took, off in rows: print(f'{what:46s} {took:9.2f} {took/same:7.1f}x {took/norms:6.1f}x {took/ten:5.0f}x  {off}')

def in_passes(net, x, y):
    "Every method in passes, forward and back, without anything being looked at: through the network as it is, and folded"
    images = x.contiguous(memory_format=torch.channels_last)
    def one_pass(plain):
        with torch.enable_grad():
            start = images.detach().requires_grad_()
            torch.autograd.grad(logit(plain(start), y).sum(), start)
    plain, fused = baseline().net().to(memory_format=torch.channels_last).requires_grad_(False), folded(net, x)
    calls = {'gradient x activation': lambda: list(attribution.gradient_activation_maps(net, x, y)),
             **{f'LRP, {c}': (lambda c=c: list(relevance.lrp_maps(net, x, y, composite=c))) for c in relevance.COMPOSITES},
             'DeepLIFT': lambda: list(relevance.deeplift_maps(net, x, y)),
             'DeepLIFT-SHAP, 8 background images': lambda: list(relevance.deeplift_shap_maps(net, x, y, background=x[:8])),
             'GradientSHAP, 8 samples': lambda: list(attribution.gradient_shap_maps(net, x, y, samples=8)),
             'conductance, trapezoid, 10 steps (11 points)': lambda: list(conductance_maps(net, x, y, steps=10)),
             'internal influence, trapezoid, 10 steps': lambda: list(attribution.internal_influence_maps(net, x, y, steps=10)),
             'integrated gradients at each layer, gauss, 5 steps': lambda: list(attribution.integrated_gradients_maps(net, x, y, steps=5))}
    print(f'\n{"64 images, whole calls":52s} {"seconds":>9s} {"passes":>8s} {"folded":>8s}')
    for what, f in calls.items():
        f()
        a, b, it = zip(*[(once(lambda: one_pass(plain))[0], once(lambda: one_pass(fused))[0], once(f)[0]) for _ in range(7)])  # side by side, so that a busy machine slows all
        print(f'{what:52s} {statistics.median(it):9.3f} ' + ' '.join(f'{statistics.median(i/p for p, i in zip(passes, it)):8.1f}' for passes in (a, b)))

def quality(net, x, y):
    "How well few steps rank the filters, against 200"
    reference = score('conductance', net, x, y, steps=200)
    print(f'\n{"ranking against 200 trapezoid steps (Spearman)":52s} {"mean":>9s} {"worst":>8s}')
    for rule, steps in (('captum', 50), ('left', 50), ('trapezoid', 10), ('trapezoid', 20), ('gauss', 10), ('middle', 10)):
        rho = spearman(score('conductance', net, x, y, rule=rule, steps=steps), reference)
        print(f'{rule + ", " + str(steps) + " steps":52s} {rho.mean():9.4f} {rho.min():8.4f}')

def memory():
    "Peak memory of a fresh process, by images and chunk"
    code = ('import resource, sys, torch; torch.set_num_threads(1)\n'
            'from xprune_nb.criteria import score; from xprune_nb.data import load, sample; from xprune_nb.model import baseline\n'
            'net, data = baseline().net(), load(); x, y = sample(data, 2048)\n'
            'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
            'n, chunk = map(int, sys.argv[1:]); score("conductance", net, x[:n], y[:n], chunk=chunk)\n'
            'print(before/1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)')
    print(f'\n{"peak memory of conductance, MB above the start":52s}', *(f'chunk {c:>5d}' for c in (64, 256, 1024)))
    for n in (64, 256, 1024):
        used = [[float(v) for v in subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(n), str(c)], capture_output=True, text=True, check=True).stdout.split()]
                for c in (64, 256, 1024)]
        print(f'{f"{n} images":52s}', *(f'{b - a:11.0f}' for a, b in used))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--only', choices=['captum', 'passes', 'quality', 'memory'])
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')
    net, (x, y) = baseline().net(), sample(load(), IMAGES)
    parts = dict(captum=lambda: against_captum(net, x, y, 4 if args.quick else 1), passes=lambda: in_passes(net, x, y),
                 quality=lambda: quality(net, x, y), memory=memory)
    for name, part in parts.items():
        if args.only in (None, name): part()

if __name__ == '__main__': main()
