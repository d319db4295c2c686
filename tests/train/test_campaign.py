"""The campaign, a list of runs, each a process and a folder of its own, cut and carried on; and how runs come home."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import timm
import torch

from hub.results import deviations, tag
from tests.support.process import ROOT
from tests.support.training import result, same_course
from timm_nonlocal.files import sha256
from timm_nonlocal.recipes import FINE_TUNING, PAPER, SHORT, Recipe, recipe_id
from train import campaign, cifar, land
from train.campaign import Campaign
from train.records import run_dir, state
from train.records.run_dir import read_results
from train.records.runs import Run, Start, describe_result
from train.records.state import RunError
from train.scheduling.planned import PlannedRun, after_divergence, planned_runs
from train.scheduling.workers import Local

pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = ('--', '--epochs', '2', '--batch-size', '60', '--save-seconds', '0')


def command(data: Path, folder: Path, *more: str, options: tuple[str, ...] = SMALL) -> list[str]:
    return [sys.executable, '-m', 'train.campaign', '--output-dir', str(folder), '--data-dir', str(data), '--results',
            'none', *more, *options]


@pytest.fixture
def environment(small_cifar: Path, tmp_path: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(small_cifar)])
    return {**os.environ, 'PYTHONPATH': path, 'CUDA_VISIBLE_DEVICES': ''}


def go(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


# The list

def test_every_row_of_the_papers_tables_five_times() -> None:
    paper = [planned.run for planned in planned_runs() if not planned.start and not planned.run.model_kwargs
             and recipe_id(planned.run.recipe) in ('paper', 'paper lr=0.01')]
    assert {run.architecture for run in paper if run.dataset == 'cifar10'} == set(timm.list_models('preresnet20*')) - {
        'preresnet20_nl_proposed_k1'}
    assert len([run for run in paper if run.dataset == 'cifar100']) == 9 * 5 and len(paper) == 21 * 5
    assert {run.architecture for run in paper if run.recipe.lr == 0.01} == {
        'preresnet20_nl_original_k4', 'preresnet56_nl_original_k4'}


def test_names_are_folders_and_no_two_are_alike() -> None:
    names = [planned.name for planned in planned_runs()]
    assert len(set(names)) == len(names) and all(set(name) <= set(
        'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-') for name in names)
    assert names[0] == 'preresnet56.cifar100.seed0' and names[2] == 'preresnet20_nl_proposed_k5.cifar10.ft.seed0'


def test_fine_tuning_starts_from_the_plain_backbone_of_its_data_set() -> None:
    tuned = [planned for planned in planned_runs() if planned.run.recipe == FINE_TUNING]
    assert {(planned.start, planned.run.dataset) for planned in tuned} == {
        ('preresnet20.cifar10', 'cifar10'), ('preresnet56.cifar100', 'cifar100')}
    seeds = Counter(planned.run.architecture for planned in tuned if not planned.run.model_kwargs)
    assert [count for name, count in seeds.items() if name.startswith('preresnet20')] == [5] * 12


def test_every_run_can_be_built() -> None:
    for planned in planned_runs():
        if planned.run.seed == 0 and planned.run.recipe != PAPER:
            planned.run.build()
    depth_29, = (planned.run for planned in planned_runs() if 'depth=29' in planned.run.model_kwargs)
    assert sum(p.numel() for p in depth_29.build().parameters()) == 312_218


# What runs

def test_runs_train_in_processes_of_their_own(small_cifar: Path, tmp_path: Path, environment: dict[str, str],
                                              monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    """Side by side, one waiting for the weights of another; the second time nothing is left to do."""
    monkeypatch.setenv('PYTHONPATH', environment['PYTHONPATH'])
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(timm, 'is_model_pretrained', lambda name: name != 'preresnet56.cifar100')  # whatever has landed
    _, _, _, *arguments = command(
        small_cifar, tmp_path / 'c', '--only', 'preresnet56.cifar100.ft.seed0', 'preresnet20.cifar10.short.seed0',
        'preresnet20.cifar10.ft.seed0')
    assert campaign.main(arguments) == 0
    done = capsys.readouterr().out
    assert done.count('final error') == 2 and '2 done' in done and '1 waiting' in done
    tuned = result(tmp_path / 'c' / 'preresnet20.cifar10.ft.seed0')
    assert tuned['start']['name'] == 'preresnet20.cifar10' and tuned['recipe']['nesterov']
    assert tuned['mixed_precision'] == 'bf16' and tuned['test_every'] == 4
    assert campaign.main(arguments) == 0 and 'final error' not in capsys.readouterr().out


def test_a_signal_saves_and_the_next_time_goes_on(small_cifar: Path, tmp_path: Path,
                                                  environment: dict[str, str]) -> None:
    only, folder = ('--only', 'preresnet20.cifar10.short.seed0'), tmp_path / 'c' / 'preresnet20.cifar10.short.seed0'
    long = '--', '--epochs', '60', '--batch-size', '2', '--save-seconds', '600'
    process = subprocess.Popen(command(small_cifar, tmp_path / 'c', *only, options=long), env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / 'c' / 'preresnet20.cifar10.short.seed0.log'
    deadline = time.monotonic() + 120
    while not (log.is_file() and 'test err' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and '1 cut' in said and (folder / run_dir.STATE).is_file()
    table = go(command(small_cifar, tmp_path / 'c', *only, '--dry-run'), environment).stdout
    assert '1 cut' in table


def test_one_that_fails_does_not_stop_the_others(small_cifar: Path, tmp_path: Path,
                                                 environment: dict[str, str]) -> None:
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c' / 'preresnet20_nl_proposed_k5.cifar10.short.seed0').write_text('a file in the way')
    done = go(command(small_cifar, tmp_path / 'c', '--jobs', '1', '--only',
                      'preresnet20_nl_proposed_k5.cifar10.short.seed0', 'preresnet20.cifar10.short.seed0'), environment)
    assert done.returncode == 1 and '1 failed' in done.stdout and '1 done' in done.stdout
    assert 'preresnet20_nl_proposed_k5.cifar10.short.seed0: failed with exit code' in done.stdout


def test_a_ray_cluster_without_anything_to_compute_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, 'ray', SimpleNamespace(
        is_initialized=lambda: True, cluster_resources=lambda: {'memory': 1.0}))
    assert campaign.main(['--output-dir', str(tmp_path), '--engine', 'ray', '--dry-run']) == 2
    assert 'error: --engine ray: the cluster has neither CPUs nor GPUs' in capsys.readouterr().err


@pytest.mark.slow
def test_a_lost_worker_of_ray_is_replaced(small_cifar: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """Two workers; one is killed in the middle of its run, which goes on from its folder to the same bits."""
    pytest.importorskip('ray')
    script = tmp_path / 'cluster.py'
    script.write_text("import sys, ray\n"
                      "ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)\n"
                      "from train.campaign import main\nsys.exit(main(sys.argv[1:]))\n")
    names = 'preresnet20.cifar10.short.seed0', 'preresnet20.cifar10.ft.seed0'
    options = '--', '--epochs', '4', '--batch-size', '4', '--save-seconds', '0'
    local, cluster = (command(small_cifar, tmp_path / name, '--only', *names, options=options) for name in 'ac')
    assert go(local, environment).returncode == 0
    process = subprocess.Popen([sys.executable, str(script), '--engine', 'ray', *cluster[3:]], env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    state, deadline = tmp_path / 'c' / names[0] / run_dir.STATE, time.monotonic() + 200
    while not state.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    victims = [worker for worker in psutil.process_iter(['cmdline'])
               if 'run_here' in ' '.join(worker.info['cmdline'] or [])]
    assert len(victims) == 2
    victims[0].kill()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    for name in names:
        assert same_course(tmp_path / 'a' / name, tmp_path / 'c' / name)


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def say(*more: str) -> str:
        code = campaign.main(['--output-dir', str(tmp_path / 'x'), '--dry-run', *more])
        assert code == 2
        return capsys.readouterr().err

    assert say('--only', 'nothing*') == (
        'error: --only nothing*: no run has such a name; --dry-run lists them\n')
    with pytest.raises(SystemExit, match='2'):
        say('--', '--epochs', '0')
    assert capsys.readouterr().err == 'error: argument --epochs: 0 is not a whole number of at least 1\n'
    for option in ('--seeds 3', '--output-dir y'):
        assert say('--', *option.split()) == f'error: -- {option}: the campaign itself gives {option.split()[0]}\n'
    (tmp_path / 'x').write_text('')
    assert say() == f'error: --output-dir {tmp_path / "x"} is a file: name a folder\n'


# The parts of it, without processes

@pytest.fixture
def campaign_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Campaign]:
    def make(*only: str, gpus: int = 0, results: Path = Path('none')) -> Campaign:
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
        monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {1, 3}, raising=False)
        return Campaign(campaign.parse(
            ['--output-dir', str(tmp_path / 'c'), '--results', str(results), '--only', *only]), Local())
    return make


def finish(folder: Path, planned: PlannedRun, **more: Any) -> None:
    run_dir.write_lines(folder / planned.name / run_dir.RESULTS, [fake(planned.run, 8.0, **more)])


def fake(run: Run, error: float, **more: Any) -> dict[str, Any]:
    """A line about a run that nobody made, and after it the sha256 of no weights."""
    history = [{'epoch': 1, 'train_loss': 1.0, 'train_error': 50.0, 'test_error': error,
                'test_wrong': round(100 * error)}]
    return {**describe_result(run, history, [50_000, 10_000]), 'kind': 'own', 'sha256': '0' * 64, **more}


def test_one_slot_a_core_or_a_gpu(campaign_of: Callable[..., Campaign]) -> None:
    assert campaign_of('*').engine.slots == [1, 3] and campaign_of('*', gpus=4).engine.slots == [0, 1, 2, 3]


def test_seeds_go_side_by_side_on_a_gpu(campaign_of: Callable[..., Campaign]) -> None:
    name = 'preresnet20_nl_proposed_k2.cifar10.seed*'
    assert [len(campaign_of(name, gpus=gpus).next_group()) for gpus in (0, 1)] == [1, 5]
    words = campaign_of(name, gpus=1).words(campaign_of(name, gpus=1).next_group())
    assert words[words.index('--seeds') + 1:] == ['0', '1', '2', '3', '4']
    assert words[words.index('--output-dir') + 1].endswith('preresnet20_nl_proposed_k2.cifar10')


def test_the_command_makes_the_run_that_was_asked_for(campaign_of: Callable[..., Campaign]) -> None:
    """Its words, read by the command itself, give the planned run's recipe, network and data."""
    from train.cifar import parse
    made = campaign_of('*')
    for planned in made.planned:
        run = planned.run
        if run.seed == 0 and made.start(planned) is not None:
            args = parse(made.words([planned]))
            assert (args.model, args.dataset, args.recipe, tuple(args.model_kwargs), args.seeds, args.test_every) == (
                run.architecture, run.dataset, run.recipe, run.model_kwargs, [0], run.test_every)
            assert (args.start or '') == planned.start


def test_a_run_waits_for_the_weights_that_it_starts_from(campaign_of: Callable[..., Campaign], tmp_path: Path) -> None:
    made = campaign_of('preresnet56*.cifar100.*seed0')
    tuned, = (planned for planned in made.planned if planned.name == 'preresnet56.cifar100.ft.seed0')
    first, = (planned for planned in made.planned if planned.name == 'preresnet56.cifar100.seed0')
    assert made.condition(tuned) == ('missing' if timm.is_model_pretrained('preresnet56.cifar100') else 'waiting')
    finish(tmp_path / 'c', first)
    assert made.condition(tuned) == 'missing' and made.start(tuned) == str(tmp_path / 'c' / first.name)
    assert made.condition(first) == 'done'


def test_a_run_starts_from_one_that_was_trained_beside_others(campaign_of: Callable[..., Campaign],
                                                              tmp_path: Path) -> None:
    tuned, = campaign_of('preresnet56.cifar100.ft.seed0').planned
    first, = campaign_of('preresnet56.cifar100.seed0').planned
    run_dir.write_lines(tmp_path / 'c/preresnet56.cifar100/seed0' / run_dir.RESULTS, [fake(first.run, 8.0)])
    assert campaign_of('*').start(tuned) == str(tmp_path / 'c/preresnet56.cifar100/seed0')


def test_what_is_published_is_not_repeated(campaign_of: Callable[..., Campaign], tmp_path: Path) -> None:
    made, results = campaign_of('preresnet20_nl_*.ft.seed0'), tmp_path / 'results.jsonl'
    planned = made.planned[0]
    published = replace(planned.run, start=Start('preresnet20.cifar10', 'f' * 64))
    run_dir.write_lines(results, [fake(published, 8.0), fake(replace(planned.run, seed=1), 8.0)])
    again = campaign_of('preresnet20_nl_*.ft.seed0', results=results)
    assert [again.condition(planned) for planned in again.planned].count('done') == 1
    assert again.condition(planned) == 'done' and made.condition(planned) != 'done'


def test_a_short_run_that_diverged_is_followed_by_one_with_a_lower_rate(campaign_of: Callable[..., Campaign],
                                                                        tmp_path: Path) -> None:
    planned, = campaign_of(name := 'preresnet20_nl_original_k3.cifar10.short.seed0').planned
    finish(tmp_path / 'c', planned, diverged_epoch=1, diverged_step=64)
    made = campaign_of(name)
    assert [each.name for each in made.planned] == [
        planned.name, 'preresnet20_nl_original_k3.cifar10.short.lr0.01.seed0']
    assert after_divergence(made.planned[1]) is None and after_divergence(PlannedRun(Run('preresnet20'))) is None
    assert made.planned[1].run.recipe == replace(SHORT, lr=SHORT.lr / 10)


# Coming home

@pytest.fixture
def homecoming(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[..., Path], Callable[..., int]]:
    """Lands runs that nobody made, whose commit counts as known."""
    monkeypatch.setattr(land, 'in_history', lambda commit: commit == 'known')

    def make(folder: str, run: Run, error: float, **more: Any) -> Path:
        place = tmp_path / folder / run.name
        place.mkdir(parents=True)
        run_dir.save_model(place, run, run.build().state_dict())
        record = fake(run, error, **{'sha256': sha256(place / run_dir.MODEL), 'commit': 'known', **more})
        run_dir.write_lines(place / run_dir.RESULTS, [record])
        return place

    def go(*folders: str) -> int:
        return land.main([*(str(tmp_path / folder) for folder in folders), '--results', str(tmp_path / 'results.jsonl'),
                          '--weights', str(tmp_path / 'weights')])

    return make, go


def landed(folder: Path) -> dict[str, int]:
    """The seed of every weight file."""
    lines = map(json.loads, (folder / 'results.jsonl').read_text().splitlines())
    seeds = {line['sha256']: line['seed'] for line in lines}
    return {path.stem: seeds[sha256(path)] for path in sorted((folder / 'weights').glob('*'))}


def test_landing_ships_the_median_of_each_recipe(homecoming: tuple[Callable[..., Path], Callable[..., int]],
                                                 tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also when later runs move it; what diverged or followed no recipe that ships has its line only."""
    make, go = homecoming
    (tmp_path / 'weights').mkdir()
    for folder, seed, error in (('a', 0, 8.5), ('a', 1, 8.1), ('b', 2, 8.3)):
        make(folder, Run('preresnet20', seed=seed), error)
    make('a', Run('preresnet20', recipe=Recipe(lr=0.2), seed=7), 7.0)
    make('a', Run('preresnet20', recipe=SHORT, seed=8), 15.0)
    make('a', Run('preresnet20', recipe=FINE_TUNING, seed=9, start=Start('preresnet20.cifar10', '1')), 8.0)
    make('b', Run('preresnet20', seed=5), 90.0, diverged_epoch=1)
    assert go('a') == 0
    assert landed(tmp_path) == {'preresnet20.cifar10': 1, 'preresnet20.ft_cifar10': 9}  # the lower of two
    assert go('b') == 0
    assert landed(tmp_path) == {'preresnet20.cifar10': 2, 'preresnet20.ft_cifar10': 9}
    assert len(read_results(tmp_path / 'results.jsonl')) == 7
    capsys.readouterr()
    assert go('a', 'b') == 0 and capsys.readouterr().out == 'nothing new\n'


def test_runs_that_processes_shared_are_told_apart(
        homecoming: tuple[Callable[..., Path], Callable[..., int]], campaign_of: Callable[..., Campaign],
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They have a line, count in no table, ship nothing, and do not stand in the way of the run of one process."""
    make, go = homecoming
    (tmp_path / 'weights').mkdir()
    shared = Run('preresnet20', mixed_precision='bf16', processes=4)
    make('a', shared, 5.0)
    make('b', replace(shared, processes=1), 8.0)
    assert go('a') == 0 and 'final error 5.00 %, on 4 processes: in no table' in capsys.readouterr().out
    assert landed(tmp_path) == {} and deviations(read_results(tmp_path / 'results.jsonl')[0]) == [
        '4 processes with batch statistics of their own']
    made = campaign_of('preresnet20.cifar10.seed0', results=tmp_path / 'results.jsonl')
    assert made.condition(made.planned[0]) == 'missing'
    assert go('b') == 0 and landed(tmp_path) == {'preresnet20.cifar10': 0}
    assert [line['processes'] for line in read_results(tmp_path / 'results.jsonl')] == [4, 1]
    made = campaign_of('preresnet20.cifar10.seed0', results=tmp_path / 'results.jsonl')
    assert made.condition(made.planned[0]) == 'done'


def test_a_network_of_others_has_its_line_only(homecoming: tuple[Callable[..., Path], Callable[..., int]],
                                               tmp_path: Path) -> None:
    make, go = homecoming
    make('a', Run('test_resnet'), 9.0)
    assert go('a') == 0 and landed(tmp_path) == {} and len(read_results(tmp_path / 'results.jsonl')) == 1


@pytest.mark.parametrize(('fault', 'said'), [("raise KeyError('weights')", "KeyError: 'weights'"),
                                             ('import os; os._exit(1)', 'no reason given')])
def test_a_page_that_fails_is_said(homecoming: tuple[Callable[..., Path], Callable[..., int]], tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str,
                                   said: str) -> None:
    make, _ = homecoming
    make('a', Run('preresnet20', seed=9), 9.0)
    monkeypatch.setattr(land, 'ROOT', tmp_path)
    (tmp_path / 'hub').mkdir()
    (tmp_path / 'hub' / '__init__.py').write_text('')
    (tmp_path / 'hub' / 'index.py').write_text(fault)
    assert land.main([str(tmp_path / 'a'), '--weights', str(tmp_path / 'weights'), '--results',
                      str(tmp_path / 'hub' / 'results.jsonl')]) == 2
    assert capsys.readouterr().err == (
        f'error: the runs have landed, but python -m hub.index fails: {said}\n')


def test_what_does_not_land_changes_nothing(homecoming: tuple[Callable[..., Path], Callable[..., int]], tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    make, go = homecoming
    (tmp_path / 'weights').mkdir()
    make('good', Run('preresnet20'), 8.0)
    make('part', Run('preresnet20', limit=512), 8.0)
    make('toy', Run('preresnet20', seed=6), 8.0, images=[512, 100])
    make('twice', Run('preresnet20', seed=7, recipe=FINE_TUNING, start=Start('a', '1')), 8.0)
    make('twice/again', Run('preresnet20', seed=7, recipe=FINE_TUNING, start=Start('b', '2')), 8.0)
    symmetric = Run('preresnet20_nl_proposed_k5', recipe=FINE_TUNING, model_kwargs=("nl_args={'symmetric': True}",))
    make('double', replace(symmetric, start=Start('a', '1')), 8.0)
    make('double/again', replace(symmetric, start=Start('b', '2')), 8.0)
    lacking = make('lacking', Run('preresnet20', seed=5), 8.0)
    run_dir.write_lines(lacking / run_dir.RESULTS, [{
        key: value for key, value in result(lacking).items() if key != 'best_epoch'}])
    make('unknown', Run('preresnet20', seed=1), 8.0, commit='abc')
    make('mixed', Run('preresnet20', seed=8), 8.0, commits=['known-dirty', 'known'])
    make('untold', Run('preresnet20', seed=4), 8.0, commit=None)
    make('dirty', Run('preresnet20', seed=2), 8.0, commit='known-dirty')
    broken = make('broken', Run('preresnet20', seed=3), 8.0)
    (broken / run_dir.MODEL).write_bytes(b'')
    (tmp_path / 'empty').mkdir()
    for folder, message in (('part', 'was trained on the first 512 images only'),
                            ('lacking', 'line 1 lacks best_epoch'),
                            ('toy', 'was trained on 512 images and tested on 100, where cifar10 has 50000 and 10000'),
                            ('twice', 'two runs of preresnet20.cifar10 with seed 7'), ('unknown', 'not in the history'),
                            ('double', 'two runs of preresnet20_nl_proposed_k5.cifar10 with seed 0'),
                            ('dirty', 'not in the history'), ('mixed', 'by known-dirty, which is not in'),
                            ('untold', 'was made by an unknown commit: run it from'),
                            ('broken', 'is missing, or not what'),
                            ('empty', 'holds no finished run')):
        assert go('good', folder) == 2
        line, = capsys.readouterr().err.splitlines()
        assert message in line
        assert not (tmp_path / 'results.jsonl').exists() and not list((tmp_path / 'weights').iterdir())


def test_the_history_is_gits() -> None:
    head = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        pytest.skip('this is a copy of the tree without its history')
    assert land.in_history(head.stdout.strip()) and not land.in_history('0' * 40)


def test_seeds_that_were_cut_together_go_on_together(campaign_of: Callable[..., Campaign], tmp_path: Path) -> None:
    """Whichever of them are asked for, on whatever device; those that nobody has begun are a group of their own."""
    name, started = 'preresnet20_nl_proposed_k2.cifar10.seed*', (1, 4)
    planned = {each.run.seed: each for each in campaign_of(name).planned}
    kept = [{'run': planned[seed].run.to_dict(), 'history': [], 'spectra': []} for seed in started]
    folder = tmp_path / 'c' / planned[1].run.row
    progress: Any = {'epoch': 0, 'images': 128, 'seconds': 1.0, 'data': [50_000, 10_000], 'runs': kept}
    state.save(folder / 'seed1' / run_dir.STATE, {'0.x': torch.zeros(1)}, progress)
    for gpus in (0, 1):
        made = campaign_of(name, gpus=gpus)
        group = made.next_group()
        assert [made.condition(each) for each in made.planned] == ['missing', 'cut', 'missing', 'missing', 'cut']
        assert campaign_of(planned[4].name, gpus=gpus).next_group() == group
        args = cifar.parse(made.words(group))
        accelerator: Any = SimpleNamespace(mixed_precision='bf16', num_processes=1, process_index=0)
        runs, folders, _ = cifar.runs_of_process(args, accelerator)
        assert folders == [folder / f'seed{seed}' for seed in started]
        assert cifar.read_state(folders, runs, resume=True)
    made.jobs.append(campaign.Job(group, 0, Stopped()))
    assert [each.run.seed for each in made.next_group()] == [0, 2, 3]


class Stopped:
    """A task that takes note of being asked to end."""

    asked = False

    def poll(self) -> int | None:
        return None

    def stop(self) -> None:
        self.asked = True


def test_an_error_of_the_campaign_saves_every_run(campaign_of: Callable[..., Campaign], tmp_path: Path) -> None:
    """A line that is off in the middle, where the next run is looked for."""
    made, task = campaign_of('preresnet20_nl_proposed_k2.cifar10.seed*'), Stopped()
    made.jobs.append(campaign.Job(made.planned[:1], 1, task))
    made.reap = lambda: run_dir.read_results(tmp_path / 'results.jsonl')  # type: ignore[method-assign, assignment]
    (tmp_path / 'results.jsonl').write_text('nonsense')
    with pytest.raises(RunError, match='line 1 is not a JSON object'):
        made.run(campaign.Stop())
    assert task.asked


def test_a_gpu_is_one_of_those_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr('train.scheduling.workers.LocalTask', lambda process: process)
    monkeypatch.setattr(subprocess, 'Popen', lambda *args, env, **options: seen.append(env['CUDA_VISIBLE_DEVICES']))
    for visible, jobs, names in (('5,GPU-3', None, ['5', 'GPU-3']), ('', None, ['0', '1']), ('', 1, ['0']),
                                 ('5,GPU-3', 3, ['5', 'GPU-3', '5'])):
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
        for slot in (local := Local(jobs)).slots:
            local.begin([], slot, tmp_path / 'log', 'bf16')
        assert [seen.pop(0) for _ in names] == names


def test_a_run_from_trained_weights_is_not_the_papers(campaign_of: Callable[..., Campaign], tmp_path: Path) -> None:
    planned = campaign_of('preresnet20.cifar10.seed0').planned[0]
    line = fake(replace(planned.run, start=Start('preresnet20.ft_cifar10', '0')), 8.0)
    run_dir.write_lines(tmp_path / 'results.jsonl', [line])
    assert deviations(line) == ['from trained weights'] and tag(line) is None
    assert campaign_of('*', results=tmp_path / 'results.jsonl').condition(planned) == 'missing'


def test_nothing_starts_from_weights_that_diverged(campaign_of: Callable[..., Campaign], tmp_path: Path) -> None:
    tuned, = campaign_of('preresnet56.cifar100.ft.seed0').planned
    first, = campaign_of('preresnet56.cifar100.seed0').planned
    finish(tmp_path / 'c', first, diverged_epoch=1)
    assert campaign_of('*').start(tuned) != str(tmp_path / 'c' / first.name)
