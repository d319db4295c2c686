"""When to stop before the end: a signal, or a deadline."""

import enum
import signal
import time
from types import FrameType

__all__ = ['Stop', 'StopReason']


class StopReason(enum.IntEnum):
    """Why training stops. The value is the command's exit code, and the higher one counts more."""

    NONE = 0
    TIME = 124  # as timeout(1) has it
    SIGNAL = 130  # as a shell has it after Ctrl-C


class Stop:
    """Turns the first Ctrl-C or SIGTERM, and a deadline, into a reason that is read between steps.

    A second Ctrl-C stops at once. Outside its `with` block the signals mean what they meant.

    Args:
        max_minutes: after this long there is a reason to stop; 0 sets no deadline. What is left of the time is for
            saving: a twentieth of it, 10 seconds at most.
        since: `time.monotonic()` when the time began.
    """

    def __init__(self, max_minutes: float = 0.0, since: float | None = None):
        seconds = 60 * max_minutes
        self.deadline = (time.monotonic() if since is None else since) + seconds - min(10.0, seconds / 20)
        self.limited, self.signalled = max_minutes > 0, False

    @property
    def reason(self) -> StopReason:
        return StopReason.SIGNAL if self.signalled else StopReason.TIME if self.seconds_left <= 0 else StopReason.NONE

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic() if self.limited else float('inf')

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> 'Stop':
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
