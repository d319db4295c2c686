"""What is compared: k nonlocal steps of C channels with C' = C/2."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.non_local_attn import NonLocalAttn
from torch import Tensor, nn

from timm_nonlocal import NonlocalBlocks, NonlocalStage

__all__ = ['CHANNELS', 'CONTENDERS', 'MMCV', 'Case', 'Step', 'Worker']

CHANNELS = 64


@dataclass(frozen=True)
class Case:
    """Images, side of the grid (M = side²), sub-blocks, dtype: bfloat16 is autocast's, with float32 weights."""

    images: int
    side: int
    k: int
    dtype: str

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """X and dZ, random and channels last."""
        shape, dtype = (self.images, CHANNELS, self.side, self.side), getattr(torch, self.dtype)
        x, dz = (torch.randn(shape, device=device).to(dtype).to(memory_format=torch.channels_last) for _ in range(2))
        return x.requires_grad_(), dz

    def __str__(self) -> str:
        return f'B = {self.images}, M = {self.side ** 2}, k = {self.k}, {self.dtype}'


class ByProducts(NonlocalStage):
    """The stage by matrix products also where Triton runs."""

    def _fused(self, x: Tensor, backend: str | None = 'products') -> Tensor:
        return super()._fused(x, backend)


class Formula(NonlocalStage):
    """The merged stage as tensor formulas that autograd differentiates: k products with a written-out A."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return x + self._merged(tokens).transpose(1, 2).reshape(x.shape)


class ByAttention(NonlocalStage):
    """The merged stage with `scaled_dot_product_attention` for every sub-block, which makes A anew each time."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k = (z.unsqueeze(1) for z in self.embed(tokens))
        w_g, w_z = ([getattr(sub_block, name).weight for sub_block in self.sub_blocks] for name in ('g', 'z'))
        g, h = list(F.linear(tokens, torch.cat(w_g)).chunk(len(w_g), dim=2)), []
        for n in range(len(g)):
            mixed = F.scaled_dot_product_attention(q, k, g[n].unsqueeze(1), scale=self.affinity.scale)
            h.append(mixed.squeeze(1) - g[n])
            for m in range(n + 1, len(g)):
                g[m] = g[m] + F.linear(h[n], w_g[m] @ w_z[n])
        return x + F.linear(torch.cat(h, dim=2), torch.cat(w_z, dim=1)).transpose(1, 2).reshape(x.shape)


class TimmBlocks(nn.Sequential):
    """timm's block k times, as wide inside as ours."""

    def __init__(self, channels: int, k: int):
        super().__init__(*(NonLocalAttn(channels, rd_ratio=1 / 2) for _ in range(k)))


CONTENDERS: dict[str, Callable[[int, int], nn.Module]] = {
    'ours': NonlocalStage,
    'ours, recompute': lambda channels, k: NonlocalStage(channels, k, recompute=True),
    'ours, matrix products': ByProducts,
    'plain path': lambda channels, k: NonlocalStage(channels, k, merged=False),
    'merged formula, autograd': Formula,
    'SDPA k times': ByAttention,
    'timm NonLocalAttn k times': TimmBlocks,
    'ours, original blocks': NonlocalBlocks,
}
MMCV = 'mmcv NonLocal2d k times'


class Step:
    """One contender in one case, ready to run."""

    def __init__(self, name: str, case: Case, device: torch.device):
        self.module = CONTENDERS[name](CHANNELS, case.k).to(device).to(memory_format=torch.channels_last)
        self.x, self.dz = case.inputs(device)
        self.wanted = [self.x, *self.module.parameters()]
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == 'bfloat16')

    def forward(self) -> Tensor:
        with self.autocast, torch.no_grad():
            return self.module(self.x)

    def both(self) -> list[Tensor]:
        with self.autocast:
            z = self.module(self.x)
        return [z, *torch.autograd.grad(z, self.wanted, self.dz.to(z.dtype))]


class Worker:
    """mmcv's block in a process of its own, whose environment has it; one step at a time, on request.

    Raises:
        OSError: that Python cannot be started, or has no mmcv.
    """

    def __init__(self, python: str, case: Case, threads: int):
        script = Path(__file__).with_name('mmcv_worker.py')
        options = json.dumps({**asdict(case), 'channels': CHANNELS, 'threads': threads})
        self.process = subprocess.Popen([python, str(script), options], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=sys.stderr, text=True)
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout
        if self._ask('ready') != 'ready':
            raise OSError(f'{python} does not run mmcv: pip install mmcv-lite in its environment')

    def _ask(self, what: str) -> Any:
        try:
            self.requests.write(f'{what}\n')
            self.requests.flush()
            return json.loads(self.answers.readline())
        except (OSError, ValueError):
            return None

    def ask(self, what: str) -> float:
        """Milliseconds of a 'forward' or of 'both', or the bytes of 'memory'."""
        answer = self._ask(what)
        if answer is None:
            raise OSError('the process with mmcv has ended')
        return answer

    def close(self) -> None:
        self.requests.close()
        self.process.wait()
