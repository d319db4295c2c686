"""The conclusions: intervals whose coverage is counted over all orders, and verdicts."""

from itertools import combinations
from math import comb

import pytest

from hub import claims
from tests.support.weight_files import made_up
from timm_nonlocal import paper
from timm_nonlocal.recipes import FINE_TUNING

EPOCHS = 164


@pytest.mark.parametrize('n, m', [(1, 1), (2, 3), (3, 3), (4, 2), (5, 5), (5, 3)])
def test_coverage_is_the_share_of_orders_whose_interval_holds_the_truth(n, m):
    covered = 0
    for first in combinations(range(n + m), n):  # every order of two samples from one distribution: no shift
        second = [number for number in range(n + m) if number not in first]
        found = claims.shift(first, second)
        covered += found.lowest < 0 < found.highest
        assert found.lowest <= found.estimate <= found.highest
    assert covered / comb(n + m, n) == pytest.approx(found.coverage)


@pytest.mark.parametrize('n, m, outside, coverage', [
    (5, 5, 2, 1 - 2 * 4 / 252), (3, 3, 0, 0.9), (3, 5, 0, 1 - 2 / 56), (1, 1, 0, 0.0), (1, 9, 0, 0.8)])
def test_intervals_are_as_short_as_the_level_allows(n, m, outside, coverage):
    first, second = [10 * i for i in range(n)], [3.3 + i for i in range(m)]
    differences = sorted(b - a for a in first for b in second)
    found = claims.shift(first, second)
    assert (found.lowest, found.highest) == (differences[outside], differences[-1 - outside])
    assert found.coverage == pytest.approx(coverage)


def some(architecture, *errors, **more):
    return [made_up(architecture, seed=seed, error=error, **more) for seed, error in enumerate(errors)]


def line_of(runs, better, worse):
    table = paper.TABLES[0]
    rows = {row.architecture: row for row in table.rows}
    return claims.compare(rows[better], rows[worse], table.dataset, runs)


def test_verdicts():
    stage, base = 'preresnet20_nl_proposed_k5', 'preresnet20'
    baseline = some(base, 8.2, 8.3, 8.1)
    for errors, ending in (
            ((7.3, 7.2, 7.4), '| -0.90 | -1.10 to -0.70 (90 %) | 3, 3 | holds |'),
            ((8.9, 9.1, 9.0), '| +0.80 | +0.60 to +1.00 (90 %) | 3, 3 | **contradicted** |'),
            ((8.0, 8.4, 8.2), '| +0.00 | -0.30 to +0.30 (90 %) | 3, 3 | open |'),
            ((7.0, 7.1), '| -1.15 | -1.30 to -1.00 (80 %) | 2, 3 | open |'),
            ((), '| missing | missing | missing | not judged |')):
        line = line_of(baseline + some(stage, *errors), stage, base)
        assert line == f'| proposed, k = 5 < baseline | -0.90 {ending}'
    assert '| none | 1, 1 | open |' in line_of(some(base, 8) + some(stage, 7), stage, base)
    limited = some(stage, 1, 1, 1, limit=100)
    assert line_of(baseline + limited, stage, base).endswith('not judged |')


def test_every_claim_of_the_paper_is_there_once():
    text = claims.text([])
    assert [text.count(f'\n{count} more comparisons wait for runs.') for count in (13, 11)] == [2, 2]
    assert text.count('\n4 more networks wait for runs.') == 2 and len(list(paper.claims())) == 13 + 11
    assert all(better.error < worse.error for _, better, worse in paper.claims()), 'the paper claims what it reports'
    assert 'within 0.26 and 0.20 points' in text


def test_signs_over_runs():
    def spectra(*negative):
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


def test_recipes_are_never_mixed():
    """A fine-tuned network is compared with the backbone that was annealed in the same way, and with no other."""
    def tuned(architecture, *errors):
        return [made_up(architecture, seed=seed, error=error, recipe=FINE_TUNING.to_dict(),
                        start={'name': 'preresnet20.cifar10', 'sha256': '0'}) for seed, error in enumerate(errors)]

    stage = 'preresnet20_nl_proposed_k5'
    runs = [*some('preresnet20', 5.0), *tuned('preresnet20', 9.0, 9.1, 9.2), *tuned(stage, 8.0, 8.1, 8.2)]
    _, papers, tuning = claims.text(runs).split('### Table 1')[:3]
    assert 'proposed, k = 5 < baseline' not in papers and '| proposed, k = 5 < baseline | -0.90 | -1.00 |' in tuning
    assert '12 more comparisons wait for runs.' in tuning
