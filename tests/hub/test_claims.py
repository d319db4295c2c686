"""The conclusions: intervals whose coverage is counted over all orders, and verdicts."""

from itertools import combinations, product
from math import comb
from typing import Any

import pytest

from hub import claims
from hub.results import Record
from tests.support.weight_files import made_up
from timm_nonlocal import paper
from timm_nonlocal.recipes import FINE_TUNING

EPOCHS = 164


@pytest.mark.parametrize('n, m', [(1, 1), (2, 3), (3, 3), (4, 2), (5, 5), (5, 3)])
def test_coverage_is_the_share_of_orders_whose_interval_holds_the_truth(n: int, m: int) -> None:
    covered = 0
    for first in combinations(range(n + m), n):  # every order of two samples from one distribution: no shift
        second = [number for number in range(n + m) if number not in first]
        found = claims.shift(first, second)
        covered += found.lowest < 0 < found.highest
        assert found.lowest <= found.estimate <= found.highest
    assert covered / comb(n + m, n) == pytest.approx(found.coverage)


@pytest.mark.parametrize('n, m, outside, coverage', [
    (5, 5, 2, 1 - 2 * 4 / 252), (3, 3, 0, 0.9), (3, 5, 0, 1 - 2 / 56), (1, 1, 0, 0.0), (1, 9, 0, 0.8)])
def test_intervals_are_as_short_as_the_level_allows(n: int, m: int, outside: int, coverage: float) -> None:
    first, second = [10 * i for i in range(n)], [3.3 + i for i in range(m)]
    differences = sorted(b - a for a in first for b in second)
    found = claims.shift(first, second)
    assert (found.lowest, found.highest) == (differences[outside], differences[-1 - outside])
    assert found.coverage == pytest.approx(coverage)


def some(architecture: str, *errors: float, **more: Any) -> list[Record]:
    return [made_up(architecture, seed=seed, error=error, **more) for seed, error in enumerate(errors)]


def line_of(runs: list[Record], better: str, worse: str) -> str:
    table = paper.TABLES[0]
    rows = {row.architecture: row for row in table.rows}
    return claims.compare(rows[better], rows[worse], table.dataset, runs)


def test_verdicts() -> None:
    stage, base = 'preresnet20_nl_proposed_k5', 'preresnet20'
    baseline = some(base, 8.2, 8.3, 8.1)
    for errors, ending in (
            ((7.3, 7.2, 7.4), '| -0.90 | -1.10 to -0.70 (90 %) | 3, 3 | holds |'),
            ((8.9, 9.1, 9.0), '| +0.80 | +0.60 to +1.00 (90 %) | 3, 3 | **contradicted** |'),
            ((8.0, 8.4, 8.2), '| +0.00 | -0.30 to +0.30 (90 %) | 3, 3 | open |'),
            ((7.0, 7.1), '| -1.15 | -1.30 to -1.00 (80 %) | 2, 3 | open |'),
            ((), '| missing | missing | 0, 3 | not judged |')):
        line = line_of(baseline + some(stage, *errors), stage, base)
        assert line == f'| proposed, k = 5 < baseline | -0.90 {ending}'
    assert '| none | 1, 1 | open |' in line_of(some(base, 8) + some(stage, 7), stage, base)
    limited = some(stage, 1, 1, 1, limit=100)
    assert line_of(baseline + limited, stage, base).endswith('not judged |')


def test_every_claim_of_the_paper_is_there_once() -> None:
    text = claims.text([])
    assert [text.count(f'\nAll {count} comparisons wait for runs (Table ') for count in (13, 11)] == [2, 2]
    assert '| --- |' not in text and '###' not in text, 'a table without a row'
    assert text.count('\nAll 4 networks wait for runs (Signs of the spectra, recipe ') == 2
    assert len(list(paper.claims())) == 13 + 11
    assert all(claims._difference(better, worse) < 0 for _, better, worse in paper.claims()), 'as the paper reports'
    assert 'within 0.26 and 0.20 points' in text


def test_signs_over_runs() -> None:
    def spectra(*negative: Any) -> Any:
        blocks = [{'stage': 'nl', 'index': i, 'eigenvalues': [-1.0] * count + [1.0] * (32 - count)}
                  for i, count in enumerate(negative)]
        return [{'epoch': EPOCHS, 'blocks': blocks}]

    panel = paper.FIGURES[0].panels[1]
    name, = panel.architectures
    runs = [made_up(name, seed=seed, spectra=spectra(*counts))
            for seed, counts in enumerate(((30, 20), (28, 24), (32, 16)))]
    line = claims.signs(panel, runs)
    assert line == f'| {name}: negative | 30 (28–32); 20 (16–24) | 16.0 ± 0.6 | 2 of 3 | open |'
    assert claims.signs(panel, runs[:2]).endswith('2 of 2 | holds |')
    assert claims.signs(panel, runs[2:]).endswith('0 of 1 | **contradicted** |')
    assert claims.signs(panel, [made_up(name)]).endswith('not judged |')
    runs[0]['spectra'][0]['epoch'] = 162
    assert claims.signs(panel, runs[:2]).startswith(f'| {name}: negative (after epoch 162) | 29 (28–30)')


def test_recipes_are_never_mixed() -> None:
    """A fine-tuned network is compared with the backbone that was annealed in the same way, and with no other."""
    def tuned(architecture: Any, *errors: Any) -> Any:
        return [made_up(architecture, seed=seed, error=error, recipe=FINE_TUNING.to_dict(),
                        start={'name': 'preresnet20.cifar10', 'sha256': '0'}) for seed, error in enumerate(errors)]

    stage = 'preresnet20_nl_proposed_k5'
    runs = [*some('preresnet20', 5.0), *tuned('preresnet20', 9.0, 9.1, 9.2), *tuned(stage, 8.0, 8.1, 8.2)]
    papers, tuning = claims.text(runs).split('### Table 1')
    assert 'proposed, k = 5 < baseline' not in papers and tuning.startswith(
        ': PreResNet-20 on CIFAR-10, recipe ft: differences\n')
    assert '| proposed, k = 5 < baseline | -0.90 | -1.00 |' in tuning
    assert '12 of 13 comparisons wait for runs.' in tuning


def test_what_diverged_is_in_no_difference_and_no_count_of_signs() -> None:
    lost = made_up('preresnet20_nl_proposed_k5', seed=9, error=90.0, diverged_epoch=2)
    runs = [*some('preresnet20', 8.2, 8.3, 8.1), *some('preresnet20_nl_proposed_k5', 7.3, 7.2, 7.4), lost]
    assert line_of(runs, 'preresnet20_nl_proposed_k5', 'preresnet20').endswith(
        '| -0.90 | -1.10 to -0.70 (90 %) | 3 + 1 diverged, 3 | holds |')
    assert line_of([*runs[:3], lost], 'preresnet20_nl_proposed_k5', 'preresnet20').endswith('not judged |')
    panel = paper.FIGURES[0].panels[0]
    spectra = [{'epoch': EPOCHS, 'blocks': [{'eigenvalues': [-1.0] * 32}]}]
    name, = panel.architectures
    assert claims.signs(panel, [made_up(name, spectra=spectra, diverged_epoch=2)]).endswith('not judged |')


@pytest.mark.parametrize('n', range(1, 7))
def test_coverage_of_pairs_is_the_share_of_signs_whose_interval_holds_the_truth(n: int) -> None:
    covered = 0
    for signs in product((-1, 1), repeat=n):  # every sign of n differences that are symmetric about no shift
        found = claims.paired_shift([sign * 2.0 ** size for size, sign in enumerate(signs)])
        covered += found.lowest < 0 < found.highest
        assert found.lowest <= found.estimate <= found.highest
    assert covered / 2 ** n == pytest.approx(found.coverage)


def test_fine_tuned_networks_are_compared_seed_by_seed() -> None:
    stage, base = 'preresnet20_nl_proposed_k5', 'preresnet20'
    rows = {row.architecture: row for row in paper.TABLES[0].rows}

    def line(ours: Any, controls: Any) -> Any:
        def tuned(name: str, errors: Any) -> Any:
            return [made_up(name, seed=seed, error=error, recipe=FINE_TUNING.to_dict(),
                            start={'name': 'preresnet20.cifar10', 'sha256': '0'}) for seed, error in errors.items()]
        found = claims.compare(rows[stage], rows[base], 'cifar10', tuned(stage, ours) + tuned(base, controls), 'ft')
        return found.removeprefix('| proposed, k = 5 < baseline | -0.90 | ')

    seeds = {seed: 9.0 + seed for seed in range(5)}  # seeds differ more than networks do
    better = {seed: error - 0.5 - seed / 10 for seed, error in seeds.items()}
    assert line(better, seeds) == '-0.70 | -0.90 to -0.50 (94 %) | 5 pairs | holds |'
    assert line({2: 10.0}, seeds) == '-1.00 | none | 1 pair | open |', 'the control of seed 2 alone'
    assert line({7: 10.0, 8: 10.0}, {0: 9.0}).endswith('| 2, 1 | open |'), 'without a common seed all are compared'


def test_what_diverged_waits_for_no_run() -> None:
    """A network of which every run diverged has its line, and the count of what waits is in words that fit one."""
    table, stage = paper.TABLES[0], 'preresnet20_nl_original_k4'
    lost = [made_up(stage, seed=seed, diverged_epoch=2) for seed in range(2)]
    base = some('preresnet20', 8.2, 8.3)
    others = [run for row in table.rows[2:] if row.architecture != stage for run in some(row.architecture, 8.0)]
    text = claims.text([*base, *lost, *others])
    assert '| baseline < original, k = 4 | -6.83 | none | none | 2, 0 + 2 diverged | not judged |' in text
    assert 'recipe paper: differences' in text and 'comparisons wait for runs.' not in text
    others = [run for run in others if run['architecture'] != 'preresnet20_nl_original_k2']
    assert '\n1 of 13 comparisons waits for runs.' in claims.text([*base, *lost, *others])
    panel = paper.FIGURES[0].panels[0]
    (architecture,) = panel.architectures
    gone = made_up(architecture, spectra=[], diverged_epoch=2)
    assert claims.signs(panel, [gone]).endswith(': negative | none | none | 0 + 1 diverged | not judged |')


def test_pairs_start_from_the_same_weights() -> None:
    def tuned(name: str, error: float, start: str) -> Record:
        return made_up(name, error=error, recipe=FINE_TUNING.to_dict(), start={'name': 'x', 'sha256': start})

    rows = {row.architecture: row for row in paper.TABLES[0].rows}
    base, stage = 'preresnet20', 'preresnet20_nl_proposed_k5'
    for start, n in (('0', '1 pair'), ('1', '1, 1')):
        line = claims.compare(rows[stage], rows[base], 'cifar10', [tuned(base, 9.0, '0'), tuned(stage, 8.0, start)],
                              'ft')
        assert line.endswith(f'| -1.00 | none | {n} | open |')


def test_many_runs_take_no_time() -> None:
    assert claims.shift([*range(40)], [*range(100, 140)]).coverage == pytest.approx(0.95, abs=0.01)
