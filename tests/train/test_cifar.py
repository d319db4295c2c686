"""The training command as a user runs it: what it leaves, how it is cut and continued, what it says of bad input."""

import csv
import hashlib
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from tests.support.process import ROOT, run
from tests.support.small_data import accepted
from tests.support.training import COMMON, MODEL, result, same_course, same_weights, train
from train.cifar import main

SCRIPT = str(ROOT / 'train' / 'cifar.py')
RESUME = ('--resume', 'auto')
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def finished(small_cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of two epochs, four steps each (the last of 24 images)."""
    from torchvision.datasets import CIFAR10
    folder = tmp_path_factory.mktemp('run') / 'a'
    with pytest.MonkeyPatch.context() as patch:
        for name, value in accepted(CIFAR10, small_cifar / 'md5.json').items():
            patch.setattr(CIFAR10, name, value)
        assert train(small_cifar, folder) == 0
    return folder


def test_what_a_run_leaves(finished: Path) -> None:
    record = result(finished)
    assert record['architecture'] == MODEL and record['dataset'] == 'cifar10' and record['seed'] == 0
    assert record['recipe']['milestones'] == [1] and record['versions']['torch'] == torch.__version__
    assert record['recipe_id'] == 'paper epochs=2 batch_size=32 milestones=[1]' and record['kind'] == 'own'
    assert len(record['test_error']) == 2 and record['final_error'] == record['test_error'][-1]
    assert record['best_error'] == min(record['test_error']) and record['diverged_epoch'] is None
    assert record['images'] == [120, 20] and record['final_error'] == 100 * record['final_wrong'] / 20
    assert record['steps'] == 8 and record['parameters'] == 219_482 + 4096  # a stage without θ and φ
    choices = record['nonlocal']
    assert (choices['kind'], choices['k'], choices['affinity'], choices['inner_dim']) == ('proposed', 1, 'uniform', 32)
    assert choices['init'] == 'xavier_normal' and choices['normalize'] == 'row_sum'
    rows = list(csv.DictReader((finished / 'curve.csv').open()))
    assert [float(row['test_error']) for row in rows] == record['test_error']
    assert [float(row['lr']) for row in rows] == pytest.approx([0.1, 0.01])
    assert record['sha256'] == hashlib.sha256((finished / 'model.safetensors').read_bytes()).hexdigest()
    assert sorted(path.name for path in finished.iterdir()) == [
        'config.json', 'curve.csv', 'model.safetensors', 'results.jsonl', 'spectra.jsonl', 'state.safetensors']


def test_timm_loads_it(finished: Path) -> None:
    model: Any = timm.create_model(f'local-dir:{finished}', pretrained=True)
    assert type(model.layer1.nl.affinity).__name__ == 'Uniform'
    weights = load_file(finished / 'model.safetensors')
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_plain_lines_without_a_terminal(small_cifar_here: Path, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    assert train(small_cifar_here, tmp_path / 'b') == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split()[:2] == ['epoch', 'lr'] and [line.split()[0] for line in lines[1:3]] == ['1/2', '2/2']
    assert len({len(line) for line in lines[:3]}) == 1, 'columns are aligned'
    assert lines[3].startswith('final error') and '\r' not in out + err


def test_accelerate_launch(small_cifar: Path, finished: Path, tmp_path: Path) -> None:
    launched = run('-m', 'accelerate.commands.launch', '-q', SCRIPT, *COMMON, '--data-dir', str(small_cifar),
                   '--output-dir', str(tmp_path / 'c'), data=small_cifar)
    assert launched.returncode == 0, launched.stderr
    assert same_course(tmp_path / 'c', finished)


def on_two_processes(data: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --cpu --num_processes 2` starts one process only, torch's own launcher starts two."""
    return run('-m', 'torch.distributed.run', '--nproc_per_node', '2', '--rdzv_backend', 'c10d', '--rdzv_endpoint',
               'localhost:0', SCRIPT, *COMMON, '--data-dir', str(data), '--output-dir', str(folder), *more, data=data)


def test_two_processes_follow_the_same_plan(small_cifar: Path, small_cifar_here: Path, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """Data parallelism over two CPU processes: same steps and images; BN sees half batches, so weights differ.

    The reported error is that of the saved weights, which have one process's running statistics.
    """
    launched = on_two_processes(small_cifar, tmp_path / 'd')
    assert launched.returncode == 0, launched.stderr
    record = result(tmp_path / 'd')
    assert record['processes'] == 2 and len(record['test_error']) == 2 and record['steps'] == 8
    assert all(round(error * 20 / 100, 6).is_integer() for error in record['test_error'])  # 20 images, each once
    assert all(round(error * 120 / 100, 6).is_integer() for error in record['train_error'])
    assert launched.stdout.count('final error') == 1
    from train.evaluate import main as evaluate
    assert evaluate([str(tmp_path / 'd'), '--data-dir', str(small_cifar_here)]) == 0
    assert ' equal' in capsys.readouterr().out


def test_several_seeds_side_by_side(small_cifar_here: Path, small_cifar: Path, finished: Path, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    """A pool gives what each seed gives alone, to the last bit, also when cut; two processes deal the seeds out."""
    pooled, cut = tmp_path / 'pooled', tmp_path / 'cut'
    assert train(small_cifar_here, pooled, '--seeds', '0', '3', '--spectrum-epochs', '2') == 0
    assert train(small_cifar_here, tmp_path / 'alone', '--seed', '3') == 0
    assert same_course(pooled / 'seed0', finished) and same_course(pooled / 'seed3', tmp_path / 'alone')
    assert result(pooled / 'seed3')['at_once'] == 2 and result(pooled / 'seed3')['seed'] == 3
    spectrum, = result(pooled / 'seed3')['spectra']
    assert spectrum['epoch'] == 2 and len(spectrum['blocks'][0]['eigenvalues']) == 64
    assert not (pooled / 'seed3' / 'state.safetensors').exists()

    arguments = ('--seeds', '0', '3', '--save-seconds', '0')
    assert train(small_cifar_here, cut, *arguments, '--max-minutes', '1e-9') == 124
    assert 'stopped in epoch 1 after 32 of its images' in capsys.readouterr().out
    assert train(small_cifar_here, cut, *arguments, *RESUME) == 0
    assert same_course(cut / 'seed0', finished) and same_course(cut / 'seed3', pooled / 'seed3')
    assert train(small_cifar_here, cut, '--seeds', '0', '3', *RESUME) == 0
    assert capsys.readouterr().out.count('is finished: final error') == 2

    dealt = on_two_processes(small_cifar, tmp_path / 'dealt', '--seeds', '0', '3')
    assert dealt.returncode == 0, dealt.stderr
    assert same_course(tmp_path / 'dealt' / 'seed0', finished)
    assert same_course(tmp_path / 'dealt' / 'seed3', pooled / 'seed3')


def start(data: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    env = {**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{data}', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONUNBUFFERED': '1'}
    command = [sys.executable, SCRIPT, *COMMON, '--data-dir', str(data), '--output-dir', str(folder), *more]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_saves(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until the file has been seen in `count` versions."""
    deadline, seen = time.monotonic() + 120, set[int]()
    while len(seen) < count:
        if path.exists():
            seen.add(path.stat().st_mtime_ns)
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)


def test_killed_and_resumed_gives_the_same_bits(small_cifar: Path, small_cifar_here: Path, finished: Path,
                                                tmp_path: Path) -> None:
    """kill -9 at an arbitrary moment, saving included (every step saves), then --resume auto to the end."""
    folder = tmp_path / 'e'
    process = start(small_cifar, folder, '--save-seconds', '0')
    wait_for_saves(folder / 'state.safetensors', 3, process)
    time.sleep(random.random() * 0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / 'results.jsonl').exists()
    assert train(small_cifar_here, folder, *RESUME) == 0
    assert same_course(folder, finished)


def test_ctrl_c_stops_cleanly_and_resumes(small_cifar: Path, small_cifar_here: Path, finished: Path,
                                          tmp_path: Path) -> None:
    folder = tmp_path / 'f'
    process = start(small_cifar, folder, '--save-seconds', '0')
    wait_for_saves(folder / 'state.safetensors', 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == '' and 'continue with --resume auto' in out
    assert train(small_cifar_here, folder, *RESUME) == 0
    assert same_course(folder, finished)


@pytest.mark.parametrize('step', [1, 4, 6])
def test_cut_after_any_step_and_resumed_gives_the_same_bits(small_cifar_here: Path, finished: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM in the first epoch, after its last step, and in the second one; from then on the signal is Python's."""
    from train.engine.step import Learner
    original, steps = Learner.step, list[int]()

    def counted(learner: Learner, size: int) -> None:
        original(learner, size)
        steps.append(size)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, 'step', counted)
        assert train(small_cifar_here, tmp_path / 'g') == 130
    assert signal.getsignal(signal.SIGTERM) is before and len(steps) == step
    assert train(small_cifar_here, tmp_path / 'g', *RESUME) == 0
    assert same_course(tmp_path / 'g', finished)


def test_a_damaged_state_is_noticed_and_the_one_before_it_used(small_cifar_here: Path, finished: Path, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / 'h'
    assert train(small_cifar_here, folder, '--save-seconds', '0', '--max-minutes', '1e-9') == 124
    assert train(small_cifar_here, folder, '--save-seconds', '0', '--max-minutes', '1e-9', *RESUME) == 124
    state = folder / 'state.safetensors'
    data = bytearray(state.read_bytes())
    data[-1] ^= 1  # one bit of one tensor
    state.write_bytes(data)
    assert (folder / 'state.previous.safetensors').is_file()
    capsys.readouterr()
    assert train(small_cifar_here, folder, *RESUME) == 0
    out = capsys.readouterr().out
    assert 'does not match its checksum): going on from the state before it' in out.splitlines()[0]
    assert same_course(folder, finished)


def test_a_run_that_diverges_says_so_and_ends(small_cifar_here: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert train(small_cifar_here, tmp_path / 'i', '--lr', '1e9', '--epochs', '9') == 0
    record = result(tmp_path / 'i')
    assert record['diverged_epoch'] == len(record['train_loss']) < 9 and record['train_loss'][-1] is None
    assert all(math.isfinite(loss) for loss in record['train_loss'][:-1])
    assert f'diverged: the training loss of epoch {record["diverged_epoch"]} is not finite' in capsys.readouterr().out


def test_trackers_get_every_epoch(small_cifar_here: Path, finished: Path, tmp_path: Path) -> None:
    reading = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    assert train(small_cifar_here, tmp_path / 'j', '--log-with', 'tensorboard') == 0
    events = reading.EventAccumulator(str(tmp_path / 'j' / 'timm_nonlocal'))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars('test_error')]
    assert logged == [(1, pytest.approx(result(finished)['test_error'][0])),
                      (2, pytest.approx(result(finished)['test_error'][1]))]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., None]:
    """Runs the command with more arguments: one line with the message, exit code 2, and no folder made for it."""
    def check(message: str, data: Path, *more: str, folder: Path = tmp_path / 'new') -> None:
        before = folder.exists()
        assert train(data, folder, *more) == 2
        out, err = capsys.readouterr()
        assert out == '' and err.count('\n') == 1 and message in err, err
        assert folder.exists() == before
    return check


def test_a_folder_with_a_run_is_not_overwritten(small_cifar_here: Path, finished: Path, fails: Callable[..., None],
                                                capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in finished.iterdir()}
    fails('already holds a run: continue it with --resume auto', small_cifar_here, folder=finished)
    fails('holds another run (its seed is 0, not 1)', small_cifar_here, *RESUME, '--seed', '1', folder=finished)
    fails('its architecture is preresnet20_nl_proposed_k1, not preresnet20_nl_proposed_k2', small_cifar_here,
          *RESUME, '--model', 'preresnet20_nl_proposed_k2', folder=finished)
    fails('holds another run (its lr is 0.1, not 0.2): name', small_cifar_here, *RESUME, '--lr', '0.2', folder=finished)
    assert train(small_cifar_here, finished, *RESUME) == 0 and 'is finished: final error' in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in finished.iterdir()}


def test_a_truncated_state_is_noticed(small_cifar_here: Path, finished: Path, tmp_path: Path,
                                      fails: Callable[..., None]) -> None:
    (tmp_path / 'state.safetensors').write_bytes((finished / 'state.safetensors').read_bytes()[:-1])
    fails('cannot be resumed from', small_cifar_here, *RESUME, folder=tmp_path)


def test_a_state_of_other_images_is_refused(small_cifar_here: Path, finished: Path, tmp_path: Path,
                                            fails: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(finished / 'state.safetensors', tmp_path)
    from train import cifar
    load = cifar.load
    monkeypatch.setattr(cifar, 'load', lambda *args, **options: load(*args, **{**options, 'limit': 64}))
    fails('was trained on 120 images and tested on 20, not 64 and 20: check --data-dir', small_cifar_here, *RESUME,
          folder=tmp_path)


def test_a_full_disk_costs_nothing_that_was_saved(small_cifar_here: Path, finished: Path, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    """What the save writes goes to a device that is always full, as a disk does that has no block left."""
    folder = tmp_path / 'full'
    assert train(small_cifar_here, folder, '--save-seconds', '0', '--max-minutes', '1e-9') == 124
    before = (folder / 'state.safetensors').read_bytes()
    beside = folder / f'.{os.getpid()}.state.safetensors'
    beside.symlink_to('/dev/full')
    capsys.readouterr()
    assert train(small_cifar_here, folder, *RESUME, '--save-seconds', '0') == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'state.safetensors cannot be written (No space left on device): what was' in err
    assert (folder / 'state.safetensors').read_bytes() == before and not beside.is_symlink()
    assert train(small_cifar_here, folder, *RESUME) == 0
    assert same_weights(folder, finished)


def test_two_processes_never_train_in_one_folder(small_cifar: Path, small_cifar_here: Path, tmp_path: Path,
                                                 fails: Callable[..., None]) -> None:
    pytest.importorskip('fcntl')
    folder = tmp_path / 'locked'
    process = start(small_cifar, folder, '--save-seconds', '0', '--epochs', '2000')
    wait_for_saves(folder / 'state.safetensors', 1, process)
    fails(f'{folder} is in use by another process', small_cifar_here, *RESUME, '--epochs', '2000', folder=folder)
    process.kill()  # the lock goes with the process, whatever it leaves
    process.communicate()
    assert (folder / '.lock').exists()
    assert train(small_cifar_here, folder, *RESUME, '--epochs', '2000', '--max-minutes', '1e-9') == 124
    assert not (folder / '.lock').exists()


def test_unknown_model_names_near_ones(small_cifar_here: Path, fails: Callable[..., None]) -> None:
    fails('Did you mean preresnet20_nl_proposed_k2', small_cifar_here, '--model', 'preresnet20_nl_proposd_k2')
    fails('Did you mean preresnet20_nl_', small_cifar_here, '--model', 'preresnet20_nl_proposed_k0')


@pytest.mark.parametrize(('arguments', 'message'), [
    (('--nonsense',), 'unrecognized arguments: --nonsense'),
    (('--log-with', 'dvclive'), '--log-with dvclive: not installed'),
    (('--seeds', '1', '1'), '--seeds 1 1: each only once'),
    (('--epochs', '0'), 'argument --epochs: 0 is not a whole number of at least 1'),
    (('--epochs', '9', '--spectrum-epochs', '8', '10'), '--spectrum-epochs 10: the run has 9 epochs'),
])
def test_bad_arguments(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*COMMON, *arguments])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and message in err and err.count('\n') == 1


@pytest.mark.parametrize(('kwargs', 'message'), [
    ('nl_k=0', 'k=0: it must be a whole number of at least 1'),
    ("nl_args={'inner_dim': 0}", 'inner_dim=0'),
    ('nonsense=1', "unexpected keyword argument 'nonsense'"),
    ('nl_k', 'write KEY=VALUE'),
    ('num_classes=5', 'num_classes=5 gives (2, 5) for two images of CIFAR-10, where a classifier gives (2, 10)'),
    ('num_classes=0', 'num_classes=0 gives (2, 256) for two images'),
    ('features_only=True', 'features_only=True gives list for two images'),
    ('in_chans=1', 'in_chans=1 does not take images of 3×32×32 (Given groups=1, weight of size [16, 1, 3, 3]'),
    ("global_pool=''", "num_classes=10 with global_pool=''"),
    ('pretrained=True', 'preresnet20_nl_proposed_k1.cifar10 has no pretrained weights'),
])
def test_bad_model_arguments(small_cifar_here: Path, fails: Callable[..., None], kwargs: str, message: str) -> None:
    fails(message, small_cifar_here, '--model-kwargs', kwargs)


def test_a_network_that_takes_no_small_images(small_cifar_here: Path, fails: Callable[..., None]) -> None:
    vit = '--model', 'vit_tiny_patch16_224', '--model-kwargs'
    fails('--model vit_tiny_patch16_224 does not take images of 3×32×32 (Input height (32)', small_cifar_here, *vit)
    from train.records.runs import Run
    Run('vit_tiny_patch16_224', model_kwargs=('img_size=32', 'depth=1')).check()  # as the message says


@pytest.mark.parametrize('more', [(), ('--seeds', '1', '2')])
def test_a_file_in_the_place_of_the_folder(tmp_path: Path, fails: Callable[..., None], more: tuple[str, ...]) -> None:
    """Said before the data are looked for."""
    (tmp_path / 'file').write_text('')
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        fails(f'--output-dir {tmp_path / "file"} is a file: name a folder', tmp_path, *more, folder=folder)


@pytest.mark.slow
@pytest.mark.parametrize(('launcher', 'said'), [
    (('accelerate.commands.launch', '-q'), None), (('accelerate.commands.launch',), 'exit status 124'),
    (('torch.distributed.run', '--nproc_per_node', '1'), 'exitcode  : 124')])
def test_what_launchers_make_of_an_exit_code(small_cifar: Path, tmp_path: Path, launcher: tuple[str, ...],
                                             said: str | None) -> None:
    """As --help says: 1, and a traceback that `accelerate launch -q` leaves out."""
    done = run('-m', *launcher, SCRIPT, *COMMON, '--data-dir', str(small_cifar), '--output-dir', str(tmp_path / 'l'),
               '--max-minutes', '1e-9', data=small_cifar)
    assert done.returncode == 1 and ('Traceback' in done.stderr) == bool(said) and (said or '') in done.stderr


def test_sync_bn_needs_gpus(small_cifar_here: Path, fails: Callable[..., None]) -> None:
    fails('--sync-bn is for one seed on several GPUs', small_cifar_here, '--sync-bn')


def test_missing_and_damaged_data(small_cifar_here: Path, tmp_path: Path, fails: Callable[..., None]) -> None:
    fails('cifar-10-batches-py is missing: add --download', tmp_path)
    damaged = tmp_path / 'cifar-10-batches-py'
    shutil.copytree(small_cifar_here / 'cifar-10-batches-py', damaged)
    data = (damaged / 'data_batch_3').read_bytes()
    for content in (data[:-1], data[:100] + bytes([data[100] ^ 1]) + data[101:]):
        (damaged / 'data_batch_3').write_bytes(content)
        fails('is incomplete or damaged (md5 or format): add --download', tmp_path)
    (damaged / 'data_batch_3').unlink()
    fails('is incomplete or damaged', tmp_path)


def test_batch_too_small_for_the_processes(small_cifar_here: Path, fails: Callable[..., None]) -> None:
    fails('the last batch of an epoch has 1 images', small_cifar_here, '--limit', '33')


def test_seeds_that_were_saved_together_are_named(small_cifar_here: Path, tmp_path: Path, fails: Callable[..., None],
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert train(small_cifar_here, tmp_path / 'm', '--seeds', '0', '3', '--max-minutes', '1e-9') == 124
    capsys.readouterr()
    fails(f'{tmp_path}/m/seed0 goes on with all that were saved in it, --seeds 0 3: ask for those', small_cifar_here,
          *RESUME, folder=tmp_path / 'm' / 'seed0')
    fails(f'seed5/state.safetensors is missing: name another --output-dir, or delete {tmp_path}/m/seed0 to start',
          small_cifar_here, *RESUME, '--seeds', '5', '0', folder=tmp_path / 'm')


@pytest.mark.slow
def test_two_processes_that_diverge_have_an_error(small_cifar: Path, tmp_path: Path) -> None:
    """Also where the epoch is not one that is tested."""
    launched = on_two_processes(small_cifar, tmp_path / 'n', '--lr', '1e9', '--test-every', '9', '--epochs', '9')
    assert launched.returncode == 0, launched.stderr
    record = result(tmp_path / 'n')
    assert record['diverged_epoch'] < 9 and record['final_error'] is not None
    assert record['diverged_step'] == 4 * record['diverged_epoch']


def test_ctrl_c_before_the_first_step_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr('train.cifar.load', interrupted)
    assert train(tmp_path, tmp_path / 'o') == 130 and not (tmp_path / 'o').exists()
