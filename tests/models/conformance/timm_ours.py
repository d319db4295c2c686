"""A pytest plugin that narrows timm's own tests/test_models.py, unchanged, to the models that timm_nonlocal registers.

    pytest -p timm_ours test_models.py

TIMM_NONLOCAL_MODELS, names with spaces between, narrows it further. timm's file asks `timm.list_models` for what to
test, by module too, in a list that a plugin's modules cannot be on: here that question is left out. Of the models with
pretrained weights those are tested whose weights are in the package, so that nobody waits for the Hub.
"""

import os
from typing import Any

import pytest
import timm

before = set(timm.list_models())

import timm_nonlocal  # noqa: E402, F401 (it registers ours)

OURS = set(timm.list_models()) - before
if 'TIMM_NONLOCAL_MODELS' in os.environ:
    OURS &= set(os.environ['TIMM_NONLOCAL_MODELS'].split())
list_all_models = timm.list_models


def list_models(filter: str = '', module: str = '', pretrained: bool = False, **kwargs: Any) -> list[str]:
    names = [name for name in list_all_models(filter, pretrained=pretrained, **kwargs) if name.split('.')[0] in OURS]
    return [name for name in names if not pretrained or ((cfg := timm.get_pretrained_cfg(name)) and cfg.file)]


timm.list_models = list_models  # type: ignore[assignment]  # the other parameters of timm's pass through kwargs
timm.list_pretrained = lambda *args, **kwargs: list_models(  # type: ignore[misc]  # no third argument is positional
    *args, pretrained=True, include_tags=True, **kwargs)


def pytest_configure(config: pytest.Config) -> None:
    for marker in ('base', 'forward', 'backward', 'cfg', 'cfg_nonstd', 'torchscript', 'features', 'fxforward',
                   'fxbackward', 'timeout'):
        config.addinivalue_line('markers', f'{marker}: of timm')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of timm's own models by name."""
    ours = [item for item in items if _model(item) in OURS]
    config.hook.pytest_deselected(items=[item for item in items if _model(item) not in OURS])
    items[:] = ours


def _model(item: pytest.Item) -> str:
    return str(getattr(getattr(item, 'callspec', None), 'params', {}).get('model_name')).split('.')[0]
