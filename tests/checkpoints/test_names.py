"""Names of wrapped networks: the same blocks, and the same network, whatever was around it when it was saved."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from timm_nonlocal import NonlocalBlocks, NonlocalStage, spectrum
from timm_nonlocal.checkpoints.names import renamed, unwrapped
from timm_nonlocal.checkpoints.targets import open_target
from timm_nonlocal.inspect.command import build

NAME = 'preresnet20_nl_proposed_k2'


def regions(model: Any) -> Any:
    """As accelerate's compile_regions leaves them."""
    for place in (model.layer1.nl.sub_blocks, model.layer1.nl):
        for name, part in list(place.named_children()):
            if name != 'sub_blocks':
                setattr(place, name, torch.compile(part, backend='eager'))
    model.layer1.nl.sub_blocks = torch.compile(model.layer1.nl.sub_blocks, backend='eager')
    return model


def checkpointed(model: Any) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    model.layer1 = checkpoint_wrapper(model.layer1)
    return model


WRAPPED: dict[str, Callable[[Any], Any]] = {
    'DataParallel': nn.DataParallel,
    'compile': lambda model: torch.compile(model, backend='eager'),
    'compile in DataParallel': lambda model: nn.DataParallel(torch.compile(model, backend='eager')),
    'AveragedModel': torch.optim.swa_utils.AveragedModel,
    'Lightning': lambda model: nn.ModuleDict({'model': model, 'loss': nn.BatchNorm1d(3)}),
    'regions': regions,
    'checkpointed': checkpointed,
}


@pytest.mark.parametrize('wrapper', WRAPPED)
def test_wrapped_networks(wrapper: str, tmp_path: Path) -> None:
    model = timm.create_model(NAME).eval()
    expected, state = spectrum(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = WRAPPED[wrapper](model)
    found = spectrum(wrapped)
    assert [(record.stage, record.index, record.formulation) for record in found] == [
        ('layer1.nl', 0, 'proposed'), ('layer1.nl', 1, 'proposed')]
    assert [record.eigenvalues for record in found] == [record.eigenvalues for record in expected]
    assert all(key in wrapped.state_dict() for record in found for key in filter(None, record.keys.values()))

    save_file(wrapped.state_dict(), tmp_path / 'wrapped.safetensors')
    loaded = build(open_target(str(tmp_path / 'wrapped.safetensors')), NAME).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def fully_sharded(model: Any) -> Any:
    mesh = torch.distributed.init_device_mesh('cpu', (1,))
    for part in (*model.layer1.nl.sub_blocks, model):
        torch.distributed.fsdp.fully_shard(part, mesh=mesh)
    return model


@pytest.mark.parametrize('wrap', [nn.parallel.DistributedDataParallel, fully_sharded])
def test_networks_of_several_processes(wrap: Callable[[nn.Module], nn.Module], process_group: None) -> None:
    model = timm.create_model(NAME)
    expected = spectrum(model)
    assert [record.eigenvalues for record in spectrum(wrap(model))] == [record.eigenvalues for record in expected]


def test_a_part_of_a_network_is_no_network() -> None:
    state = {name: tensor.flatten()[:5] for name, tensor in NonlocalStage(8, 1).state_dict().items()}
    with pytest.warns(UserWarning, match='no matrices, as where each process holds a part'):
        assert spectrum(state) == []


@pytest.mark.parametrize('prefix', ['module.nl_module', 'module.attn_module', 'model.model_module', 'net.module_',
                                    '_orig_mod.features.module.nl', 'module.non_orig_mod.nl',
                                    'encoder._fsdp_wrapped_module.nl._checkpoint_wrapped_module'])
def test_only_whole_segments_are_cut(prefix: str) -> None:
    state = {f'{prefix}.{name}': tensor for name, tensor in NonlocalStage(8, 2).state_dict().items()}
    found = spectrum(state)
    assert [(record.index, record.formulation) for record in found] == [(0, 'proposed'), (1, 'proposed')]
    stage = '.'.join(part for part in prefix.split('.') if part not in (
        'module', 'model', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'))
    assert {record.stage for record in found} == {stage}


def test_names_that_would_become_one_stay_two() -> None:
    blocks = {'module.nl': NonlocalBlocks(8, 1), 'nl': NonlocalBlocks(8, 1)}
    state = {f'{place}.{name}': tensor for place, part in blocks.items() for name, tensor in part.state_dict().items()}
    assert [record.stage for record in spectrum(state)] == ['module.nl', 'nl']
    assert unwrapped(['model.module.a', 'a', 'b.module.c']) == {
        'model.module.a': 'model.a', 'a': 'a', 'b.module.c': 'b.c'}


def test_a_network_whose_own_names_look_like_wrappers() -> None:
    assert renamed({'model.a': 1, 'head.module.b': 2, 'loss': 3}, ['model.a', 'head.b']) == {'model.a': 1, 'head.b': 2}
    assert renamed({'a': 1, 'rest': 2}, ['module.a']) == {'module.a': 1, 'rest': 2}  # strict loading names the rest


def test_a_key_map_is_searched_in_both_names() -> None:
    state = {f'model.module.{name}': torch.randn(shape) for name, shape in (('v.weight', (2, 4)), ('o.weight', (4, 2)))}
    for key_map in (r'g=^v\.weight,z=^o\.weight', r'g=^model\.module\.v\.weight,z=^model\.module\.o\.weight'):
        (record,) = spectrum(state, key_map=key_map)
        assert record.keys['w_g'] == 'model.module.v.weight'
