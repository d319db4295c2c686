"""The Triton kernels: on a GPU as they are, elsewhere through Triton's interpreter, in a process of its own.

The interpreter must be chosen before Triton is imported, so `test_stage.py` runs this file with TRITON_INTERPRET=1.
"""

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.stage.check import TOLERANCE, backend_written_out, bound, draw_operands, errors, relative, run_backend

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
pytestmark: list[pytest.MarkDecorator] = [pytest.mark.gpu] * (not INTERPRETED)
DEVICE = 'cpu' if INTERPRETED else 'cuda'
DTYPES = [torch.bfloat16, torch.float16] + [torch.float32] * INTERPRETED  # tensor cores would round float32
# dtype, largest logit, deterministic, formulation
CASES = [*((dtype, 5.0, False, 'proposed') for dtype in DTYPES), (torch.bfloat16, 100.0, False, 'proposed'),
         (torch.bfloat16, 100.0, True, 'proposed'), (torch.bfloat16, 100.0, False, 'original')]


@pytest.fixture(autouse=True)
def fresh(seeded: None) -> None:
    """Replaces the fixed seed by a new one, which a failing test shows."""
    print('torch.manual_seed', torch.seed())


@pytest.fixture(autouse=True, scope='module')
def a_better_interpreter() -> Iterator[None]:
    """The interpreter cuts bfloat16 off where a GPU rounds to nearest, and multiplies its bits as whole numbers; up to
    Triton 3.6 it takes an array of one number for a number, which newer numpy refuses.
    """
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    cast, dot, prepare = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def rounding_cast(self: Any, source: Any, to: Any) -> Any:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, to)
        rounded = torch.from_numpy(source.data.copy()).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), to.scalar)

    def wide_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (cast(self, z, tl.float32) if z.dtype.scalar == tl.bfloat16 else z for z in (a, b))
        return dot(self, a, b, *others)

    def prepare_with_index(tensor: Any, *scope: Any) -> None:
        prepare(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, '_patch_lang_tensor', prepare_with_index)
        patch.setattr(InterpreterBuilder, 'cast_impl', rounding_cast)
        patch.setattr(InterpreterBuilder, 'create_dot', wide_dot)
        yield


def run_triton(*operands: torch.Tensor, deterministic: bool = False, **sizes: Any) -> Any:
    """H, dQ, dK and dG⁰."""
    from timm_nonlocal.ops.triton_backend import TritonBackend
    torch.use_deterministic_algorithms(deterministic)
    try:
        return run_backend(TritonBackend, *operands, **sizes)
    finally:
        torch.use_deterministic_algorithms(False)


def draw(dtype: torch.dtype, images: int, positions: int, width: int = 32, k: int = 2) -> Any:
    """Q, K and G⁰ side by side, T, dH."""
    return draw_operands(dtype, DEVICE, images=images, positions=positions, dim=width, inner=width, k=k, logits=1.0)[:3]


@pytest.mark.parametrize('case', CASES, ids=str)
@pytest.mark.parametrize(('images', 'positions', 'dim', 'inner', 'k'), [
    (2, 64, 32, 32, 5),  # tiles that fit
    (1, 150, 32, 32, 2),  # rows left over
    (2, 37, 24, 20, 3),  # and columns
    (1, 70, 64, 16, 1),
    (1, 33, 16, 40, 6),  # too many maps to hold
    (1, 33, 128, 128, 2),
])
def test_accuracy(case: tuple[torch.dtype, float, bool, str], images: int, positions: int, dim: int, inner: int,
                  k: int) -> None:
    dtype, logits, deterministic, formulation = case
    *operands, scale = draw_operands(
        dtype, DEVICE, images=images, positions=positions, dim=dim, inner=inner, k=k, logits=logits)
    sizes: dict[str, Any] = dict(dim=dim, inner=inner, scale=scale, formulation=formulation)
    plain, expected = (backend_written_out(*operands, **sizes, dtype=kind) for kind in (dtype, torch.float64))
    got = run_triton(*operands, **sizes, deterministic=deterministic)
    for name, error, most in zip(('H', 'dQ', 'dK', 'dG'), errors(got, expected), bound(dtype, plain, expected),
                                 strict=True):
        assert error <= most, name


def test_deterministic_runs_agree_in_every_bit() -> None:
    operands = draw(torch.bfloat16, 2, 100)
    first, second = (run_triton(*operands, dim=32, inner=32, scale=0.2, deterministic=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('positions', [1, 96])
def test_inputs_without_differences(dtype: torch.dtype, positions: int) -> None:
    """H = 0; the errors of what is zero are measured against what cancels."""
    projected, t, dh = draw(dtype, 2, positions)
    projected[:] = projected[:, :1]
    expected = backend_written_out(projected, t, dh, dim=32, inner=32, scale=0.2)
    h, dq, dk, dg = run_triton(projected, t, dh, dim=32, inner=32, scale=0.2)
    assert h.double().norm() <= TOLERANCE[dtype] * projected.double().norm()
    assert (dg.double() - expected[3]).norm() <= TOLERANCE[dtype] * dh.double().norm()
    for z in (dq, dk):
        assert z.double().norm() <= TOLERANCE[dtype] * projected.double().norm() * dh.double().norm()


@pytest.mark.parametrize('dtype', DTYPES)
def test_constants_are_fixed_points(dtype: torch.dtype) -> None:
    """A rounded to 16 bits still has rows that sum to one: where G is constant, H vanishes as in float32."""
    projected, t, dh = draw(dtype, 1, 100, k=1)
    projected[:, :, 64:] = projected[:, :1, 64:]
    h = run_triton(projected, t, dh, dim=32, inner=32, scale=1.0)[0]
    assert h.abs().max() <= 1e-5 * projected[:, :, 64:].abs().max()


@pytest.mark.parametrize('dtype', [torch.bfloat16] + [torch.float32] * INTERPRETED)
@pytest.mark.parametrize('size', [1e-30, 1e6, 1e15])
@pytest.mark.parametrize('positions', [40, 64])
def test_no_nan_where_the_logits_are_finite(dtype: torch.dtype, size: float, positions: int) -> None:
    projected, t, dh = draw(dtype, 1, positions, width=16)
    projected[:, :, :32] *= size
    projected[:, 3] = 0
    assert all(z.isfinite().all() for z in run_triton(projected, t, dh, dim=16, inner=16, scale=0.25))


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('options', [dict(), dict(symmetric=True), dict(affinity='gaussian', scale=0.02)], ids=str)
def test_block_and_stage(monkeypatch: pytest.MonkeyPatch, recompute: bool, options: dict[str, Any]) -> None:
    """The whole operator with this backend, some images at a time."""
    from timm_nonlocal import NonlocalBlock, NonlocalStage
    from timm_nonlocal.ops import stage
    monkeypatch.setattr(stage, '_choose', lambda *_: 'triton')
    monkeypatch.setattr(stage, 'RECOMPUTE_BYTES', 1 << 18)
    x = torch.randn(5, 32, 6, 7, dtype=torch.bfloat16, device=DEVICE)
    dz = torch.randn_like(x)
    modules = [NonlocalStage(32, 2, recompute=recompute, **options)] + [NonlocalBlock(32, **options)] * (not recompute)
    for module in modules:
        exact = copy.deepcopy(module.to(DEVICE, torch.bfloat16)).double()
        exact.merged, results = False, []
        for net, dtype in ((module, torch.bfloat16), (exact, torch.float64)):
            z = net(leaf := x.to(dtype).requires_grad_())
            results.append([z.detach(), *torch.autograd.grad(z, [leaf, *net.parameters()], dz.to(dtype))])
        for a, b in zip(*results, strict=True):
            assert relative(a, b) <= 1e-2
