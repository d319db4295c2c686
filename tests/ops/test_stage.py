"""The stage's operator against the plain path in float64, on inputs drawn anew in every run."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stage.check import (
    TOLERANCE,
    backend_written_out,
    bound,
    draw_operands,
    errors,
    outputs,
    reference,
    relative,
    run_backend,
    written_out,
)
from tests.support.process import ROOT, run
from timm_nonlocal import NonlocalBlock, NonlocalStage
from timm_nonlocal.ops import products
from timm_nonlocal.ops.stage import can_run, nonlocal_stage

C = 64
GPU = pytest.param('cuda', marks=pytest.mark.gpu)
DEVICES = pytest.mark.parametrize('device', ['cpu', GPU])


@pytest.fixture(autouse=True)
def fresh(seeded: None) -> None:
    """Replaces the fixed seed by a new one, which a failing test shows."""
    print('torch.manual_seed', torch.seed())


def scaled(module: Any, x: torch.Tensor, largest: float) -> None:
    """Sets the scale so that the largest logit in magnitude is as asked."""
    q, k = copy.deepcopy(module).double().embed(x.double().flatten(2).transpose(1, 2))
    module.affinity.scale = largest / (q @ k.transpose(1, 2)).abs().max().item()


def compared(module: NonlocalBlock | NonlocalStage, x: torch.Tensor) -> Any:
    """Outputs and gradients: ours, those with A written out, and those of float64."""
    dz = torch.randn_like(x)
    return outputs(module, x, dz), outputs(written_out(module), x, dz), reference(module, x, dz)


def assert_accurate(module: NonlocalBlock | NonlocalStage, x: torch.Tensor) -> None:
    ours, plain, expected = compared(module, x)
    most = bound(x.dtype, plain, expected)
    for name, error, bounded in zip(('Z', 'dX', 'dW'), errors(ours, expected), most, strict=True):
        assert error <= bounded, name


@DEVICES
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('logits', [None, 100.0], ids=['as drawn', 'to 100'])
@pytest.mark.parametrize(('shape', 'k'), [
    ((2, C, 16, 16), 5), ((2, C, 16, 16), 1), ((3, C, 7, 11), 2), ((1, C, 33, 31), 3),
    ((2, C, 16, 16), None), ((3, C, 7, 11), None)])
def test_accuracy(device: str, dtype: torch.dtype, logits: float | None, shape: tuple[int, int, int, int],
                  k: int | None) -> None:
    """k sub-blocks; none stands for the original block. Where one rounding decides a row, means over draws count."""
    found = []
    for _ in range(12 if logits and dtype == torch.bfloat16 else 1):
        module = (NonlocalStage(C, k) if k else NonlocalBlock(C)).to(device, dtype)
        x = torch.randn(shape, dtype=dtype, device=device)
        if logits:
            scaled(module, x, logits)
        ours, plain, expected = compared(module, x)
        found.append([errors(ours, expected), bound(dtype, plain, expected)])
    for name, error, most in zip(('Z', 'dX', 'dW'), *torch.tensor(found).mean(0), strict=True):
        assert error <= most, name


@DEVICES
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('options', [dict(symmetric=True), dict(affinity='gaussian', scale=0.02),
                                     dict(inner_dim=20), dict(affinity='gaussian', scale=0.02, inner_dim=80)], ids=str)
def test_accuracy_of_options(device: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    for module in (NonlocalStage(C, 3, **options), NonlocalBlock(C, **options)):
        assert_accurate(module.to(device, dtype), torch.randn(2, C, 9, 10, dtype=dtype, device=device))


@pytest.fixture
def nan_where_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.utils.deterministic, 'fill_uninitialized_memory', True)  # training turns it off
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('inner', [7, 20, 32, 80])
@pytest.mark.parametrize('recompute', [False, True])
def test_memory_counts_only_once_it_is_written(nan_where_nothing_is_written: None, dtype: torch.dtype, inner: int,
                                               recompute: bool) -> None:
    """Some CPUs' kernels read more of a row than they are given."""
    gaussian: dict[str, Any] = dict(affinity='gaussian', scale=0.02)
    for module in (NonlocalStage(C, 4, inner_dim=inner, recompute=recompute), NonlocalBlock(C, inner_dim=inner),
                   NonlocalStage(C, 2, inner_dim=inner, recompute=recompute, **gaussian)):
        assert_accurate(module.to(dtype), torch.randn(2, C, 5, 9, dtype=dtype))


@DEVICES
@pytest.mark.parametrize('size', [1.0, 4.0])
@pytest.mark.parametrize('make', [
    lambda: NonlocalStage(C, 5), lambda: NonlocalStage(C, 1), lambda: NonlocalStage(C, 3, symmetric=True),
    lambda: NonlocalBlock(C), lambda: NonlocalBlock(C, symmetric=True)],
    ids=['k = 5', 'k = 1', 'k = 3, shared', 'block', 'block, shared'])
def test_autocast_errs_no_more_than_with_the_affinity_written_out(device: str,
                                                                  make: Callable[[], NonlocalBlock | NonlocalStage],
                                                                  size: float) -> None:
    """Against float64, never more than 1.3 times as much, in every output and gradient; of large logits, the mean."""
    found = []
    for _ in range(6 if size > 1 else 1):
        module, x = make().to(device), size * torch.randn(2, C, 32, 32, device=device)
        with torch.autocast(device, torch.bfloat16):
            ours, plain, expected = compared(module, x)
        found.append([errors(ours, expected), errors(plain, expected)])
    for error, most in zip(*torch.tensor(found).mean(0), strict=True):
        assert error <= 1.3 * most


@DEVICES
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(2, C, 1, 1), (2, C, 16, 16)], ids=['one position', 'all equal'])
def test_inputs_without_differences(device: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """Zᵏ = X, dX = dZ summed as eq. (8) has it, and no weight matters: errors are measured against what is summed."""
    module = NonlocalStage(C, 3).to(device, dtype)
    x = torch.randn(*shape[:2], 1, 1, dtype=dtype, device=device).expand(shape).contiguous()
    dz = torch.randn_like(x)
    (z, dx, dw), (_, expected, _) = outputs(module, x, dz), reference(module, x, dz)
    assert relative(z, x.double()) <= TOLERANCE[dtype]
    assert relative(dx, expected) <= TOLERANCE[dtype]
    assert dw.double().norm() <= TOLERANCE[dtype] * x.double().norm() * dz.double().norm()


@DEVICES
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('size', [1e-30, 1e3, 1e6, 1e9])
def test_no_nan_where_the_logits_are_finite(device: str, dtype: torch.dtype, size: float) -> None:
    """As long as attention's gradients made A from the logarithm of its row sums, the block's were NaN from 1e6 on."""
    for module in (NonlocalStage(C, 2), NonlocalBlock(C)):
        x = (torch.randn(2, C, 32, 32, device=device) * size).to(dtype)
        x[0, :, 2] = 0
        assert all(z.isfinite().all() for z in outputs(module.to(device, dtype), x, torch.randn_like(x)))


@pytest.mark.parametrize('block', [1, 5000, 1 << 22])
@pytest.mark.parametrize('reuse', [0, 1 << 26])
@pytest.mark.parametrize('positions', [(4, 5), (10, 13)])
def test_blocks_of_rows_and_chunks_of_images(monkeypatch: pytest.MonkeyPatch, block: int, reuse: int,
                                             positions: tuple[int, int]) -> None:
    monkeypatch.setitem(products.BLOCK_BYTES, 'cpu', block)
    monkeypatch.setitem(products.REUSE_BYTES, 'cpu', reuse)
    assert_accurate(NonlocalStage(C, 3).double(), torch.randn(5, C, *positions, dtype=torch.float64))


@pytest.mark.parametrize('logits', [5.0, 100.0])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_products_of_low_precision_operands(dtype: torch.dtype, logits: float) -> None:
    """What a GPU without Triton does: operands in 16 bits, sums in float32, H and A rounded."""
    def low_precision(*args: Any) -> products.ProductBackend:
        backend = products.ProductBackend(*args)
        backend.dtype, backend.sums, backend.one_by_one = dtype, torch.float32, False
        return backend

    *operands, scale = draw_operands(dtype, 'cpu', images=2, positions=90, dim=32, inner=32, k=3, logits=logits)
    expected = backend_written_out(*operands, dim=32, inner=32, scale=scale)
    assert max(errors(run_backend(low_precision, *operands, dim=32, inner=32, scale=scale), expected)
               ) <= TOLERANCE[dtype]


@pytest.mark.parametrize('k', [1, 5])
def test_what_is_kept_for_the_backward_pass(k: int) -> None:
    """No M×M matrix, and where asked nothing but x and the weights."""
    x = torch.randn(1, C, 32, 32, requires_grad=True)
    for recompute in (False, True):
        module, kept = NonlocalStage(C, k, recompute=recompute), list[int]()

        def keep(z: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(z.numel())
            return z

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda z: z):
            module(x)
        weights = sum(p.numel() for p in module.parameters())
        assert max(kept) < 1024 ** 2
        assert not recompute or sum(kept) == x.numel() + weights


@pytest.mark.parametrize('limit', [1, 1 << 20, 1 << 30])
def test_recomputing_changes_nothing(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr('timm_nonlocal.ops.stage.RECOMPUTE_BYTES', limit)
    module, x = NonlocalStage(C, 3), torch.randn(5, C, 6, 6)
    dz = torch.randn_like(x)
    before = outputs(module, x, dz)
    module.recompute = True
    for a, b in zip(before, outputs(module, x, dz), strict=True):
        assert relative(a, b.double()) < 1e-6


def test_one_closing_pass_whatever_k_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the products of the backward pass, two give an M×M matrix: A again, and dA."""
    square = []
    product = products.ProductBackend._product

    def counted(self: Any, a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = product(self, a, b, *args, **kwargs)
        square.append(result.shape[1:] == (64, 64))
        return result

    monkeypatch.setattr(products.ProductBackend, '_product', counted)
    for k in (1, 2, 6):
        z = NonlocalStage(C, k)(torch.randn(1, C, 8, 8, requires_grad=True))
        square.clear()
        z.sum().backward()
        assert sum(square) == 2


def test_operations_are_counted() -> None:
    """Forward as in test_preresnet; the backward pass makes A again and does everything else twice."""
    b, m, c, k = 2, 64, 32, 3
    logits, applied, inner = b * m * m * c, b * m * m * c * k, k * (k - 1) // 2 * c * c * (b * m + C)
    forward = 2 * (logits + applied + b * m * C * c * (2 + 2 * k) + inner)
    for recompute in (False, True):
        module, x = NonlocalStage(C, k, recompute=recompute), torch.randn(b, C, 8, 8, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            z = module(x)
            assert counter.get_total_flops() == forward
            z.sum().backward()
        assert counter.get_total_flops() == 3 * forward + (forward if recompute else 2 * logits)


@pytest.mark.parametrize('formulation', ['proposed', 'original'])
@pytest.mark.parametrize('embeddings', [0, 1, 2])
def test_second_derivatives(formulation: str, embeddings: int) -> None:
    """Of gradients that keep their graph, with respect to the input and to every weight."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    weights = [torch.randn(3, 6, dtype=torch.float64) for _ in range(embeddings + 2)]
    outer = [torch.randn(6, 3, dtype=torch.float64) for _ in range(2)]

    def function(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        *maps, g0, g1, z0, z1 = weights
        return nonlocal_stage(x, maps, [g0, g1], [z0, z1], scale=0.3, formulation=formulation)

    inputs = [0.3 * tensor.requires_grad_() for tensor in (x, *weights, *outer)]
    assert torch.autograd.gradgradcheck(function, inputs)
    z = function(inputs[0], *(tensor.detach() for tensor in inputs[1:]))
    gradient, = torch.autograd.grad(z.square().sum(), inputs[0], create_graph=True)
    plain, = torch.autograd.grad(z.square().sum(), inputs[0])
    torch.testing.assert_close(gradient, plain)


def test_one_dtype() -> None:
    with pytest.raises(TypeError, match=r'x is torch\.float64 and the weights are torch\.float32: use autocast'):
        NonlocalStage(C, 2)(torch.randn(1, C, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize('backend', ['triton', 'cudnn'])
def test_a_backend_that_does_not_run_here_is_refused(backend: str) -> None:
    x, weight = torch.randn(1, 4, 8), torch.randn(8, 8)
    assert torch.equal(*(nonlocal_stage(x, [], [weight], [weight], 1.0, backend=able) for able in ('products', None)))
    assert not can_run(backend, x.device, x.dtype, 8, 8)
    with pytest.raises(ValueError, match=f"^backend='{backend}' does not run .* on cpu .*: use 'products', or None"):
        nonlocal_stage(x, [], [weight], [weight], 1.0, backend=backend)
    with pytest.raises(ValueError, match="^formulation='other' is unknown: use one of proposed, original$"):
        nonlocal_stage(x, [], [weight], [weight], 1.0, formulation='other')


@DEVICES
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('make', [lambda: NonlocalStage(C, 3), lambda: NonlocalBlock(C)], ids=['stage', 'block'])
def test_autocast(device: str, dtype: torch.dtype, make: Callable[[], NonlocalBlock | NonlocalStage]) -> None:
    """The result has x's dtype or wider, as on the plain path, and the gradients those of what they belong to."""
    module, x = make().to(device), torch.randn(2, C, 8, 8, dtype=dtype, device=device, requires_grad=True)
    expected = reference(module, x, torch.ones_like(x))
    with torch.autocast(device, dtype=torch.bfloat16):
        z = module(x)
        module.merged = False
        assert z.dtype == module(x).dtype == dtype
    z.sum().backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert x.grad is not None and x.grad.dtype == dtype and len(gradients) == len([*module.parameters()])
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    got = z.detach(), x.grad, torch.cat([gradient.flatten() for gradient in gradients])
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) <= 2e-2  # Q and K are rounded, and the sum of dZ is what it is


@DEVICES
@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('recompute', [False, True])
def test_gradient_checkpointing(device: str, reentrant: bool, recompute: bool) -> None:
    module, x = NonlocalStage(C, 3, recompute=recompute).to(device), torch.randn(2, C, 6, 6, device=device)
    x.requires_grad_()
    wanted = [x, *module.parameters()]
    results = []
    for z in (module(x), checkpoint(module, x, use_reentrant=reentrant)):
        z.square().sum().backward()
        results.append([p.grad for p in wanted])
        module.zero_grad()
        x.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('fmt', [torch.contiguous_format, torch.channels_last])
def test_inference_gives_the_same_and_keeps_the_memory_format(context: type[torch.inference_mode] | type[torch.no_grad],
                                                              fmt: torch.memory_format) -> None:
    module, x = NonlocalStage(C, 3), torch.randn(2, C, 6, 7).to(memory_format=fmt)
    expected = module(x)
    with context():
        z = module(x)
    assert torch.equal(z, expected) and z.is_contiguous(memory_format=fmt)


def test_frozen_weights() -> None:
    """Gradients for some of the inputs only."""
    module, x = NonlocalStage(C, 2), torch.randn(1, C, 4, 4)
    module.theta.requires_grad_(False)
    module(x).sum().backward()
    assert module.theta and module.theta.weight.grad is None and x.grad is None
    assert module.phi and module.phi.weight.grad is not None


@DEVICES
@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('formulation', ['original', 'proposed'])
def test_operator_is_well_formed(device: str, recompute: bool, formulation: str) -> None:
    """Schema, shapes of fake tensors, autograd registration and compilation, as torch checks them."""
    w_in, w_out = (torch.randn(shape, device=device, requires_grad=True) for shape in ((4 * 8, 16), (16, 2 * 8)))
    x = torch.randn(3, 5, 16, device=device, requires_grad=True)
    options = dict(inner=8, embeddings=2, scale=0.3, formulation=formulation, backend='products', recompute=recompute)
    torch.library.opcheck(torch.ops.timm_nonlocal.stage, (x, w_in, w_out), {**options, 'needs_grad': not recompute})


@pytest.mark.parametrize('module', [NonlocalStage(C, 3), NonlocalStage(C, 2, recompute=True), NonlocalBlock(C),
                                    NonlocalStage(C, 2, affinity='positive_dot_product')], ids=str)
def test_compile(module: torch.nn.Module) -> None:
    """In one graph, with batches of two sizes."""
    compiled: Any = torch.compile(module, backend='aot_eager', fullgraph=True)
    for batch in (2, 3):
        x = torch.randn(batch, C, 6, 6)
        for a, b in zip(outputs(compiled, x, torch.ones_like(x)), outputs(module, x, torch.ones_like(x)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_compile_with_any_widths() -> None:
    """The backend is chosen while the graph is made, whose sizes are symbols then."""
    compiled = torch.compile(nonlocal_stage, backend='aot_eager', fullgraph=True, dynamic=True)
    for c in (8, 12):
        arguments = torch.randn(2, 9, c), [torch.randn(4, c)], [torch.randn(4, c)], [torch.randn(c, 4)], 0.3
        torch.testing.assert_close(compiled(*arguments), nonlocal_stage(*arguments))


@pytest.mark.parametrize('affinity', ['embedded_gaussian', 'dot_product', 'positive_dot_product', 'uniform'])
@pytest.mark.parametrize('make', [NonlocalStage, NonlocalBlock])
def test_graphs_for_other_runtimes_hold_plain_operators(make: type[NonlocalBlock] | type[NonlocalStage],
                                                        affinity: str) -> None:
    module, x = make(C, affinity=affinity).eval(), torch.randn(2, C, 6, 6)
    expected = module(x)
    exported = torch.export.export(module, (x,))
    graphs = [torch.jit.script(module), torch.jit.trace(module, x), exported.module(), torch.fx.symbolic_trace(module)]
    for graph in graphs:
        torch.testing.assert_close(graph(x), expected, rtol=1e-5, atol=1e-5)
    for graph in (graphs[0].inlined_graph, graphs[1].inlined_graph, exported.graph):
        assert 'timm_nonlocal::' not in str(graph) and 'timm_nonlocal.stage' not in str(graph)


def test_symbolic_tracing_writes_the_plain_formulas() -> None:
    """So that the traced graph can be scripted."""
    module, x = NonlocalStage(C, 2), torch.randn(2, C, 3, 4)
    traced = torch.fx.symbolic_trace(module)
    assert nonlocal_stage not in [node.target for node in traced.graph.nodes]
    torch.testing.assert_close(torch.jit.script(traced)(x), module(x))


@pytest.mark.parametrize('affinity', ['dot_product', 'positive_dot_product', 'uniform', 'identity'])
def test_linear_memory(affinity: str) -> None:
    """M = 50,176, where one M×M matrix would take 10 GB: a step allocates less than 0.5 GB for the stage of k = 2."""
    module = NonlocalStage(8, 2, affinity=affinity)
    x = torch.randn(1, 8, 224, 224, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        module(x).sum().backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert 0 < allocated < 5e8


def test_triton_kernels_through_the_interpreter() -> None:
    """`test_triton_backend.py` on the CPU, where Triton is there."""
    pytest.importorskip('triton')
    environment = {'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}  # many small products
    result = run('-m', 'pytest', '-q', str(ROOT / 'tests' / 'ops' / 'test_triton_backend.py'), env=environment)
    assert result.returncode == 0, result.stdout
    assert ' passed' in result.stdout and 'skipped' not in result.stdout
