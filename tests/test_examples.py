"""The examples in docstrings run and give what they say."""

import doctest
import importlib

import pytest

from tests.support.process import ROOT

MODULES = sorted('.'.join(path.relative_to(ROOT).with_suffix('').parts)
                 for room in ('timm_nonlocal', 'train', 'hub') for path in (ROOT / room).rglob('*.py')
                 if '>>> ' in path.read_text())


@pytest.mark.parametrize('name', MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


def test_what_users_import_has_examples() -> None:
    assert {f'timm_nonlocal.{name}' for name in (
        'analysis.spectra', 'layers.affinity', 'layers.blocks', 'layers.insertion', 'models.preresnet', 'ops.stage',
    )} <= set(MODULES)
