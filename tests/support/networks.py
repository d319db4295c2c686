"""What the tests of the models share: networks with sensible statistics, and a copy of the package with weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import timm_nonlocal  # noqa: F401 (it registers the networks)
from tests.support.process import ROOT


def calibrated(name: str, shape: tuple[int, ...] = (4, 3, 32, 32), **kwargs: Any) -> nn.Module:
    """A fresh network in eval mode with the BN statistics of random images, so that its logits are of order 1."""
    model = timm.create_model(name, **kwargs).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average over what follows
    with torch.no_grad():
        model(torch.randn(shape))
    return model.eval()


def package_with_weights(folder: Path, *names: str, index: dict | None = None) -> dict[str, dict[str, Tensor]]:
    """Copies the package into folder with random weights for these `<architecture>.<tag>` alone; gives them by name.

    A process that runs in folder imports the copy.
    """
    shutil.copytree(ROOT / 'timm_nonlocal', folder / 'timm_nonlocal',
                    ignore=shutil.ignore_patterns('__pycache__', 'weights'))
    weights = folder / 'timm_nonlocal' / 'weights'
    weights.mkdir()
    states = {}
    for name in names:
        states[name] = calibrated(name).state_dict()
        save_file(states[name], weights / f'{name}.safetensors')
    if index is not None:
        (weights / 'index.json').write_text(json.dumps(index))
    return states


def wake(model: nn.Module) -> nn.Module:
    """Gives every nonlocal module a W_Z that is not zero."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if '.nl.' in name and name.endswith('z.weight'):
                weight.normal_(std=0.05)
    return model
