"""Which claims of the paper our runs bear out: differences of errors with exact intervals, and signs of spectra."""

from collections.abc import Sequence
from functools import cache
from itertools import combinations_with_replacement, product
from statistics import median
from typing import NamedTuple

from timm_nonlocal import paper
from timm_nonlocal.analysis.spectra import TOP

from . import figures
from .generated import waiting
from .results import Counted, Record, counted
from .spectra import kept

__all__ = ['Shift', 'compare', 'paired_shift', 'rank_sums', 'shift', 'signed_rank_sums', 'signs', 'text']

LEVEL = 0.95  # of the intervals
ENOUGH = 0.9  # to judge a claim: what three runs against three can have
MISSING = 'missing'


class Shift(NamedTuple):
    """By how much the second of two samples lies above the first: estimate, interval, and how surely that holds it."""

    estimate: float
    lowest: float
    highest: float
    coverage: float


@cache
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


def signed_rank_sums(n: int) -> list[int]:
    """Of the 2ⁿ signs of n differences without ties, how many have a sum u of the ranks of the positive ones.

    One count for each u = 0, …, n (n + 1) / 2: the null distribution of Wilcoxon's statistic (1945).
    """
    counts = [1]
    for rank in range(1, n + 1):
        counts = [low + high for low, high in zip(counts + [0] * rank, [0] * rank + counts, strict=True)]
    return counts


def _interval(differences: list[float], counts: list[int], level: float) -> Shift:
    """The median of ordered differences, and the two of them at which an exact interval ends.

    Args:
        differences: in order.
        counts: how many of all orders have u differences on one side, for u = 0, …, len(differences).
        level: the coverage is at least this, or the most that so few runs can have.
    """
    orders, outside = sum(counts), 0  # differences left out at either end
    while 2 * outside < len(counts) - 2 and 1 - 2 * sum(counts[:outside + 2]) / orders >= level:
        outside += 1
    coverage = max(0.0, 1 - 2 * sum(counts[:outside + 1]) / orders)
    return Shift(median(differences), differences[outside], differences[-1 - outside], coverage)


def shift(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Shift:
    """Hodges and Lehmann's estimate of a shift (1963), the median of all differences, with its exact interval.

    It assumes nothing of the distributions but that they have one shape. Three against three cover 0.9 at most.
    """
    return _interval(sorted(b - a for a, b in product(first, second)), rank_sums(len(first), len(second)), level)


def paired_shift(differences: Sequence[float], level: float = LEVEL) -> Shift:
    """The same of pairs: the median of the means of all two differences, each with itself too, with its exact interval.

    It assumes that the differences are symmetric about their median. Five pairs cover 0.94 at most, four 0.88.
    """
    means = sorted((a + b) / 2 for a, b in combinations_with_replacement(differences, 2))
    return _interval(means, signed_rank_sums(len(differences)), level)


def _seeds(found: Counted) -> dict[tuple[int, str | None, str | None], float]:
    """The errors by what two runs of a pair share: seed, precision, and the weights that they start from."""
    return {(record['seed'], record.get('mixed_precision'), (record.get('start') or {}).get('sha256')):
            record['final_error'] for record in found.finished}


def compare(better: paper.Row, worse: paper.Row, dataset: str, records: list[Record], recipe: str = 'paper') -> str:
    """A line about the claim that one network has a lower error than another.

    Runs of `ft` are compared with the run of the same seed, from the same weights, where there is one.
    """
    found = [counted(records, row.architecture, dataset, recipe) for row in (worse, better)]
    line = f'| {better.label} < {worse.label} | {_difference(better, worse):+.2f} |'
    n = f'{found[1].n}, {found[0].n}'
    if not all(each.finished for each in found):  # all that there are may have diverged
        ours = 'none' if all(each.all for each in found) else MISSING
        return f'{line} {ours} | {ours} | {n} | not judged |'
    first, second = map(_seeds, found)
    pairs = sorted(first.keys() & second.keys()) if recipe == 'ft' else []
    if pairs:
        shifted = paired_shift([second[seed] - first[seed] for seed in pairs])
        n = f'{len(pairs)} pair{"s" * (len(pairs) > 1)}'
    else:
        shifted = shift([*first.values()], [*second.values()])
    verdict, ends = 'open', 'none'
    if shifted.coverage >= ENOUGH and not shifted.lowest <= 0 <= shifted.highest:
        verdict = 'holds' if shifted.highest < 0 else '**contradicted**'
    if shifted.coverage:
        ends = f'{shifted.lowest:+.2f} to {shifted.highest:+.2f} ({100 * shifted.coverage:.0f} %)'
    return f'{line} {shifted.estimate:+.2f} | {ends} | {n} | {verdict} |'


def _difference(better: paper.Row, worse: paper.Row) -> float:
    """The paper's; it makes no claim about a network without an error."""
    assert better.error is not None and worse.error is not None
    return better.error - worse.error


def signs(panel: paper.Panel, records: list[Record], recipe: str = 'paper') -> str:
    """A line about the claim that most of the top eigenvalues of every block have one sign."""
    (architecture,) = panel.architectures
    runs = counted(records, architecture, paper.FIGURE_DATASET, recipe)
    last = [after for record in runs.finished if (after := kept(record))]
    found = [figures.signs(panel.claim, after.tops) for after in last]
    early = sorted({after.epoch for after in last if after.epoch != after.epochs})
    when = f' (after epoch {", ".join(map(str, early))})' if early else ''
    line = f'| {architecture}: {panel.claim}{when} |'
    if not found:
        ours = 'none' if runs.diverged else MISSING
        return f'{line} {ours} | {ours} | {runs.n} | not judged |'
    holding = sum(figures.beyond_chance(*each) for each in found)
    verdict = 'holds' if holding == len(found) else '**contradicted**' if not holding else 'open'
    counts, (expected, *_), (spread, *_) = zip(*found, strict=True)
    blocks = [f'{median(block):g} ({min(block)}–{max(block)})' for block in zip(*counts, strict=True)]
    return f'{line} {"; ".join(blocks)} | {expected:.1f} ± {spread:.1f} | {holding} of {len(found)} | {verdict} |'


def table(title: str, head: list[str], lines: list[str], what: str) -> str:
    """The rows that have figures of ours, and how many have none; without any, a sentence in place of a table."""
    found = [line for line in lines if MISSING not in line]
    missing = len(lines) - len(found)
    if not found:
        return f'All {missing} {what} wait for runs ({title}).'
    rest = ['', waiting(missing, len(lines), what)] if missing else []
    return '\n'.join([f'### {title}', '', *head, *found, *rest])


def text(records: list[Record]) -> str:
    """The conclusions, in Markdown, of every recipe apart."""
    claims = list(paper.claims())
    spans = [max(errors) - min(errors) for of in paper.TABLES if (errors := [
        row.error for row in of.rows if row.architecture.endswith(paper.UNRANKED) and row.error is not None])]
    parts = [
        'Whether a network has a lower error than another: the difference in percentage points, ours as the median of '
        f'all pairs of runs (Hodges and Lehmann) with its exact interval, at {100 * LEVEL:.0f} % or the most that so '
        'few runs allow. A claim holds, or is contradicted, where the interval lies on one side of 0 and covers '
        f'{100 * ENOUGH:.0f} % or more; of {len(claims)} intervals about {len(claims) * (1 - LEVEL):.0f} misses by '
        'chance. '
        f'{paper.RUNS} runs each cannot rank the proposed k = 4, 5 and 6, whose medians in the paper are within '
        f'{" and ".join(f"{span:.2f}" for span in spans)} points of each other in the two tables.',
        'With the recipe `ft` two networks are compared seed by seed where they have seeds in common and started from '
        'the same weights: the median is that of the means of all two differences, and no fewer than five pairs can '
        'decide a claim. A run that diverged has no final error, so that it is in no difference and no interval.']
    for recipe in ('paper', 'ft'):
        parts += [table(f'{of.title}, recipe {recipe}: differences',
                        ['| lower error | paper | ours | interval | n | claim |',
                         '| --- | --- | --- | --- | --- | --- |'],
                        [compare(better, worse, of.dataset, records, recipe)
                         for where, better, worse in claims if where is of], 'comparisons') for of in paper.TABLES]
    judged = [panel for figure in paper.FIGURES for panel in figure.panels
              if panel.claim in ('negative', 'positive') and panel.epoch is None]
    parts.append(
        f'Of the {TOP} eigenvalues of largest magnitude after training, how many have the sign the paper reports for '
        'most of them: median over our runs and range, block by block. The claim holds for a run where every block is '
        f'more than {figures.SIGMAS} standard deviations from what random weights show.')
    parts += [table(f'Signs of the spectra, recipe {recipe}',
                    ['| network and sign | ours | by chance | runs where it holds | claim |',
                     '| --- | --- | --- | --- | --- |'],
                    [signs(panel, records, recipe) for panel in judged], 'networks') for recipe in ('paper', 'short')]
    return '\n\n'.join(parts)
