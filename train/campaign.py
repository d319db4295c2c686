"""Does the project's runs that are still missing, each an ordinary run folder made by train/cifar.py.

    python -m train.campaign --output-dir DIR --data-dir DATA

One run a core with one thread each, or one a GPU (there all missing seeds side by side), of this machine or of a Ray
cluster. Run it again with the same DIR until nothing is left: cut runs go on where they were cut, finished ones (in DIR
or in hub/results.jsonl) are not repeated. `train/scheduling/planned.py` is the list; `python -m train.land DIR`
brings what is finished home.

SIGTERM, Ctrl-C and --max-minutes save every run. Exit codes: 0 finished, or the time is over; 1 a run failed, the
others went on; 2 the arguments or DIR are off; 130 stopped by a signal.
"""

import argparse
import csv
import fnmatch
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

STARTED = time.monotonic()  # before the imports, which take seconds on a cold disk

import timm  # noqa: E402

from hub.results import diverged  # noqa: E402
from timm_nonlocal.recipes import RECIPES, nearest  # noqa: E402
from train import cifar  # noqa: E402
from train.engine.stop import Stop, StopReason  # noqa: E402
from train.options import Parser, number, whole  # noqa: E402
from train.records import run_dir, state  # noqa: E402
from train.records.run_dir import read_results  # noqa: E402
from train.records.runs import ROOT, Run  # noqa: E402
from train.records.state import RunError  # noqa: E402
from train.scheduling.planned import PlannedRun, after_divergence, planned_runs  # noqa: E402
from train.scheduling.workers import ENGINES, Local, Ray, Task  # noqa: E402

Engine = Local | Ray
GIVEN = 'model', 'model_kwargs', 'dataset', 'start', 'seeds', 'output_dir'  # options that make a planned run
LOOK = 1.0  # seconds between two looks at what runs
SAVING = 60.0  # seconds before --max-minutes at which runs are told to stop, at most a tenth of it


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, prog='python -m train.campaign')
    parser.add_argument('--output-dir', required=True, type=Path, metavar='DIR')
    parser.add_argument('--data-dir', default='data', help='where torchvision keeps the data sets')
    parser.add_argument('--only', nargs='+', metavar='PATTERN',
                        help="runs whose name matches, in the patterns' order, such as 'preresnet20_nl_*_k4.*'")
    parser.add_argument('--results', type=Path, default=ROOT / 'hub' / 'results.jsonl', metavar='FILE',
                        help='runs that are not repeated (default: hub/results.jsonl)')
    parser.add_argument('--max-minutes', type=number(), default=0.0, metavar='M',
                        help='save and stop before M minutes')
    parser.add_argument('--engine', choices=list(ENGINES), default='local', help='this machine, or a Ray cluster')
    parser.add_argument('--jobs', type=whole(1), metavar='N',
                        help='runs at once (default: one a core, or one a GPU; more share a GPU)')
    parser.add_argument('--dry-run', action='store_true', help='print what would be done, and touch nothing')
    parser.add_argument('options', nargs=argparse.REMAINDER, metavar='-- OPTION…',
                        help='further options of train/cifar.py, such as --save-seconds 300')
    args = parser.parse_args(argv)
    args.options = [word for word in args.options if word != '--']
    return args


def wanted(only: list[str] | None) -> list[PlannedRun]:
    """The runs that were asked for, in the order to do them. Raises ValueError if no name matches."""
    if not only:
        return planned_runs()
    found = [planned for pattern in only for planned in planned_runs() if fnmatch.fnmatch(planned.name, pattern)]
    if not found:
        raise ValueError(f'--only {" ".join(only)}: no run has such a name; --dry-run lists them')
    return list({planned.name: planned for planned in found}.values())


@dataclass
class Job:
    """What makes one run, or several seeds side by side on a GPU."""

    group: list[PlannedRun]
    slot: int
    task: Task


class Campaign:
    """The runs that are wanted, what a folder and the published results have of them, and what runs."""

    def __init__(self, args: argparse.Namespace, engine: Engine):
        self.folder, self.data, self.options = args.output_dir, args.data_dir, args.options
        self.planned = wanted(args.only)
        self.published = {self.key(Run.from_dict(line)): line for line in read_results(args.results)}
        self.engine, self.jobs = engine, list[Job]()
        self.failed: list[str] = []
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f'--output-dir {self.folder} is a file: name a folder')
        for planned in list(self.planned):
            self.follow(planned, self.record(planned))

    # What there is

    def place(self, row: str, seed: int) -> Path:
        """A run's folder; that of several seeds side by side holds one a seed."""
        beside = self.folder / row / f'seed{seed}'
        return beside if beside.is_dir() else self.folder / f'{row}.seed{seed}'

    def place_of(self, planned: PlannedRun) -> Path:
        return self.place(planned.run.row, planned.run.seed)

    @staticmethod
    def key(run: Run, starts: bool = False) -> tuple[Run, bool]:
        """What makes a published run the one that is planned: not from which weights, but whether from any."""
        return replace(run, start=None, test_every=1, compile=False), starts or bool(run.start)

    def record(self, planned: PlannedRun) -> dict[str, Any] | None:
        """The line about a finished run, of its folder or published."""
        own = read_results(self.place_of(planned) / run_dir.RESULTS)
        return own[0] if own else self.published.get(self.key(planned.run, bool(planned.start)))

    def begun(self, planned: PlannedRun) -> list[PlannedRun]:
        """The run, with those that were saved side by side with it; none where nothing was saved."""
        run = planned.run
        for folder in sorted((self.folder / run.row).glob('seed*')):
            if run.seed in (seeds := state.seeds(folder / run_dir.STATE)):
                return [replace(planned, run=replace(run, seed=seed)) for seed in seeds]
        return [planned] if run_dir.holds_run(self.place_of(planned)) else []

    def start(self, planned: PlannedRun) -> str | None:
        """What --start is given: '' where nothing is, None while the weights do not exist."""
        if not planned.start:
            return ''
        first = self.place(planned.start, seed=0)
        if any(not diverged(line) for line in read_results(first / run_dir.RESULTS)):
            return str(first)
        return planned.start if timm.is_model_pretrained(planned.start) else None

    def condition(self, planned: PlannedRun) -> str:
        """'done', 'running', 'failed', 'waiting', 'cut' or 'missing'."""
        if self.record(planned):
            return 'done'
        if any(planned in job.group for job in self.jobs):
            return 'running'
        if planned.name in self.failed:
            return 'failed'
        if self.start(planned) is None:
            return 'waiting'
        return 'cut' if self.begun(planned) else 'missing'

    # What is done about it

    def words(self, group: list[PlannedRun]) -> list[str]:
        """The arguments of train/cifar.py for a run, or for one that differs in its seeds only."""
        run, name = group[0].run, nearest(group[0].run.recipe)
        flags = {'--model': run.architecture, '--dataset': run.dataset, '--data-dir': self.data, '--recipe': name,
                 '--test-every': run.test_every, '--resume': 'auto',
                 '--output-dir': self.place_of(group[0]) if len(group) == 1 else self.folder / run.row}
        flags |= {f'--{key.replace("_", "-")}': value for key, value in run.recipe.changes(RECIPES[name]).items()}
        if start := self.start(group[0]):
            flags['--start'] = start
        words = [str(word) for pair in flags.items() for word in pair]
        words += ['--model-kwargs', *run.model_kwargs] if run.model_kwargs else []
        return [*words, '--seeds', *(str(planned.run.seed) for planned in group)]

    def check_options(self) -> None:
        """Raises ValueError where a further option is one that the campaign gives; one that is off ends the process."""
        words = self.words(self.planned[:1])
        own, asked = (vars(cifar.parse([*words, *more])) for more in (list[str](), self.options))
        if taken := [name for name in GIVEN if own[name] != asked[name]]:
            raise ValueError(f'-- {" ".join(self.options)}: the campaign itself gives --{taken[0].replace("_", "-")}')

    def begin(self, group: list[PlannedRun], slot: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f'{group[0].name}.log'
        self.jobs.append(Job(group, slot, self.engine.begin(
            [cifar.__file__, *self.words(group), *self.options], slot, log, group[0].run.mixed_precision)))

    def next_group(self) -> list[PlannedRun]:
        """The next run that can begin, cut ones first: with those that it was saved with, or on a GPU with the other
        seeds of it that nobody has begun."""
        found = [(planned, self.condition(planned)) for planned in self.planned]
        if cut := next((planned for planned, condition in found if condition == 'cut'), None):
            return self.begun(cut)
        missing = [planned for planned, condition in found if condition == 'missing']
        return [planned for planned in missing if planned is missing[0] or (self.engine.gpu
                and replace(planned.run, seed=0) == replace(missing[0].run, seed=0))]

    def reap(self) -> None:
        """Lets go of processes that have ended; a short run that diverged is followed by one with a lower rate."""
        for job in [job for job in self.jobs if job.task.poll() is not None]:
            self.jobs.remove(job)
            for planned in job.group:
                record = self.record(planned)
                if not record:
                    if (code := job.task.poll()) not in (StopReason.TIME, StopReason.SIGNAL, -signal.SIGTERM):
                        self.failed.append(planned.name)
                        print(f'{planned.name}: failed with exit code {code}, see {job.group[0].name}.log', flush=True)
                    continue
                said = (f'diverged, its loss not finite at step {record["diverged_step"]}' if diverged(record) else
                        f'final error {record["final_error"]:.2f} %')
                print(f'{planned.name}: {said}', flush=True)
                self.follow(planned, record)

    def follow(self, planned: PlannedRun, record: dict[str, Any] | None) -> None:
        """Puts what is to follow a run that diverged behind it."""
        follower = after_divergence(planned) if record and diverged(record) else None
        if follower and follower.name not in {other.name for other in self.planned}:
            self.planned.insert(self.planned.index(planned) + 1, follower)

    def run(self, stop: Stop) -> None:
        """Keeps every core or GPU at work until nothing is left or there is a reason to stop; then all runs save."""
        try:
            while not stop.reason:
                self.reap()
                busy = {job.slot for job in self.jobs}
                for slot in self.engine.slots:
                    if slot not in busy and (group := self.next_group()):
                        self.begin(group, slot)
                if not self.jobs:
                    return
                time.sleep(LOOK)
        finally:  # also where a file in DIR is off
            for job in self.jobs:
                job.task.stop()
        while self.jobs:
            time.sleep(LOOK)
            self.reap()

    def table(self) -> str:
        """A line a run: its condition, and of what has begun the epoch and the hours left."""
        width = max(len(planned.name) for planned in self.planned)
        lines = [f'{"run":<{width}}  {"":<8} {"epoch":>8} {"hours left":>10}']
        counts: dict[str, int] = {}
        for planned in self.planned:
            condition = self.condition(planned)
            counts[condition] = counts.get(condition, 0) + 1
            epochs, seconds = pace(self.place_of(planned) / run_dir.CURVE)
            left = f'{seconds * (planned.run.recipe.epochs - epochs) / 3600:.1f}' if epochs else ''
            begun = [f'{epochs}/{planned.run.recipe.epochs}', left] if condition in ('running', 'cut') else ['', '']
            lines.append(f'{planned.name:<{width}}  {condition:<8} {begun[0]:>8} {begun[1]:>10}'.rstrip())
        lines.append(', '.join(f'{count} {condition}' for condition, count in counts.items()))
        return '\n'.join(lines)


def pace(curve: Path) -> tuple[int, float]:
    """How many epochs a run's curve has, and the mean seconds of the last ones."""
    found = list(csv.DictReader(curve.read_text().splitlines())) if curve.is_file() else []
    last = [float(row['seconds']) for row in found[-5:]]
    return len(found), sum(last) / max(1, len(last))


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        campaign = Campaign(args, ENGINES[args.engine](args.jobs))
        campaign.check_options()  # once, not run by run
        if args.dry_run:
            print(campaign.table())
            return 0
        minutes = args.max_minutes - min(SAVING / 60, args.max_minutes / 10)
        with Stop(minutes, STARTED) as stop:
            print(campaign.table(), flush=True)
            campaign.run(stop)
        print(campaign.table(), flush=True)
    except (ValueError, RunError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the second one: the runs save without us
        return StopReason.SIGNAL
    return StopReason.SIGNAL if stop.signalled else 1 if campaign.failed else 0


if __name__ == '__main__':
    sys.exit(main())
