"""Images from 4×4 to 224×224, square or not, one or several, and what happens where the affinity would not fit."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch

from tests.support.networks import calibrated
from tests.support.process import ROOT
from timm_nonlocal import NonlocalBlock, NonlocalStage
from timm_nonlocal.layers import memory
from timm_nonlocal.layers.affinity import Affinity


@pytest.mark.parametrize('name', ['preresnet20', 'preresnet20_nl_original_k2', 'preresnet20_nl_proposed_k1x3'])
@pytest.mark.parametrize('size', [(4, 4), (32, 32), (33, 47), (64, 16), (5, 80), (64, 64)])
def test_any_size(name: str, size: tuple[int, int]) -> None:
    """The features are a quarter of the image, rounded up, and one image alone gives what it gives among others."""
    model: Any = calibrated(name, (4, 3, *size))
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        y, features = model(x), model.forward_features(x)
        assert features.shape == (2, 256, -(-size[0] // 4), -(-size[1] // 4))
        torch.testing.assert_close(model(x[1:]), y[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('features_only', [False, True])
def test_imagenet_size(features_only: bool) -> None:
    """224×224 where the affinity costs nothing; with a full one it takes what docs/models.md says."""
    model = timm.create_model('preresnet20_nl_proposed_k2', nl_args={'affinity': 'uniform'},
                              features_only=features_only).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, 224, 224))
    assert [y.shape[-1] for y in out] == [224, 224, 112, 56] if features_only else out.shape == (1, 10)


@pytest.mark.parametrize('size', [(3, 32), (32, 3), (1, 1)])
def test_too_small(size: tuple[int, int]) -> None:
    message = f'an image of {size[0]}×{size[1]} pixels is too small: PreResNet takes 4×4 and larger'
    model: Any = timm.create_model('preresnet20_nl_proposed_k2').eval()
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=f'^{message}$'):
            call(torch.randn(1, 3, *size))


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, 'ASKED_FROM', 0)
    monkeypatch.setattr(memory, 'available', lambda device: 2.0 ** 20)


@pytest.mark.parametrize('make', [
    lambda: NonlocalStage(8, 2, merged=False),
    lambda: NonlocalStage(8, 2, affinity='concatenation'),
    lambda: NonlocalStage(8, 2, affinity='dot_product', merged=False),
    lambda: NonlocalBlock(8, affinity='concatenation'),
], ids=['plain', 'concatenation', 'dot_product', 'block'])
def test_an_affinity_that_does_not_fit(make: Callable[[], torch.nn.Module], little_memory: None) -> None:
    """One line with both figures, before anything is allocated, and batch-size finders know it for what it is."""
    module = make()
    assert module(torch.randn(1, 8, 16, 16)).shape == (1, 8, 16, 16)  # 2 × 256² × 4 bytes = 0.5 MiB
    message = (r'^the affinity between 1024 positions takes 0\.0 GiB for a batch of 2, and 0\.0 GiB are free: out of '
               r'memory\. Use fewer or smaller images, or merged=True with affinity [^\n]*$')
    for call in (module, torch.fx.symbolic_trace(module)):
        with pytest.raises(torch.OutOfMemoryError, match=message):
            call(torch.randn(2, 8, 32, 32))


@pytest.mark.skipif(not hasattr(Affinity, 'operator'), reason='no affinity is applied without its matrix yet')
def test_the_options_that_the_message_names_make_no_matrix(little_memory: None) -> None:
    x = torch.randn(2, 8, 32, 32)
    with pytest.raises(torch.OutOfMemoryError) as error:
        NonlocalStage(8, merged=False)(x)
    names = re.findall("'(.*?)'", str(error.value))
    assert len(names) == 4
    for affinity in names:
        for module in (NonlocalStage(8, 2, affinity=affinity, merged=True), NonlocalBlock(8, affinity=affinity)):
            module(x)


def test_the_documented_figures() -> None:
    """A and K of one image in float32, by the side of the image."""
    text = ' '.join((ROOT / 'docs' / 'models.md').read_text().split())
    figures = re.findall(r'(\S+ .iB) at (\d+)×\2', text)
    assert len(figures) == 4
    for figure, side in figures:
        need = 2 * 4 * int(side) ** 4
        assert figure == (f'{need / 2 ** 20:.0f} MiB' if need < 2 ** 30 else f'{need / 2 ** 30:.1f} GiB')


def test_what_is_available() -> None:
    assert 2 ** 20 < memory.available(torch.device('cpu')) < 2 ** 50
    assert memory.available(torch.device('meta')) == float('inf')


@pytest.mark.gpu
def test_what_is_available_on_a_gpu() -> None:
    """Memory that torch keeps for itself counts as available."""
    before = memory.available(torch.device('cuda'))
    block = torch.empty(1 << 28, dtype=torch.uint8, device='cuda')
    assert memory.available(block.device) <= before - (1 << 28) + (1 << 24)
    del block
    assert memory.available(torch.device('cuda')) >= before - (1 << 24)
