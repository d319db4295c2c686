"""The table of all models in README.md, and weights/index.json, which tells the package about its weight files.

    python -m hub.zoo [--check]

Both are made from the registered models, the files in timm_nonlocal/weights and hub/results.jsonl; a file is known by
its sha256. --check writes nothing. Exit codes: 0 done; 1 --check found something out of date; 2 a file that cannot be
accounted for.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_nonlocal.preresnet import ARCHITECTURES
from timm_nonlocal.pretrained import DATASETS

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS, RESULTS, README = (
    Path(path) for path in ('timm_nonlocal/weights', 'hub/results.jsonl', 'README.md'))  # below the root
MARKERS = '<!-- models: python -m hub.zoo -->\n', '<!-- end of models -->\n'


class ZooError(Exception):
    """Something cannot be accounted for; the message says what would help."""


def create(name: str) -> nn.Module:
    return timm.create_model(name, device='meta').eval()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module) -> int:
    """Multiply-adds of one image of the size in the model's config."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *model.pretrained_cfg['input_size'], device='meta'))
    return counter.get_total_flops() // 2


def index(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """What weights/index.json should say: about each file, and as before about weights that are on the Hub alone.

    Raises:
        ZooError: a file that no line of results.jsonl tells of, or of another network.
    """
    results, old = root / RESULTS, root / WEIGHTS / 'index.json'
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    by_sum = {line['sha256']: line for line in lines}
    entries = json.loads(old.read_text()) if old.is_file() else {}
    for file in sorted((root / WEIGHTS).glob('*.safetensors')):
        name, sha256 = file.name.removesuffix('.safetensors'), hashlib.sha256(file.read_bytes()).hexdigest()
        line = by_sum.get(sha256)
        if line is None or name != f'{line["architecture"]}.{line["dataset"]}':
            raise ZooError(f'{WEIGHTS / file.name}: no line of {RESULTS} has its sha256 {sha256} and its name; '
                           f'add the line that its run left, or take the file out')
        model = create(name)
        entries[name] = {
            **entries.get(name, {}), 'sha256': sha256, 'num_params': parameters(model), 'macs': macs(model),
            'test_error': line['final_error'],
            'recipe': f'accelerate launch train/cifar.py --model {line["architecture"]} --dataset {line["dataset"]} '
                      f'--epochs {line["recipe"]["epochs"]} --seed {line["seed"]}',
        }
    return dict(sorted(entries.items()))


def table(entries: dict[str, dict[str, Any]]) -> str:
    """Every architecture as a row of Markdown: parameters, multiply-adds, and the test error of each tag's weights."""
    rows = [['architecture', 'parameters', 'MACs', *(f'error on {data.title}' for data in DATASETS.values())],
            ['---', *['---:'] * 4]]
    for name in [*ARCHITECTURES, *timm.list_models(module='resnet_nl')]:
        model = create(name)
        row = [f'`{name}`', f'{parameters(model):,}', f'{macs(model) / 1e6:,.1f} M']
        for tag in DATASETS:
            error = entries.get(f'{name}.{tag}', {}).get('test_error')
            row.append(f'{error:.2f} %' if error is not None else 'no weights' if name in ARCHITECTURES else '—')
        rows.append(row)
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def made(root: Path = ROOT) -> dict[Path, str]:
    """The files that the command writes, and what belongs into them."""
    readme, entries = (root / README).read_text(), index(root)
    try:
        before, rest = readme.split(MARKERS[0])
        _, after = rest.split(MARKERS[1])
    except ValueError:
        raise ZooError(f'{README}: put the table between one line {MARKERS[0].strip()} '
                       f'and one {MARKERS[1].strip()}') from None
    files = {root / README: before + MARKERS[0] + table(entries) + MARKERS[1] + after}
    if entries:
        files[root / WEIGHTS / 'index.json'] = json.dumps(entries, indent=1) + '\n'
    return files


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m hub.zoo', description=__doc__.split('\n\n')[0], allow_abbrev=False)
    parser.add_argument('--check', action='store_true', help='only say what is out of date')
    args = parser.parse_args(argv)
    try:
        stale = {path: text for path, text in made(root).items() if not path.is_file() or path.read_text() != text}
    except ZooError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    for path, text in stale.items():
        if args.check:
            print(f'{path.relative_to(root)} is out of date: run python -m hub.zoo', file=sys.stderr)
            continue
        beside = path.with_name(f'{path.name}.{os.getpid()}.part')
        beside.write_text(text)
        os.replace(beside, path)
        print(f'{path.relative_to(root)} written')
    return 1 if args.check and stale else 0


if __name__ == '__main__':
    sys.exit(main())
