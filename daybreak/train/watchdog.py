"""A run that hangs says where, and ends.

A rank that waits for another waits for ever, and silently. So a thread of each rank counts the
seconds since the last step. After too many it prints the stacks of all threads of its process. All
ranks do so at about the same time: the one whose stack is not in a collective is the one that the
others wait for. A rank that does not even answer is named.

A rank that fails leaves a note; for a rank that was killed, another on the same machine leaves it.
With gloo the others get an error at once; with NCCL they keep waiting. So a rank that has found a
note and then takes no step for a while ends, with the reason in the note. It must do so before
torchrun kills all ranks, after 30 s: then none could say why.

When pictures of a new shape first appear in the middle of a run, blocks are compiled for it, and
all ranks wait for the one that compiles. Such a step may take as long as the first one, and the log
says which shape it is for.

Limits  a hang that never lets go of Python's lock (in C code) stops this thread too; the other
        ranks then name that rank.
"""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn, Self

import torch.distributed as dist

from daybreak.failure import LostPeer
from daybreak.train import rendezvous
from daybreak.train.parallel import World

FIRST = 5  # times the limit for what is rare and slow: compilation, first pictures
USUAL = 10  # times the median of the last steps
ANSWER = 5.0  # seconds for the other ranks to say that they noticed too
HEARD = 10.0  # seconds for a rank to notice by itself that another has failed


class Watchdog:
    """Ends the process with code 6 if no step is done for `limit` seconds and ten usual steps.

    It also does so soon after another rank has failed, if this one has not noticed by itself.

        with Watchdog(here, config.step_timeout, leave) as watchdog:
            for ...:
                watchdog.begin(height, width)
                watchdog.beat(step)
                with watchdog.patience(600): save

    `leave` is called last, from the thread, to record why the run has ended. `compiled` says that
    the run uses compiled blocks; `tell` then reports each compilation, once a step.
    """

    def __init__(
        self,
        here: World,
        limit: float,
        leave: Callable[[LostPeer], object],
        compiled: bool = False,
        tell: Callable[[str], object] = print,
    ) -> None:
        self.here, self.limit, self.leave = here, limit, leave
        self.store = here.store.clone()  # type: ignore[attr-defined]  # no other thread waits on it
        self.store.set_timeout(timedelta(seconds=ANSWER))
        self.neighbours = rendezvous.neighbours(self.store, here.rank, here.size)
        self.step: int | None = None
        self.durations: deque[float] = deque(maxlen=20)
        self.last = time.monotonic()
        self.allowed = FIRST * limit
        self.compiled, self.tell = compiled, tell
        self.shape: tuple[int, int] | None = None  # of this step's pictures, until reported
        self.compiling, self.said = False, False  # in this step; as the store says it
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        """Start counting."""
        self.listen()
        self.last = time.monotonic()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop counting."""
        self.done.set()
        self.thread.join()
        if self.compiled:
            from torch._dynamo.callback import callback_handler

            callback_handler.remove_start_callback(self._compiles)

    def listen(self) -> None:
        """Register for torch's compilations; torch.compiler.reset() forgets it, so then again."""
        if self.compiled:
            from torch._dynamo.callback import on_compile_start

            on_compile_start(self._compiles)

    def begin(self, height: int, width: int) -> None:
        """Announce the size of the pictures of the next step."""
        self.shape = height, width

    def beat(self, step: int) -> None:
        """Announce that a step is done."""
        now = time.monotonic()
        if self.step is not None:
            self.durations.append(now - self.last)
        self.allowed = max(self.limit, USUAL * statistics.median(self.durations or [0.0]))
        self.step, self.last, self.compiling, self.shape = step, now, False, None

    @contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Allow at least `seconds` inside the block; to be used on all ranks or on none."""
        before, self.allowed = self.allowed, max(self.allowed, seconds)
        self.last = time.monotonic()
        try:
            yield
        finally:  # an evaluation may be broken off
            self.allowed, self.last = before, time.monotonic()

    def _compiles(self, _: object) -> None:
        """Called when a compilation starts: say for which shape, before it takes its time."""
        if self.shape:
            self.tell("compiling for pictures of {1} x {0} px".format(*self.shape))
        self.compiling, self.shape = True, None

    def _watch(self) -> None:
        note, heard = None, 0.0
        while not self.done.wait(min(1.0, self.limit / 10)):
            rendezvous.answer(self.store, self.here.rank)
            self._say_compiling()
            now = time.monotonic()
            if not note:
                rendezvous.miss(self.store, self.neighbours)
                note = rendezvous.note(self.store)
                heard = now
            if note and now - max(heard, self.last) > HEARD:
                self._leave(rendezvous.lost(self.here.rank, note))
            waited = now - self.last
            if waited > self.allowed and not (
                waited <= FIRST * self.limit and self._somebody_compiles()
            ):
                self._end(waited)

    def _say_compiling(self) -> None:
        """Let the other ranks know whether this one is compiling in this step."""
        if self.compiling != self.said:
            note = f"rank {self.here.rank} compiles"
            with suppress(dist.DistError):
                if self.compiling:
                    self.store.set(note, "")
                else:
                    self.store.delete_key(note)
            self.said = self.compiling

    def _somebody_compiles(self) -> bool:
        with suppress(dist.DistError):
            return any(self.store.check([f"rank {n} compiles"]) for n in range(self.here.size))
        return False

    def _end(self, waited: float) -> NoReturn:
        """Print the stacks, wait for the others to do so, and leave."""
        rank = self.here.rank
        with suppress(OSError, ValueError):  # stderr may be closed
            print(
                f"rank {rank}: no step for {waited:.0f} s; the stacks of its threads:",
                file=sys.stderr,
            )
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.stderr)
        after = "the first step" if self.step is None else f"the step after {self.step}"
        sentence = f"rank {rank} of {self.here.size} waited {waited:.0f} s for {after} to finish"
        silent = rendezvous.silent(self.store, rank, self.here.size, "hangs", ANSWER)
        if silent:
            sentence += f"; {', '.join(f'rank {other}' for other in silent)} does not answer"
        first = silent[0] if silent else None
        self._leave(LostPeer(sentence, first), "; the stacks above say where")

    def _leave(self, error: LostPeer, more: str = "") -> NoReturn:
        """Print the reason, record it, and end the process."""
        with suppress(OSError, ValueError):
            print(f"daybreak: {error}{more}", file=sys.stderr, flush=True)
        with suppress(Exception):
            self.leave(error)
        os._exit(LostPeer.code)
