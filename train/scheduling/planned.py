"""The runs that the project is made of, in the order to do them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from timm_nonlocal.recipes import FINE_TUNING, PAPER, SHORT, Recipe
from train.records.runs import Run

SEEDS = 5  # of every row of the paper's tables


@dataclass(frozen=True)
class Row:
    """A run of the list.

    Attributes:
        run: all but the weights that it starts from.
        start: the registered name of those weights, whose own run may be in the list too; '' draws all weights.
    """

    run: Run
    start: str = ''

    @property
    def name(self) -> str:
        return self.run.name


def _row(architecture: str, recipe: Recipe, *model_kwargs: str, seed: int = 0, start: str = '') -> Row:
    """Depth 20 learns CIFAR-10 and depth 56 CIFAR-100, as in the paper; fine-tuning starts from the plain backbone."""
    dataset = 'cifar10' if architecture.startswith('preresnet20') else 'cifar100'
    if recipe == FINE_TUNING:
        start = f'{architecture.partition("_")[0]}.{dataset}'
    return Row(Run(architecture, dataset, seed, recipe, model_kwargs, mixed_precision='bf16',
                   test_every=4 if recipe == FINE_TUNING or '_nl_' in architecture else 1), start)


def _first() -> Iterator[Row]:
    """One seed of what says most: the networks that ship first, Figures 1 to 4, then Table 1."""
    yield _row('preresnet56', PAPER)
    yield _row('preresnet20', FINE_TUNING)
    yield _row('preresnet20_nl_proposed_k5', FINE_TUNING)
    yield _row('preresnet56', FINE_TUNING)
    yield _row('preresnet56_nl_proposed_k5', FINE_TUNING)
    yield _row('preresnet20', SHORT)
    for k in (1, 2, 3, 4):
        yield _row(f'preresnet20_nl_original_k{k}', SHORT)
    yield _row('preresnet20_nl_original_k4', replace(SHORT, lr=SHORT.lr / 10))
    yield _row('preresnet20_nl_proposed_k4', SHORT)
    yield _row('preresnet20_nl_proposed_k5', SHORT)
    for name in ('original_k2', 'original_k4', 'proposed_k2', 'proposed_k4', 'original_k1', 'original_k3',
                 'proposed_k3', 'proposed_k6', 'original_k1x3', 'proposed_k1x3'):
        yield _row(f'preresnet20_nl_{name}', FINE_TUNING)
    yield _row('preresnet20_nl_proposed_k5', FINE_TUNING, "nl_args={'symmetric': True}")
    yield _row('preresnet20_nl_proposed_k5', FINE_TUNING, "nl_args={'symmetric': True, 'stable': True}")
    yield _row('preresnet20_nl_proposed_k5', FINE_TUNING, 'nl_k=12', "nl_args={'symmetric': True, 'stable': True}")
    yield _row('preresnet20', PAPER, 'depth=29')  # does another way to count layers explain the baseline?
    yield _row('preresnet20_nl_proposed_k5', PAPER)


def _tables() -> Iterator[Row]:
    """Tables 1 and 2 by the paper's recipe, one seed of every row before any has two."""
    ten = ['', *(f'_nl_original_k{k}' for k in (1, 2, 3, 4)), *(f'_nl_proposed_k{k}' for k in (2, 3, 4, 5, 6)),
           '_nl_original_k1x3', '_nl_proposed_k1x3']
    hundred = ['', *(f'_nl_original_k{k}' for k in (2, 3, 4)), *(f'_nl_proposed_k{k}' for k in (2, 3, 4, 5, 6))]
    names = [f'preresnet20{rest}' for rest in ten] + [f'preresnet56{rest}' for rest in hundred]
    for seed in range(SEEDS):
        for name in names:
            yield _row(name, replace(PAPER, lr=PAPER.lr / 10) if name.endswith('original_k4') else PAPER, seed=seed)


def rows() -> list[Row]:
    """Every run once."""
    return list({row.name: row for row in (*_first(), *_tables())}.values())


def after_divergence(row: Row) -> Row | None:
    """What follows a run whose loss was not finite: a short run is done again with a tenth of the learning rate."""
    if row.run.recipe != SHORT:
        return None
    return replace(row, run=replace(row.run, recipe=replace(SHORT, lr=SHORT.lr / 10)))
