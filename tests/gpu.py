"""What only a GPU can show, in under eight minutes: `tests/gpu.sh`. On a machine without one, `tests/gpu.sh --device cpu --quick` goes the same way in small."""
import argparse, json, statistics, sys, time
from pathlib import Path

import torch
from torch.nn import functional as F

from xprune_nb.criteria import CRITERIA, score
from xprune_nb.data import load, loader, sample
from xprune_nb.experiments import Run, grid, prune_steps, row, steady
from xprune_nb.model import baseline, convs
from xprune_nb.pruning import Live, cut, groups, plan
from xprune_nb.shrinking import latencies
from xprune_nb.training import Recipe, _Step, _own_stream, evaluate, fast_routes, fit, sgd

BEGIN, found = time.perf_counter(), {}

def main(device, quick, out, only):
    def part(name, says):
        "A part of the script: says when it began, is written when it ends; one that breaks does not stop the others"
        def carry(f):
            if only and name not in only: return
            print(f'\n== {name}: {says} [{time.perf_counter()-BEGIN:.0f} s]', flush=True)
            try: found[name] = dict(says=says, **f())
            except Exception as e: found[name] = dict(says=says, error=f'{type(e).__name__}: {e}')
            print(json.dumps(found[name], indent=1, default=str), flush=True)
            if out: Path(out).mkdir(parents=True, exist_ok=True); (Path(out)/'gpu.json').write_text(json.dumps(found, indent=1, default=str))
        return carry
    gpu = device.startswith('cuda')
    wait = torch.cuda.synchronize if gpu else lambda: None
    steady(torch.get_num_threads()); data, here = load('cifar10-mini'), baseline().net()
    there, moved = baseline().net().to(device), data.to(device)
    ours, theirs, gs = sample(data, 64), sample(moved, 64), groups(here)
    far = lambda a, b, least=1e-30: ((a.cpu() - b).abs().max()/b.abs().max().clamp_min(least)).item()

    @part('machine', 'machine')
    def _(): return dict(device=torch.cuda.get_device_name() if gpu else 'cpu', torch=torch.__version__, python=sys.version.split()[0])

    @part('scores', 'logits, scores, plans: the largest difference from the CPU, relative to a layer\'s largest; share of filters on whose fate both agree')
    def _():
        with torch.no_grad(): result = dict(logits=far(there(theirs[0]), here(ours[0])))
        for c in CRITERIA:
            if c in ('ablation',) or quick and c not in ('conductance', 'lrp', 'magnitude', 'random'): continue
            a, b = score(c, there, *theirs), score(c, here, *ours)
            p, q = (plan(s, .5, coupling='coupled', groups=gs) for s in (a, b))
            result[c] = dict(scores=max(far(a[n], b[n]) for n in b), agree=sum((p[n] == q[n]).sum().item() for n in q)/sum(map(len, q.values())))
        return result

    p = plan(score('magnitude', here, *ours), .5, coupling='coupled', groups=gs)

    @part('step', 'cut, and a training step of what is left: the largest difference from the CPU, relative to a tensor\'s largest or to 0.001')
    def _():
        small = cut(here, p), cut(there, p)
        with torch.no_grad(): result = dict(cut=far(small[1](theirs[0]), small[0](ours[0])))
        lives = Live(here, p), Live(there, p)
        for live, (x, y) in zip(lives, (ours, theirs)):
            opt = sgd(live.net.train(), Recipe())
            for m in live.net.modules():
                if 'Dropout' in type(m).__name__: m.p = 0.
            F.cross_entropy(live.net(x), y).backward(); opt.step(); live.hush()
        result['step'] = max(far(b, a, 1e-3) for a, b in zip(lives[0].net.state_dict().values(), lives[1].net.state_dict().values()) if a.is_floating_point())
        return result

    @part('recorded', 'training with its steps recorded and replayed, and step by step: whether weights, statistics, losses are equal to the bit')
    def _():
        def learnt(warm):
            usual, _Step.WARM = _Step.WARM, warm
            try:
                live = Live(there, p)
                history = fit(live.net, moved, Recipe(epochs=2), progress=False, after_step=live.hush)
                return [*live.net.state_dict().values()], history.frame.drop(columns='seconds')
            finally: _Step.WARM = usual
        (a, h), (b, g) = learnt(3), learnt(10**9)
        return dict(weights_equal=all(v.equal(w) for v, w in zip(a, b)), history_equal=h.equals(g), loss=h.train_loss.tolist())

    @part('speed', 'images a second in training, batches of 128: the usual loop; ours, dense and cut')
    def _():
        batches = list(loader(moved.train, moved, 128, 0))[:-1]
        def usual(net, opt):
            def step(x, y, rate):
                opt.zero_grad(); loss = F.cross_entropy(net(x), y); loss.backward(); opt.step(); loss.item()
            return step
        def speed(net, ours, n=10 if quick else 200):
            net = net.to(device).train()
            if ours: net = net.to(memory_format=torch.channels_last)
            opt = sgd(net, Recipe())
            step = _Step(net, opt, lambda: None) if ours else usual(net, opt)
            with _own_stream(torch.device(device)), fast_routes(net) if ours else torch.enable_grad():
                for i in range(5): step(*batches[i % len(batches)], .01)
                wait(); start = time.perf_counter()
                for i in range(n): step(*batches[i % len(batches)], .01)
                wait()
            return round(128*n/(time.perf_counter()-start))
        plans = {f'{c} {r}': plan(score('magnitude', here, *ours), r, coupling=c, groups=gs) for c in ('independent', 'coupled') for r in (.5, .9)}
        result = {'dense, usual loop': speed(baseline().net(), False), 'dense': speed(baseline().net(), True)}
        return result | {f'live {k}': speed(Live(here, q).net, True) for k, q in plans.items()}

    @part('latency', 'milliseconds a pass, batches of 1 and 128: before and after the cut')
    def _():
        ms = lambda n: [round(1e3*statistics.median(t), 3) for t in latencies((here, cut(here, p)), (3, 32, 32), n, device)]
        return {f'batch {n}': ms(n) for n in (1, 128)}

    @part('twice', 'the same run twice: whether rows repeat bit for bit there')
    def _():
        rows = []
        for _ in range(2):
            run, net = Run(criterion='magnitude', epochs=1, images=20), baseline().net().to(device)
            rows.append(row(run, net, moved, list(prune_steps(run, net, moved, progress=False))))
        return dict(predictions_equal=rows[0]['predicted'] == rows[1]['predicted'], accuracies=[r['accuracy'] for r in rows])

    @part('run', 'a run, and what the grid of 120 would take at this speed, one run at a time')
    def _():
        try: name, images = ('cifar10-mini', data) if quick else ('cifar10', load('cifar10'))
        except OSError as e: name, images = 'cifar10-mini', data; print('the whole CIFAR-10 is not here:', e)
        images, hours = images.to(device), {}
        sample_of = grid(data=name, criterion='conductance', schedule=['oneshot', 'iterative'], ratio=[.5] if quick else [.5, .9], rewind=5, augment=False, epochs=1, images=64)
        for run in sample_of:
            net, start = baseline().net().to(device), time.perf_counter()
            steps = list(prune_steps(run, net, images, progress=False)); r = row(run, net, images, steps); wait()
            epochs = r['epochs_spent']; an_epoch = r['seconds_retrain']/epochs; rest = time.perf_counter()-start-r['seconds_retrain']
            hours[f'{run.schedule} {run.ratio}'] = dict(seconds=round(time.perf_counter()-start, 1), accuracy=r['accuracy'], an_epoch=round(an_epoch, 2),
                                                        grid_hours=round(60*(rest + an_epoch*(15 if run.schedule == 'oneshot' else 25))/3600, 2))
        return hours

    print(f'\nall parts in {time.perf_counter()-BEGIN:.0f} s')
    return int(any('error' in v for v in found.values() if isinstance(v, dict)))

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument('--device', default='cuda'); a.add_argument('--quick', action='store_true'); a.add_argument('--out', help='folder for gpu.json'); a.add_argument('--only', help='parts, with commas')
    a = a.parse_args()
    if a.device.startswith('cuda') and not torch.cuda.is_available(): sys.exit('torch sees no GPU here: tests/gpu.sh --device cpu --quick tries the way there')
    sys.exit(main(a.device, a.quick, a.out, (a.only or '').split(',') if a.only else ()))
