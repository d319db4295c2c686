"""Weights that are stored as other tensors: what is read is what the module computes with, or the tensor is named."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from timm_nonlocal import NonlocalBlock, NonlocalStage, spectrum
from timm_nonlocal.checkpoints.layouts import find
from timm_nonlocal.checkpoints.stored import own_weight


class Double(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class Masked(Double):
    mask: torch.Tensor

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.register_buffer('mask', torch.rand(shape) > 0.4)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


class Bar(nn.Module):
    """Spectral normalisation as it was written before torch had one."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        u, s, v = torch.linalg.svd(module.weight.detach())
        module.weight_bar, module.weight_u, module.weight_v = (
            nn.Parameter(tensor) for tensor in (module.weight.detach(), u[:, 0], v[0]))
        del module.weight
        self.module, self.largest = module, s[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.module.weight_bar / self.largest, self.module.bias)


class Around(nn.Module):
    """Such as a profiler puts around a layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def parametrised(layer: nn.Module, part: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, 'weight', part)
    return layer


def pruned(layer: Any) -> Any:
    prune.random_structured(prune.random_unstructured(layer, 'weight', 0.5), 'weight', 0.3, dim=0)
    with torch.no_grad():  # as an optimizer does: `layer.weight` follows with the next forward only
        layer.weight_orig.add_(1)
    return layer


def adapted(layer: Any) -> Any:
    peft = pytest.importorskip('peft')
    layer = peft.tuners.lora.Linear(layer, 'default', peft.LoraConfig(lora_dropout=0.5), r=2, lora_alpha=6)
    nn.init.normal_(layer.lora_B['default'].weight)
    return layer


def quantised(layer: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})[0]


WHOLE: dict[str, Any] = {'dim': None}  # torch's annotations know integers alone
KNOWN: dict[str, Callable[[Any], Any]] = {
    'pruned': pruned,
    'weight_norm': nn.utils.weight_norm,
    'weight_norm of columns': lambda layer: nn.utils.weight_norm(layer, dim=1),
    'weight_norm of the whole': lambda layer: nn.utils.weight_norm(layer, **WHOLE),
    'parametrised weight_norm': parametrizations.weight_norm,
    'parametrised weight_norm of the whole': lambda layer: parametrizations.weight_norm(layer, **WHOLE),
    'spectral_norm': nn.utils.spectral_norm,
    'parametrised spectral_norm': parametrizations.spectral_norm,
    'spectral normalisation by hand': Bar,
    'compiled': lambda layer: torch.compile(layer, backend='eager'),
}
UNKNOWN: dict[str, tuple[Callable[[Any], Any], str]] = {  # with more to them than the tensors; the one to be named
    'parametrised': (lambda layer: parametrised(layer, Double()), 'parametrizations.weight.original'),
    'masked': (lambda layer: parametrised(layer, Masked(layer.weight.shape)), 'parametrizations.weight.0.mask'),
    'orthogonal': (parametrizations.orthogonal, 'parametrizations.weight.0.base'),
    'two': (lambda layer: parametrised(parametrizations.weight_norm(layer), Masked(layer.weight.shape)),
            'parametrizations.weight.1.mask'),
    'adapted': (adapted, 'lora_A.default.weight'),
    'quantised': (quantised, 'zero_point'),
    'wrapped': (Around, 'inner.weight'),
}


def computed(layer: nn.Module) -> torch.Tensor:
    """The matrix that the layer is, by its own forward pass."""
    with torch.no_grad():
        x = torch.eye(9, next(size for part in layer.modules() for name in ('in_features', 'in_channels')
                              if (size := getattr(part, name, None))))
        return (layer.eval()(x)[:-1] - layer(torch.zeros_like(x[:1]))).T.double()


def made(change: Callable[[Any], Any], *roles: str) -> tuple[NonlocalStage, Any]:
    torch.manual_seed(0)
    stage = NonlocalStage(8, 2)
    block = stage.sub_blocks[1]
    for role in roles:
        setattr(block, role, change(getattr(block, role)))
        block.get_submodule(role)(torch.randn(2, 8 if role == 'g' else 4))
    return stage, block


def true_trace(block: Any) -> float:
    return sum((computed(block.z)[:, i] @ computed(block.g)[i]).item() for i in range(4))


@pytest.mark.parametrize('roles', ['gz', 'g', 'z'])
@pytest.mark.parametrize('name', KNOWN)
def test_known_ones_are_applied(name: str, roles: str) -> None:
    stage, block = made(KNOWN[name], *roles)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        from_file, from_module = spectrum(stage.state_dict()), spectrum(stage)
    assert from_file == from_module and [record.index for record in from_file] == [0, 1]
    assert from_file[1].trace == pytest.approx(true_trace(block), rel=1e-5)
    assert all(key in stage.state_dict() for key in filter(None, from_module[1].keys.values()))


@pytest.mark.parametrize('roles', ['gz', 'z'])
@pytest.mark.parametrize('name', UNKNOWN)
def test_others_are_asked_of_the_module_and_refused_in_a_file(name: str, roles: str) -> None:
    change, strange = UNKNOWN[name]
    stage, block = made(change, *roles)
    stage.train()
    assert spectrum(stage)[1].trace == pytest.approx(true_trace(block), rel=0.01 if name == 'quantised' else 1e-5)
    with pytest.warns(UserWarning, match=rf'sub_blocks\.1\.{roles[-1]}\.{strange}.* the block is left out'):
        assert [record.index for record in spectrum(stage.state_dict())] == [0]


@pytest.mark.parametrize('dims', [1, 2, 3])
def test_a_convolution_that_is_asked(dims: int) -> None:
    conv = getattr(nn, f'Conv{dims}d')(8, 4, 1)
    torch.testing.assert_close(own_weight(nn.Sequential(Around(conv)), '0'), conv.weight.detach().flatten(1))
    assert own_weight(nn.Sequential(nn.Tanh()), '0') is own_weight(nn.Sequential(), 'gone') is None


def test_a_module_is_left_as_it_is() -> None:
    stage, _ = made(adapted, 'g')
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    spectrum(stage.train())
    assert all(module.training for module in stage.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.state_dict().items())


@pytest.mark.parametrize(('beside', 'named'), [
    ({'g.weight_scale': (4, 1)}, 'g.weight_scale'), ({'z.weight.absmax': (4,)}, 'z.weight.absmax'),
    ({'g.lora_A': (2, 8), 'g.lora_B': (4, 2)}, 'g.lora_A, nl.g.lora_B'),
    ({'z.lora_magnitude_vector': (8,)}, 'z.lora_magnitude_vector'),
])
def test_anything_beside_a_weight_is_named(beside: dict[str, tuple[int, ...]], named: str) -> None:
    shapes = {'nl.theta.weight': (4, 8), 'nl.g.weight': (4, 8), 'nl.z.weight': (8, 4), 'nl.g.bias': (4,)}
    assert len(find(shapes).blocks) == 1
    found = find({**shapes, **{f'nl.{name}': shape for name, shape in beside.items()}})
    assert found.blocks == [] and len(found.warnings) == 1 and f'nl.{named}' in found.warnings[0]


def test_a_layer_without_any_weight_is_named() -> None:
    found = find({f'nl.{role}.{part}': (4,) for role in ('theta', 'g', 'z') for part in ('qweight', 'qzeros')})
    assert [re.findall(r'nl\.\S+', warning) for warning in found.warnings] == [
        [f'nl.{role}.qweight,', f'nl.{role}.qzeros'] for role in 'gz']


@pytest.mark.parametrize('parts', [
    {'weight_orig': (4, 8), 'weight_mask': (4, 7)}, {'weight_v': (4, 8), 'weight_g': (3, 1)},
    {'weight_orig': (4, 8), 'weight_u': (5,), 'weight_v': (8,)}, {'weight': (4, 8), 'u0': (1, 8)}])
def test_parts_that_do_not_fit_each_other(parts: dict[str, tuple[int, ...]]) -> None:
    found = find({'theta.weight': (4, 8), 'z.weight': (8, 4), **{f'g.{name}': shape for name, shape in parts.items()}})
    assert found.blocks == [] and 'do not make one weight' in found.warnings[0]


def test_a_key_map_applies_what_stands_beside_its_tensors() -> None:
    attention: Any = nn.ModuleDict({'v': pruned(nn.Linear(8, 4)), 'out': nn.utils.weight_norm(nn.Linear(4, 8))})
    for layer, size in (('v', 8), ('out', 4)):
        attention[layer](torch.ones(size))
    (record,) = spectrum(attention, key_map='g=v.weight_orig,z=out.weight_v')
    assert record.trace == pytest.approx((attention['out'].weight @ attention['v'].weight).trace().item(), rel=1e-5)


def test_a_z_without_its_g_is_said() -> None:
    block = {name: tensor for name, tensor in NonlocalBlock(8).state_dict().items() if name != 'g.weight'}
    with pytest.warns(UserWarning, match=r'^nl\.z\.weight has no W_g beside it'):
        assert spectrum({f'nl.{name}': tensor for name, tensor in block.items()}) == []
