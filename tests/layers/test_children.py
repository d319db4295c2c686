"""Children that are more than their weight: what a merged module gives with them is what the literal formula gives."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.modules.module as torch_module
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from timm_nonlocal import NonlocalBlock, NonlocalBlocks, NonlocalStage
from timm_nonlocal.layers.affinity import EmbeddedGaussian

C, NAMES = 8, ('theta', 'phi', 'g', 'z')
Change = Callable[[Any, str], object]  # of a parent's child
MAKE = pytest.mark.parametrize('make', [
    lambda **options: NonlocalStage(C, 2, dtype=torch.float64, **options),
    lambda **options: NonlocalStage(C, 2, affinity='dot_product', symmetric=True, dtype=torch.float64, **options),
    lambda **options: NonlocalBlock(C, dtype=torch.float64, **options),
], ids=['stage', 'dot product', 'block'])


def image() -> torch.Tensor:
    return torch.randn(2, C, 4, 3, dtype=torch.float64)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def everywhere(module: nn.Module, change: Change) -> nn.Module:
    """Changes every child with a weight: `change(parent, name)`."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name in NAMES:
                change(parent, name)
    return module


def replaced(wrap: Callable[[Any], nn.Module]) -> Change:
    return lambda parent, name: setattr(parent, name, wrap(getattr(parent, name)))


def other(kind: Callable[..., Any], **options: Any) -> Change:
    """A layer of another kind with the same weight."""
    def change(old: nn.Linear) -> nn.Module:
        new = kind(old.in_features, old.out_features, dtype=torch.float64, **options)
        new.weight = old.weight
        return new

    return replaced(change)


def touched(touch: Callable[[Any], object]) -> Change:
    """The layer itself, once touched."""
    return lambda parent, name: touch(getattr(parent, name))


def shift(layer: Any) -> None:
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1  # as accelerate's hooks do


CHANGES = {
    'spectral norm': touched(nn.utils.spectral_norm),
    'weight norm': touched(nn.utils.weight_norm),
    'pruned': touched(lambda layer: prune.l1_unstructured(layer, 'weight', 0.5)),
    'parametrised spectral norm': touched(parametrizations.spectral_norm),
    'parametrised weight norm': touched(parametrizations.weight_norm),
    'wrapped': replaced(nn.Sequential),
    'with a bias': other(nn.Linear),
    'subclass': other(Doubled, bias=False),
    'forward of its own': touched(shift),
    'forward hook': touched(lambda layer: layer.register_forward_hook(lambda layer, args, y: y + 1)),
    'forward pre-hook': touched(lambda layer: layer.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))),
    'backward hook': touched(lambda layer: layer.register_full_backward_hook(lambda layer, dx, dy: (3 * dx[0],))),
}


def changed(make: Callable[..., nn.Module], change: Change, **options: Any) -> list[nn.Module]:
    """The module with and without `merged`, both changed in the same way."""
    modules = []
    for merged in (True, False):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of what torch calls old
            modules.append(everywhere(make(merged=merged, **options), change))
    return modules


def results(module: nn.Module, x: torch.Tensor, steps: int = 2) -> list[torch.Tensor]:
    """Outputs, and gradients of x and the parameters, over two backward passes."""
    found, x = [], x.clone().requires_grad_()
    for _ in range(steps):
        y = module(x)
        found += [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]
    return found


@MAKE
@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize('training', [True, False])
def test_changed_children(make: Callable[..., nn.Module], change: Change, training: bool) -> None:
    merged, literal = changed(make, change)
    x = image()
    for a, b in zip(results(merged.train(training), x), results(literal.train(training), x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@MAKE
@pytest.mark.parametrize('change', [lambda layer: None, parametrizations.spectral_norm, parametrizations.weight_norm],
                         ids=['plain', 'spectral norm', 'weight norm'])
def test_plain_children_stay_merged(make: Callable[..., nn.Module], change: Callable[[Any], object]) -> None:
    assert not everywhere(make(), touched(change)).literal


@MAKE
@pytest.mark.parametrize('names', [['theta'], ['affinity'], ['sub_blocks.1', 'sub_blocks.1.z', 'z']], ids=str)
@pytest.mark.parametrize('hook', ['register_forward_hook', 'register_forward_pre_hook', 'global'])
def test_hooks_fire_as_often_as_with_the_literal_formula(make: Callable[..., nn.Module], names: list[str],
                                                         hook: str) -> None:
    calls = []
    for merged in (True, False):
        module, fired = make(merged=merged), list[str]()
        children = [child for name, child in module.named_modules() if name in names]
        handles = [torch_module.register_module_forward_hook(lambda child, *_, fired=fired: fired.append(child))] \
            if hook == 'global' else [getattr(child, hook)(lambda child, *_, fired=fired: fired.append(child))
                                      for child in children]
        module(image())
        for handle in handles:
            handle.remove()
        calls.append([type(child).__name__ for child in fired])
    assert calls[0] == calls[1] and len(calls[0]) >= len(children) > 0


class Causal(EmbeddedGaussian):
    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        a = super().forward(q, k).tril()
        return a / a.sum(dim=2, keepdim=True)


@pytest.mark.parametrize('make', [NonlocalStage, NonlocalBlock])
@pytest.mark.parametrize('name', ['theta', 'phi', 'affinity'])
def test_one_child_is_replaced(make: type[NonlocalBlock] | type[NonlocalStage], name: str) -> None:
    module, x = make(C, dtype=torch.float64), image()
    before = module(x)
    setattr(module, name, Causal(C // 2) if name == 'affinity' else nn.Sequential(getattr(module, name), nn.Tanh()))
    merged = module(x)
    module.merged = False
    torch.testing.assert_close(merged, module(x), rtol=1e-10, atol=1e-10)
    assert (merged - before).abs().max() > 1e-3


def test_torchs_counter_sees_the_operator() -> None:
    """Its hooks on all modules only note names."""
    with FlopCounterMode(display=False) as counter:
        NonlocalStage(C, 2)(torch.randn(2, C, 4, 3))
    assert torch.ops.timm_nonlocal.stage in counter.get_flop_counts()['Global']


def test_widths_and_kinds_that_differ() -> None:
    """Structural pruning; embeddings of which one was taken out."""
    def narrow(module: Any) -> None:
        module.sub_blocks[1].g = nn.Linear(C, 2, bias=False, dtype=torch.float64)
        module.sub_blocks[1].z = nn.Linear(2, C, bias=False, dtype=torch.float64)

    cases: list[tuple[dict[str, Any], Callable[[Any], object]]] = [
        ({}, narrow), (dict(inner_dim=C), lambda module: setattr(module, 'phi', nn.Identity())),
        (dict(inner_dim=C), lambda module: setattr(module, 'theta', nn.Identity()))]
    for options, change in cases:
        found = []
        for merged in (True, False):
            torch.manual_seed(1)
            module = NonlocalStage(C, 2, merged=merged, dtype=torch.float64, **options)
            change(module)
            torch.manual_seed(2)
            found.append(results(module, image()))
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('to_graph', [
    lambda module, x: torch.jit.trace(module, x), lambda module, x: torch.fx.symbolic_trace(module),
    lambda module, x: torch.export.export(module, (x,)).module(),
    lambda module, x: torch.compile(module, backend='eager', fullgraph=True),
], ids=['trace', 'fx', 'export', 'compile'])
@pytest.mark.parametrize('name', ['pruned', 'with a bias', 'forward of its own', 'parametrised spectral norm'])
def test_graphs_of_changed_children(to_graph: Callable[..., Any], name: str) -> None:
    torch.compiler.reset()
    for make in (lambda **options: NonlocalStage(C, 2, dtype=torch.float64, **options),
                 lambda **options: NonlocalBlock(C, dtype=torch.float64, **options)):
        (merged, literal), x = changed(make, CHANGES[name]), image()
        with torch.no_grad():
            torch.testing.assert_close(to_graph(merged.eval(), x)(x), literal.eval()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', ['wrapped', 'with a bias'])
def test_torchscript_of_changed_children(name: str) -> None:
    (merged, literal), x = changed(lambda **options: NonlocalStage(C, 2, dtype=torch.float64, **options),
                                   CHANGES[name]), image()
    torch.testing.assert_close(torch.jit.script(merged)(x), literal(x), rtol=1e-10, atol=1e-10)


NETWORKS = pytest.mark.parametrize('name', ['preresnet20_nl_proposed_k2', 'preresnet20_nl_original_k2'])


@NETWORKS
@pytest.mark.parametrize('targets', [['theta', 'phi'], ['g', 'z']], ids=str)
def test_lora(name: str, targets: list[str]) -> None:
    """Nothing changes before training, and every adapter learns."""
    peft = pytest.importorskip('peft', reason='peft is not installed')
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 8, 8)
    before = model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=4)).eval()
    torch.testing.assert_close(adapted(x), before, rtol=1e-5, atol=1e-5)
    adapted(x).square().sum().backward()
    learning = {key: p.grad.abs().max().item() for key, p in adapted.named_parameters() if 'lora_B' in key}
    assert len(learning) == 4 if 'z' in targets or 'original' in name else len(learning) == 2
    assert min(learning.values()) > 0, learning


@NETWORKS
def test_regions_compiled_by_accelerate(name: str) -> None:
    accelerate = pytest.importorskip('accelerate.utils', reason='accelerate is not installed')
    if not hasattr(accelerate, 'compile_regions'):
        pytest.skip('this accelerate compiles no regions')
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        y = accelerate.compile_regions(model, backend='eager')(x)
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


@NETWORKS
@pytest.mark.filterwarnings('ignore')
def test_dynamic_quantisation(name: str) -> None:
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 8, 8)
    y = model(x)
    error = (torch.ao.quantization.quantize_dynamic(copy.deepcopy(model))(x) - y).norm() / y.norm()
    assert 0 < error < 0.1


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('whole', [False, True])
def test_sharded_sub_blocks(tmp_path: Path, whole: bool) -> None:
    """FSDP2 in a group of one process: each sub-block a unit of its own, and the stage around them."""
    fsdp = pytest.importorskip('torch.distributed.fsdp')
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh('cpu', (1,))
        for make in (NonlocalStage, NonlocalBlocks):
            module, x = make(C, 2, dtype=torch.float64), image()
            y = module(x)
            gradients = torch.autograd.grad(y.square().sum(), list(module.parameters()))
            for unit in [*module.sub_blocks, *([module] if whole else [])]:
                fsdp.fully_shard(unit, mesh=mesh)
            for _ in range(2):
                module.zero_grad()
                sharded = module(x)
                sharded.square().sum().backward()
                torch.testing.assert_close(sharded, y, rtol=1e-10, atol=1e-10)
            for parameter, expected in zip(module.parameters(), gradients, strict=True):
                found: Any = parameter.grad
                torch.testing.assert_close(found.full_tensor() if hasattr(found, 'full_tensor') else found, expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize('make', [NonlocalStage, NonlocalBlock])
def test_weights_on_another_device(make: type[NonlocalBlock] | type[NonlocalStage]) -> None:
    """One line; children that fetch their weight when called, as accelerate's, are right."""
    x, module = torch.randn(1, C, 2, 2), make(C)
    expected = module(x)
    children: list[Any] = [child for child in module.modules() if type(child) is nn.Linear]
    for child in children:
        weight, child.weight = child.weight, nn.Parameter(child.weight.to('meta'))
        child.away = weight
    with pytest.raises(RuntimeError, match='^x is on the device cpu and the weights are on meta: move one'):
        module(x)
    for child in children:
        child.forward = lambda x, child=child: nn.functional.linear(x, child.away)
    torch.testing.assert_close(module(x), expected)
