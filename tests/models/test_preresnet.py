"""The backbone, its registered names, and what a registered network must have."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import timm_nonlocal
from timm_nonlocal.models.preresnet import PreResNet

NAMES = [name for depth in (20, 56) for name in [
    f'preresnet{depth}',
    *(f'preresnet{depth}_nl_original_k{k}' for k in ('1', '2', '3', '4', '1x3')),
    *(f'preresnet{depth}_nl_proposed_k{k}' for k in ('1', '2', '3', '4', '5', '6', '1x3')),
]]


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: torch.nn.Module) -> int:
    """Multiply-adds for one 32×32 image, attention as its two products: not every torch counts fused kernels."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2


def test_registered_names_and_tags() -> None:
    assert timm.list_models('preresnet*') == sorted(NAMES)
    assert {f'{name}.{tag}' for name in NAMES for tag in ('cifar10', 'cifar100')} <= set(
        timm.list_models('preresnet*', include_tags=True))
    assert set(timm.list_models(module='preresnet')) == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_default_tag(name: str) -> None:
    """The paper's data set for the depth; of its tags the first with weights, the paper's recipe before ours."""
    classes = 10 if 'preresnet20' in name else 100
    model: Any = timm.create_model(name)
    assert model.num_classes == classes
    tags = [f'cifar{classes}', f'ft_cifar{classes}']
    weighted = [tag for tag in tags if timm.is_model_pretrained(f'{name}.{tag}')]
    assert model.pretrained_cfg['tag'] == (weighted or tags)[0]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, classes)
    assert timm.create_model(f'{name}.cifar{110 - classes}').num_classes == 110 - classes


def test_no_tag_promises_weights_that_do_not_exist() -> None:
    for name in timm.list_pretrained('preresnet*'):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize(('name', 'count', 'mega'), [('preresnet20', 219_482, 30.6), ('preresnet56', 613_556, 84.1)])
def test_backbone_counts(name: str, count: int, mega: float) -> None:
    model = timm.create_model(name)
    assert parameters(model) == count
    assert macs(model) / 1e6 == pytest.approx(mega, abs=0.05)


@pytest.mark.parametrize('depth', [20, 56])
@pytest.mark.parametrize('k', [1, 2, 3, 4, 5, 6])
def test_nonlocal_counts(depth: int, k: int) -> None:
    """What each form adds: parameters 8,192 k and 4,096 + 4,096 k; MACs 75.5 k and 37.75 + 37.75 k million, plus
    M C'² k (k - 1) / 2 for the merged form's inner maps and their own product of C'³ each."""
    base = timm.create_model(f'preresnet{depth}')
    proposed = timm.create_model(f'preresnet{depth}_nl_proposed_k{k}')
    assert parameters(proposed) - parameters(base) == 4096 + 4096 * k
    projection, affinity = 1024 * 64 * 32, 1024 * 1024 * 32
    inner = (1024 * 32 * 32 + 32 * 64 * 32) * k * (k - 1) // 2
    assert macs(proposed) - macs(base) == (2 + 2 * k) * projection + (1 + k) * affinity + inner
    if k <= 4:
        original = timm.create_model(f'preresnet{depth}_nl_original_k{k}')
        assert parameters(original) - parameters(base) == 8192 * k
        assert macs(original) - macs(base) == k * (4 * projection + 2 * affinity)


@pytest.mark.parametrize('depth', [20, 56])
def test_one_block_in_each_stage(depth: int) -> None:
    base = parameters(timm.create_model(f'preresnet{depth}'))
    for kind, maps in (('original', 4), ('proposed', 4)):
        model: Any = timm.create_model(f'preresnet{depth}_nl_{kind}_k1x3')
        assert parameters(model) - base == maps * sum(c * c // 2 for c in (64, 128, 256))
        for layer in (model.layer1, model.layer2, model.layer3):
            assert [name for name, _ in layer.named_children()][:3] == ['0', '1', 'nl']


def test_the_nonlocal_part_follows_the_second_unit() -> None:
    layer = timm.create_model('preresnet56_nl_proposed_k2').get_submodule('layer1')
    children = [name for name, _ in layer.named_children()]
    assert children == ['0', '1', 'nl', '2', '3', '4', '5']


def test_the_first_unit_shares_its_activation() -> None:
    """Where the width changes, both branches read the same BN-ReLU, and the shortcut is a bare 1×1 convolution."""
    torch.manual_seed(0)
    unit: Any = timm.create_model('preresnet20').get_submodule('layer2.0').eval()
    unit.bn1.running_mean.normal_()
    x = torch.randn(2, 64, 8, 8)
    y = torch.relu(unit.bn1(x))
    branch = unit.conv3(torch.relu(unit.bn3(unit.conv2(torch.relu(unit.bn2(unit.conv1(y)))))))
    torch.testing.assert_close(unit(x), branch + unit.downsample(y))
    assert unit.conv1.stride == unit.downsample.stride == (2, 2) and unit.conv2.stride == (1, 1)


def test_initialisation_survives_construction() -> None:
    """He fan-out for the convolutions, Xavier for the nonlocal maps, zero for what was asked to be zero."""
    model: Any = timm.create_model('preresnet56_nl_proposed_k1x3')
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
    for weight in (model.layer3.nl.theta.weight, model.layer3.nl.sub_blocks[0].z.weight):
        assert weight.std().item() == pytest.approx((2 / 384) ** 0.5, rel=0.03)
    assert not model.fc.bias.any()
    zeroed: Any = timm.create_model('preresnet20_nl_original_k3', nl_args={'init': 'zero'})
    assert not any(block.z.weight.any() for block in zeroed.layer1.nl.sub_blocks)


def test_arguments_reach_the_blocks() -> None:
    args = {'affinity': 'uniform', 'merged': False}
    model: Any = timm.create_model('preresnet20_nl_proposed_k3', nl_args=args)
    assert not model.layer1.nl.merged and type(model.layer1.nl.affinity).__name__ == 'Uniform'


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(depth=21), 'depth=21 is not 9n\\+2'),
    (dict(nl='gaussian'), "nl='gaussian' is unknown: use one of original, proposed"),
    (dict(nl='proposed', nl_k=0), 'k=0: it must be a whole number of at least 1'),
    (dict(nl='proposed', nl_stages=[4]), r'nl_stages=\[4\]'),
    (dict(depth=11, nl='proposed'), 'depth=11 has 1 a stage'),
    (dict(nl_args={'affinity': 'uniform'}), "are of a nonlocal module: use nl='original' or 'proposed' too"),
    (dict(nl_k=5), "nl_k=5.* are of a nonlocal module: use nl='original'"),
    (dict(nl_stages=(1, 2)), "are of a nonlocal module: use nl='original'"),
])
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreResNet(**kwargs)


def test_unknown_keyword_is_refused() -> None:
    with pytest.raises(TypeError, match='nonsense'):
        timm.create_model('preresnet20', nonsense=1)


@pytest.mark.parametrize('recorded_by', ['timm', 'hand'])
def test_local_dir_round_trip_with_arguments(tmp_path: Path, recorded_by: str) -> None:
    """What timm writes for the Hub is what it reads back, nonlocal arguments included."""
    args: dict[str, Any] = {'nl_args': {'symmetric': True, 'scale': 0.5}}
    model: Any = timm.create_model('preresnet20_nl_proposed_k2', **args).eval()
    if recorded_by == 'timm' and not hasattr(model, '_model_args'):
        pytest.skip(f'timm {timm.__version__} records no arguments by itself')
    timm.models.save_for_hf(
        model, str(tmp_path), model_args=args if recorded_by == 'hand' else None, safe_serialization=True)
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == 'preresnet20_nl_proposed_k2'
    again: Any = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), model(x))


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'other.safetensors'
    save_file(timm.create_model('preresnet20_nl_proposed_k2').state_dict(), path)
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*sub_blocks\.2\.g\.weight'):
        timm.create_model('preresnet20_nl_proposed_k3', checkpoint_path=str(path))


def test_version() -> None:
    assert timm_nonlocal.__version__
