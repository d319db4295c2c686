"""Which claims of the paper our runs bear out: differences of errors with exact intervals, and signs of spectra."""

from collections.abc import Sequence
from itertools import product
from math import comb
from statistics import median
from typing import NamedTuple

from hub import figures
from timm_nonlocal import paper
from timm_nonlocal.analysis.spectra import TOP

from .results import Run, counted
from .spectra import kept

LEVEL = 0.95  # of the intervals
ENOUGH = 0.9  # to judge a claim: what three runs against three can have
MISSING = 'missing'


class Shift(NamedTuple):
    """By how much the second of two samples lies above the first: estimate, interval, and how surely that holds it."""

    estimate: float
    lowest: float
    highest: float
    coverage: float


def rank_sums(n: int, m: int) -> list[int]:
    """Of the C(n + m, n) orders of two samples without ties, how many have u pairs in which the first is above.

    One count for each u = 0, …, n m: the null distribution of Mann and Whitney's statistic (1947).
    """
    if n == 0 or m == 0:
        return [1]
    largest_of_first, largest_of_second = rank_sums(n - 1, m), rank_sums(n, m - 1)
    counts = [0] * (n * m + 1)
    for u, count in enumerate(largest_of_first):
        counts[u + m] += count
    for u, count in enumerate(largest_of_second):
        counts[u] += count
    return counts


def shift(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Shift:
    """Hodges and Lehmann's estimate of a shift (1963), the median of all differences, with its exact interval.

    The interval ends at two of the ordered differences. It assumes nothing of the distributions but that they have one
    shape; its coverage is at least `level`, or the most that so few runs can have (0.9 for three against three).
    """
    differences = sorted(b - a for a, b in product(first, second))
    counts, orders = rank_sums(len(first), len(second)), comb(len(first) + len(second), len(first))
    outside = 0  # differences left out at either end
    while 2 * outside < len(counts) - 2 and 1 - 2 * sum(counts[:outside + 2]) / orders >= level:
        outside += 1
    coverage = max(0.0, 1 - 2 * sum(counts[:outside + 1]) / orders)
    return Shift(median(differences), differences[outside], differences[-1 - outside], coverage)


def compare(better: paper.Row, worse: paper.Row, dataset: str, runs: list[Run], recipe: str = 'paper') -> str:
    """A line about the claim that one network has a lower error than another."""
    ours = [[run['final_error'] for run in counted(runs, row.architecture, dataset, recipe)]
            for row in (worse, better)]
    line = f'| {better.label} < {worse.label} | {better.error - worse.error:+.2f} |'
    if not all(ours):
        return f'{line} {MISSING} | {MISSING} | {MISSING} | not judged |'
    found = shift(*ours)
    verdict = 'open'
    if found.coverage >= ENOUGH and not found.lowest <= 0 <= found.highest:
        verdict = 'holds' if found.highest < 0 else '**contradicted**'
    ends = f'{found.lowest:+.2f} to {found.highest:+.2f} ({100 * found.coverage:.0f} %)' if found.coverage else 'none'
    return f'{line} {found.estimate:+.2f} | {ends} | {len(ours[1])}, {len(ours[0])} | {verdict} |'


def signs(panel: paper.Panel, runs: list[Run], recipe: str = 'paper') -> str:
    """A line about the claim that most of the top eigenvalues of every block have one sign."""
    (architecture,) = panel.architectures
    tops = [kept(run, run['recipe']['epochs']) for run in counted(runs, architecture, paper.FIGURE_DATASET, recipe)]
    found = [figures.signs(panel.claim, blocks) for blocks in tops if blocks]
    line = f'| {architecture}: {panel.claim} |'
    if not found:
        return f'{line} {MISSING} | {MISSING} | {MISSING} | not judged |'
    holding = sum(figures.beyond_chance(*run) for run in found)
    verdict = 'holds' if holding == len(found) else '**contradicted**' if not holding else 'open'
    counts, (expected, *_), (spread, *_) = zip(*found, strict=True)
    each = [f'{median(block):g} ({min(block)}–{max(block)})' for block in zip(*counts, strict=True)]
    return f'{line} {"; ".join(each)} | {expected:.1f} ± {spread:.1f} | {holding} of {len(found)} | {verdict} |'


def measured(lines: list[str], what: str) -> list[str]:
    """The rows that have figures of ours, and how many have none."""
    found = [line for line in lines if MISSING not in line]
    return [*found, *([f'\n{len(lines) - len(found)} more {what} wait for runs.'] if len(found) < len(lines) else [])]


def text(runs: list[Run]) -> str:
    """The conclusions, in Markdown, of every recipe apart."""
    claims = list(paper.claims())
    spans = [max(errors) - min(errors) for table in paper.TABLES if (errors := [
        row.error for row in table.rows if row.architecture.endswith(paper.UNRANKED)])]
    parts = [
        'Whether a network has a lower error than another: the difference in percentage points, ours as the median of '
        f'all pairs of runs (Hodges and Lehmann) with its exact interval, at {100 * LEVEL:.0f} % or the most that so '
        'few runs allow. A claim holds, or is contradicted, where the interval lies on one side of 0 and covers '
        f'{100 * ENOUGH:.0f} % or more; of {len(claims)} intervals about {len(claims) * (1 - LEVEL):.0f} misses by '
        'chance. '
        f'{paper.RUNS} runs each cannot rank the proposed k = 4, 5 and 6, whose medians in the paper are within '
        f'{" and ".join(f"{span:.2f}" for span in spans)} points of each other in the two tables.']
    for recipe in ('paper', 'ft'):
        for table in paper.TABLES:
            parts.append('\n'.join([
                f'### {table.title}, recipe {recipe}: differences', '',
                '| lower error | paper | ours | interval | n | claim |', '| --- | --- | --- | --- | --- | --- |',
                *measured([compare(better, worse, table.dataset, runs, recipe)
                           for where, better, worse in claims if where is table], 'comparisons')]))
    parts += ['\n'.join([
        f'### Signs of the spectra, recipe {recipe}', '',
        f'Of the {TOP} eigenvalues of largest magnitude after training, how many have the sign the paper reports for '
        'most of them: median over our runs and range, block by block. The claim holds for a run where every block is '
        f'more than {figures.SIGMAS} standard deviations from what random weights show.', '',
        '| network and sign | ours | by chance | runs where it holds | claim |', '| --- | --- | --- | --- | --- |',
        *measured([signs(panel, runs, recipe) for figure in paper.FIGURES for panel in figure.panels
                   if panel.claim in ('negative', 'positive') and panel.epoch is None], 'networks')])
        for recipe in ('paper', 'short')]
    return '\n\n'.join(parts)
