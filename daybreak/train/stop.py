"""When asked to stop, a run finishes its step, saves, and ends.

    SIGTERM, SIGUSR1    code 75: a scheduler wants the machine back and starts the run again
    SIGINT              code 130: Ctrl-C

The handler only sets a flag. Ranks exchange it with the next step's numbers, so that all stop after
the same step, whichever of them got the signal. A second signal ends the process at once, with 130
or 128 + n.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, Self

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PREEMPTED, INTERRUPTED = 75, 130


class BrokenOff(Exception):  # noqa: N818 - nothing is wrong
    """Work that can be repeated was broken off, because the run was asked to stop."""


class Stop:
    """Remembers the first signal it receives, as an exit code.

    A context manager, which restores the previous handlers at the end.
    """

    def __init__(self) -> None:
        self.code = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers."""
        for number in STOPS:
            self.before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self.code:
            os._exit(INTERRUPTED if number == signal.SIGINT else 128 + number)
        self.code = INTERRUPTED if number == signal.SIGINT else PREEMPTED


@contextmanager
def deaf() -> Iterator[None]:
    """Mask the stop signals inside the block, for this thread and for processes that it starts.

    Ctrl-C goes to all processes of a terminal: the started ones continue, and this one decides.
    """
    resource_tracker.ensure_running()  # before Python 3.13 starting it unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
