"""Where `insert` finds the channels: by no size that happens to be there, or not at all; and that its part stays."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d, unfreeze_batch_norm_2d
from timm.models.mlp_mixer import MlpMixer
from timm.utils import reparameterize_model
from torch import nn
from torchvision.models import get_model

from tests.support.networks import wake
from timm_nonlocal import insert, remove


class Do(nn.Module):
    """A module of one function."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1)


class Fixed(nn.Module):
    """Takes one size only, as most ViTs do."""

    def __init__(self, size: tuple[int, ...], body: nn.Module) -> None:
        super().__init__()
        self.size, self.body = size, body

    def forward(self, x: torch.Tensor) -> Any:
        assert x.shape[1:] == self.size
        return self.body(x)


SIZES = [  # module, example, C, and whether it is the last axis
    (nn.Conv2d(3, 8, 1), (1, 3, 8, 8), 8, False),
    (nn.Conv2d(3, 64, 4, 4), (1, 3, 256, 512), 64, False),
    (nn.Sequential(nn.Conv2d(3, 8, 1), Do(last)), (1, 3, 8, 8), 8, True),
    (nn.Sequential(nn.Conv2d(3, 28, 4, 4), Do(last)), (1, 3, 112, 224), 28, True),
    (nn.Conv1d(4, 8, 1), (1, 4, 8), 8, False),
    (nn.Conv1d(4, 6, 1), (1, 4, 50), 6, False),
    (nn.Linear(4, 8), (1, 8, 4), 8, True),
    (nn.Linear(4, 50), (1, 6, 4), 50, True),
    (nn.Conv3d(2, 4, 1), (1, 2, 4, 4, 4), 4, False),
    (nn.Sequential(nn.Conv3d(2, 4, 1), Do(last)), (1, 2, 4, 9, 5), 4, True),
    (nn.Sequential(nn.Linear(4, 5), nn.ReLU()), (1, 5, 5, 5, 4), 5, True),
    (nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(7)), (1, 3, 9, 9), 8, False),  # another size changes none
    (Fixed((3, 8, 8), nn.Sequential(nn.Conv2d(3, 6, 1), nn.GELU())), (1, 3, 8, 8), 6, False),
    (Fixed((9, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6))), (1, 9, 4), 6, True),
    (Fixed((3, 5, 5), nn.Sequential(nn.Conv2d(3, 6, 1), Do(last))), (1, 3, 5, 5), 6, True),
]


@pytest.mark.parametrize(('module', 'shape', 'dim', 'channels_last'), SIZES)
def test_the_channels_are_found_whatever_their_size(module: nn.Module, shape: tuple[int, ...], dim: int,
                                                    channels_last: bool) -> None:
    model: Any = nn.Sequential(copy.deepcopy(module), nn.Identity()).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        plain = model(x)
        insert(model, '1', k=2, example=x)
        model[1].nl.sub_blocks[0].z.weight.normal_()
        assert model[1].nl.theta.weight.shape == (dim // 2, dim)
        expected = model[1].nl(plain.movedim(-1, 1)).movedim(1, -1) if channels_last else model[1].nl(plain)
        assert torch.equal(model(x), expected) and not torch.allclose(expected, plain)


@pytest.mark.parametrize(('make', 'name', 'after', 'size', 'dim'), [
    (timm.create_model, 'resnet18', 'layer1', (256, 512), 64),
    pytest.param(get_model, 'swin_t', 'features.1', (224, 448), 96, marks=pytest.mark.slow),
    pytest.param(get_model, 'swin3d_t', 'features.0', (8, 64, 96), 96, marks=pytest.mark.slow),
])
def test_the_channels_of_networks(make: Callable[..., Any], name: str, after: str, size: tuple[int, ...],
                                  dim: int) -> None:
    model = insert(make(name).eval(), after, example=torch.zeros(1, 3, *size))
    nl = [m for key, m in model.named_modules() if key.endswith('.nl')]
    assert [m.theta.weight.shape for m in nl] == [(dim // 2, dim)]


OPEN = [
    (Fixed((3, 8, 8), nn.Conv2d(3, 8, 1)), 'body', (1, 3, 8, 8), 'nothing tells .* say channels_last='),
    (Fixed((3, 8, 8), nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))), 'body.1', (1, 3, 8, 8), 'nothing tells'),
    (nn.Sequential(nn.Conv1d(4, 6, 1), Do(lambda x: x.mT @ x)), '1', (1, 4, 9), 'no outer axis keeps its size'),
    (nn.Sequential(nn.Conv1d(4, 6, 1), Do(lambda x: x.permute(2, 0, 1))), '1', (1, 4, 9), 'first axis is not'),
]


@pytest.mark.parametrize(('model', 'after', 'shape', 'message'), OPEN)
def test_what_stays_open_is_refused(model: nn.Module, after: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"after='{after}': it gives .*{message}") as error:
        insert(model, after, example=torch.zeros(shape))
    assert '\n' not in str(error.value) and not any(module._forward_hooks for module in model.modules())


def test_tokens_mixed_by_a_linear_are_no_channels_and_the_argument_decides() -> None:
    model: Any = MlpMixer(img_size=96, patch_size=32, num_blocks=1, embed_dim=32)  # 9 tokens
    x = torch.zeros(1, 3, 96, 96)
    with pytest.raises(ValueError, match=r'\(1, 32, 9\), and nothing tells'):  # by its last layer, C were 9
        insert(model, 'blocks.0.mlp_tokens', example=x)
    for channels_last, dim in ((False, 32), (True, 9)):
        insert(model, 'blocks.0.mlp_tokens', example=x, channels_last=channels_last)
        assert model.blocks[0].mlp_tokens.nl.theta.weight.shape == (dim // 2, dim)
        remove(model)
    insert(model, 'blocks.0', example=x)
    assert model.blocks[0].nl.theta.weight.shape == (16, 32)


def test_the_model_is_left_as_it_was() -> None:
    """By several runs, too: of its own state nothing changes, and no gradient is kept."""
    model: Any = timm.create_model('test_resnet').train()
    model.layer1.eval()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    insert(model, 'layer2.0')
    remove(model)
    assert [m.training for m in model.modules()] == modes and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Pair(nn.Module):
    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.pair, self.make = nn.Conv2d(3, 6, 1), Do(make), make

    def forward(self, x: torch.Tensor) -> Any:
        return self.pair(self.conv(x))


@pytest.mark.parametrize('make', [
    lambda x: (x, x.mean((2, 3))), lambda x: [x, None, {'size': x.shape}], lambda x: (last(x), x.flatten(2)),
])
def test_the_first_of_several_outputs(make: Callable[[torch.Tensor], Any]) -> None:
    """It alone is changed; the rest goes on as it is, in the same kind of container."""
    model: Any = Pair(make).eval()
    x = torch.randn(2, 3, 5, 9)
    with torch.no_grad():
        plain = model(x)
        wake(insert(model, 'pair', example=x))
        nl, out, is_last = model.pair.nl, model(x), plain[0].shape[-1] == 6
        assert type(out) is type(plain) and len(out) == len(plain)
        assert torch.equal(out[0], last(nl(plain[0].movedim(-1, 1))) if is_last else nl(plain[0]))
        assert not torch.equal(out[0], plain[0])
        for actual, expected in zip(out[1:], plain[1:], strict=True):
            assert torch.equal(actual, expected) if isinstance(actual, torch.Tensor) else actual == expected
        assert remove(model)(x)[0].equal(plain[0])


@pytest.mark.parametrize(('make', 'message'), [
    (lambda x: [x, x[:, :, ::2]], r'a list of \(1, 6, 5, 9\), \(1, 6, 3, 9\), of which the first is not the only'),
    (lambda x: (x.mean((2, 3)), x), r'a tuple of \(1, 6\), \(1, 6, 5, 9\), of which the first is not the only'),
    (lambda x: (x, [x]), r'a tuple of \(1, 6, 5, 9\), list, of which'),
    (lambda x: {'x': x}, 'it gives dict, not'),
])
def test_several_features_are_refused(make: Callable[[torch.Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        insert(Pair(make), 'pair', example=torch.zeros(1, 3, 5, 9))


def test_pit() -> None:
    """Its stages give (map, class tokens), of which the network reads both."""
    model: Any = timm.create_model('pit_ti_224', depth=(1, 1, 1)).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        plain = model(x)
        insert(model, 'transformers.0')
        assert torch.equal(model(x), plain) and model.transformers[0].nl.theta.weight.shape == (32, 64)
        assert not torch.equal(wake(model)(x), plain)
        other = pickle.loads(pickle.dumps(model))
        assert torch.equal(other(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize(('after', 'place'), [('layer1.0', 'layer1.0'), ('layer2.0.downsample', 'layer2.0.downsample')])
@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm,
                                     freeze_batch_norm_2d, lambda m: unfreeze_batch_norm_2d(freeze_batch_norm_2d(m))])
def test_norms_are_replaced_and_the_part_stays(after: str, place: str, convert: Callable[[Any], Any]) -> None:
    """In a block that has norms inside, and after a Sequential that ends in one."""
    model, x = wake(insert(timm.create_model('resnet18').eval(), after)), torch.randn(1, 3, 64, 64)
    assert hasattr(model.get_submodule(place), 'nl')
    with torch.no_grad():
        y = model(x)
        assert not torch.equal(remove(copy.deepcopy(model))(x), y)
        torch.testing.assert_close(convert(model).eval()(x), y)


def test_after_a_sequential_that_ends_in_a_norm() -> None:
    plain: Any = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6))).eval()
    model: Any = wake(insert(copy.deepcopy(plain), '1', k=2))
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(y, model[1].nl(plain(x))) and not torch.equal(y, plain(x))
        for other in (torch.jit.script(model), torch.fx.symbolic_trace(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(x), y)
        with pytest.raises(ValueError, match="'1': there is a nonlocal module already"):
            insert(model, '1')
        assert torch.equal(remove(copy.deepcopy(model))(x), plain(x))
        assert torch.equal(remove(model, '1')(x), plain(x)) and list(model.state_dict()) == list(plain.state_dict())
        with pytest.raises(ValueError, match='the norm at its end has its channels at axis 1'):
            insert(model, '1', channels_last=True)


@pytest.mark.parametrize(('name', 'after', 'message'), [
    ('resnet18', 'bn1', "'bn1': a BatchNorm2d that convert_sync_batchnorm and freeze_batch_norm_2d would replace, and"),
    ('efficientnet_b0', 'blocks.0.0.bn1', 'a BatchNormAct2d that convert_sync_batchnorm'),
    ('levit_128s', 'stem.conv1', 'a ConvNorm that reparameterize_model would replace, and drop the nonlocal module'),
    ('levit_128s', 'stem.conv1.linear', 'a Conv2d that reparameterize_model would replace'),
    ('coat_tiny', 'serial_blocks1', 'a ModuleList only holds modules; name one of them, such as serial_blocks1.1'),
    ('twins_pcpvt_small', 'blocks.0', 'a ModuleList only holds modules; name one of them, such as blocks.0.2'),
    ('crossvit_tiny_240', 'blocks.0', r'a list of \(1, 401, 96\), \(1, 197, 192\), of which the first is not the only'),
    ('efficientvim_m1', 'stages.0', r'a tuple of \(1, 128, 14, 14\), .* of which the first is not the only'),
])
def test_places_that_would_lose_it_or_have_none(name: str, after: str, message: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f'this timm has no {name}')
    model = timm.create_model(name)
    with pytest.raises(ValueError, match=message):
        insert(model, after)


def test_reparameterised_blocks_keep_it() -> None:
    model: Any = insert(timm.create_model('levit_128s').eval(), 'stages.1')
    seen = []
    model.stages[1].register_forward_pre_hook(lambda module, args: seen.extend(args))
    with torch.no_grad():
        model.stages[1].nl.sub_blocks[0].z.weight.normal_()
        model(torch.randn(1, 3, 224, 224))
        y = model.stages[1](x := torch.randn_like(seen[0]))
        torch.testing.assert_close(reparameterize_model(model).get_submodule('stages.1')(x), y, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(remove(model).get_submodule('stages.1')(x), y, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'after', 'dim'), [
    ('cait_xxs24_224', 'blocks.12', 192), ('coat_tiny', 'serial_blocks1.1', 152),
    ('convmixer_768_32', 'blocks.16', 768),
    ('crossvit_tiny_240', 'blocks.0.blocks.0.0', 96), ('edgenext_xx_small', 'stages.2', 88),
    ('efficientvim_m1', 'stages.1.blocks.1', 192), ('ghostnet_050', 'blocks.3', 20), ('halonet26t', 'stages.1', 512),
    ('levit_128s', 'stages.1', 256), ('mobilevit_xxs', 'stages.2', 48),
    ('mvitv2_tiny', 'stages.1', 192), ('pit_ti_224', 'transformers.0', 64), ('rexnet_100', 'features.4', 61),
    ('swinv2_cr_tiny_224', 'stages.2', 384), ('twins_svt_small', 'blocks.2.9', 256),
    ('xcit_nano_12_p8_224', 'blocks.6', 128),
])
def test_a_stage_in_any_family(name: str, after: str, dim: int) -> None:
    if not timm.is_model(name):
        pytest.skip(f'this timm has no {name}')
    model: Any = timm.create_model(name).eval()
    x = torch.randn(1, *model.pretrained_cfg['input_size'])
    with torch.no_grad():
        plain = model(x)
        insert(model, after, k=2)
        (part,) = (module for key, module in model.named_modules() if key.endswith('.nl'))
        assert part.theta.weight.shape == (dim // 2, dim) and torch.equal(model(x), plain)
        part.sub_blocks[0].z.weight.normal_()
        assert not torch.equal(model(x), plain)
