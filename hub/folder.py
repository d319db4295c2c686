"""The folder that is published for a weight file.

    model.safetensors   the weight file, byte for byte
    config.json         what timm.create_model('hf-hub:…') builds the network from
    README.md           its card
    inspect.json        what the inspect command says of it, and its picture
    spectrum.png            (neither for a network without nonlocal blocks)
    curve.csv           loss and errors after every epoch, and their picture
    curve.png
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import timm
from timm.models import save_for_hf

from timm_nonlocal.datasets import DATASETS

from . import cards, drawing
from .card import published
from .results import HUB, PublishError, Record, Shipped

__all__ = ['WEIGHTS', 'build', 'child_environment', 'last_line']

WEIGHTS, CONFIG, CARD, INSPECTION = 'model.safetensors', 'config.json', 'README.md', 'inspect.json'
NO_NONLOCAL_BLOCK = 4  # an exit code of the inspect command


def build(file: Shipped, records: list[Record], namespace: str, folder: Path) -> None:
    """Fills an empty folder; the same weights and results give the same bytes.

    It is the committed card that is published: what was written into it by hand comes along.

    Raises:
        PublishError: the card is missing or not what the results make it, or the weights cannot be inspected.
    """
    card = cards.path_of(file)
    if not card.is_file() or card.read_text() != cards.current(file, records):
        raise PublishError(f'its card {card.relative_to(HUB.parent)} is not what the results make it: run '
                           f'python -m hub.cards')
    _config(file, folder)
    shutil.copyfile(file.path, folder / WEIGHTS)
    (folder / CARD).write_text(published(card.read_text(), namespace))
    _curve(file.record, folder)
    _inspection(folder)


def _config(file: Shipped, folder: Path) -> None:
    """timm's own export. Its record of the number of classes would reach transformers' wrapper twice, so it goes."""
    save_for_hf(timm.create_model(file.name, pretrained=True), str(folder), safe_serialization=True,
                model_config={'label_names': list(DATASETS[file.dataset].labels)})
    config = json.loads((folder / CONFIG).read_text())
    config.get('model_args', {}).pop('num_classes', None)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n')


def _curve(record: Record, folder: Path) -> None:
    columns = ('train_loss', 'train_error', 'test_error')
    with open(folder / 'curve.csv', 'w', newline='') as file:
        rows = csv.writer(file)
        rows.writerow(('epoch', *columns))
        rows.writerows((epoch, *values) for epoch, values in
                       enumerate(zip(*(record[column] for column in columns), strict=True), start=1))
    drawing.curve(folder / 'curve.png', record)


def _inspection(folder: Path) -> None:
    """The inspect command as a user runs it beside the file, so that what it prints names no path of this machine."""
    command = [sys.executable, '-m', 'timm_nonlocal.inspect', WEIGHTS, '--json', '--plot', 'spectrum.png']
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=child_environment())
    if result.returncode == 0:
        (folder / INSPECTION).write_text(result.stdout)
    elif result.returncode != NO_NONLOCAL_BLOCK:
        raise PublishError(f'inspect failed ({result.returncode}): {last_line(result.stderr)}')


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment, in which a child finds hub and timm_nonlocal wherever it runs."""
    path = os.pathsep.join(filter(None, (str(HUB.parent), os.environ.get('PYTHONPATH'))))
    return {**os.environ, 'PYTHONPATH': path, **more}


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ['no reason given'])[-1]
