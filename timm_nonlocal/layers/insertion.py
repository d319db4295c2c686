"""Nonlocal modules in any network: `insert` puts one after a module found by its name, `remove` takes it out again.

It becomes a submodule named `nl` of the module it follows, and a forward hook there applies it. So no key of the
network's own changes: a plain checkpoint loads before `insert`, and the new weights are `<module>.nl.…`.
"""

import contextlib
import copy
import difflib
from collections.abc import Iterable
from typing import Any, Optional

from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops.misc import FrozenBatchNorm2d

from .blocks import KINDS
from .layout import CHILD, find_layouts, runs_in_turn

__all__ = ['insert', 'remove']

NORMS = _BatchNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d  # others put another in place of them


# TorchScript wants these names, and no type of self
def _after_nchw(self, input: tuple[Tensor], output: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """(B, C, H, W), or (B, C, *grid) with any grid."""
    return self.nl(output)


def _after_channels_last(self, input: tuple[Tensor], output: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Tokens (B, M, C), or NHWC."""
    return self.nl(output.movedim(-1, 1)).movedim(1, -1)


def _in_turn(self, input: tuple[Tensor], output: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Marks a Sequential that has run the nonlocal module as its last."""
    return output


def _first_after_nchw(self, input, output):  # type: ignore[no-untyped-def]
    """As `_after_nchw`, on the first of a tuple or a list."""
    return type(output)((self.nl(output[0]), *output[1:]))


def _first_after_channels_last(self, input, output):  # type: ignore[no-untyped-def]
    """As `_after_channels_last`, on the first of a tuple or a list."""
    return type(output)((_after_channels_last(self, input, output[0]), *output[1:]))


AFTER = {(False, False): _after_nchw, (True, False): _after_channels_last,  # by channels_last, first
         (False, True): _first_after_nchw, (True, True): _first_after_channels_last}
HOOKS = *AFTER.values(), _in_turn


def insert(
        model: nn.Module,
        after: str | Iterable[str],
        kind: str = 'proposed',
        k: int = 1,
        *,
        example: Any = None,
        channels_last: Optional[bool] = None,
        **kwargs: Any,
) -> nn.Module:
    """Puts a nonlocal module after one module or several, each with weights of its own, and gives back the same model.

    W_Z starts as zero, so that each starts as the identity and a pretrained network keeps its predictions. The
    model runs a few times, without gradients, on inputs of several sizes, to see which axis holds the channels: that
    of (B, C, *grid), (B, *grid, C) as timm's and torchvision's Swin have it, or tokens (B, M, C), alone or as the
    first of a tuple or a list that goes on unchanged. Insert before `torch.compile`, DDP, and building the optimizer.

    Args:
        model: any network; changed in place. What follows a module that runs several times, such as a head on every
            level of a feature pyramid, runs every time.
        after: module names as in `model.named_modules()`; an `nn.Sequential`, or a stage of timm's RegNets, stands for
            the last one in it, or runs the nonlocal module itself if that is a batch norm, which others replace.
        kind: 'proposed' (eq. (8)) or 'original' (eq. (1)).
        k: the number of sub-blocks or blocks at each place.
        example: what to call the model with; None makes one image of the size in its timm config, else of 224×224.
        channels_last: whether the channels are the last axis there; asked for where nothing else tells.
        kwargs: further arguments of `NonlocalStage` or `NonlocalBlock`; init='zero' unless given, and inner_dim = C/2,
            rounded down, though those two refuse an odd C.

    Raises:
        ValueError: an unknown name or kind, a place that does not fit or whose channels cannot be told, or arguments
            that `NonlocalStage` or `NonlocalBlock` refuses. The model is then as it was.

    Example:
        >>> import timm, torch
        >>> model, x = timm.create_model('resnet18').eval(), torch.randn(1, 3, 64, 64)
        >>> before = model(x)
        >>> model = insert(model, after='layer1.1', k=2)
        >>> model.layer1[1].nl.theta.weight.shape
        torch.Size([32, 64])
        >>> torch.allclose(model(x), before, atol=1e-4)
        True
    """
    if kind not in KINDS:
        raise ValueError(f'kind={kind!r} is unknown: use one of {", ".join(KINDS)}')
    names = [after] if isinstance(after, str) else list(after)
    if not names:
        raise ValueError('after is empty: name a module, such as after="layer1.1"')
    targets = {_leaf(model, name): name for name in names}
    if len(targets) < len(names):
        raise ValueError(f'after={names}: two of them are the same place')
    for target, name in targets.items():
        if hasattr(target, CHILD):
            raise ValueError(f'after={name!r}: there is a nonlocal module already; '
                             f'take it out with remove(model, {name!r}) first')
        _refuse_replaced(model, target, name)
    layouts = find_layouts(model, targets, example, channels_last)
    modules: dict[nn.Module, tuple[Any, nn.Module]] = {}
    for target, name in targets.items():
        last, first, dim = layouts[target]
        if runs_in_turn(target) and last:
            raise ValueError(f'after={name!r}: the norm at its end has its channels at axis 1: leave channels_last out')
        inner_dim = kwargs['inner_dim'] if kwargs.get('inner_dim') is not None else max(dim // 2, 1)
        parameter = next(iter([*target.parameters(), *model.parameters()]))
        try:
            modules[target] = _in_turn if runs_in_turn(target) else AFTER[last, first], KINDS[kind](
                dim, k, device=parameter.device, dtype=parameter.dtype,
                **{'init': 'zero', **kwargs, 'inner_dim': inner_dim})
        except ValueError as error:
            raise ValueError(f'after={name!r}: {error}') from error
    for target, (hook, module) in modules.items():
        target.add_module(CHILD, module.train(target.training))
        target.register_forward_hook(hook, prepend=True)  # whoever else listens there gets its output
    return model


def remove(model: nn.Module, after: str | Iterable[str] | None = None) -> nn.Module:
    """Takes the nonlocal modules after these out again, or all that `insert` put in, and gives back the same model.

    Raises:
        ValueError: an unknown name, or no nonlocal module there.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> model = remove(insert(model, after='1'))
        >>> list(model.state_dict())
        ['0.weight', '0.bias']
    """
    if after is None:
        targets = {module for module in model.modules() if _hook_ids(module)}
    else:
        targets = {_leaf(model, name) for name in ([after] if isinstance(after, str) else after)}
    if not targets or not all(map(_hook_ids, targets)):
        there = ', '.join(name for name, module in model.named_modules() if _hook_ids(module))
        raise ValueError(f'after={after!r}: nothing was inserted there; nonlocal modules follow {there or "no module"}')
    for target in targets:
        for key in _hook_ids(target):
            del target._forward_hooks[key]
        delattr(target, CHILD)
    return model


def _hook_ids(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_hooks.items() if hook in HOOKS]


def _refuse_replaced(model: nn.Module, target: nn.Module, name: str) -> None:
    """Refuses a module that others put another in place of: our hook would be lost without a word."""
    by = 'convert_sync_batchnorm and freeze_batch_norm_2d' if isinstance(target, NORMS) else ''
    for key, module in model.named_modules():
        if key and hasattr(module, 'fuse') and target in module.modules():
            with contextlib.suppress(Exception):  # a method of that name that is not timm's
                by = by if type(copy.deepcopy(module).fuse()) is type(module) else 'reparameterize_model'
    if by:
        raise ValueError(f'after={name!r}: a {type(target).__name__} that {by} would replace, and drop the nonlocal '
                         f'module; name the block that holds it, or the module that runs before or after')


def _leaf(model: nn.Module, name: str) -> nn.Module:
    """The module of that name, or the last one inside where it runs its children in turn. Raises ValueError if none.

    One that ends in a norm stays, and runs the nonlocal module after it.
    """
    modules = {key: module for key, module in model.named_modules(remove_duplicate=False) if key}
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4) or [n for n, _ in model.named_children()]
        raise ValueError(f'after={name!r}: no module has that name; nearest are {", ".join(near)}')
    module = modules[name]
    if type(module).forward is nn.Module.forward or (runs_in_turn(module) and not module._modules):
        inside = f'name one of them, such as {name}.{[*module._modules][-1]}' if module._modules else 'there is none'
        raise ValueError(f'after={name!r}: a {type(module).__name__} only holds modules; {inside}')
    while runs_in_turn(module) and not _hook_ids(module):
        *_, last = module._modules.values()
        if isinstance(last, NORMS):
            break
        module = last
    return module
