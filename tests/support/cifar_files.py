"""A small CIFAR-10 in the published files' form."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.process import ROOT


def _write_batch(folder: Path, name: str, fields: dict[str, Any]) -> str:
    data = pickle.dumps(fields, protocol=2)
    (folder / name).write_bytes(data)
    return hashlib.md5(data).hexdigest()


def make_cifar10(folder: Path, per_batch: int = 24, test: int = 20) -> Path:
    """A CIFAR-10 folder of random images whose label shows in their colour, in the published layout.

    torchvision checks the published md5 sums; `md5.json` holds those of these files, which `accept` puts in place, and
    the folder's `sitecustomize.py` calls it in every Python process that has the folder on its path.
    """
    generator = np.random.default_rng(0)
    base = folder / 'cifar-10-batches-py'
    base.mkdir(parents=True)
    sums = {}
    for name, count in [*((f'data_batch_{i}', per_batch) for i in range(1, 6)), ('test_batch', test)]:
        labels = generator.integers(0, 10, count)
        images = generator.integers(0, 120, (count, 3, 1024)) + labels[:, None, None] * 12
        sums[name] = _write_batch(base, name, {'data': images.astype(np.uint8).reshape(count, -1),
                                               'labels': labels.tolist()})
    sums['batches.meta'] = _write_batch(base, 'batches.meta', {'label_names': [f'class{i}' for i in range(10)]})
    (folder / 'md5.json').write_text(json.dumps(sums))
    (folder / 'sitecustomize.py').write_text(
        f'import sys\nsys.path.append({str(ROOT)!r})\n'
        f'from tests.support.small_data import accept_when_imported\n'
        f'accept_when_imported({str(folder / "md5.json")!r})\n')
    return folder
