"""What a layer's weight is where another tensor is stored: a reparametrisation is computed, or refused by its name."""

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..layers.stable import BASIS

__all__ = ['PLAIN', 'STABLE', 'Stored', 'own_weight']

_P = 'parametrizations.weight'
PLAIN = ('weight',)
STABLE = ((f'{_P}.original', BASIS), (f'{_P}.original',))  # of W_g and W_Z, which `layers.stable` makes together
_HARMLESS = re.compile(r'bias(?:_\w+)?|parametrizations\.bias\..*|sv0|_extra_state')
_WEIGHT = re.compile(  # of all names below a module those that say that it has a weight of its own
    r'\w*weight\w*(?:\..*)?|parametrizations\.weight\..*|lora_\w+(?:\..*)?|zero_point|_packed_params.*|'
    r'(?:base_layer|original_module|modules_to_save)\..*')


def _normalised(w: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
    """w over uᵀ w v, with v from u by one step where it is not kept."""
    w, u = w.flatten(1), u.flatten()
    if v is not None:
        return w / (u @ w @ v.flatten())
    return w / (w @ nn.functional.normalize(u @ w, dim=0)).norm()


def _directed(v: Tensor, g: Tensor) -> Tensor:
    """v at the lengths g, each over the dimensions in which g has one entry."""
    if g.ndim not in (0, v.ndim):
        raise RuntimeError('g has other dimensions than v')
    return v * (g / torch.linalg.vector_norm(v, dim=[d for d in range(v.ndim) if g.ndim == 0 or g.shape[d] == 1],
                                             keepdim=True))


FORMS: dict[tuple[str, ...], Callable[..., Tensor]] = {  # the first tensor has the weight's shape
    PLAIN: lambda w: w,
    ('weight', 'u0'): _normalised,  # BigGAN-PyTorch
    ('weight_orig', 'weight_mask'): torch.mul,  # torch's prune
    ('weight_orig', 'weight_u'): _normalised,
    ('weight_orig', 'weight_u', 'weight_v'): _normalised,  # its spectral_norm, old and new
    ('weight_bar', 'weight_u', 'weight_v'): _normalised,  # before torch had one
    (f'{_P}.original', f'{_P}.0._u', f'{_P}.0._v'): _normalised,
    ('weight_v', 'weight_g'): _directed,  # its weight_norm, old and new
    (f'{_P}.original1', f'{_P}.original0'): _directed,
}
_BY_NAMES = {frozenset(form): form for form in (*FORMS, *STABLE)}


@dataclass(frozen=True)
class Stored:
    """A layer's weight in a state dict.

    Attributes:
        layer: the module's name.
        names: of the tensors it is made of, in the order of `form`; of all tensors in question where that is None.
        form: a key of `FORMS`, or one of `STABLE`; None where it is not known how the weight is made.
        hinted: whether the names say that the layer has a weight at all.
    """

    layer: str
    names: tuple[str, ...]
    form: tuple[str, ...] | None = PLAIN
    hinted: bool = True

    @classmethod
    def of(cls, layer: str, below: Iterable[str]) -> 'Stored':
        """From the tensors' names below the layer, relative to it."""
        rests = [rest for rest in below if not _HARMLESS.fullmatch(rest)]
        form = _BY_NAMES.get(frozenset(rests))
        return cls(layer, tuple(f'{layer}.{rest}' for rest in form or rests), form,
                   any(map(_WEIGHT.fullmatch, rests)))

    def weight(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight as a matrix, from tensors by name."""
        return FORMS[self.form or PLAIN](*(tensors[name] for name in self.names)).flatten(1)

    def fits(self, shapes: Mapping[str, tuple[int, ...] | None]) -> bool:
        """Whether the tensors' shapes allow the weight to be made."""
        known = {name: shape for name in self.names if (shape := shapes[name]) is not None}
        if self.form in STABLE or len(known) < len(self.names) or len(known) == 1:
            return True
        try:
            made = self.weight({name: torch.empty(shape, device='meta') for name, shape in known.items()})
        except (RuntimeError, IndexError):
            return False
        return made.shape[:2] == known[self.names[0]][:2]


@torch.no_grad()
def own_weight(model: nn.Module, name: str) -> Tensor | None:
    """The weight (C_out, C_in) that a layer computes with in eval mode: a copy of it is asked. None where it has none.

    It is the parametrised or quantised weight, or else the linear map that the layer is, such as one with an adapter.
    """
    try:
        layer = copy.deepcopy(model.get_submodule(name)).eval()
        weight: Any = getattr(layer, 'weight', None)
        if is_parametrized(layer, 'weight'):
            return weight.flatten(1)
        if callable(weight):  # of torch's quantised layers
            return weight().dequantize().flatten(1)
        sizes = (getattr(part, name, None) for part in layer.modules() for name in ('in_features', 'in_channels'))
        channels = next(size for size in sizes if isinstance(size, int))
        kernels = (part.kernel_size for part in layer.modules() if isinstance(part, nn.modules.conv._ConvNd))
        like = next((tensor for tensor in layer.parameters() if tensor.is_floating_point()), torch.empty(0))
        x = torch.eye(channels + 1, channels, device=like.device, dtype=like.dtype)  # the last row is zero
        y = layer(x.reshape(*x.shape, *(1,) * len(next(kernels, ())))).flatten(1)
        return (y[:-1] - y[-1]).T
    except Exception:  # whatever a stranger's layer does
        return None
