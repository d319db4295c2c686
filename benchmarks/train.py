"""How long a training step takes, one command for everything: python -m benchmarks.train

On a GPU: the nets of TARGETS at batch 128, eagerly in float32 and in bf16, captured, compiled and captured, three and
five seeds at once; the ceilings of the machine; the longest kernels; a whole epoch. Milliseconds are those of CUDA
events around 200 steps, the median of five repetitions. What is measured is kept after every case, so that a time
limit costs only what is left. On the CPU it is a small version of itself, by the wall clock.

    python -m benchmarks.train --max-minutes 8 --output FILE    measure and keep in FILE
    python -m benchmarks.train --render FILE…                   merge into benchmarks/train.json, write BENCHMARKS.md
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.document import render
from benchmarks.stage.measure import milliseconds
from benchmarks.train_report import STABLE, TARGETS, table
from timm_nonlocal.files import write_text
from timm_nonlocal.recipes import PAPER, Recipe
from train.engine.data import Images, frame, whole_plan
from train.engine.execution import Execution
from train.engine.loop import Trainer
from train.engine.pool import Pool
from train.engine.step import Learner, autocast, compiled_loss, count_wrong, loss_of
from train.engine.stop import Stop
from train.records.runs import Run, surroundings


@dataclass(frozen=True)
class Case:
    """One way to run one net."""

    model: str
    mixed_precision: str = 'bf16'
    graph: bool = True
    compile: bool = False
    seeds: int = 1
    nl_args: tuple[str, ...] = ()  # switches of the nonlocal modules

    @property
    def mode(self) -> str:
        return ' + '.join([*(['compile'] if self.compile else []), 'graph' if self.graph else 'eager']) + (
            ' float32' if self.mixed_precision == 'no' else ' bf16')


def cases(device: torch.device) -> list[Case]:
    """What is measured, the most important first."""
    if device.type == 'cpu':
        return [Case('preresnet20', 'no', False, seeds=seeds) for seeds in (1, 2)]
    small, stage, *large = TARGETS
    return [
        *(Case(model) for model in TARGETS), *(Case(stage, nl_args=nl_args) for nl_args in STABLE),
        *(Case(model, seeds=5) for model in (small, stage)), *(Case(model, compile=True) for model in (small, stage)),
        *(Case(model, seeds=3) for model in (small, stage)),
        *(Case(model, precision, graph=False) for model in TARGETS for precision in ('bf16', 'no')),
        *(Case(model, compile=True) for model in large), *(Case(small, compile=True, seeds=seeds) for seeds in (5, 3)),
        *(Case(model, seeds=3) for model in large), Case(stage, compile=True, seeds=3),
    ]


def random_images(count: int, device: torch.device) -> Images:
    """Random pixels, since zeros would be faster than images are."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return Images(frame(pixels), labels, frame(pixels.double().mean(0).div(255).float()), 10).to(device)


def median_ms(function: Callable[[], object], device: torch.device, repeats: int,
              prepare: Callable[[], None] = lambda: None) -> float:
    """The median time of a call, after an untimed `prepare`."""
    times = []
    for _ in range(repeats):
        prepare()
        times.append(milliseconds(function, device))
    return statistics.median(times)


def make_pool(case: Case, images: Images, recipe: Recipe) -> Pool:
    device, learners = images.labels.device, []
    loss = compiled_loss() if case.compile else loss_of
    layout = torch.contiguous_format if case.mode == 'eager float32' else torch.channels_last
    for seed in range(case.seeds):
        kwargs = (f'nl_args={dict.fromkeys(case.nl_args, True)}',) if case.nl_args else ()
        model = Run(case.model, seed=seed, model_kwargs=kwargs).build().to(device).to(memory_format=layout)
        learners.append(Learner(model, recipe, images, seed, autocast=autocast(device, case.mixed_precision),
                                loss_of=loss))
    return Pool.on(device, learners, case.graph)


def measure(case: Case, images: Images, recipe: Recipe, steps: int) -> dict[str, Any]:
    """Milliseconds a step of all seeds together, images a second, seconds until the first step."""
    device, since = images.labels.device, time.perf_counter()
    pool = make_pool(case, images, recipe)

    def rewind() -> None:
        for learner in pool.learners:
            learner.seek(0)

    def go() -> None:
        for _ in range(steps):
            pool.step(recipe.batch_size)

    rewind()
    pool.step(recipe.batch_size)
    if device.type == 'cuda':
        torch.cuda.synchronize()
    set_up = time.perf_counter() - since
    ms = median_ms(go, device, 5 if device.type == 'cuda' else 2, rewind) / steps
    return {**asdict(case), 'mode': case.mode, 'ms': ms, 'set_up_seconds': set_up,
            'images_per_second': 1000 * case.seeds * recipe.batch_size / ms}


def ceilings(device: torch.device) -> dict[str, float]:
    """A large copy in GB/s, read and written, and an 8192³ bf16 matrix product in TFLOP/s."""
    x, y = (torch.randint(0, 255, (2 ** 31,), dtype=torch.uint8, device=device) for _ in range(2))
    copy = median_ms(lambda: y.copy_(x), device, 20)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = median_ms(lambda: a @ b, device, 20)
    return {'copy_gb_per_s': 2 * x.nbytes / copy / 1e6, 'bf16_tflop_per_s': 2 * 8192 ** 3 / product / 1e9}


def kernels(case: Case, images: Images, recipe: Recipe, steps: int = 20) -> dict[str, Any]:
    """The longest kernels of a step, and the share of the time in which any kernel runs."""
    pool = make_pool(case, images, recipe)
    for learner in pool.learners:
        learner.seek(0)
    pool.step(recipe.batch_size)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            pool.step(recipe.batch_size)
        torch.cuda.synchronize()
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in profile.events()
                   if event.device_type == torch.autograd.DeviceType.CUDA)
    busy, until, totals = 0.0, -math.inf, dict[str, tuple[float, int]]()
    for start, end, name in spans:
        busy, until = busy + max(0.0, end - max(start, until)), max(until, end)
        total, count = totals.get(name, (0.0, 0))
        totals[name] = (total + end - start, count + 1)
    longest = sorted(totals.items(), key=lambda item: -item[1][0])[:15]
    return {**asdict(case), 'busy': busy / (until - spans[0][0]), 'kernels_per_step': len(spans) / steps,
            'longest': [{'name': name[:120], 'us_per_step': total / steps, 'per_step': count / steps}
                        for name, (total, count) in longest]}


def epoch(case: Case, train_set: Images, test_set: Images) -> dict[str, Any]:
    """The wall time of a whole epoch as the training command runs it, and the share of it that steps and test take."""
    device = train_set.labels.device
    recipe = Recipe(epochs=3, batch_size=min(PAPER.batch_size, len(train_set)))
    run = Run(case.model, recipe=recipe, mixed_precision=case.mixed_precision, compile=case.compile)
    trainer = Trainer([run], train_set, test_set, Execution(graph=case.graph))
    with Stop() as stop:
        trainer.run(stop, lambda tensors, progress: None)
    wall = trainer.progress['runs'][0]['history'][-1]['seconds']
    learner, columns = trainer.learners[0], whole_plan(len(test_set)).to(device)

    def steps() -> None:
        done = 0
        while done < len(train_set):
            size = min(run.recipe.batch_size, len(train_set) - done)
            trainer.pool.step(size)
            done += size

    train = median_ms(steps, device, 3, prepare=lambda: learner.seek(0))
    test = median_ms(lambda: count_wrong(learner.bare, test_set, columns), device, 3)
    return {**asdict(case), 'wall_seconds': wall, 'train_seconds': train / 1000, 'test_seconds': test / 1000,
            'share': (train + test) / 1000 / wall}


def run(output: Path, max_minutes: float) -> dict[str, Any]:
    """Measures everything that the time allows; gives the record, which is in output after every case."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    Execution().prepare(device)
    cpu, deadline = device.type == 'cpu', time.monotonic() + 60 * max_minutes
    count, recipe, steps = (40, Recipe(batch_size=16), 2) if cpu else (50_000, PAPER, 200)
    images = random_images(count, device)
    where = surroundings(device)
    record: dict[str, Any] = {**where, 'batch_size': recipe.batch_size, 'steps': [], 'epochs': [], 'kernels': [],
                              'ceilings': {}, 'failed': []}
    captured = [Case(model) for model in TARGETS]
    work: list[tuple[str, Any, Callable[[], Any]]] = [
        ('steps', case, partial(measure, case, images, recipe, steps)) for case in cases(device)]
    if cpu:
        work.append(('epochs', 'preresnet20', lambda: epoch(
            Case('preresnet20', 'no', False), images, random_images(20, device))))
    else:
        tests = random_images(10_000, device)
        work.insert(0, ('ceilings', 'machine', lambda: ceilings(device)))
        work[5:5] = [('kernels', case, partial(kernels, case, images, recipe)) for case in captured[:2]]
        work[7:7] = [('epochs', case, partial(epoch, case, images, tests)) for case in captured[:2]]
    for part, what, function in work:
        if time.monotonic() > deadline:
            print(f'out of time: {part} of {what} and what follows is left out')
            break
        try:
            found = function()
            record[part] = found if isinstance(record[part], dict) else [*record[part], found]
        except Exception as error:  # one way that does not run must not cost the figures of the others
            record['failed'].append(f'{part} of {what}: {type(error).__name__}: {error}'[:500])
        gc.collect()
        if not cpu:
            torch.cuda.empty_cache()
        write_text(output, json.dumps({where['device']: record}, indent=1) + '\n')
    return record


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.train', description=__doc__.split('\n\n')[0], allow_abbrev=False)
    parser.add_argument('--max-minutes', type=float, default=8.0, metavar='M', help='begin nothing after M minutes')
    parser.add_argument('--output', type=Path, default=Path('runs/benchmark_train.json'), metavar='FILE')
    parser.add_argument('--render', nargs='*', type=Path, metavar='FILE',
                        help='measure nothing; merge FILEs into benchmarks/train.json and write BENCHMARKS.md')
    args = parser.parse_args(argv)
    try:
        if args.render is None:
            print(table(run(args.output, args.max_minutes)))
        else:
            render('train', args.render)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
