"""The test error of checkpoints: of registered names with weights, run folders and safetensors files.

    python -m train.evaluate NAME… --data-dir DIR

The images are preprocessed as in training, in float32 without TF32, in chunks of one size. What is subtracted is the
mean of the images that the network was trained on, which its line of results names: the mean image of the whole
training set where there is no line, the mean colour for a tag ft_…. Beside it stands the error under timm's
preprocessing, which subtracts the mean colour and is what most users apply.

Where a line of results.jsonl is about these very weights (the folder's own, or hub/results.jsonl's, by sha256), the
count of wrong images is compared with the recorded one. Two devices add in different orders, so that an image may
change sides only where its two highest logits are equal to within rounding, 1e-4 of the largest logit. `ties` counts
those images, and two counts are equal to the last image if they differ by no more than that.

Exit codes: 0 done; 1 a count is not equal to the recorded one; 2 the arguments or the data are off; 3 a target cannot
be found or read.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import split_model_name_tag
from torch import Tensor, nn

from timm_nonlocal.checkpoints.targets import CheckpointError, near_names
from timm_nonlocal.datasets import DATASETS, DataError
from timm_nonlocal.errors import last_line
from timm_nonlocal.models.pretrained import mean_by_tag
from timm_nonlocal.recipes import PAPER
from train.engine.data import Images, load, mean_colour, whole_plan
from train.engine.step import logits_of
from train.options import Parser, whole
from train.records import run_dir
from train.records.runs import ROOT
from train.records.state import RunError

ROUNDING = 1e-4


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, prog='python -m train.evaluate')
    parser.add_argument('targets', nargs='+', metavar='NAME',
                        help='a registered name with weights, a folder with model.safetensors, or a .safetensors file')
    parser.add_argument('--data-dir', default='data', help='where torchvision keeps the data sets')
    parser.add_argument('--results', default=str(ROOT / 'hub' / 'results.jsonl'), metavar='FILE',
                        help='where recorded errors are looked up (default: hub/results.jsonl)')
    parser.add_argument('--limit', type=whole(), default=0, metavar='N',
                        help='use the first N test images only; the mean stays that of the training')
    parser.add_argument('--json', action='store_true', help='print JSON in place of the table')
    return parser.parse_args(argv)


def place(target: str) -> Path:
    """Where a target is, the folder of a model.safetensors."""
    path = Path(target)
    return path.parent if path.is_file() and path.name == run_dir.MODEL else path


def open_target(target: str) -> nn.Module:
    """The network of a target with its weights, as timm makes it.

    Raises:
        CheckpointError: it cannot be found or read, or nothing says what network it is of.
    """
    path = place(target)
    options: dict[str, Any] = {}
    if path.is_dir():
        name = f'local-dir:{path}'
    elif path.is_file():
        name, options = path.stem, {'pretrained_cfg_overlay': {'file': str(path)}}
    else:
        name = target
    architecture = split_model_name_tag(name)[0]
    if not path.is_dir() and not timm.is_model(architecture):
        raise CheckpointError(
            f'{target}: name it ARCHITECTURE.DATASET.safetensors, or put it into a folder with its config.json'
            if path.is_file() else f'{target}: no such file, folder or registered name.{near_names(architecture)}')
    if not path.exists() and not timm.is_model_pretrained(name):
        raise CheckpointError(f'{target} is registered, but has no weights here: name a folder or a file')
    try:
        return timm.create_model(name, pretrained=True, **options)
    except (RuntimeError, OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f'{target} cannot be read: {last_line(error)}') from error


def recorded(target: str, model: nn.Module, published: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The line of results about these very weights: of the target's folder, else of the published ones."""
    own = run_dir.read_results(place(target) / run_dir.RESULTS)
    digest = run_dir.sha256({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    return next((line for line in [*own, *published] if line.get('sha256') == digest), None)


def mean_of(target: str, line: dict[str, Any] | None) -> str:
    """What the network was trained without, see `Recipe.mean`: by its line of results, else by its tag."""
    if line:
        return line['recipe'].get('mean', PAPER.mean)
    tag = split_model_name_tag(Path(target).name.removesuffix('.safetensors'))[1]
    return mean_by_tag(tag)


def evaluate(model: nn.Module, images: Images) -> dict[str, Any]:
    """Wrong images, ties among them and error in %, and the error under timm's preprocessing, on the images' device.

    The latter is None where that also divides by a standard deviation, as for networks of ImageNet: timm would enlarge
    the images too.

    Args:
        images: without the mean that the network was trained without.
    """
    config: Any = model.pretrained_cfg
    timm_images = mean_colour(images, config['mean'])
    model.to(images.labels.device).to(memory_format=torch.channels_last)
    columns = whole_plan(len(images)).to(images.labels.device)
    logits = logits_of(model, images, columns)
    highest = logits.topk(2, dim=1).values
    ties = highest[:, 0] - highest[:, 1] <= ROUNDING * logits.abs().amax(dim=1)

    def count(logits: Tensor) -> int:
        return int((logits.argmax(dim=1) != images.labels).sum())

    wrong, wrong_timm = count(logits), None
    if set(config['std']) == {1.0}:
        same = torch.equal(images.mean, timm_images.mean)
        wrong_timm = wrong if same else count(logits_of(model, timm_images, columns))
    return {'images': len(images), 'wrong': wrong, 'ties': int(ties.sum()), 'error': 100 * wrong / len(images),
            'error_timm': None if wrong_timm is None else 100 * wrong_timm / len(images)}


def rows(args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """A row a target that could be read, and the exit code."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    published, data, found, code = run_dir.read_results(Path(args.results)), {}, [], 0
    for target in args.targets:
        try:
            model = open_target(target)
            dataset = next((name for name, facts in DATASETS.items() if facts.num_classes == model.num_classes), None)
            if dataset is None:
                raise CheckpointError(f'{target} has {model.num_classes} classes: neither CIFAR-10 nor CIFAR-100')
            line = recorded(target, model, published)
            limit = line.get('limit', 0) if line else 0  # of the training images, whose mean is subtracted
            kept = dataset, limit, mean = dataset, limit, mean_of(target, line)
            if kept not in data:
                data[kept] = load(dataset, args.data_dir, limit=limit, mean=mean, test_limit=args.limit)[1].to(device)
        except (CheckpointError, DataError, RunError) as error:
            print(f'error: {error}', file=sys.stderr)
            code = 2 if isinstance(error, DataError) else 3
            continue
        row = {'target': target, 'dataset': dataset, **evaluate(model, data[kept])}
        if line and line.get('images', [0, 0])[1] == row['images']:
            equal = abs(row['wrong'] - line['final_wrong']) <= row['ties']
            row |= {'recorded_wrong': line['final_wrong'], 'equal': equal}
            code = code or int(not equal)
        found.append(row)
    return found, code


def table(found: list[dict[str, Any]]) -> str:
    width = max(len(row['target']) for row in found)
    lines = [f'{"target":<{width}} {"data":<8} {"images":>6} {"wrong":>6} {"ties":>4} {"error %":>7} '
             f'{"timm error %":>12} {"recorded":>8}']
    for row in found:
        record = f'{row["recorded_wrong"]:>8} {"equal" if row["equal"] else "NOT EQUAL"}' if 'equal' in row else '-'
        by_timm = '-' if row['error_timm'] is None else f'{row["error_timm"]:.2f}'
        lines.append(f'{row["target"]:<{width}} {row["dataset"]:<8} {row["images"]:>6} {row["wrong"]:>6} '
                     f'{row["ties"]:>4} {row["error"]:>7.2f} {by_timm:>12} {record:>8}')
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        found, code = rows(args)
    except RunError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found, indent=2))
    elif found:
        print(table(found))
    return code


if __name__ == '__main__':
    sys.exit(main())
