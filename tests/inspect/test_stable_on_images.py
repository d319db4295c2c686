"""A stage that is stable by construction: whether the norm rose on images, image by image and block by block."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torch import nn

from tests.support.one_line import Command
from timm_nonlocal import NonlocalStage
from timm_nonlocal.analysis import recorder


def grow(stage: NonlocalStage, x: torch.Tensor) -> float:
    """The largest ratio of norms of any block on any of x (B, C, H, W), by eq. (8) and the kernel's own row sums."""
    ratios = []
    for image in x.double():
        z = image.flatten(1).T
        q = stage.theta.weight.double()
        kernel = ((z @ q.T) @ (z @ q.T).T * stage.affinity.scale).exp()
        pi, a, powers = kernel.sum(1), kernel / kernel.sum(1, keepdim=True), []
        for block in (None, *stage.sub_blocks):
            z = z if block is None else z + (a @ z - z) @ (block.z.weight.double() @ block.g.weight.double()).T
            powers.append((pi @ z.square().sum(1)).item())
        ratios += [(after / before) ** 0.5 for before, after in pairwise(powers)]
    return max(ratios)


@pytest.mark.parametrize('stable', [True, False])
@torch.no_grad()
def test_growth_is_the_largest_over_images_and_blocks(stable: bool) -> None:
    stage = NonlocalStage(8, 3, symmetric=True, stable=stable)
    if not stable:
        for block, factor in zip(stage.sub_blocks, (-0.2, 0.2, -0.01), strict=True):  # amplifies, diffuses, amplifies
            block.z.weight.copy_(factor * block.g.weight.T)
    x = torch.cat([torch.randn(1, 8, 4, 4) * 0.1, torch.ones(3, 8, 4, 4) + torch.randn(3, 8, 4, 4) * 0.01])
    found = recorder.watch(nn.Sequential(stage, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), x)['modules']['0']
    assert found['growth'] == pytest.approx(grow(stage, x), abs=1e-9)
    assert found['growth'] <= 1 + 1e-9 if stable else found['growth'] > 1.001


def test_a_rise_on_one_image_is_not_hidden_by_the_others() -> None:
    record = {'is_markov': True, 'track': {name: [1.0, 0.5] for name in ('dirichlet', 'variance', 'power')}}
    found = recorder._summary([{**record, 'growth': 0.7}, {**record, 'growth': 1.25}, {**record, 'growth': 0.6}])
    assert found['power'] == [1, 0.5] and found['growth'] == 1.25


@pytest.fixture
def stable(tmp_path: Path) -> Path:
    arguments: dict[str, Any] = {'nl_args': {'symmetric': True, 'stable': True}}
    model: Any = timm.create_model('preresnet20_nl_proposed_k2', **arguments)
    save_for_hf(model, str(tmp_path), model_args=arguments, safe_serialization=True)
    for number in range(2):
        noise = torch.randint(256, (32, 32, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / f'{number}.png')
    return tmp_path


def test_the_report_says_so_in_a_line(inspect: Command, stable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = inspect(stable, '--images', stable, '-q')
    assert (code, err) == (0, '') and 'stable by construction' in out
    assert out.count('  ‖Zⁿ‖_π never rose on 2 images\n') == 1
    own = recorder._summary
    monkeypatch.setattr(recorder, '_summary', lambda records: own(records) | {'growth': 1.0325})
    out = inspect(stable, '--images', stable, '-q')[1]
    assert '  ‖Zⁿ‖_π rose on 2 images, in one block by up to 3.2500 %\n' in out and 'never' not in out
    (stage,) = json.loads(inspect(stable, '--images', stable, '--json')[1])['targets'][0]['stages']
    assert stage['images']['growth'] == 1.0325


def test_other_stages_promise_nothing(inspect: Command, tmp_path: Path, stable: Path) -> None:
    save_for_hf(timm.create_model('preresnet20_nl_proposed_k2'), str(tmp_path / 'plain'), safe_serialization=True)
    out = inspect(tmp_path / 'plain', '--images', stable, '-q')[1]
    assert 'predictions on 2 images' in out and not re.search('rose', out)
