"""Every run that the paper's tables and figures need, and the variants that calibrate what it leaves open."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from timm_nonlocal.recipes import PAPER, Recipe
from train.runs import Run

SPECTRA_EPOCHS = (36, 82, 125, 164)  # Figure 2 shows the first three, the others the last
WAVES = ((0,), (1, 2), (3, 4))  # seeds that every row gets before any row gets the next ones
LOW_LR = Recipe(lr=0.01)  # "For the 4-block case, we have reduced the learning rate by the ratio of 0.1"
SHORT = Recipe(epochs=10)  # divergence shows in the first epochs, long before the learning rate falls


@dataclass(frozen=True)
class Row:
    """A row of a table, a panel of a figure or a variant: runs that differ in their seed only.

    Attributes:
        run: its first seed.
        kind: 'table', 'figure', 'zoo' (registered, in no table and no figure) or 'calibration'.
        part_of: what shows it, such as 'table 1'.
    """

    run: Run
    kind: str
    part_of: tuple[str, ...] = ()


def _row(architecture: str, dataset: str, *part_of: str) -> Row:
    recipe = LOW_LR if architecture.endswith('_nl_original_k4') else PAPER
    kind = 'zoo' if not part_of else 'table' if part_of[0].startswith('table') else 'figure'
    return Row(Run(architecture, dataset, recipe=recipe), kind, part_of)


TABLE_1 = (
    _row('preresnet20', 'cifar10', 'table 1'),
    _row('preresnet20_nl_original_k2', 'cifar10', 'table 1', 'figure 1', 'figure 3'),
    _row('preresnet20_nl_original_k3', 'cifar10', 'table 1', 'figure 1', 'figure 3'),
    _row('preresnet20_nl_original_k4', 'cifar10', 'table 1', 'figure 3'),
    _row('preresnet20_nl_proposed_k2', 'cifar10', 'table 1'),
    _row('preresnet20_nl_proposed_k3', 'cifar10', 'table 1'),
    _row('preresnet20_nl_proposed_k4', 'cifar10', 'table 1', 'figure 4'),
    _row('preresnet20_nl_proposed_k5', 'cifar10', 'table 1'),
    _row('preresnet20_nl_proposed_k6', 'cifar10', 'table 1'),
    _row('preresnet20_nl_original_k1x3', 'cifar10', 'table 1'),
    _row('preresnet20_nl_proposed_k1x3', 'cifar10', 'table 1'),
    _row('preresnet20_nl_original_k1', 'cifar10', 'figure 1', 'figure 2', 'figure 3'),
)
TABLE_2 = (
    _row('preresnet56', 'cifar100', 'table 2'),
    *(_row(f'preresnet56_nl_original_k{k}', 'cifar100', 'table 2') for k in (2, 3, 4)),
    *(_row(f'preresnet56_nl_proposed_k{k}', 'cifar100', 'table 2') for k in (2, 3, 4, 5, 6)),
)
ZOO = (_row('preresnet20_nl_proposed_k1', 'cifar10'),)


def _calibration() -> Iterable[Row]:
    """Initialisation by scale for the nets that tell choices apart, then shared θ and φ, then learning rates."""
    probes = (('preresnet20_nl_original_k3', 0.1), ('preresnet20_nl_original_k4', 0.1),
              ('preresnet20_nl_original_k4', 0.01), ('preresnet20_nl_proposed_k6', 0.1))
    choices = [{'init': init, **scale} for init in ('xavier_normal', 'kaiming_normal', 'torch', 'normal', 'zero')
               for scale in ({}, {'scale': 1.0})]  # without a scale: 1/√C'
    for choice in [*choices, {'symmetric': True}]:
        for architecture, lr in probes:
            yield _variant(architecture, lr, choice)
    for lr in (0.05, 0.03, 0.02, 0.005):
        yield _variant('preresnet20_nl_original_k4', lr, {'init': 'xavier_normal'})


def _variant(architecture: str, lr: float, choice: dict) -> Row:
    return Row(Run(architecture, 'cifar10', recipe=replace(SHORT, lr=lr), model_kwargs=(f'nl_args={choice}',)),
               'calibration')


CALIBRATION = tuple(_calibration())


def rows(tables: Sequence[int], calibration: bool = False) -> list[Row]:
    """The rows of Table 1 (with the figures' runs) and Table 2, then the zoo's, or those of the calibration."""
    if calibration:
        return list(CALIBRATION)
    return [*(TABLE_1 if 1 in tables else ()), *(TABLE_2 if 2 in tables else ()), *(ZOO if 1 in tables else ())]


def runs(rows: Sequence[Row], seeds: int, order: str = 'seeds') -> list[tuple[Row, Run]]:
    """The first `seeds` seeds of every row.

    Args:
        order: 'seeds' (one seed of every row first, then two more, and so on) or 'rows' (all seeds of a row first).
    """
    waves = [[seed for seed in wave if seed < seeds] for wave in WAVES]
    waves += [[seed] for seed in range(sum(map(len, WAVES)), seeds)]
    if order == 'rows':
        waves = [list(range(seeds))]
    return [(row, replace(row.run, seed=seed)) for wave in waves for row in rows for seed in wave]
