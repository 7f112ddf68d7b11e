"""Networks and images that tests of several rooms look at."""
import torch
from torch import nn
from torchvision import models
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import Conv2dNormActivation

from xprune_nb.data import load, sample
from xprune_nb.model import baseline

NEAR = {torch.float32: 1e-5, torch.float64: 1e-10}  # how close ours is to others', relative to the layer's largest value

def restless(net):
    "Batch norms far from the identity, so that forgetting one shows"
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, lo, hi in (m.running_mean, -.3, .3), (m.running_var, .3, 1.5), (m.weight, .7, 1.5), (m.bias, -.3, .3):
                if t is not None: nn.init.uniform_(t, lo, hi)
    return net.eval()

def sequential():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(inplace=True),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)).eval()

def small():
    "A MobileNetV2 with one block"
    cna = lambda i, o, k, s=1: Conv2dNormActivation(i, o, k, s, activation_layer=nn.ReLU6)
    return restless(nn.Sequential(cna(3, 6, 3, 2), InvertedResidual(6, 6, 1, 2), cna(6, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)))

def head(c=4): return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 4)]

class Twice(nn.Module):
    "A convolution that runs twice, and an activation that is shared and works in place"
    def __init__(self, stride=1):
        super().__init__()
        self.conv, self.act, self.out = nn.Conv2d(3, 3, 3, stride, 1), nn.ReLU(inplace=True), nn.Sequential(*head(3))
    def forward(self, x): return self.out(self.act(self.conv(self.act(self.conv(x)))))

class Untraceable(nn.Module):
    "It looks at a number while it runs, which a graph can't"
    def __init__(self, norm=False):
        super().__init__()
        self.conv, self.norm, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Conv2d(4, 4, 3)
        self.act, self.out = nn.ReLU(inplace=True), nn.Sequential(*head())
    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        return self.out(self.second(x) if x.mean() > -9 else x)

def torchvisions(classes=4):
    "The package's other families, small where torchvision's parts allow it"
    vgg = lambda bn: nn.Sequential(models.vgg.make_layers(models.vgg.cfgs['A'], bn), nn.Flatten(), nn.Linear(512, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, classes))
    return dict(vgg=lambda: restless(vgg(False)), vgg_bn=lambda: restless(vgg(True)), resnet18=lambda: restless(models.resnet18(num_classes=classes)),
                resnet50=lambda: restless(models.resnet50(num_classes=classes)), mobilenet_v2=lambda: restless(models.mobilenet_v2(num_classes=classes)))

def images(n=3, size=16, classes=4, dtype=torch.float64): return torch.randn(n, 3, size, size, dtype=dtype), torch.arange(n) % classes

def mobile(n, dtype=torch.float64):
    "The embedded baseline, with images of its own kind: a network whose signals do not die out"
    x, y = sample(load(), n)
    return baseline().net().to(dtype), x.to(dtype), y

def out_of_place(net):
    "For captum, whose hooks keep what an activation in place then overwrites"
    for m in net.modules():
        if hasattr(m, 'inplace'): m.inplace = False
    return net

def whole(maps):
    "Chunks of maps put together: conv name -> (N,O,H,W)"
    chunks = list(maps)
    return {n: torch.cat([c[n] for c in chunks]) for n in chunks[0]}

def close(ours, theirs, near):
    "Within `near` of the largest value of the layer"
    assert ours and set(ours) <= set(theirs)
    for n, a in ours.items(): assert (a - theirs[n]).abs().max() <= near*theirs[n].abs().max(), n
