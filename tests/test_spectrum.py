"""Spectra against numpy and against what the theory says of them."""

import numpy as np
import pytest
import timm
import torch

from timm_nonlocal import NonlocalStage
from timm_nonlocal.spectrum import spectra, symmetric_eigenvalues


@pytest.mark.parametrize(('channels', 'inner'), [(64, 32), (128, 64), (64, 16), (6, 5), (2, 1)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_equals_numpys_dense_eigenvalues(channels, inner, dtype):
    w_z, w_g = torch.randn(channels, inner).to(dtype), torch.randn(inner, channels).to(dtype)
    w = w_z.double().numpy() @ w_g.double().numpy()
    expected = np.linalg.eigvalsh((w + w.T) / 2)
    values = symmetric_eigenvalues(w_z, w_g)
    assert values.dtype == torch.float64
    np.testing.assert_allclose(np.sort(values.numpy()), expected, rtol=0, atol=1e-12 * channels)
    assert (values.abs().diff() <= 0).all()


@pytest.mark.parametrize('inner', [1, 5, 16, 32])
def test_inertia_of_generic_weights(inner):
    """Exactly C' positive and C' negative eigenvalues, and C - 2 C' zeros, for any weights in general position."""
    for _ in range(20):
        values = symmetric_eigenvalues(torch.randn(64, inner), torch.randn(inner, 64))
        signs = values[values.abs() > 1e-10 * values.abs().max()].sign()
        assert (signs > 0).sum() == (signs < 0).sum() == inner


def test_tied_weights_have_one_sign():
    """W_Z = W_gᵀ gives W = W_gᵀ W_g ≥ 0 and W_Z = -W_gᵀ the opposite: the count is not constant."""
    stage = NonlocalStage(64, 2)
    first, second = stage.sub_blocks
    first.z.weight.data = first.g.weight.data.T.clone()
    second.z.weight.data = -second.g.weight.data.T.clone()
    positive, negative = spectra(stage.state_dict())
    assert (positive.positive, positive.negative) == (32, 0)
    assert (negative.positive, negative.negative) == (0, 32)
    assert positive.trace == pytest.approx(first.g.weight.double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize(('name', 'stages'), [
    ('preresnet20_nl_proposed_k5', [('layer1.nl', 'proposed', 5, 64)]),
    ('preresnet20_nl_original_k3', [('layer1.nl', 'original', 3, 64)]),
    ('preresnet56_nl_original_k1x3', [(f'layer{i}.nl', 'original', 1, 32 * 2 ** i) for i in (1, 2, 3)]),
    ('preresnet20', []),
])
def test_finds_every_block_in_order(name, stages):
    records = spectra(timm.create_model(name).state_dict())
    assert [(r.stage, r.kind, r.index, r.channels) for r in records] == [
        (stage, kind, index, channels) for stage, kind, k, channels in stages for index in range(k)]
    for record in records:
        assert record.inner_channels == record.channels // 2
        assert record.negative + record.positive == len(record.top) == 32
        assert record.trace == pytest.approx(sum(record.eigenvalues))
        assert record.norm == pytest.approx(sum(value ** 2 for value in record.eigenvalues) ** 0.5)


def test_ten_or_more_blocks_are_in_number_order():
    records = spectra(NonlocalStage(4, 12).state_dict())
    assert [record.index for record in records] == list(range(12))


def test_convolutional_weights_count_as_matrices():
    weights = NonlocalStage(8, 1).state_dict()
    as_conv = {key: value[:, :, None, None] for key, value in weights.items()}
    assert spectra(as_conv) == spectra(weights)


def test_weights_that_have_no_spectrum():
    weights = NonlocalStage(8, 1).state_dict()
    with pytest.raises(ValueError, match='not its transpose'):
        spectra({**weights, 'sub_blocks.0.z.weight': torch.zeros(8, 3)})
    with pytest.raises(ValueError, match='not finite'):
        spectra({**weights, 'sub_blocks.0.z.weight': torch.full((8, 4), float('nan'))})
