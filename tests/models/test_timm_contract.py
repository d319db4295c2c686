"""What users of timm call on these models and timm's own test file does not check: numbers, groups, heads, features."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.optim
import torch
from PIL import Image
from timm.models import FeatureGraphNet

from tests.support.networks import calibrated


def gradients(model: Any, x: torch.Tensor, enable: bool) -> tuple[int, list[torch.Tensor]]:
    model.set_grad_checkpointing(enable)
    saved = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = model(x)
    out = sum(y.square().mean() for y in out) if isinstance(out, list) else out.square().mean()
    out.backward()
    return saved, [p.grad for p in model.parameters()]


@pytest.mark.parametrize('features_only', [False, True])
@pytest.mark.parametrize('name', ['preresnet20', 'preresnet20_nl_original_k2', 'preresnet20_nl_proposed_k1x3'])
def test_grad_checkpointing_changes_no_gradient_and_keeps_less(name: str, features_only: bool) -> None:
    plain = timm.create_model(name, features_only=features_only).train()
    checkpointed = copy.deepcopy(plain)
    x = torch.randn(2, 3, 16, 16)
    (much, expected), (little, actual) = gradients(plain, x, False), gradients(checkpointed, x, True)
    assert little < (much / 2 if features_only else much / 3)  # timm's extractor leaves its last module as it is
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_layer_decay_groups() -> None:
    """Every parameter has one scale, the stem the smallest, a nonlocal module that of its unit, the head 1."""
    model = timm.create_model('preresnet20_nl_proposed_k1x3')
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=1e-4, layer_decay=0.5)
    scales = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    assert len(scales) == len(list(model.parameters())) == sum(len(group['params']) for group in groups)
    scale = {name: scales[id(p)] for name, p in model.named_parameters()}
    order = ['conv1.weight', *(f'layer{stage}.{unit}.conv1.weight' for stage in (1, 2, 3) for unit in (0, 1)),
             'fc.weight']
    assert [scale[name] for name in order] == [0.5 ** n for n in range(7, -1, -1)]
    for stage in (1, 2, 3):
        assert scale[f'layer{stage}.nl.theta.weight'] == scale[f'layer{stage}.1.conv3.weight']
    assert scale['norm.weight'] == scale['layer3.1.conv1.weight']


def test_coarse_groups_are_the_stages() -> None:
    model: Any = timm.create_model('preresnet20_nl_proposed_k2')
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert [groups[f'{name}.weight'] for name in (
        'conv1', 'layer1.0.bn1', 'layer1.nl.phi', 'layer2.1.conv3', 'layer3.0.bn2', 'fc')] == [0, 1, 1, 2, 3, 4]


def test_nothing_is_exempt_from_weight_decay() -> None:
    model: Any = timm.create_model('preresnet20_nl_proposed_k2')
    assert model.no_weight_decay() == set()
    groups = timm.optim.create_optimizer_v2(model, 'sgd', weight_decay=1e-4, filter_bias_and_bn=False).param_groups
    assert {group['weight_decay'] for group in groups} == {1e-4}


@pytest.mark.parametrize(('pool', 'width'), [('avg', 256), ('max', 256), ('catavgmax', 512), ('fast', 256)])
def test_head(pool: str, width: int) -> None:
    """Logits are what the classifier makes of what comes before it, whatever the pooling."""
    model: Any = calibrated('preresnet20_nl_proposed_k2', global_pool=pool)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        features = model.forward_features(x)
        read = model.forward_head(features, pre_logits=True)
        assert features.shape == (3, model.num_features, 8, 8) and read.shape == (3, width)
        assert model.head_hidden_size == width and model.get_classifier() is model.fc
        torch.testing.assert_close(model(x), model.get_classifier()(read))
        model.reset_classifier(7)
        assert model(x).shape == (3, 7) and model.num_classes == 7 and not model.fc.bias.any()
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), read)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), read)
        assert isinstance(model.get_classifier(), torch.nn.Identity)
        model.reset_classifier(0, '')
        torch.testing.assert_close(model(x), features)


def test_a_classifier_has_pooling_in_front_of_it() -> None:
    model: Any
    for model in (timm.create_model('preresnet20', num_classes=0, global_pool=''), timm.create_model('preresnet20')):
        before = dict(model.named_modules())
        with pytest.raises(ValueError, match="num_classes=5 with global_pool='': a classifier reads pooled features"):
            model.reset_classifier(5, '')
        assert dict(model.named_modules()) == before, 'it is as it was'
        model.reset_classifier(0, '')
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 256, 8, 8)
        model.reset_classifier(5)  # as timm's tests do it
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
        model.reset_classifier(5, 'max')
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match="num_classes=10 with global_pool=''"):
        timm.create_model('preresnet20_nl_proposed_k2', global_pool='')


def test_dropout_is_in_front_of_the_classifier_in_training_alone() -> None:
    model: Any = calibrated('preresnet20', drop_rate=0.5)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), model(x))
    features = model.forward_features(x)
    model.train()
    assert (model.forward_head(features, pre_logits=True) == 0).float().mean() > 0.3


FEATURES = [(16, 32), (64, 32), (128, 16), (256, 8)]


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'fx', 'getter'])
def test_features_only_by_every_extractor(feature_cls: str) -> None:
    """Stem and stages, raw, whichever of timm's extractors takes them."""
    whole: Any = calibrated('preresnet20_nl_proposed_k2')
    x = torch.randn(2, 3, 32, 32)
    model: Any = timm.create_model('preresnet20_nl_proposed_k2', features_only=True, feature_cls=feature_cls).eval()
    weights = whole.state_dict()
    model.load_state_dict({key: weights[re.sub(r'^(body|graph_module|model)\.', '', key)]
                           for key in model.state_dict()})
    assert model.feature_info.channels() == [chs for chs, _ in FEATURES]
    assert model.feature_info.reduction() == [1, 1, 2, 4]
    with torch.no_grad():
        maps = model(x)
        maps = list(maps.values()) if isinstance(maps, dict) else maps
        _, expected = whole.forward_intermediates(x)
    assert [tuple(y.shape[1:3]) for y in maps] == FEATURES
    for actual, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize('name', ['preresnet56_nl_original_k3', 'preresnet56_nl_proposed_k3'])
def test_fx_features_round_as_the_network_does(name: str) -> None:
    """An untrained network in eval mode makes much of the last bit: equal to 1e-4 asks for the same operations."""
    model: Any = timm.create_model(name).eval()
    x = torch.randn(16, 3, 32, 32)
    features = FeatureGraphNet(model, out_indices=(0, 1, 2, 3))
    with torch.no_grad():
        for actual, expected in zip(features(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
            assert torch.equal(actual, expected)


def test_intermediates_are_what_the_modules_give() -> None:
    model: Any = calibrated('preresnet20_nl_original_k1x3')
    x, seen = torch.randn(2, 3, 32, 32), {}
    for name in ('conv1', 'layer1', 'layer2', 'layer3', 'act'):
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        for actual, name in zip([*maps, final], ('conv1', 'layer1', 'layer2', 'layer3', 'act'), strict=True):
            assert torch.equal(actual, seen[name])
        assert torch.equal(model.forward_intermediates(x, [-1], norm=True, intermediates_only=True)[0], final)
        assert torch.equal(model.forward_features(x), final)
        seen.clear()
        last, (first,) = model.forward_intermediates(x, [1], stop_early=True)
        assert torch.equal(first, last) and 'layer2' not in seen
        assert len(model.forward_intermediates(x, 2, intermediates_only=True)) == 2
        for indices in ([4], [-5], 5, []):
            with pytest.raises(ValueError, match=r'there are 4 levels, \[0, 1, 2, 3\]'):
                model.forward_intermediates(x, indices)
        with pytest.raises(ValueError, match="only 'NCHW' is made"):
            model.forward_intermediates(x, output_fmt='NLC')


@pytest.mark.parametrize('index', range(4))
def test_pruned_to_a_level(index: int) -> None:
    model: Any = calibrated('preresnet20_nl_proposed_k1x3')
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        _, maps = model.forward_intermediates(x)
        assert model.prune_intermediate_layers([index], prune_norm=True) == [index]
        assert torch.equal(model(x), maps[index])
        assert model.num_features == model.head_hidden_size == maps[index].shape[1]
        model.reset_classifier(5, 'avg')
        assert model(x).shape == (2, 5)


@pytest.mark.parametrize('name', ['preresnet20', 'preresnet20_nl_original_k2', 'preresnet20_nl_proposed_k5'])
def test_numerics(name: str) -> None:
    """bfloat16, another memory order and another batch give the same logits, each as near as it can be."""
    model = calibrated(name)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        y = model(x)
        assert 0.1 < y.std() < 10
        torch.testing.assert_close(copy.deepcopy(model).double()(x.double()).float(), y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            copy.deepcopy(model).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), y,
            rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(x[2:3]), y[2:3], rtol=1e-4, atol=1e-4)
        half = copy.deepcopy(model).bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert (half.float() - y).norm() < 0.05 * y.norm()
        with torch.autocast('cpu', torch.bfloat16):
            assert (model(x).float() - y).norm() < 0.05 * y.norm()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_dtype_on_construction(dtype: torch.dtype) -> None:
    model = timm.create_model('preresnet20_nl_proposed_k1x3', dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(2, 3, 16, 16, dtype=dtype)).dtype == dtype


def test_made_on_meta_and_filled_later() -> None:
    model = calibrated('preresnet20_nl_proposed_k3', nl_args={'affinity': 'concatenation'})
    empty = timm.create_model('preresnet20_nl_proposed_k3', nl_args={'affinity': 'concatenation'}, device='meta')
    assert {t.device.type for t in [*empty.parameters(), *empty.buffers()]} == {'meta'}
    filled = empty.to_empty(device='cpu').eval()
    filled.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(filled(x), model(x))


@pytest.mark.parametrize('tag', ['cifar10', 'cifar100', 'ft_cifar10', 'ft_cifar100'])
def test_the_data_config_is_cifars(tag: str) -> None:
    """timm's own transform leaves a 32×32 image as it is, less the mean colour."""
    model: Any = timm.create_model(f'preresnet20.{tag}')
    config = timm.data.resolve_model_data_config(model)
    assert config['input_size'] == (3, 32, 32) and config['crop_pct'] == 1.0
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    image = timm.data.create_transform(**config)(Image.fromarray(pixels))
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255 - torch.tensor(config['mean']).view(3, 1, 1)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)
    labels = model.pretrained_cfg['label_names']
    assert len(labels) == len(set(labels)) == model.num_classes


@pytest.mark.cifar
def test_the_labels_are_the_files(cifar_dir: str) -> None:
    for tag, folder, key in (('cifar10', 'cifar-10-batches-py/batches.meta', 'label_names'),
                             ('cifar100', 'cifar-100-python/meta', 'fine_label_names')):
        with open(Path(cifar_dir) / folder, 'rb') as file:
            cfg = timm.get_pretrained_cfg(f'preresnet20.{tag}')
            assert cfg and cfg.label_names == tuple(pickle.load(file)[key])
