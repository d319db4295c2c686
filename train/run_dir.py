"""What a run leaves in its folder, each file written beside and then renamed, so that none is ever half there.

    state.safetensors   weights, momentum, meters and progress: what --resume continues from
    curve.csv           one row an epoch
    model.safetensors   the final weights, beside
    config.json         what timm.create_model("local-dir:DIR", pretrained=True) reads
    results.jsonl       one line about the finished run
    spectra.jsonl       one line an epoch of --spectrum-epochs
"""

import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from timm_nonlocal.spectrum import Spectrum

STATE, CURVE, MODEL, CONFIG, RESULTS, SPECTRA = (
    'state.safetensors', 'curve.csv', 'model.safetensors', 'config.json', 'results.jsonl', 'spectra.jsonl')


class RunError(Exception):
    """The folder does not hold what was asked of it; the message says what would work."""


def write(path: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write a file beside path, brings it to disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f'{path.name}.{os.getpid()}.part')
    try:
        fill(beside)
        with open(beside, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_state(folder: Path, parts: dict[str, dict[str, Tensor]], progress: dict[str, Any]) -> None:
    """Saves named groups of tensors, and progress (anything JSON), as the state to resume from."""
    tensors = {f'{part}.{name}': tensor.detach().cpu().contiguous()
               for part, group in parts.items() for name, tensor in group.items()}
    write(folder / STATE, lambda path: save_file(tensors, path, {'progress': json.dumps(progress)}))


def load_state(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `save_state` saved. Raises RunError if it cannot be read."""
    path, parts = folder / STATE, defaultdict(dict)
    try:
        with safe_open(path, 'pt') as file:
            for key in file.keys():
                part, _, name = key.partition('.')
                parts[part][name] = file.get_tensor(key)
            return parts, json.loads(file.metadata()['progress'])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f'{path} cannot be resumed from ({error}): delete its folder to start again') from error


def save_curve(folder: Path, history: list[dict[str, Any]]) -> None:
    def fill(path: Path) -> None:
        with open(path, 'w', newline='') as file:
            rows = csv.DictWriter(file, fieldnames=list(history[0]))
            rows.writeheader()
            rows.writerows(history)
    write(folder / CURVE, fill)


def save_model(folder: Path, model: nn.Module) -> str:
    """Writes a timm model's weights and config.json as timm does for the Hub; gives the weights' sha256."""
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        save_for_hf(model, beside, safe_serialization=True)
        for name in (MODEL, CONFIG):
            write(folder / name, lambda path, name=name: shutil.copyfile(Path(beside) / name, path))
    return hashlib.sha256((folder / MODEL).read_bytes()).hexdigest()


def save_results(folder: Path, record: dict[str, Any]) -> None:
    write(folder / RESULTS, lambda path: path.write_text(json.dumps(record) + '\n'))


def save_spectra(folder: Path, epoch: int, records: list[Spectrum]) -> None:
    """Adds the line of an epoch: its number, and `blocks` as the inspect command's JSON has them."""
    path = folder / SPECTRA
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    lines = [line for line in lines if line['epoch'] < epoch]  # a resumed run comes by here again
    lines.append({'epoch': epoch, 'blocks': [record.to_dict() for record in records]})
    write(path, lambda beside: beside.write_text(''.join(f'{json.dumps(line)}\n' for line in lines)))


def is_finished(folder: Path) -> bool:
    return (folder / RESULTS).is_file()


def holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (STATE, MODEL, RESULTS))
