"""Names of tensors without the segments that wrappers of a network leave in them."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

__all__ = ['renamed', 'unwrapped']

T = TypeVar('T')

ANYWHERE = {  # DistributedDataParallel and AveragedModel, torch.compile, FSDP, activation checkpointing
    'module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'}
IN_FRONT = {'model', 'base_model'}  # Lightning, PEFT; further down such a name is the network's own


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Every name with the same name less its wrappers, which are whole segments: of as many kinds as keep names apart.

    Example:
        >>> unwrapped(['module.nl_module.g._orig_mod.weight', 'module.model.fc.bias'])
        {'module.nl_module.g._orig_mod.weight': 'nl_module.g.weight', 'module.model.fc.bias': 'fc.bias'}
    """
    names = list(names)
    for front in (IN_FRONT, set[str]()):
        clean = {name: _cut(name, front) for name in names}
        if len(set(clean.values())) == len(clean):
            return clean
    return {name: name for name in names}


def renamed(tensors: Mapping[str, T], own: Iterable[str]) -> dict[str, T]:
    """A state dict under a network's `own` names, whatever was around the network that saved it, or is around this one.

    What lies beside a wrapped network and is none of its names, such as a loss, is left out.

    Example:
        >>> renamed({'model.fc._orig_mod.bias': 1, 'loss.weight': 2}, ['fc.bias'])
        {'fc.bias': 1}
    """
    names = {clean: name for name, clean in unwrapped(own).items()}
    clean = unwrapped(tensors)
    wrapped = {name for name in clean if '.' in name and name.partition('.')[0] in ANYWHERE | IN_FRONT}
    return {names.get(clean[name], clean[name]): tensor for name, tensor in tensors.items()
            if not wrapped or name in wrapped or clean[name] in names}


def _cut(name: str, front: set[str]) -> str:
    *modules, tensor = name.split('.')
    kept: list[str] = []
    for module in modules:
        if module not in ANYWHERE and (kept or module not in front):
            kept.append(module)
    return '.'.join([*kept, tensor])
