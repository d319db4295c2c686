"""The training command as a user runs it: what it leaves, how it is cut and continued, what it says of bad input."""

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from conftest import ROOT, run
from train.cifar import main
from train.step import Learner, Recipe

SCRIPT = str(ROOT / 'train' / 'cifar.py')
MODEL = 'preresnet20_nl_proposed_k1'
COMMON = ['--model', MODEL, '--batch-size', '32', '--milestones', '1', '--epochs', '2', '--threads', '1',
          '--model-kwargs', "nl_args={'affinity': 'uniform'}"]


def train(data: Path, folder: Path, *more: str, **options):
    return run(SCRIPT, *COMMON, '--data-dir', str(data), '--output-dir', str(folder), *more, data=data, **options)


@pytest.fixture(scope='module')
def finished(small_cifar, tmp_path_factory) -> Path:
    """A whole run of two epochs, four steps each (the last of 24 images)."""
    folder = tmp_path_factory.mktemp('run') / 'a'
    result = train(small_cifar, folder)
    assert result.returncode == 0, result.stderr
    return folder


def same_weights(a: Path, b: Path) -> bool:
    a, b = load_file(a / 'model.safetensors'), load_file(b / 'model.safetensors')
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_recipe_is_the_papers():
    recipe = Recipe()
    steps = recipe.epochs * -(-50_000 // recipe.batch_size)
    assert (recipe.epochs, recipe.batch_size, steps) == (164, 128, 64_124)
    assert (recipe.momentum, recipe.weight_decay) == (0.9, 1e-4)
    rates = [recipe.lr_at(epoch) for epoch in (0, 80, 81, 121, 122, 163)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_what_a_run_leaves(finished):
    record, = (json.loads(line) for line in (finished / 'results.jsonl').read_text().splitlines())
    assert record['architecture'] == MODEL and record['dataset'] == 'cifar10' and record['seed'] == 0
    assert record['recipe']['milestones'] == [1] and record['versions']['torch'] == torch.__version__
    assert len(record['test_error']) == 2 and record['final_error'] == record['test_error'][-1]
    assert record['best_error'] == min(record['test_error'])
    rows = list(csv.DictReader((finished / 'curve.csv').open()))
    assert [float(row['test_error']) for row in rows] == record['test_error']
    assert [float(row['lr']) for row in rows] == pytest.approx([0.1, 0.01])
    assert record['sha256'] == hashlib.sha256((finished / 'model.safetensors').read_bytes()).hexdigest()
    assert sorted(path.name for path in finished.iterdir()) == [
        'config.json', 'curve.csv', 'model.safetensors', 'results.jsonl', 'state.safetensors']


def test_timm_loads_it(finished):
    model = timm.create_model(f'local-dir:{finished}', pretrained=True)
    assert type(model.layer1.nl.affinity).__name__ == 'Uniform'
    weights = load_file(finished / 'model.safetensors')
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_plain_lines_without_a_terminal(small_cifar, tmp_path):
    result = train(small_cifar, tmp_path / 'b')
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ['epoch', 'lr'] and [line.split()[0] for line in lines[1:3]] == ['1/2', '2/2']
    assert len({len(line) for line in lines[:3]}) == 1, 'columns are aligned'
    assert lines[3].startswith('final error') and '\r' not in result.stdout + result.stderr


def test_accelerate_launch(small_cifar, finished, tmp_path):
    result = run('-m', 'accelerate.commands.launch', '-q', SCRIPT, *COMMON, '--data-dir', str(small_cifar),
                 '--output-dir', str(tmp_path / 'c'), data=small_cifar)
    assert result.returncode == 0, result.stderr
    assert same_weights(tmp_path / 'c', finished)


def test_two_processes_follow_the_same_plan(small_cifar, tmp_path):
    """Data parallelism over two CPU processes: same steps and images; BN sees half batches, so weights differ."""
    result = run('-m', 'torch.distributed.run', '--nproc_per_node', '2', '--rdzv_backend', 'c10d',
                 '--rdzv_endpoint', 'localhost:0', SCRIPT, *COMMON, '--data-dir', str(small_cifar),
                 '--output-dir', str(tmp_path / 'd'), data=small_cifar)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / 'd' / 'results.jsonl').read_text())
    assert record['processes'] == 2 and len(record['test_error']) == 2
    assert all(round(error * 20 / 100, 6).is_integer() for error in record['test_error'])  # 20 images, each once
    assert all(round(error * 120 / 100, 6).is_integer() for error in record['train_error'])
    assert result.stdout.count('final error') == 1


def start(data: Path, folder: Path, *more: str) -> subprocess.Popen:
    env = {**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{data}', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONUNBUFFERED': '1'}
    command = [sys.executable, SCRIPT, *COMMON, '--data-dir', str(data), '--output-dir', str(folder), *more]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_saves(path: Path, count: int, process: subprocess.Popen) -> None:
    """Until the file has been seen in `count` versions."""
    deadline, seen = time.monotonic() + 120, set()
    while len(seen) < count:
        if path.exists():
            seen.add(path.stat().st_mtime_ns)
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)


@pytest.mark.parametrize('saves', [1, 3, 5])
def test_killed_and_resumed_gives_the_same_bits(small_cifar, finished, tmp_path, saves):
    """kill -9 at an arbitrary moment, saving included (every step saves), then --resume auto to the end."""
    folder = tmp_path / 'e'
    process = start(small_cifar, folder, '--save-seconds', '0')
    wait_for_saves(folder / 'state.safetensors', saves, process)
    time.sleep(random.random() * 0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / 'results.jsonl').exists()
    result = train(small_cifar, folder, '--resume', 'auto')
    assert result.returncode == 0, result.stderr
    assert same_weights(folder, finished)
    a, b = (json.loads((path / 'results.jsonl').read_text()) for path in (folder, finished))
    assert [a[key] for key in ('test_error', 'train_error', 'train_loss', 'sha256')] == [
        b[key] for key in ('test_error', 'train_error', 'train_loss', 'sha256')]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_stops_cleanly_and_resumes(small_cifar, finished, tmp_path, number):
    folder = tmp_path / 'f'
    process = start(small_cifar, folder, '--save-seconds', '0')
    wait_for_saves(folder / 'state.safetensors', 1, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == '' and 'continue with --resume auto' in out
    assert train(small_cifar, folder, '--resume', 'auto').returncode == 0
    assert same_weights(folder, finished)


@pytest.fixture
def fails(capsys, tmp_path):
    """Runs the command with more arguments: one line with the message, exit code 2, and no folder made for it."""
    def check(message: str, data: Path, *more: str, folder: Path = tmp_path / 'new'):
        before = folder.exists()
        assert main([*COMMON, '--data-dir', str(data), '--output-dir', str(folder), *more]) == 2
        out, err = capsys.readouterr()
        assert out == '' and err.count('\n') == 1 and message in err, err
        assert folder.exists() == before
    return check


def test_a_folder_with_a_run_is_not_overwritten(small_cifar_here, finished, fails, capsys):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    fails('already holds a run: continue it with --resume auto', small_cifar_here, folder=finished)
    resume = ('--resume', 'auto')
    fails('holds another run (its seed is 0, not 1)', small_cifar_here, *resume, '--seed', '1', folder=finished)
    fails('its architecture is preresnet20_nl_proposed_k1, not preresnet20_nl_proposed_k2', small_cifar_here,
          *resume, '--model', 'preresnet20_nl_proposed_k2', folder=finished)
    arguments = [*COMMON, '--data-dir', str(small_cifar_here), '--output-dir', str(finished), *resume]
    assert main(arguments) == 0 and 'is finished: final error' in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in finished.iterdir()}


def test_a_truncated_state_is_noticed(small_cifar_here, finished, tmp_path, fails):
    (tmp_path / 'state.safetensors').write_bytes((finished / 'state.safetensors').read_bytes()[:-1])
    fails('cannot be resumed from', small_cifar_here, '--resume', 'auto', folder=tmp_path)


def test_unknown_model_names_near_ones(small_cifar_here, fails):
    fails('Did you mean preresnet20_nl_proposed_k2', small_cifar_here, '--model', 'preresnet20_nl_proposd_k2')
    fails('Did you mean preresnet20_nl_', small_cifar_here, '--model', 'preresnet20_nl_proposed_k0')


@pytest.mark.parametrize(('kwargs', 'message'), [
    ('nl_k=0', 'k=0: it must be a whole number of at least 1'),
    ("nl_args={'inner_dim': 0}", 'inner_dim=0'),
    ('nonsense=1', "unexpected keyword argument 'nonsense'"),
    ('nl_k', 'write KEY=VALUE'),
])
def test_bad_model_arguments(small_cifar_here, fails, kwargs, message):
    fails(message, small_cifar_here, '--model-kwargs', kwargs)


def test_missing_and_damaged_data(small_cifar_here, tmp_path, fails):
    fails('cifar-10-batches-py is missing: add --download', tmp_path)
    damaged = tmp_path / 'cifar-10-batches-py'
    shutil.copytree(small_cifar_here / 'cifar-10-batches-py', damaged)
    data = (damaged / 'data_batch_3').read_bytes()
    for content in (data[:-1], data[:100] + bytes([data[100] ^ 1]) + data[101:]):
        (damaged / 'data_batch_3').write_bytes(content)
        fails('is incomplete or damaged (md5 or format): add --download', tmp_path)
    (damaged / 'data_batch_3').unlink()
    fails('is incomplete or damaged', tmp_path)


def test_batch_too_small_for_the_processes(small_cifar_here, fails):
    fails('the last batch of an epoch has 1 images', small_cifar_here, '--limit', '33')


def test_weight_decay_reaches_every_parameter():
    model = timm.create_model('preresnet20')
    learner = Learner(model, Recipe(lr=0.5, weight_decay=0.01, momentum=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    learner.optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (1 - 0.5 * 0.01), msg=name)
