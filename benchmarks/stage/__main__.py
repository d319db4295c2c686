"""The nonlocal stage beside other ways to compute it: python -m benchmarks.stage

First the accuracy of every path against float64, then times and memory, all contenders of a case in turn, the most
important case first. What is measured is kept after every case, so that a time limit costs only what is left; nothing
is begun after --max-minutes.

    python -m benchmarks.stage --max-minutes 8 --output DIR    measure, keep in DIR/stage.json
    python -m benchmarks.stage --render FILE…                  merge into benchmarks/stage.json, write BENCHMARKS.md
"""

import argparse
import gc
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.document import render
from benchmarks.stage import gpu
from benchmarks.stage.check import checks
from benchmarks.stage.contenders import CONTENDERS, MMCV, Case, Step, Worker
from benchmarks.stage.counts import ceilings, counts, floor
from benchmarks.stage.measure import captured, extra_bytes, milliseconds
from benchmarks.stage.report import table
from timm_nonlocal.errors import first_line
from timm_nonlocal.files import write_text
from timm_nonlocal.ops.products import ProductBackend
from train.records.runs import surroundings


def cases(device: torch.device) -> list[Case]:
    """The most important first."""
    if device.type == 'cpu':
        return [Case(16, 32, 5, 'bfloat16'), Case(16, 32, 5, 'float32'),
                *(Case(16, 32, k, 'bfloat16') for k in (1, 2, 3, 4, 6)), Case(128, 32, 5, 'bfloat16'),
                *(Case(16, 32, k, 'float32') for k in (1, 2, 3, 4, 6)), Case(16, 56, 5, 'float32'),
                Case(128, 32, 5, 'float32')]
    grid = [Case(images, side, k, dtype) for dtype in ('bfloat16', 'float32') for images in (128, 16)
            for side in (32, 56) for k in (5, 1, 3, 2, 4, 6)]
    return sorted(grid, key=lambda case: case.k != 5)


def device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    names = [line.partition(':')[2].strip() for line in info.read_text().splitlines() if line.startswith('model name')
             ] if info.is_file() else []
    return f'{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads'


class DeviceLostError(Exception):
    """A contender has left the device so that nothing more can be computed on it."""


def compare(case: Case, device: torch.device, rounds: int, python: str | None,
            without: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Rows by contender. All are set up, then timed in turn, so that what else runs hits them alike.

    Args:
        without: contenders that are left out.
    """
    rows: dict[str, dict[str, Any]] = {}
    timed: dict[str, tuple[str, Callable[[], float]]] = {}
    repeats, worker = 10 if device.type == 'cuda' else 1, None

    def attempt(name: str, function: Callable[[], Any]) -> Any:
        try:
            result = function()
            if device.type == 'cuda':
                torch.cuda.synchronize()  # an error belongs to whom it comes from
            return result
        except torch.AcceleratorError as error:
            raise DeviceLostError(
                f'{name}: {first_line(error)}; run again with --without {shlex.quote(name)}') from error
        except (RuntimeError, OSError) as error:  # torch.OutOfMemoryError is one
            short = 'out of memory' if isinstance(error, torch.OutOfMemoryError) else f'{type(error).__name__}: {error}'
            rows[name] = {'failed': short.splitlines()[0][:120]}
            return None

    for name in CONTENDERS:
        if name in without or (name == 'ours, matrix products' and device.type == 'cpu'):  # which is ours there
            continue
        rows[name] = {}
        step = attempt(name, partial(Step, name, case, device))
        used = step and attempt(name, partial(extra_bytes, step.both, device))
        if used is None:
            continue
        rows[name]['bytes'] = used
        timed[f'{name}/forward'] = name, partial(milliseconds, step.forward, device, repeats)
        timed[f'{name}/both'] = name, partial(milliseconds, step.both, device, repeats)
        if device.type == 'cuda' and (replay := attempt(name, partial(captured, step.both))):
            timed[f'{name}/graph'] = name, partial(milliseconds, replay, device, repeats)
    if python:
        rows[MMCV] = {}
        worker = attempt(MMCV, partial(Worker, python, case, torch.get_num_threads()))
        if worker:
            rows[MMCV]['bytes'] = attempt(MMCV, partial(worker.ask, 'memory'))
            for what in ('forward', 'both'):
                timed[f'{MMCV}/{what}'] = MMCV, partial(worker.ask, what)
    taken: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for key, (name, function) in timed.items():
            if 'failed' not in rows[name] and (ms := attempt(name, function)) is not None and turn:  # 0 warms up
                taken.setdefault(key, []).append(ms)
    for key, times in taken.items():
        name, what = key.rsplit('/', 1)
        if 'failed' not in rows[name]:
            rows[name][what] = statistics.median(times)
    if worker:
        worker.close()
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what the time allows; gives the record, which is in the output folder after every part."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    deadline = time.monotonic() + 60 * args.max_minutes
    if args.threads:
        torch.set_num_threads(args.threads)
    where = surroundings(device)
    record: dict[str, Any] = {
        **where, 'device': device_name(device), 'commit': where['commit'] or args.commit,
        'command': shlex.join(['python', '-m', 'benchmarks.stage', *args.given]), 'checks': [], 'ceilings': {},
        'cases': [], 'attention': [], 'tiles': [], 'kernels': [], 'failed': []}
    rounds = args.rounds or (7 if device.type == 'cuda' else 5)
    backends: list[type[Any]] = [ProductBackend]

    def attempt(what: str, function: Callable[[], Any]) -> None:
        """One part: it is left out when the time is over, and its failure costs no other."""
        if time.monotonic() > deadline:
            record['failed'].append(f'{what}: out of time')
            return
        print(f'{time.monotonic() - deadline + 60 * args.max_minutes:5.0f} s  {what}', file=sys.stderr, flush=True)
        try:
            function()
        except Exception as error:
            record['failed'].append(f'{what}: {type(error).__name__}: {error}'[:500])
            if isinstance(error, DeviceLostError):
                raise
        finally:
            write_text(args.output / 'stage.json', json.dumps({record['device']: record}, indent=1) + '\n')
        gc.collect()
        if device.type == 'cuda':
            torch.cuda.empty_cache()

    def measure(case: Case) -> None:
        entry = {'name': str(case), 'counts': counts(case), 'floor': floor(case, record['ceilings']),
                 'results': compare(case, device, rounds, args.mmcv, args.without)}
        record['cases'] = [*(kept for kept in record['cases'] if kept['name'] != entry['name']), entry]

    if device.type == 'cuda':
        from timm_nonlocal.ops.triton_backend import TritonBackend
        backends.append(TritonBackend)
    attempt('accuracy', lambda: record['checks'].extend(checks(device, backends)))
    attempt('ceilings', lambda: record['ceilings'].update(ceilings(device)))
    if not record['ceilings']:
        return record
    first, *others = cases(device)[:args.cases]
    attempt(str(first), lambda: measure(first))
    if device.type == 'cuda':
        attempt('tiles', lambda: record['tiles'].extend(gpu.tiles(device)))
        attempt(f'{first}, fastest tiles', lambda: measure(first))
        attempt('longest kernels', lambda: record['kernels'].extend(gpu.longest(first, device)))
        attempt('attention', lambda: record['attention'].extend(gpu.attention(device)))
    for case in others:
        attempt(str(case), partial(measure, case))
    return record


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.stage', description=__doc__.split('\n\n')[0], allow_abbrev=False)
    parser.add_argument('--max-minutes', type=float, default=8.0, metavar='M', help='begin nothing after M minutes')
    parser.add_argument('--output', type=Path, default=Path('runs/benchmark_stage'), metavar='DIR')
    parser.add_argument('--threads', type=int, metavar='N', help='CPU threads')
    parser.add_argument('--rounds', type=int, metavar='N', help='measurements of each figure; their median counts')
    parser.add_argument('--cases', type=int, metavar='N', help='only the first N cases')
    parser.add_argument('--without', nargs='+', default=[], choices=list(CONTENDERS), metavar='CONTENDER',
                        help='leave some out: ' + '; '.join(CONTENDERS))
    parser.add_argument('--mmcv', metavar='PYTHON', help='a Python whose environment has mmcv-lite, to compare with')
    parser.add_argument('--commit', metavar='SHA', help='the commit, where there is no repository to ask')
    parser.add_argument('--render', nargs='*', type=Path, metavar='FILE',
                        help='measure nothing; merge FILEs into benchmarks/stage.json and write BENCHMARKS.md')
    args = parser.parse_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    try:
        if args.render is not None:
            render('stage', args.render)
            return 0
        record = run(args)
    except (OSError, ValueError, DeviceLostError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(table(record))
    return 0 if record['checks'] and all(check['right'] for check in record['checks']) else 1


if __name__ == '__main__':
    sys.exit(main())
