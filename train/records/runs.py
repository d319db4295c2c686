"""A run: everything that decides its result, the network it starts from, and the line that is written about it."""

import ast
import inspect
import math
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import split_model_name_tag
from torch import Tensor, nn

import timm_nonlocal
from timm_nonlocal.checkpoints.targets import near_names
from timm_nonlocal.datasets import DATASETS
from timm_nonlocal.errors import first_line
from timm_nonlocal.models.pretrained import TAGS, Tag
from timm_nonlocal.recipes import PAPER, RECIPES, Recipe, nearest, recipe_id

__all__ = ['ROOT', 'Run', 'Start', 'describe_result', 'nonlocal_choices', 'parse_kwargs', 'surroundings']

ROOT = Path(__file__).resolve().parents[2]
SIDE = 32  # of CIFAR's images


@dataclass(frozen=True)
class Start:
    """Trained weights that a run begins with: what they are called, and the sha256 of their safetensors file.

    The same weights under another name are the same start.
    """

    name: str = field(compare=False)
    sha256: str


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        architecture: a timm name without tag.
        dataset: 'cifar10' or 'cifar100'.
        seed: of the initial weights and of every epoch plan.
        recipe: the schedule.
        model_kwargs: arguments of the model as KEY=VALUE.
        limit: use the first `limit` images of each split only (0 uses all).
        mixed_precision: 'no' or 'bf16'.
        compile: the step goes through torch.compile, whose rounding differs.
        processes: how many share every batch, each with the batch-norm statistics of its share.
        start: the trained weights of the backbone that it begins with; None begins with what the seed draws.
        test_every: the test set is looked at after every such epoch, and after the last.
    """

    architecture: str
    dataset: str = 'cifar10'
    seed: int = 0
    recipe: Recipe = PAPER
    model_kwargs: tuple[str, ...] = ()
    limit: int = 0
    mixed_precision: str = 'no'
    compile: bool = False
    processes: int = 1
    start: Start | None = None
    test_every: int = 1

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them; a state is only continued by a run that has the same."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**own, 'recipe': self.recipe.to_dict(), 'model_kwargs': list(self.model_kwargs),
                'start': self.start and asdict(self.start)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> 'Run':
        """The run that a line of results is about. Raises KeyError or TypeError if it is not such a line."""
        own = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        start = record.get('start')
        return cls(**{**own, 'recipe': Recipe.from_dict(record['recipe']), 'start': start and Start(**start),
                      'model_kwargs': tuple(record['model_kwargs'])})

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two runs the same run, however else they were computed."""
        return (self.architecture, self.dataset, self.seed, self.recipe, self.model_kwargs, self.limit,
                self.mixed_precision, self.processes, self.start)

    @cached_property
    def row(self) -> str:
        """The run without its seed, in letters that every file system and tensor name takes."""
        name = nearest(self.recipe)
        changes = [name] if name != 'paper' else []
        changes += [f'{key}{value}' for key, value in self.recipe.changes(RECIPES[name]).items()]
        changes += [*self.model_kwargs, *([f'limit{self.limit}'] if self.limit else [])]
        changes += ['fp32'] if self.mixed_precision == 'no' else []
        return '.'.join([self.architecture, self.dataset,
                         *(re.sub(r'[^A-Za-z0-9.]+', '-', change).strip('-') for change in changes)])

    @property
    def name(self) -> str:
        return f'{self.row}.seed{self.seed}'

    def build(self) -> nn.Module:
        """The network with the weights that the seed draws, on the CPU.

        Raises:
            ValueError: a name or an argument that does not fit.
        """
        architecture, _tag = split_model_name_tag(self.architecture)
        if not timm.is_model(architecture):
            raise ValueError(f'--model {self.architecture}: unknown.{near_names(architecture)}')
        kwargs = parse_kwargs(self.model_kwargs)
        if architecture in timm.list_models('preresnet*'):
            means = Tag(self.dataset, nearest(self.recipe))
            tag = next((tag for tag in TAGS if TAGS[tag] == means), self.dataset)
            architecture = f'{architecture}.{tag}'  # carries mean and number of classes
        torch.manual_seed(self.seed)
        try:
            return timm.create_model(architecture, **{'num_classes': DATASETS[self.dataset].num_classes, **kwargs})
        except Exception as error:  # networks of all kinds raise errors of all kinds
            raise ValueError(f'{self._words}: {first_line(error)}') from error

    @property
    def _words(self) -> str:
        """The options that say which network it is."""
        given = ['--model-kwargs', *self.model_kwargs] if self.model_kwargs else []
        return ' '.join(['--model', self.architecture, *given])

    def check(self) -> None:
        """Puts two images through the network.

        Raises:
            ValueError: a name or an argument does not fit, or the network is not one of the data set's images and
                classes.
        """
        data, model = DATASETS[self.dataset], self.build().eval()
        try:
            with torch.no_grad():
                logits = model(torch.zeros(2, 3, SIDE, SIDE))
        except Exception as error:  # as above
            raise ValueError(f'{self._words} does not take images of 3×{SIDE}×{SIDE} ({first_line(error)}); some '
                             f'networks of a fixed size do with --model-kwargs img_size={SIDE}') from error
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if shape != (2, data.num_classes):
            raise ValueError(f'{self._words} gives {shape} for two images of {data.title}, where a classifier gives '
                             f'{(2, data.num_classes)}: leave out what changes that')


def parse_kwargs(items: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE to arguments; a value that is no Python literal is a string. Raises ValueError without '='."""
    kwargs = {}
    for item in items:
        key, equals, value = item.partition('=')
        if not equals:
            raise ValueError(f'--model-kwargs {item}: write KEY=VALUE')
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    return kwargs


def nonlocal_choices(model: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
    """What the nonlocal modules of a network were made with, the defaults among it; None for a network without any.

    Args:
        given: the network's `nl_args`.
    """
    modules = [module for module in model.modules()
               if isinstance(module, (timm_nonlocal.NonlocalBlocks, timm_nonlocal.NonlocalStage))]
    if not modules:
        return None
    first = modules[0]
    proposed = isinstance(first, timm_nonlocal.NonlocalStage)
    signature = inspect.signature(timm_nonlocal.NonlocalStage if proposed else timm_nonlocal.NonlocalBlock)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()
                if name not in ('dim', 'k', 'device', 'dtype')}
    block: Any = first.sub_blocks[0]
    holder: Any = first if proposed else block  # of the affinity
    return {
        'kind': 'proposed' if proposed else 'original', 'places': len(modules), 'k': len(first.sub_blocks),
        **defaults, **given,
        'scale': holder.affinity.scale, 'normalize': holder.affinity.normalize,
        'inner_dim': block.g.out_features,
    }


def surroundings(device: torch.device) -> dict[str, Any]:
    """Where a run was computed: device, versions, commit (GIT_COMMIT in a copy of the tree without its history)."""
    try:
        commit = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
                                cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ''
    cuda = device.type == 'cuda'
    return {
        'device': torch.cuda.get_device_name(device) if cuda else f'{device.type} ({platform.machine()})',
        'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
                     'timm_nonlocal': timm_nonlocal.__version__, 'cuda': torch.version.cuda if cuda else None},
        'commit': commit or os.environ.get('GIT_COMMIT'),
    }


def describe_result(run: Run, history: list[dict[str, Any]], images: Sequence[int],
                    spectra: Sequence[dict[str, Any]] = (), **more: Any) -> dict[str, Any]:
    """The line of results.jsonl about a finished run.

    Args:
        history: a row an epoch; an epoch whose training loss was not finite is the last, with None for the loss.
        images: how many there are to train on and to test on.
        spectra: after chosen epochs, of which the line has the eigenvalues with six digits.
        more: what else is known: seconds, device, versions, sha256 of the weights.
    """
    model = run.build()
    best = min((row for row in history if row['test_error'] is not None), key=lambda row: row['test_error'])
    last = history[-1]
    return {
        **run.to_dict(), 'recipe_name': nearest(run.recipe), 'recipe_id': recipe_id(run.recipe),
        'nonlocal': nonlocal_choices(model, parse_kwargs(run.model_kwargs).get('nl_args') or {}),
        'parameters': sum(p.numel() for p in model.parameters()), 'images': list(images),
        'steps': last['step'] if 'step' in last else len(history) * math.ceil(images[0] / run.recipe.batch_size),
        'final_error': last['test_error'], 'final_wrong': last['test_wrong'],
        'diverged_epoch': last['epoch'] if last['train_loss'] is None else None,
        'diverged_step': last.get('step') if last['train_loss'] is None else None,
        'best_error': best['test_error'], 'best_epoch': best['epoch'],
        **{key: [row[key] for row in history] for key in ('test_error', 'train_error', 'train_loss')},
        'spectra': [{'epoch': entry['epoch'], 'blocks': [
            {'stage': block['stage'], 'index': block['index'],
             'eigenvalues': [float(f'{value:.6g}') for value in block['eigenvalues']]} for block in entry['blocks']]}
            for entry in spectra],
        **more,
    }
