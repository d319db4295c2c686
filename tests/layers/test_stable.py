"""Stable stages: the bound on their weights, no growth through any depth, and that nothing is lost by it."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import remove_parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from timm_nonlocal import NonlocalStage, insert, spectrum
from timm_nonlocal.analysis.dynamics import stationary
from timm_nonlocal.analysis.recorder import trajectory
from timm_nonlocal.analysis.spectra import block_weights, measure
from timm_nonlocal.analysis.stability import stability
from timm_nonlocal.checkpoints.layouts import find
from timm_nonlocal.layers.stable import contraction, made_together, orthonormal
from timm_nonlocal.models.preresnet import PreResNet

C, INNER = 16, 8


def stage(k: int = 3, **options: Any) -> NonlocalStage:
    return NonlocalStage(C, k, symmetric=True, stable=True, **options)


def scatter(module: NonlocalStage, spread: float = 1.0) -> None:
    """Random parameters of all sub-blocks."""
    for name, parameter in module.named_parameters():
        if 'sub_blocks' in name:
            torch.nn.init.normal_(parameter, std=spread)


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
    scatter(module, 10 ** magnitude)
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
    assert torch.equal(contraction(small), small) and not contraction(torch.zeros(3, 3)).any()
    assert torch.equal(contraction(torch.eye(INNER)), torch.eye(INNER))  # the identity stage stays it, to the bit
    assert torch.linalg.matrix_norm(contraction(1e30 * torch.randn(INNER, INNER)), 2) <= 1 + 1e-6
    ties = torch.zeros(4, 4, requires_grad=True)
    contraction(ties).sum().backward()
    assert ties.grad is not None and torch.equal(ties.grad, torch.ones(4, 4))


@given(st.integers(1, 40), st.floats(-8, 0), st.integers(0, 10 ** 6))
@settings(max_examples=40, deadline=None)
def test_contraction_divides_by_the_spectral_norm(n: int, gap: float, seed: int) -> None:
    """And has its derivative, however near the largest singular values are to each other."""
    torch.manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for _ in range(2))
    values = 3 - 10 ** gap * torch.rand(n, dtype=torch.float64)
    ours = (u @ values.diag() @ v).requires_grad_()
    exact, direction = ours.detach().clone().requires_grad_(), torch.randn(n, n, dtype=torch.float64)
    found, expected = contraction(ours), exact / torch.linalg.matrix_norm(exact, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    apart = values.topk(min(n, 2)).values.diff().abs().sum()
    if n == 1 or apart > 1e-5:
        found, expected = (torch.autograd.grad((output * direction).sum(), source)[0]
                           for output, source in ((found, ours), (expected, exact)))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_contraction_has_all_derivatives() -> None:
    s = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert (torch.linalg.matrix_norm(s, 2) > 1).all()
    assert torch.autograd.gradcheck(contraction, s, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(contraction, s)
    hessian = torch.func.hessian(lambda s: contraction(s)[..., 0].square().sum())
    again = torch.autograd.functional.hessian(lambda s: contraction(s)[..., 0].square().sum(), s)
    torch.testing.assert_close(hessian(s), again)
    torch.testing.assert_close(torch.func.vmap(contraction)(s), contraction(s))


@pytest.mark.parametrize('shape', [(8, 16), (5, 5), (9, 4)])
def test_the_orthonormal_factor_is_torchs(shape: tuple[int, int]) -> None:
    """Of one matrix as `orthogonal` makes it by Cayley's map, its derivative too, and of several at once."""
    layer: Any = orthogonal(torch.nn.Linear(*shape[::-1], bias=False).double(), orthogonal_map='cayley')
    original, basis = layer.parametrizations.weight.original, layer.parametrizations.weight[0].base
    torch.nn.init.normal_(original)
    x, direction = original.detach().clone().requires_grad_(), torch.randn(shape, dtype=torch.float64)
    ours, theirs = orthonormal(x, basis), layer.weight
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad((ours * direction).sum(), x),
                               torch.autograd.grad((theirs * direction).sum(), original))
    torch.testing.assert_close(orthonormal(torch.stack([x, -x]), torch.stack([basis, basis]))[0], ours)


class Asked(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(op.overloadpacket.__name__)
        return op(*args, **kwargs or {})


@pytest.mark.parametrize('k', [1, 3])
def test_nothing_waits_for_the_device(k: int) -> None:
    """Neither forwards nor backwards: no error is looked for, no number read, nothing repeated until it suffices."""
    waiting = {'_linalg_check_errors', '_linalg_svd', '_linalg_eigh', 'linalg_qr', '_local_scalar_dense', 'nonzero'}
    module, x = stage(k), torch.randn(2, C, 4, 4)
    with Asked() as asked:
        module(x).sum().backward()
    assert '_linalg_solve_ex' in asked.names and not asked.names & waiting
    with Asked() as asked:
        torch.linalg.solve(torch.eye(2), torch.eye(2)), torch.linalg.matrix_norm(torch.eye(2), 2)
    assert len(asked.names & waiting) == 2


def test_made_together_or_alone() -> None:
    """All sub-blocks' weights at once are those of each layer; where one is no longer stable each is asked alone."""
    module, x = stage(3), torch.randn(2, C, 4, 4)
    scatter(module)
    layers = [(block.g, block.z) for block in module.sub_blocks]
    together = made_together(layers)
    assert together is not None
    for name, weights in zip(('g', 'z'), together, strict=True):
        torch.testing.assert_close(weights, [getattr(block, name).weight for block in module.sub_blocks])
    before = module(x)
    remove_parametrizations(module.sub_blocks[1].z, 'weight')
    assert made_together(layers) is None
    torch.testing.assert_close(module(x), before)
    other = stage(3)
    assert made_together([(g, other.sub_blocks[0].z) for g, _ in layers]) is None


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


@pytest.mark.parametrize('inner_dim', [C, 2 * C])
def test_as_wide_inside_as_outside_and_wider(inner_dim: int) -> None:
    module = stage(2, inner_dim=inner_dim)
    scatter(module)
    assert max(kappas(module)) <= 1 + 1e-6 and excess(module) < 1e-5
    empty = stage(2, inner_dim=inner_dim, device='meta').to_empty(device='cpu')
    empty.load_state_dict(module.state_dict())
    x = torch.randn(2, C, 4, 4)
    assert torch.equal(empty(x), module(x))


def test_a_weight_without_full_rank_has_an_orthonormal_factor_too() -> None:
    block = stage(1, init='zero').sub_blocks[0]
    block.g.weight = torch.zeros(INNER, C)
    torch.testing.assert_close(block.g.weight @ block.g.weight.mT, torch.eye(INNER))
