"""What README.md shows is what happens."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image

from tests.support.process import ROOT, run
from timm_nonlocal import NonlocalStage
from timm_nonlocal.datasets import DATASETS

README = (ROOT / 'README.md').read_text()


def test_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands, but for the weights of timm's ResNet, which are not here."""
    Image.new('RGB', (48, 40), 'red').save(tmp_path / 'picture.jpg')
    monkeypatch.chdir(tmp_path)
    create = timm.create_model

    def without_network(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        return create(name, pretrained=pretrained and name != 'resnet50', **kwargs)

    monkeypatch.setattr(timm, 'create_model', without_network)
    (block,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    label, eigenvalues = capsys.readouterr().out.splitlines()
    assert label in DATASETS['cifar10'].labels and eigenvalues.count(',') == 63
    assert isinstance(names['backbone'].layer2[3].nl, NonlocalStage)


def test_the_first_command_needs_no_network(tmp_path: Path) -> None:
    command = re.search(r'-m (timm_nonlocal\.inspect \S+ --plot) spectrum\.png', README)
    assert command
    picture = tmp_path / 'spectrum.png'
    result = run('-m', *command[1].split(), str(picture))
    assert result.returncode == 0 and not result.stderr and picture.stat().st_size > 10_000
    assert 'layer1.nl: proposed' in result.stdout and '\n    4 ' in result.stdout


def test_every_link_leads_somewhere() -> None:
    for path in (ROOT / 'README.md', ROOT / 'MODEL_CARD.md', ROOT / 'CONTRIBUTING.md', *(ROOT / 'docs').glob('*.md')):
        for target in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', path.read_text()):
            assert (path.parent / target).exists(), f'{path.name}: {target}'


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150
