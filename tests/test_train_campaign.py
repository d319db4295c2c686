"""The campaign: what the paper needs, cut and carried on elsewhere, never done twice, and brought home."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from timm_nonlocal.recipes import Recipe, recipe_id
from train import campaign, land, paper
from train.pack import FILE_LIMIT, Pack
from train.run_dir import read_results, sha256
from train.runs import Run, describe_result
from train.schedule import Pace, side_by_side
from training import result, same_tensors, train

pytestmark = pytest.mark.usefixtures('one_thread')
CUT = ('--max-minutes', '1e-9', '--save-seconds', '0')


@pytest.fixture
def go(small_cifar_here, capsys, monkeypatch):
    """Runs the campaign on small data; gives the exit code and what was printed."""
    monkeypatch.setattr(os, 'cpu_count', lambda: 1)

    def call(folder: Path, *more: str, only=('preresnet20.*',), results: Path = Path('none')):
        code = campaign.main([
            '--output-dir', str(folder), '--data-dir', str(small_cifar_here), '--results', str(results), '--epochs',
            '2', '--batch-size', '32', '--limit', '60', '--mixed-precision', 'no', '--only', *only, *more])
        return code, capsys.readouterr()
    return call


def test_every_row_of_the_paper_is_there():
    first, second = ([row for row in paper.rows([number]) if f'table {number}' in row.part_of] for number in (1, 2))
    assert (len(first), len(second)) == (11, 9)
    rows = paper.rows([1, 2])
    assert len(paper.runs(rows, 5)) == 110 and len({run.name for _, run in paper.runs(rows, 5)}) == 110
    registered = {name for name in timm.list_models('preresnet20*')}
    assert {row.run.architecture for row in rows if row.run.dataset == 'cifar10'} == registered
    assert {recipe_id(row.run.recipe) for row in rows} == {'paper', 'paper lr=0.01'}
    assert {row.run.architecture for row in rows if row.run.recipe.lr == 0.01} == {
        'preresnet20_nl_original_k4', 'preresnet56_nl_original_k4'}
    for figure, count in ((1, 3), (2, 1), (3, 4), (4, 1)):
        assert sum(f'figure {figure}' in row.part_of for row in rows) == count


def test_the_order_is_one_seed_of_everything_first():
    names = [(run.dataset, run.seed) for _, run in paper.runs(paper.rows([1, 2]), 5)]
    seeds = [seed for _, seed in names]
    assert seeds[:22] == [0] * 22 and set(seeds[22:66]) == {1, 2} and set(seeds[66:]) == {3, 4}
    assert names[:12] == [('cifar10', 0)] * 12 and names[12] == ('cifar100', 0)
    assert [run.seed for _, run in paper.runs(paper.rows([1]), 3, 'rows')][:4] == [0, 1, 2, 0]


def test_calibration_runs_build_and_have_names_of_their_own():
    rows = paper.rows([1, 2], calibration=True)
    names = {row.run.name for row in rows}
    assert len(names) == len(rows) == 48 and all(row.kind == 'calibration' for row in rows)
    assert not names & {run.name for _, run in paper.runs(paper.rows([1, 2]), 5)}
    assert all(re.fullmatch(r'[A-Za-z0-9._-]+', name) for name in names)
    stage = rows[7].run.build().layer1.nl
    assert rows[7].run.row.endswith('nl-args-init-xavier-normal-scale-1.0.fp32') and stage.affinity.scale == 1.0


def test_cut_anywhere_and_carried_on_elsewhere(go, tmp_path):
    """Two nets side by side are cut; another folder with results and state alone goes on, to the same bits."""
    whole, cut, elsewhere = tmp_path / 'whole', tmp_path / 'cut', tmp_path / 'elsewhere'
    only = ('preresnet20.*', 'preresnet20_nl_original_k1.*')
    code, said = go(whole, '--at-once', '2', '--seeds', '1', only=only)
    assert code == 0 and '2 of 2 runs done, 0 cut, 0 not begun; nothing left' in said.out, said
    assert said.out.count('final error') == 2 and said.err == ''
    records = Pack(whole).results
    assert [(record['kind'], record['part_of']) for record in records] == [
        ('table', ['table 1']), ('figure', ['figure 1', 'figure 2', 'figure 3'])]
    assert records[0]['at_once'] == 2 and records[0]['nonlocal'] is None and records[0]['spectra'] == []
    assert [entry['epoch'] for entry in records[1]['spectra']] == [2]

    code, said = go(cut, '--at-once', '2', '--seeds', '1', *CUT, only=only)
    assert code == 0 and 'training' not in said.out  # the time was over before it began
    assert not cut.exists() and '0 of 2 runs done, 0 cut, 2 not begun' in said.out
    code, said = cut_after_steps(go, cut, 3, only)
    assert code == 130 and '0 of 2 runs done, 2 cut, 0 not begun' in said.out and '0:77' in said.out
    elsewhere.mkdir()
    state, = cut.glob('state-*')
    shutil.copy(state, elsewhere)
    code, said = go(elsewhere, '--seeds', '1', only=only)
    assert code == 0 and 'training from epoch 2: preresnet20.cifar10' in said.out
    assert [line['sha256'] for line in Pack(elsewhere).results] == [line['sha256'] for line in records]
    assert sorted(path.name for path in elsewhere.iterdir()) == ['results.jsonl', 'weights-000.safetensors']


def cut_after_steps(go, folder: Path, steps: int, only):
    """As Ctrl-C does it."""
    import signal

    from train.pool import Pool
    original, seen = Pool.step, []

    def step(pool, size):
        original(pool, size)
        seen.append(size)
        if len(seen) == steps:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, 'step', step)
        return go(folder, '--at-once', '2', '--seeds', '1', only=only)


def test_what_is_done_is_not_repeated(go, tmp_path, small_cifar_here):
    """Neither what the folder has nor what was published, and the same training command gives the same run."""
    assert go(tmp_path / 'a', '--seeds', '2')[0] == 0
    before = (tmp_path / 'a' / 'results.jsonl').read_bytes()
    code, said = go(tmp_path / 'a', '--seeds', '2')
    assert code == 0 and 'training' not in said.out and (tmp_path / 'a' / 'results.jsonl').read_bytes() == before
    code, said = go(tmp_path / 'b', '--seeds', '3', results=tmp_path / 'a' / 'results.jsonl')
    assert code == 0 and said.out.count('training') == 1 and '3 of 3 runs done' in said.out
    assert [line['seed'] for line in Pack(tmp_path / 'b').results] == [2]
    assert train(small_cifar_here, tmp_path / 'c', '--model', 'preresnet20', '--limit', '60', '--milestones', '81',
                 '122', '--seed', '2', '--model-kwargs') == 0
    assert result(tmp_path / 'c')['sha256'] == Pack(tmp_path / 'b').results[0]['sha256']


def test_dry_run_touches_nothing(go, tmp_path):
    code, said = go(tmp_path / 'a', '--dry-run', '--at-once', '2', '--seeds', '3')
    assert code == 0 and not (tmp_path / 'a').exists()
    name = 'preresnet20.cifar10.epochs2.batch-size32.limit60.fp32.seed'
    assert said.out.splitlines()[:2] == [f'side by side: {name}0, {name}1', f'{name}2']
    assert '0 of 3 runs done, 0 cut, 3 not begun' in said.out


def test_less_at_once_where_memory_is_short(go, tmp_path, monkeypatch):
    class Trainer(campaign.Trainer):
        def __init__(self, runs, *args, **options):
            if len(runs) > 1:
                raise torch.OutOfMemoryError('CUDA out of memory')
            super().__init__(runs, *args, **options)

    monkeypatch.setattr(campaign, 'Trainer', Trainer)
    code, said = go(tmp_path / 'a', '--at-once', '3', '--seeds', '3')
    assert code == 0 and '3 of 3 runs done' in said.out
    assert said.out.count('not enough memory for') == 2  # three, then two


def test_one_that_fails_does_not_stop_the_others(go, tmp_path, monkeypatch):
    class Trainer(campaign.Trainer):
        def __init__(self, runs, *args, **options):
            if runs[0].seed == 0:
                raise RuntimeError('misaligned address')
            super().__init__(runs, *args, **options)

    monkeypatch.setattr(campaign, 'Trainer', Trainer)
    code, said = go(tmp_path / 'a', '--seeds', '2')
    assert code == 1 and 'seed0: RuntimeError: misaligned address' in said.out and '1 of 2 runs done' in said.out


def test_unreadable_states_start_again_and_other_options_are_refused(go, tmp_path):
    only = ('preresnet20.*',)
    assert cut_after_steps(go, tmp_path / 'a', 1, only)[0] == 130
    code, said = go(tmp_path / 'a', '--compile', '--seeds', '1')
    assert code == 2 and said.err.count('\n') == 1 and 'holds another run (its compile is False, not True)' in said.err
    state, = (tmp_path / 'a').glob('state-*')
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    code, said = go(tmp_path / 'a', '--seeds', '1')
    assert code == 0 and 'does not match its checksum): its runs start again' in said.out
    assert '1 of 1 runs done' in said.out


@pytest.mark.slow
def test_what_was_compiled_is_kept(go, tmp_path):
    assert go(tmp_path / 'a', '--compile', '--seeds', '1')[0] == 0
    kept = tmp_path / 'a' / campaign.COMPILED
    assert 0 < kept.stat().st_size < 16 * 2 ** 20 and Pack(tmp_path / 'a').results[0]['compile']
    (tmp_path / 'b').mkdir()
    shutil.copy(kept, tmp_path / 'b')
    code, said = go(tmp_path / 'b', '--compile', '--seeds', '1')
    assert code == 0 and '1 of 1 runs done' in said.out


def test_bad_input(go, tmp_path, capsys):
    code, said = go(tmp_path, only=('nonsense*',))
    assert code == 2 and said.err == 'error: --only nonsense*: no run has such a name; --dry-run lists them\n'
    (tmp_path / 'results.jsonl').write_text('{"architecture": "preresnet20"}\n')
    code, said = go(tmp_path)
    assert code == 2 and 'results.jsonl line 1 is not about a run (KeyError' in said.err and said.err.count('\n') == 1
    for arguments in (['--nonsense'], ['--seeds', '0'], []):
        with pytest.raises(SystemExit) as exit:
            campaign.main(arguments and ['--output-dir', str(tmp_path), *arguments])
        assert exit.value.code == 2 and 'error: ' in capsys.readouterr().err.splitlines()[-1]


def test_side_by_side_fits_one_file():
    """PreResNet-56 is large: three at once, whatever was asked for; data sets do not mix."""
    runs = [run for _, run in paper.runs(paper.rows([1, 2]), 1)]
    groups = side_by_side(runs, 5)
    assert [run for group in groups for run in group] == runs
    assert {len(group) for group in groups if group[0].dataset == 'cifar100'} == {3}
    assert max(len(group) for group in groups) == 5
    assert all(len({run.dataset for run in group}) == 1 for group in groups)


def fake(run: Run, error: float, weights=None, **more) -> tuple[dict, dict]:
    """The line of a run that ended with an error, and weights."""
    history = [{'epoch': 1, 'train_loss': 1.0, 'train_error': 50.0, 'test_error': error,
                'test_wrong': round(100 * error)}]
    weights = weights or {name: tensor + run.seed for name, tensor in run.build().state_dict().items()}
    return describe_result(run, history, (50_000, 10_000), seconds=60.0, at_once=1, device='gpu', **more), weights


def test_the_time_that_is_left_comes_from_what_was_measured():
    run = Run('preresnet20')
    record = {**fake(run, 8.0)[0], 'steps': 64_124}
    other = [{**record, 'seconds': 90.0, 'at_once': 3}, {**record, 'device': 'other', 'seconds': 1.0}]
    pace = Pace([record, *other], 'gpu')
    assert pace(replace(run, seed=7)) == 45.0
    deeper = pace(Run('preresnet56', 'cifar100'))
    assert 2 * 45 < deeper < 3.5 * 45  # 84.1 MMAC after 30.6
    assert Pace([], 'gpu')(run) is None


def test_weights_are_packed_into_files_that_travel(tmp_path):
    """A file is filled up to its limit; in a folder without the old files the next number is taken."""
    runs = [Run('preresnet20', seed=seed, mixed_precision='bf16') for seed in range(3)]
    big = {'padding': torch.zeros(FILE_LIMIT // 8)}  # half of a file
    pack = Pack(tmp_path)
    for run in runs:
        pack.add(*([item] for item in fake(run, 8.0, {**big, 'seed': torch.tensor(run.seed)})))
    assert [line['weights'] for line in pack.results] == [f'weights-00{i}.safetensors' for i in (0, 1, 2)]
    for run, line in zip(runs, pack.results, strict=True):
        assert pack.weights(line)['seed'] == run.seed
    assert all(path.stat().st_size <= 16 * 2 ** 20 for path in tmp_path.iterdir())

    elsewhere = Pack(tmp_path / 'elsewhere')
    elsewhere.folder.mkdir()
    shutil.copy(tmp_path / 'results.jsonl', elsewhere.folder)
    small = {'seed': torch.tensor(9)}
    for seed in (3, 4):
        elsewhere.add(*([item] for item in fake(Run('preresnet20', seed=seed), 8.0, small)))
    assert [line['weights'] for line in elsewhere.results[3:]] == ['weights-003.safetensors'] * 2
    assert elsewhere.weights(elsewhere.results[0]) is None
    line = {**elsewhere.results[3], 'sha256': 'other'}
    with pytest.raises(campaign.RunError, match='does not hold the weights of preresnet20'):
        elsewhere.weights(line)


def test_landing_ships_the_median(tmp_path, capsys):
    """Also when later runs move the median, and what diverged or is not the paper's recipe is not shipped."""
    first, second, results, weights = (tmp_path / name for name in ('a', 'b', 'results.jsonl', 'weights'))
    for folder, seed, error in ((first, 0, 8.5), (first, 1, 8.1), (second, 2, 8.3)):
        Pack(folder).add(*([item] for item in fake(Run('preresnet20', seed=seed), error, kind='table')))
    Pack(first).add(*([item] for item in fake(Run('preresnet20', recipe=Recipe(lr=0.2)), 7.0)))
    record, tensors = fake(Run('preresnet20', seed=5), 90.0)
    Pack(second).add([{**record, 'diverged_epoch': 1}], [tensors])

    arguments = ['--results', str(results), '--weights', str(weights)]
    assert land.main([str(first), *arguments]) == 0
    shipped = weights / 'preresnet20.cifar10.safetensors'
    assert json_line(results, shipped)['seed'] == 1  # the lower of two
    assert land.main([str(second), *arguments]) == 0
    assert json_line(results, shipped)['seed'] == 2 and len(read_results(results)) == 5
    assert 'weights' not in read_results(results)[0]
    before = shipped.read_bytes(), results.read_bytes()
    capsys.readouterr()
    assert land.main([str(first), str(second), *arguments]) == 0 and capsys.readouterr().out.strip() == ''
    assert before == (shipped.read_bytes(), results.read_bytes())
    shipped.unlink()
    assert land.main([str(first), *arguments]) == 0
    assert 'preresnet20.cifar10.safetensors: the weights of preresnet20.cifar10.fp32.seed2 are in none of' in (
        capsys.readouterr().out)
    assert land.main([str(tmp_path / 'empty'), *arguments]) == 2
    assert capsys.readouterr().err == f'error: {tmp_path / "empty"} holds no finished runs\n'


def json_line(results: Path, weights: Path) -> dict:
    """The line about a weight file."""
    import hashlib
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return next(line for line in map(json.loads, results.read_text().splitlines()) if line['sha256'] == digest)


def test_packed_weights_are_the_networks(tmp_path):
    run = Run('preresnet20')
    weights = run.build().state_dict()
    Pack(tmp_path).add(*([item] for item in fake(run, 8.0, weights)))
    line, = Pack(tmp_path).results
    assert same_tensors(Pack(tmp_path).weights(line), weights) and line['sha256'] == sha256(weights)
