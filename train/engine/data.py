"""CIFAR on the device as bytes, and which of them each batch holds.

Nothing here is random by itself: the plan of an epoch is a pure function of (seed, epoch), and a batch is a pure
function of the plan's columns. A run can therefore be cut anywhere and continued to the same bits.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_nonlocal.datasets import DATASETS, mean_image, read_images

__all__ = ['PAD', 'Images', 'batch', 'epoch_plan', 'frame', 'load', 'mean_colour', 'whole_plan']

PAD = 4


@dataclass(frozen=True)
class Images:
    """One split of a data set.

    Attributes:
        pixels: uint8 (N, H + 8, W + 8, 3), each image in a frame of four zeros.
        labels: int64 (N,).
        mean: float32 (H + 8, W + 8, 3), the training images' mean in [0, 1] with a frame of zeros: what is
            subtracted, so that the frame stays zero (the padding is of the preprocessed image).
        num_classes: the number of classes.
    """

    pixels: Tensor
    labels: Tensor
    mean: Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> 'Images':
        return Images(self.pixels.to(device), self.labels.to(device), self.mean.to(device), self.num_classes)


def frame(images: Tensor) -> Tensor:
    """(…, H, W, 3) to (…, H + 8, W + 8, 3), zeros around."""
    return F.pad(images, (0, 0, PAD, PAD, PAD, PAD))


def mean_colour(images: Images, colour: tuple[float, ...]) -> Images:
    """The same images with one mean a channel in place of the mean image, as timm has it; the frame stays zero."""
    inside = frame(torch.ones(*images.pixels.shape[1:], device=images.mean.device)[2 * PAD:, 2 * PAD:])
    return replace(images, mean=inside * torch.tensor(colour, device=images.mean.device))


def load(name: str, data_dir: str | Path, download: bool = False, limit: int = 0,
         mean: str = 'image', test_limit: int | None = None) -> tuple[Images, Images]:
    """The training and the test split of 'cifar10' or 'cifar100' from the files torchvision keeps in data_dir.

    Args:
        download: fetch what is missing through torchvision.
        limit: keep the first `limit` training and test images only (0 keeps all); the mean is that of the kept ones.
        mean: what is subtracted, see `Recipe.mean`.
        test_limit: of the test images where it is another one.

    Raises:
        DataError: the folder is missing, incomplete or damaged, or its labels are not of its images.
    """
    (pixels, labels), (test_pixels, test_labels) = (
        [tensor[:kept or None] for tensor in read_images(name, data_dir, split, download)]
        for split, kept in ((True, limit), (False, limit if test_limit is None else test_limit)))
    image, classes = frame(mean_image(pixels)), DATASETS[name].num_classes
    train = Images(frame(pixels), labels, image, classes)
    test = Images(frame(test_pixels), test_labels, image, classes)
    if mean == 'colour':
        train, test = (mean_colour(images, DATASETS[name].mean) for images in (train, test))
    return train, test


def epoch_plan(count: int, seed: int, epoch: int) -> Tensor:
    """int32 (4, count): for each image of an epoch its index, the crop's row and column in 0…8, and flip (0 or 1)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    draw: dict[str, Any] = {'generator': generator, 'dtype': torch.int32}
    return torch.stack([
        torch.randperm(count, **draw),
        torch.randint(0, 2 * PAD + 1, (count,), **draw),
        torch.randint(0, 2 * PAD + 1, (count,), **draw),
        torch.randint(0, 2, (count,), **draw),
    ])


def whole_plan(count: int) -> Tensor:
    """int32 (4, count): every image in order, uncropped and unflipped."""
    plan = torch.full((4, count), PAD, dtype=torch.int32)
    plan[0], plan[3] = torch.arange(count), 0
    return plan


def batch(images: Images, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The images and labels that columns of a plan ask for.

    Args:
        columns: int32 (4, b) on the images' device.

    Returns:
        float32 (b, 3, H, W) in channels-last memory, pixel / 255 - mean, and int64 (b,).
    """
    index, top, left, flip = columns.long()
    height, width = images.pixels.shape[1] - 2 * PAD, images.pixels.shape[2] - 2 * PAD
    across = torch.arange(width, device=columns.device)
    rows = (top[:, None] + torch.arange(height, device=columns.device))[:, :, None]  # (b, H, 1)
    cols = (left[:, None] + torch.where(flip[:, None] > 0, width - 1 - across, across))[:, None, :]  # (b, 1, W)
    x = images.pixels[index[:, None, None], rows, cols].float() / 255 - images.mean[rows, cols]  # (b, H, W, 3)
    return x.permute(0, 3, 1, 2), images.labels[index]
