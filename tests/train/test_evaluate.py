"""The evaluation command: every kind of target, equal to what training recorded, and what it says of bad input."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import _registry
from torchvision.datasets import CIFAR10

from tests.support.process import ROOT
from tests.support.small_data import accepted
from tests.support.training import random_images, result, train
from train.engine.data import load, whole_plan
from train.engine.step import count_wrong, logits_of
from train.evaluate import ROUNDING, evaluate, main, mean_colour, mean_of, open_target, recorded
from train.records.run_dir import read_results, sha256

pytestmark = pytest.mark.usefixtures('one_thread')
MODEL = 'preresnet20'


@pytest.fixture(scope='module')
def once(small_cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A briefly trained network."""
    folder = tmp_path_factory.mktemp('once') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        for name, value in accepted(CIFAR10, small_cifar / 'md5.json').items():
            patch.setattr(CIFAR10, name, value)
        assert train(small_cifar, folder, '--model', MODEL, '--model-kwargs', '--epochs', '3', '--milestones', '2') == 0
    assert 0 < result(folder)['final_wrong'] < 20
    return folder


@pytest.fixture
def trained(once: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(once, tmp_path / 'run')


@pytest.fixture
def call(small_cifar_here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def call(*targets: Path | str, results: Path | str = 'none') -> tuple[int, list[dict[str, Any]], str]:
        capsys.readouterr()
        code = main([*map(str, targets), '--data-dir', str(small_cifar_here), '--results', str(results), '--json'])
        out, err = capsys.readouterr()
        return code, json.loads(out), err
    return call


def test_every_kind_of_target_gives_the_recorded_error(trained: Path, call: Callable[..., Any], tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch, small_cifar_here: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    record = result(trained)
    named = tmp_path / f'{MODEL}.cifar10.safetensors'
    named.write_bytes((trained / 'model.safetensors').read_bytes())
    config = replace(_registry._model_pretrained_cfgs[f'{MODEL}.cifar10'], file=str(named))
    monkeypatch.setitem(_registry._model_pretrained_cfgs, f'{MODEL}.cifar10', config)
    monkeypatch.setattr(_registry, '_model_has_pretrained', {*_registry._model_has_pretrained, f'{MODEL}.cifar10'})
    targets = (trained, trained / 'model.safetensors', named, f'{MODEL}.cifar10')
    code, rows, err = call(*targets, results=trained / 'results.jsonl')
    assert code == 0 and err == '' and [row['target'] for row in rows] == [str(target) for target in targets]
    for row in rows:
        assert row['images'] == 20 and row['wrong'] == record['final_wrong'] and row['equal']
        assert row['error'] == record['final_error'] and 0 <= row['error_timm'] <= 100
    assert main([str(trained), '--data-dir', str(small_cifar_here)]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ['target', 'data'] and line.endswith(f'{record["final_wrong"]} equal')


def test_a_part_of_the_images_is_less_the_mean_of_the_training(trained: Path, small_cifar_here: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """--limit looks at fewer test images. What is subtracted stays, also where the training used a part."""
    line, model, seen = result(trained), open_target(str(trained)), list[torch.Tensor]()

    def noted(*args: Any) -> torch.Tensor:
        seen.append(logits_of(*args))
        return seen[-1]

    monkeypatch.setattr('train.evaluate.logits_of', noted)
    for kept in (0, 40):
        (trained / 'results.jsonl').write_text(json.dumps({**line, 'limit': kept}) + '\n')
        images = load('cifar10', small_cifar_here, limit=kept, test_limit=7)[1]
        pixels = load('cifar10', small_cifar_here)[0].pixels[:kept or None, 4:-4, 4:-4]
        torch.testing.assert_close(images.mean[4:-4, 4:-4], pixels.double().div(255).mean(0).float())
        expected = logits_of(model, images, whole_plan(7))
        seen.clear()
        assert main([str(trained), '--data-dir', str(small_cifar_here), '--limit', '7']) == 0
        assert torch.equal(seen[0], expected) and len(seen[0]) == 7


def test_what_is_subtracted_is_the_runs_or_the_tags(trained: Path) -> None:
    line = result(trained)
    model = open_target(str(trained / 'model.safetensors'))
    assert recorded(str(trained / 'model.safetensors'), model, []) == line, 'the file has its folder beside it'
    assert mean_of('x.ft_cifar10', {'recipe': {**line['recipe'], 'mean': 'image'}}) == 'image'
    assert mean_of('x', {'recipe': {**line['recipe'], 'mean': 'colour'}}) == 'colour'
    for target, mean in (('preresnet20.ft_cifar10', 'colour'), ('a/preresnet20.ft_cifar100.safetensors', 'colour'),
                         ('preresnet20.cifar10', 'image'), ('some/folder', 'image')):
        assert mean_of(target, None) == mean


def test_other_weights_than_recorded_are_noticed(trained: Path, call: Callable[..., Any]) -> None:
    line = result(trained)
    (trained / 'results.jsonl').write_text(json.dumps({**line, 'final_wrong': line['final_wrong'] + 3}) + '\n')
    code, (row,), _ = call(trained)
    assert code == 1 and not row['equal'] and row['recorded_wrong'] == row['wrong'] + 3
    weights = load_file(trained / 'model.safetensors')
    weights['fc.bias'][0] += 1e-3
    save_file(weights, trained / 'model.safetensors')
    code, (row,), _ = call(trained)
    assert code == 0 and 'equal' not in row, 'no line is about these weights'


def test_timms_preprocessing_is_what_timm_does(trained: Path, small_cifar_here: Path) -> None:
    """The second error is that of timm's own transform, image by image."""
    model: Any = timm.create_model(f'local-dir:{trained}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    images = load('cifar10', small_cifar_here)[1]
    x = torch.stack([transform(image) for image, _ in CIFAR10(small_cifar_here, train=False)])
    ours = logits_of(model, mean_colour(images, model.pretrained_cfg['mean']), whole_plan(len(images)))
    with torch.no_grad():
        torch.testing.assert_close(ours, model(x), rtol=1e-4, atol=1e-4)
    wrong = (model(x).argmax(1) != images.labels).sum().item()
    assert evaluate(model, images)['error_timm'] == 100 * wrong / 20


def test_the_count_does_not_depend_on_parts_or_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of one image at a time, of all at once and in another memory layout agree to less than a tie's width."""
    model, images = timm.create_model('preresnet56_nl_proposed_k5', num_classes=10).eval(), random_images(130, 16)
    columns = whole_plan(130)
    parts = logits_of(model, images, columns)
    alone = torch.cat([logits_of(model, images, columns[:, i:i + 1]) for i in range(0, 130, 10)])
    exact = logits_of(model.double(), replace(images, mean=images.mean.double()), columns[:, ::10])
    size = exact.abs().amax(dim=1, keepdim=True)
    assert ((alone - parts[::10]).abs() / size).max() < ROUNDING / 10
    assert ((parts[::10] - exact).abs() / size).max() < ROUNDING / 10
    assert count_wrong(model, replace(images, mean=images.mean.double()), columns) == (
        parts.argmax(1) != images.labels).sum()


def test_ties_are_counted() -> None:
    model: Any = timm.create_model('preresnet20').eval()
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.tensor([1.0, 1.0 + 1e-6, *[0.0] * 8]))
    assert evaluate(model, random_images(30, 32))['ties'] == 30
    with torch.no_grad():
        model.fc.bias[1] += 1e-3
    assert evaluate(model, random_images(30, 32))['ties'] == 0


def test_bad_targets(call: Callable[..., Any], tmp_path: Path, trained: Path) -> None:
    (tmp_path / 'preresnet20.cifar10.safetensors').write_bytes((trained / 'model.safetensors').read_bytes()[:-1])
    (tmp_path / 'nonsense.safetensors').write_bytes((trained / 'model.safetensors').read_bytes())
    (tmp_path / 'preresnet56.safetensors').write_bytes((trained / 'model.safetensors').read_bytes())
    for target, message in (
            ('preresnet20_nl_proposd_k1', 'no such file, folder or registered name. Did you mean preresnet20_nl_'),
            ('preresnet20_nl_original_k4.cifar100', 'is registered, but has no weights here'),
            (tmp_path / 'preresnet20.cifar10.safetensors', 'cannot be read'),
            (tmp_path / 'preresnet56.safetensors', 'cannot be read'),
            (tmp_path / 'nonsense.safetensors', 'name it ARCHITECTURE.DATASET.safetensors, or put it into a folder'),
            (tmp_path, 'cannot be read'),
    ):
        code, rows, err = call(target)
        assert code == 3 and rows == [] and err.count('\n') == 1 and f'error: {target}' in err and message in err, err
    code, rows, err = call('nonsense', trained)
    assert code == 3 and len(rows) == 1, 'the others are evaluated'


def test_bad_data_and_results(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trained), '--data-dir', str(tmp_path)]) == 2
    assert 'is missing: add --download' in capsys.readouterr().err
    (tmp_path / 'results.jsonl').write_text('nonsense\n')
    assert main([str(trained), '--data-dir', str(tmp_path), '--results', str(tmp_path / 'results.jsonl')]) == 2
    assert 'results.jsonl, line 1 is not a JSON object' in capsys.readouterr().err


@pytest.mark.cifar
def test_timms_own_pipeline_finds_the_recorded_error_of_fine_tuned_weights(cifar_dir: str) -> None:
    """To the last picture, by timm's data set, loader and default config."""
    from timm.data import create_dataset, create_loader, resolve_data_config
    records = read_results(ROOT / 'hub' / 'results.jsonl')
    names = [name for name in timm.list_pretrained('preresnet*') if '.ft_' in name]
    assert names
    for name in names:
        model = timm.create_model(name, pretrained=True).eval()
        config = resolve_data_config(model=model)
        data = create_dataset(f'torch/{name.rpartition("_")[2]}', root=cifar_dir, split='validation')
        loader = create_loader(data, batch_size=250, is_training=False, use_prefetcher=False, num_workers=0, **{
            key: config[key] for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')})
        with torch.no_grad():
            wrong = sum((model(x).argmax(dim=1) != y).sum().item() for x, y in loader)
        digest = sha256({key: value.contiguous() for key, value in model.state_dict().items()})
        line, = (line for line in records if line['sha256'] == digest)
        assert wrong == line['final_wrong'], name


def test_a_network_of_others_is_less_the_mean_that_it_was_trained_without(
        small_cifar_here: Path, call: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own config has another mean, and a deviation by which timm divides: no error is said to be timm's."""
    assert train(small_cifar_here, tmp_path / 'run', '--model', 'test_resnet', '--model-kwargs', '--mean', 'colour',
                 '--lr', '0.01') == 0
    seen = []

    def noted(model: Any, images: Any, columns: Any) -> Any:
        seen.append(images.mean)
        return logits_of(model, images, columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('train.evaluate.logits_of', noted)
        code, (row,), _ = call(tmp_path / 'run')
    assert (code, row['equal'], row['error_timm']) == (0, True, None)
    assert torch.equal(seen[0], load('cifar10', small_cifar_here, mean='colour')[1].mean) and len(seen) == 1
    assert main([str(tmp_path / 'run'), '--data-dir', str(small_cifar_here)]) == 0
    assert capsys.readouterr().out.split()[-3:] == ['-', str(row['wrong']), 'equal']


def test_what_is_off_with_one_target_costs_no_other(trained: Path, call: Callable[..., Any], tmp_path: Path) -> None:
    other = tmp_path / 'preresnet20.cifar100.safetensors'
    save_file(timm.create_model('preresnet20', num_classes=100).state_dict(), other)
    code, rows, err = call(trained, other)
    assert (code, len(rows)) == (2, 1) and 'cifar-100-python is missing' in err and err.count('\n') == 1
    damaged = shutil.copytree(trained, tmp_path / 'damaged')
    (damaged / 'results.jsonl').write_text('nonsense')
    code, rows, err = call(damaged, trained)
    assert (code, len(rows)) == (3, 1) and 'results.jsonl, line 1 is not a JSON object' in err
