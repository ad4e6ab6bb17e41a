"""A run that hangs says where, and ends.

A rank that waits for another waits for ever and in silence. So a thread of each rank counts the
seconds since the last step. When they are too many it prints what every thread of its process is
doing, and all ranks do so at about the same time: the one whose stack is not in a collective is
the one that the others wait for. A rank that does not even answer is named.

A rank that fails leaves a note; for one that was killed, a rank on the same machine leaves it. gloo
tells the others at once, by an error; NCCL lets them wait. So a rank that has found a note, and for
a while has taken no step, ends for the reason in the note. It has to be sooner than torchrun, which
kills all ranks after 30 s, and then none could say why.

A shape of pictures that first comes in the middle of a run is compiled then, and all ranks wait for
the one that compiles. Such a step may take as long as the first one, and the log says what for.

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

FIRST = 5  # times the limit for what happens seldom: compilation, first pictures
USUAL = 10  # times the median of the last steps
ANSWER = 5.0  # seconds in which the other ranks say that they noticed too
HEARD = 10.0  # seconds in which a rank notices by itself that another has failed


class Watchdog:
    """Ends the process with code 6 if no step is done for `limit` seconds and ten usual steps.

    Also soon after another rank has failed, if this one has not noticed.

        with Watchdog(here, config.step_timeout, leave) as watchdog:
            for ...:
                watchdog.begin(height, width)
                watchdog.beat(step)
                with watchdog.patience(600): save

    `leave` hears of it last, from the thread: to write down why the run has ended.
    `compiled` says that the run compiles parts of itself; `tell` then hears when, once a step.
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
        self.shape: tuple[int, int] | None = None  # of this step's pictures, until it is told
        self.compiling, self.said = False, False  # in this step; whether the others can know
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        """Begin to count."""
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
        """Hear of what is compiled; again after torch.compiler.reset(), which forgets who hears."""
        if self.compiled:
            from torch._dynamo.callback import on_compile_start

            on_compile_start(self._compiles)

    def begin(self, height: int, width: int) -> None:
        """Say of what size the pictures of the next step are."""
        self.shape = height, width

    def beat(self, step: int) -> None:
        """Say that a step is done."""
        now = time.monotonic()
        if self.step is not None:
            self.durations.append(now - self.last)
        self.allowed = max(self.limit, USUAL * statistics.median(self.durations or [0.0]))
        self.step, self.last, self.compiling, self.shape = step, now, False, None

    @contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Allow what is inside so many seconds, if that is more; on all ranks or on none."""
        before, self.allowed = self.allowed, max(self.allowed, seconds)
        self.last = time.monotonic()
        try:
            yield
        finally:  # an evaluation may be broken off
            self.allowed, self.last = before, time.monotonic()

    def _compiles(self, _: object) -> None:
        """Hear that something is being compiled, and say what for before it takes its time."""
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
        """Let the others know whether something is compiled in this step."""
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
        with suppress(OSError, ValueError):  # nobody has to listen
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
        """Say why, write it down, and end the process."""
        with suppress(OSError, ValueError):
            print(f"daybreak: {error}{more}", file=sys.stderr, flush=True)
        with suppress(Exception):
            self.leave(error)
        os._exit(LostPeer.code)
