"""Trains one more baseline of the study and keeps it beside the study: python tests/baseline.py 1

The recipe is that of the embedded one, the seed another: seed 1 becomes mobilenet_v2-cifar10-seed1. About 1.2 core-hours on one thread; killed, it goes on where it stopped."""
import sys
from pathlib import Path

import torch

from xprune_nb.data import load
from xprune_nb.model import baseline, build, read_weights, save_baseline, save_weights
from xprune_nb.training import Recipe, evaluate, fit

def main(seed:int, folder=Path('runs/baselines')):
    torch.set_num_threads(1)
    old, data = baseline(), load('cifar10')
    net, kept = build(old.model, old.classes, old.stem, seed), folder/f'seed{seed}-epoch5.safetensors'
    folder.mkdir(parents=True, exist_ok=True)
    def each_epoch(epoch, net):
        print(f'epoch {epoch}', flush=True)
        if epoch == 5: save_weights(net, kept)
    history = fit(net, data, Recipe(**old.recipe), seed, checkpoint=folder/f'seed{seed}.checkpoint', each_epoch=each_epoch)
    weights = {5: read_weights(kept), 50: net.state_dict()}
    made = save_baseline(f'{old.name}-seed{seed}', weights, history.frame, old.recipe, lambda n: evaluate(n, data.test, data)[0], seed=seed)
    print(made)

if __name__ == '__main__': main(int(sys.argv[1]))
