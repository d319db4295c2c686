"""What the paper reports, as data: Tables 1 and 2, and what Figures 1 to 4 show.

Tao, Sun, Du, Liu, "Nonlocal Neural Networks, Nonlocal Diffusion and Nonlocal Modeling", NeurIPS 2018. Its errors are
medians of five runs, in per cent of the test images; its figures' numbers are not in its text.
"""

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ['ARXIV', 'BASELINE', 'CITATION', 'FIGURES', 'FIGURE_DATASET', 'RUNS', 'TABLES', 'TITLE', 'UNRANKED',
           'Figure', 'Panel', 'Row', 'Table', 'claims', 'error']

TITLE = 'Nonlocal Neural Networks, Nonlocal Diffusion and Nonlocal Modeling'
ARXIV = '1806.00681'
CITATION = f"""@inproceedings{{tao2018nonlocal,
  title = {{{TITLE}}},
  author = {{Tao, Yunzhe and Sun, Qi and Du, Qiang and Liu, Wei}},
  booktitle = {{Advances in Neural Information Processing Systems}},
  year = {{2018}}
}}"""
RUNS = 5


class Row(NamedTuple):
    """A line of a table; error is None where the paper trains the network but reports no error."""

    label: str
    architecture: str
    error: float | None


class Table(NamedTuple):
    title: str
    dataset: str
    rows: tuple[Row, ...]


TABLES = (
    Table('Table 1: PreResNet-20 on CIFAR-10', 'cifar10', (
        Row('baseline', 'preresnet20', 8.19),
        Row('original, k = 1', 'preresnet20_nl_original_k1', None),
        Row('original, k = 2', 'preresnet20_nl_original_k2', 7.83),
        Row('original, k = 3', 'preresnet20_nl_original_k3', 8.28),
        Row('original, k = 4', 'preresnet20_nl_original_k4', 15.02),
        Row('proposed, k = 2', 'preresnet20_nl_proposed_k2', 7.74),
        Row('proposed, k = 3', 'preresnet20_nl_proposed_k3', 7.62),
        Row('proposed, k = 4', 'preresnet20_nl_proposed_k4', 7.37),
        Row('proposed, k = 5', 'preresnet20_nl_proposed_k5', 7.29),
        Row('proposed, k = 6', 'preresnet20_nl_proposed_k6', 7.55),
        Row('original, one in each stage', 'preresnet20_nl_original_k1x3', 8.07),
        Row('proposed, one in each stage', 'preresnet20_nl_proposed_k1x3', 7.33),
    )),
    Table('Table 2: PreResNet-56 on CIFAR-100', 'cifar100', (
        Row('baseline', 'preresnet56', 26.57),
        Row('original, k = 2', 'preresnet56_nl_original_k2', 26.13),
        Row('original, k = 3', 'preresnet56_nl_original_k3', 26.26),
        Row('original, k = 4', 'preresnet56_nl_original_k4', 34.89),
        Row('proposed, k = 2', 'preresnet56_nl_proposed_k2', 26.04),
        Row('proposed, k = 3', 'preresnet56_nl_proposed_k3', 25.57),
        Row('proposed, k = 4', 'preresnet56_nl_proposed_k4', 25.43),
        Row('proposed, k = 5', 'preresnet56_nl_proposed_k5', 25.29),
        Row('proposed, k = 6', 'preresnet56_nl_proposed_k6', 25.49),
    )),
)
BASELINE = TABLES[0].rows[0]
UNRANKED = ('proposed_k4', 'proposed_k5', 'proposed_k6')  # too close for five runs


def error(architecture: str, dataset: str) -> float | None:
    """The paper's error of a network on a data set, in per cent, where it has one."""
    for table in TABLES:
        for row in table.rows:
            if (row.architecture, table.dataset) == (architecture, dataset):
                return row.error
    return None


def claims() -> Iterator[tuple[Table, Row, Row]]:
    """Which network is to have a lower error than which: the claims of section 3 that Tables 1 and 2 stand for.

    A proposed stage below as many original blocks and below the baseline, four original blocks above the baseline, and
    the proposed k = 5, the lowest of both tables' stages, below its neighbours.
    """
    for table in TABLES:
        row = {row.architecture.partition('_nl_')[2]: row for row in table.rows}
        proposed = [name for name in row if name.startswith('proposed')]
        for name in proposed:
            if (original := name.replace('proposed', 'original')) in row:
                yield table, row[name], row[original]
        for name in proposed:
            yield table, row[name], row['']
        yield table, row[''], row['original_k4']
        for name in ('proposed_k4', 'proposed_k6'):
            yield table, row['proposed_k5'], row[name]


class Panel(NamedTuple):
    """One part of a figure: the top 32 eigenvalues of every block of a network, or the curves of several networks.

    epoch is None for the final weights; claim is what the paper says of the panel ('' where it says nothing).
    """

    letter: str
    title: str
    architectures: tuple[str, ...]
    claim: str
    epoch: int | None = None
    curves: bool = False


class Figure(NamedTuple):
    number: int
    title: str
    panels: tuple[Panel, ...]


def _original(k: int) -> str:
    return f'preresnet20_nl_original_k{k}'


FIGURES = (
    Figure(1, 'Top 32 eigenvalues of the symmetrised weights after training, 1, 2 and 3 original blocks', tuple(
        Panel(letter, f'{k} block{"s" * (k > 1)}', (_original(k),), 'negative')
        for letter, k in zip('abc', (1, 2, 3), strict=True))),
    Figure(2, 'Top 32 eigenvalues of the symmetrised weight during training, 1 original block', tuple(
        Panel(letter, f'epoch {epoch}', (_original(1),), 'negative', epoch)
        for letter, epoch in zip('abc', (36, 82, 125), strict=True))),
    Figure(3, 'Training with 1 to 4 original blocks, 4 with a tenth of the learning rate, and the spectrum with 4', (
        Panel('a', 'training curves', tuple(map(_original, (1, 2, 3, 4))), 'four lose most', curves=True),
        Panel('b', '4 blocks', (_original(4),), 'large positive'))),
    Figure(4, 'Top 32 eigenvalues of the symmetrised weights after training, 4 proposed sub-blocks', (
        Panel('', '4 sub-blocks', ('preresnet20_nl_proposed_k4',), 'positive'),)),
)
FIGURE_DATASET = 'cifar10'
