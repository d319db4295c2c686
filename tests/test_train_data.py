"""The epoch plan and the batches against a loop that pads, crops and flips image by image."""

import numpy as np
import pytest
import torch

from conftest import run
from train.data import PAD, Images, batch, epoch_plan, frame, load, whole_plan


def small(count=40, height=32, width=32):
    pixels = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    mean = pixels.double().mean(0).div(255).float()
    return pixels, mean, Images(frame(pixels), torch.randint(0, 10, (count,)), frame(mean), 10)


@pytest.mark.parametrize('size', [(32, 32), (6, 9)])
def test_batch_equals_a_reference_loop_bit_for_bit(size):
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


def test_whole_plan_is_the_plain_image():
    pixels, mean, images = small()
    x, y = batch(images, whole_plan(40))
    assert torch.equal(x.permute(0, 2, 3, 1), pixels.float() / 255 - mean)
    assert torch.equal(y, images.labels)


def test_the_plan_is_a_function_of_seed_and_epoch():
    plan = epoch_plan(1000, 1, 2)
    assert plan.dtype == torch.int32 and torch.equal(plan, epoch_plan(1000, 1, 2))
    assert torch.equal(plan[0].sort().values, torch.arange(1000, dtype=torch.int32))
    for other in (epoch_plan(1000, 1, 3), epoch_plan(1000, 2, 2)):
        assert not torch.equal(plan, other)
    for row, values in ((1, 9), (2, 9), (3, 2)):  # every offset and both sides, about equally often
        counts = plan[row].bincount(minlength=values)
        assert len(counts) == values and counts.min() > 0.6 * 1000 / values


DUMP = '''
import sys, torch
from train.data import load
train, test = load('cifar10', sys.argv[1], limit=int(sys.argv[2]))
print(len(train), len(test), train.num_classes, tuple(train.pixels.shape), tuple(test.pixels.shape))
inner = train.mean[4:-4, 4:-4]
print(torch.equal(inner, (train.pixels[:, 4:-4, 4:-4].double().mean(0) / 255).float()), bool(train.mean[:4].any()))
'''


def test_load(small_cifar):
    result = run('-c', DUMP, str(small_cifar), '0', data=small_cifar)
    assert result.stdout.splitlines() == ['120 20 10 (120, 40, 40, 3) (20, 40, 40, 3)', 'True False'], result.stderr
    result = run('-c', DUMP, str(small_cifar), '7', data=small_cifar)
    assert result.stdout.startswith('7 7 10'), result.stderr


@pytest.mark.cifar
def test_published_channel_means(cifar_dir):
    published = {'cifar10': (.49139968, .48215841, .44653091), 'cifar100': (.50707516, .48654887, .44091784)}
    for name, means in published.items():
        train, test = load(name, cifar_dir)
        assert (len(train), len(test), train.num_classes) == (50_000, 10_000, int(name[5:]))
        assert train.mean[4:-4, 4:-4].mean(dim=(0, 1)).tolist() == pytest.approx(means, abs=1e-6)
