"""Figures 1 to 4 from made-up runs: what is drawn, what is said of it, and what is named as missing."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hub import drawing, figures, overview, spectra
from hub.results import PublishError, Record, recipe_for
from tests.support.weight_files import Project, made_up
from timm_nonlocal import paper
from timm_nonlocal.recipes import SHORT

EPOCHS = (36, 82, 125, 164)


def top(negative: int, largest_positive: float = 0.3) -> list[float]:
    """32 eigenvalues by magnitude, so many of them negative, the positive ones smaller than `largest_positive`."""
    values = [-1.0 / (index + 1) for index in range(negative)]
    values += [largest_positive / (index + 1) for index in range(32 - negative)]
    return sorted(values, key=abs, reverse=True)


def made_run(architecture: str, *blocks: list[float], loss: float = 0.1, epochs: Sequence[int] = EPOCHS,
             **more: Any) -> dict:
    kept = [{'epoch': epoch, 'blocks': [{'eigenvalues': block} for block in blocks]} for epoch in epochs]
    return made_up(architecture, spectra=kept, train_loss=[2.0, 1.0, loss], **more)


@pytest.fixture
def everything() -> list[dict]:
    """Runs in which all that the paper says holds."""
    return [made_run(f'preresnet20_nl_original_k{k}', *([top(28)] * k)) for k in (1, 2, 3)] + [
        made_run('preresnet20_nl_original_k4', *([top(20)] * 3), top(16, 0.9), loss=1.1),
        made_run('preresnet20_nl_proposed_k4', *([top(9)] * 4))]


def panels(drawn: Any) -> list:
    return [panel for found in drawn.values() for panel in found]


def test_all_panels_and_their_captions(everything: list[Record]) -> None:
    drawn = figures.collect(everything, [])
    assert [len(found) for found in drawn.values()] == [3, 3, 2, 1] and not any(p.missing for p in panels(drawn))
    assert all('. Agrees' in panel.verdict for panel in panels(drawn)), [p.verdict for p in panels(drawn)]
    captions = figures.captions(drawn)
    assert '- (b) 2 blocks: 28 and 28 of the top 32 are negative (16.0 ± 0.' in captions[1]
    assert '- (c) epoch 125: 28 of the top 32 are negative' in captions[2]
    assert 'final training loss 0.100, 0.100, 0.100 and 1.100 for 1 to 4 blocks, with 4 blocks 11.0 ' in captions[3]
    assert '- 4 sub-blocks: 23, 23, 23 and 23 of the top 32 are positive' in captions[4]


def test_captions_say_what_does_not_agree() -> None:
    runs = [made_run(f'preresnet20_nl_original_k{k}', *([top(16)] * k)) for k in (1, 2, 3, 4)] + [
        made_run('preresnet20_nl_proposed_k4', top(9), top(9), top(9), top(20))]
    verdicts = [panel.verdict for panel in panels(figures.collect(runs, []))]
    assert len(verdicts) == 9 and all('. Does not agree' in verdict for verdict in verdicts), verdicts


def test_a_run_that_diverged_is_said_to_have(everything: list[Record]) -> None:
    everything[3] |= {'train_loss': [2.0, None], 'diverged_epoch': 2}
    drawn = figures.collect(everything, [])
    curve, spectrum = drawn[3]
    assert math.isnan(curve.series['preresnet20_nl_original_k4'][-1]), 'its curve is there to see'
    assert curve.verdict.startswith('not judged: with 4 it diverged') and 'gree' not in curve.verdict
    assert spectrum.missing == ['weights of preresnet20_nl_original_k4.cifar10'], 'but it stands for nothing'
    everything.append({**made_run('preresnet20_nl_original_k4', *([top(20)] * 3), top(16, 0.9), loss=1.1), 'seed': 1})
    drawn = figures.collect(everything, [])
    assert '. Agrees' in drawn[3][0].verdict and not drawn[3][1].missing, 'a run that did not stands for the network'


@pytest.mark.parametrize(('loss', 'verdict'), [(0.3, 'Agrees'), (0.9, 'Does not agree')])
def test_the_learning_rate_of_four_blocks_has_a_control(everything: list[Record], loss: float, verdict: str) -> None:
    tenth = recipe_for('preresnet20_nl_original_k4', 'paper').to_dict()
    curve = figures.collect([*everything, made_run('preresnet20', loss=loss, recipe=tenth)], [])[3][0]
    assert (f'11.0 times the largest of the others, but no block at all, with the learning rate 0.01 of 4, gives '
            f'{loss:.3f}, so that 4 give {1.1 / loss:.1f} times that;') in curve.verdict
    assert f'. {verdict} (at least twice)' in curve.verdict and 'preresnet20' not in curve.series
    usual = figures.collect([*everything, made_run('preresnet20', loss=loss)], [])[3][0]
    assert 'no block at all' not in usual.verdict, 'with its own learning rate it is no control'


def test_signs_that_random_weights_have_too(everything: list[Record]) -> None:
    name = 'preresnet20_nl_original_k4'
    assert 'random' not in figures.collect(everything, [])[3][1].verdict
    everything[3] = made_run(name, *([top(16, 0.9)] * 4))
    assert ('16, 16, 16 and 16 of the top 32 are positive (16.0 ± 0.6 by chance), the largest of them 0.90 of the '
            'greatest magnitude in its block; the paper: many, some of large magnitude. Agrees (at least half), as '
            'random weights would') in figures.collect(everything, [])[3][1].verdict


def test_a_panel_shows_one_recipe(everything: list[Record]) -> None:
    for run in everything[:4]:
        run['train_loss'] = [3.0, 2.0, 0.4]
    short = [made_run(run['architecture'], loss=0.2, recipe=recipe_for(run['architecture'], 'short').to_dict())
             for run in everything[:4]]
    caption = figures.captions(figures.collect(everything + short, []))[3]
    assert 'final training loss 0.400, 0.400, 0.400 and 0.400 ' in caption and '(recipe paper)' in caption
    drawn = figures.collect(everything[:2] + everything[3:] + short, [])[3][0]
    assert not drawn.missing and 'final training loss 0.200, 0.200, 0.200 and 0.200 ' in drawn.verdict
    assert drawn.verdict.endswith('(recipe short)')


def test_the_nearest_kept_epoch_is_taken_and_named(everything: list[Record]) -> None:
    everything[0]['spectra'][1] = {**everything[0]['spectra'][1], 'epoch': 84}
    assert '- (b) epoch 82: after epoch 84 of 164: 28 of the top 32' in figures.captions(
        figures.collect(everything, []))[2]
    everything[0]['spectra'][1]['epoch'] = 86  # more than 2 % of the run away
    assert figures.collect(everything, [])[2][1].missing == [
        'the spectrum after epoch 82 of preresnet20_nl_original_k1.cifar10']
    everything[0]['spectra'] += [{**everything[0]['spectra'][1], 'epoch': epoch} for epoch in (83, 81)]
    kept = spectra.kept(everything[0], 82), spectra.kept(everything[0])
    assert [found and found.epoch for found in kept] == [81, 164]


def test_another_recipe_is_said_to_be_one(everything: list[Record]) -> None:
    everything[0]['recipe'] = {**everything[0]['recipe'], 'epochs': 10}
    drawn = figures.collect(everything, [])
    assert drawn[1][0].missing == ['weights of preresnet20_nl_original_k1.cifar10'], 'it does not count'


def test_the_run_with_the_median_error_stands_for_a_network() -> None:
    runs = [made_run('preresnet20_nl_original_k1', top(negative), seed=seed, error=error)
            for seed, (negative, error) in enumerate(((20, 8.0), (25, 7.0), (30, 7.5)))]
    (panel, *_) = figures.collect(runs, [])[1]
    assert sum(value < 0 for value in panel.series['block 1']) == 30


def test_missing_panels_are_named_and_the_others_drawn(
        everything: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys:
        pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(figures, 'FOLDER', tmp_path)
    monkeypatch.setattr(figures, 'HUB', tmp_path)
    monkeypatch.setattr(figures, 'load', lambda: everything[:1])
    monkeypatch.setattr(figures, 'shipped', lambda runs: [])
    (tmp_path / 'figure4.png').write_bytes(b'of long ago')
    del everything[0]['spectra'][1]
    assert figures.main([]) == 1
    said = capsys.readouterr().err.splitlines()
    name = 'preresnet20_nl_original_k{}.cifar10'
    assert said == [
        f'missing: Figure 1 (b): weights of {name.format(2)}', f'missing: Figure 1 (c): weights of {name.format(3)}',
        f'missing: Figure 2 (b): the spectrum after epoch 82 of {name.format(1)}',
        *(f'missing: Figure 3 (a): the training curve of {name.format(k)}' for k in (2, 3, 4)),
        f'missing: Figure 3 (b): weights of {name.format(4)}',
        'missing: Figure 4: weights of preresnet20_nl_proposed_k4.cifar10']
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'figure1.png', 'figure2.png', 'figure3.png', 'overview.png']


def test_pictures_know_their_data(everything: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, 'FOLDER', tmp_path)
    monkeypatch.setattr(figures, 'HUB', tmp_path / 'hub')
    drawn = figures.collect(everything, [])
    for number, found in drawn.items():
        drawing.figure(figures.picture(number), found, figures.digest(found))
        first = figures.picture(number).read_bytes()
        drawing.figure(figures.picture(number), found, figures.digest(found))
        assert first.startswith(b'\x89PNG') and len(first) > 5000 and figures.picture(number).read_bytes() == first
    shown = overview.collect(everything)
    drawing.overview(tmp_path / 'overview.png', shown, overview.chance(), overview.digest(shown))
    assert figures.stale(drawn, everything) == []
    everything[4]['spectra'][-1]['blocks'][0]['eigenvalues'] = top(10)
    assert figures.stale(figures.collect(everything, []), everything) == [
        f'{name}.png does not show the present data: run python -m hub.figures' for name in ('figure4', 'overview')]
    assert len(figures.stale(figures.collect([], []), [])) == 5, 'pictures of nothing'


def test_the_overview_prefers_one_recipe_for_both_kinds(everything: list[Record]) -> None:
    assert [each.record['architecture'] for each in overview.collect(everything)] == [
        'preresnet20_nl_original_k3', 'preresnet20_nl_proposed_k4']
    short = [made_run('preresnet20_nl_original_k1', top(28), recipe=SHORT.to_dict(), epochs=(4, 16))]
    found = overview.collect(everything[4:] + short)
    assert [each.recipe for each in found] == ['short', 'paper'], 'no recipe has both'
    short += [made_run('preresnet20_nl_proposed_k5', *[top(9)] * 5, recipe=SHORT.to_dict(), epochs=(4, 16))]
    found = overview.collect(everything[4:] + short)
    assert [each.recipe for each in found] == ['short', 'short'] and len(found[1].blocks) == 5
    assert overview.collect([]) == []
    assert all(len(block) == 64 and block == sorted(block, reverse=True) for each in found for block in each.blocks)


def test_chance_is_symmetric_and_in_units_of_the_root_mean_square() -> None:
    mean, low, high = map(torch.tensor, overview.chance())
    torch.testing.assert_close(mean, -mean.flip(0), atol=0.02, rtol=0)
    assert 0.97 < mean.square().mean() < 1 and bool((low < mean).all() and (mean < high).all())


def test_results_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def load() -> None:
        raise PublishError('line 3 is not a JSON object')
    monkeypatch.setattr(figures, 'load', load)
    assert figures.main([]) == 2 and capsys.readouterr().err == 'error: line 3 is not a JSON object\n'


def test_the_command_draws_shipped_weights(project: Project, tmp_path: Path) -> None:
    """Figure 4 of the project's own weights; all else is missing."""
    picture, other = project.root / 'hub/figures/figure4.png', Project(tmp_path / 'copy')
    shutil.copytree(project.root, other.root)
    done = other.run('-c', 'import sys; from hub import cards, figures\n'
                           'print(cards.main(["--check"]), figures.main([]))\n'
                           'figures.picture(4).unlink(); print(cards.main(["--check"]))')
    assert done.stdout == 'hub/figures/figure4.png\n0 1\n1\n', done.stderr
    *missing, drift = done.stderr.splitlines()
    assert len(missing) == 11 and not any('Figure 4' in line for line in missing)
    assert drift == 'hub/figures/figure4.png does not show the present data: run python -m hub.figures'
    assert [path.name for path in picture.parent.iterdir()] == [picture.name]
    card = (project.root / 'MODEL_CARD.md').read_text()
    assert 'preresnet20_nl_proposed_k4: epochs 2 in place of 164' in card and '![Figure 4](hub/figures/fig' in card


def test_every_panel_names_a_registered_network() -> None:
    names = {name for figure in paper.FIGURES for panel in figure.panels for name in panel.architectures}
    assert names == {*(f'preresnet20_nl_original_k{k}' for k in (1, 2, 3, 4)), 'preresnet20_nl_proposed_k4'}
