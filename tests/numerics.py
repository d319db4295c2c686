"""How the tests of the stage's operator judge accuracy."""

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def relative(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖ for b in float64."""
    return ((a.double() - b).norm() / b.norm()).item()


def chain_in_float64(q: Tensor, k: Tensor, g: Tensor, t: Tensor, inner: int, scale: float, dh: Tensor):
    """H, dQ, dK and dG⁰ of `ops_products`' chain, from its definition."""
    q, k, g = (z.detach().double().requires_grad_() for z in (q, k, g))
    a, h = torch.softmax(scale * q @ k.transpose(1, 2), dim=-1), []
    for n in range(0, g.shape[2], inner):
        g_n = g[:, :, n:n + inner]
        if n:
            g_n = g_n + torch.cat(h, dim=2) @ t[n:n + inner, :n].double().T
        h.append(a @ g_n - g_n)
    h = torch.cat(h, dim=2)
    return h.detach(), *torch.autograd.grad(h, (q, k, g), dh.double())
