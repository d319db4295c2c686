"""The epoch plan and the batches against a loop that pads, crops and flips image by image."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from tests.support.cifar_files import make_cifar10
from tests.support.small_data import accepted
from timm_nonlocal.datasets import DataError
from train.engine.data import PAD, Images, batch, epoch_plan, frame, load, whole_plan


def small(count: int = 40, height: int = 32, width: int = 32) -> tuple[torch.Tensor, torch.Tensor, Images]:
    pixels = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    mean = pixels.double().mean(0).div(255).float()
    return pixels, mean, Images(frame(pixels), torch.randint(0, 10, (count,)), frame(mean), 10)


@pytest.mark.parametrize('size', [(32, 32), (6, 9)])
def test_batch_equals_a_reference_loop_bit_for_bit(size: tuple[int, int]) -> None:
    pixels, mean, images = small(40, *size)
    plan = epoch_plan(40, seed=3, epoch=5)
    x, y = batch(images, plan)
    assert x.is_contiguous(memory_format=torch.channels_last)
    for n, (index, top, left, flip) in enumerate(plan.T.tolist()):
        image = np.pad(pixels[index].numpy().astype(np.float32) / np.float32(255) - mean.numpy(),
                       ((PAD, PAD), (PAD, PAD), (0, 0)))  # the padding is of the preprocessed image
        image = image[top:top + size[0], left:left + size[1]]
        image = image[:, ::-1] if flip else image
        assert np.array_equal(x[n].permute(1, 2, 0).numpy(), image)
        assert y[n] == images.labels[index]


def test_whole_plan_is_the_plain_image() -> None:
    pixels, mean, images = small()
    x, y = batch(images, whole_plan(40))
    assert torch.equal(x.permute(0, 2, 3, 1), pixels.float() / 255 - mean)
    assert torch.equal(y, images.labels)


def test_the_plan_is_a_function_of_seed_and_epoch() -> None:
    plan = epoch_plan(1000, 1, 2)
    assert plan.dtype == torch.int32 and torch.equal(plan, epoch_plan(1000, 1, 2))
    assert torch.equal(plan[0].sort().values, torch.arange(1000, dtype=torch.int32))
    for other in (epoch_plan(1000, 1, 3), epoch_plan(1000, 2, 2)):
        assert not torch.equal(plan, other)
    for row, values in ((1, 9), (2, 9), (3, 2)):  # every offset and both sides, about equally often
        counts = plan[row].bincount(minlength=values)
        assert len(counts) == values and counts.min() > 0.6 * 1000 / values


def test_load(small_cifar_here: Path) -> None:
    train, test = load('cifar10', small_cifar_here)
    assert (len(train), len(test), train.num_classes) == (120, 20, 10)
    assert train.pixels.shape == (120, 40, 40, 3) and test.pixels.shape == (20, 40, 40, 3)
    assert torch.equal(train.mean[4:-4, 4:-4], (train.pixels[:, 4:-4, 4:-4].double().mean(0) / 255).float())
    assert not train.mean[:4].any() and torch.equal(train.mean, test.mean)
    train, test = load('cifar10', small_cifar_here, limit=7)
    assert (len(train), len(test)) == (7, 7)


def test_labels_for_other_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are what their sums say, but do not fit each other."""
    make_cifar10(tmp_path)
    batch = tmp_path / 'cifar-10-batches-py' / 'data_batch_2'
    fields = pickle.loads(batch.read_bytes())
    batch.write_bytes(pickle.dumps({**fields, 'labels': fields['labels'][:-1]}))
    sums = json.loads((tmp_path / 'md5.json').read_text())
    sums['data_batch_2'] = hashlib.md5(batch.read_bytes()).hexdigest()
    (tmp_path / 'md5.json').write_text(json.dumps(sums))
    for name, value in accepted(CIFAR10, tmp_path / 'md5.json').items():
        monkeypatch.setattr(CIFAR10, name, value)
    with pytest.raises(DataError, match='has 119 labels for images of shape .120, 32, 32, 3.: unpack cifar-10-python'):
        load('cifar10', tmp_path)


@pytest.mark.cifar
def test_published_channel_means(cifar_dir: str) -> None:
    published = {'cifar10': (.49139968, .48215841, .44653091), 'cifar100': (.50707516, .48654887, .44091784)}
    for name, means in published.items():
        train, test = load(name, cifar_dir)
        assert (len(train), len(test), train.num_classes) == (50_000, 10_000, int(name[5:]))
        assert train.mean[4:-4, 4:-4].mean(dim=(0, 1)).tolist() == pytest.approx(means, abs=1e-6)
