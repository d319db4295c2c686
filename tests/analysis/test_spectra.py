"""Spectra against numpy and against what the theory says of them."""

import csv
import importlib
import io
import json

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import timm_nonlocal
from timm_nonlocal import NonlocalStage, spectrum
from timm_nonlocal.analysis.random_weights import DRAWS_KEPT, KEPT, USUAL, deviation, negative_of_random_weights
from timm_nonlocal.analysis.spectra import numbers, restricted, symmetric_eigenvalues

SEEDED = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def weight_pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """W_Z, (C, C'), and W_g, (C', C), of random sizes, scales, dtypes and ranks."""
    channels, inner = draw(st.integers(1, 40)), draw(st.integers(1, 24))
    generator = np.random.default_rng(draw(st.integers(0, 2 ** 32)))
    w_z, w_g = generator.standard_normal((channels, inner)), generator.standard_normal((inner, channels))
    w_z *= 10.0 ** draw(st.integers(-6, 6))
    relation = draw(st.sampled_from(['free', 'tied', 'opposed', 'low rank', 'zero']))
    if relation in ('tied', 'opposed'):
        w_z = w_g.T * (1 if relation == 'tied' else -1)
    elif relation == 'low rank':
        w_z[:, inner // 2:] = 0
    elif relation == 'zero':
        w_z[:] = 0
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    return torch.from_numpy(w_z).to(dtype), torch.from_numpy(w_g).to(dtype)


@SEEDED
@given(weight_pairs())
def test_equals_numpys_dense_algebra(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    w_z, w_g = pair
    channels, _inner = w_z.shape
    w = w_z.double().numpy() @ w_g.double().numpy()
    sigma, expected = np.linalg.svd(w, compute_uv=False), np.linalg.eigvalsh((w + w.T) / 2)
    scale = sigma[0]
    close = dict(rtol=1e-9, atol=1e-13 * channels * scale)

    values = symmetric_eigenvalues(w_z, w_g)
    assert values.dtype == torch.float64 and (values.abs().diff() <= 0).all()
    np.testing.assert_allclose(np.sort(values.numpy()), expected, **close)

    found = numbers(w_z, w_g, top=5)
    assert len(found['eigenvalues']) + found['zeros'] == channels
    assert found['n_neg'] + found['n_pos'] == len(found['eigenvalues'])
    assert found['neg_top'] + found['pos_top'] == found['top_k'] == min(5, len(found['eigenvalues']))
    np.testing.assert_allclose([found['lambda_min'], found['lambda_max']], expected[[0, -1]], **close)
    np.testing.assert_allclose(found['trace'], np.trace(w), **close)
    np.testing.assert_allclose([found['fro'], found['spectral_norm']], [np.linalg.norm(w), scale], **close)
    if scale == 0:
        assert found['flags'] == ('zero_weight',)
        assert found['alignment'] is found['neg_energy'] is found['stable_rank'] is found['nonnormality'] is None
        return
    fro, share = np.linalg.norm(w), sigma[sigma > 0] / sigma.sum()
    assert found['alignment'] == pytest.approx(
        np.trace(w) / np.linalg.norm(w_z.double()) / np.linalg.norm(w_g.double()), abs=1e-9)
    assert found['neg_energy'] == pytest.approx((expected[expected < 0] ** 2).sum() / (expected ** 2).sum(), abs=1e-9)
    assert found['asymmetry'] == pytest.approx(np.linalg.norm(w - w.T) / fro, abs=1e-9)
    assert found['stable_rank'] == pytest.approx((fro / scale) ** 2, rel=1e-9)
    assert found['effective_rank'] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
    assert found['nonnormality'] == pytest.approx(np.linalg.norm(w @ w.T - w.T @ w) / fro ** 2, abs=1e-9)


@SEEDED
@given(weight_pairs())
def test_reduced_problem_is_of_the_smaller_size(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    w_z, w_g = (weight.double() for weight in pair)
    left, right = restricted(w_z, w_g)
    assert left.shape == right.T.shape == (min(len(w_z), 2 * len(w_g)), len(w_g))


@pytest.mark.parametrize('inner', [1, 5, 16, 32])
def test_inertia_of_generic_weights(inner: int) -> None:
    """Exactly C' positive and C' negative eigenvalues, and C - 2 C' zeros, for any weights in general position."""
    for _ in range(20):
        found = numbers(torch.randn(64, inner), torch.randn(inner, 64))
        assert (found['n_neg'], found['n_pos'], found['zeros']) == (inner, inner, 64 - 2 * inner)
        assert found['flags'] == ()


def test_tied_weights_have_one_sign() -> None:
    """W_Z = W_gᵀ gives W = W_gᵀ W_g ≥ 0 and W_Z = -W_gᵀ the opposite: the count is not constant."""
    stage = NonlocalStage(64, 2)
    first, second = stage.sub_blocks
    first.z.weight.data = first.g.weight.data.T.clone()
    second.z.weight.data = -second.g.weight.data.T.clone()
    positive, negative = spectrum(stage)
    assert (positive.pos_top, positive.neg_top, positive.n_pos, positive.zeros) == (32, 0, 32, 32)
    assert (negative.pos_top, negative.neg_top, negative.neg_energy) == (0, 32, 1.0)
    assert positive.alignment == pytest.approx(1) and negative.alignment == pytest.approx(-1)
    assert (positive.lambda_min, negative.lambda_max) == pytest.approx((0, 0), abs=1e-12)
    assert positive.nonnormality == pytest.approx(0, abs=1e-12) and positive.asymmetry == pytest.approx(0, abs=1e-12)
    assert positive.trace == pytest.approx(first.g.weight.double().square().sum().item(), rel=1e-6)


def test_expectation_of_random_weights() -> None:
    """16.0 ± 0.6 at C = 64, C' = 32, against draws of its own; exactly C' where everything is counted."""
    mean, deviation = negative_of_random_weights(64, 32, 32)
    counts = torch.tensor([float(numbers(torch.randn(64, 32), torch.randn(32, 64))['neg_top']) for _ in range(400)])
    assert mean == 16 and round(deviation, 1) == 0.6
    assert counts.mean().item() == pytest.approx(mean, abs=0.15)
    assert counts.std().item() == pytest.approx(deviation, abs=0.1)
    for shape in ((128, 64), (2048, 256), (64, 64), (512, 64), (48, 24)):
        mean, deviation = negative_of_random_weights(*shape, 32)
        assert mean == 16 and 0.4 < deviation < 0.75, shape
    assert negative_of_random_weights(64, 8, 32) == negative_of_random_weights(64, 8, None) == (8, 0)


def test_kept_deviations_are_those_that_are_drawn() -> None:
    kept = json.loads(KEPT.read_text())
    assert kept['draws'] == DRAWS_KEPT and list(kept['deviations']) == [','.join(map(str, shape)) for shape in USUAL]
    for shape, value in zip(USUAL, kept['deviations'].values(), strict=True):
        assert deviation(*shape) == pytest.approx(value, abs=0.06)  # 500 draws against 20,000
    assert negative_of_random_weights(2048, 256, 32) == (16, kept['deviations']['256,32,32'])


def test_the_random_stream_of_the_caller_is_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    negative_of_random_weights(96, 31, 7)
    assert torch.equal(torch.rand(3), expected)


def test_rank_deficient_weights_are_flagged() -> None:
    w_z = torch.randn(64, 32)
    w_z[:, 5] = 0
    found = numbers(w_z, torch.randn(32, 64))
    assert found['flags'] == ('rank_deficient',)
    assert (found['n_neg'], found['n_pos']) == (31, 31)


@pytest.mark.parametrize(('name', 'stages'), [
    ('preresnet20_nl_proposed_k5', [('layer1.nl', 'proposed', 5, 64)]),
    ('preresnet20_nl_original_k3', [('layer1.nl', 'original', 3, 64)]),
    ('preresnet56_nl_original_k1x3', [(f'layer{i}.nl', 'original', 1, 32 * 2 ** i) for i in (1, 2, 3)]),
    ('preresnet20', []),
])
def test_finds_every_block_in_order(name: str, stages: list[tuple[str, str, int, int]]) -> None:
    records = spectrum(timm.create_model(name))
    assert [(r.stage, r.formulation, r.index, r.C) for r in records] == [
        (stage, kind, index, channels) for stage, kind, k, channels in stages for index in range(k)]
    for record in records:
        assert record.C_inner == record.C // 2 and record.naming == 'timm_nonlocal' and record.symmetric is False
        assert record.neg_top is not None and record.pos_top is not None
        assert record.neg_top + record.pos_top == len(record.top) == 32
        assert record.trace == pytest.approx(sum(record.eigenvalues))


def test_ten_or_more_blocks_are_in_number_order() -> None:
    assert [record.index for record in spectrum(NonlocalStage(4, 12))] == list(range(12))


def test_the_function_is_not_in_the_way_of_the_module() -> None:
    assert timm_nonlocal.spectrum is importlib.import_module('timm_nonlocal.analysis.spectra').spectrum
    from timm_nonlocal.analysis.spectra import TOP
    assert TOP == 32


def test_model_and_state_dict_say_the_same_during_training() -> None:
    model = timm.create_model('preresnet20_nl_proposed_k2')
    before = spectrum(model)
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = spectrum(model)
    assert after == spectrum(model.state_dict()) != before
    assert all(parameter.requires_grad for parameter in model.parameters()) and model.training
    compiled = {f'_orig_mod.module.{name}': tensor for name, tensor in model.state_dict().items()}
    found = spectrum(compiled)
    assert [record.eigenvalues for record in found] == [record.eigenvalues for record in after]
    assert (found[0].stage, found[0].keys['w_z']) == ('layer1.nl', '_orig_mod.module.layer1.nl.sub_blocks.0.z.weight')


def test_top_and_records_as_dicts() -> None:
    model = timm.create_model('preresnet20_nl_proposed_k1')
    (record,), (whole,), (few,) = spectrum(model), spectrum(model, top=None), spectrum(model, top=3)
    assert (whole.top_k, whole.neg_top, whole.neg_top_null, whole.neg_top_null_sd) == (64, 32, 32, 0)
    assert few.top == record.eigenvalues[:3]
    text = json.dumps(record.to_dict(), allow_nan=False)
    assert json.loads(text)['eigenvalues'] == list(record.eigenvalues)
    rows = io.StringIO()
    csv.DictWriter(rows, fieldnames=list(record.to_dict())).writerow(record.to_dict())
    assert rows.getvalue().startswith('layer1.nl,0,')
    flat = [value for name, value in record.to_dict().items() if name not in ('keys', 'eigenvalues', 'flags')]
    assert not any(isinstance(value, (list, dict, torch.Tensor)) for value in flat)  # one table row


def test_weights_that_are_not_finite_have_no_numbers() -> None:
    weights = NonlocalStage(8, 1).state_dict()
    for value in (float('nan'), float('inf')):
        (record,) = spectrum({**weights, 'sub_blocks.0.z.weight': torch.full((8, 4), value)})
        assert record.flags == ('nonfinite',) and record.eigenvalues == () and record.neg_top is None
        json.dumps(record.to_dict(), allow_nan=False)


def test_weights_of_another_dtype_are_refused() -> None:
    weights = NonlocalStage(8, 1).state_dict()
    with pytest.raises(ValueError, match=r'sub_blocks\.0\.z\.weight is int8, not floating point'):
        spectrum({**weights, 'sub_blocks.0.z.weight': torch.ones(8, 4, dtype=torch.int8)})
    half = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items()}
    assert spectrum(half)[0].flags == ()


@pytest.mark.parametrize('top', [0, -1])
def test_nothing_to_count(top: int) -> None:
    with pytest.raises(ValueError, match=f'top={top}: it must be a whole number of at least 1'):
        spectrum(NonlocalStage(8), top=top)
