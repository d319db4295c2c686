"""Accuracy against float64, on inputs drawn anew each time."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from timm_nonlocal import NonlocalBlock, NonlocalStage
from timm_nonlocal.ops.products import ProductBackend
from timm_nonlocal.ops.reference import original_block, proposed_stage

__all__ = ['TOLERANCE', 'backend_written_out', 'bound', 'checks', 'draw_operands', 'errors', 'outputs', 'reference',
           'relative', 'run_backend', 'written_out']

Tensors = tuple[Tensor, ...]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def relative(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖ for b in float64."""
    return ((a.double() - b).norm() / b.norm()).item()


def outputs(module: nn.Module, x: Tensor, dz: Tensor) -> Tensors:
    """Z, dX and the gradient of all weights as one vector."""
    x = x.detach().requires_grad_()
    z = module(x)
    dx, *dw = torch.autograd.grad(z, [x, *module.parameters()], dz.to(z.dtype))
    return z.detach(), dx, torch.cat([w.flatten() for w in dw])


def written_out(module: NonlocalBlock | NonlocalStage) -> nn.Module:
    """The same module on the plain path."""
    module = copy.deepcopy(module)
    module.merged = False
    return module


class Equation(nn.Module):
    """A block or a stage by `timm_nonlocal.ops.reference`, in float64."""

    def __init__(self, module: NonlocalBlock | NonlocalStage):
        super().__init__()
        self.module = copy.deepcopy(module).double()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        a, module = self.module.relate(tokens), self.module
        if isinstance(module, NonlocalBlock):
            z = original_block(tokens, a, module.g.weight, module.z.weight)
        else:
            w_g, w_z = ([getattr(sub_block, name).weight for sub_block in module.sub_blocks] for name in ('g', 'z'))
            z = proposed_stage(tokens, a, w_g, w_z)[-1]
        return z.transpose(1, 2).reshape(x.shape)


def reference(module: NonlocalBlock | NonlocalStage, x: Tensor, dz: Tensor) -> Tensors:
    """The same by the equations in float64."""
    return outputs(Equation(module), x.double(), dz.double())


def errors(got: Iterable[Tensor], expected: Iterable[Tensor]) -> list[float]:
    """The relative error of every output; infinite where it is not finite."""
    return [relative(a, b) if a.isfinite().all() else math.inf for a, b in zip(got, expected, strict=True)]


def bound(dtype: torch.dtype, plain: Iterable[Tensor], expected: Iterable[Tensor]) -> list[float]:
    """What every output's error may be: the tolerance, or in bfloat16 1.3 times the error of A written out."""
    most = 1.3 if dtype == torch.bfloat16 else 0.0
    return [max(TOLERANCE[dtype], most * error) for error in errors(plain, expected)]


def backend_written_out(projected: Tensor, t: Tensor, dh: Tensor, *, dim: int, inner: int, scale: float,
                        formulation: str = 'proposed', dtype: torch.dtype = torch.float64) -> Tensors:
    """H, dQ, dK and dG⁰ from the definition in `timm_nonlocal.ops.products`, by products in a dtype."""
    q, k, g = (z.detach().to(dtype).requires_grad_() for z in projected.split((dim, dim, dh.shape[2]), dim=2))
    t, dh = t.to(dtype), dh.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    a, h = torch.softmax(scale * (q @ k.transpose(1, 2)).to(wide), dim=-1).to(dtype), list[Tensor]()
    for n in range(0, g.shape[2], inner):
        g_n = g[:, :, n:n + inner]
        if n:
            g_n = g_n + torch.cat(h, dim=2) @ t[n:n + inner, :n].T
        h.append(a @ g_n - g_n if formulation == 'proposed' else a @ g_n)
    whole = torch.cat(h, dim=2)
    return whole.detach(), *torch.autograd.grad(whole, (q, k, g), dh)


def run_backend(kind: Callable[..., Any], projected: Tensor, t: Tensor, dh: Tensor, *, dim: int, inner: int,
                scale: float, formulation: str = 'proposed') -> Tensors:
    """The same by a backend. Every output starts as NaN."""
    widths = dim, dim, dh.shape[2]
    backend = kind(projected, projected.shape[1], inner, scale, formulation)
    projected, dh, t = projected.to(backend.dtype, copy=True), dh.to(backend.dtype, copy=True), t.to(backend.dtype)
    gradient = torch.full_like(projected, float('nan'))
    h = projected.new_full((*dh.shape[:2], backend.halves * dh.shape[2]), float('nan'))
    row_stats = projected.new_full((*dh.shape[:2], backend.stats_per_row), float('nan'), dtype=torch.float32)
    backend.forward(*projected.split(widths, dim=2), h, row_stats, t)
    backend.backward(*projected.split(widths, dim=2), h, row_stats, t, dh, *gradient.split(widths, dim=2))
    return h[:, :, :dh.shape[2]], *gradient.split(widths, dim=2)


def draw_operands(dtype: torch.dtype, device: torch.device | str, *, images: int, positions: int, dim: int, inner: int,
                  k: int, logits: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """Q, K and G⁰ side by side, (b, M, 2 D + k C'), T, dH, and the scale that gives the largest logit its size."""
    projected = torch.randn(images, positions, 2 * dim + k * inner, device=device).to(dtype)
    t = (torch.randn(k * inner, k * inner, device=device) / (2 * inner ** 0.5)).to(dtype)
    dh = torch.randn(images, positions, k * inner, device=device).to(dtype)
    q, keys, _ = projected.double().split((dim, dim, k * inner), dim=2)
    return projected, t, dh, logits / (q @ keys.transpose(1, 2)).abs().max().item()


def checks(device: torch.device, backends: list[type[Any]]) -> list[dict[str, Any]]:
    """Rows of what was checked, the largest relative error among the outputs, and the tolerance."""
    found = []

    def add(what: str, dtype: torch.dtype, got: Tensors, plain: Tensors, expected: Tensors) -> None:
        error, tolerance = max(zip(errors(got, expected), bound(dtype, plain, expected), strict=True),
                               key=lambda pair: pair[0] / pair[1])
        found.append({'what': f'{what}, {str(dtype).removeprefix("torch.")}', 'error': error, 'tolerance': tolerance,
                      'right': error <= tolerance})

    for dtype in (torch.float32, torch.bfloat16):
        for shape, k in (((2, 64, 32, 32), 5), ((3, 64, 7, 11), 2), ((1, 64, 56, 56), 1)):
            x = torch.randn(shape, device=device).to(dtype)
            dz = torch.randn_like(x)
            for make in (NonlocalStage(64, k), NonlocalStage(64, k, recompute=True), NonlocalBlock(64)):
                module = make.to(device, dtype)
                name = type(module).__name__ + ' recomputed' * getattr(module, 'recompute', False)
                add(f'{name}, k = {k}, M = {shape[2] * shape[3]}', dtype, outputs(module, x, dz),
                    outputs(written_out(module), x, dz), reference(module, x, dz))
        for backend in backends:
            if backend is not ProductBackend and dtype == torch.float32:
                continue
            for positions, logits in ((1024, 100.0), (333, 100.0), (200, 5.0)):
                *operands, scale = draw_operands(
                    dtype, device, images=2, positions=positions, dim=32, inner=32, k=3, logits=logits)
                sizes: dict[str, Any] = dict(dim=32, inner=32, scale=scale)
                add(f'{backend.__name__}, logits to {logits:g}, M = {positions}', dtype,
                    run_backend(backend, *operands, **sizes),
                    *(backend_written_out(*operands, dtype=kind, **sizes) for kind in (dtype, torch.float64)))
    return found
