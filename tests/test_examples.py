"""The examples in the docstrings of public names run and give what they say."""

import doctest
import importlib

import pytest

MODULES = ['layers.affinity', 'layers.blocks', 'layers.insertion', 'models.preresnet', 'ops.stage']


@pytest.mark.parametrize('name', MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f'timm_nonlocal.{name}'))
    assert result.attempted and not result.failed
