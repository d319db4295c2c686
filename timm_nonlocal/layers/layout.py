"""Where a module's output has its channels, seen by running the model: the axis that does not follow the input's size.

One size tells nothing: a layer of 64 channels gives (B, 64, 64, 128) for images of 256×512. So the model runs again on
inputs of other sizes. Where it takes none (most ViTs), or the axis stays open (windows, pooled maps), it is as long as
the layer that ran last is wide, unless a norm or a convolution has the other axis's length. What is open even then is
asked for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import torch
from timm.models.regnet import RegStage
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import first_line

__all__ = ['CHILD', 'Layout', 'find_layouts', 'runs_in_turn']

CHILD = 'nl'


def runs_in_turn(module: nn.Module) -> bool:
    """Whether it runs all its children, each on the output of the one before."""
    return type(module).forward in (nn.Sequential.forward, RegStage.forward)


class Layout(NamedTuple):
    """(B, *grid, C) or (B, C, *grid), in the first of several outputs or the only one, and C."""

    channels_last: bool
    first: bool
    dim: int


class Output(NamedTuple):
    """What a module gave in one of its runs."""

    shape: tuple[int, ...] | str  # its features', or what else it is
    first: bool
    width: Optional[int]  # of the layer that ran last until then


Outputs = dict[nn.Module, list[Output]]
Moved = dict[nn.Module, list[set[int]]]  # the axes of these outputs that have other sizes for another input


@torch.no_grad()
def find_layouts(model: nn.Module, targets: dict[nn.Module, str], example: Any,
                 channels_last: Optional[bool]) -> dict[nn.Module, Layout]:
    """The layout of what each target gives, from calls of the model in eval mode, which is left as it was.

    Raises:
        ValueError: the model does not take the example, a target runs all its children (and so would run ours), gives
            no features, or its channels cannot be told.
    """
    example = _example(model) if example is None else example
    ran: list[nn.Module] = []
    with _watched(model, targets, ran) as call:
        outputs, error = call(example)
        for target in ran:
            if not runs_in_turn(target):
                raise ValueError(f'after={targets[target]!r}: a {type(target).__name__} runs its children itself; '
                                 f'name one of them, or the module that follows')
        if error and not all(outputs.values()):
            shape = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
            raise ValueError(f'the model does not take {shape}: give what it takes as example=… '
                             f'({first_line(error)})') from error
        for target, name in targets.items():
            _refuse_without_features(name, outputs[target])
        by_size: Moved = {target: [set() for _ in runs] for target, runs in outputs.items()}
        by_batch: Moved = {target: [set() for _ in runs] for target, runs in outputs.items()}
        for is_batch, other in _others(example) if channels_last is None else ():
            if all(_still(run, axes) for target in targets
                   for run, axes in zip(outputs[target], by_size[target], strict=True)):
                break
            again, error = call(other)
            if error is None:
                _note(by_batch if is_batch else by_size, outputs, again)
    widths = {_width(module) for module in model.modules() if not isinstance(module, nn.Linear)}  # which may mix tokens
    layouts = {}
    for target, name in targets.items():
        found = set()
        for run, size, batch in zip(outputs[target], by_size[target], by_batch[target], strict=True):
            axis = _axis(name, run, size, batch, widths) if channels_last is None else -1 if channels_last else 1
            found.add(Layout(axis != 1, run.first, int(run.shape[axis])))
        if len(found) > 1:
            raise ValueError(f'after={name!r}: it runs {len(outputs[target])} times, on '
                             f'{sorted(layout.dim for layout in found)} channels; name a module that runs once')
        layouts[target] = found.pop()
    return layouts


@contextmanager
def _watched(model: nn.Module, targets: dict[nn.Module, str],
             ran: list[nn.Module]) -> Iterator[Callable[[Any], tuple[Outputs, Optional[Exception]]]]:
    """Calls of the model in eval mode: what the targets gave, and what it raised; `ran` gets those that run a child."""
    outputs: Outputs = {target: [] for target in targets}
    modes = {module: module.training for module in model.modules()}
    width: Optional[int] = None

    def call(example: Any) -> tuple[Outputs, Optional[Exception]]:
        for runs in outputs.values():
            runs.clear()
        error = None
        try:
            model(example)
        except Exception as raised:
            error = raised
        return {target: list(runs) for target, runs in outputs.items()}, error

    def note_width(module: nn.Module, *_: Any) -> None:
        nonlocal width
        width = _width(module) or width

    def note_output(module: nn.Module, _: Any, output: Any) -> None:
        features, first = _features(output)
        outputs[module].append(Output(
            tuple(features.shape) if features is not None else _describe(output), first, width))

    handles = [module.register_forward_hook(note_width) for module in modes]
    handles += [target.register_forward_hook(note_output) for target in targets]
    for target in targets:
        target.add_module(CHILD, probe := nn.Identity())
        probe.register_forward_pre_hook(lambda *_, target=target: ran.append(target))
    try:
        model.eval()
        yield call
    finally:
        for handle in handles:
            handle.remove()
        for target in targets:
            delattr(target, CHILD)
        for module, training in modes.items():
            module.training = training


def _example(model: nn.Module) -> Tensor:
    """One black image for the model: its timm config's size, else 224×224, in the channels of its first convolution."""
    conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if conv is None:
        raise ValueError('the model has no 2-D convolution to tell its input by: give what it takes as example=…')
    size = (getattr(model, 'pretrained_cfg', None) or {}).get('input_size', (3, 224, 224))[-2:]
    return conv.weight.new_zeros(1, conv.in_channels, *size)


def _others(example: Any) -> Iterator[tuple[bool, Any]]:
    """The example in other sizes of its grid, of one axis at a time (which are a grid is open), and of the batch."""
    def resized(*new: tuple[int, Callable[[int], int]]) -> Any:
        def one(x: Tensor) -> Tensor:
            shape = list(x.shape)
            for axis, size in new:
                if axis < len(shape):
                    shape[axis] = size(shape[axis])
            return x.new_zeros(shape) if x.dim() > 2 else x
        return tree_map_only(Tensor, one, example)

    def near(size: int) -> int:  # strides of 32 keep whole steps, and large inputs get no heavier
        return size + 32 if size < 128 else size - 32

    def twice(size: int) -> int:  # takes whole windows
        return 2 * size

    yield False, resized((2, near), (3, lambda size: near(near(size))), (4, near))
    yield False, resized((2, near), (3, near), (4, near))
    for axis in (1, 2, 3):
        yield False, resized((axis, twice))
    yield True, resized((0, twice))


def _note(moved: Moved, before: Outputs, after: Outputs) -> None:
    for target, runs in before.items():
        if len(runs) == len(after[target]):
            for axes, old, new in zip(moved[target], runs, after[target], strict=True):
                if isinstance(new.shape, tuple) and len(old.shape) == len(new.shape):
                    axes.update(i for i, size in enumerate(old.shape) if size != new.shape[i])


def _still(run: Output, moved: set[int]) -> Optional[int]:
    """The outer axis that keeps its size where the other does not."""
    ends = {1, len(run.shape) - 1}
    return (ends - moved).pop() if len(ends & moved) == 1 else None


def _axis(name: str, run: Output, by_size: set[int], by_batch: set[int], widths: set[Optional[int]]) -> int:
    """The axis of the channels. Raises ValueError where it is open."""
    axis = _still(run, by_size)
    if axis is not None:
        return axis
    end = len(run.shape) - 1
    if {1, end} <= by_size:
        raise ValueError(f'after={name!r}: it gives {run.shape}, of which no outer axis keeps its size for an input of '
                         f'another; name a module that gives (B, C, H, W) or (B, M, C)')
    if by_batch - {0}:
        raise ValueError(f'after={name!r}: it gives {run.shape}, whose first axis is not the batch alone; '
                         f'name a module that gives (B, C, H, W) or (B, M, C)')
    for axis, other in ((1, end), (end, 1)):
        if run.shape[axis] == run.width and run.shape[other] not in widths | {run.width}:
            return axis
    raise ValueError(f'after={name!r}: it gives {run.shape}, and nothing tells whether its channels are axis 1 or the '
                     f'last: say channels_last=False or channels_last=True')


def _width(layer: nn.Module) -> Optional[int]:
    """How many channels a layer gives, by its parameters."""
    for name in ('out_features', 'out_channels', 'num_features'):
        if isinstance(width := getattr(layer, name, None), int):
            return width
    if any(layer.children()):
        return None
    return next((len(p) for p in layer.parameters(recurse=False) if p.dim() == 1 and len(p) > 1), None)


def _features(output: Any) -> tuple[Optional[Tensor], bool]:
    """The tensor itself, or the first of a tuple or a list that has more axes than all else there; and whether so."""
    if isinstance(output, Tensor):
        return output, False
    if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
        rest = [leaf for leaf in tree_leaves(list(output[1:])) if isinstance(leaf, Tensor)]
        if all(tensor.dim() < output[0].dim() for tensor in rest):
            return output[0], True
    return None, False


def _describe(output: Any) -> str:
    if type(output) not in (tuple, list):
        return type(output).__name__
    shapes = (str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in output)
    return f'a {type(output).__name__} of {", ".join(shapes)}, of which the first is not the only features'


def _refuse_without_features(name: str, runs: list[Output]) -> None:
    if not runs:
        raise ValueError(f'after={name!r}: the module does not run in the forward pass; name the one that holds it')
    for run in runs:
        if isinstance(run.shape, str) or len(run.shape) < 3:
            raise ValueError(f'after={name!r}: it gives {run.shape}, not (B, C, H, W) or (B, M, C); name one that does')
