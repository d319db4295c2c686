"""The spectra that a training run keeps on the way."""

import json

import timm
from safetensors.torch import load_file

from conftest import run
from timm_nonlocal import spectrum
from train.run_dir import save_spectra


def test_spectra_of_chosen_epochs(small_cifar, tmp_path):
    result = run('train/cifar.py', '--model', 'preresnet20_nl_proposed_k2', '--data-dir', str(small_cifar),
                 '--limit', '20', '--epochs', '2', '--batch-size', '10', '--threads', '1',
                 '--spectrum-epochs', '1', '2', '--output-dir', str(tmp_path / 'run'), data=small_cifar)
    assert result.returncode == 0, result.stderr
    first, last = map(json.loads, (tmp_path / 'run' / 'spectra.jsonl').read_text().splitlines())
    expected = spectrum(load_file(tmp_path / 'run' / 'model.safetensors'))
    assert (first['epoch'], last['epoch']) == (1, 2) and first['blocks'] != last['blocks']
    assert last['blocks'] == [json.loads(json.dumps(record.to_dict())) for record in expected]


def test_a_resumed_run_writes_every_epoch_once(tmp_path):
    early, late = (spectrum(timm.create_model('preresnet20_nl_original_k1')) for _ in range(2))
    for epoch, records in ((36, early), (82, early), (82, late)):
        save_spectra(tmp_path, epoch, records)
    lines = [json.loads(line) for line in (tmp_path / 'spectra.jsonl').read_text().splitlines()]
    assert [line['epoch'] for line in lines] == [36, 82]
    assert lines[1]['blocks'][0]['trace'] == late[0].trace
    assert [path.name for path in tmp_path.iterdir()] == ['spectra.jsonl']
