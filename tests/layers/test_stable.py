"""Stable stages: the bound on their weights, no growth through any depth, and that nothing is lost by it."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_nonlocal import NonlocalStage, insert, spectrum
from timm_nonlocal.analysis.dynamics import stationary
from timm_nonlocal.analysis.recorder import trajectory
from timm_nonlocal.analysis.spectra import block_weights, measure
from timm_nonlocal.analysis.stability import stability
from timm_nonlocal.checkpoints.layouts import find
from timm_nonlocal.layers.stable import contraction
from timm_nonlocal.models.preresnet import PreResNet

C, INNER = 16, 8


def stage(k: int = 3, **options: Any) -> NonlocalStage:
    return NonlocalStage(C, k, symmetric=True, stable=True, **options)


def excess(module: NonlocalStage) -> float:
    """By how much the largest ‖I - W‖₂ of the sub-blocks is above 1."""
    weights = [block.z.weight.double() @ block.g.weight.double() for block in module.sub_blocks]
    return max(torch.linalg.matrix_norm(torch.eye(C) - w, 2).item() for w in weights) - 1


def kappas(module: NonlocalStage) -> list[float]:
    """κ of every sub-block as inspect has it from the state dict."""
    tensors = module.state_dict()
    blocks = find({name: tuple(tensor.shape) for name, tensor in tensors.items()}).blocks
    weights = [block_weights(block, tensors)[:2] for block in blocks]
    each, whole = stability(weights, 'proposed', symmetric=True)
    assert len(each) == len(module.sub_blocks)
    return [found['kappa'] for found in each] + [whole['kappa']]


@given(st.floats(-3, 5), st.integers(0, 10 ** 6))
@settings(max_examples=30, deadline=None)
def test_no_values_of_the_parameters_break_the_bound(magnitude: float, seed: int) -> None:
    torch.manual_seed(seed)
    module = stage(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if 'sub_blocks' in name:
                parameter.copy_(10 ** magnitude * torch.randn_like(parameter))
    assert max(kappas(module)) <= 1 + 1e-6


def test_training_does_not_break_it() -> None:
    module = stage(4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9, weight_decay=5e-4)
    x = torch.randn(4, C, 6, 6)
    first = None
    for _ in range(30):
        optimizer.zero_grad()
        loss = (module(x) - 3 * x).square().mean()  # what it is not allowed to learn
        loss.backward()
        optimizer.step()
        first = loss.item() if first is None else first
    assert loss.item() != first and excess(module) < 1e-5 and max(kappas(module)) <= 1 + 1e-6


def test_every_such_weight_can_be_represented() -> None:
    for _ in range(5):
        u = torch.linalg.qr(torch.randn(C, INNER, dtype=torch.float64)).Q
        q = torch.randn(INNER, INNER, dtype=torch.float64)
        q = q / torch.linalg.matrix_norm(q, 2) * torch.rand(1, dtype=torch.float64)
        block = stage(1).double().sub_blocks[0]
        block.g.weight = u.T
        block.z.weight = u @ (torch.eye(INNER) - q)
        torch.testing.assert_close(block.z.weight @ block.g.weight, u @ (torch.eye(INNER) - q) @ u.T)


def test_contraction_leaves_small_matrices_and_takes_huge_ones() -> None:
    small = torch.randn(INNER, INNER) / 100
    assert torch.equal(contraction(small), small)
    assert torch.linalg.matrix_norm(contraction(1e30 * torch.randn(INNER, INNER)), 2) <= 1 + 1e-6


@pytest.mark.parametrize('affinity', ['embedded_gaussian', 'gaussian', 'positive_dot_product', 'uniform', 'identity'])
def test_64_sub_blocks_never_amplify(affinity: str) -> None:
    module = stage(64, affinity=affinity).double()
    x = torch.randn(1, 36, C, dtype=torch.float64)
    a, z = trajectory(module, x)
    pi = stationary(a.expand(1, 36, 36)[0])
    energy = torch.stack([(pi * step[0].square().sum(1)).sum() for step in z])
    mean = torch.stack([pi @ step[0] for step in z])
    assert (energy.diff() <= 1e-12 * energy[0]).all()
    torch.testing.assert_close(mean, mean[:1].expand_as(mean))
    grid = x.transpose(1, 2).reshape(1, C, 6, 6)
    torch.testing.assert_close(module(grid).flatten(2).transpose(1, 2), z[-1])


def test_64_sub_blocks_in_bfloat16() -> None:
    module, x = stage(64), torch.randn(2, C, 6, 6)
    with torch.autocast('cpu', torch.bfloat16):
        w_g = module.sub_blocks[0].g.weight
        assert w_g.dtype == torch.float32  # bfloat16 would be off by 4e-3
        torch.testing.assert_close(w_g.double() @ w_g.double().T, torch.eye(INNER).double(), atol=1e-5, rtol=0)
        z = module(x)
    assert z.norm() < 1.1 * x.norm()


def test_gradients_through_64_sub_blocks() -> None:
    """They stay of the size they came with; those of the unconstrained stage explode."""
    ratios = []
    for module in (stage(64), NonlocalStage(C, 64, symmetric=True)):
        x = torch.randn(1, C, 6, 6, dtype=torch.float64, requires_grad=True)
        z = module.double()(x)
        dz = torch.randn_like(z)
        ratios.append((torch.autograd.grad(z, x, dz)[0].norm() / dz.norm()).item())
    assert ratios[0] < 10 and ratios[1] > 1e3 * ratios[0], ratios


def test_a_pretrained_network_keeps_its_predictions_and_learns_from_the_first_step() -> None:
    model = PreResNet(20).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    insert(model, 'layer1.1', k=2, symmetric=True, stable=True)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    model(x).square().sum().backward()
    moved = {name: p.grad.abs().max().item() for name, p in model.named_parameters()
             if '.z.' in name and p.grad is not None}
    assert len(moved) == 2 and min(moved.values()) > 0, moved


def test_copies_and_states_go_on() -> None:
    module, x = stage(), torch.randn(2, C, 4, 4)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert all(tensor.is_contiguous() for tensor in module.state_dict().values())  # as safetensors needs it
    other = stage()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    torch.testing.assert_close(module(x), copy.deepcopy(module).requires_grad_(False)(x))
    other.merged = False
    torch.testing.assert_close(other(x), module(x), rtol=1e-4, atol=1e-5)


def test_export() -> None:
    module, x = stage().eval(), torch.randn(2, C, 4, 4)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x), rtol=1e-4, atol=1e-5)


def test_the_spectrum_of_the_state_dict_is_that_of_the_weights() -> None:
    module = stage()
    for block, found in zip(module.sub_blocks, spectrum(module), strict=True):
        w = (block.z.weight @ block.g.weight).double()
        assert 'stable' in found.flags and found.formulation == 'proposed' and found.symmetric
        assert found.trace == pytest.approx(w.trace().item(), abs=1e-5, rel=0)
        assert abs(found.lambda_max - torch.linalg.eigvalsh((w + w.T) / 2).max().item()) < 1e-5
    tensors = module.state_dict()
    tensors['sub_blocks.1.z.parametrizations.weight.original'][0, 0] = torch.nan
    blocks = find({name: tuple(tensor.shape) for name, tensor in tensors.items()}).blocks
    assert ['nonfinite' in measure(block, tensors).flags for block in blocks] == [False, True, False]


@pytest.mark.parametrize(('options', 'message'), [
    (dict(symmetric=False), 'use symmetric=True too'),
    (dict(affinity='dot_product'), "'dot_product'.*use 'embedded_gaussian'"),
    (dict(affinity='concatenation'), 'guarantees nothing'),
    (dict(scale=-1.0), 'use one of at least 0'),
])
def test_kernels_without_the_guarantee_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NonlocalStage(C, **{'symmetric': True, 'stable': True, **options})


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_in_16_bits_as_in_32(dtype: torch.dtype) -> None:
    """Made there, or brought there: torch has no linear algebra of 16 bits."""
    module, x = stage(init='xavier_normal'), torch.randn(2, C, 4, 4)
    expected = module(x)
    torch.testing.assert_close(module.to(dtype)(x.to(dtype)).float(), expected, rtol=0.05, atol=0.05)
    made = stage(dtype=dtype)
    assert {tensor.dtype for tensor in made.state_dict().values()} == {dtype}
    made(x.to(dtype)).float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in made.parameters())


def test_made_under_autocast_and_on_meta() -> None:
    with torch.autocast('cpu', torch.bfloat16):
        module, x = stage(init='xavier_normal'), torch.randn(2, C, 4, 4)
    empty = stage(device='meta')
    assert empty(x.to('meta')).shape == x.shape
    filled = empty.to_empty(device='cpu')
    filled.load_state_dict(module.state_dict())
    assert torch.equal(filled(x), module(x))
