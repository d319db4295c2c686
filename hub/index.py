"""The table of all models in README.md, and weights/index.json, which tells the package about its weight files.

    python -m hub.index [--check] [--namespace NS]

Both are made from the registered models, the files in timm_nonlocal/weights and hub/results.jsonl. --check writes
nothing. --namespace says once under whose name `hub.publish` has published the files: where the package then lacks one,
pretrained=True takes it from there. Exit codes: 0 done; 1 --check found something out of date; 2 the weights, the
results or README.md are off.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_nonlocal.datasets import DATASETS
from timm_nonlocal.files import write_text
from timm_nonlocal.models.preresnet import ARCHITECTURES
from timm_nonlocal.models.pretrained import TAGS
from timm_nonlocal.recipes import RECIPES, Recipe

from .generated import replace_block
from .results import PublishError, Record, load, recipe_name, shipped

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS, RESULTS, README = (
    Path(path) for path in ('timm_nonlocal/weights', 'hub/results.jsonl', 'README.md'))  # below the root


def create(name: str) -> nn.Module:
    return timm.create_model(name, device='meta').eval()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module) -> int:
    """Multiply-adds of one image of the size in the model's config."""
    cfg: Any = model.pretrained_cfg
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *cfg['input_size'], device='meta'))
    return counter.get_total_flops() // 2


def command(record: Record) -> str:
    """The command that makes the run of a line of results.jsonl."""
    def words(value: Any) -> list[str]:
        return [shlex.quote(str(word)) for word in (value if isinstance(value, list) else [value])]

    recipe, name = Recipe.from_dict(record['recipe']), recipe_name(record)
    options = {'model': record['architecture'], 'dataset': record['dataset'], 'seed': record['seed'], 'recipe': name,
               **recipe.changes(RECIPES[name]), **({'start': record['start']['name']} if record.get('start') else {}),
               **{key: record[key] for key in ('model_kwargs', 'limit', 'compile') if record.get(key)},
               **({'test_every': record['test_every']} if record.get('test_every', 1) > 1 else {})}
    given = []
    for key, value in options.items():
        flag = key.replace('_', '-')
        given += [f'--{"" if value else "no-"}{flag}'] if isinstance(value, bool) else [f'--{flag}', *words(value)]
    precision = record.get('mixed_precision', 'no')
    return ' '.join(['accelerate launch --mixed_precision', precision, 'train/cifar.py', *given])


def index(root: Path = ROOT, namespace: str | None = None) -> dict[str, dict[str, Any]]:
    """What weights/index.json should say: about each file, and as before about weights that are on the Hub.

    Raises:
        PublishError: a file that no line of results.jsonl accounts for, see `results.shipped`.
    """
    path = root / WEIGHTS / 'index.json'
    old = json.loads(path.read_text()) if path.is_file() else {}
    entries = {name: entry for name, entry in old.items() if entry.get('hf_hub_id')}
    for file in shipped(load(root / RESULTS), root / WEIGHTS):
        model, record = create(file.name), file.record
        entries[file.name] = {
            **old.get(file.name, {}), **({'hf_hub_id': f'{namespace}/{file.name}'} if namespace else {}),
            'sha256': file.sha256, 'num_params': parameters(model), 'macs': macs(model),
            'test_error': record['final_error'],
            'recipe': command(record),
        }
    return dict(sorted(entries.items()))


def table(entries: dict[str, dict[str, Any]]) -> str:
    """Markdown: the test errors of what has weights, and folded every architecture with its size.

    A row for each choice of nonlocal modules, as in the paper's tables, and columns for each backbone.
    """
    depths, modules = (list(dict.fromkeys(name.partition('_')[part] for name in ARCHITECTURES)) for part in (0, 2))
    errors = {name: f'{entry["test_error"]:.2f}' for name, entry in entries.items() if 'test_error' in entry}
    trained = {(name.partition('_')[0].partition('.')[0], name.partition('.')[2]) for name in errors}
    tags = {depth: [tag for tag in TAGS if (depth, tag) in trained] for depth in depths}
    shown = [depth for depth in depths if tags[depth]]
    weights = [['nonlocal modules', *(f'{depth}{what}' for depth in shown for what in (
        *(f', {DATASETS[TAGS[tag].dataset].title}, {TAGS[tag].recipe}' for tag in tags[depth]), ', parameters'))]]
    sizes = [['nonlocal modules', *(f'{depth}{what}' for depth in depths for what in (', parameters', ', MACs'))]]
    for rows in (weights, sizes):
        rows.append(['---', *['---:'] * (len(rows[0]) - 1)])
    for rest in modules:
        name, own = f'`…_{rest}`' if rest else 'none', {depth: f'{depth}_{rest}' if rest else depth for depth in depths}
        size = {depth: _size(own[depth]) for depth in depths}
        found = {depth: [errors.get(f'{own[depth]}.{tag}', '') for tag in tags[depth]] for depth in shown}
        if any(map(any, found.values())):
            weights.append([name, *(cell for depth in shown for cell in (*found[depth], size[depth][0]))])
        sizes.append([name, *(figure for depth in depths for figure in size[depth])])
    others = ', '.join(f'`{name}` ({" parameters, ".join(_size(name))} MACs)'
                       for name in timm.list_models(module='resnet_nl'))
    summary = f'All {len(ARCHITECTURES)} names, their parameters and multiply-adds, beside {others}'
    return '\n'.join([*(_rows(weights) if shown else ['No weights yet.']), '',
                      f'<details><summary>{summary}</summary>', '', *_rows(sizes), '', '</details>'])


def _size(name: str) -> list[str]:
    """Parameters and multiply-adds of an architecture."""
    model = create(name)
    return [f'{parameters(model):,}', f'{macs(model) / 1e6:,.1f} M']


def _rows(table: list[list[str]]) -> list[str]:
    return [f'| {" | ".join(row)} |' for row in table]


def made(root: Path = ROOT, namespace: str | None = None) -> dict[Path, str]:
    """The files that the command writes, and what belongs into them."""
    entries = index(root, namespace)
    try:
        readme = replace_block((root / README).read_text(), 'models', 'hub.index', table(entries))
    except PublishError as error:
        raise PublishError(f'{README}: {error}') from error
    return {root / README: readme, root / WEIGHTS / 'index.json': json.dumps(entries, indent=1) + '\n'}


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m hub.index', description=__doc__.split('\n\n')[0], allow_abbrev=False)
    parser.add_argument('--check', action='store_true', help='only say what is out of date')
    parser.add_argument('--namespace', metavar='NS', help='the user or organisation that the files are published under')
    args = parser.parse_args(argv)
    try:
        stale = {path: text for path, text in made(root, args.namespace).items()
                 if not path.is_file() or path.read_text() != text}
    except PublishError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    for path, text in stale.items():
        if args.check:
            print(f'{path.relative_to(root)} is out of date: run python -m hub.index', file=sys.stderr)
            continue
        write_text(path, text)
        print(f'{path.relative_to(root)} written')
    return 1 if args.check and stale else 0


if __name__ == '__main__':
    sys.exit(main())
