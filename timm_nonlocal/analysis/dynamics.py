"""What the features do: how far a step of eq. (1) or (8) can amplify them, and how they diffuse under A.

Pure functions of A, W and Z for frozen A, in float64. With A's eigenvalue a = 1 - μ a mode of Z is multiplied by

    I - μ W         in the proposed stage, eq. (8)
    I + (1 - μ) W   in the original block, eq. (1)

For an A that is similar to a symmetric matrix (symmetric nonnegative kernels) these modes are orthogonal in the norm
‖Z‖² = Σ πᵢ |Zᵢ|², π the stationary distribution of A, so that the largest amplification of one step is the largest
‖I - μ W‖₂ over A's μ. That norm is convex in μ and 1 at μ = 0: κ = max(1, ‖I - μ_max W‖₂), the CFL number of the
paper's section 4.4 made exact. Positive definite kernels (the Gaussian with φ = θ) have μ in [0, 1], symmetric
nonnegative ones in [0, 2].

Shapes: A (M, M) with rows that sum to one, Z (M, C), W (C, C).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ['NEGLIGIBLE', 'REVERSIBLE', 'WIDE', 'MarkovChain', 'amplification', 'cfl', 'energies', 'factors', 'gains',
           'kappa', 'markov', 'markov_chain', 'ritz', 'stationary']

WIDE = 256  # channels above which the product of several steps is not formed
NEGLIGIBLE = 1e-8  # of the mean weight: positions that A leaves and hardly returns to
REVERSIBLE = 1e-6  # up to this relative defect of detailed balance A counts as that of a symmetric kernel


def factors(w: Tensor, mu: Tensor, formulation: str) -> Tensor:
    """What one step multiplies the modes by: I - μ W or I + (1 - μ) W. w (C, C), mu (n,); gives (n, C, C)."""
    return torch.eye(len(w), dtype=w.dtype) + _weights(mu, formulation)[:, None, None] * w


def _weights(mu: Tensor, formulation: str) -> Tensor:
    return {'proposed': -mu, 'original': 1 - mu}[formulation]


def _product_norm(ws: Sequence[Tensor], weight: Tensor, steps: int = 24) -> Tensor:
    """‖…‖₂ of the product of I + weight·W, by Lanczos's method, which never forms it."""
    def forth_and_back(v: Tensor) -> Tensor:
        for w in ws:
            v = v + weight * (w @ v)
        for w in reversed(ws):
            v = v + weight * (w.T @ v)
        return v

    start = torch.randn(len(ws[0]), generator=torch.Generator().manual_seed(0), dtype=ws[0].dtype)
    return ritz(forth_and_back, start, steps).real.max().sqrt()


def gains(ws: Sequence[Tensor], mu: Tensor, formulation: str) -> Tensor:
    """‖…‖₂ of the product of `factors` over the steps, for every μ. ws: k of (C, C), mu (n,); gives (n,)."""
    if len(ws) > 1 and len(ws[0]) > WIDE:
        return torch.stack([_product_norm(ws, weight) for weight in _weights(mu, formulation)])
    product = factors(ws[0], mu, formulation)
    for w in ws[1:]:
        product = factors(w, mu, formulation) @ product
    return torch.linalg.eigvalsh(product.mT @ product)[:, -1].sqrt()


def kappa(ws: Sequence[Tensor], mu_max: float, formulation: str) -> tuple[float, float]:
    """The largest amplification of a stage over all μ in [0, mu_max], at least 1, and the μ where it is reached.

    One step: exact, from the ends of the interval. Several: the largest over a grid, refined by golden section; above
    `WIDE` channels the grid is coarser and the norms are Lanczos's.

    Args:
        ws: W of every step, (C, C) or restricted to the range of [W_Z, W_gᵀ] where there is one.
        mu_max: the largest eigenvalue of I - A.
        formulation: 'proposed' or 'original'.
    """
    points, refinements = (129, 24) if len(ws[0]) <= WIDE else (17, 8)
    mu = torch.linspace(0, mu_max, 2 if len(ws) == 1 else points, dtype=torch.float64)
    values = gains(ws, mu, formulation)
    best = int(values.argmax())
    found, where = values[best].item(), mu[best].item()
    if len(ws) > 1:
        low, high = mu[max(best - 1, 0)].item(), mu[min(best + 1, len(mu) - 1)].item()
        for _ in range(refinements):
            inner = torch.tensor([high - 0.618 * (high - low), low + 0.618 * (high - low)], dtype=torch.float64)
            left, right = gains(ws, inner, formulation).tolist()
            value, at = (left, inner[0].item()) if left > right else (right, inner[1].item())
            found, where = max((found, where), (value, at))
            low, high = (low, inner[1].item()) if left > right else (inner[0].item(), high)
    return (found, where) if found > 1 else (1.0, 0.0 if formulation == 'proposed' else 1.0)


def cfl(values: Tensor, mu_max: float, formulation: str) -> tuple[int, float]:
    """How many of W's eigenvalues break the CFL condition for some μ in [0, mu_max], and the asymptotic growth a step.

    Proposed: w is in the closed disc of centre and radius 1/μ_max, |1 - μ_max w| ≤ 1. Original: |1 + (1 - μ) w| ≤ 1 at
    both ends, for μ_max = 1 the disc of centre -1 and radius 1.

    Args:
        values: complex (C',), eigenvalues of W; its further zeros multiply by 1.

    Returns:
        the count, and the largest modulus, at least 1.
    """
    ends = [-mu_max] if formulation == 'proposed' else [1.0, 1.0 - mu_max]
    moduli = torch.stack([(1 + end * values).abs() for end in ends]).amax(0)
    return int((moduli > 1 + 1e-12).sum()), max(1.0, moduli.max().item())


def stationary(a: Tensor) -> Tensor:
    """π with πᵀA = πᵀ and sum one, (M,), from A (M, M): the limit of the lazy chain (I + A)/2 from a uniform start."""
    pi = a.new_full((len(a),), 1 / len(a))
    for _ in range(200):
        last, pi = pi, (pi + pi @ a) / 2
        if (pi - last).abs().sum() < 1e-14:
            return pi / pi.sum()
    lazy = (torch.eye(len(a), dtype=a.dtype) + a) / 2  # it mixes slowly: by squaring, 2⁴⁰ steps
    for _ in range(40):
        lazy = lazy @ lazy
        lazy = lazy / lazy.sum(1, keepdim=True)
    return lazy.mean(0)


def ritz(apply: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """Approximate extreme eigenvalues of a linear map by Arnoldi's method. start (n,); gives complex (≤ steps,).

    NaN where the map gives what is not finite: LAPACK would print lines of its own about it.
    """
    steps = min(steps, len(start))
    basis = start.new_zeros(steps + 1, len(start))
    basis[0] = start / start.norm()
    h = start.new_zeros(steps + 1, steps)
    for j in range(steps):
        v = apply(basis[j])
        size = v.norm()
        if not size.isfinite():
            return start.new_full((1,), torch.nan, dtype=torch.complex128)
        for _ in range(2):  # twice is enough
            overlap = basis[:j + 1] @ v
            h[:j + 1, j] += overlap
            v = v - overlap @ basis[:j + 1]
        h[j + 1, j] = v.norm()
        if h[j + 1, j] <= 1e-12 * size:
            return torch.linalg.eigvals(h[:j + 1, :j + 1])
        basis[j + 1] = v / h[j + 1, j]
    return torch.linalg.eigvals(h[:steps, :steps])


@dataclass(frozen=True)
class MarkovChain:
    """A as the transition matrix of a Markov chain, with what the numbers about it share.

    Attributes:
        a: (M, M), nonnegative, rows that sum to one.
        pi: (M,), the stationary distribution.
        defect: ‖diag(π) A - (diag(π) A)ᵀ‖_F / ‖diag(π) A‖_F, 0 for a symmetric kernel.
        values: A's eigenvalues without the one of the constants, complex: all M - 1 where the chain is reversible, else
            Ritz values, exact at the outside.
    """

    a: Tensor
    pi: Tensor
    defect: float
    values: Tensor

    @property
    def reversible(self) -> bool:
        """Also seen at positions of hardly any weight, to which the defect is blind."""
        s = self.balanced
        return self.defect <= REVERSIBLE and bool((s - s.T).norm() <= REVERSIBLE * s.norm())

    @property
    def weighs_all(self) -> bool:
        """Whether every position counts in the norm weighted by π, without which an amplification says nothing."""
        return bool(self.pi.min() * len(self.pi) >= NEGLIGIBLE)

    @property
    def balanced(self) -> Tensor:
        """diag(√π) A diag(1/√π): symmetric where the chain is reversible; its 2-norm is A's norm weighted by π."""
        root = self.pi.clamp_min(1e-300).sqrt()
        return root[:, None] * self.a / root

    @property
    def mu_max(self) -> float:
        """The largest |1 - a| over the eigenvalues a."""
        return (1 - self.values).abs().max().item()


def markov_chain(a: Tensor, steps: int = 96) -> MarkovChain:
    """The chain of A, (M, M), float64, M ≥ 2, nonnegative, whose rows sum to one up to rounding, which is taken out.

    Args:
        steps: how many Ritz values to take where the chain is not reversible.
    """
    a = a / a.sum(1, keepdim=True)
    pi = stationary(a)
    flow = pi[:, None] * a
    bare = MarkovChain(a, pi, ((flow - flow.T).norm() / flow.norm()).item(), a)
    if bare.reversible:
        root = pi.sqrt()
        s = bare.balanced - root[:, None] * root  # the constants' eigenvalue becomes a zero
        values = torch.linalg.eigvalsh((s + s.T) / 2)
        values = values[values.abs().argsort()][1:].to(torch.complex128)
    else:
        start = torch.randn(len(a), generator=torch.Generator().manual_seed(0), dtype=a.dtype)
        values = ritz(lambda v: a @ v - (pi @ v), start, min(steps, len(a) - 1))
    return replace(bare, values=values)


def markov(c: MarkovChain) -> dict[str, float]:
    """A as a Markov chain (section 4.3), in numbers.

    Returns:
        min_entry: 0 or above.
        entropy: mean over rows of -Σⱼ Aᵢⱼ log Aᵢⱼ, in nats.
        neighbours: mean over rows of exp(entropy), how many positions a row looks at, from 1 to M.
        diagonal: mean Aᵢᵢ.
        second: |λ₂|, the modulus of the second eigenvalue; 1 - |λ₂| is the mixing rate.
        mu_max: `MarkovChain.mu_max`.
        reversibility: `MarkovChain.defect`.
        hilbert_schmidt: ‖A‖_F², from 1 to M: eq. (25) on this grid.
    """
    entropy = torch.special.entr(c.a).sum(1)
    return {
        'min_entry': c.a.min().item(), 'entropy': entropy.mean().item(), 'neighbours': entropy.exp().mean().item(),
        'diagonal': c.a.diagonal().mean().item(), 'second': c.values.abs().max().item(), 'mu_max': c.mu_max,
        'reversibility': c.defect, 'hilbert_schmidt': c.a.square().sum().item(),
    }


def energies(a: Tensor, pi: Tensor, z: Tensor) -> dict[str, float]:
    """How much of Z there is and how rough it is, all weighted by π.

    Args:
        a: (M, M).
        pi: (M,), the weights of the positions.
        z: (M, C).

    Returns:
        dirichlet: ½ Σᵢⱼ πᵢ Aᵢⱼ |Zᵢ - Zⱼ|², 0 on constants.
        variance: Σᵢ πᵢ |Zᵢ - z̄|² with z̄ = Σᵢ πᵢ Zᵢ.
        power: Σᵢ πᵢ |Zᵢ|², the variance and |z̄|².
    """
    mean = pi @ z
    centred = z - mean
    flow = pi[:, None] * a  # (M, M)
    square = centred.square().sum(1)
    dirichlet = (flow.sum(1) @ square + flow.sum(0) @ square) / 2 - (flow @ centred * centred).sum()
    variance = pi @ square
    return {'dirichlet': dirichlet.item(), 'variance': variance.item(), 'power': (variance + mean @ mean).item()}


def amplification(c: MarkovChain, factors_of_w: Sequence[tuple[Tensor, Tensor]], formulation: str,
                  steps: int = 20) -> float:
    """The largest ratio of ‖Z‖ after the steps to ‖Z‖ before, in the norm weighted by π, at least 1.

    From A's own modes where the chain is reversible; else, and for several steps of more than `WIDE` channels, by
    Lanczos's method, from below.

    Args:
        c: of the frozen A.
        factors_of_w: W_Z (C, C') and W_g (C', C) of every step.
        formulation: 'proposed' or 'original'.
        steps: of Lanczos's method.
    """
    if c.reversible and (len(factors_of_w) == 1 or len(factors_of_w[0][0]) <= WIDE):
        mu = torch.cat([c.pi.new_zeros(1), 1 - c.values.real])
        mu = torch.stack([mu.min(), mu.max()]) if len(factors_of_w) == 1 else mu  # convex
        return max(1.0, gains([w_z @ w_g for w_z, w_g in factors_of_w], mu, formulation).max().item())
    b = c.balanced
    if formulation == 'proposed':
        b = b - torch.eye(len(b), dtype=b.dtype)

    def forth_and_back(flat: Tensor) -> Tensor:
        y = flat.view(len(b), -1)
        for w_z, w_g in factors_of_w:
            y = y + b @ (y @ w_g.T) @ w_z.T
        for w_z, w_g in reversed(factors_of_w):
            y = y + b.T @ (y @ w_z) @ w_g
        return y.flatten()

    size = len(b) * len(factors_of_w[0][0])
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=b.dtype)
    return max(1.0, ritz(forth_and_back, start, steps).real.max().item() ** 0.5)
