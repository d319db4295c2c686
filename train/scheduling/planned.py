"""The runs that the project is made of, in the order to do them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hub.results import recipe_for
from timm_nonlocal import paper
from timm_nonlocal.recipes import FINE_TUNING, PAPER, SHORT, Recipe
from train.records.runs import Run

__all__ = ['PlannedRun', 'after_divergence', 'planned_runs']

SEEDS = 5  # of every row of the paper's tables


@dataclass(frozen=True)
class PlannedRun:
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


def _planned(architecture: str, recipe: Recipe, *model_kwargs: str, seed: int = 0, start: str = '') -> PlannedRun:
    """Depth 20 learns CIFAR-10 and depth 56 CIFAR-100, as in the paper; fine-tuning starts from the plain backbone."""
    dataset = 'cifar10' if architecture.startswith('preresnet20') else 'cifar100'
    if recipe == FINE_TUNING:
        start = f'{architecture.partition("_")[0]}.{dataset}'
    run = Run(architecture, dataset, seed, recipe, model_kwargs, mixed_precision='bf16',
              test_every=4 if recipe == FINE_TUNING or '_nl_' in architecture else 1)
    return PlannedRun(run, start)


def _first() -> Iterator[PlannedRun]:
    """One seed of what says most: the networks that ship first, Figures 1 to 4, then Table 1."""
    yield _planned('preresnet56', PAPER)
    yield _planned('preresnet20', FINE_TUNING)
    yield _planned('preresnet20_nl_proposed_k5', FINE_TUNING)
    yield _planned('preresnet56', FINE_TUNING)
    yield _planned('preresnet56_nl_proposed_k5', FINE_TUNING)
    yield _planned('preresnet20', SHORT)
    for k in (1, 2, 3, 4):
        yield _planned(f'preresnet20_nl_original_k{k}', SHORT)
    tenth = recipe_for('preresnet20_nl_original_k4', 'short')
    yield _planned('preresnet20_nl_original_k4', tenth)
    yield _planned('preresnet20', tenth)  # what of that is the learning rate's doing?
    yield _planned('preresnet20_nl_proposed_k4', SHORT)
    yield _planned('preresnet20_nl_proposed_k5', SHORT)
    for name in ('original_k2', 'original_k4', 'proposed_k2', 'proposed_k4', 'original_k1', 'original_k3',
                 'proposed_k3', 'proposed_k6', 'original_k1x3', 'proposed_k1x3'):
        yield _planned(f'preresnet20_nl_{name}', FINE_TUNING)
    yield _planned('preresnet20_nl_proposed_k5', FINE_TUNING, "nl_args={'symmetric': True}")
    yield _planned('preresnet20_nl_proposed_k5', FINE_TUNING, "nl_args={'symmetric': True, 'stable': True}")
    yield _planned('preresnet20_nl_proposed_k5', FINE_TUNING, 'nl_k=12', "nl_args={'symmetric': True, 'stable': True}")
    yield _planned('preresnet20', PAPER, 'depth=29')  # does another way to count layers explain the baseline?
    yield _planned('preresnet20_nl_proposed_k5', PAPER)


def _pairs() -> Iterator[PlannedRun]:
    """Table 1 by fine-tuning, the other seeds row by row: five pairs are the fewest that decide a claim."""
    for row in paper.TABLES[0].rows:
        for seed in range(1, SEEDS):
            yield _planned(row.architecture, FINE_TUNING, seed=seed)


def _tables() -> Iterator[PlannedRun]:
    """Tables 1 and 2 by the paper's recipe, one seed of every row before any has two."""
    for seed in range(SEEDS):
        for row in (row for table in paper.TABLES for row in table.rows):
            yield _planned(row.architecture, recipe_for(row.architecture, 'paper'), seed=seed)


def planned_runs() -> list[PlannedRun]:
    """Every run once."""
    return list({planned.name: planned for planned in (*_first(), *_pairs(), *_tables())}.values())


def after_divergence(planned: PlannedRun) -> PlannedRun | None:
    """What follows a run whose loss was not finite: a short run is done again with a tenth of the learning rate."""
    if planned.run.recipe != SHORT:
        return None
    return replace(planned, run=replace(planned.run, recipe=replace(SHORT, lr=SHORT.lr / 10)))
