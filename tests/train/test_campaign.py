"""The campaign, a list of runs, each a process and a folder of its own, cut and carried on; and how runs come home."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import timm
import torch

from tests.support.process import ROOT
from tests.support.training import result, same_course
from timm_nonlocal.files import sha256 as sha256_of_file
from timm_nonlocal.recipes import FINE_TUNING, PAPER, SHORT, Recipe, recipe_id
from train import campaign, land
from train.campaign import Campaign
from train.records import run_dir
from train.records.run_dir import read_results
from train.records.runs import Run, Start, describe_result
from train.scheduling.planned import Row, after_divergence, rows
from train.scheduling.workers import Local

pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = ('--', '--epochs', '2', '--batch-size', '60', '--save-seconds', '0')


def command(data: Path, folder: Path, *more: str, options=SMALL) -> list[str]:
    return [sys.executable, '-m', 'train.campaign', '--output-dir', str(folder), '--data-dir', str(data), '--results',
            'none', *more, *options]


@pytest.fixture
def environment(small_cifar, tmp_path):
    path = os.pathsep.join([str(ROOT), str(small_cifar)])
    return {**os.environ, 'PYTHONPATH': path, 'CUDA_VISIBLE_DEVICES': ''}


def go(command: list[str], environment) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


# The list

def test_every_row_of_the_papers_tables_five_times():
    paper = [row.run for row in rows() if not row.start and not row.run.model_kwargs
             and recipe_id(row.run.recipe) in ('paper', 'paper lr=0.01')]
    assert {run.architecture for run in paper if run.dataset == 'cifar10'} == set(timm.list_models('preresnet20*')) - {
        'preresnet20_nl_proposed_k1'}
    assert len([run for run in paper if run.dataset == 'cifar100']) == 9 * 5 and len(paper) == 21 * 5
    assert {run.architecture for run in paper if run.recipe.lr == 0.01} == {
        'preresnet20_nl_original_k4', 'preresnet56_nl_original_k4'}


def test_names_are_folders_and_no_two_are_alike():
    names = [row.name for row in rows()]
    assert len(set(names)) == len(names) and all(set(name) <= set(
        'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-') for name in names)
    assert names[0] == 'preresnet56.cifar100.seed0' and names[2] == 'preresnet20_nl_proposed_k5.cifar10.ft.seed0'


def test_fine_tuning_starts_from_the_plain_backbone_of_its_data_set():
    tuned = [row for row in rows() if row.run.recipe == FINE_TUNING]
    assert {(row.start, row.run.dataset) for row in tuned} == {
        ('preresnet20.cifar10', 'cifar10'), ('preresnet56.cifar100', 'cifar100')}


def test_every_row_can_be_built():
    for row in rows():
        if row.run.seed == 0 and row.run.recipe != PAPER and Campaign.available(row):
            row.run.build()
    depth_29, = (row.run for row in rows() if 'depth=29' in row.run.model_kwargs)
    assert sum(p.numel() for p in depth_29.build().parameters()) == 312_218


# What runs

def test_rows_train_in_processes_of_their_own(small_cifar, tmp_path, environment):
    """Side by side, one waiting for the weights of another; the second time nothing is left to do."""
    only = '--only', 'preresnet56.cifar100.ft.seed0', 'preresnet20.cifar10.short.seed0', 'preresnet20.cifar10.ft.seed0'
    done = go(command(small_cifar, tmp_path / 'c', *only), environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('final error') == 2 and '2 done' in done.stdout and '1 waiting' in done.stdout
    tuned = result(tmp_path / 'c' / 'preresnet20.cifar10.ft.seed0')
    assert tuned['start']['name'] == 'preresnet20.cifar10' and tuned['recipe']['nesterov']
    assert tuned['mixed_precision'] == 'bf16' and tuned['test_every'] == 4
    again = go(command(small_cifar, tmp_path / 'c', *only), environment)
    assert again.returncode == 0 and 'final error' not in again.stdout


def test_a_signal_saves_and_the_next_time_goes_on(small_cifar, tmp_path, environment):
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


def test_one_that_fails_does_not_stop_the_others(small_cifar, tmp_path, environment):
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c' / 'preresnet20_nl_proposed_k5.cifar10.short.seed0').write_text('a file in the way')
    done = go(command(small_cifar, tmp_path / 'c', '--jobs', '1', '--only',
                      'preresnet20_nl_proposed_k5.cifar10.short.seed0', 'preresnet20.cifar10.short.seed0'), environment)
    assert done.returncode == 1 and '1 failed' in done.stdout and '1 done' in done.stdout
    assert 'preresnet20_nl_proposed_k5.cifar10.short.seed0: failed with exit code' in done.stdout


@pytest.mark.slow
def test_a_lost_worker_of_ray_is_replaced(small_cifar, tmp_path, environment):
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
               if 'train_here' in ' '.join(worker.info['cmdline'] or [])]
    assert len(victims) == 2
    victims[0].kill()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    for name in names:
        assert same_course(tmp_path / 'a' / name, tmp_path / 'c' / name)


def test_bad_arguments(tmp_path, capsys):
    def say(*more):
        code = campaign.main(['--output-dir', str(tmp_path / 'x'), '--dry-run', *more])
        assert code == 2
        return capsys.readouterr().err

    assert say('--only', 'nothing*') == (
        'error: --only nothing*: no run has such a name; --dry-run lists them\n')
    (tmp_path / 'x').write_text('')
    assert say() == f'error: --output-dir {tmp_path / "x"} is a file: name a folder\n'


# The parts of it, without processes

@pytest.fixture
def plan(tmp_path, monkeypatch):
    def make(*only: str, gpus: int = 0, results: Path = Path('none')) -> Campaign:
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
        monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {1, 3}, raising=False)
        return Campaign(campaign.parse(
            ['--output-dir', str(tmp_path / 'c'), '--results', str(results), '--only', *only]), Local())
    return make


def finish(folder: Path, row: Row, **more) -> None:
    run_dir.write_lines(folder / row.name / run_dir.RESULTS, [fake(row.run, 8.0, **more)])


def fake(run: Run, error: float, **more) -> dict:
    """A line about a run that nobody made, and after it the sha256 of no weights."""
    history = [{'epoch': 1, 'train_loss': 1.0, 'train_error': 50.0, 'test_error': error,
                'test_wrong': round(100 * error)}]
    return {**describe_result(run, history, [50_000, 10_000]), 'kind': 'own', 'sha256': '0' * 64, **more}


def test_one_slot_a_core_or_a_gpu(plan):
    assert plan('*').engine.slots == [1, 3] and plan('*', gpus=4).engine.slots == [0, 1, 2, 3]


def test_seeds_go_side_by_side_on_a_gpu(plan):
    row = 'preresnet20_nl_proposed_k2.cifar10.seed*'
    assert [len(plan(row, gpus=gpus).next_group()) for gpus in (0, 1)] == [1, 5]
    words = plan(row, gpus=1).words(plan(row, gpus=1).next_group())
    assert words[words.index('--seeds') + 1:] == ['0', '1', '2', '3', '4']
    assert words[words.index('--output-dir') + 1].endswith('preresnet20_nl_proposed_k2.cifar10')


def test_the_command_makes_the_run_that_was_asked_for(plan):
    """Its words, read by the command itself, give the row's recipe, network and data."""
    from train.cifar import parse
    made = plan('*')
    for row in made.rows:
        if row.run.seed == 0 and made.available(row) and made.start(row) is not None:
            args = parse(made.words([row]))
            assert (args.model, args.dataset, args.recipe, tuple(args.model_kwargs), args.seeds, args.test_every) == (
                row.run.architecture, row.run.dataset, row.run.recipe, row.run.model_kwargs, [0], row.run.test_every)
            assert (args.start or '') == row.start


def test_a_row_waits_for_the_weights_that_it_starts_from(plan, tmp_path):
    made = plan('preresnet56*.cifar100.*seed0')
    tuned, = (row for row in made.rows if row.name == 'preresnet56.cifar100.ft.seed0')
    first, = (row for row in made.rows if row.name == 'preresnet56.cifar100.seed0')
    assert made.condition(tuned) == ('missing' if timm.is_model_pretrained('preresnet56.cifar100') else 'waiting')
    finish(tmp_path / 'c', first)
    assert made.condition(tuned) == 'missing' and made.start(tuned) == str(tmp_path / 'c' / first.name)
    assert made.condition(first) == 'done'


def test_what_is_published_is_not_repeated(plan, tmp_path):
    made, results = plan('preresnet20_nl_*.ft.seed0'), tmp_path / 'results.jsonl'
    row = made.rows[0]
    published = replace(row.run, start=Start('preresnet20.cifar10', 'f' * 64))
    run_dir.write_lines(results, [fake(published, 8.0), fake(replace(row.run, seed=1), 8.0)])
    again = plan('preresnet20_nl_*.ft.seed0', results=results)
    assert [again.condition(row) for row in again.rows].count('done') == 1
    assert again.condition(row) == 'done' and made.condition(row) != 'done'


def test_a_short_run_that_diverged_is_followed_by_one_with_a_lower_rate(plan, tmp_path):
    made = plan('preresnet20_nl_original_k3.cifar10.short.seed0')
    row, = made.rows
    finish(tmp_path / 'c', row, diverged_epoch=1, diverged_step=64)
    made.engine.slots = []  # nothing can begin
    made.run(campaign.Stop())
    assert [row.name for row in made.rows] == [row.name, 'preresnet20_nl_original_k3.cifar10.short.lr0.01.seed0']
    assert after_divergence(made.rows[1]) is None and after_divergence(Row(Run('preresnet20'))) is None
    assert made.rows[1].run.recipe == replace(SHORT, lr=SHORT.lr / 10)


def test_options_that_do_not_exist_yet_are_not_begun(plan):
    made = plan('preresnet20_nl_proposed_k5.cifar10.ft.nl-args*')
    known = {row.name: made.available(row) for row in made.rows}
    assert known['preresnet20_nl_proposed_k5.cifar10.ft.nl-args-symmetric-True.seed0']
    assert not made.available(replace(made.rows[0], run=replace(made.rows[0].run, model_kwargs=("nl_args={'x': 1}",))))


# Coming home

@pytest.fixture
def homecoming(tmp_path, monkeypatch):
    """Lands runs that nobody made, whose commit counts as known."""
    monkeypatch.setattr(land, 'in_history', lambda commit: commit == 'known')

    def make(folder: str, run: Run, error: float, **more) -> Path:
        place = tmp_path / folder / run.name
        place.mkdir(parents=True)
        run_dir.save_model(place, run, run.build().state_dict())
        record = fake(run, error, **{'sha256': sha256_of_file(place / run_dir.MODEL), 'commit': 'known', **more})
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
    return {path.stem: seeds[sha256_of_file(path)] for path in sorted((folder / 'weights').glob('*'))}


def test_landing_ships_the_median_of_each_recipe(homecoming, tmp_path, capsys):
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


def test_what_does_not_land_changes_nothing(homecoming, tmp_path, capsys):
    make, go = homecoming
    (tmp_path / 'weights').mkdir()
    make('good', Run('preresnet20'), 8.0)
    make('part', Run('preresnet20', limit=512), 8.0)
    make('unknown', Run('preresnet20', seed=1), 8.0, commit='abc')
    make('dirty', Run('preresnet20', seed=2), 8.0, commit='known-dirty')
    broken = make('broken', Run('preresnet20', seed=3), 8.0)
    (broken / run_dir.MODEL).write_bytes(b'')
    (tmp_path / 'empty').mkdir()
    for folder, message in (('part', 'was trained on the first 512 images only'), ('unknown', 'not in the history'),
                            ('dirty', 'not in the history'), ('broken', 'is missing, or not what'),
                            ('empty', 'holds no finished run')):
        assert go('good', folder) == 2
        line, = capsys.readouterr().err.splitlines()
        assert message in line
        assert not (tmp_path / 'results.jsonl').exists() and not list((tmp_path / 'weights').iterdir())


def test_the_history_is_gits():
    head = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        pytest.skip('this is a copy of the tree without its history')
    assert land.in_history(head.stdout.strip()) and not land.in_history('0' * 40)
