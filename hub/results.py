"""The finished runs in results.jsonl, which of them count for the paper's tables, and whose weights are shipped."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import timm_nonlocal

from . import paper

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


def deviations(run: Run) -> list[str]:
    """How a run's recipe differs from the paper's, in words; empty where it counts for the tables."""
    recipe = paper.recipe(run['architecture'])
    found = [f'{key.replace("_", " ")} {run["recipe"].get(key)} in place of {value}'
             for key, value in recipe.items() if run['recipe'].get(key) != value]
    if run.get('limit'):
        found.append(f'the first {run["limit"]} images only')
    if run.get('model_kwargs'):
        found.append(f'model arguments {" ".join(run["model_kwargs"])}')
    return found


def counted(runs: list[Run], architecture: str, dataset: str) -> list[Run]:
    """The runs of a network that followed the paper's recipe, by seed; those that diverged are among them.

    Raises PublishError where the same run is there twice: it would count as two.
    """
    found = sorted((run for run in runs if (run['architecture'], run['dataset']) == (architecture, dataset)
                    and not deviations(run)), key=lambda run: run['seed'])
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
        if name != f'{run["architecture"]}.{run["dataset"]}':
            raise PublishError(f'{path.name}: results.jsonl says that these weights are {run["architecture"]}.'
                           f'{run["dataset"]}')
        found.append(Shipped(name, path, digest, run))
    return found
