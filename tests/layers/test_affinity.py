"""The kernels against their formulas, entry by entry, in float64."""

import pytest
import torch

from timm_nonlocal.layers.affinity import AFFINITIES, Affinity, Concatenation, affinity_class

M, D = 7, 6


def embedded(name: str, symmetric: bool = False) -> tuple[Affinity, torch.Tensor, torch.Tensor]:
    q = torch.randn(2, M, D, dtype=torch.float64)
    k = q if symmetric else torch.randn(2, M, D, dtype=torch.float64)
    return affinity_class(name)(D, symmetric, dtype=torch.float64), q, k


@pytest.mark.parametrize('name', AFFINITIES)
def test_equals_its_formula(name: str) -> None:
    affinity, q, k = embedded(name)
    a = affinity(q, k).expand(2, M, M)
    for b in range(2):
        for i in range(M):
            products = torch.stack([q[b, i] @ k[b, j] for j in range(M)])
            if name in ('gaussian', 'embedded_gaussian'):
                row = (products / D ** 0.5).exp()
                row = row / row.sum()
            elif name == 'dot_product':
                row = products / M
            elif name == 'positive_dot_product':
                row = torch.stack([1 + q[b, i].clamp(min=0) @ k[b, j].clamp(min=0) / D ** 0.5 for j in range(M)])
                row = row / row.sum()
            elif name == 'concatenation':
                pairs = torch.stack([torch.cat([q[b, i], k[b, j]]) for j in range(M)])
                assert isinstance(affinity, Concatenation)
                row = (pairs @ affinity.weight.flatten()).clamp(min=0) / M
            else:
                row = torch.full((M,), 1 / M, dtype=torch.float64) if name == 'uniform' else torch.eye(M)[i]
            torch.testing.assert_close(a[b, i], row.double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize('name', AFFINITIES)
def test_difference_is_the_sum_over_j(name: str) -> None:
    affinity, q, k = embedded(name)
    a, z = affinity(q, k), torch.randn(2, M, 5, dtype=torch.float64)
    full = a.expand(2, M, M)
    expected = torch.stack([sum(full[:, i, j, None] * (z[:, j] - z[:, i]) for j in range(M)) for i in range(M)], 1)
    torch.testing.assert_close(affinity.difference(a, z), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize('name', [name for name, kind in AFFINITIES.items() if kind.normalize == 'row_sum'])
def test_rows_are_distributions(name: str) -> None:
    affinity, q, k = embedded(name)
    a = affinity(3 * q, k)
    assert a.min() >= 0
    torch.testing.assert_close(a.sum(-1), torch.ones_like(a.sum(-1)), rtol=0, atol=1e-14)


@pytest.mark.parametrize('name', ['embedded_gaussian', 'gaussian', 'positive_dot_product', 'uniform', 'identity'])
def test_symmetric_kernel_is_reversible_with_real_spectrum(name: str) -> None:
    """K symmetric: diag(d) A is symmetric, and A has real eigenvalues in [-1, 1]."""
    affinity, q, k = embedded(name, symmetric=True)
    a = affinity(q, k).expand(2, M, M)
    if 'gaussian' in name:
        kernel = (q @ q.transpose(1, 2) / D ** 0.5).exp()
    elif name == 'positive_dot_product':
        kernel = 1 + q.relu() @ q.relu().transpose(1, 2) / D ** 0.5
    else:
        kernel = a
    d = kernel.sum(-1, keepdim=True)
    torch.testing.assert_close(d * a, (d * a).transpose(1, 2), rtol=1e-12, atol=1e-12)
    values = torch.linalg.eigvals(a)
    assert values.imag.abs().max() < 1e-12
    assert values.real.abs().max() < 1 + 1e-12


@pytest.mark.parametrize('name', ['dot_product', 'concatenation'])
def test_symmetric_unnormalised_kernels_are_symmetric(name: str) -> None:
    affinity, q, k = embedded(name, symmetric=True)
    a = affinity(q, k)
    torch.testing.assert_close(a, a.transpose(1, 2), rtol=0, atol=1e-14)


def test_row_sum_of_a_signed_kernel_is_refused_with_a_reason() -> None:
    with pytest.raises(ValueError, match="takes both signs.*use normalize='positions'"):
        affinity_class('dot_product')(D, normalize='row_sum')
    with pytest.raises(ValueError, match="only its row sum keeps it finite.*use normalize='row_sum'"):
        affinity_class('gaussian')(D, normalize='positions')
    with pytest.raises(ValueError, match="one of 'row_sum' and 'positions'"):
        affinity_class('uniform')(D, normalize='rows')


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'cosine' is unknown: use one of embedded_gaussian, "):
        affinity_class('cosine')


def test_scale_multiplies_the_inner_product() -> None:
    q = torch.randn(1, M, D, dtype=torch.float64)
    torch.testing.assert_close(affinity_class('gaussian')(D, scale=2.0)(q, q), torch.softmax(2 * q @ q.mT, -1))
    torch.testing.assert_close(affinity_class('dot_product')(D, scale=2.0)(q, q), 2 * q @ q.mT / M)


@pytest.mark.parametrize('name', AFFINITIES)
def test_operator_applies_like_the_matrix(name: str) -> None:
    """Values and gradients of both sums."""
    affinity, q, k = embedded(name)
    q, k, z = (x.requires_grad_() for x in (q, k, torch.randn(2, M, 5, dtype=torch.float64)))
    a, right = affinity.operator(q, k)
    for apply in (affinity.aggregate, affinity.difference):
        results = apply(affinity(q, k), z), apply(a, z, right)
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(result.square().sum(), (q, k, z), retain_graph=True, allow_unused=True)
                     for result in results]
        for pair in zip(*gradients, strict=True):
            if None not in pair:
                torch.testing.assert_close(*pair, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('name', ['dot_product', 'positive_dot_product', 'uniform', 'identity'])
def test_operator_is_thin(name: str) -> None:
    affinity, q, k = embedded(name)
    assert all(part.numel() <= 2 * M * (D + 1) for part in affinity.operator(q, k) if part is not None)


def test_positive_dot_product_takes_features_that_are_all_negative() -> None:
    affinity, q, k = embedded('positive_dot_product')
    torch.testing.assert_close(affinity(-q.abs(), k), torch.full((2, M, M), 1 / M, dtype=torch.float64))
    with pytest.raises(ValueError, match='scale=-1.0 makes the kernel negative: use a scale of at least 0'):
        affinity_class('positive_dot_product')(D, scale=-1.0)
