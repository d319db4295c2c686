"""What a run continues from: tensors and progress in one file, its content checked, the one before it kept beside it.

    NAME.safetensors            the last save
    NAME.previous.safetensors   the save before it, used where the last one cannot be read
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from timm_nonlocal import files

__all__ = ['Progress', 'RunError', 'RunProgress', 'exists', 'load', 'previous', 'save', 'seeds', 'write', 'writing']


class RunError(Exception):
    """A run's files do not hold or take what was asked of them; the message says what would work."""


class RunProgress(TypedDict):
    """What is known of one run so far: `Run.to_dict`, a row an epoch, the spectra after chosen epochs, and the step at
    which its loss was first seen not to be finite, which older states lack."""

    run: dict[str, Any]
    history: list[dict[str, Any]]
    spectra: list[dict[str, Any]]
    diverged_step: int | None


class Progress(TypedDict):
    """How far runs side by side are.

    Attributes:
        epoch: how many are done.
        images: of the next epoch that are done.
        seconds: of training, over all parts of a run that was cut.
        data: how many images there are to train on and to test on.
        commits, devices: of what trained, in order; older states lack them.
        runs: what differs between them.
    """

    epoch: int
    images: int
    seconds: float
    data: list[int]
    commits: list[str | None]
    devices: list[str]
    runs: list[RunProgress]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong while path is written, a full disk above all, into a RunError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise RunError(f'{path} cannot be written ({reason}): what was saved before is unharmed; make room and '
                       f'run the same command again') from error


def write(path: Path, fill: Callable[[Path], object], keep: bool = False) -> None:
    """`timm_nonlocal.files.write` for a run's files.

    Args:
        keep: what was at path stays as `previous(path)`.

    Raises:
        RunError: the disk is full, or the file cannot be written for another reason; path is as it was.
    """
    with writing(path):
        files.write(path, fill, previous(path) if keep else None)


def previous(path: Path) -> Path:
    return path.with_suffix(f'.previous{path.suffix}')


def exists(path: Path) -> bool:
    return path.exists() or previous(path).exists()


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(path: Path, tensors: dict[str, Tensor], progress: Progress) -> None:
    """Saves tensors (of any device) and progress; the last save becomes the one before it.

    Raises:
        RunError: it cannot be written; the last save is as it was.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {'progress': json.dumps(progress), 'sha256': _digest(tensors.items())}
    write(path, lambda beside: beside.write_bytes(to_bytes(tensors, metadata)), keep=True)


def _read(path: Path) -> tuple[dict[str, Tensor], Progress]:
    with safe_open(path, 'pt') as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    if metadata['sha256'] != _digest(tensors.items()):
        raise ValueError('its content does not match its checksum')
    return tensors, json.loads(metadata['progress'])


def load(path: Path, tell: Callable[[str], None] = print) -> tuple[dict[str, Tensor], Progress]:
    """What `save` saved last, or the time before where that is missing or damaged, which `tell` is told.

    Raises:
        RunError: neither can be read.
    """
    damage = []
    for candidate in (path, previous(path)):
        try:
            state = _read(candidate)
        except FileNotFoundError:
            continue
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            damage.append(f'{candidate} cannot be resumed from ({error})')
            continue
        if damage:
            tell(f'{damage[0]}: going on from the state before it')
        return state
    raise RunError('; '.join(damage) or f'{path} is missing')


def seeds(path: Path) -> list[int]:
    """Of the runs that a state is of; none where there is no state that can be read."""
    for candidate in (path, previous(path)):
        with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError, ValueError):
            with safe_open(candidate, 'pt') as file:
                return [kept['run']['seed'] for kept in json.loads(file.metadata()['progress'])['runs']]
    return []
