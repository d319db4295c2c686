"""Blocks of other libraries: the operator of their own forward pass against the W that is read from their keys."""

import importlib
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import NonLocalAttn
from torch import nn

from timm_nonlocal import NonlocalBlock, NonlocalBlocks, NonlocalStage, spectrum
from timm_nonlocal.analysis.spectra import block_weights
from timm_nonlocal.checkpoints.layouts import Block, find, near, parse_key_map

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def randomised(module: nn.Module) -> nn.Module:
    """The module in eval mode, with batch norms that are not the identity and gains that are not zero."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    for name, parameter in module.named_parameters():
        if name.split('.')[-1] == 'gamma' or parameter.abs().max() == 0:
            nn.init.normal_(parameter)
    return module.eval()


def operator(module: nn.Module, channels: int, dims: int) -> torch.Tensor:
    """W of a block by its own forward pass: A X = X where all positions are the same, so that Z = X + X Wᵀ + b."""
    eye = torch.cat([torch.zeros(1, channels), torch.eye(channels)])[(...,) + (None,) * dims]
    eye = eye.expand(-1, -1, *(2,) * dims)
    with torch.no_grad():
        out = (module(eye) - eye).flatten(2)[:, :, 0]
    return (out[1:] - out[0]).T.double()


def folded(module: nn.Module) -> tuple[Block, torch.Tensor]:
    state = module.state_dict()
    (block,) = find({name: tuple(tensor.shape) for name, tensor in state.items()}).blocks
    w_z, w_g, factor = block_weights(block, state, 1e-5)
    return block, factor[:, None] * w_z @ w_g


def check(module: nn.Module, channels: int, dims: int, naming: str) -> None:
    module = randomised(module)
    block, w = folded(module)
    assert (block.naming, block.formulation) == (naming, 'original')
    expected = operator(module, channels, dims)
    torch.testing.assert_close(w, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    (record,) = spectrum(module)
    assert record.folded == bool(block.norm or block.scale)
    assert record.trace == pytest.approx(expected.trace().item(), abs=1e-4 * expected.abs().max().item() * channels)
    if record.folded:
        assert record.raw and record.raw.trace != record.trace and record.raw.raw is None


@pytest.mark.parametrize('ratio', [1 / 8, 1 / 2])
def test_timm(ratio: float) -> None:
    module = NonLocalAttn(16, rd_ratio=ratio, rd_divisor=2)
    assert spectrum(module)[0].flags == ('zero_weight',)  # γ = 0 at first
    check(module, 16, 2, 'timm')


class Named(nn.Module):
    """A block with given names, such as {'g': 'g.0', 'z': 'W.0', 'norm': 'W.1'}: X + W A X with A = 1/M."""

    def __init__(self, names: dict[str, str], channels: int = 8, inner: int = 4, dims: int = 2,
                 gamma: nn.Parameter | None = None, spectral: Callable[[nn.Module], nn.Module] | None = None) -> None:
        super().__init__()
        made = {'g': CONV[dims](channels, inner, 1), 'z': CONV[dims](inner, channels, 1), 'norm': NORM[dims](channels)}
        if spectral:
            made = {role: spectral(module) if role != 'norm' else module for role, module in made.items()}
        for role, path in names.items():
            parent: Any = self
            for part in path.split('.')[:-1]:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            parent.add_module(path.split('.')[-1], made[role])
        self.parts = [made[role] for role in names]
        self.gamma = gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.flatten(2).mean(2)[(...,) + (None,) * (x.ndim - 2)].expand_as(x)
        for part in self.parts:
            y = part(y)
        return x + (y if self.gamma is None else self.gamma * y)


LAYOUTS = [
    ('slowfast', {'g': 'conv_g', 'z': 'conv_out', 'norm': 'norm'}, 3),
    ('slowfast', {'g': 'conv_g', 'z': 'conv_out'}, 3),
    ('mmcv', {'g': 'g.conv', 'z': 'conv_out.conv', 'norm': 'conv_out.bn'}, 2),
    ('mmcv', {'g': 'g.0.conv', 'z': 'conv_out.conv'}, 1),
    ('alexhex7', {'g': 'g', 'z': 'W.0', 'norm': 'W.1'}, 2),
    ('alexhex7', {'g': 'g.0', 'z': 'W.0', 'norm': 'W.1'}, 3),
    ('alexhex7', {'g': 'g.0', 'z': 'W'}, 1),
    ('tea1528', {'g': 'g', 'z': 'W_z.0', 'norm': 'W_z.1'}, 2),
    ('tea1528', {'g': 'g', 'z': 'W_z'}, 2),
]


@pytest.mark.parametrize(('naming', 'names', 'dims'), LAYOUTS)
def test_namings(naming: str, names: dict[str, str], dims: int) -> None:
    check(Named(names, dims=dims), 8, dims, naming)


@pytest.mark.parametrize('spectral', [None, nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize(('naming', 'names'), [
    ('biggan', {'g': 'g', 'z': 'o'}), ('biggan-hf', {'g': 'snconv1x1_g', 'z': 'snconv1x1_o_conv'})])
def test_gains_and_spectral_normalisation(naming: str, names: dict[str, str],
                                          spectral: Callable[[nn.Module], nn.Module] | None) -> None:
    module = Named(names, gamma=nn.Parameter(torch.tensor(0.3)), spectral=spectral)
    with torch.no_grad():
        module(torch.randn(2, 8, 4, 4))
    check(module, 8, 2, naming)
    assert spectrum(module, fold=False)[0].raw is None


def test_spectral_normalisation_as_biggan_pytorch_keeps_it() -> None:
    """One vector u0 beside each weight; v follows from it by a step of the power method."""
    g, o, u_g, u_o = torch.randn(4, 8, 1, 1), torch.randn(8, 4, 1, 1), torch.randn(1, 4), torch.randn(1, 8)
    state = {'attention.g.weight': g, 'attention.g.u0': u_g, 'attention.g.sv0': torch.ones(1),
             'attention.o.weight': o, 'attention.o.u0': u_o, 'attention.gamma': torch.tensor(2.0)}

    def normalised(w: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        v = nn.functional.normalize(u @ w)
        return w / (nn.functional.normalize(v @ w.T) @ w @ v.T)

    expected = 2 * normalised(o.flatten(1).double(), u_o.double()) @ normalised(g.flatten(1).double(), u_g.double())
    assert spectrum(state)[0].trace == pytest.approx(expected.trace().item())
    del state['attention.gamma']
    assert spectrum(state) == []  # g and o alone could be anything


INSTALLED = {
    'mmcv': lambda m: [(m.NonLocal1d(8, norm_cfg={'type': 'BN1d'}), 8, 1), (m.NonLocal2d(8, sub_sample=True), 8, 2),
                       (m.NonLocal2d(16, reduction=4, norm_cfg={'type': 'BN'}, mode='gaussian'), 16, 2),
                       (m.NonLocal3d(8, norm_cfg={'type': 'BN3d'}), 8, 3)],
    'slowfast': lambda m: [(m.create_nonlocal(dim_in=8, dim_inner=4), 8, 3),
                           (m.create_nonlocal(dim_in=8, dim_inner=2, norm=None), 8, 3)],
    'biggan-hf': lambda m: [(m.SelfAttn(16), 16, 2)],
}


@pytest.mark.parametrize(('naming', 'module'), [
    ('mmcv', 'mmcv.cnn'), ('slowfast', 'pytorchvideo.layers.nonlocal_net'),
    ('biggan-hf', 'pytorch_pretrained_biggan.model')])
def test_real_modules_where_they_are_installed(naming: str, module: str) -> None:
    pytest.importorskip(module.partition('.')[0])
    for block, channels, dims in INSTALLED[naming](importlib.import_module(module)):
        check(block, channels, dims, naming)


def test_own_blocks() -> None:
    stage = NonlocalStage(8, 2, symmetric=True)
    records = spectrum(nn.ModuleDict({'here': stage, 'there': NonlocalBlocks(8, 2), 'alone': NonlocalBlock(8),
                                      'control': NonlocalStage(8, 1, affinity='uniform')}))
    assert [(r.stage, r.index, r.formulation, r.symmetric) for r in records] == [
        ('alone', 0, 'original', False), ('control', 0, 'proposed', True), ('here', 0, 'proposed', True),
        ('here', 1, 'proposed', True), ('there', 0, 'original', False), ('there', 1, 'original', False)]
    (control,) = spectrum(NonlocalStage(8, 1, affinity='uniform').state_dict())  # whose names do not tell
    assert (control.formulation, control.symmetric) == ('unknown', None)
    as_conv = {key: value[:, :, None, None] for key, value in stage.state_dict().items()}
    assert spectrum(as_conv) == spectrum(stage)


def test_layer10_follows_layer9() -> None:
    block = NonlocalBlock(4).state_dict()
    state = {f'layer{number}.{name}': tensor for number in (10, 9) for name, tensor in block.items()}
    assert [record.stage for record in spectrum(state)] == ['layer9', 'layer10']


def test_what_is_left_out_is_said() -> None:
    shapes = {'a.g.weight': (4, 8, 3, 3), 'a.z.weight': (8, 4, 1, 1), 'b.g.weight': (4, 8), 'b.z.weight': (8, 3),
              'd.g.weight': (10 ** 9, 10 ** 9), 'd.z.weight': (10 ** 9, 10 ** 9),
              'c.conv_g.weight': (4, 8, 1), 'c.conv_out.weight': (8, 4, 1), 'c.norm.weight': (8,), 'c.norm.bias': (8,)}
    found = find(shapes)
    assert [(block.name, block.norm) for block in found.blocks] == [('c', None)]
    assert [re.findall('not 1×1|transpose|channels|not folded', warning)[0] for warning in found.warnings] == [
        'not 1×1', 'transpose', 'channels', 'not folded']


def test_names_that_look_alike_are_no_blocks() -> None:
    assert find({'g.weight': (4, 8), 'o.weight': (8, 4)}).blocks == []  # no gain
    assert find({'lstm.g.weight': (4,), 'lstm.z.weight': (4,), 'W.weight': (3, 3)}) == find({})
    assert find({'a.g.weight': (0, 8), 'a.z.weight': (8, 0)}).blocks == []


def test_key_map() -> None:
    attention: Any = nn.ModuleDict({name: nn.Conv2d(6, 6, 1) for name in ('q', 'k', 'v', 'proj_out')})
    model = nn.ModuleDict({'mid': nn.ModuleDict({'attn_1': attention})})
    assert spectrum(model) == []
    (record,) = spectrum(model, key_map=r'g=\.v\.weight,z=\.proj_out\.weight')
    w = attention['proj_out'].weight.flatten(1) @ attention['v'].weight.flatten(1)
    assert (record.stage, record.naming) == ('mid.attn_1', 'key-map')
    assert record.trace == pytest.approx(w.trace().item(), abs=1e-5)
    state = {'a.value.weight': torch.randn(2, 4), 'a.out.weight': torch.randn(4, 2), 'a.bn.weight': torch.ones(4) * 3,
             'a.bn.running_var': torch.ones(4), 'a.gain': torch.tensor(2.0)}
    (record,) = spectrum(state, eps=0.0, key_map=r'g=value\.weight,z=out\.weight,bn=bn\.weight,scale=gain')
    assert record.raw and record.raw.trace is not None and record.trace == pytest.approx(6 * record.raw.trace)


@pytest.mark.parametrize('text', ['g=a', 'a,b', 'g=(,z=b', 'g=a,z=b,g=c', 'g=a,z=b,x=c', ''])
def test_key_maps_of_another_form(text: str) -> None:
    if text == 'g=a,z=b,x=c':  # x= belongs to the expression of z
        assert parse_key_map(text)['z'].pattern == 'b,x=c'
        return
    with pytest.raises(ValueError, match='regular expression|write g=REGEX'):
        parse_key_map(text)


def test_near_pairs_prefer_names_that_sound_nonlocal() -> None:
    shapes = {'layer1.conv1.weight': (4, 8, 1, 1), 'layer1.conv3.weight': (8, 4, 1, 1),
              'attention.down.weight': (4, 8), 'attention.up.weight': (8, 4), 'fc.weight': (10, 8)}
    assert near(shapes)[0] == ('attention.down.weight', 'attention.up.weight')
    assert ('layer1.conv1.weight', 'layer1.conv3.weight') in near(shapes)


@pytest.mark.parametrize('name', ['t{}.weight', 'block{}.conv.weight', 'blocks.g.{}.weight', 'net.{}.z.weight'])
@pytest.mark.parametrize('key_map', [None, 'g=o.weight,z=t.weight'])
def test_time_is_linear_in_the_number_of_tensors(name: str, key_map: str | None) -> None:
    shapes = {name.format(number): ((4, 8), (8, 4))[number % 2] for number in range(12_000)}
    start = time.perf_counter()
    assert find(shapes, parse_key_map(key_map) if key_map else None).blocks == [] and len(near(shapes)) in (0, 3)
    assert time.perf_counter() - start < 5  # it took 50 s


def test_batch_norm_eps_is_the_modules_own() -> None:
    module = randomised(NonLocalAttn(16, rd_ratio=1 / 2, rd_divisor=2))
    norm: Any = module.norm
    norm.eps = 0.5
    expected = operator(module, 16, 2).trace().item()
    assert spectrum(module)[0].trace == pytest.approx(expected, abs=1e-4)
    assert spectrum(module.state_dict(), eps=0.5)[0].trace == pytest.approx(expected, abs=1e-4)
    assert spectrum(module.state_dict())[0].trace != pytest.approx(expected, abs=1e-4)
