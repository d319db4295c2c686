"""The finished runs in results.jsonl, which of them count for the paper's tables, and whose weights are shipped.

A run that diverged has no final error. It enters no median, no range, no claim and no choice of weights, and is counted
apart: `diverged` says which they are, and `counted` keeps them apart.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from timm_nonlocal.files import sha256
from timm_nonlocal.models.preresnet import ARCHITECTURES
from timm_nonlocal.models.pretrained import TAGS, WEIGHTS
from timm_nonlocal.recipes import RECIPES, Recipe, nearest

__all__ = ['HUB', 'RESULTS', 'WEIGHTS', 'Counted', 'PublishError', 'Record', 'Shipped', 'Summary', 'counted',
           'deviations', 'diverged', 'load', 'median_records', 'precision', 'recipe_for', 'recipe_name', 'shipped',
           'summary', 'tag', 'to_ship']

HUB = Path(__file__).parent
RESULTS = HUB / 'results.jsonl'
Record = dict[str, Any]  # one line about a run; the fields are those that the training command writes
FIELDS = {'architecture', 'dataset', 'seed', 'recipe', 'final_error', 'best_error', 'best_epoch', 'train_loss',
          'train_error', 'test_error', 'sha256'}  # that no card can do without


class PublishError(Exception):
    """Something to publish is missing or does not fit; the message says what would work."""


def load(path: Path = RESULTS) -> list[Record]:
    """Every line of a results file, none if there is no file. Raises PublishError for a line that is not a run's."""
    records = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
        try:
            record = json.loads(line)
            missing = FIELDS - record.keys()
        except (ValueError, AttributeError) as error:
            raise PublishError(f'{path}, line {number} is not a JSON object: {error}') from error
        if missing:
            raise PublishError(f'{path}, line {number} lacks {", ".join(sorted(missing))}')
        try:
            Recipe.from_dict(record['recipe'])
        except ValueError as error:
            raise PublishError(f'{path}, line {number} is not about a run: {error}') from error
        records.append(record)
    return records


def diverged(record: Record) -> bool:
    """Whether the run's training loss was not finite, so that it has no final error."""
    return record.get('diverged_epoch') is not None


def precision(record: Record) -> str:
    """In which precision a run was computed, in words."""
    name = str(record.get('mixed_precision', 'no'))
    return {'no': 'float32', 'bf16': 'bfloat16 autocast, float32 weights'}.get(name, name)


def recipe_name(record: Record) -> str:
    """The recipe in `timm_nonlocal.recipes.RECIPES` that a run followed, or came nearest to."""
    return nearest(Recipe.from_dict(record['recipe']))


def recipe_for(architecture: str, name: str) -> Recipe:
    """A recipe as a network is trained with it: four original blocks from scratch take a tenth of the learning rate."""
    recipe = RECIPES[name]
    tenth = name != 'ft' and architecture.endswith('original_k4')
    return replace(recipe, lr=recipe.lr / 10) if tenth else recipe


def deviations(record: Record, name: str = 'paper', lr: float | None = None,
               model_kwargs: Sequence[str] = ()) -> list[str]:
    """How a run's recipe differs from one of ours, in words; empty where it counts for that recipe's tables.

    Args:
        record: the run's.
        name: the recipe's, a key of `timm_nonlocal.recipes.RECIPES`.
        lr: the learning rate in place of the recipe's.
        model_kwargs: the arguments of the network, as the training command takes them.
    """
    recipe = recipe_for(record['architecture'], name)
    if lr is not None:
        recipe = replace(recipe, lr=lr)
    found = [f'{key.replace("_", " ")} {value} in place of {recipe.to_dict()[key]}'
             for key, value in Recipe.from_dict(record['recipe']).changes(recipe).items()]
    if record.get('limit'):
        found.append(f'the first {record["limit"]} images only')
    if record.get('processes', 1) > 1:
        found.append(f'{record["processes"]} processes' + ' with batch statistics of their own' * (
            not record.get('sync_bn')))
    if bool(record.get('start')) != (name == 'ft'):
        found.append('from scratch' if name == 'ft' else 'from trained weights')
    if (given := record.get('model_kwargs') or []) != list(model_kwargs):
        found.append(f'model arguments {" ".join(given)}' if given else 'no model arguments')
    return found


def tag(record: Record) -> str | None:
    """The tag that a run's weights can have; None where the network or the recipe is none of those that ship."""
    return next((tag for tag, means in TAGS.items() if record['architecture'] in ARCHITECTURES
                 and means.dataset == record['dataset'] and not deviations(record, means.recipe)), None)


def to_ship(records: list[Record]) -> dict[str, Record]:
    """Whose weights ship, by their names: of the runs of a name that did not diverge the one with the median error, the
    lower of two."""
    of_name: dict[str, list[Record]] = {}
    for record in records:
        if (found := tag(record)) and not diverged(record):
            of_name.setdefault(f'{record["architecture"]}.{found}', []).append(record)
    return {name: min(median_records(found), key=lambda record: (record['final_error'], record['seed']))
            for name, found in of_name.items()}


class Counted(NamedTuple):
    """The runs of a network that followed a recipe, each list by seed."""

    finished: list[Record]  # these have a final error
    diverged: list[Record]

    @property
    def all(self) -> list[Record]:
        return sorted(self.finished + self.diverged, key=lambda record: record['seed'])

    @property
    def n(self) -> str:
        """How many have an error, and how many have none."""
        return f'{len(self.finished)}' + f' + {len(self.diverged)} diverged' * bool(self.diverged)


def counted(records: list[Record], architecture: str, dataset: str, name: str = 'paper', lr: float | None = None,
            model_kwargs: Sequence[str] = ()) -> Counted:
    """The runs of a network without `deviations` from a recipe.

    Raises PublishError where the same run is there twice: it would count as two.
    """
    found = sorted((record for record in records
                    if (record['architecture'], record['dataset']) == (architecture, dataset)
                    and not deviations(record, name, lr, model_kwargs)), key=lambda record: record['seed'])
    same = Counter((record['seed'], record.get('mixed_precision')) for record in found)
    for (seed, _), count in same.items():
        if count > 1:
            raise PublishError(f'results.jsonl has two runs of {architecture}.{dataset} with seed {seed}: keep one')
    return Counted([record for record in found if not diverged(record)], [*filter(diverged, found)])


class Summary(NamedTuple):
    """Final test errors of several runs, in per cent."""

    n: int
    median: float
    lowest: float
    highest: float


def summary(finished: list[Record]) -> Summary | None:
    """Of runs that did not diverge; None without any."""
    errors = [record['final_error'] for record in finished]
    return Summary(len(errors), median(errors), min(errors), max(errors)) if errors else None


def median_records(finished: list[Record]) -> list[Record]:
    """The run with the median error, or the two beside it, of runs that did not diverge."""
    by_error = sorted(finished, key=lambda record: record['final_error'])
    return by_error[(len(finished) - 1) // 2:len(finished) // 2 + 1]


class Shipped(NamedTuple):
    """A weight file and the run that made it."""

    name: str
    path: Path
    sha256: str
    record: Record

    @property
    def architecture(self) -> str:
        return self.record['architecture']

    @property
    def dataset(self) -> str:
        return self.record['dataset']

    @property
    def recipe(self) -> str:
        return recipe_name(self.record)


def shipped(records: list[Record], folder: Path = WEIGHTS) -> list[Shipped]:
    """Every weight file of a folder with its run, which its sha256 finds.

    Raises PublishError for a file without a run, with one of another name or one that diverged: nothing honest could be
    said of it.
    """
    by_sha256 = {record['sha256']: record for record in records}
    found = []
    for path in sorted(folder.glob('*.safetensors')):
        name, digest = path.name.removesuffix('.safetensors'), sha256(path)
        record = by_sha256.get(digest)
        if record is None:
            raise PublishError(f'{path.name}: no line of results.jsonl has its sha256 {digest}')
        if name != (made := f'{record["architecture"]}.{tag(record) or record["dataset"]}'):
            raise PublishError(f'{path.name}: results.jsonl says that these weights are {made}')
        if diverged(record):
            raise PublishError(f'{path.name}: its run diverged, so that it has no error to publish')
        found.append(Shipped(name, path, digest, record))
    return found
