"""Nonlocal modules in any network: `insert` puts one after a module found by its name, `remove` takes it out again.

It becomes a submodule named `nl` of the module it follows, and a forward hook there applies it. So no key of the
network's own changes: a plain checkpoint loads before `insert`, and the new weights are `<module>.nl.…`.
"""

import difflib
from collections.abc import Iterable
from typing import Any

import torch
from timm.models.regnet import RegStage
from torch import Tensor, nn

from .blocks import KINDS

__all__ = ['insert', 'remove']

CHILD = 'nl'
IN_TURN = nn.Sequential.forward, RegStage.forward  # they run all children, each on the output of the one before


# TorchScript wants these names, and no type of self
def _after_nchw(self, input: tuple[Tensor], output: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """(B, C, H, W), or (B, C, *grid) with any grid."""
    return self.nl(output)


def _after_channels_last(self, input: tuple[Tensor], output: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Tokens (B, M, C), or NHWC."""
    return self.nl(output.movedim(-1, 1)).movedim(1, -1)


HOOKS = (_after_nchw, _after_channels_last)


def insert(
        model: nn.Module,
        after: str | Iterable[str],
        kind: str = 'proposed',
        k: int = 1,
        *,
        example: Any = None,
        **kwargs: Any,
) -> nn.Module:
    """Puts a nonlocal module after one module or several, each with weights of its own, and gives back the same model.

    W_Z starts as zero, so that each starts as the identity and a pretrained network keeps its predictions. The
    model runs once, without gradients, to see the shapes: (B, C, *grid), NHWC as timm's and torchvision's Swin have
    it, and tokens (B, M, C) are known apart. Insert before `torch.compile`, DDP, and building the optimizer.

    Args:
        model: any network whose modules of those names give one tensor each; changed in place. What follows a module
            that runs several times, such as a head on every level of a feature pyramid, runs every time.
        after: module names as in `model.named_modules()`; an `nn.Sequential`, or a stage of timm's RegNets, stands for
            the last one in it.
        kind: 'proposed' (eq. (8)) or 'original' (eq. (1)).
        k: the number of sub-blocks or blocks at each place.
        example: what to call the model with; None makes one image of the size in its timm config, else of 224×224.
        kwargs: further arguments of `NonlocalStage` or `NonlocalBlock`; init='zero' unless given.

    Raises:
        ValueError: an unknown name or kind, a place that does not fit, or arguments that `NonlocalStage` or
            `NonlocalBlock` refuses. The model is then as it was.

    Example:
        >>> import timm
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
    shapes = _output_shapes(model, targets, example)
    modules: dict[nn.Module, tuple[Any, nn.Module]] = {}
    for target, name in targets.items():
        hook, dim = _layout(name, shapes[target], getattr(model, 'output_fmt', ''))
        parameter = next(iter([*target.parameters(), *model.parameters()]))
        try:
            modules[target] = hook, KINDS[kind](
                dim, k, device=parameter.device, dtype=parameter.dtype, **{'init': 'zero', **kwargs})
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
        targets = [module for module in model.modules() if _hook_ids(module)]
    else:
        targets = [_leaf(model, name) for name in ([after] if isinstance(after, str) else after)]
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


def _leaf(model: nn.Module, name: str) -> nn.Module:
    """The module of that name, or the last one inside where it runs its children in turn. Raises ValueError if none."""
    modules = {key: module for key, module in model.named_modules(remove_duplicate=False) if key}
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4) or [n for n, _ in model.named_children()]
        raise ValueError(f'after={name!r}: no module has that name; nearest are {", ".join(near)}')
    module = modules[name]
    while type(module).forward in IN_TURN and module._modules:
        *_, module = module._modules.values()
    return module


@torch.no_grad()
def _output_shapes(model: nn.Module, targets: dict[nn.Module, str], example: Any) -> dict[nn.Module, list[Any]]:
    """The shapes that each target gives in one call of the model in eval mode, which is left as it was.

    Raises:
        ValueError: the model does not take the example, or a target runs all its children, and so would run ours.
    """
    if example is None:
        example = _example(model)
    shapes: dict[nn.Module, list[Any]] = {target: [] for target in targets}
    handles = [target.register_forward_hook(lambda module, args, output: shapes[module].append(
        tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__)) for target in targets]
    modes = {module: module.training for module in model.modules()}
    ran = set()
    for target in targets:
        target.add_module(CHILD, probe := nn.Identity())
        probe.register_forward_hook(lambda *_, target=target: ran.add(target))
    try:
        model.eval()
        model(example)
    except Exception as error:
        if not ran and not all(shapes.values()):
            shape = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f'the model does not take {shape}: give what it takes as example=… ({reason})') from error
    finally:
        for handle in handles:
            handle.remove()
        for target in targets:
            delattr(target, CHILD)
        for module, training in modes.items():
            module.training = training
    for target in ran:
        raise ValueError(f'after={targets[target]!r}: a {type(target).__name__} runs its children itself; '
                         f'name one of them, or the module that follows')
    return shapes


def _example(model: nn.Module) -> Tensor:
    """One black image for the model: its timm config's size, else 224×224, in the channels of its first convolution."""
    conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if conv is None:
        raise ValueError('the model has no 2-D convolution to tell its input by: give what it takes as example=…')
    size = (getattr(model, 'pretrained_cfg', None) or {}).get('input_size', (3, 224, 224))[-2:]
    return conv.weight.new_zeros(1, conv.in_channels, *size)


def _layout(name: str, shapes: list[Any], output_fmt: str) -> tuple[Any, int]:
    """The hook that fits these outputs, and C. Raises ValueError where none does."""
    if not shapes:
        raise ValueError(f'after={name!r}: the module does not run in the forward pass; name the one that holds it')
    found = set()
    for shape in shapes:
        if isinstance(shape, str) or len(shape) < 3:
            raise ValueError(f'after={name!r}: it gives {shape}, not (B, C, H, W) or (B, M, C); name one that does')
        last = len(shape) == 3
        if len(shape) == 4:  # a square map tells its channels by its shape
            square = (shape[1] == shape[2]) != (shape[2] == shape[3])
            last = shape[1] == shape[2] if square else output_fmt == 'NHWC'
        found.add((_after_channels_last, shape[-1]) if last else (_after_nchw, shape[1]))
    if len(found) > 1:
        raise ValueError(f'after={name!r}: it runs {len(shapes)} times, on {sorted(dim for _, dim in found)} channels; '
                         f'name a module that runs once')
    return found.pop()
