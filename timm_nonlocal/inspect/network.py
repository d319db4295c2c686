"""The network that a target's weights belong to: which it is, what its config says, and the network itself."""

import json
import re
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import timm
from torch import nn

from ..checkpoints.names import renamed
from ..checkpoints.targets import Source, near_names
from ..checkpoints.tensorfile import CheckpointError
from ..layers.blocks import KINDS

__all__ = ['build', 'formulation']


def _config(source: Source) -> dict[str, Any]:
    """The config.json beside the weights, {} where there is none to read."""
    try:
        if source.repo and source.file:
            text = source.repo.text(str(PurePosixPath(source.file).with_name('config.json')))
        else:
            text = Path(source.file).with_name('config.json').read_text() if source.file else None
        config = json.loads(text or '{}')
    except (OSError, ValueError, RecursionError, CheckpointError):
        return {}
    return config if isinstance(config, dict) else {}


def _named(source: Source, arch: str | None) -> tuple[str | None, dict[str, Any]]:
    """The network's name, as given or as the target or its config says, and that config."""
    if arch:
        return arch, {}
    config = _config(source)
    name = source.architecture or config.get('architecture')
    return (name, config) if isinstance(name, str) and timm.is_model(name.partition('.')[0]) else (None, {})


def _args(config: dict[str, Any]) -> dict[str, Any]:
    args = config.get('model_args')
    return args if isinstance(args, dict) else {}


def formulation(source: Source, arch: str | None) -> str | None:
    """'original' or 'proposed' where the network's arguments or its registered name tell what its weights do not."""
    name, config = _named(source, arch)
    args = _args(config)
    nl_args = args.get('nl_args')
    said = [args.get('nl'), nl_args.get('kind') if isinstance(nl_args, dict) else None,
            *re.findall('|'.join(KINDS), name or '')]
    return next((kind for kind in said if isinstance(kind, str) and kind in KINDS), None)


def build(source: Source, arch: str | None) -> nn.Module:
    """The network that a target's weights belong to, with them, in eval mode. Raises CheckpointError."""
    try:
        name, config = _named(source, arch)
        if not name:
            raise CheckpointError(f'{source.input} does not say which network it belongs to: name it with --arch')
        if not timm.is_model(name.partition('.')[0]):
            raise CheckpointError(f'--arch {name}: no such registered name.{near_names(name)}')
        with tempfile.TemporaryDirectory() as folder:
            if not arch and source.architecture and source.kind != 'dir':
                name = source.input  # with its tag
            elif {'pretrained_cfg', 'num_classes'} & config.keys():
                Path(folder, 'config.json').write_text(json.dumps(config))
                name = f'local-dir:{folder}'
            model = timm.create_model(name, **_args(config))
        model.load_state_dict(renamed(source.state_dict(), model.state_dict()))
        return model.eval()
    except (RuntimeError, TypeError, ValueError, OSError, KeyError) as error:
        raise CheckpointError(f'{source.input}: the network cannot be built: '
                              f'{" ".join(str(error).split())[:300]}') from error
