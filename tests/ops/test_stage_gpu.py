"""What the stage's operator must hold on a GPU beyond accuracy: memory, graphs, compilation. `pytest -m gpu`."""

from typing import Any

import pytest
import torch

from benchmarks.stage.check import TOLERANCE, backend_written_out, draw_operands, errors, relative, run_backend
from timm_nonlocal import NonlocalStage
from timm_nonlocal.ops import stage
from timm_nonlocal.ops.products import ProductBackend

pytestmark = pytest.mark.gpu
C = 64


def images(count: int, dtype: torch.dtype = torch.bfloat16, size: int = 32) -> torch.Tensor:
    x = torch.randn(count, C, size, size, device='cuda').to(dtype)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def step(module: torch.nn.Module, x: torch.Tensor, dz: torch.Tensor) -> tuple[torch.Tensor, ...]:
    z = module(x)
    return z, *torch.autograd.grad(z, [x, *module.parameters()], dz)


@pytest.mark.parametrize(('recompute', 'limit'), [(False, 300e6), (True, 60e6)])
def test_memory_at_batch_128(recompute: bool, limit: float) -> None:
    """Above what is there before a step and what it returns: the issue's figures for k = 5."""
    module = NonlocalStage(C, 5, recompute=recompute).cuda().bfloat16()
    x = images(128)
    dz = torch.randn_like(x)
    step(module, x, dz)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = step(module, x, dz)
    returned = torch.cuda.memory_allocated() - before
    assert all(z.isfinite().all() for z in results)
    assert torch.cuda.max_memory_allocated() - before - returned < limit


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('recompute', [False, True])
def test_cuda_graph(dtype: torch.dtype, recompute: bool) -> None:
    """A captured step, replayed on other images."""
    module = NonlocalStage(C, 3, recompute=recompute).cuda().to(dtype)
    x, others = images(4, dtype), images(4, dtype)
    dz = torch.randn_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(module, x, dz)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module, x, dz)
    with torch.no_grad():
        x.copy_(others)
    graph.replay()
    for a, b in zip(captured, step(module, x, dz), strict=True):
        assert relative(a, b.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_compile(dtype: torch.dtype) -> None:
    module, x = NonlocalStage(C, 3).cuda().to(dtype), images(4, dtype)
    dz = torch.randn_like(x)
    compiled: Any = torch.compile(module, fullgraph=True)
    for a, b in zip(step(compiled, x, dz), step(module, x, dz), strict=True):
        assert relative(a, b.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('logits', [5.0, 100.0])
def test_matrix_products(dtype: torch.dtype, logits: float) -> None:
    """The backend for what the Triton kernels do not take, with products of 16-bit operands summed in float32."""
    *operands, scale = draw_operands(dtype, 'cuda', images=2, positions=200, dim=32, inner=32, k=3, logits=logits)
    expected = backend_written_out(*operands, dim=32, inner=32, scale=scale)
    assert max(errors(run_backend(ProductBackend, *operands, dim=32, inner=32, scale=scale), expected)
               ) <= TOLERANCE[dtype]


def test_choice() -> None:
    """Triton for 16 bits and widths it takes, matrix products for the rest."""
    chosen = {(dtype, width): stage._choose(None, torch.device('cuda'), dtype, width, width)
              for dtype in (torch.bfloat16, torch.float32) for width in (32, 256)}
    assert chosen == {(torch.bfloat16, 32): 'triton', (torch.bfloat16, 256): 'products',
                      (torch.float32, 32): 'products', (torch.float32, 256): 'products'}


@pytest.mark.parametrize('affinity', ['embedded_gaussian', 'dot_product', 'positive_dot_product'])
def test_large_images(affinity: str) -> None:
    """M = 50,176, a 224² image at full resolution: an M×M matrix would take 5 GB in bfloat16."""
    module, x = NonlocalStage(C, 2, affinity=affinity).cuda().bfloat16(), images(1, size=224)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert all(z.isfinite().all() for z in step(module, x, torch.randn_like(x)))
    assert torch.cuda.max_memory_allocated() - before < 1e9
