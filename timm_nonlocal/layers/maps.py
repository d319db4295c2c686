"""The maps W_Z W_g of a block or sub-block, how their weights are drawn, and the widths that they may have."""

from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.types import Device

__all__ = ['INITS', 'SubBlock', 'half', 'linear', 'positive']

INITS = ('xavier_normal', 'kaiming_normal', 'torch', 'normal', 'zero')


def positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f'{name}={value!r}: it must be a whole number of at least 1')
    return value


def half(dim: int) -> int:
    if positive('dim', dim) % 2:
        raise ValueError(f"dim={dim} is odd, so that C' = dim/2 is not whole: use an even dim, or give inner_dim")
    return dim // 2


def linear(dim: int, out_dim: int, init: str, dd: dict[str, Any]) -> nn.Linear:
    """A bias-free map whose weight is drawn by one of INITS ('zero' is for W_Z alone)."""
    layer = nn.Linear(dim, out_dim, bias=False, **dd)  # torch's own draw
    if init == 'xavier_normal':
        nn.init.xavier_normal_(layer.weight)
    elif init == 'kaiming_normal':
        nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
    elif init == 'normal':
        nn.init.normal_(layer.weight, std=0.01)
    elif init == 'zero':
        nn.init.zeros_(layer.weight)
    elif init != 'torch':
        raise ValueError(f'init={init!r} is unknown: use one of {", ".join(INITS)}')
    return layer


class SubBlock(nn.Module):
    """The weight W = W_Z W_g of one block or sub-block: `g` is W_g, (C', C), and `z` is W_Z, (C, C')."""

    def __init__(self, dim: int, inner_dim: int, init: str = 'xavier_normal', device: Device = None,
                 dtype: Optional[torch.dtype] = None):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.g = linear(dim, inner_dim, 'xavier_normal' if init == 'zero' else init, dd)
        self.z = linear(inner_dim, dim, init, dd)

    def forward(self, x: Tensor) -> Tensor:
        """X Wᵀ, (B, M, C) to (B, M, C)."""
        return self.z(self.g(x))
