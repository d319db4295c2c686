"""What works through a child's call, or puts another child there, works in the merged form too."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from timm_nonlocal import NonlocalBlock, NonlocalBlocks, NonlocalStage
from timm_nonlocal.layers.dispatch import is_map

MAKE: dict[str, Callable[..., nn.Module]] = {
    'stage': lambda **kwargs: NonlocalStage(8, 2, **kwargs),
    'block': lambda **kwargs: NonlocalBlocks(8, 2, **kwargs),
    'dot product': lambda **kwargs: NonlocalStage(8, 2, affinity='dot_product', **kwargs),
}
NAMES = 'theta', 'phi', 'g', 'z'


class Wrapper(nn.Module):
    """As libraries put it around a layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 1


def holder_of(module: nn.Module, name: str) -> Any:
    """The module of a nonlocal module that has a child of this name, the first one."""
    return next(part for part in module.modules() if name in part._modules)


def put(child: Callable[[nn.Module], nn.Module]) -> Callable[[Any, str], None]:
    return lambda holder, name: setattr(holder, name, child(getattr(holder, name)))


def with_bias(layer: nn.Module) -> nn.Module:
    layer.bias = nn.Parameter(torch.randn(layer.weight.shape[0], dtype=layer.weight.dtype))  # type: ignore
    return layer


def override(holder: Any, name: str) -> None:
    """As accelerate's hooks do it."""
    layer = getattr(holder, name)
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


CHANGES: dict[str, Callable[[Any, str], Any]] = {
    'spectral_norm': lambda holder, name: spectral_norm(getattr(holder, name)),
    'spectral_norm, parametrised': lambda holder, name: parametrizations.spectral_norm(getattr(holder, name)),
    'weight_norm': lambda holder, name: weight_norm(getattr(holder, name)),
    'weight_norm, parametrised': lambda holder, name: parametrizations.weight_norm(getattr(holder, name)),
    'prune': lambda holder, name: prune.random_unstructured(getattr(holder, name), 'weight', 0.5),
    'identity wrapper': put(nn.Sequential),
    'wrapper': put(Wrapper),
    'bias': put(with_bias),
    'forward': override,
    'hook': lambda holder, name: getattr(holder, name).register_forward_hook(lambda *args: 3 * args[-1]),
    'backward hook': lambda holder, name: getattr(holder, name).register_full_backward_hook(
        lambda _, given, __: tuple(2 * gradient for gradient in given)),
}


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and all gradients of two steps, in eval mode so that power iterations stand still."""
    found = []
    for _ in range(2):
        x = x.detach().requires_grad_()
        module.zero_grad()
        z = module.eval()(x)
        z.square().mean().backward()
        found += [z, x.grad, *(parameter.grad for parameter in module.parameters() if parameter.grad is not None)]
    return found


def literal(module: nn.Module) -> nn.Module:
    """A copy that follows the equations."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, NonlocalBlock | NonlocalStage):
            part.merged = False
    return module


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('kind', MAKE)
def test_a_changed_child_is_not_passed_by(kind: str, name: str, change: str) -> None:
    torch.manual_seed(0)
    module, x = MAKE[kind]().double(), torch.randn(2, 8, 3, 4, dtype=torch.float64)
    plain = MAKE[kind](merged=False).double()
    plain.load_state_dict(module.state_dict())
    before = module(x)
    for each in (module, plain):
        torch.manual_seed(1)
        CHANGES[change](holder_of(each, name), name)
    found, expected = results(module, x), results(plain, x)
    assert len(found) == len(expected) >= 2 * (2 + 5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    the_same = change in ('identity wrapper', 'backward hook') or change.startswith('weight_norm') or (
        name == 'phi' and change in ('wrapper', 'bias') and kind != 'dot product')  # a softmax does not see a shift
    assert torch.allclose(found[0], before, atol=1e-8) == the_same


@pytest.mark.parametrize('kind', MAKE)
def test_hooks_fire_once_a_call(kind: str) -> None:
    module, fired = MAKE[kind](), []
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear) or 'affinity' in name]
    for name in names:
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
    module(torch.randn(1, 8, 3, 3))
    assert sorted(fired) == sorted(names) and len(names) >= 7


def test_plain_children_are_read_and_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also parametrised ones; no M×M matrix is made then."""
    for module in (NonlocalStage(8, 2), NonlocalBlock(8), NonlocalStage(8, 2, symmetric=True, stable=True)):
        x = torch.randn(1, 8, 3, 3)
        assert module.only_maps(x)
        monkeypatch.setattr(type(module.affinity), 'forward', None)
        assert module(x).shape == x.shape
        monkeypatch.undo()


def test_quantized() -> None:
    model = timm.create_model('preresnet20_nl_proposed_k2').eval()
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert 'dynamic' in type(quantized.layer1.nl.theta).__module__
    features, found = model.forward_features(x), quantized.forward_features(x)
    assert 0 < (found - features).norm() / features.norm() < 0.05


def test_adapters() -> None:
    peft = pytest.importorskip('peft')
    for names in (['theta', 'phi'], ['g', 'z']):
        model = timm.create_model('preresnet20_nl_proposed_k2').eval()
        x = torch.randn(2, 3, 8, 8)
        before = model(x)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, r=4, init_lora_weights=True)).eval()
        torch.testing.assert_close(adapted(x), before, rtol=1e-4, atol=1e-5)
        adapted(x).square().sum().backward()
        gradients = [parameter.grad for name, parameter in adapted.named_parameters() if 'lora_B' in name]
        assert len(gradients) in (2, 4) and all(gradient.abs().sum() > 0 for gradient in gradients)


def test_compiled_regions() -> None:
    accelerate = pytest.importorskip('accelerate.utils')
    model = timm.create_model('preresnet20_nl_proposed_k2').eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(accelerate.compile_regions(model, backend='eager')(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason='torch was built without torch.distributed')
def test_sharded_sub_blocks(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    stage, x = NonlocalStage(8, 2), torch.randn(2, 8, 3, 4)
    expected = results(copy.deepcopy(stage), x)
    mesh = init_device_mesh('cpu', (1,))
    for sub_block in stage.sub_blocks:
        fully_shard(sub_block, mesh=mesh)
    fully_shard(stage, mesh=mesh)
    for a, b in zip(results(stage, x), expected, strict=True):
        torch.testing.assert_close(getattr(a, 'full_tensor', lambda a=a: a)(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('way', ['compile', 'trace', 'fx', 'script'])
def test_graphs_of_changed_children(way: str) -> None:
    for module in (NonlocalStage(8, 2), NonlocalBlock(8)):
        x = torch.randn(1, 8, 3, 3)
        holder_of(module, 'g').g = nn.Sequential(nn.Linear(8, 4))  # with a bias
        make: dict[str, Callable[[nn.Module], Any]] = {
            'compile': lambda module: torch.compile(module, backend='eager', fullgraph=True),
            'trace': lambda module: torch.jit.trace(module, torch.randn(1, 8, 3, 3)),
            'fx': torch.fx.symbolic_trace, 'script': torch.jit.script}
        torch.testing.assert_close(make[way](module)(x), literal(module)(x), rtol=1e-4, atol=1e-6)


def test_weights_kept_elsewhere() -> None:
    """Offloaded weights come when their layer is called, and are nowhere before."""
    accelerate = pytest.importorskip('accelerate')
    stage, x = NonlocalStage(8, 2), torch.randn(1, 8, 3, 3)
    expected = stage(x)
    offloaded = accelerate.cpu_offload(copy.deepcopy(stage), torch.device('cpu'))
    assert offloaded.theta.weight.is_meta and not is_map(offloaded.theta, x)
    torch.testing.assert_close(offloaded(x), expected, rtol=1e-4, atol=1e-6)
