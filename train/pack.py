"""A campaign's folder: few files, each small enough to travel, and enough to go on from anywhere.

    results.jsonl              one line a finished run, in the order in which they finished
    weights-NNN.safetensors    final weights of several runs, `<run>/<tensor>`; a run's line says in which file
    state-RUN.safetensors      runs that were cut, side by side (train/state.py); RUN is the first of them

To go on elsewhere only results.jsonl and the states are needed.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from train import state
from train.run_dir import RESULTS, read_results, sha256, write_lines
from train.runs import Run
from train.state import RunError, write

FILE_LIMIT = 63 * 2 ** 18  # bytes, a little less than the 16 MiB that a file may have to travel


class Pack:
    """The folder of a campaign. It is made when something is first written."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def results(self) -> list[dict[str, Any]]:
        """The lines about finished runs. Raises RunError for a damaged file."""
        return read_results(self.folder / RESULTS)

    def state_path(self, run: Run) -> Path:
        """Where the state of runs side by side is, of which this is the first."""
        return self.folder / f'state-{run.name}.safetensors'

    def cut_runs(self) -> list[list[Run]]:
        """The runs of every state in the folder."""
        names = {path.name.replace('.previous.safetensors', '.safetensors')
                 for path in self.folder.glob('state-*.safetensors')}
        found = []
        for name in sorted(names):
            for path in (self.folder / name, state.previous(self.folder / name)):
                try:
                    with safe_open(path, 'pt') as file:
                        progress = json.loads(file.metadata()['progress'])
                    found.append([Run.from_dict(saved['run']) for saved in progress['runs']])
                    break
                except (OSError, SafetensorError, KeyError, TypeError, ValueError):
                    continue
        return found

    def progress(self, run: Run) -> dict[str, Any]:
        """How far the runs of a state are, of which this is the first. Raises RunError if it cannot be read."""
        return state.load(self.state_path(run), tell=lambda line: None)[1]

    def forget(self, run: Run) -> None:
        """Removes the state of runs side by side, of which this is the first."""
        path = self.state_path(run)
        state.previous(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def add(self, records: Sequence[dict[str, Any]], weights: Sequence[dict[str, Tensor]]) -> None:
        """Adds finished runs: their weights first and their lines last, so that a line never promises too much.

        Args:
            records: their lines, without the weights' sha256 and file.

        Raises:
            RunError: a file cannot be written; what was there is unharmed.
        """
        lines = [{**record, 'sha256': sha256(tensors), 'weights': self._add_weights(Run.from_dict(record), tensors)}
                 for record, tensors in zip(records, weights, strict=True)]
        write_lines(self.folder / RESULTS, [*self.results, *lines])

    def _add_weights(self, run: Run, tensors: dict[str, Tensor]) -> str:
        """Puts weights into the last file, or the next where it is full or elsewhere; gives the file's name."""
        used = {line['weights'] for line in self.results} | {path.name for path in self.folder.glob('weights-*')}
        last = max((int(name[8:11]) for name in used), default=0)
        path = self.folder / f'weights-{last:03d}.safetensors'
        tensors = {f'{run.name}/{name}': tensor for name, tensor in tensors.items()}
        together = {**read_weights(path), **tensors} if path.is_file() else tensors
        if path.name in used and (not path.is_file() or sum(t.nbytes for t in together.values()) > FILE_LIMIT):
            path, together = self.folder / f'weights-{last + 1:03d}.safetensors', tensors
        write(path, lambda beside: beside.write_bytes(to_bytes(together)))
        return path.name

    def weights(self, record: dict[str, Any]) -> dict[str, Tensor] | None:
        """The weights of a finished run by its line; None where their file is elsewhere.

        Raises:
            RunError: the file cannot be read, or does not hold what the line says.
        """
        path, name = self.folder / record['weights'], Run.from_dict(record).name
        if not path.is_file():
            return None
        tensors = {key.removeprefix(f'{name}/'): tensor for key, tensor in read_weights(path).items()
                   if key.startswith(f'{name}/')}
        if sha256(tensors) != record['sha256']:
            raise RunError(f'{path} does not hold the weights of {name} that its line of {RESULTS} is about')
        return tensors


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file of weights. Raises RunError if it cannot be read."""
    try:
        with safe_open(path, 'pt') as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise RunError(f'{path} is not a readable safetensors file: {error}') from error
