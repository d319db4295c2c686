"""Fine-tuning: trained weights to start from, the recipe `ft`, and the test set every few epochs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import timm_nonlocal  # noqa: F401
from tests.support.training import random_images, result, same_course, same_tensors
from timm_nonlocal.recipes import FINE_TUNING, Recipe
from train.cifar import main, parse, spectrum_epochs, usable_cores
from train.engine.data import batch, load, whole_plan
from train.engine.loop import Trainer
from train.engine.stop import Stop, StopReason
from train.records.runs import Run, Start

pytestmark = pytest.mark.usefixtures('one_thread')
MODEL = 'preresnet20_nl_proposed_k2'


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """A file with the weights of a plain preresnet20, its running statistics not those of a new one."""
    torch.manual_seed(5)
    model = timm.create_model('preresnet20')
    model(torch.randn(8, 3, 32, 32))
    save_file(model.state_dict(), tmp_path / 'backbone.safetensors')
    return tmp_path / 'backbone.safetensors'


def tune(data: Path, folder: Path, start: Path | str, *more: str, model: str = MODEL) -> int:
    return main(['--model', model, '--recipe', 'ft', '--start', str(start), '--batch-size', '32', '--epochs', '2',
                 '--threads', '1', '--data-dir', str(data), '--output-dir', str(folder), *more])


@pytest.mark.parametrize('architecture', [MODEL, 'preresnet20_nl_original_k2', 'preresnet20_nl_proposed_k1x3'])
def test_it_starts_as_the_backbone(backbone: Path, architecture: str) -> None:
    run = Run(architecture, recipe=FINE_TUNING, start=Start('backbone', '0'))
    trainer, x = Trainer([run], random_images(128), random_images(4)), torch.randn(2, 3, 32, 32)
    trainer.start_from(load_file(backbone))
    plain = timm.create_model('preresnet20', checkpoint_path=str(backbone)).eval()
    network = trainer.learners[0].bare.eval()
    torch.testing.assert_close(network(x), plain(x))
    drawn = run.build().state_dict()
    for name, value in network.state_dict().items():
        if '.nl.' in name:
            assert torch.equal(value, drawn[name] * (0 if name.endswith('.z.weight') else 1)), name


@pytest.mark.parametrize('stable', [False, True])
def test_cut_and_continued_to_the_same_bits(small_cifar_here: Path, backbone: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch, stable: bool) -> None:
    more = ['--model-kwargs', "nl_args={'symmetric': True, 'stable': True}"] if stable else []
    assert tune(small_cifar_here, tmp_path / 'whole', backbone, *more) == 0
    record = result(tmp_path / 'whole')
    assert record['start']['name'] == 'backbone.safetensors' and record['recipe_name'] == 'ft'
    assert record['recipe_id'] == 'ft epochs=2 batch_size=32'
    assert record['nonlocal']['stable'] == stable and record['nonlocal']['inner_dim'] == 32
    network: Any = timm.create_model(f'local-dir:{tmp_path / "whole"}', pretrained=True)
    made = network.state_dict()
    assert network.pretrained_cfg['tag'] == 'ft_cifar10'
    assert same_tensors(made, load_file(tmp_path / 'whole' / 'model.safetensors'))
    step, steps = Trainer._look_up, []

    def cut(self: Trainer, stop: Stop, *args: Any) -> StopReason:
        steps.append(1)
        stop.signalled = len(steps) == 6  # in the second epoch
        return step(self, stop, *args)

    monkeypatch.setattr(Trainer, '_look_up', cut)
    assert tune(small_cifar_here, tmp_path / 'cut', backbone, *more) == 130
    assert tune(small_cifar_here, tmp_path / 'cut', backbone, *more, '--resume', 'auto') == 0
    assert same_course(tmp_path / 'whole', tmp_path / 'cut')


def test_other_weights_are_another_run(small_cifar_here: Path, backbone: Path, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(small_cifar_here, tmp_path / 'run', backbone) == 0
    other = {name: value + 1 if value.is_floating_point() else value for name, value in load_file(backbone).items()}
    save_file(other, backbone)
    assert tune(small_cifar_here, tmp_path / 'run', backbone, '--resume', 'auto') == 2
    assert 'holds another run (its start is' in capsys.readouterr().err


def test_the_same_weights_under_another_name_are_the_same_run(small_cifar_here: Path, backbone: Path,
                                                              tmp_path: Path) -> None:
    assert tune(small_cifar_here, tmp_path / 'run', backbone) == 0
    shutil.copy(backbone, tmp_path / 'copy.safetensors')
    assert tune(small_cifar_here, tmp_path / 'run', tmp_path / 'copy.safetensors', '--resume', 'auto') == 0
    assert Start('a', '1') == Start('b', '1') != Start('a', '2')


def test_a_run_is_a_start(small_cifar_here: Path, backbone: Path, tmp_path: Path) -> None:
    assert tune(small_cifar_here, tmp_path / 'plain', backbone, model='preresnet20') == 0
    assert tune(small_cifar_here, tmp_path / 'nonlocal', tmp_path / 'plain') == 0
    assert result(tmp_path / 'nonlocal')['start'] == {'name': 'plain', 'sha256': result(tmp_path / 'plain')['sha256']}


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    line, = capsys.readouterr().err.splitlines()
    return line


def test_what_is_no_start(small_cifar_here: Path, backbone: Path, tmp_path: Path,
                          capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / 'run'
    assert 'preresnet20_nl_proposed_k6' in refused(
        capsys, tune(small_cifar_here, folder, 'preresnet20_nl_proposed_k6.cifar100'))
    line = refused(capsys, tune(small_cifar_here, folder, 'no-such-file'))
    assert 'no-such-file' in line and 'Name a safetensors file, a folder with model.safetensors, or a name with' in line
    (tmp_path / 'empty').mkdir()
    assert 'empty' in refused(capsys, tune(small_cifar_here, folder, tmp_path / 'empty'))
    weights = load_file(backbone)
    save_file({**weights, 'fc.bias': torch.zeros(7), 'fc.weight': torch.zeros(7, 256)}, backbone)
    assert 'does not fit preresnet20_nl_proposed_k2: size mismatch for fc.bias' in refused(
        capsys, tune(small_cifar_here, folder, backbone))
    save_file({**weights, 'layer9.weight': torch.zeros(1)}, backbone)
    assert 'is not the backbone of preresnet20_nl_proposed_k2: layer9.weight' in refused(
        capsys, tune(small_cifar_here, folder, backbone))
    assert not folder.exists()


def test_every_field_of_a_recipe_is_an_option() -> None:
    given = ['--epochs', '3', '--batch-size', '7', '--lr', '0.2', '--milestones', '1', '2', '--gamma', '0.5',
             '--momentum', '0.8', '--weight-decay', '0.1', '--no-nesterov', '--warmup', '0.25', '--anneal', 'steps',
             '--mean', 'image']
    recipe = parse(['--recipe', 'ft', *given]).recipe
    assert recipe.changes(FINE_TUNING).keys() == FINE_TUNING.to_dict().keys()
    assert parse(['--recipe', 'ft', '--lr', '0.1']).recipe.changes(FINE_TUNING) == {'lr': 0.1}
    assert parse(['--recipe', 'ft']).recipe == FINE_TUNING


@pytest.mark.parametrize(('options', 'epochs'), [
    ([], [36, 82, 125, 164]), (['--recipe', 'short'], [4, 8, 12, 16]), (['--epochs', '1'], [1]),
    (['--spectrum-epochs'], []), (['--spectrum-epochs', '5'], [5])])
def test_spectra_are_kept_at_the_fractions_of_figure_2(options: list[str], epochs: list[int]) -> None:
    assert spectrum_epochs(parse(options)) == epochs


def test_the_test_set_every_few_epochs(small_cifar_here: Path, tmp_path: Path) -> None:
    more = ['--model', MODEL, '--epochs', '5', '--batch-size', '60', '--threads', '1', '--data-dir',
            str(small_cifar_here), '--output-dir', str(tmp_path / 'run'), '--test-every', '2']
    assert main(more) == 0
    record = result(tmp_path / 'run')
    assert [error is None for error in record['test_error']] == [True, False, True, False, False]
    assert record['final_error'] == record['test_error'][-1] and record['best_epoch'] in (2, 4, 5)
    assert all(loss is not None for loss in record['train_loss'])


def test_the_mean_colour_is_timms_preprocessing(small_cifar_here: Path) -> None:
    from timm.data import create_transform, resolve_data_config
    from torchvision.datasets import CIFAR10
    images = load('cifar10', small_cifar_here, mean='colour')[1]
    model = timm.create_model('preresnet20')
    data = CIFAR10(small_cifar_here, train=False,
                   transform=create_transform(**resolve_data_config(model=model), is_training=False))
    ours = batch(images, whole_plan(len(images)))[0]
    assert torch.equal(ours, torch.stack([x for x, _ in data]))


def test_a_run_that_diverges_ends_within_some_steps(small_cifar_here: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'run'
    assert main(['--model', 'preresnet20', '--lr', '1e30', '--epochs', '3', '--batch-size', '2', '--threads', '1',
                 '--data-dir', str(small_cifar_here), '--output-dir', str(folder)]) == 0
    record = result(folder)
    assert (record['diverged_epoch'], record['diverged_step']) == (1, 32) and record['steps'] == 32
    assert record['train_loss'] == [None] and record['final_error'] is not None


def test_a_state_of_before_is_continued(small_cifar_here: Path, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lacks the newer fields of a run and a recipe."""
    options = ['--model', 'preresnet20', '--epochs', '2', '--batch-size', '60', '--threads', '1', '--data-dir',
               str(small_cifar_here), '--resume', 'auto', '--output-dir']
    assert main([*options, str(tmp_path / 'whole')]) == 0
    from train.records import state
    saved = state.save

    def older(path: Path, tensors: dict[str, torch.Tensor], progress: Any) -> None:
        progress = json.loads(json.dumps(progress))
        del progress['commits']
        for kept in progress['runs']:
            del kept['run']['start'], kept['run']['test_every'], kept['diverged_step']
            for key in ('nesterov', 'warmup', 'anneal', 'mean'):
                del kept['run']['recipe'][key]
            for row in kept['history']:
                del row['step']
        saved(path, tensors, progress)

    monkeypatch.setattr(state, 'save', older)
    step, steps = Trainer._look_up, []

    def cut(self: Trainer, stop: Stop, *args: Any) -> StopReason:
        steps.append(1)
        stop.signalled = len(steps) == 3
        return step(self, stop, *args)

    monkeypatch.setattr(Trainer, '_look_up', cut)
    assert main([*options, str(tmp_path / 'cut')]) == 130
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        from torchvision.datasets import CIFAR10

        from tests.support.small_data import accepted
        for name, value in accepted(CIFAR10, small_cifar_here / 'md5.json').items():
            patch.setattr(CIFAR10, name, value)
        assert main([*options, str(tmp_path / 'cut')]) == 0
    assert same_course(tmp_path / 'whole', tmp_path / 'cut')


def test_threads_follow_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """OMP_NUM_THREADS and the affinity mask, not the machine."""
    monkeypatch.setattr('os.sched_getaffinity', lambda pid: {0, 3, 5}, raising=False)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    assert usable_cores() == 3
    monkeypatch.setenv('OMP_NUM_THREADS', '1')  # the fixture has set torch to one
    assert usable_cores() == 1


def test_a_seed_that_diverges_beside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its step and its error, in an epoch that is not tested; the other reaches what it does alone."""
    from train.engine import loop
    from train.engine.step import Learner
    step = Learner.step

    def spoiled(learner: Learner, size: int) -> None:
        step(learner, size)
        if learner.seed == 1:
            learner.parameters['fc.bias'].data.fill_(float('nan'))

    def results(*seeds: int) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
        runs = [Run('preresnet20', seed=seed, recipe=Recipe(epochs=3, batch_size=4), test_every=3) for seed in seeds]
        trainer = Trainer(runs, random_images(16), random_images(8))
        assert not trainer.run(Stop(), save=lambda *_: None)
        return trainer.results()

    monkeypatch.setattr(loop, 'ASK', 2)
    monkeypatch.setattr(Learner, 'step', spoiled)
    (other, weights), (lost, _) = results(0, 1)
    (alone, same), = results(0)
    assert same_tensors(weights, same)
    assert all(other[key] == alone[key] for key in ('train_loss', 'train_error', 'test_error', 'diverged_step'))
    assert (lost['diverged_epoch'], lost['diverged_step'], lost['train_loss']) == (1, 2, [None])
    assert lost['final_error'] == lost['test_error'][0] is not None


def test_commits_and_devices_are_those_of_every_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree may change while a run goes on, for which it has long read its code, and between its parts."""
    from train.engine import loop

    def part(commit: str, device: str) -> Trainer:
        monkeypatch.setattr(loop, 'surroundings', lambda _: {'commit': commit, 'device': device})
        return Trainer([Run('preresnet20', recipe=Recipe(epochs=1, batch_size=8))], random_images(16), random_images(2))

    cut, stop = part('first', 'GPU X'), Stop()
    stop.signalled = True
    assert cut.run(stop, save=lambda *_: None)
    whole = part('second', 'CPU Y')
    whole.restore(*cut.state(), source='cut')
    monkeypatch.setattr(loop, 'surroundings', lambda _: {'commit': 'later', 'device': 'GPU Z'})
    assert not whole.run(Stop(), save=lambda *_: None)
    (record, _), = whole.results()
    assert record['commit'] == 'second' and record['commits'] == ['first', 'second']
    assert record['device'] == 'GPU X, CPU Y'
