"""What runs leave in their folders, each file written beside and then renamed, so that none is ever half there.

    state.safetensors   what --resume continues from, see `state`; seeds side by side: in the first one's folder
    curve.csv           one row an epoch
    model.safetensors   the final weights, beside
    config.json         what timm.create_model("local-dir:DIR", pretrained=True) reads
    results.jsonl       one line about the finished run
    spectra.jsonl       one line an epoch of --spectrum-epochs, `blocks` as the inspect command's JSON has them
    .lock               while a process trains there
"""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from safetensors.torch import save as to_bytes
from timm.models import save_for_hf
from torch import Tensor

from hub.results import PublishError, load
from train.records import state
from train.records.runs import Run, parse_kwargs
from train.records.state import Progress, RunError, write, writing

__all__ = ['CONFIG', 'CURVE', 'MODEL', 'RESULTS', 'SPECTRA', 'STATE', 'check_place', 'check_same_runs', 'holds_run',
           'is_finished', 'locked', 'read_results', 'save_curve', 'save_model', 'sha256', 'write_lines']

STATE, CURVE, MODEL, CONFIG, RESULTS, SPECTRA = (
    'state.safetensors', 'curve.csv', 'model.safetensors', 'config.json', 'results.jsonl', 'spectra.jsonl')


def sha256(weights: dict[str, Tensor]) -> str:
    """Of the safetensors file with these weights."""
    return hashlib.sha256(to_bytes(weights)).hexdigest()


def save_curve(folder: Path, history: list[dict[str, Any]]) -> None:
    def fill(path: Path) -> None:
        with open(path, 'w', newline='') as file:
            rows = csv.DictWriter(file, fieldnames=list(history[-1]))  # rows of older states have fewer fields
            rows.writeheader()
            rows.writerows(history)
    if history:
        write(folder / CURVE, fill)


def save_model(folder: Path, run: Run, weights: dict[str, Tensor]) -> None:
    """Writes weights and config.json as timm does for the Hub; timm before 1.0.31 records no arguments unasked."""
    model = run.build()
    model.load_state_dict(weights)
    with writing(folder / MODEL), tempfile.TemporaryDirectory() as beside:
        save_for_hf(model, beside, model_args=parse_kwargs(run.model_kwargs), safe_serialization=True)
        for name in (MODEL, CONFIG):
            write(folder / name, partial(shutil.copyfile, Path(beside) / name))


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes a .jsonl, a line a record."""
    write(path, lambda beside: beside.write_text(''.join(json.dumps(record, allow_nan=False) + '\n'
                                                         for record in records)))


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a results.jsonl; none where there is no such file.

    Raises:
        RunError: a line is not about a run.
    """
    try:
        records = load(path)
        for record in records:
            Run.from_dict(record)
    except (PublishError, KeyError, TypeError, ValueError) as error:
        raise RunError(f'{error}' if isinstance(error, PublishError) else
                       f'{path} has a line that is not about a run ({type(error).__name__}: {error})') from error
    return records


def check_place(folder: Path) -> None:
    """Raises RunError where a file stands in the way of a run's folder."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise RunError(f'--output-dir {path} is a file: name a folder')


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a run's folder and keeps other processes from training in it; one that stays empty goes again.

    Where the system or the file system has no locks nobody is kept from it.

    Raises:
        RunError: another process trains there, or the folder cannot be made.
    """
    if fcntl is None:
        yield
        return
    path, new = folder / '.lock', not folder.exists()
    with contextlib.ExitStack() as stack:
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, 'a'))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = os.fstat(file.fileno()).st_nlink == 0  # the other one ended just now and took its file away
        except OSError as error:  # others than BlockingIOError come from file systems without locks
            taken = isinstance(error, BlockingIOError)
        if taken:
            raise RunError(f'{folder} is in use by another process: wait for it, or name another --output-dir')
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                if new:
                    folder.rmdir()  # where nothing was saved


def holds_run(folder: Path) -> bool:
    return state.exists(folder / STATE) or any((folder / name).exists() for name in (MODEL, RESULTS))


def is_finished(folders: Sequence[Path]) -> bool:
    return all((folder / RESULTS).is_file() for folder in folders)


def check_same_runs(runs: Sequence[Run], progress: Progress, source: str) -> None:
    """Raises RunError if a saved progress is not that of these runs."""
    saved = [Run.from_dict(state['run']) for state in progress['runs']]
    if len(saved) != len(runs):
        seeds = ' '.join(str(run.seed) for run in saved)
        raise RunError(f'{source} goes on with all that were saved in it, --seeds {seeds}: ask for those, or name '
                       f'another --output-dir')
    for run, was in zip(runs, saved, strict=True):
        asked, kept = run.to_dict(), was.to_dict()
        for fields in asked, kept:  # the recipe's fields are options of their own
            fields |= fields.pop('recipe')
        other = [f'its {key.replace("_", " ")} is {kept[key]}, not {asked[key]}' for key in asked
                 if kept[key] != asked[key] and (key != 'start' or was.start != run.start)]
        if other:
            raise RunError(f'{source} holds another run ({"; ".join(other)}): name another --output-dir')
