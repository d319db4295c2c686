"""Images for a look inside a model: CIFAR's test images, prepared as for training, or a folder of pictures."""

from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from ..datasets import DATASETS, DataError, mean_image, read_images
from ..models.pretrained import mean_by_tag

__all__ = ['cifar', 'folder', 'pixels']

MODES = {1: 'L', 3: 'RGB'}
SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.webp', '.ppm', '.tif', '.tiff')


def cifar(data_dir: str, model: Any, count: int) -> tuple[Tensor, Tensor]:
    """The first test images of CIFAR-10 or CIFAR-100, less what the network's tag says it was trained without.

    Args:
        data_dir: where torchvision keeps the data set.
        model: a network of timm's with 10 or 100 classes; without a tag of ours the paper's mean image is taken off.
        count: how many.

    Returns:
        images (N, 3, 32, 32) float32 and labels (N,) int64.

    Raises:
        ValueError: the data set is not there, or the model has another number of classes.
    """
    name = f'cifar{model.num_classes}'
    if name not in DATASETS:
        raise ValueError(f'the model has {model.num_classes} classes, and CIFAR 10 or 100: '
                         f'give --images in place of --data-dir')
    by_colour = mean_by_tag((model.pretrained_cfg or {}).get('tag')) == 'colour'
    try:
        mean = (torch.tensor(DATASETS[name].mean) if by_colour else
                mean_image(read_images(name, data_dir, train=True)[0]))
        test, labels = read_images(name, data_dir, train=False)
    except DataError as error:
        raise ValueError(f'{data_dir} does not hold {DATASETS[name].title} as torchvision keeps it') from error
    images = test[:count].float().div(255) - mean  # (N, 32, 32, 3)
    return images.permute(0, 3, 1, 2).contiguous(), labels[:count]


def _taken(model: nn.Module) -> tuple[int, dict[str, Any]]:
    """The channels of the images that a network takes, and timm's configuration of what is done to them."""
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    config = resolve_model_data_config(model)
    if channels == 1:
        config |= {name: (sum(config[name]) / len(config[name]),) for name in ('mean', 'std')}
    return channels, config


def folder(path: str, model: nn.Module, count: int) -> tuple[Tensor, Tensor | None]:
    """The first pictures of a folder and its subfolders, by name, through the model's own evaluation transform.

    Returns:
        images (N, 3, H, W) float32, or (N, 1, H, W) for a network that takes grey ones, and no labels.

    Raises:
        ValueError: there is no picture, or one that cannot be read, or the network takes other channels.
    """
    from PIL import Image

    channels, config = _taken(model)
    if channels not in MODES:
        raise ValueError(f'the network takes images of {channels} channels, and pictures have 1 (grey) or 3 (RGB): in '
                         f'Python timm_nonlocal.analysis.recorder.watch(model, images) takes any')
    paths = sorted(found for found in Path(path).rglob('*') if found.suffix.lower() in SUFFIXES and found.is_file())
    if not paths:
        raise ValueError(f'{path} holds no picture ({", ".join(SUFFIXES)})')
    transform = create_transform(**config)
    images = []
    for found in paths[:count]:
        try:
            with Image.open(found) as image:
                images.append(transform(image.convert(MODES[channels])))
        except Exception as error:  # of all kinds, by the format and what is broken
            raise ValueError(f'{found} cannot be read as a picture: {error}') from error
    return torch.stack(images), None


def pixels(images: Tensor, model: Any, data_dir: str | None) -> Tensor:
    """Images of `cifar` (from that folder) or `folder` as they look, (N, H, W, 3) uint8."""
    if data_dir:
        return read_images(f'cifar{model.num_classes}', data_dir, train=False)[0][:len(images)]
    _, config = _taken(model)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    seen = (images * std + mean).clamp(0, 1).mul(255).round().byte()
    return seen.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
