"""Where weights come from: a registered name, a folder, a file."""

import difflib
from pathlib import Path

import timm
from safetensors import SafetensorError, safe_open
from timm.models import split_model_name_tag
from torch import Tensor


class CheckpointError(Exception):
    """The target cannot be found or read; the message says what would work."""


def near_names(name: str) -> str:
    """' Did you mean …?' with the registered architectures nearest to name, or ''."""
    near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.6)
    return f' Did you mean {", ".join(near)}?' if near else ''


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises CheckpointError if it is missing, truncated or something else."""
    try:
        with safe_open(path, 'pt') as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f'{path} is not a readable safetensors file: {error}') from error


def load(target: str) -> tuple[dict[str, Tensor], str]:
    """The state dict of a target, and where it came from.

    Args:
        target: a .safetensors file, a folder that holds model.safetensors, or a registered timm name (with or
            without tag; its own weights where it has some, else freshly initialised ones).

    Raises:
        CheckpointError: nothing of the kind is there, or it cannot be read.
    """
    path = Path(target)
    if path.is_dir():
        if not (path / 'model.safetensors').is_file():
            raise CheckpointError(f'{path} holds no model.safetensors')
        path = path / 'model.safetensors'
    if path.is_file():
        return read_file(path), str(path)
    architecture, _ = split_model_name_tag(target)
    if '/' in target or path.suffix == '.safetensors' or not timm.is_model(architecture):
        raise CheckpointError(f'{target}: no such file, folder or registered name.{near_names(architecture)}')
    try:
        pretrained = timm.is_model_pretrained(target)
        model = timm.create_model(target, pretrained=pretrained)
    except RuntimeError as error:  # timm's own word for a tag it does not know
        raise CheckpointError(f'{target}: {error}') from error
    return model.state_dict(), f'{target} ({"pretrained" if pretrained else "untrained: freshly initialised"})'
