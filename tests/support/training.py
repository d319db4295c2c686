"""What the tests of training share: a small run, the images for it without files, and how results are compared."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from train.cifar import main
from train.engine.data import Images, frame

MODEL = 'preresnet20_nl_proposed_k1'
COMMON = ['--model', MODEL, '--batch-size', '32', '--milestones', '1', '--epochs', '2', '--threads', '1',
          '--model-kwargs', "nl_args={'affinity': 'uniform'}"]


def train(data: Path, folder: Path, *more: str) -> int:
    """Two epochs of four steps, the last of 24 images, in this process; gives the exit code."""
    return main([*COMMON, '--data-dir', str(data), '--output-dir', str(folder), *more])


def random_images(count: int = 40, size: int = 8, device: str = 'cpu') -> Images:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return Images(frame(pixels), labels, frame(pixels.double().mean(0).div(255).float()), 10).to(device)


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_weights(a: Path, b: Path) -> bool:
    return same_tensors(load_file(a / 'model.safetensors'), load_file(b / 'model.safetensors'))


def result(folder: Path) -> dict[str, Any]:
    record, = (json.loads(line) for line in (folder / 'results.jsonl').read_text().splitlines())
    return record


def same_course(a: Path, b: Path) -> bool:
    """The same curves and weights, to the last bit."""
    keys = ('test_error', 'train_error', 'train_loss', 'final_wrong', 'sha256')
    return same_weights(a, b) and all(result(a)[key] == result(b)[key] for key in keys)
