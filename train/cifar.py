"""Trains a PreResNet (or any timm model that takes 32×32 images) on CIFAR with the paper's recipe.

    accelerate launch -q train/cifar.py --model preresnet20_nl_proposed_k5 --dataset cifar10 --data-dir data

One process on the CPU or a GPU, or several, by the same code; `accelerate launch --help` lists what the launcher sets
(processes, mixed precision). Ctrl-C saves and stops; `--resume auto` continues, on the CPU to the same bits.

Several seeds train side by side: one process takes them all, several processes deal them out. One seed on several
processes is trained by all of them, each with its share of every batch.

Exit codes: 0 finished; 2 the arguments, the data or the folder are off; 124 --max-minutes is over; 130 Ctrl-C or
SIGTERM. They are those of `python train/cifar.py`, which is all that one process needs (ACCELERATE_MIXED_PRECISION=bf16
sets its precision). A launcher ends with 1 in place of 2, 124 and 130: torchrun, and accelerate on several processes,
with a traceback and a report that has our code as `exitcode`; `accelerate launch` of one process with a traceback that
-q leaves out. Ctrl-C shows the launcher's own KeyboardInterrupt while the run saves. SIGTERM reaches the run through
torchrun; `accelerate launch` of one process ends alone and leaves it running.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

STARTED = time.monotonic()  # before the imports, which take seconds on a cold disk
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, Python sees train/ only

import timm  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from timm.models import split_model_name_tag  # noqa: E402
from torch import Tensor  # noqa: E402

from timm_nonlocal.datasets import DATASETS, DataError  # noqa: E402
from timm_nonlocal.errors import first_line  # noqa: E402
from timm_nonlocal.recipes import ANNEALS, MEANS, PAPER, RECIPES  # noqa: E402
from train.engine.data import load  # noqa: E402
from train.engine.execution import Execution  # noqa: E402
from train.engine.loop import Trainer  # noqa: E402
from train.engine.processes import Processes, end  # noqa: E402
from train.engine.progress import Bar  # noqa: E402
from train.engine.stop import Stop, StopReason  # noqa: E402
from train.options import Parser, number, recipe_of, take_tag, whole  # noqa: E402
from train.records import run_dir, state  # noqa: E402
from train.records.runs import Run, Start  # noqa: E402
from train.records.state import Progress, RunError  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--model', default='preresnet20_nl_proposed_k5', metavar='NAME',
                        help='a timm name, see timm.list_models. A tag says the data set, and one with ft_ the recipe '
                             'ft: preresnet56.cifar100, preresnet20.ft_cifar10. It loads no weights, see --start')
    parser.add_argument('--model-kwargs', nargs='*', default=[], metavar='KEY=VALUE',
                        help="arguments of the model, such as \"nl_args={'affinity': 'uniform'}\"")
    parser.add_argument('--dataset', choices=sorted(DATASETS), help="default: the tag's, else cifar10")
    parser.add_argument('--data-dir', default='data', help='where torchvision keeps the data set')
    parser.add_argument('--download', action='store_true', help='fetch what is missing there')
    parser.add_argument('--limit', type=whole(), default=0, metavar='N',
                        help='use the first N images of each split only')
    recipe = parser.add_argument_group('recipe', 'a recipe, and what differs from it')
    recipe.add_argument('--recipe', choices=list(RECIPES),
                        help="the paper's (default), the same in a tenth of its length, or ft (default of a tag ft_…): "
                             'from trained weights (--start)')
    recipe.add_argument('--epochs', type=whole(1))
    recipe.add_argument('--batch-size', type=whole(1), help='over all processes together')
    recipe.add_argument('--lr', type=number(above=True), help='the highest learning rate')
    recipe.add_argument('--milestones', type=whole(), nargs='*', metavar='EPOCH',
                        help='epochs at which the learning rate is multiplied by gamma')
    recipe.add_argument('--gamma', type=number())
    recipe.add_argument('--momentum', type=number())
    recipe.add_argument('--weight-decay', type=number(), help='on every parameter')
    recipe.add_argument('--nesterov', action=argparse.BooleanOptionalAction, default=None)
    recipe.add_argument('--warmup', type=number(most=1), metavar='FRACTION',
                        help='of all steps, in which the rate grows to lr')
    recipe.add_argument('--anneal', choices=ANNEALS, help='by the milestones, or linearly to zero')
    recipe.add_argument('--mean', choices=MEANS, help='subtract the mean image, or the mean colour')
    parser.add_argument('--start', metavar='NAME|FILE|FOLDER',
                        help='trained weights of the backbone; the nonlocal modules begin as the identity')
    parser.add_argument('--test-every', type=whole(1), default=1, metavar='N',
                        help='epochs; the last one is always tested')
    parser.add_argument('--seed', '--seeds', type=int, nargs='+', default=[0], dest='seeds', metavar='SEED',
                        help='of the initial weights and of every epoch plan; several train side by side')
    parser.add_argument('--output-dir', help='default: runs/MODEL.DATASET.seedS; of several seeds the folder with '
                                             'their folders, runs/MODEL.DATASET by default')
    parser.add_argument('--resume', metavar='auto', choices=['auto'],
                        help='continue the run in --output-dir if there is one, else start it')
    parser.add_argument('--save-seconds', type=number(), default=60.0, help='how often the state is saved')
    parser.add_argument('--max-minutes', type=number(), default=0.0, metavar='M',
                        help='save and stop before M minutes are over; --resume auto continues')
    parser.add_argument('--spectrum-epochs', type=whole(1), nargs='*', metavar='EPOCH',
                        help="keep the spectra of the nonlocal modules after these epochs (default: Figure 2's, as "
                             'fractions of the run, and the last)')
    parser.add_argument('--compile', action='store_true', help='the step goes through torch.compile')
    parser.add_argument('--no-graph', action='store_true', help='on a GPU: no CUDA graph')
    parser.add_argument('--deterministic', action='store_true', help='on a GPU: the same bits every time')
    parser.add_argument('--sync-bn', action='store_true', help='several GPUs: batch statistics over all of them')
    parser.add_argument('--log-with', nargs='+', default=[], metavar='TRACKER', choices=sorted(LOGGER_TYPE_TO_CLASS),
                        help='log every epoch with tensorboard, wandb, trackio or another tracker of accelerate')
    parser.add_argument('--threads', type=whole(), default=0,
                        help='of a CPU process (default: its share of those it may use, see OMP_NUM_THREADS)')
    args = parser.parse_args(argv)
    try:
        take_tag(args)
    except ValueError as error:
        parser.error(str(error))
    args.recipe = recipe_of(args)
    if (last := max(args.spectrum_epochs or [0])) > args.recipe.epochs:
        parser.error(f'--spectrum-epochs {last}: the run has {args.recipe.epochs} epochs')
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f'--seeds {" ".join(map(str, args.seeds))}: each only once')
    missing = sorted(set(args.log_with) - {str(tracker) for tracker in get_available_trackers()})
    if missing:
        parser.error(f'--log-with {" ".join(missing)}: not installed; pip install {" ".join(missing)}')
    return args


def runs_of_process(args: argparse.Namespace, accelerator: Accelerator,
                    start: Start | None = None) -> tuple[list[Run], list[Path], Processes]:
    """The runs of this process, their folders, and the processes that share them.

    Raises:
        ValueError: the numbers of seeds and of processes, or the options, do not fit together.
    """
    if accelerator.mixed_precision not in ('no', 'bf16'):
        raise ValueError(f'mixed precision {accelerator.mixed_precision}: use no or bf16')
    count = accelerator.num_processes
    if 1 < len(args.seeds) < count:
        raise ValueError(f'{len(args.seeds)} seeds on {count} processes: one seed, or at least as many as processes')
    shared = len(args.seeds) == 1
    if args.sync_bn and not (shared and count > 1 and accelerator.device.type == 'cuda'):
        raise ValueError('--sync-bn is for one seed on several GPUs')
    architecture = split_model_name_tag(args.model)[0]
    runs = [Run(architecture, args.dataset, seed, args.recipe, model_kwargs=tuple(args.model_kwargs), limit=args.limit,
                mixed_precision=accelerator.mixed_precision, compile=args.compile, processes=count if shared else 1,
                start=start, test_every=args.test_every)
            for seed in args.seeds]
    folders = [output_dir(args) if shared else output_dir(args) / f'seed{seed}' for seed in args.seeds]
    if shared:
        return runs, folders, Processes(accelerator)
    own = slice(accelerator.process_index, None, count)
    return runs[own], folders[own], Processes()


def output_dir(args: argparse.Namespace) -> Path:
    """The folder of the run, or that of the folders of several."""
    seed = f'.seed{args.seeds[0]}' if len(args.seeds) == 1 else ''
    return Path(args.output_dir or f'runs/{split_model_name_tag(args.model)[0]}.{args.dataset}{seed}')


def spectrum_epochs(args: argparse.Namespace) -> list[int]:
    """The epochs asked for, or Figure 2's and the last as fractions of the run."""
    if args.spectrum_epochs is not None:
        return args.spectrum_epochs
    return sorted({max(1, round(args.recipe.epochs * epoch / PAPER.epochs)) for epoch in (36, 82, 125, PAPER.epochs)})


def open_start(name: str) -> tuple[Start, dict[str, Tensor]]:
    """The weights that --start names: a registered name's, a safetensors file's or a run's.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    path = Path(name)
    try:
        if path.exists():
            weights = load_file(path / run_dir.MODEL if path.is_dir() else path)
        else:
            weights = timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError, SafetensorError) as error:
        known = [known for known in timm.list_pretrained('preresnet*') if '_nl_' not in known]
        raise ValueError(f'--start {name}: {first_line(error)}. Name a safetensors file, a folder '
                         f'with {run_dir.MODEL}, or a name with weights: {", ".join(known) or "none yet"}') from error
    weights = {key: tensor.contiguous() for key, tensor in weights.items()}
    return Start(path.name if path.exists() else name, run_dir.sha256(weights)), weights


def train(args: argparse.Namespace) -> int:
    """Trains on the processes that were launched. Returns the exit code."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), log_with=args.log_with or None,
                              project_dir=output_dir(args))
    if accelerator.device.type == 'cpu':
        torch.set_num_threads(args.threads or max(1, usable_cores() // accelerator.num_processes))
    with ExitStack() as locks:
        reason = train_runs(args, accelerator, locks)
    end(accelerator)
    return reason


def usable_cores() -> int:
    """How many threads torch would take, which follows OMP_NUM_THREADS, and no more than this process has cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(torch.get_num_threads(), cores) if 'OMP_NUM_THREADS' in os.environ else cores


def train_runs(args: argparse.Namespace, accelerator: Accelerator, locks: ExitStack) -> StopReason:
    """The runs of this process, from their folders' state to the end, or to where there is a reason to stop.

    Args:
        locks: holds the runs' folders until all of it is over.
    """
    execution = Execution(not args.no_graph, args.deterministic, args.sync_bn)
    execution.prepare(accelerator.device)
    start, weights = open_start(args.start) if args.start else (None, None)
    runs, folders, processes = runs_of_process(args, accelerator, start)
    for folder in folders:
        run_dir.check_place(folder)
    runs[0].check()  # what does not fit is said before anything is read
    for folder in folders if processes.first else []:
        locks.enter_context(run_dir.locked(folder))
    saved = read_state(folders, runs, args.resume == 'auto')
    if run_dir.is_finished(folders):
        for folder in folders if processes.first else []:
            record, = run_dir.read_results(folder / run_dir.RESULTS)
            print(f'{folder} is finished: final error {record["final_error"]:.2f} %')
        return StopReason.NONE
    train_set, test_set = load(args.dataset, args.data_dir, download=args.download, limit=args.limit,
                               mean=args.recipe.mean)
    trainer = Trainer(runs, train_set.to(accelerator.device), test_set.to(accelerator.device),
                      execution=execution, processes=processes, spectrum_epochs=spectrum_epochs(args))
    if saved:
        trainer.restore(*saved, str(folders[0]))
    elif weights:
        trainer.start_from(weights)

    def save(tensors: dict[str, Tensor], progress: Progress) -> None:
        state.save(folders[0] / run_dir.STATE, tensors, progress)
        for folder, kept in zip(folders, progress['runs'], strict=True):
            run_dir.save_curve(folder, kept['history'])
            if kept['spectra']:
                run_dir.write_lines(folder / run_dir.SPECTRA, kept['spectra'])

    if args.log_with:
        options = {**vars(args), **args.recipe.to_dict()}
        accelerator.init_trackers('timm_nonlocal', {key: value for key, value in options.items()
                                                    if isinstance(value, (int, float, str))})
    epoch, images = trainer.progress['epoch'], trainer.progress['images']
    with (Stop(args.max_minutes, STARTED) as stop,
          Bar(args.recipe.epochs * len(train_set), epoch * len(train_set) + images,
              accelerator.is_main_process) as bar):
        reason = trainer.run(stop, save, args.save_seconds, bar, on_epoch=log_to(accelerator, runs))
    if not reason and processes.first:
        finish(trainer, folders)
    elif reason and processes.first:
        print(f'stopped in epoch {trainer.progress["epoch"] + 1} after {trainer.progress["images"]} of its images; '
              f'continue with --resume auto')
    return reason


def read_state(folders: list[Path], runs: list[Run], resume: bool) -> tuple[dict[str, Tensor], Progress] | None:
    """What was saved, or None for new runs.

    Raises:
        RunError: the folders hold runs that were not asked for, other ones, or ones that cannot be read.
    """
    taken = [folder for folder in folders if run_dir.holds_run(folder)]
    if not taken:
        return None
    if not resume:
        raise RunError(f'{taken[0]} already holds a run: continue it with --resume auto, or name another --output-dir')
    try:
        tensors, progress = state.load(folders[0] / run_dir.STATE)
    except RunError as error:
        raise RunError(f'{error}: name another --output-dir, or delete {taken[0]} to start again') from error
    run_dir.check_same_runs(runs, progress, str(folders[0]))
    return tensors, progress


def log_to(accelerator: Accelerator, runs: list[Run]) -> Callable[[list[dict[str, Any] | None]], None] | None:
    """Gives an epoch's rows to the trackers, under seedS/ where there are several seeds."""
    def log(rows: list[dict[str, Any] | None]) -> None:
        values = {f'seed{run.seed}/{key}' if len(runs) > 1 else key: value
                  for run, row in zip(runs, rows, strict=True) if row
                  for key, value in row.items() if key != 'epoch' and value is not None}
        accelerator.log(values, step=next(row['epoch'] for row in rows if row))
    return log if accelerator.log_with else None


def finish(trainer: Trainer, folders: list[Path]) -> None:
    """Writes the weights with their config, then the line that says that the run is finished."""
    for folder, run, (record, weights) in zip(folders, trainer.runs, trainer.results(kind='own'), strict=True):
        run_dir.save_model(folder, run, weights)
        run_dir.write_lines(folder / run_dir.RESULTS, [{**record, 'sha256': run_dir.sha256(weights)}])
        if record['diverged_epoch']:
            print(f'diverged: the training loss of epoch {record["diverged_epoch"]} is not finite')
        print(f'final error {record["final_error"]:.2f} % after epoch {len(record["test_error"])}: '
              f'{folder / run_dir.MODEL}, {run_dir.CONFIG}, {run_dir.RESULTS}')


def main(argv: list[str] | None = None) -> int:
    try:
        return train(parse(argv))
    except (ValueError, DataError, RunError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first step, or the second one
        return StopReason.SIGNAL


if __name__ == '__main__':
    sys.exit(main())
