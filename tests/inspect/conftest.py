"""The command in this process, and weights for it."""

from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from tests.support.one_line import Command
from timm_nonlocal import spectrum
from timm_nonlocal.analysis.spectra import Spectrum
from timm_nonlocal.inspect.command import main


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process: its exit code, and what it printed on stdout and stderr."""
    def call(*arguments: object) -> tuple[object, str, str]:
        code: object
        try:
            code = main([*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return call


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, list[Spectrum]]:
    model = timm.create_model('preresnet20_nl_proposed_k2')
    path = tmp_path / 'model.safetensors'
    save_file(model.state_dict(), path)
    return path, spectrum(model)
