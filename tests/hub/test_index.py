"""python -m hub.index: the table of models in README.md and what the package knows of its weights."""

import hashlib
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hub import index as models
from tests.support.networks import package_with_weights
from tests.support.process import ROOT
from timm_nonlocal.models.preresnet import ARCHITECTURES
from timm_nonlocal.recipes import PAPER
from train import cifar
from train.records.runs import Run

NAME = 'preresnet20_nl_proposed_k2.cifar10'


def test_the_readmes_table_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert models.main(['--check']) == 0, capsys.readouterr().err


def macs(model: Any) -> Any:
    """Counted on real numbers, attention as its two products; the command counts on the meta device."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2


def test_every_model_has_its_size() -> None:
    lines = [line.strip('| ').split(' | ') for line in models.table({}).splitlines()]
    head = next(line for line in lines if line[0] == 'nonlocal modules')
    rows = {line[0]: dict(zip(head[1:], line[1:], strict=True)) for line in lines[lines.index(head) + 2:]
            if len(line) == len(head)}
    assert len(rows) * 2 == len(ARCHITECTURES)
    for name in ARCHITECTURES:
        depth, _, rest = name.partition('_')
        row = rows[f'`…_{rest}`' if rest else 'none']
        if depth == 'preresnet20':
            model = timm.create_model(name).eval()
            assert row[f'{depth}, parameters'] == f'{sum(p.numel() for p in model.parameters()):,}'
            assert row[f'{depth}, MACs'] == f'{macs(model) / 1e6:,.1f} M'
    assert '`resnet50_nl_proposed_k5` (31,8' in models.table({})


@pytest.fixture
def root(tmp_path: Path) -> Any:
    """A repository with one weight file and the results line of its run."""
    package_with_weights(tmp_path, NAME)
    (tmp_path / 'hub').mkdir()
    shutil.copy(ROOT / 'README.md', tmp_path)
    line = {'architecture': 'preresnet20_nl_proposed_k2', 'dataset': 'cifar10', 'seed': 3, 'final_error': 7.25,
            'mixed_precision': 'bf16', 'recipe': PAPER.to_dict(),
            'best_error': 7.0, 'best_epoch': 160, 'train_loss': [], 'train_error': [], 'test_error': [],
            'sha256': hashlib.sha256((tmp_path / models.WEIGHTS / f'{NAME}.safetensors').read_bytes()).hexdigest()}
    (tmp_path / models.RESULTS).write_text(json.dumps({**line, 'sha256': '0', 'final_error': 1.0}) + '\n'
                                            + json.dumps(line) + '\n')
    return tmp_path


def test_errors_come_from_the_results_line_with_the_files_sha256(
        root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = root / models.WEIGHTS / 'index.json'
    index.write_text(json.dumps({NAME: {'hf_hub_id': 'someone/it', 'test_error': 99},
                                 'preresnet56.cifar100': {'hf_hub_id': 'someone/other'}}))
    assert models.main(['--check'], root) == 1
    assert 'index.json is out of date: run python -m hub.index' in capsys.readouterr().err
    assert models.main([], root) == models.main(['--check'], root) == 0
    entries = json.loads(index.read_text())
    model = timm.create_model(NAME).eval()
    assert entries[NAME] == {
        'hf_hub_id': 'someone/it', 'test_error': 7.25, 'macs': macs(model),
        'num_params': sum(p.numel() for p in model.parameters()),
        'sha256': hashlib.sha256((root / models.WEIGHTS / f'{NAME}.safetensors').read_bytes()).hexdigest(),
        'recipe': 'accelerate launch --mixed_precision bf16 train/cifar.py --model preresnet20_nl_proposed_k2 '
                  '--dataset cifar10 --seed 3 --recipe paper'}
    assert entries['preresnet56.cifar100'] == {'hf_hub_id': 'someone/other'}
    assert models.main(['--namespace', 'us'], root) == 0
    assert {name: entry['hf_hub_id'] for name, entry in json.loads(index.read_text()).items()} == {
        NAME: f'us/{NAME}', 'preresnet56.cifar100': 'someone/other'}
    lines = (root / 'README.md').read_text().splitlines()
    assert f'| `…_nl_proposed_k2` | 7.25 | {entries[NAME]["num_params"]:,} |' in lines
    head = '| nonlocal modules | preresnet20, CIFAR-10, paper | preresnet20, parameters |'
    assert head in lines, 'the other is on the Hub, of unknown error'
    assert not list(root.glob('**/*.part'))


def test_the_command_of_a_run_makes_that_run() -> None:
    run = Run('preresnet20_nl_original_k4', 'cifar10', 2, replace(PAPER, lr=0.01, milestones=(3, 5)),
              ("nl_args={'scale': 1.0}", 'drop_rate=0.1'), 40, 'bf16', compile=True)
    words = shlex.split(models.command(run.to_dict()))
    assert words[:5] == ['accelerate', 'launch', '--mixed_precision', 'bf16', 'train/cifar.py']
    accelerator = SimpleNamespace(mixed_precision=words[3], num_processes=1)
    runs, _folders, _processes = cifar.runs_of_process(cifar.parse(words[5:]), accelerator)
    assert runs == [run]


@pytest.mark.parametrize('change', ['content', 'name'])
def test_a_file_that_no_run_accounts_for(root: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = root / models.WEIGHTS / f'{NAME}.safetensors'
    if change == 'content':
        file.write_bytes(file.read_bytes()[:-4] + b'....')
    else:
        file.rename(file.with_name('preresnet20_nl_proposed_k2.cifar100.safetensors'))
    before = (root / 'README.md').read_bytes()
    assert models.main([], root) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: preresnet20_nl_proposed_k2.cifar') and error.count('\n') == 1
    known = {'content': 'no line of results.jsonl has its sha256', 'name': 'says that these weights are'}[change]
    assert known in error
    assert (root / 'README.md').read_bytes() == before


def test_a_readme_without_the_markers(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / 'README.md').write_text('# Nothing\n')
    assert models.main([], root) == 2
    assert capsys.readouterr().err.startswith(
        'error: README.md: the lines <!-- begin models: made by python -m hub.index --> and <!-- end models --> must')


def test_what_has_no_weights_any_more_is_not_listed(root: Path) -> None:
    index = root / models.WEIGHTS / 'index.json'
    assert models.main([], root) == 0 and NAME in json.loads(index.read_text())
    (root / models.WEIGHTS / f'{NAME}.safetensors').unlink()
    assert models.main([], root) == 0 and json.loads(index.read_text()) == {}
    assert 'No weights yet.' in (root / 'README.md').read_text()
