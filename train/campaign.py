"""Does the project's runs that are still missing, each an ordinary run folder made by train/cifar.py.

    python -m train.campaign --output-dir DIR --data-dir DATA

One run a core with one thread each, or one a GPU (there all missing seeds of a row side by side), of this machine or of
a Ray cluster. Run it again with the same DIR until nothing is left: cut runs go on where they were cut, finished ones
(in DIR or in hub/results.jsonl) are not repeated. `train/scheduling/planned.py` is the list; `python -m train.land DIR`
brings what is finished home.

SIGTERM, Ctrl-C and --max-minutes save every run. Exit codes: 0 finished, or the time is over; 1 a run failed, the
others went on; 2 the arguments or DIR are off; 130 stopped by a signal.
"""

import argparse
import csv
import fnmatch
import inspect
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

STARTED = time.monotonic()  # before the imports, which take seconds on a cold disk

import timm  # noqa: E402

import timm_nonlocal  # noqa: E402
from timm_nonlocal.recipes import RECIPES, nearest  # noqa: E402
from train.engine.stop import Stop  # noqa: E402
from train.records import run_dir  # noqa: E402
from train.records.run_dir import read_results  # noqa: E402
from train.records.runs import ROOT, parse_kwargs  # noqa: E402
from train.records.state import RunError  # noqa: E402
from train.scheduling.planned import Row, after_divergence, rows  # noqa: E402
from train.scheduling.workers import ENGINES, Local, Ray, Task  # noqa: E402

Engine = Local | Ray
LOOK = 1.0  # seconds between two looks at what runs
SAVING = 60.0  # seconds before --max-minutes at which runs are told to stop, at most a tenth of it


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m train.campaign', description=__doc__.split('\n\n')[0], allow_abbrev=False)
    parser.add_argument('--output-dir', required=True, type=Path, metavar='DIR')
    parser.add_argument('--data-dir', default='data', help='where torchvision keeps the data sets')
    parser.add_argument('--only', nargs='+', metavar='PATTERN',
                        help="runs whose name matches, in the patterns' order, such as 'preresnet20_nl_*_k4.*'")
    parser.add_argument('--results', type=Path, default=ROOT / 'hub' / 'results.jsonl', metavar='FILE',
                        help='runs that are not repeated (default: hub/results.jsonl)')
    parser.add_argument('--max-minutes', type=float, default=0.0, metavar='M', help='save and stop before M minutes')
    parser.add_argument('--engine', choices=list(ENGINES), default='local', help='this machine, or a Ray cluster')
    parser.add_argument('--jobs', type=int, metavar='N', help='runs at once (default: one a core, or one a GPU)')
    parser.add_argument('--dry-run', action='store_true', help='print what would be done, and touch nothing')
    parser.add_argument('options', nargs=argparse.REMAINDER, metavar='-- OPTION…',
                        help='further options of train/cifar.py, such as --save-seconds 300')
    args = parser.parse_args(argv)
    args.options = [word for word in args.options if word != '--']
    if args.jobs is not None and args.jobs < 1:
        parser.error(f'--jobs {args.jobs}: it must be at least 1')
    return args


def wanted(only: list[str] | None) -> list[Row]:
    """The rows that were asked for, in the order to do them. Raises ValueError if no name matches."""
    if not only:
        return rows()
    found = [row for pattern in only for row in rows() if fnmatch.fnmatch(row.name, pattern)]
    if not found:
        raise ValueError(f'--only {" ".join(only)}: no run has such a name; --dry-run lists them')
    return list({row.name: row for row in found}.values())


@dataclass
class Job:
    """What makes one run, or several seeds of a row on a GPU."""

    rows: list[Row]
    slot: int
    task: Task


class Campaign:
    """The rows that are wanted, what a folder and the published results have of them, and what runs."""

    def __init__(self, args: argparse.Namespace, engine: Engine):
        self.folder, self.data, self.options = args.output_dir, args.data_dir, args.options
        self.rows, self.published = wanted(args.only), read_results(args.results)
        self.engine, self.jobs = engine, list[Job]()
        self.failed: list[str] = []
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f'--output-dir {self.folder} is a file: name a folder')

    # What there is

    def place(self, row: Row) -> Path:
        """The run's folder; that of several seeds side by side holds one a seed."""
        beside = self.folder / row.run.row / f'seed{row.run.seed}'
        return beside if beside.is_dir() else self.folder / row.name

    def record(self, row: Row) -> dict[str, Any] | None:
        """The line about a finished run, of its folder or published."""
        def key(run):
            return {**run, 'start': None, 'test_every': 0, 'compile': False, 'processes': 1}

        own = read_results(self.place(row) / run_dir.RESULTS)
        same = (line for line in self.published
                if key(type(row.run).from_dict(line).to_dict()) == key(row.run.to_dict()))
        return own[0] if own else next(same, None)

    def start(self, row: Row) -> str | None:
        """What --start is given: '' where nothing is, None while the weights do not exist."""
        if not row.start:
            return ''
        first = self.folder / f'{row.start}.seed0'
        if read_results(first / run_dir.RESULTS):
            return str(first)
        return row.start if timm.is_model_pretrained(row.start) else None

    @staticmethod
    def available(row: Row) -> bool:
        """Whether the network takes the arguments of the row."""
        given = parse_kwargs(row.run.model_kwargs).get('nl_args') or {}
        return given.keys() <= inspect.signature(timm_nonlocal.NonlocalStage).parameters.keys()

    def condition(self, row: Row) -> str:
        """'done', 'running', 'failed', 'not available', 'waiting', 'cut' or 'missing'."""
        if self.record(row):
            return 'done'
        if any(row in job.rows for job in self.jobs):
            return 'running'
        if row.name in self.failed:
            return 'failed'
        if not self.available(row):
            return 'not available'
        if self.start(row) is None:
            return 'waiting'
        return 'cut' if run_dir.holds_run(self.place(row)) else 'missing'

    # What is done about it

    def words(self, group: list[Row]) -> list[str]:
        """The arguments of train/cifar.py for a row, or for several seeds of one."""
        run, name = group[0].run, nearest(group[0].run.recipe)
        flags = {'--model': run.architecture, '--dataset': run.dataset, '--data-dir': self.data, '--recipe': name,
                 '--test-every': run.test_every, '--resume': 'auto',
                 '--output-dir': self.place(group[0]) if len(group) == 1 else self.folder / run.row}
        flags |= {f'--{key.replace("_", "-")}': value for key, value in run.recipe.changes(RECIPES[name]).items()}
        if start := self.start(group[0]):
            flags['--start'] = start
        words = [str(word) for pair in flags.items() for word in pair]
        words += ['--model-kwargs', *run.model_kwargs] if run.model_kwargs else []
        return [*words, *self.options, '--seeds', *(str(row.run.seed) for row in group)]

    def begin(self, group: list[Row], slot: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f'{group[0].name}.log'
        self.jobs.append(Job(group, slot, self.engine.begin(
            self.words(group), slot, log, group[0].run.mixed_precision)))

    def next_group(self) -> list[Row]:
        """The next row that can begin; on a GPU with the other seeds of it that nobody has begun. Cut ones first."""
        ready = [(row, self.condition(row)) for row in self.rows]
        for wish in ('cut', 'missing'):
            for row, condition in ready:
                if condition == wish:
                    beside = [other for other, state in ready if self.engine.gpu and state == wish == 'missing'
                              and replace(other.run, seed=0) == replace(row.run, seed=0)]
                    return beside or [row]
        return []

    def reap(self) -> None:
        """Lets go of processes that have ended; a short run that diverged is followed by one with a lower rate."""
        for job in [job for job in self.jobs if job.task.poll() is not None]:
            self.jobs.remove(job)
            for row in job.rows:
                record = self.record(row)
                if not record:
                    if (code := job.task.poll()) not in (124, 130, -signal.SIGTERM):
                        self.failed.append(row.name)
                        print(f'{row.name}: failed with exit code {code}, see {job.rows[0].name}.log', flush=True)
                    continue
                lost = record['diverged_epoch'] is not None
                print(f'{row.name}: final error {record["final_error"]:.2f} %'
                      + f', not finite at step {record["diverged_step"]}' * lost, flush=True)
                self.follow(row, record)

    def follow(self, row: Row, record: dict[str, Any] | None) -> None:
        """Puts what is to follow a run that diverged behind it."""
        follower = after_divergence(row) if record and record['diverged_epoch'] is not None else None
        if follower and follower.name not in {other.name for other in self.rows}:
            self.rows.insert(self.rows.index(row) + 1, follower)

    def run(self, stop: Stop) -> None:
        """Keeps every core or GPU at work until nothing is left or there is a reason to stop; then all runs save."""
        for row in list(self.rows):
            self.follow(row, self.record(row))
        while not stop.reason:
            self.reap()
            busy = {job.slot for job in self.jobs}
            for slot in self.engine.slots:
                if slot not in busy and (group := self.next_group()):
                    self.begin(group, slot)
            if not self.jobs:
                return
            time.sleep(LOOK)
        for job in self.jobs:
            job.task.stop()
        while self.jobs:
            time.sleep(LOOK)
            self.reap()

    def table(self) -> str:
        """A line a row: its condition, and of what has begun the epoch and the hours left."""
        width = max(len(row.name) for row in self.rows)
        lines = [f'{"run":<{width}}  {"":<13} {"epoch":>8} {"hours left":>10}']
        counts: dict[str, int] = {}
        for row in self.rows:
            condition = self.condition(row)
            counts[condition] = counts.get(condition, 0) + 1
            epochs, seconds = pace(self.place(row) / run_dir.CURVE)
            left = f'{seconds * (row.run.recipe.epochs - epochs) / 3600:.1f}' if epochs else ''
            begun = [f'{epochs}/{row.run.recipe.epochs}', left] if condition in ('running', 'cut') else ['', '']
            lines.append(f'{row.name:<{width}}  {condition:<13} {begun[0]:>8} {begun[1]:>10}'.rstrip())
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
        if args.dry_run:
            print(campaign.table())
            return 0
        minutes = args.max_minutes - min(SAVING / 60, args.max_minutes / 10)
        with Stop(minutes, STARTED) as stop:
            print(campaign.table(), flush=True)
            campaign.run(stop)
        print(campaign.table(), flush=True)
    except (ValueError, RunError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 130 if stop.signalled else 1 if campaign.failed else 0


if __name__ == '__main__':
    sys.exit(main())
