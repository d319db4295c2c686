"""What the weights of a nonlocal block say: the eigenvalues of W̃ = (W + Wᵀ)/2 with W = W_Z W_g, eq. (7).

Pure functions of weights, computed in float64. With U = [W_Z, W_gᵀ], C×2C', and J = [[0, I], [I, 0]], W̃ = ½ U J Uᵀ: by
Sylvester's law it has exactly C' positive and C' negative eigenvalues whenever U has full column rank, trained or not.
What training changes is which of them are large: hence the counts among the top 32 by magnitude, and beside them what
random weights give.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..checkpoints.layouts import Block, Found, find, parse_key_map
from ..checkpoints.stored import own_weight
from ..layers.maps import positive
from ..layers.stable import stable_weights
from . import recorder
from .random_weights import negative_of_random_weights

__all__ = ['BN_EPS', 'TOP', 'Spectrum', 'block_weights', 'measure', 'numbers', 'restricted', 'spectrum',
           'symmetric_eigenvalues']

TOP = 32  # the paper's figures show this many
BN_EPS = 1e-5  # torch's default; a state dict does not carry it
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of one block or sub-block. Numbers are None where undefined, as all are where 'nonfinite' is a flag.

    Attributes:
        stage: the state-dict prefix of the nonlocal module.
        index: the block's number in it.
        name: the block's own prefix.
        keys: names in the state dict: `w_z`, `w_g`, the prefix of a batch norm `bn` and the gain `scale` or None.
        naming: the layout its keys were recognised by (`timm_nonlocal.checkpoints.layouts`).
        formulation: 'original' (eq. (1)), 'proposed' (eq. (8)) or 'unknown' (no θ among the names, and no module
            that tells).
        symmetric: whether φ = θ; None where the names do not tell.
        C, C_inner: the channels outside, C, and inside, C'.
        method: 'dense' (C×C), or 'reduced' to the range of U (2C'×2C') where 2C' < C.
        folded: a batch norm or a gain after W_Z is multiplied into it.
        eigenvalues: of W̃, by magnitude, largest first; those of at most C·eps·|λ|max count as zero and are left out.
        zeros: how many are left out of the C.
        top_k: how many of the largest the two counts are over.
        neg_top, pos_top: negative and positive ones among them.
        neg_top_null, neg_top_null_sd: mean and standard deviation of neg_top over random Gaussian weights.
        n_neg, n_pos: negative and positive ones among all.
        lambda_min, lambda_max: the extremes of all C eigenvalues.
        trace: tr W = tr W̃.
        fro: ‖W‖_F.
        spectral_norm: ‖W‖₂.
        alignment: tr W / (‖W_Z‖_F ‖W_g‖_F), -1 for W_Z = -W_gᵀ and 1 for W_Z = W_gᵀ.
        alignment_null_sd: its standard deviation over random Gaussian weights, 1/√(C C'); the mean is 0.
        neg_energy: Σ λ² over negative λ / Σ λ² over all; 0.5 for random weights.
        asymmetry: ‖W - Wᵀ‖_F / ‖W‖_F, from 0 (symmetric) to 2 (skew).
        stable_rank: ‖W‖_F² / ‖W‖₂².
        effective_rank: exp of the entropy of σ/Σσ (Roy, Vetterli 2007).
        nonnormality: ‖W Wᵀ - Wᵀ W‖_F / ‖W‖_F² (Henrici), 0 where the eigenvectors of W are orthogonal.
        flags: 'zero_weight', 'rank_deficient' (rank W < C' in float64), 'nonfinite' (‖W‖² is, in float64), 'untrained',
            'stable' (by construction, `layers.stable`).
        raw: the same without folding, where something was folded.
        stability: what `timm_nonlocal.analysis.stability` says of W, where asked for.
    """

    stage: str
    index: int
    name: str
    keys: dict[str, str | None]
    naming: str
    formulation: str
    symmetric: bool | None
    C: int
    C_inner: int
    method: str
    folded: bool
    eigenvalues: tuple[float, ...] = ()
    zeros: int = 0
    top_k: int = 0
    neg_top: int | None = None
    pos_top: int | None = None
    neg_top_null: float | None = None
    neg_top_null_sd: float | None = None
    n_neg: int | None = None
    n_pos: int | None = None
    lambda_min: float | None = None
    lambda_max: float | None = None
    trace: float | None = None
    fro: float | None = None
    spectral_norm: float | None = None
    alignment: float | None = None
    alignment_null_sd: float | None = None
    neg_energy: float | None = None
    asymmetry: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    nonnormality: float | None = None
    flags: tuple[str, ...] = ()
    raw: 'Spectrum | None' = None
    stability: dict[str, Any] | None = None

    @property
    def top(self) -> tuple[float, ...]:
        """The `top_k` eigenvalues of greatest magnitude."""
        return self.eigenvalues[:self.top_k]

    def with_flag(self, flag: str) -> 'Spectrum':
        """The same with one flag more."""
        return replace(self, flags=(*self.flags, flag))

    def with_stability(self, stability: dict[str, Any]) -> 'Spectrum':
        """The same with what `timm_nonlocal.analysis.stability` says of it."""
        return replace(self, stability=stability)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them, `raw` as a dict of the same; a list of these makes a pandas.DataFrame."""
        return asdict(self)


def restricted(w_z: Tensor, w_g: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of W = W_Z W_g, or where 2C' < C of its restriction to the range of U, outside which W and Wᵀ are zero.

    With U = [W_Z, W_gᵀ] = Q [R₁, R₂] the restriction is R₁ R₂ᵀ: it has W's spectrum, singular values, trace and norms,
    and so has its symmetric part; exact zeros are all that is missing.

    Args:
        w_z: (C, C').
        w_g: (C', C).

    Returns:
        (n, C') and (C', n) with n = min(C, 2C').
    """
    channels, inner = w_z.shape
    if 2 * inner >= channels:
        return w_z, w_g
    r = torch.linalg.qr(torch.cat([w_z, w_g.T], dim=1), mode='r').R  # (2C', 2C')
    return r[:, :inner], r[:, inner:].T


def symmetric_eigenvalues(w_z: Tensor, w_g: Tensor) -> Tensor:
    """All C eigenvalues of (W + Wᵀ)/2, W = W_Z W_g, by magnitude, largest first.

    Args:
        w_z: (C, C'), any floating dtype.
        w_g: (C', C).

    Returns:
        float64 (C,).
    """
    left, right = restricted(w_z.double(), w_g.double())
    return _eigenvalues(left @ right, w_z.shape[0])


def _eigenvalues(w: Tensor, channels: int) -> Tensor:
    values = torch.linalg.eigvalsh((w + w.T) / 2)
    values = torch.cat([values, values.new_zeros(channels - len(values))])
    return values[values.abs().argsort(descending=True, stable=True)]


def numbers(w_z: Tensor, w_g: Tensor, top: int | None = TOP) -> dict[str, Any]:
    """Every number of a `Spectrum` from its weights; only the flag 'nonfinite' where ‖W‖² is not finite in float64.

    Args:
        w_z: (C, C'), any floating dtype.
        w_g: (C', C).
        top: how many eigenvalues to count signs among; None for all.
    """
    channels, inner = w_z.shape
    w_z, w_g = w_z.double(), w_g.double()
    left, right = restricted(w_z, w_g)
    w = left @ right
    if not w.square().sum().isfinite():
        return {'flags': ('nonfinite',)}
    values = _eigenvalues(w, channels)
    kept = values[values.abs() > channels * _EPS * values[0].abs()]
    top_k = len(kept) if top is None else min(top, len(kept))
    sigma = _singular_values(left, right)
    fro, norm, square = sigma.norm().item(), sigma[0].item(), kept.square().sum().item()
    rank = int((sigma > channels * _EPS * norm).sum())
    mean, deviation = negative_of_random_weights(channels, inner, top)
    share = sigma[sigma > 0] / sigma.sum()
    sides = w_z.norm().item() * w_g.norm().item()
    return {
        'eigenvalues': tuple(kept.tolist()), 'zeros': channels - len(kept), 'top_k': top_k,
        'neg_top': int((kept[:top_k] < 0).sum()), 'pos_top': int((kept[:top_k] > 0).sum()),
        'neg_top_null': mean, 'neg_top_null_sd': deviation,
        'n_neg': int((kept < 0).sum()), 'n_pos': int((kept > 0).sum()),
        'lambda_min': values.min().item(), 'lambda_max': values.max().item(),
        'trace': w.trace().item(), 'fro': fro, 'spectral_norm': norm,
        'alignment': w.trace().item() / sides if sides else None,
        'alignment_null_sd': (channels * inner) ** -0.5,
        'neg_energy': kept[kept < 0].square().sum().item() / square if square else None,
        'asymmetry': (w - w.T).norm().item() / fro if fro else None,
        'stable_rank': (fro / norm) ** 2 if norm else None,
        'effective_rank': share.log().mul(share).sum().neg().exp().item() if norm else None,
        'nonnormality': (w @ w.T - w.T @ w).norm().item() / fro ** 2 if fro else None,
        'flags': ('zero_weight',) if not norm else ('rank_deficient',) if rank < min(channels, inner) else (),
    }


def _singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Those of left @ right, (n, C') and (C', n): min(n, C') of them, largest first."""
    if left.shape[0] <= left.shape[1]:
        return torch.linalg.svdvals(left @ right)
    left, right = (torch.linalg.qr(factor, mode='r').R for factor in (left, right.T))
    return torch.linalg.svdvals(left @ right.T)  # C'×C'


def block_weights(block: Block, tensors: Mapping[str, Tensor], eps: float = BN_EPS) -> tuple[Tensor, Tensor, Tensor]:
    """W_Z, (C, C'), and W_g, (C', C), of a block, and the factor (C,) to fold into W_Z's rows; float64, on the CPU.

    A reparametrisation is part of the weight and always applied. The factor is γ/√(σ² + ε) of a batch norm after
    W_Z, times the block's gain; its shift does not depend on Z.

    Raises:
        ValueError: a weight that is not floating point, or on the meta device.
    """
    for name in block.names:
        if tensors[name].is_meta:
            raise ValueError(f'{name} is on the meta device: it has a shape and no values')
        if not tensors[name].is_floating_point() and not name.endswith('weight_mask'):
            raise ValueError(f'{name} is {str(tensors[name].dtype).removeprefix("torch.")}, not floating point')

    def wide(name: str) -> Tensor:
        tensor = tensors[name].detach()
        whole: Any = getattr(tensor, 'full_tensor', None)  # of a DTensor, whose import takes a second
        return (whole() if whole else tensor).to_dense().cpu().double()

    if block.basis:
        w_g, w_z = stable_weights(wide(block.w_g), wide(block.basis), wide(block.w_z))
    else:
        w_z, w_g = (weight.weight({name: wide(name) for name in weight.names}) for weight in (block.z, block.g))
    factor = w_z.new_ones(w_z.shape[0])
    if block.norm:
        factor = factor * wide(f'{block.norm}.weight') * (wide(f'{block.norm}.running_var') + eps).rsqrt()
    if block.scale:
        factor = factor * wide(block.scale).flatten()
    return w_z, w_g, factor


def measure(block: Block, tensors: Mapping[str, Tensor], top: int | None = TOP, fold: bool = True,
            eps: float = BN_EPS) -> Spectrum:
    """The spectrum of one block from its tensors, folded where `fold` says so and there is something to fold."""
    w_z, w_g, factor = block_weights(block, tensors, eps)
    channels, inner = w_z.shape
    identity = {name: getattr(block, name) for name in (
        'stage', 'index', 'name', 'keys', 'naming', 'formulation', 'symmetric')}

    def record(w_z: Tensor) -> Spectrum:
        found = Spectrum(**identity, C=channels, C_inner=inner, folded=False,
                         method='reduced' if 2 * inner < channels else 'dense', **numbers(w_z, w_g, top))
        return found.with_flag('stable') if block.basis else found

    if fold and (block.norm or block.scale):
        return replace(record(factor[:, None] * w_z), folded=True, raw=record(w_z))
    return record(w_z)


def spectrum(model_or_state_dict: nn.Module | Mapping[str, Tensor], top: int | None = TOP, fold: bool = True,
             eps: float | None = None, key_map: str | None = None) -> list[Spectrum]:
    """The spectrum of every nonlocal block of a model or a state dict, on whatever device, at any time of training.

    Weights are those that the module computes with, whatever they are made of, and however the network is wrapped. What
    is left out is said in a warning.

    Args:
        model_or_state_dict: any module or state dict with blocks that `timm_nonlocal.checkpoints.layouts` knows.
        top: how many eigenvalues to count signs among; None for all.
        fold: multiply a batch norm or gain after W_Z into it.
        eps: of that batch norm; None takes the module's own, and 1e-5 for a state dict.
        key_map: how blocks are named where no known layout fits, as `checkpoints.layouts.parse_key_map` takes it.

    Returns:
        One record a block in natural order of their names, none where there is no block.
        `pandas.DataFrame(record.to_dict() for record in …)` makes a table of them.

    Raises:
        ValueError: a weight that is not floating point, a top below 1, or a key_map of another form.

    Example:
        >>> from timm_nonlocal import NonlocalStage, spectrum
        >>> records = spectrum(NonlocalStage(64, k=2))
        >>> [(record.index, record.formulation, record.n_neg, record.n_pos) for record in records]  # C' of each sign
        [(0, 'proposed', 32, 32), (1, 'proposed', 32, 32)]
    """
    if top is not None:
        positive('top', top)
    model = model_or_state_dict if isinstance(model_or_state_dict, nn.Module) else None
    state = model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else model_or_state_dict
    norms = {name: module.eps for name, module in model.named_modules() if hasattr(module, 'eps')
             } if model is not None else {}
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    patterns = parse_key_map(key_map) if key_map else None
    found = _found(tensors, patterns)
    if model is not None and (asked := _asked(model, found)):
        for layer, weight in asked.items():
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f'{layer}.')}
            tensors[f'{layer}.weight'] = weight
        found = _found(tensors, patterns)
    for warning in found.warnings:
        warnings.warn(warning, stacklevel=2)
    return [measure(block if model is None else _told(block, model), tensors, top, fold,
                    norms.get(block.norm, BN_EPS) if eps is None else eps) for block in found.blocks]


def _told(block: Block, model: nn.Module) -> Block:
    """The block, and what the module around it says where its names do not tell."""
    if block.formulation != 'unknown':
        return block
    kinds = (recorder.formulation(module) for name, module in recorder.nonlocal_modules(model).items()
             if not name or block.w_g.startswith(f'{name}.'))
    return block.told(next(kinds, None))


def _found(tensors: Mapping[str, Tensor], key_map: dict[str, re.Pattern] | None) -> Found:
    return find({name: tuple(tensor.shape) for name, tensor in tensors.items()}, key_map)


def _asked(model: nn.Module, found: Found) -> dict[str, Tensor]:
    """Weights of layers whose tensors do not tell them, or only half: of two parametrisations one may hold nothing."""
    stacked = (name for name, module in model.named_modules()
               if is_parametrized(module, 'weight') and len(module.parametrizations.weight) > 1)
    weights = {name: own_weight(model, name) for name in (*found.unread, *stacked)}
    return {name: weight for name, weight in weights.items() if weight is not None}
