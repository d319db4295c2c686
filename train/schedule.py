"""Which runs of a campaign go side by side, and how long they take."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from train.pack import FILE_LIMIT
from train.runs import Run


def side_by_side(runs: Sequence[Run], at_once: int) -> list[list[Run]]:
    """Groups of neighbours that can share a pool, and whose state fits one file."""
    groups: list[list[Run]] = []
    for run in runs:
        last = groups[-1] if groups else []
        if (last and len(last) < at_once
                and (last[0].dataset, last[0].recipe.epochs) == (run.dataset, run.recipe.epochs)
                and sum(map(state_bytes, [*last, run])) <= FILE_LIMIT):
            last.append(run)
        else:
            groups.append([run])
    return groups


def _seedless(function):
    """Caches a function of a run by what does not depend on its seed."""
    cached = cache(function)
    return lambda run: cached(replace(run, seed=0))


@_seedless
def state_bytes(run: Run) -> int:
    """What a run needs in a state: weights, momentum, running statistics, and room for names and the curve."""
    model = run.build()
    return sum(8 * p.numel() for p in model.parameters()) + sum(b.nbytes for b in model.buffers()) + 150_000


@_seedless
def flops(run: Run) -> int:
    """Of one image, forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run.build().eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops()


class Pace:
    """How long a run takes on this device: as those of its row did, else in proportion to its arithmetic.

    Args:
        records: lines about finished runs.
        device: its name.
    """

    def __init__(self, records: Sequence[dict], device: str):
        self.seconds: dict[str, list[float]] = {}
        per_flop = []
        for record in records:
            if record['device'] == device and record['diverged_epoch'] is None:
                run = Run.from_dict(record)
                cost = record['seconds'] / record['at_once']
                self.seconds.setdefault(run.row, []).append(cost)
                per_flop.append(cost / (flops(run) * record['steps'] * run.recipe.batch_size))
        self.per_flop = statistics.median(per_flop) if per_flop else None

    def __call__(self, run: Run) -> float | None:
        """Seconds of a whole run; None where nothing is known about this device."""
        if run.row in self.seconds:
            return statistics.median(self.seconds[run.row])
        images = run.recipe.epochs * (run.limit or 50_000)
        return self.per_flop and self.per_flop * flops(run) * images
