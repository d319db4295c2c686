"""Eq. (1) and eq. (8) as properties, in float64 on random inputs."""

from typing import Any

import pytest
import torch

from timm_nonlocal import NonlocalBlock, NonlocalBlocks, NonlocalStage
from timm_nonlocal.layers.affinity import AFFINITIES
from timm_nonlocal.layers.blocks import INITS

C, H, W = 8, 4, 3
M = H * W
STOCHASTIC = [name for name, kind in AFFINITIES.items() if kind.normalize == 'row_sum']
GRID = pytest.mark.parametrize('affinity', AFFINITIES)


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, C, H, W, dtype=torch.float64)


def stage(k: int = 3, **kwargs: Any) -> NonlocalStage:
    return NonlocalStage(C, k, dtype=torch.float64, **kwargs)


def affinity_of(module: NonlocalStage | NonlocalBlock, x: torch.Tensor) -> torch.Tensor:
    """A(X), (B, M, M)."""
    a = module.relate(x.flatten(2).transpose(1, 2))
    return a.expand(len(x), M, M)


@GRID
@pytest.mark.parametrize('symmetric', [False, True])
def test_block_equals_the_double_loop(affinity: str, symmetric: bool) -> None:
    """Eq. (1) with i and j written out."""
    block, x = NonlocalBlock(C, affinity=affinity, symmetric=symmetric, dtype=torch.float64), image(1)
    a, tokens, z = affinity_of(block, x)[0], x.flatten(2)[0].T, block(x).flatten(2)[0].T
    w_z, w_g = block.z.weight, block.g.weight
    for i in range(M):
        expected = tokens[i] + w_z @ sum(a[i, j] * (w_g @ tokens[j]) for j in range(M))
        torch.testing.assert_close(z[i], expected, rtol=0, atol=1e-13)


@GRID
@pytest.mark.parametrize('symmetric', [False, True])
@pytest.mark.parametrize('merged', [False, True])
def test_stage_equals_the_double_loop(affinity: str, symmetric: bool, merged: bool) -> None:
    """Eq. (8) with n, i and j written out: W acts on Σⱼ Aᵢⱼ (Zⱼ - Zᵢ), A stays that of X."""
    module, x = stage(affinity=affinity, symmetric=symmetric, merged=merged), image(1)
    a, z = affinity_of(module, x)[0], x.flatten(2)[0].T
    for sub_block in module.sub_blocks:
        w = sub_block.z.weight @ sub_block.g.weight
        z = torch.stack([z[i] + w @ sum(a[i, j] * (z[j] - z[i]) for j in range(M)) for i in range(M)])
    torch.testing.assert_close(module(x).flatten(2)[0].T, z, rtol=0, atol=1e-12)


@GRID
@pytest.mark.parametrize('k', range(1, 7))
def test_merged_equals_plain(affinity: str, k: int) -> None:
    """Values and every gradient."""
    module, x = stage(k, affinity=affinity), image().requires_grad_()
    results = []
    for module.merged in (True, False):
        y = module(x)
        wanted = [x, *module.parameters()]
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted, allow_unused=affinity == 'identity')])
    for merged, plain in zip(*results, strict=True):
        if plain is not None or merged is not None:
            torch.testing.assert_close(merged, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('merged', [False, True])
@GRID
def test_constants_are_fixed_points_of_the_stage(affinity: str, merged: bool) -> None:
    x = torch.randn(2, C, 1, 1, dtype=torch.float64).expand(2, C, H, W)
    torch.testing.assert_close(stage(merged=merged, affinity=affinity)(x), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize('affinity', STOCHASTIC)
@pytest.mark.parametrize('symmetric', [False, True])
def test_weighted_mean_is_conserved(affinity: str, symmetric: bool) -> None:
    """πᵀZⁿ = πᵀX for the left Perron vector π of A, whatever W is."""
    module, x = stage(affinity=affinity, symmetric=symmetric), image(1)
    values, vectors = torch.linalg.eig(affinity_of(module, x)[0].T)
    pi = vectors[:, values.real.argmax()].real
    before, after = pi @ x.flatten(2)[0].T, pi @ module(x).flatten(2)[0].T
    torch.testing.assert_close(after / pi.sum(), before / pi.sum(), rtol=0, atol=1e-12)


def test_the_original_block_keeps_neither() -> None:
    block = NonlocalBlock(C, dtype=torch.float64)
    constant = torch.randn(1, C, 1, 1, dtype=torch.float64).expand(1, C, H, W)
    assert (block(constant) - constant).abs().max() > 0.01


@pytest.mark.parametrize('affinity', STOCHASTIC)
def test_a_bias_on_g_changes_nothing(affinity: str) -> None:
    module, x = stage(affinity=affinity, merged=False), image()
    before = module(x)
    for sub_block in module.sub_blocks:
        sub_block.g.bias = torch.nn.Parameter(torch.randn(C // 2, dtype=torch.float64))
    # eq. (8) with g(Z) = W_g Z + b inside the difference: Σⱼ Aᵢⱼ (g(Zⱼ) - g(Zᵢ))
    a, z = affinity_of(module, x), x.flatten(2).transpose(1, 2)
    for sub_block in module.sub_blocks:
        z = z + sub_block.z(module.affinity.difference(a, sub_block.g(z)))
    torch.testing.assert_close(z.transpose(1, 2).reshape(x.shape), before, rtol=0, atol=1e-12)


def test_identity_affinity_gives_the_identity() -> None:
    x = image()
    torch.testing.assert_close(stage(affinity='identity')(x), x, rtol=0, atol=1e-14)


def test_uniform_affinity_gives_a_centred_convolution() -> None:
    """One sub-block: Z = X - W (X - mean X), a 1×1 convolution of the centred features."""
    module, x = stage(1, affinity='uniform'), image()
    sub_block = module.sub_blocks[0]
    w = (sub_block.z.weight @ sub_block.g.weight)[:, :, None, None]
    centred = x - x.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(module(x), x - torch.nn.functional.conv2d(centred, w), rtol=0, atol=1e-12)


@pytest.mark.parametrize('module', [
    NonlocalBlock(4, dtype=torch.float64),
    NonlocalBlocks(4, 2, dtype=torch.float64),
    NonlocalStage(4, 3, dtype=torch.float64),
    NonlocalStage(4, 3, merged=False, dtype=torch.float64),
    NonlocalStage(4, 2, affinity='dot_product', dtype=torch.float64),
    NonlocalStage(4, 2, affinity='concatenation', dtype=torch.float64),
    NonlocalStage(4, 2, affinity='gaussian', dtype=torch.float64),
    NonlocalStage(4, 2, affinity='uniform', dtype=torch.float64),
    NonlocalStage(4, 2, symmetric=True, dtype=torch.float64),
], ids=lambda module: f'{type(module).__name__}-{sum(p.numel() for p in module.parameters())}')
def test_gradcheck(module: torch.nn.Module) -> None:
    x = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*module.named_parameters(), strict=True)

    def apply(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(apply, (x, *weights))


@pytest.mark.parametrize('k', [1, 2, 4, 6])
def test_number_of_parameters(k: int) -> None:
    """A bias-free original block has 8,192 at C = 64, a stage 4,096 + 4,096 k."""
    assert sum(p.numel() for p in NonlocalBlocks(64, k).parameters()) == 8192 * k
    assert sum(p.numel() for p in NonlocalStage(64, k).parameters()) == 4096 + 4096 * k


def test_state_dict_keys() -> None:
    assert list(NonlocalStage(C, 2).state_dict()) == [
        'theta.weight', 'phi.weight', 'sub_blocks.0.g.weight', 'sub_blocks.0.z.weight',
        'sub_blocks.1.g.weight', 'sub_blocks.1.z.weight']
    assert list(NonlocalBlocks(C, 1).state_dict()) == [
        f'sub_blocks.0.{name}.weight' for name in ('theta', 'phi', 'g', 'z')]
    for affinity, own in (('gaussian', 0), ('uniform', 0), ('identity', 0), ('concatenation', 3)):
        keys = list(NonlocalStage(C, 1, affinity=affinity).state_dict())
        assert keys[own:] == ['sub_blocks.0.g.weight', 'sub_blocks.0.z.weight']


@pytest.mark.parametrize('init', INITS)
def test_initialisations(init: str) -> None:
    torch.manual_seed(1)
    module = NonlocalStage(256, 1, init=init)
    g, z = module.sub_blocks[0].g.weight, module.sub_blocks[0].z.weight  # (128, 256), (256, 128)
    expected = {
        'xavier_normal': ((2 / 384) ** 0.5,) * 2, 'kaiming_normal': ((2 / 128) ** 0.5, (2 / 256) ** 0.5),
        'torch': ((1 / 768) ** 0.5, (1 / 384) ** 0.5), 'normal': (0.01, 0.01), 'zero': ((2 / 384) ** 0.5, 0.0),
    }[init]
    assert (g.std().item(), z.std().item()) == pytest.approx(expected, rel=0.03)


def test_zero_init_is_the_identity_bit_for_bit() -> None:
    x = torch.randn(2, C, H, W)
    for module in (NonlocalStage(C, 3, init='zero'), NonlocalBlocks(C, 3, init='zero')):
        assert torch.equal(module(x), x)


@pytest.mark.parametrize('shape', [(3, C, 10), (1, C, 2, 3, 4), (2, C, 1, 1)])
def test_any_grid(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert NonlocalStage(C, 2)(x).shape == NonlocalBlocks(C, 2)(x).shape == x.shape


@GRID
@pytest.mark.parametrize('merged', [False, True])
@pytest.mark.parametrize('make', [NonlocalBlocks, NonlocalStage])
@pytest.mark.parametrize('shape', [(0, C, H, W), (2, C, 0, W), (0, C, 0, 0)])
def test_no_image_or_no_position(affinity: str, merged: bool, make: type[NonlocalBlocks] | type[NonlocalStage],
                                 shape: tuple[int, ...]) -> None:
    module, x = make(C, 2, affinity=affinity, merged=merged), torch.randn(shape, requires_grad=True)
    z = module(x)
    z.sum().backward()
    assert x.grad is not None and z.shape == x.grad.shape == x.shape
    assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize('make', [NonlocalBlocks, NonlocalStage])
@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(dim=C, k=0), 'k=0: it must be a whole number of at least 1'),
    (dict(dim=C, k=1.5), 'k=1.5: it must be a whole number'),
    (dict(dim=7), 'dim=7 is odd.*use an even dim, or give inner_dim'),
    (dict(dim=0), 'dim=0: it must be a whole number of at least 1'),
    (dict(dim=C, inner_dim=0), 'inner_dim=0'),
    (dict(dim=C, affinity='cosine'), "affinity='cosine' is unknown"),
    (dict(dim=C, init='ones'), "init='ones' is unknown: use one of xavier_normal"),
])
def test_bad_arguments(make: type[NonlocalBlocks] | type[NonlocalStage], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_odd_channels_with_inner_dim() -> None:
    x = torch.randn(1, 7, 2, 2)
    assert NonlocalStage(7, 2, inner_dim=3)(x).shape == x.shape
