"""Gains, energies and Markov numbers against dense algebra on grids small enough to write every operator out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_nonlocal.analysis import dynamics
from timm_nonlocal.analysis.spectra import restricted
from timm_nonlocal.analysis.stability import stability

M, C, INNER = 24, 6, 3
EYE = torch.eye(M, dtype=torch.float64)


def kernel(kind: str) -> torch.Tensor:
    """A (M, M): of a positive definite kernel, of any symmetric nonnegative one, or of θ ≠ φ."""
    x = torch.randn(M, 4, dtype=torch.float64)
    k = {'positive definite': torch.exp(x @ x.T), 'symmetric': torch.rand(M, M, dtype=torch.float64),
         'general': torch.exp(x @ torch.randn(4, 4, dtype=torch.float64) @ x.T)}[kind]
    if kind == 'symmetric':
        k = k + k.T - 1.9 * torch.diag(k.diagonal())  # little on the diagonal: eigenvalues below 0
    return k / k.sum(1, keepdim=True)


def pairs(count: int, scale: float = 0.4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(scale * torch.randn(C, INNER, dtype=torch.float64), torch.randn(INNER, C, dtype=torch.float64))
            for _ in range(count)]


def dense_gain(a: torch.Tensor, pi: torch.Tensor, weights: list[tuple[torch.Tensor, torch.Tensor]],
               formulation: str) -> float:
    """The 2-norm of all steps as one (M C)×(M C) matrix, in the norm weighted by π."""
    root = pi.sqrt()
    b = root[:, None] * a / root - (EYE if formulation == 'proposed' else 0)
    whole = torch.eye(M * C, dtype=torch.float64)
    for w_z, w_g in weights:
        whole = whole + torch.kron(b, w_z @ w_g) @ whole
    return torch.linalg.matrix_norm(whole, ord=2).item()


@pytest.mark.parametrize('kind', ['positive definite', 'symmetric', 'general'])
@pytest.mark.parametrize('formulation', ['proposed', 'original'])
@pytest.mark.parametrize('count', [1, 3])
def test_amplification_is_the_norm_of_the_written_out_operator(kind: str, formulation: str, count: int) -> None:
    chain, weights = dynamics.markov_chain(kernel(kind)), pairs(count)
    assert chain.reversible == (kind != 'general')
    expected = max(1.0, dense_gain(chain.a, chain.pi, weights, formulation))
    found = dynamics.amplification(chain, weights, formulation, steps=60)
    assert found == pytest.approx(expected, rel=1e-8)
    assert dynamics.amplification(chain, weights, formulation) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize('formulation', ['proposed', 'original'])
def test_kappa_bounds_every_positive_definite_kernel(formulation: str) -> None:
    """With μ ≤ 1 from the weights alone; and what is measured on A comes from below."""
    weights = pairs(3)
    blocks, stage = stability(weights, formulation, symmetric=True)
    assert (stage['mu_max'], stage['mu_basis']) == (1.0, 'bound')
    for _ in range(5):
        chain = dynamics.markov_chain(kernel('positive definite'))
        assert chain.mu_max <= 1 + 1e-12
        for pair, block in zip(weights, blocks, strict=True):
            assert dynamics.amplification(chain, [pair], formulation) <= block['kappa'] * (1 + 1e-9)
        assert dynamics.amplification(chain, weights, formulation) <= stage['kappa'] * (1 + 1e-3)


def test_kappa_of_one_step_is_the_papers_cfl_number() -> None:
    (w_z, w_g), = pairs(1)
    w, eye = w_z @ w_g, torch.eye(C, dtype=torch.float64)
    for mu in (0.3, 1.0, 2.0):
        (block,), stage = stability([(w_z, w_g)], 'proposed', mu_max=mu)
        expected = max(1.0, torch.linalg.matrix_norm(eye - mu * w, ord=2).item())
        assert block['kappa'] == pytest.approx(expected, rel=1e-12) == stage['kappa']
        assert block['constant_gain'] is None and stage['mu_basis'] == 'given'
    (block,), _ = stability([(w_z, w_g)], 'original')
    assert block['constant_gain'] == pytest.approx(torch.linalg.matrix_norm(eye + w, ord=2).item(), rel=1e-12)


def test_reduced_weights_have_the_same_kappa() -> None:
    w_z, w_g = torch.randn(32, 3, dtype=torch.float64), torch.randn(3, 32, dtype=torch.float64)
    left, right = restricted(w_z, w_g)
    assert left.shape == (6, 3)
    for formulation in ('proposed', 'original'):
        assert dynamics.kappa([left @ right], 1.0, formulation)[0] == pytest.approx(
            dynamics.kappa([w_z @ w_g], 1.0, formulation)[0])


@pytest.mark.parametrize('formulation', ['proposed', 'original'])
def test_wide_stages_take_another_way_to_the_same_number(formulation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, chain = pairs(3), dynamics.markov_chain(kernel('positive definite'))
    ws = [w_z @ w_g for w_z, w_g in weights]
    narrow = dynamics.kappa(ws, 1.0, formulation), dynamics.amplification(chain, weights, formulation)
    monkeypatch.setattr(dynamics, 'WIDE', C - 1)
    wide = dynamics.kappa(ws, 1.0, formulation), dynamics.amplification(chain, weights, formulation, steps=60)
    assert wide[0] == pytest.approx(narrow[0], rel=1e-3) and wide[1] == pytest.approx(narrow[1], rel=1e-8)


def test_a_stable_parametrisation_has_kappa_one() -> None:
    """W = τ W_gᵀ W_g with τ ‖W_g‖² ≤ 2/μ_max amplifies nothing; its opposite does, and so does a larger step."""
    w_g = torch.randn(INNER, C, dtype=torch.float64)
    w_g /= torch.linalg.matrix_norm(w_g, ord=2)
    for scale, stable in ((1.9, True), (2.1, False), (-0.1, False)):
        (block,), stage = stability([(scale * w_g.T, w_g)], 'proposed')
        assert (max(block['kappa'], stage['kappa'], block['radius']) < 1 + 1e-12) is stable, scale
        assert (block['outside'] == 0) is stable


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(0.1, 2), st.complex_numbers(max_magnitude=4, allow_nan=False, allow_infinity=False))
def test_cfl_disc(mu: float, value: complex) -> None:
    """Inside the disc of centre and radius 1/μ_max means |1 - μ w| ≤ 1 for all μ up to μ_max."""
    outside, radius = dynamics.cfl(torch.tensor([value], dtype=torch.complex128), mu, 'proposed')
    distance = abs(value - 1 / mu) - 1 / mu
    if abs(distance) > 1e-9:
        assert bool(outside) == (distance > 0)
    grid = max(abs(1 - mu * step / 50 * value) for step in range(51))
    assert radius == pytest.approx(max(1.0, grid), rel=1e-9)


@pytest.mark.parametrize('kind', ['positive definite', 'symmetric', 'general'])
def test_markov_numbers(kind: str) -> None:
    a = kernel(kind)
    chain = dynamics.markov_chain(a)
    assert (chain.pi @ a - chain.pi).abs().max() < 1e-12 and chain.pi.sum() == pytest.approx(1)
    values = torch.linalg.eigvals(a)
    values = values[(values - 1).abs().argsort()][1:]
    found = dynamics.markov(chain)
    assert found['second'] == pytest.approx(values.abs().max().item(), rel=1e-6)
    assert found['mu_max'] == pytest.approx((1 - values).abs().max().item(), rel=1e-6)
    entropy = -(a * a.log()).sum(1)
    assert found['entropy'] == pytest.approx(entropy.mean().item())
    assert 1 <= found['neighbours'] <= M and 1 <= found['hilbert_schmidt'] <= M
    flow = chain.pi[:, None] * a
    assert found['reversibility'] == pytest.approx(((flow - flow.T).norm() / flow.norm()).item(), abs=1e-12)


def test_the_two_controls_as_chains() -> None:
    uniform = dynamics.markov(dynamics.markov_chain(torch.full((M, M), 1 / M, dtype=torch.float64)))
    assert uniform['entropy'] == pytest.approx(math.log(M)) and uniform['neighbours'] == pytest.approx(M)
    assert (uniform['second'], uniform['mu_max']) == pytest.approx((0, 1), abs=1e-9)
    identity = dynamics.markov(dynamics.markov_chain(EYE.clone()))
    assert (identity['entropy'], identity['neighbours'], identity['second']) == pytest.approx((0, 1, 1))
    assert identity['mu_max'] == pytest.approx(0, abs=1e-9)


def test_a_chain_of_two_islands_has_the_stationary_distribution_of_the_uniform_start() -> None:
    a = torch.block_diag(kernel('general')[:8, :8], kernel('general')[:16, :16])
    a = a / a.sum(1, keepdim=True)
    pi = dynamics.stationary(a)
    assert (pi @ a - pi).abs().max() < 1e-9 and pi.min() >= 0
    assert pi[:8].sum().item() == pytest.approx(8 / 24, abs=1e-6)


@pytest.mark.parametrize('kind', ['positive definite', 'general'])
def test_energies_and_the_conserved_mean(kind: str) -> None:
    chain, z = dynamics.markov_chain(kernel(kind)), torch.randn(M, C, dtype=torch.float64)
    found = dynamics.energies(chain.a, chain.pi, z)
    distances = torch.cdist(z, z).square()
    assert found['dirichlet'] == pytest.approx(0.5 * (chain.pi[:, None] * chain.a * distances).sum().item())
    mean = chain.pi @ z
    assert found['variance'] == pytest.approx((chain.pi @ (z - mean).square().sum(1)).item())
    assert found['power'] == pytest.approx(found['variance'] + mean.square().sum().item())
    constant = dynamics.energies(chain.a, chain.pi, torch.ones(M, C, dtype=torch.float64))
    assert constant['dirichlet'] == pytest.approx(0, abs=1e-14) == constant['variance']
    stepped = z + (chain.a @ z - z) @ torch.randn(C, C, dtype=torch.float64).T
    torch.testing.assert_close(chain.pi @ stepped, mean)  # eq. (8) keeps it, whatever W is


def test_diffusion_lowers_what_it_should() -> None:
    """W = I/2: Z ← (Z + A Z)/2 lowers variance and Dirichlet energy; W = -I/2 raises them."""
    chain, z = dynamics.markov_chain(kernel('positive definite')), torch.randn(M, C, dtype=torch.float64)
    before = dynamics.energies(chain.a, chain.pi, z)
    for sign in (1, -1):
        after = dynamics.energies(chain.a, chain.pi, z + sign * 0.5 * (chain.a @ z - z))
        for name in ('dirichlet', 'variance'):
            assert (after[name] < before[name]) is (sign > 0)


def test_ritz_values_of_a_map_with_a_small_invariant_subspace() -> None:
    diagonal = torch.tensor([3.0, -5.0, 1.0, 1.0], dtype=torch.float64)
    values = dynamics.ritz(lambda v: diagonal * v, torch.ones(4, dtype=torch.float64), 10).real.sort().values
    assert values.tolist() == pytest.approx([-5, 1, 3])


def test_a_chain_that_is_not_reversible_where_it_hardly_is() -> None:
    """Sharp attention with θ ≠ φ: the defect sees nothing but the few positions that have nearly all the weight."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        a = (torch.randn(40, 40, generator=generator, dtype=torch.float64) * 3).softmax(1)
        a[0] = 0
        a[0, 0] = 1  # every walk ends there
        c = dynamics.markov_chain(a)
        expected = torch.linalg.eigvals(a).abs().sort().values[-2].item()  # beside the 1 of the constants
        assert c.defect < dynamics.REVERSIBLE and not c.reversible and not c.weighs_all
        assert c.values.abs().max().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('factor', [math.nan, math.inf])
def test_ritz_values_of_what_is_not_finite(factor: float, capfd: pytest.CaptureFixture[str]) -> None:
    """NaN, and not the lines that MKL prints."""
    assert dynamics.ritz(lambda v: factor * v, torch.ones(4, dtype=torch.float64), 3).isnan().all()
    assert capfd.readouterr() == ('', '')
