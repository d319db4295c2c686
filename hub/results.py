"""The finished runs in results.jsonl, which of them count for the paper's tables, and whose weights are shipped."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import timm_nonlocal
from timm_nonlocal.models.pretrained import TAGS
from timm_nonlocal.recipes import RECIPES, Recipe, nearest

HUB = Path(__file__).parent
RESULTS = HUB / 'results.jsonl'
WEIGHTS = Path(timm_nonlocal.__file__).with_name('weights')
Run = dict[str, Any]  # one line; the fields are those that the training command writes
FIELDS = {'architecture', 'dataset', 'seed', 'recipe', 'final_error', 'best_error', 'best_epoch', 'train_loss',
          'train_error', 'test_error', 'sha256'}  # that no card can do without


class PublishError(Exception):
    """Something to publish is missing or does not fit; the message says what would work."""


def load(path: Path = RESULTS) -> list[Run]:
    """Every line of a results file, none if there is no file. Raises PublishError for a line that is not a run."""
    runs = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
        try:
            run = json.loads(line)
            missing = FIELDS - run.keys()
        except (ValueError, AttributeError) as error:
            raise PublishError(f'{path}, line {number} is not a JSON object: {error}') from error
        if missing:
            raise PublishError(f'{path}, line {number} lacks {", ".join(sorted(missing))}')
        runs.append(run)
    return runs


def recipe_name(run: Run) -> str:
    """The recipe in `timm_nonlocal.recipes.RECIPES` that a run followed, or came nearest to."""
    return nearest(Recipe.from_dict(run['recipe']))


def recipe_for(architecture: str, name: str) -> Recipe:
    """A recipe as a network is trained with it: four original blocks from scratch take a tenth of the learning rate."""
    recipe = RECIPES[name]
    tenth = name != 'ft' and architecture.endswith('original_k4')
    return replace(recipe, lr=recipe.lr / 10) if tenth else recipe


def deviations(run: Run, name: str = 'paper') -> list[str]:
    """How a run's recipe differs from one of ours, in words; empty where it counts for that recipe's tables."""
    changes = Recipe.from_dict(run['recipe']).changes(recipe := recipe_for(run['architecture'], name))
    found = [f'{key.replace("_", " ")} {value} in place of {recipe.to_dict()[key]}' for key, value in changes.items()]
    if run.get('limit'):
        found.append(f'the first {run["limit"]} images only')
    if run.get('processes', 1) > 1:
        found.append(f'{run["processes"]} processes with batch statistics of their own')
    if name == 'ft' and not run.get('start'):
        found.append('from scratch')
    if run.get('model_kwargs'):
        found.append(f'model arguments {" ".join(run["model_kwargs"])}')
    return found


def tag(run: Run) -> str | None:
    """The tag that a run's weights can have; None where they followed none of the recipes that ship."""
    return next((tag for tag, means in TAGS.items()
                 if means.dataset == run['dataset'] and not deviations(run, means.recipe)), None)


def to_ship(runs: list[Run]) -> dict[str, Run]:
    """Whose weights ship, by their names: of the runs of a name that did not diverge the one with the median error, the
    lower of two."""
    of_name: dict[str, list[Run]] = {}
    for run in runs:
        if (found := tag(run)) and run.get('diverged_epoch') is None:
            of_name.setdefault(f'{run["architecture"]}.{found}', []).append(run)
    return {name: min(median_runs(found), key=lambda run: (run['final_error'], run['seed']))
            for name, found in of_name.items()}


def counted(runs: list[Run], architecture: str, dataset: str, name: str = 'paper') -> list[Run]:
    """The runs of a network that followed a recipe, by seed; those that diverged are among them.

    Raises PublishError where the same run is there twice: it would count as two.
    """
    found = sorted((run for run in runs if (run['architecture'], run['dataset']) == (architecture, dataset)
                    and not deviations(run, name)), key=lambda run: run['seed'])
    same = Counter((run['seed'], run.get('mixed_precision')) for run in found)
    for (seed, _), count in same.items():
        if count > 1:
            raise PublishError(f'results.jsonl has two runs of {architecture}.{dataset} with seed {seed}: keep one')
    return found


class Summary(NamedTuple):
    """Final test errors of several runs, in per cent."""

    n: int
    median: float
    lowest: float
    highest: float


def summary(runs: list[Run]) -> Summary | None:
    errors = [run['final_error'] for run in runs]
    return Summary(len(errors), median(errors), min(errors), max(errors)) if errors else None


def median_runs(runs: list[Run]) -> list[Run]:
    """The run with the median error, or the two beside it."""
    by_error = sorted(runs, key=lambda run: run['final_error'])
    return by_error[(len(runs) - 1) // 2:len(runs) // 2 + 1]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(path: Path, text: str) -> None:
    """Writes beside and renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f'.part.{path.name}')
    beside.write_text(text)
    beside.replace(path)


class Shipped(NamedTuple):
    """A weight file and the run that made it."""

    name: str
    path: Path
    sha256: str
    run: Run

    @property
    def architecture(self) -> str:
        return self.run['architecture']

    @property
    def dataset(self) -> str:
        return self.run['dataset']

    @property
    def recipe(self) -> str:
        return recipe_name(self.run)


def shipped(runs: list[Run], folder: Path = WEIGHTS) -> list[Shipped]:
    """Every weight file of a folder with its run, which its sha256 finds.

    Raises PublishError for a file without a run, or with one of another name: nothing honest could be said of it.
    """
    by_sha256 = {run['sha256']: run for run in runs}
    found = []
    for path in sorted(folder.glob('*.safetensors')):
        name, digest = path.name.removesuffix('.safetensors'), sha256(path)
        run = by_sha256.get(digest)
        if run is None:
            raise PublishError(f'{path.name}: no line of results.jsonl has its sha256 {digest}')
        if name != (made := f'{run["architecture"]}.{tag(run) or run["dataset"]}'):
            raise PublishError(f'{path.name}: results.jsonl says that these weights are {made}')
        found.append(Shipped(name, path, digest, run))
    return found
