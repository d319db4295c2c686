"""Watches the nonlocal modules of a model over images: A, every Zⁿ, and what becomes of the predictions without A.

The model does not know: hooks take the input of every `NonlocalStage`, `NonlocalBlocks` and `NonlocalBlock`, and what
happens inside is worked out again from `relate` and the weights, in float64, by eq. (1) and eq. (8) as they stand.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.stored import own_weight
from ..layers.blocks import NonlocalBlock, NonlocalBlocks, NonlocalStage
from ..layers.plain import is_plain
from ..ops.reference import original_block, proposed_stage
from . import dynamics

__all__ = ['NonlocalModule', 'affinities', 'block_weights', 'formulation', 'identity', 'nonlocal_modules', 'rows',
           'trajectory', 'uniform', 'watch']

SPECTRAL_IMAGES = 4  # what needs the eigenvalues of A is measured on this many
BATCH = 32
NonlocalModule = NonlocalStage | NonlocalBlocks | NonlocalBlock


def nonlocal_modules(model: nn.Module) -> dict[str, NonlocalModule]:
    """The nonlocal modules of a model by their names; the blocks of a `NonlocalBlocks` are not listed again."""
    found: dict[str, NonlocalModule] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f'{outer}.') or not outer for outer in found)
        if isinstance(module, NonlocalModule) and not inside:
            found[name] = module
    return found


def formulation(module: NonlocalModule) -> str:
    """'proposed' for eq. (8), 'original' for eq. (1)."""
    return 'proposed' if isinstance(module, NonlocalStage) else 'original'


def _blocks(module: NonlocalModule) -> list[Any]:
    return [module] if isinstance(module, NonlocalBlock) else list(module.sub_blocks)


def block_weights(module: NonlocalModule) -> list[tuple[Tensor, Tensor]]:
    """W_Z, (C, C'), and W_g, (C', C), of every block, in order, as its layers compute with them.

    Raises:
        ValueError: a layer is no linear map.
    """
    return [(_weight(block, 'z'), _weight(block, 'g')) for block in _blocks(module)]


def _weight(block: Any, name: str) -> Tensor:
    layer = block.get_submodule(name)
    weight = layer.weight.detach() if is_plain(layer) else own_weight(block, name)
    if weight is None:
        raise ValueError(f'{name} ({type(layer).__name__}) has no weight that could be told')
    return weight


def affinities(module: NonlocalModule) -> list[Callable[[Tensor], Tensor]]:
    """What computes A (B, M, M) from the input (B, M, C) of each block that has an A of its own."""
    return [one.relate for one in ([module] if isinstance(module, NonlocalStage) else _blocks(module))]


def uniform(x: Tensor) -> Tensor:
    """A = 1/M for x (B, M, C)."""
    return x.new_full((1, x.shape[1], x.shape[1]), 1 / x.shape[1])


def identity(x: Tensor) -> Tensor:
    """A = I for x (B, M, C)."""
    return torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[None]


def trajectory(module: NonlocalModule, x: Tensor,
               relate: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    """The first A and Z⁰ = X, Z¹, …, Zᵏ.

    Args:
        module: in x's dtype.
        x: (B, M, C).
        relate: what to compute A with in place of the module's own.

    Returns:
        A (B, M, M) or broadcastable, and k + 1 tensors (B, M, C).
    """
    own, weights = [relate] if relate else affinities(module), block_weights(module)
    a = first = own[0](x)
    if formulation(module) == 'proposed':
        return first, proposed_stage(x, a, [w_g for _, w_g in weights], [w_z for w_z, _ in weights])
    z = [x]
    for n, (w_z, w_g) in enumerate(weights):
        a = own[min(n, len(own) - 1)](z[-1]) if n else a
        z.append(original_block(z[-1], a, w_g, w_z))
    return first, z


@contextmanager
def _hooked(model: nn.Module, hook: Callable[[str, NonlocalModule, Tensor], Tensor | None]) -> Iterator[None]:
    """Calls hook(name, module, input) after every module's forward; what it gives replaces the output."""
    handles = [module.register_forward_hook(lambda module, inputs, _, name=name: hook(name, module, inputs[0]))
               for name, module in nonlocal_modules(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _doubles(model: nn.Module) -> dict[str, NonlocalModule]:
    """Copies of the nonlocal modules in float64 on the CPU, where `dynamics` computes: not every device has float64."""
    return {name: copy.deepcopy(module).cpu().double() for name, module in nonlocal_modules(model).items()}


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (B, C, *grid) -> (B, M, C)


def _predict(model: nn.Module, images: Tensor, relate: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The predicted classes (B,), with A replaced where `relate` is given."""
    def replace(name: str, module: NonlocalModule, x: Tensor) -> Tensor | None:
        if relate is None:
            return None
        return trajectory(module, _tokens(x), relate)[1][-1].transpose(1, 2).reshape(x.shape)

    with _hooked(model, replace):
        return torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])


def _inside(module: NonlocalModule, x: Tensor, spectral: bool) -> dict[str, Any]:
    """One image's numbers in one module. x (1, M, C), the module in x's dtype."""
    a, z = trajectory(module, x)
    a = a.expand(1, x.shape[1], x.shape[1])[0]
    sums = a.sum(1)
    is_markov = a.min() >= 0 and bool(((sums - 1).abs() < 1e-6).all())
    pi = dynamics.stationary(a / sums[:, None]) if is_markov else a.new_full((len(a),), 1 / len(a))
    track = [dynamics.energies(a, pi, step[0]) for step in z]
    record: dict[str, Any] = {
        'is_markov': is_markov,
        'track': {name: [step[name] for step in track] for name in ('dirichlet', 'variance', 'power')},
        'growth': max((after['power'] / before['power'] for before, after in pairwise(track) if before['power']),
                      default=0.0) ** 0.5}
    if spectral and is_markov and len(a) > 1:
        chain, ws, kind = dynamics.markov_chain(a), block_weights(module), formulation(module)
        record['markov'] = {'row_sum_error': (sums - 1).abs().max().item(), **dynamics.markov(chain)}
        if chain.weighs_all:
            record['kappa'] = [dynamics.amplification(chain, [w], kind) for w in ws]
            record['kappa_stage'] = dynamics.amplification(chain, ws, kind)
    return record


def _mean(records: list[Any]) -> Any:
    """The mean of numbers, taken inside dicts and lists."""
    if isinstance(records[0], dict):
        return {key: _mean([record[key] for record in records]) for key in records[0]}
    if isinstance(records[0], list):
        return [_mean(list(values)) for values in zip(*records, strict=True)]
    return sum(records) / len(records)


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What one module shows over all images. Energies are those after n blocks over those of the input."""
    tracks = _mean([record['track'] for record in records])
    spectral = [record for record in records if 'markov' in record]
    weighted = [record for record in records if 'kappa' in record]
    return {
        'is_markov': all(record['is_markov'] for record in records),
        'markov': _mean([record['markov'] for record in spectral]) if spectral else None,
        'mu_max': max(record['markov']['mu_max'] for record in spectral) if spectral else None,
        'kappa': [max(values) for values in zip(*(record['kappa'] for record in weighted), strict=True)],
        'kappa_stage': max(record['kappa_stage'] for record in weighted) if weighted else None,
        **{name: [value / values[0] if values[0] else None for value in values] for name, values in tracks.items()},
        'growth': max(record['growth'] for record in records),
    }


@torch.no_grad()
def watch(model: nn.Module, images: Tensor, labels: Tensor | None = None,
          tick: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """What every nonlocal module does to images, and what the predictions are worth without its A.

    Args:
        model: in eval mode; it is left as it was.
        images: (N, 3, H, W), as the model takes them.
        labels: (N,), where they are known.
        tick: called with the images done and their number.

    Returns:
        images: N; spectral_images: on how many of them A's eigenvalues were taken.
        accuracy: percent with A as learned, uniform (1/M) and identity; None without labels.
        agreement: percent of the images whose prediction stays the same with A uniform and identity.
        modules: by name, `is_markov` (A ≥ 0 with rows that sum to one), `markov` (`dynamics.markov`, the mean over the
            spectral images), `mu_max`, `kappa` of every block and `kappa_stage` (the largest over them, exact for
            the first block's A; [] and None where π leaves out positions, `dynamics.NEGLIGIBLE`), `dirichlet`,
            `variance` and `power` after 0…k blocks over those of the input, in the first block's A, the mean over the
            images, and `growth`, the largest ‖Zⁿ⁺¹‖_π/‖Zⁿ‖_π of any block on any image, with ‖Z‖²_π the power. Of an A
            that is no Markov matrix, or of one position, only the last four, with uniform weights. None of a module
            that did not run.

    Example:
        >>> model = nn.Sequential(NonlocalStage(4, k=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        >>> found = watch(model, torch.randn(3, 4, 5, 5))
        >>> stage = found['modules']['0']
        >>> found['images'], stage['is_markov'], len(stage['kappa']), stage['variance'][0]
        (3, True, 2, 1.0)
    """
    doubles = _doubles(model)
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in doubles}

    def record(name: str, module: NonlocalModule, x: Tensor) -> None:
        done = len(records[name])
        records[name].append(_inside(doubles[name], _tokens(x).cpu().double(), done < SPECTRAL_IMAGES))

    with _hooked(model, record):
        learned = torch.cat([_ticked(model, image, index, len(images), tick)
                             for index, image in enumerate(images.split(1))])
    predictions = {'learned': learned, **{control.__name__: _predict(model, images, control)
                                          for control in (uniform, identity)}}
    return {
        'images': len(images), 'spectral_images': min(len(images), SPECTRAL_IMAGES),
        'accuracy': None if labels is None else {
            name: _percent(found, labels) for name, found in predictions.items()},
        'agreement': {name: _percent(found, learned) for name, found in predictions.items() if name != 'learned'},
        'modules': {name: _summary(found) for name, found in records.items() if found},
    }


@torch.no_grad()
def rows(model: nn.Module, images: Tensor, places: Sequence[tuple[float, float]]) -> dict[str, list[Tensor]]:
    """What chosen positions look at: rows of A as pictures.

    Args:
        model: in eval mode; it is left as it was.
        images: (N, 3, H, W), as the model takes them.
        places: P positions (down, right), as fractions of the grid in [0, 1).

    Returns:
        by module, for every block that has an A of its own, (N, P, h, w) on the module's grid; none of other grids.

    Example:
        >>> model = nn.Sequential(NonlocalBlock(4, affinity='uniform')).eval()
        >>> (a,) = rows(model, torch.randn(2, 4, 5, 3), [(0.5, 0.5)])['0']
        >>> a.shape, round(a[0, 0].sum().item(), 6)
        (torch.Size([2, 1, 5, 3]), 1.0)
    """
    doubles = _doubles(model)
    found: dict[str, list[list[Tensor]]] = {}

    def record(name: str, module: NonlocalModule, x: Tensor) -> None:
        if x.ndim != 4:
            return
        h, w = x.shape[2:]
        chosen, tokens = [int(down * h) * w + int(right * w) for down, right in places], _tokens(x).cpu().double()
        z = trajectory(doubles[name], tokens)[1]
        found.setdefault(name, []).append([
            relate(z[n]).expand(1, h * w, h * w)[0, chosen].reshape(-1, h, w).clone()
            for n, relate in enumerate(affinities(doubles[name]))])

    with _hooked(model, record):
        for image in images.split(1):
            model(image)
    return {name: [torch.stack(maps) for maps in zip(*each, strict=True)] for name, each in found.items()}


def _ticked(model: nn.Module, image: Tensor, index: int, count: int, tick: Callable[[int, int], None]) -> Tensor:
    tick(index, count)
    return model(image).argmax(1)


def _percent(found: Tensor, expected: Tensor) -> float:
    return 100 * (found == expected).double().mean().item()
