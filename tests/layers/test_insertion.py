"""A nonlocal module in any network: found by name, the identity at first, gone without a trace."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torchvision.models import get_model
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from tests.support.networks import wake
from timm_nonlocal import NonlocalBlocks, NonlocalStage, insert, remove


def torchvision(name: str) -> torch.nn.Module:
    model = get_model(name, weights=None)
    for parameter in model.parameters():
        if parameter.dim() == 2 and not parameter.any():  # a head of zeros would hide everything
            torch.nn.init.normal_(parameter)
    return model


def features(name: str) -> torch.nn.Module:
    return timm.create_model(name, features_only=True)


def tensors(out: Any) -> list[torch.Tensor]:
    return list(out.values()) if isinstance(out, dict) else list(out) if isinstance(out, (list, tuple)) else [out]


PLACES = [  # maker, name, after, where the keys of the nonlocal module are, C, image size
    (timm.create_model, 'resnet50', 'layer1.1', 'layer1.1', 256, 64),
    (timm.create_model, 'convnext_tiny', 'stages.1', 'stages.1', 192, 64),
    (timm.create_model, 'efficientnet_b0', 'blocks.2', 'blocks.2.1', 40, 64),  # a Sequential: its last module
    (timm.create_model, 'vit_tiny_patch16_224', 'blocks.5', 'blocks.5', 192, 224),  # tokens
    (torchvision, 'resnet18', 'layer2.1', 'layer2.1', 128, 64),
    (timm.create_model, 'regnety_002', 's3', 's3.b4', 152, 64),  # a stage that runs its children in a loop
    (features, 'resnet18', 'layer2', 'layer2.1', 128, 64),
    (features, 'convnext_atto', 'stages_1', 'stages_1', 80, 64),
]
MORE_PLACES = [
    (timm.create_model, 'swin_tiny_patch4_window7_224', 'layers.1', 'layers.1', 192, 224),  # NHWC
    (torchvision, 'swin_t', 'features.3', 'features.3.1', 192, 224),  # NHWC, which nothing but the shape tells
    (torchvision, 'vit_b_16', 'encoder.layers.encoder_layer_1', 'encoder.layers.encoder_layer_1', 768, 224),
    (torchvision, 'densenet121', 'features.transition2', 'features.transition2.pool', 256, 64),
    (timm.create_model, 'maxvit_pico_rw_256', 'stages.1', 'stages.1', 64, 256),
    (features, 'vit_tiny_patch16_224', 'model.blocks.4', 'model.blocks.4', 192, 224),
]


@pytest.mark.parametrize(('make', 'name', 'after', 'place', 'dim', 'size'), [
    *PLACES, *(pytest.param(*place, marks=pytest.mark.slow) for place in MORE_PLACES)])
def test_any_network(make: Callable[[str], Any], name: str, after: str, place: str, dim: int, size: int) -> None:
    """Bit for bit the same in eval; another once W_Z is not zero; and as it was after `remove`."""
    model, x = make(name).eval(), torch.randn(1, 3, size, size)
    keys = list(model.state_dict())
    with torch.no_grad():
        before = tensors(model(x))
        assert insert(model, after, 'proposed', 5) is model
        module = model.get_submodule(f'{place}.nl')
        assert isinstance(module, NonlocalStage) and len(module.sub_blocks) == 5 and not module.training
        assert module.theta.weight.shape == (dim // 2, dim)
        assert [key for key in model.state_dict() if f'{place}.nl.' not in key] == keys
        for actual, expected in zip(tensors(model(x)), before, strict=True):
            assert torch.equal(actual, expected)
        wake(model)
        assert not torch.equal(tensors(model(x))[-1], before[-1])
        assert remove(model) is model
        assert list(model.state_dict()) == keys
        for actual, expected in zip(tensors(model(x)), before, strict=True):
            assert torch.equal(actual, expected)


def test_the_part_acts_on_the_modules_output() -> None:
    model: Any = timm.create_model('test_vit', img_size=64).eval()
    seen: dict[str, torch.Tensor] = {}
    block = model.blocks[3]
    block.register_forward_hook(lambda module, args, out: seen.update(after=out))
    with torch.no_grad():
        plain = block(x := torch.randn(2, 17, 64))
        assert torch.equal(seen['after'], plain)
        wake(insert(model, 'blocks.3', k=3, example=torch.zeros(1, 3, 64, 64)))
        expected = block.nl(plain.transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(block(x), expected)
        assert torch.equal(seen['after'], block(x))  # whoever listened before hears the nonlocal module too


def test_several_places_and_one_taken_out() -> None:
    model: Any = timm.create_model('test_resnet').eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        insert(model, ['layer1.0', 'layer3.0'], kind='original', k=2, symmetric=True)
        assert all(isinstance(m.nl, NonlocalBlocks) for m in (model.layer1[0], model.layer3[0]))
        assert torch.equal(model(x), before)
        remove(model, 'layer1.0')
        assert not hasattr(model.layer1[0], 'nl') and hasattr(model.layer3[0], 'nl')
        insert(model, 'layer1.0', k=1)
        assert isinstance(model.layer1[0].nl, NonlocalStage)
        remove(model, ['layer1.0', 'layer3.0'])
        assert torch.equal(model(x), before)


def test_arguments_reach_the_part() -> None:
    model: Any = insert(timm.create_model('test_resnet'), 'layer1.0', k=2, affinity='uniform', init='xavier_normal',
                        inner_dim=16)
    module = model.layer1[0].nl
    assert type(module.affinity).__name__ == 'Uniform' and module.sub_blocks[1].z.weight.shape == (32, 16)
    assert module.sub_blocks[1].z.weight.any() and module.training


@pytest.mark.parametrize(('in_chans', 'where'), [(3, torch.bfloat16), (3, 'meta'), (1, 'cpu')])
def test_the_part_is_where_the_model_is(in_chans: int, where: str | torch.dtype) -> None:
    model: Any = timm.create_model('test_resnet', in_chans=in_chans).to(where)
    model.layer1.eval()
    insert(model, 'layer2.0')
    assert {(p.device, p.dtype) for p in model.parameters()} == {(model.fc.weight.device, model.fc.weight.dtype)}
    assert model.training and not model.layer1[0].training and model.layer2[0].nl.training


def test_state_dict_round_trip() -> None:
    """A plain checkpoint loads before, the whole after, and nothing is missed."""
    model = wake(insert(timm.create_model('test_resnet').eval(), ['layer1.0', 'layer4.0'], k=3))
    plain = timm.create_model('test_resnet')
    plain.load_state_dict({key: w for key, w in model.state_dict().items() if '.nl.' not in key})
    again = insert(plain.eval(), ['layer1.0', 'layer4.0'], k=3)
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))


def test_copies_stand_alone() -> None:
    model, x = wake(insert(timm.create_model('test_resnet').eval(), 'layer1.0')), torch.randn(1, 3, 64, 64)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        wake(other)
        assert not torch.equal(other(x), y) and torch.equal(model(x), y)
        remove(other)
        assert torch.equal(model(x), y)


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_fine_tuning(name: str) -> None:
    """The nonlocal module learns, also under gradient checkpointing, in the group of the module that it follows."""
    after = 'layer3.0' if name == 'test_resnet' else 'blocks.5'
    model: Any = insert(timm.create_model(name, num_classes=5), after, k=2).train()
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 160, 160)).square().sum().backward()
    module = model.get_submodule(f'{after}.nl')
    assert all(p.grad is not None for p in model.parameters())
    assert module.sub_blocks[0].z.weight.grad.any()
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert len({layer for name, layer in groups.items() if name.startswith(f'{after}.')}) == 1


def test_a_feature_pyramid() -> None:
    """Several levels, in the body and in the pyramid; and a head that runs on every level shares one module."""
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        model = resnet_fpn_backbone(backbone_name='resnet18', weights=None).eval()
        before = tensors(model(x))
        insert(model, ['body.layer3', 'fpn.layer_blocks.0', 'fpn.layer_blocks.2'], k=2)
        assert model.fpn.layer_blocks[2][0].nl.theta.weight.shape == (128, 256)
        for actual, expected in zip(tensors(model(x)), before, strict=True):
            assert torch.equal(actual, expected)
        detector = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
        insert(detector, ['backbone.fpn.inner_blocks.0', 'rpn.head.conv'], example=[torch.zeros(3, 64, 64)])
        assert detector.rpn.head.conv[0][1].nl.theta.weight.shape == (128, 256)


def test_graphs_hold_the_part() -> None:
    model, x = wake(insert(timm.create_model('test_resnet').eval(), 'layer2.0', k=2)), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        y = model(x)
        assert not torch.equal(remove(copy.deepcopy(model))(x), y)
        for other in (torch.jit.script(model), torch.fx.symbolic_trace(model),
                      torch.export.export(model, (x,)).module(),
                      torch.compile(model, fullgraph=True, backend='aot_eager')):
            torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(after='layer1.7'), r"after='layer1\.7': no module has that name; nearest are .*layer1\.0"),
    (dict(after=''), 'no module has that name; nearest are conv1, bn1'),
    (dict(after=[]), r'after is empty: name a module, such as after="layer1\.1"'),
    (dict(after=['layer2', 'layer2.0']), 'two of them are the same place'),
    (dict(after='layer1.0', kind='cubic'), "kind='cubic' is unknown: use one of original, proposed"),
    (dict(after='layer1.0', k=0), r"after='layer1\.0': k=0: it must be a whole number of at least 1"),
    (dict(after='layer1.0', affinity='cosine'), "affinity='cosine' is unknown: use one of embedded_gaussian, "),
    (dict(after='fc'), r"after='fc': it gives \(1, 1000\), not \(B, C, H, W\) or \(B, M, C\)"),
    (dict(after='layer1.0', example=torch.zeros(1, 5, 64, 64)),
     r'the model does not take \(1, 5, 64, 64\): give what it takes as example=…'),
])
def test_bad_arguments_leave_the_model_as_it_was(kwargs: dict[str, Any], message: str) -> None:
    model = timm.create_model('test_resnet')
    with pytest.raises(ValueError, match=message) as error:
        insert(model, **kwargs)
    assert '\n' not in str(error.value)
    assert not [name for name in model.state_dict() if '.nl.' in name] and model.training
    assert not any(module._forward_hooks for module in model.modules())


class Odd(torch.nn.Module):
    """Holds a module that is used on two widths, one that is not used, and a container with a forward of its own."""

    class Dense(torch.nn.ModuleDict):
        def forward(self, x: torch.Tensor) -> Any:
            return torch.cat([x, *(child(x) for child in self.values())], 1)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.unused = torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.ReLU()
        self.dense = self.Dense({'a': torch.nn.Conv2d(8, 4, 1), 'b': torch.nn.Conv2d(8, 4, 1)})

    def forward(self, x: torch.Tensor) -> Any:
        return self.relu(self.dense(self.relu(self.conv(x)))), {}


@pytest.mark.parametrize(('after', 'message'), [
    ('relu', r"after='relu': it runs 2 times, on \[8, 16\] channels; name a module that runs once"),
    ('unused', "after='unused': the module does not run in the forward pass; name the one that holds it"),
    ('dense', "after='dense': a Dense runs its children itself; name one of them, or the module that follows"),
])
def test_places_that_do_not_fit(after: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        insert(Odd(), after)
    insert(Odd(), 'dense.a')


@pytest.mark.parametrize(('dim', 'kwargs', 'inner'), [
    (7, {}, 3), (1, {}, 1), (7, dict(inner_dim=5), 5), (7, dict(inner_dim=None, kind='original'), 3)])
def test_odd_channels(dim: int, kwargs: dict[str, Any], inner: int) -> None:
    model: Any = insert(torch.nn.Sequential(torch.nn.Conv2d(3, dim, 3), torch.nn.Flatten()), '0', **kwargs)
    assert next(model[0].nl.parameters()).shape == (inner, dim)


def test_a_model_without_a_convolution_needs_an_example() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU())
    with pytest.raises(ValueError, match='no 2-D convolution to tell its input by: give what it takes as example=…'):
        insert(model, '0')
    insert(model, '0', example=torch.zeros(1, 5, 4))
    assert model(torch.zeros(2, 5, 4)).shape == (2, 5, 6)


def test_inserting_and_removing_twice() -> None:
    model = insert(timm.create_model('test_resnet'), 'layer1.0')
    with pytest.raises(ValueError, match=r"is a nonlocal module already; take it out with remove\(model, 'layer1.0'\)"):
        insert(model, 'layer1.0')
    with pytest.raises(ValueError, match="layer2.0': nothing was inserted there; nonlocal modules follow layer1.0"):
        remove(model, 'layer2.0')
    remove(model)
    with pytest.raises(ValueError, match='nothing was inserted there; nonlocal modules follow no module'):
        remove(model)


def test_a_registered_networks_own_part_is_not_taken_out() -> None:
    model: Any = insert(timm.create_model('preresnet20_nl_proposed_k2'), 'layer2.0')
    remove(model)
    assert isinstance(model.layer1.nl, NonlocalStage)
    with pytest.raises(ValueError, match='nothing was inserted there'):
        remove(model, 'layer1.1')


def test_resnet50_on_timms_own_weights(tmp_path: Path) -> None:
    """The registered network is timm's, predictions and all, until the nonlocal module is trained."""
    name = 'resnet50_nl_proposed_k5'
    assert timm.list_pretrained(f'{name}*') == [f'{name}.a1_in1k']
    cfg, own = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg('resnet50.a1_in1k')
    assert cfg and own and cfg.hf_hub_id == own.hf_hub_id == 'timm/resnet50.a1_in1k' and cfg.mean == own.mean
    base, x = timm.create_model('resnet50').eval(), torch.randn(1, 3, 64, 64)
    file = tmp_path / 'base.pth'
    torch.save(base.state_dict(), file)
    model: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': str(file)}).eval()
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
    assert model.layer3[4].nl.theta.weight.shape == (512, 1024) and model.pretrained_cfg['architecture'] == name
    torch.save(wake(model).state_dict(), file)  # trained weights have W_Z of their own
    again: Any = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={'file': str(file)}, num_classes=7, in_chans=1).eval()
    with torch.no_grad():
        grey = x[:, :1]
        torch.testing.assert_close(again.forward_features(grey), model.forward_features(grey.expand_as(x)))
        assert again(grey).shape == (1, 7)


def test_a_place_that_is_named_twice_is_left_once() -> None:
    model = insert(timm.create_model('resnet18'), 'layer1.1')
    assert not any('nl' in name for name, _ in remove(model, ['layer1', 'layer1.1']).named_modules())


def test_a_stage_of_another_depth_is_not_filled_up(tmp_path: Path) -> None:
    """With weights that were drawn: the file has a nonlocal module, and another one than the network."""
    name, file = 'resnet50_nl_proposed_k5', tmp_path / 'k3.pth'
    torch.save(timm.create_model(name, nl_args={'k': 3}).state_dict(), file)
    with pytest.raises(RuntimeError, match=r'Missing key.*nl\.sub_blocks\.3'):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': str(file)})
