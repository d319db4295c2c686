"""The spectra that a training run keeps on the way."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.training import result, train
from timm_nonlocal import spectrum

pytestmark = pytest.mark.usefixtures('one_thread')
ARGUMENTS = ('--model', 'preresnet20_nl_proposed_k2', '--limit', '20', '--epochs', '3', '--batch-size', '10',
             '--spectrum-epochs', '1', '3')


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / 'spectra.jsonl').read_text().splitlines()]


def test_spectra_of_chosen_epochs_also_of_a_run_that_was_cut(small_cifar_here: Path, tmp_path: Path) -> None:
    """Every epoch once, in full in the run's folder, the eigenvalues with six digits in its line of results."""
    assert train(small_cifar_here, tmp_path / 'run', *ARGUMENTS) == 0
    first, last = lines(tmp_path / 'run')
    expected = spectrum(load_file(tmp_path / 'run' / 'model.safetensors'))
    assert (first['epoch'], last['epoch']) == (1, 3) and first['blocks'] != last['blocks']
    told = {'formulation': 'proposed', 'symmetric': True}  # by the module; of a control the file does not say it
    assert last['blocks'] == [json.loads(json.dumps(record.to_dict() | told)) for record in expected]
    kept = result(tmp_path / 'run')['spectra']
    assert [entry['epoch'] for entry in kept] == [1, 3]
    for block, record in zip(kept[1]['blocks'], expected, strict=True):
        assert (block['stage'], block['index']) == (record.stage, record.index)
        assert block['eigenvalues'] == pytest.approx(record.eigenvalues, rel=1e-5)

    cut = ('--resume', 'auto', '--save-seconds', '0', '--max-minutes', '1e-9')
    for _ in range(4):  # a step each
        assert train(small_cifar_here, tmp_path / 'cut', *ARGUMENTS, *cut) == 124
    assert [line['epoch'] for line in lines(tmp_path / 'cut')] == [1]
    assert train(small_cifar_here, tmp_path / 'cut', *ARGUMENTS, '--resume', 'auto') == 0
    assert lines(tmp_path / 'cut') == [first, last]
