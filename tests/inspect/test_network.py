"""The network that is watched on images is that of the target: its file, its config, its tag."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from tests.support.one_line import Command, fails
from timm_nonlocal.checkpoints.targets import Options, Source, open_target
from timm_nonlocal.inspect.network import build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A network of seven classes with its config, and its weights tenfold in another file; a picture."""
    model = timm.create_model('preresnet20_nl_proposed_k1', num_classes=7)
    config = {'pretrained_cfg': {'mean': [0.1, 0.2, 0.3]}}
    save_for_hf(model, str(tmp_path), model_config=config, safe_serialization=True)
    tensors = load_file(tmp_path / 'model.safetensors')
    save_file({**tensors, 'fc.weight': tensors['fc.weight'] * 10}, tmp_path / 'other.safetensors')
    Image.new('RGB', (40, 40), (200, 30, 90)).save(tmp_path / 'one.png')
    return tmp_path


@pytest.mark.parametrize('name', ['model.safetensors', 'other.safetensors'])
@pytest.mark.parametrize('by_file', [False, True])
def test_the_file_that_is_measured_is_watched(folder: Path, name: str, by_file: bool) -> None:
    model = build(open_target(str(folder / name) if by_file else str(folder), Options(file=name)), None)
    assert torch.equal(model.get_parameter('fc.weight'), load_file(folder / name)['fc.weight'])
    assert model.num_classes == 7 and not model.training


def test_a_config_of_another_library_names_no_network(inspect: Command, folder: Path) -> None:
    (folder / 'config.json').write_text(json.dumps({'model_type': 'bert', 'num_classes': 3}))
    fails(inspect, 3, 'does not say which network it belongs to: name it with --arch', folder, '--images', folder)


def test_a_tag_decides_the_number_of_classes(tmp_path: Path) -> None:
    name = 'preresnet20_nl_proposed_k1.cifar100'
    save_file(timm.create_model(name).state_dict(), tmp_path / 'weights.safetensors')
    opened = open_target(str(tmp_path / 'weights.safetensors'))
    source = Source(name, 'file', opened.file, opened.tensors, architecture=name.partition('.')[0])  # as if it shipped
    assert build(source, None).num_classes == 100
