"""Does the runs of the paper's tables and figures that are still missing, as far as the time goes.

    python -m train.campaign --tables 1 2 --seeds 5 --max-minutes 9 --output-dir DIR

Run it again with the same DIR, here or elsewhere, until nothing is left: cut runs go on where they were cut, finished
ones (in DIR or in hub/results.jsonl) are not repeated. train/pack.py says what is in DIR; `python -m train.land DIR…`
brings it home.

Exit codes: 0 finished, or the time is over; 1 a run failed, the others went on; 2 the arguments, the data or DIR are
off; 130 Ctrl-C.
"""

import argparse
import fnmatch
import gc
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

STARTED = time.monotonic()  # before the imports, which take seconds on a cold disk

import torch  # noqa: E402

from train import paper, state  # noqa: E402
from train.data import DataError, Images, load  # noqa: E402
from train.loop import How, Trainer  # noqa: E402
from train.pack import FILE_LIMIT, Pack  # noqa: E402
from train.paper import Row  # noqa: E402
from train.progress import Bar  # noqa: E402
from train.run_dir import read_results  # noqa: E402
from train.runs import ROOT, Run  # noqa: E402
from train.schedule import Pace, side_by_side  # noqa: E402
from train.state import RunError  # noqa: E402
from train.stop import Stop  # noqa: E402

COMPILED = 'compile.cache'


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m train.campaign', description=__doc__.split('\n\n')[0], allow_abbrev=False)
    parser.add_argument('--tables', type=int, nargs='+', choices=(1, 2), default=[1, 2],
                        help='Table 1 comes with the runs that only figures show')
    parser.add_argument('--calibration', action='store_true', help='the calibration runs in place of the tables')
    parser.add_argument('--seeds', type=int, default=5, metavar='N', help='how many of every row')
    parser.add_argument('--order', choices=('seeds', 'rows'), default='seeds',
                        help='one seed of every row first, then two more, then the rest; or all seeds of a row first')
    parser.add_argument('--only', nargs='+', metavar='PATTERN',
                        help="runs whose name matches, in the patterns' order, such as 'preresnet20_nl_*_k4.*'")
    parser.add_argument('--output-dir', required=True, metavar='DIR')
    parser.add_argument('--data-dir', default='data', help='where torchvision keeps the data sets')
    parser.add_argument('--results', default=str(ROOT / 'hub' / 'results.jsonl'), metavar='FILE',
                        help='runs that are not repeated (default: hub/results.jsonl)')
    parser.add_argument('--max-minutes', type=float, default=0.0, metavar='M', help='stop before M minutes are over')
    parser.add_argument('--save-seconds', type=float, default=60.0, help='how often the state is saved')
    parser.add_argument('--at-once', type=int, metavar='N', help='runs side by side (default: 3 on a GPU, else 1); '
                                                                 'fewer where the memory is short')
    parser.add_argument('--mixed-precision', choices=('no', 'bf16'), default='bf16')
    parser.add_argument('--compile', action='store_true', help='the step goes through torch.compile')
    parser.add_argument('--no-graph', action='store_true', help='on a GPU: no CUDA graph')
    parser.add_argument('--deterministic', action='store_true', help='on a GPU: the same bits every time')
    parser.add_argument('--dry-run', action='store_true', help='print what would be done, and touch nothing')
    trial = parser.add_argument_group('for trying it out', 'runs with these are other runs than the paper\'s')
    trial.add_argument('--epochs', type=int)
    trial.add_argument('--batch-size', type=int)
    trial.add_argument('--limit', type=int, default=0, metavar='N')
    args = parser.parse_args(argv)
    if args.seeds < 1 or (args.at_once or 1) < 1:
        parser.error('--seeds and --at-once must be at least 1')
    return args


def wanted(args: argparse.Namespace) -> list[tuple[Row, Run]]:
    """The runs that were asked for, in the order to do them. Raises ValueError if no name matches --only."""
    trial = {key: value for key in ('epochs', 'batch_size') if (value := getattr(args, key))}
    found = []
    for row, run in paper.runs(paper.rows(args.tables, args.calibration), args.seeds, args.order):
        found.append((row, replace(run, recipe=replace(run.recipe, **trial), limit=args.limit,
                                   mixed_precision=args.mixed_precision, compile=args.compile)))
    if not args.only:
        return found
    chosen = [(row, run) for pattern in args.only for row, run in found if fnmatch.fnmatch(run.name, pattern)]
    if not chosen:
        raise ValueError(f'--only {" ".join(args.only)}: no run has such a name; --dry-run lists them')
    return list({run.name: (row, run) for row, run in chosen}.values())


class Campaign:
    """The runs that are wanted, against what a folder and the published results have of them."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.pack, self.wanted = args, Pack(Path(args.output_dir)), wanted(args)
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.device_name = torch.cuda.get_device_name() if self.device.type == 'cuda' else None
        self.at_once = args.at_once or (3 if self.device.type == 'cuda' else 1)
        self.how = How(not args.no_graph, args.deterministic)
        self.rows = {run.name: row for row, run in self.wanted}
        self.data: dict[str, tuple[Images, Images]] = {}
        self.set_up = (90.0 if args.compile else 20.0) if self.device.type == 'cuda' else 0.0  # the longest so far
        self.failed: list[str] = []

    def groups(self) -> list[list[Run]]:
        """What is missing, in the order to do it: what was cut first, then the rest side by side."""
        done, missing = self.done(), {run.key for _, run in self.wanted}
        missing -= done
        cut = [[replace(run, compile=self.args.compile) for run in group]  # as these arguments would start them
               for group in self.pack.cut_runs() if any(run.key in missing for run in group)]
        missing -= {run.key for group in cut for run in group}
        return [*cut, *side_by_side([run for _, run in self.wanted if run.key in missing], self.at_once)]

    def done(self) -> set[tuple]:
        return {Run.from_dict(record).key for record in self.records()}

    def records(self) -> list[dict]:
        return [*read_results(Path(self.args.results)), *self.pack.results]

    def run(self, stop: Stop) -> None:
        """Trains group after group until there is a reason to stop."""
        for group in self.groups():
            if stop.reason or stop.seconds_left < self.set_up:
                break
            try:
                self._train_or_halve(group, stop)
            except (RunError, DataError):
                raise
            except Exception as error:  # one that fails must not cost the others their time
                self.failed += [run.name for run in group]
                print(f'failed: {", ".join(run.name for run in group)}: {type(error).__name__}: {error}', flush=True)
                traceback.print_exc()

    def _train_or_halve(self, group: list[Run], stop: Stop) -> None:
        try:
            return self._train(group, stop)
        except torch.OutOfMemoryError:
            if len(group) == 1 or state.exists(self.pack.state_path(group[0])):
                raise
        print(f'not enough memory for {len(group)} at once: half of them', flush=True)
        half = (len(group) + 1) // 2
        for part in (group[:half], group[half:]):  # outside of `except`, whose traceback keeps what did not fit
            gc.collect()
            torch.cuda.empty_cache()
            if not stop.reason:
                self._train_or_halve(part, stop)

    def _train(self, group: list[Run], stop: Stop) -> None:
        """One group, from its state if it has one, to its end or a cut."""
        since, path = time.monotonic(), self.pack.state_path(group[0])
        names = ', '.join(run.name for run in group)
        trainer = Trainer(group, *self._data(group[0]), self.how,
                          spectrum_epochs=(*paper.SPECTRA_EPOCHS, group[0].recipe.epochs))
        if saved := self._saved(path):
            trainer.restore(*saved, str(path))
        self.set_up = max(self.set_up, time.monotonic() - since)
        done = trainer.progress['epoch']
        print(f'training from epoch {done + 1}: {names}', flush=True)
        count = len(trainer.train_set)
        with Bar(trainer.epochs * count, done * count, enabled=sys.stderr.isatty()) as bar:
            stopped = trainer.run(stop, lambda *kept: state.save(path, *kept), self.args.save_seconds, bar)
        if not stopped:
            results = [({**record, 'kind': row.kind, 'part_of': list(row.part_of)}, weights)
                       for row, (record, weights) in zip(map(self._row, group), trainer.results(), strict=True)]
            self.pack.add(*zip(*results, strict=True))
            self.pack.forget(group[0])
            for run, (record, _) in zip(group, results, strict=True):
                ending = f', diverged in epoch {record["diverged_epoch"]}' if record['diverged_epoch'] else ''
                print(f'{run.name}: final error {record["final_error"]:.2f} %{ending}', flush=True)
        del trainer  # with its graphs, before others are captured
        gc.collect()
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()

    @staticmethod
    def _saved(path: Path):
        """The state at path; None where there is none that can be read, so that its runs start again."""
        try:
            return state.load(path) if state.exists(path) else None
        except RunError as error:
            print(f'{error}: its runs start again', flush=True)
            return None

    def _row(self, run: Run) -> Row:
        """The row of a run; one that was cut beside others may not have been asked for this time."""
        known = {row.run.key: row for calibration in (False, True) for row in paper.rows((1, 2), calibration)}
        return self.rows.get(run.name) or known.get(replace(run, seed=0, mixed_precision='no').key) or Row(run, 'own')

    def _data(self, run: Run) -> tuple[Images, Images]:
        if run.dataset not in self.data:
            sets = load(run.dataset, self.args.data_dir, limit=run.limit)
            self.data = {run.dataset: tuple(images.to(self.device) for images in sets)}
        return self.data[run.dataset]

    def table(self) -> str:
        """A line a row: which seeds are done, cut and left, and how long the rest takes."""
        done, records = self.done(), self.records()
        device = self.device_name or (records[-1]['device'] if records else None)
        pace = Pace(records, device)
        cut = {run.key: fraction(self.pack.progress(group[0]))
               for group in self.pack.cut_runs() for run in group}
        width = max(len(run.row) for _, run in self.wanted)
        lines = [f'{"row":<{width}}  {"done":<10} {"cut at %":<16} {"left":>4} {"minutes":>7}']
        total, unknown = 0.0, False
        for name in dict.fromkeys(run.row for _, run in self.wanted):
            runs = [run for _, run in self.wanted if run.row == name]
            left = [run for run in runs if run.key not in done]
            seconds = [pace(run) for run in left]
            unknown |= None in seconds
            need = sum((1 - cut.get(run.key, 0.0)) * (cost or 0.0) for run, cost in zip(left, seconds, strict=True))
            total += need
            shown = f'{need / 60:.1f}' if None not in seconds else '?'
            lines.append(
                f'{name:<{width}}  {" ".join(str(run.seed) for run in runs if run.key in done):<10} '
                f'{" ".join(f"{run.seed}:{100 * cut[run.key]:.0f}" for run in left if run.key in cut):<16} '
                f'{len(left):>4} {shown:>7}')
        keys = {run.key for _, run in self.wanted}
        lines.append(f'{len(keys & done)} of {len(keys)} runs done, {len((keys - done) & cut.keys())} cut, '
                     f'{len(keys - done - cut.keys())} not begun; '
                     + ('the time that is left is known once a run is done' if unknown else
                        f'about {total / 60:.0f} minutes left on {device}' if keys - done else 'nothing left'))
        return '\n'.join(lines)


def fraction(progress: dict) -> float:
    """How much of its epochs a cut run has done, from 0 to 1."""
    done = progress['epoch'] + progress['images'] / progress['data'][0]
    return done / progress['runs'][0]['run']['recipe']['epochs']


def keep_compiled(folder: Path) -> None:
    """Keeps what torch.compile made, for the next machine of the same kind."""
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts and len(artifacts[0]) < FILE_LIMIT:
        state.write(folder / COMPILED, lambda path: path.write_bytes(artifacts[0]))


def campaign(args: argparse.Namespace) -> int:
    whole = Campaign(args)
    if args.dry_run:
        for group in whole.groups():
            print('side by side: ' * (len(group) > 1) + ', '.join(run.name for run in group))
        print(whole.table())
        return 0
    whole.how.prepare(whole.device)
    if whole.device.type == 'cpu':
        torch.set_num_threads(os.cpu_count())
    cache_file = whole.pack.folder / COMPILED
    if args.compile and cache_file.is_file():
        torch.compiler.load_cache_artifacts(cache_file.read_bytes())
    with Stop(args.max_minutes, STARTED) as stop:
        whole.run(stop)
    if args.compile:
        keep_compiled(whole.pack.folder)
    print(whole.table(), flush=True)
    return 130 if stop.signalled else 1 if whole.failed else 0


def main(argv: list[str] | None = None) -> int:
    try:
        return campaign(parse(argv))
    except (ValueError, DataError, RunError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
