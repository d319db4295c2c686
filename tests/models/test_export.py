"""Compiled, scripted, traced, exported and in ONNX, a network gives what it gives in eager mode, to 1e-4."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.export import Dim

from tests.support.networks import calibrated
from timm_nonlocal import NonlocalBlocks, NonlocalStage, PreResNet
from timm_nonlocal.layers.affinity import AFFINITIES
from timm_nonlocal.models.preresnet import ARCHITECTURES

FEW = {'preresnet20', 'preresnet20_nl_original_k2', 'preresnet20_nl_proposed_k3'}
NAMES = [*ARCHITECTURES, *timm.list_models(module='resnet_nl')]
ALL = pytest.mark.parametrize('name', [
    name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])


@cache
def example(name: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A network whose nonlocal modules are not the identity, two images, and what it makes of them."""
    cfg = timm.get_pretrained_cfg(name)
    assert cfg
    size = cfg.input_size
    model, x = calibrated(name, (2, *size)), torch.randn(2, *size)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith('z.weight') and not weight.any():
                weight.normal_(std=0.02)
        return model, x, model(x)


@pytest.fixture
def case(name: str) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor]]:
    torch.compiler.reset()
    with torch.no_grad():
        yield example(name)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@ALL
def test_torchscript(case: tuple[Any, torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    model, x, y = case
    torch.jit.script(model).save(tmp_path / 'model.pt')
    close(torch.jit.load(tmp_path / 'model.pt')(x), y)


@ALL
def test_fx(case: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
    """The graph holds for other sizes, and still refuses what is too small."""
    model, x, y = case
    graph = torch.fx.symbolic_trace(model)
    close(graph(x), y)
    larger = torch.randn(1, 3, 40, 24)
    close(graph(larger), model(larger))
    if isinstance(model, PreResNet):
        with pytest.raises(ValueError, match='an image of 3×40 pixels is too small'):
            graph(torch.randn(1, 3, 3, 40))


@ALL
def test_export(case: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
    """One program for any batch and size above twice the total stride."""
    model, x, y = case
    least = 2 * model.feature_info[-1]['reduction'] + 1
    program = torch.export.export(model, (x,), dynamic_shapes=(
        {0: Dim('batch'), 2: Dim('height', min=least, max=512), 3: Dim('width', min=least, max=512)},)).module()
    close(program(x), y)
    other = torch.randn(3, 3, 5 * least, 3 * least)
    close(program(other), model(other))


@ALL
def test_compile(case: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
    """One graph, without a break, for a whole network; what inductor makes of it is a test of its own."""
    model, x, y = case
    close(torch.compile(model, fullgraph=True, backend='aot_eager')(x), y)


@pytest.mark.parametrize('name', [
    name if name == 'preresnet20_nl_proposed_k2' else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_inductor(case: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
    model, x, y = case
    close(torch.compile(model, fullgraph=True)(x), y)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['preresnet20_nl_original_k2', 'preresnet20_nl_proposed_k3'])
def test_gradients_through_inductor(case: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
    """Of every parameter, in norm: which element rounding hits most differs from one order of summation to another."""
    model, x, _ = case
    with torch.enable_grad():
        grads = [torch.autograd.grad(net(x).square().mean(), list(model.parameters()))
                 for net in (torch.compile(model, fullgraph=True), model)]
    for actual, expected in zip(*grads, strict=True):
        assert (actual - expected).norm() < 1e-3 * expected.norm() + 1e-6


@ALL
def test_onnx(case: tuple[Any, torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    """In onnxruntime, for a batch that was not there at export."""
    runtime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    model, x, y = case
    path = tmp_path / 'model.onnx'
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=({0: Dim('batch')},), verbose=False)
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert logits.shape[1] == y.shape[1]
    for images, expected in ((x, y), (x[:1], y[:1]), (x.repeat(2, 1, 1, 1), y.repeat(2, 1))):
        close(torch.from_numpy(session.run(None, {image.name: images.numpy()})[0]), expected)


@pytest.mark.parametrize('affinity', AFFINITIES)
@pytest.mark.parametrize('make', [NonlocalBlocks, NonlocalStage])
def test_every_affinity(make: type[NonlocalBlocks] | type[NonlocalStage], affinity: str) -> None:
    """Scripted, symbolically traced and exported, also with φ = θ and by the literal formula."""
    options: list[dict[str, Any]] = [{}, {'symmetric': True}, *([{'merged': False}] if make is NonlocalStage else [])]
    for kwargs in options:
        module, x = make(8, 2, affinity=affinity, **kwargs).eval(), torch.randn(2, 8, 4, 3)
        with torch.no_grad():
            y = module(x)
            for other in (torch.jit.script(module), torch.fx.symbolic_trace(module),
                          torch.export.export(module, (x,)).module()):
                torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-5)
