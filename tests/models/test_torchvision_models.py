"""torchvision's registry: names, builders, and enums that exist where weights do (those are in test_pretrained.py)."""

import pickle

import pytest
import timm
import torch
from torchvision.models import get_model, get_model_builder, get_model_weights, list_models
from torchvision.models._api import WeightsEnum

import timm_nonlocal
from tests.support.process import run
from timm_nonlocal.models.preresnet import ARCHITECTURES


def test_registered_names() -> None:
    assert list_models(include='preresnet*') == sorted(ARCHITECTURES) == list_models(module=timm_nonlocal.models)


@pytest.mark.parametrize('name', ['preresnet20', 'preresnet56_nl_original_k1x3', 'preresnet20_nl_proposed_k5'])
def test_the_same_network_as_timms(name: str) -> None:
    torch.manual_seed(0)
    model = get_model(name, weights=None)
    torch.manual_seed(0)
    other = timm.create_model(name)
    assert model.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert get_model(name, num_classes=7, nl_args={'symmetric': True} if '_nl_' in name else None).fc.out_features == 7
    assert get_model_builder(name).__name__ == name


def test_every_network_has_an_enum_of_its_own() -> None:
    enums = {name: get_model_weights(name) for name in ARCHITECTURES}
    assert len(set(enums.values())) == len(ARCHITECTURES)
    assert enums['preresnet20_nl_proposed_k5'].__name__ == 'PreResNet20_NL_Proposed_K5_Weights'
    assert enums['preresnet56_nl_original_k1x3'].__name__ == 'PreResNet56_NL_Original_K1x3_Weights'
    for enum in enums.values():
        assert issubclass(enum, WeightsEnum) and pickle.loads(pickle.dumps(enum)) is enum


AGAIN = """
import importlib, sys, timm, torch, torchvision, timm_nonlocal
old = timm.create_model('preresnet20_nl_proposed_k2')
importlib.reload(timm_nonlocal)
for name in [name for name in sys.modules if name.split('.')[0] == 'timm_nonlocal']:
    del sys.modules[name]
import timm_nonlocal
new = torchvision.models.get_model('preresnet20_nl_proposed_k2')
new.load_state_dict(old.state_dict())
x = torch.randn(2, 3, 32, 32)
gradients = [torch.autograd.grad(model(x).square().sum(), list(model.parameters())) for model in (old, new)]
print(isinstance(new, timm_nonlocal.PreResNet), all(map(torch.equal, *gradients)))
"""


def test_the_package_can_be_imported_again() -> None:
    """As notebooks do; networks that were made before go on."""
    done = run('-W', 'ignore', '-c', AGAIN)
    assert (done.stdout, done.returncode) == ('True True\n', 0), done.stderr


def test_bad_weights() -> None:
    with pytest.raises(ValueError, match="^PreResNet20_Weights has no 'IMAGENET1K_V1'; it has "):
        get_model('preresnet20', weights='IMAGENET1K_V1')
    with pytest.raises(TypeError, match='expected PreResNet20_Weights'):
        get_model('preresnet20', weights=get_model_weights('resnet18').DEFAULT)
    with pytest.raises(TypeError, match='nonsense'):
        get_model('preresnet20', nonsense=1)
