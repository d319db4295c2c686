"""Trains a PreResNet (or any timm model that takes 32×32 images) on CIFAR with the paper's recipe.

    accelerate launch -q train/cifar.py --model preresnet20_nl_proposed_k5 --dataset cifar10 --data-dir data

One process on the CPU or a GPU, or several with data parallelism, by the same code; `accelerate launch --help` lists
what the launcher sets (processes, mixed precision). Ctrl-C saves and stops; `--resume auto` continues to the same bits.
"""

import argparse
import ast
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, Python sees train/ only

import timm  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from timm.models import split_model_name_tag  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import timm_nonlocal  # noqa: E402
from timm_nonlocal.checkpoint import near_names  # noqa: E402
from train import run_dir  # noqa: E402
from train.data import DATASETS, DataError, Images, epoch_plan, load, whole_plan  # noqa: E402
from train.progress import Bar  # noqa: E402
from train.run_dir import RunError  # noqa: E402
from train.step import Learner, Recipe, count_wrong  # noqa: E402


class StopRequested:
    """Turns the first Ctrl-C or SIGTERM into a flag that is read between steps; a second Ctrl-C stops at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number, frame) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0], allow_abbrev=False)
    parser.add_argument('--model', default='preresnet20_nl_proposed_k5', help='a timm name; see timm.list_models')
    parser.add_argument('--model-kwargs', nargs='*', default=[], metavar='KEY=VALUE',
                        help="arguments of the model, such as \"nl_args={'affinity': 'uniform'}\"")
    parser.add_argument('--dataset', choices=sorted(DATASETS), default='cifar10')
    parser.add_argument('--data-dir', default='data', help='where torchvision keeps the data set')
    parser.add_argument('--download', action='store_true', help='fetch what is missing there')
    parser.add_argument('--limit', type=int, default=0, metavar='N', help='use the first N images of each split only')
    parser.add_argument('--epochs', type=int, default=recipe.epochs)
    parser.add_argument('--batch-size', type=int, default=recipe.batch_size, help='over all processes together')
    parser.add_argument('--lr', type=float, default=recipe.lr)
    parser.add_argument('--milestones', type=int, nargs='*', default=list(recipe.milestones), metavar='EPOCH',
                        help='epochs at which the learning rate is multiplied by gamma')
    parser.add_argument('--gamma', type=float, default=recipe.gamma)
    parser.add_argument('--momentum', type=float, default=recipe.momentum)
    parser.add_argument('--weight-decay', type=float, default=recipe.weight_decay, help='on every parameter')
    parser.add_argument('--seed', type=int, default=0, help='of the initial weights and of every epoch plan')
    parser.add_argument('--output-dir', help='default: runs/MODEL.DATASET.seedS')
    parser.add_argument('--resume', metavar='auto', choices=['auto'],
                        help='continue the run in --output-dir if there is one, else start it')
    parser.add_argument('--save-seconds', type=float, default=60.0, help='how often the state is saved')
    parser.add_argument('--spectrum-epochs', type=int, nargs='*', default=[], metavar='EPOCH',
                        help='write the spectra of the nonlocal parts after these epochs, as 36 82 125 in Figure 2')
    parser.add_argument('--threads', type=int, default=0, help='of a CPU process (default: its share of the cores)')
    args = parser.parse_args(argv)
    if args.epochs < 1 or args.batch_size < 1:
        parser.error(f'--epochs {args.epochs} --batch-size {args.batch_size}: both must be at least 1')
    return args


def build(args: argparse.Namespace) -> nn.Module:
    """The network with the weights that the seed draws. Raises ValueError for a name or argument that does not fit."""
    architecture, _tag = split_model_name_tag(args.model)
    if not timm.is_model(architecture):
        raise ValueError(f'--model {args.model}: unknown.{near_names(architecture)}')
    kwargs = {}
    for item in args.model_kwargs:
        key, equals, value = item.partition('=')
        if not equals:
            raise ValueError(f'--model-kwargs {item}: write KEY=VALUE')
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    if architecture in timm.list_models('preresnet*'):
        architecture = f'{architecture}.{args.dataset}'  # the tag carries mean and number of classes
    classes = {'cifar10': 10, 'cifar100': 100}[args.dataset]
    torch.manual_seed(args.seed)
    try:
        return timm.create_model(architecture, **{'num_classes': classes, **kwargs})
    except TypeError as error:
        raise ValueError(f'--model-kwargs {" ".join(args.model_kwargs)}: {error}') from error


def describe(args: argparse.Namespace, recipe: Recipe, accelerator: Accelerator) -> dict:
    """Everything that decides the result of a run; a state is only continued by a run that has the same."""
    return {
        'architecture': split_model_name_tag(args.model)[0], 'model_kwargs': args.model_kwargs,
        'dataset': args.dataset, 'limit': args.limit, 'seed': args.seed,
        'recipe': {**asdict(recipe), 'milestones': list(recipe.milestones)},
        'mixed_precision': accelerator.mixed_precision, 'processes': accelerator.num_processes,
    }


def surroundings(accelerator: Accelerator) -> dict:
    commit = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
                            cwd=ROOT, capture_output=True, text=True).stdout.strip()
    cuda = accelerator.device.type == 'cuda'
    return {
        'device': torch.cuda.get_device_name(accelerator.device) if cuda else f'cpu ({platform.machine()})',
        'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
                     'timm_nonlocal': timm_nonlocal.__version__, 'cuda': torch.version.cuda if cuda else None},
        'commit': commit or None,
    }


def open_run(folder: Path, run: dict, resume: bool) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """The tensors by group and the progress to continue from; no tensors for a new run.

    Raises:
        RunError: the folder holds a run that was not asked for, another one, or one that cannot be read.
    """
    if not run_dir.holds_run(folder):
        return {}, {'run': run, 'epoch': 0, 'images': 0, 'seconds': 0.0, 'history': []}
    if not resume:
        raise RunError(f'{folder} already holds a run: continue it with --resume auto, or name another --output-dir')
    parts, progress = run_dir.load_state(folder)
    other = [f'its {key} is {progress["run"].get(key)}, not {run[key]}'
             for key in run if progress['run'].get(key) != run[key]]
    if other:
        raise RunError(f'{folder} holds another run ({"; ".join(other)}): name another --output-dir')
    return parts, progress


def train(args: argparse.Namespace) -> int:
    """One run, from its folder's state to the end. Returns the exit code: 0, or 130 where it was asked to stop."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if accelerator.mixed_precision not in ('no', 'bf16'):
        raise ValueError(f'mixed precision {accelerator.mixed_precision}: use no or bf16')
    if accelerator.device.type == 'cpu':
        torch.set_num_threads(args.threads or max(1, os.cpu_count() // accelerator.num_processes))
    recipe = Recipe(args.epochs, args.batch_size, args.lr, tuple(args.milestones), args.gamma, args.momentum,
                    args.weight_decay)
    run = describe(args, recipe, accelerator)
    folder = Path(args.output_dir or f'runs/{run["architecture"]}.{args.dataset}.seed{args.seed}')
    model = build(args)
    parts, progress = open_run(folder, run, args.resume == 'auto')
    if run_dir.is_finished(folder):
        accelerator.print(f'{folder} is finished: final error {progress["history"][-1]["test_error"]:.2f} %')
        return 0
    train_set, test_set = load(args.dataset, args.data_dir, args.download, args.limit)
    smallest = len(train_set) % recipe.batch_size or recipe.batch_size
    if smallest < 2 * accelerator.num_processes:
        raise ValueError(f'the last batch of an epoch has {smallest} images for {accelerator.num_processes} processes: '
                         f'each needs 2 or more; change --batch-size or --limit')

    model.to(accelerator.device, memory_format=torch.channels_last)
    learner = Learner(accelerator.prepare_model(model), recipe, accelerator.num_processes, accelerator.autocast)
    if parts:
        model.load_state_dict(parts['model'])
        learner.load_momentum(parts['momentum'])
        if accelerator.is_main_process:  # the meters of all processes, summed when they were saved
            learner.loss.copy_(parts['meter']['loss'])
            learner.wrong.copy_(parts['meter']['wrong'])

    trainer = Trainer(args, accelerator, folder, model, learner, progress)
    finished = trainer.run(train_set.to(accelerator.device), test_set.to(accelerator.device))
    if not finished:
        accelerator.print(f'stopped in epoch {progress["epoch"] + 1} after {progress["images"]} of its images; '
                          f'continue with --resume auto')
        return 130
    if accelerator.is_main_process:
        finish(args, accelerator, folder, model, progress)
    return 0


class Trainer:
    """The epochs of a run, with what is saved and shown on the way."""

    def __init__(self, args, accelerator: Accelerator, folder: Path, model: nn.Module, learner: Learner,
                 progress: dict):
        self.args, self.accelerator, self.folder = args, accelerator, folder
        self.model, self.learner, self.progress = model, learner, progress
        self.started = time.monotonic() - progress['seconds']
        self.saved = time.monotonic()

    def run(self, train_set: Images, test_set: Images) -> bool:
        """Trains to the end. Returns False where it was asked to stop before it; the state is saved either way."""
        accelerator, learner, progress, recipe = self.accelerator, self.learner, self.progress, self.learner.recipe
        stop, count = StopRequested(), len(train_set)
        test_part = whole_plan(len(test_set)).to(accelerator.device)[:, self.rank_slice]
        bar = Bar(recipe.epochs * count, progress['epoch'] * count + progress['images'], accelerator.is_main_process)
        with bar:
            for epoch in range(progress['epoch'], recipe.epochs):
                plan = epoch_plan(count, self.args.seed, epoch).to(accelerator.device)
                learner.set_lr(recipe.lr_at(epoch))
                if progress['images'] == 0:
                    learner.reset_meters()
                since, first = time.monotonic(), progress['images']
                while progress['images'] < count:
                    columns = plan[:, progress['images']:progress['images'] + recipe.batch_size]
                    learner.step(train_set, columns[:, self.rank_slice], columns.shape[1])
                    progress['images'] += columns.shape[1]
                    bar.advance(columns.shape[1], learner, progress['images'] / accelerator.num_processes)
                    if self.any_process(stop.requested):
                        self.save()
                        return False
                    if self.any_process(time.monotonic() - self.saved > self.args.save_seconds):
                        self.save()
                sums = accelerator.reduce({'loss': learner.loss, 'wrong': learner.wrong,
                                           'test': count_wrong(self.model, test_set, test_part)}, 'sum')
                seconds = time.monotonic() - since
                progress['history'].append({
                    'epoch': epoch + 1, 'lr': recipe.lr_at(epoch),
                    'train_loss': sums['loss'].item() / count, 'train_error': 100 * sums['wrong'].item() / count,
                    'test_error': 100 * sums['test'].item() / len(test_set),
                    'images_per_second': (count - first) / seconds, 'seconds': seconds,
                })
                if epoch + 1 in self.args.spectrum_epochs and accelerator.is_main_process:
                    run_dir.save_spectra(self.folder, epoch + 1, timm_nonlocal.spectrum(self.model))
                progress['epoch'], progress['images'] = epoch + 1, 0
                bar.epoch(progress['history'][-1], recipe.epochs)
                self.save()
        return True

    @property
    def rank_slice(self) -> slice:
        """This process's share of any columns."""
        return slice(self.accelerator.process_index, None, self.accelerator.num_processes)

    def any_process(self, wish: bool) -> bool:
        """Whether any process wishes it, so that all do it at the same step."""
        if self.accelerator.num_processes == 1:
            return wish
        return self.accelerator.reduce(torch.tensor(float(wish), device=self.accelerator.device), 'sum').item() > 0

    def save(self) -> None:
        self.saved = time.monotonic()
        self.progress['seconds'] = self.saved - self.started
        meters = self.accelerator.reduce({'loss': self.learner.loss, 'wrong': self.learner.wrong}, 'sum')
        if self.accelerator.is_main_process:
            run_dir.save_state(self.folder, {
                'model': self.model.state_dict(), 'momentum': self.learner.momentum(), 'meter': meters}, self.progress)
            if self.progress['history']:
                run_dir.save_curve(self.folder, self.progress['history'])


def finish(args, accelerator: Accelerator, folder: Path, model: nn.Module, progress: dict) -> None:
    """Writes the weights with their config, then the line that says that the run is finished."""
    export = build(args)  # on the CPU, in plain memory order, without what accelerate wrapped around it
    export.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    sha256 = run_dir.save_model(folder, export)
    history = progress['history']
    best = min(history, key=lambda row: row['test_error'])
    run_dir.save_results(folder, {
        **progress['run'], 'final_error': history[-1]['test_error'],
        'best_error': best['test_error'], 'best_epoch': best['epoch'],
        **{key: [row[key] for row in history] for key in ('test_error', 'train_error', 'train_loss')},
        'seconds': progress['seconds'], **surroundings(accelerator), 'sha256': sha256,
    })
    print(f'final error {history[-1]["test_error"]:.2f} % after epoch {len(history)}: '
          f'{folder / run_dir.MODEL}, {run_dir.CONFIG}, {run_dir.RESULTS}')


def main(argv: list[str] | None = None) -> int:
    try:
        return train(parse(argv))
    except (ValueError, DataError, RunError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
