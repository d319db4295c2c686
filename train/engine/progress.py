"""What a run shows while it goes on: a bar on a terminal, plain aligned lines elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

__all__ = ['Bar']

HEADER = f'{"epoch":>9} {"lr":>8} {"train loss":>10} {"train err %":>11} {"test err %":>10} {"images/s":>9} {"left":>9}'


class Bar:
    """Counts images of the whole run. Of runs side by side it shows the mean.

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

    def advance(self, count: int, read_meters: Callable[[], str]) -> None:
        """`count` more images; what read_meters gives, which waits for the device, is shown twice a second at most."""
        self.done += count
        if self.bar.disable:
            return
        if time.monotonic() - self.shown > 0.5:
            self.shown = time.monotonic()
            self.bar.set_postfix_str(read_meters(), refresh=False)
        self.bar.update(count)

    def epoch(self, rows: list[dict[str, Any]], epochs: int) -> None:
        """One finished epoch: the new row of every run's history."""
        if not self.enabled:
            return
        first, pace = rows[0], (time.monotonic() - self.started) / max(1, self.done - self.first)
        loss, train, test = (
            sum(float('nan') if row[key] is None else row[key] for row in rows) / len(rows)
            for key in ('train_loss', 'train_error', 'test_error'))
        self._line(f'{first["epoch"]:>5}/{epochs:<3} {first["lr"]:>8.2g} {loss:>10.4f} {train:>11.2f} {test:>10.2f} '
                   f'{first["images_per_second"]:>9.0f} {tqdm.format_interval(pace * (self.total - self.done)):>9}')

    def __enter__(self) -> 'Bar':
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
