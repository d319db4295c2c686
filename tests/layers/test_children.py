"""Children that are more than their weight: what a merged module gives with them is what the literal formula gives."""

import copy
import warnings

import pytest
import torch
import torch.nn.modules.module as torch_module
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from timm_nonlocal import NonlocalBlock, NonlocalStage
from timm_nonlocal.layers import memory

C, NAMES = 8, ('theta', 'phi', 'g', 'z')
MAKE = pytest.mark.parametrize('make', [
    lambda **options: NonlocalStage(C, 2, dtype=torch.float64, **options),
    lambda **options: NonlocalStage(C, 2, affinity='dot_product', symmetric=True, dtype=torch.float64, **options),
    lambda **options: NonlocalBlock(C, dtype=torch.float64, **options),
], ids=['stage', 'dot product', 'block'])


def image():
    return torch.randn(2, C, 4, 3, dtype=torch.float64)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def everywhere(module, change):
    """Changes every child with a weight: `change(parent, name)`."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name in NAMES:
                change(parent, name)
    return module


def replaced(wrap):
    return lambda parent, name: setattr(parent, name, wrap(getattr(parent, name)))


def other(kind, **options):
    """A layer of another kind with the same weight."""
    def change(old):
        new = kind(old.in_features, old.out_features, dtype=torch.float64, **options)
        new.weight = old.weight
        return new

    return replaced(change)


def touched(touch):
    """The layer itself, once touched."""
    return lambda parent, name: touch(getattr(parent, name))


def shift(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1  # as accelerate's hooks do


CHANGES = {
    'spectral norm': touched(nn.utils.spectral_norm),
    'weight norm': touched(nn.utils.weight_norm),
    'pruned': touched(lambda layer: prune.l1_unstructured(layer, 'weight', 0.5)),
    'parametrised spectral norm': touched(parametrizations.spectral_norm),
    'parametrised weight norm': touched(parametrizations.weight_norm),
    'wrapped': replaced(nn.Sequential),
    'with a bias': other(nn.Linear),
    'subclass': other(Doubled, bias=False),
    'forward of its own': touched(shift),
    'forward hook': touched(lambda layer: layer.register_forward_hook(lambda layer, args, y: y + 1)),
    'forward pre-hook': touched(lambda layer: layer.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))),
    'backward hook': touched(lambda layer: layer.register_full_backward_hook(lambda layer, dx, dy: (3 * dx[0],))),
}


def changed(make, change, **options):
    """The module with and without `merged`, both changed in the same way."""
    modules = []
    for merged in (True, False):
        torch.manual_seed(1)
        with warnings.catch_warnings(action='ignore'):  # of what torch calls old
            modules.append(everywhere(make(merged=merged, **options), change))
    return modules


def results(module, x, steps=2):
    """Outputs, and gradients of x and the parameters, over two backward passes."""
    found, x = [], x.clone().requires_grad_()
    for _ in range(steps):
        y = module(x)
        found += [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]
    return found


@MAKE
@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize('training', [True, False])
def test_changed_children(make, change, training):
    merged, literal = changed(make, change)
    x = image()
    for a, b in zip(results(merged.train(training), x), results(literal.train(training), x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
