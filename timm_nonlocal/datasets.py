"""CIFAR-10 and CIFAR-100: their facts, and their images from the files that torchvision keeps."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ['DATASETS', 'TEST_IMAGES', 'TRAIN_IMAGES', 'DataError', 'Dataset', 'mean_image', 'read_images']


class DataError(Exception):
    """The data set is missing or damaged; the message says where to get it."""


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set without its files.

    Attributes:
        title: as it is written.
        hub_id: of its repository on the Hugging Face Hub.
        mean: the training images' mean colour, RGB in [0, 1].
        labels: in the order of the published files.
    """

    title: str
    hub_id: str
    mean: tuple[float, float, float]
    labels: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.labels)


TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000  # of either data set
DATASETS = {
    'cifar10': Dataset('CIFAR-10', 'uoft-cs/cifar10', (0.4914, 0.4822, 0.4465), tuple(
        'airplane automobile bird cat deer dog frog horse ship truck'.split())),
    'cifar100': Dataset('CIFAR-100', 'uoft-cs/cifar100', (0.5071, 0.4865, 0.4409), tuple('''
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
        castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
        elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
        man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
        pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
        skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
        tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm'''.split())),
}


def read_images(name: str, data_dir: str | Path, train: bool, download: bool = False) -> tuple[Tensor, Tensor]:
    """The training or the test images of 'cifar10' or 'cifar100' with their labels.

    Args:
        name: a key of `DATASETS`.
        data_dir: where torchvision keeps the data set.
        train: the training images, else the test images.
        download: fetch what is missing through torchvision.

    Returns:
        uint8 (N, 32, 32, 3) and int64 (N,).

    Raises:
        DataError: the folder is missing, incomplete or damaged, or its labels are not of its images.
    """
    from torchvision import datasets

    dataset = getattr(datasets, name.upper())
    folder = Path(data_dir) / dataset.base_folder
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            split = dataset(data_dir, train=train, download=download)
    except Exception as error:  # torchvision raises whatever its unpickler, its md5 check or the network raises
        state = 'is missing' if not folder.is_dir() else 'is incomplete or damaged (md5 or format)'
        why = f' ({type(error).__name__}: {error})' if download else ''
        raise DataError(
            f'{folder} {state}{why}: add --download to fetch it through torchvision, or unpack '
            f'{dataset.filename} from https://www.cs.toronto.edu/~kriz/cifar.html into {data_dir}') from error
    if split.data.shape != (len(split.targets), 32, 32, 3):
        raise DataError(f'{folder} has {len(split.targets)} labels for images of '
                        f'shape {tuple(split.data.shape)}: unpack {dataset.filename} anew')
    return torch.from_numpy(split.data), torch.tensor(split.targets)


def mean_image(pixels: Tensor) -> Tensor:
    """The mean of uint8 images (N, H, W, 3) in [0, 1]: float32 (H, W, 3)."""
    return pixels.double().mean(dim=0).div(255).float()
