"""What a run shows while it goes on: a bar on a terminal, plain aligned lines elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

from train.step import Learner

HEADER = f'{"epoch":>9} {"lr":>8} {"train loss":>10} {"train err %":>11} {"test err %":>10} {"images/s":>9} {"left":>9}'


class Bar:
    """Counts images of the whole run.

    Args:
        total: images of all epochs.
        done: images that an earlier part of the run has seen.
        enabled: False shows nothing (all processes but one).
    """

    def __init__(self, total: int, done: int, enabled: bool = True):
        self.enabled, self.total, self.done, self.first = enabled, total, done, done
        self.started = self.shown = time.monotonic()
        terminal = enabled and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit='img', unit_scale=True, dynamic_ncols=True,
                        smoothing=0.05, disable=not terminal)
        self._line(HEADER)

    def _line(self, line: str) -> None:
        if self.enabled:
            tqdm.write(line)
            sys.stdout.flush()

    def advance(self, count: int, learner: Learner, seen: float) -> None:
        """`seen` images of the epoch are in the learner's meters, which are read twice a second at most."""
        self.done += count
        if self.bar.disable:
            return
        if time.monotonic() - self.shown > 0.5:
            self.shown = time.monotonic()
            loss, wrong = learner.loss.item() / seen, learner.wrong.item() / seen
            self.bar.set_postfix_str(f'loss {loss:.3f}, accuracy {100 - 100 * wrong:.1f} %', refresh=False)
        self.bar.update(count)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """One finished epoch, a row of the run's history."""
        pace = (time.monotonic() - self.started) / max(1, self.done - self.first)
        self._line(f'{row["epoch"]:>5}/{epochs:<3} {row["lr"]:>8.2g} {row["train_loss"]:>10.4f} '
                   f'{row["train_error"]:>11.2f} {row["test_error"]:>10.2f} {row["images_per_second"]:>9.0f} '
                   f'{tqdm.format_interval(pace * (self.total - self.done)):>9}')

    def __enter__(self) -> 'Bar':
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()
