"""Images for a look inside: prepared as for training, and one clear line where they are not there."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_nonlocal.datasets import DATASETS
from timm_nonlocal.inspect import pictures


@pytest.mark.parametrize(('name', 'by_colour'), [('preresnet20.cifar10', False), ('preresnet20.ft_cifar10', True)])
def test_cifar_images_are_those_of_training(small_cifar_here: Path, name: str, by_colour: bool) -> None:
    from torchvision.datasets import CIFAR10
    images, labels = pictures.cifar(str(small_cifar_here), timm.create_model(name), 7)
    train, test = (CIFAR10(small_cifar_here, train=flag) for flag in (True, False))
    mean = (torch.tensor(DATASETS['cifar10'].mean, dtype=torch.float64) if by_colour else
            torch.from_numpy(train.data).double().div(255).mean(0))
    expected = torch.from_numpy(test.data[:7]).double().div(255) - mean
    torch.testing.assert_close(images.double().permute(0, 2, 3, 1), expected, rtol=0, atol=1e-6)
    assert labels.tolist() == test.targets[:7]


def test_pictures_that_are_not_there(tmp_path: Path) -> None:
    model = timm.create_model('preresnet20')
    with pytest.raises(ValueError, match='holds no picture'):
        pictures.folder(str(tmp_path), model, 3)
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    with pytest.raises(ValueError, match='cannot be read as a picture'):
        pictures.folder(str(tmp_path), model, 3)
    with pytest.raises(ValueError, match='does not hold CIFAR-10 as torchvision keeps it'):
        pictures.cifar(str(tmp_path), model, 3)
    with pytest.raises(ValueError, match='7 classes, and CIFAR 10 or 100: give --images'):
        pictures.cifar(str(tmp_path), timm.create_model('preresnet20', num_classes=7), 3)


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    (tmp_path / 'below').mkdir()
    for number, path in enumerate(('b.png', 'below/a.jpg', 'notes.txt')):
        Image.new('RGB', (48, 40), (number * 80, 0, 255)).save(tmp_path / path, 'PNG')
    images, labels = pictures.folder(str(tmp_path), timm.create_model('preresnet20'), 5)
    assert images.shape == (2, 3, 32, 32) and labels is None


@pytest.mark.parametrize('channels', [1, 3])
def test_pixels_are_the_pictures(tmp_path: Path, channels: int) -> None:
    colour = (90, 90, 90) if channels == 1 else (200, 30, 90)
    Image.new('RGB', (48, 40), colour).save(tmp_path / 'one.png')
    model = timm.create_model('preresnet20', in_chans=channels)
    images, _ = pictures.folder(str(tmp_path), model, 1)
    pixels = pictures.pixels(images, model, None)
    assert pixels.shape == (1, 32, 32, 3) and (pixels.int() - torch.tensor(colour)).abs().max() <= 1


def test_pixels_of_cifar_are_its_own(small_cifar_here: Path) -> None:
    from torchvision.datasets import CIFAR10
    model = timm.create_model('preresnet20')
    images, _ = pictures.cifar(str(small_cifar_here), model, 7)
    pixels = pictures.pixels(images, model, str(small_cifar_here))
    assert torch.equal(pixels, torch.from_numpy(CIFAR10(small_cifar_here, train=False).data[:7]))


def test_a_picture_that_breaks_inside_is_named_and_a_folder_is_none(tmp_path: Path) -> None:
    (tmp_path / 'folder.png').mkdir()
    model = timm.create_model('preresnet20')
    Image.effect_noise((40, 40), 50).save(path := tmp_path / 'one.png')
    assert len(pictures.folder(str(tmp_path), model, 3)[0]) == 1
    data = path.read_bytes()
    path.write_bytes(data[:33] + b'\0\0\0\0J\xa5X,' + data[33:])  # a chunk that PIL raises SyntaxError about
    with pytest.raises(ValueError, match=r'one\.png cannot be read as a picture'):
        pictures.folder(str(tmp_path), model, 3)
