"""What a run may spend, what it has spent, and how it ends in time: the recipe's [budget].

Seconds count from the birth of each process that works on the run and on nothing else, start-up
and compilation included, because that is what is paid for; dollars as many as the devices of each
process cost in its seconds. What is spent stands in RUN/run.json: it is written before the first
step, every second while steps are taken or pictures evaluated, and with every checkpoint, so that
it survives interruptions, and steps that were lost with one stay spent.

The learning rate falls to zero over the last `cooldown` of the budget, whatever the schedule of
the stage says. The run ends when another step, and the checkpoint, would not fit any more; or
when its steps are done, if that is sooner. What a step takes that also compiles, where pictures
change their size, and what a checkpoint and a grid take, is known when one was seen: before that
a compilation and a grid count nothing, and a checkpoint what a disk needs for its bytes. A budget
does not shorten one stage in favour of the next: `daybreak plan --budget` says with how many steps
all of them fit.

Units   seconds of a run, however many processes it has; dollars of all its devices together.
"""

import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from daybreak.data import disk
from daybreak.failure import BadRecipe, BadStorage
from daybreak.train import facts

MOST = 1e30  # of anything that a budget may be: more than there is
EVERY, SHARE = 1.0, 0.005  # seconds between two entries, and the share of time they may take
CLOSING = 1.0  # seconds for the last checkpoint at least
ENDING = 1.5  # seconds that a process takes to end, when nothing can be entered any more
DISK = 5e8  # bytes a second that are written, until a checkpoint was
GRACE = 3.0  # seconds that compiling may make a run end late: else more time would stay unused


class Config(BaseModel):
    """How much may be spent; where several are given, what is reached first ends the run.

    `dollars` needs a `price`: dollars an hour for one device, as `daybreak plan --price`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float | None = Field(default=None, gt=0, lt=MOST)
    dollars: float | None = Field(default=None, gt=0, lt=MOST)
    flops: float | None = Field(default=None, gt=0, lt=MOST)
    price: float | None = Field(default=None, gt=0, lt=MOST)
    cooldown: float = Field(default=0.2, ge=0, le=1)

    @model_validator(mode="after")
    def _says_how_much(self) -> "Config":
        if self.seconds is None and self.dollars is None and self.flops is None:
            raise ValueError("give an amount: seconds, dollars or flops")
        if self.dollars is not None and self.price is None:
            raise ValueError(
                "dollars need a price, in dollars an hour for one device: for example "
                "--set budget.price=3.5"
            )
        return self


def age() -> float:
    """Seconds since this process was born; since this module was loaded where that is not known."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        born = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - born
    except (OSError, IndexError, ValueError, AttributeError):
        return time.monotonic() - LOADED


LOADED = time.monotonic()


def stopwatch(gone: float) -> Callable[[], float]:
    """Return a clock that counts seconds from now on, and those that are gone already."""
    began = time.monotonic()
    return lambda: gone + time.monotonic() - began


class Ledger:
    """Keeps account in a run's run.json. Without a budget it only writes.

    An hour of all devices costs `rate` dollars, where that is known; a checkpoint has `size` bytes.
    """

    def __init__(
        self,
        file: Path,
        config: Config | None,
        clock: Callable[[], float],
        writes: bool = True,
        rate: float | None = None,
        size: float = 0.0,
    ) -> None:
        self.file, self.config, self.clock, self.writes = file, config, clock, writes
        self.rate = rate
        # Others need not see the file yet, which the first rank has just written: over a network
        # a folder that was not there stays so for a while.
        before = facts.read(file.parent).get("ledger", {}) if writes else {}
        self.seconds, self.flops = before.get("seconds", 0.0), before.get("flops", 0.0)
        self.dollars = before.get("dollars", self.seconds * (rate or 0.0) / 3600)
        self.sessions = before.get("sessions", 0) + 1
        self.saving = before.get("seconds_of_a_save", 0.0)
        self.guess = size / DISK
        self.drawing = 0.0
        self.each = before.get("flops_of_a_step", 0.0)  # the next one's
        self.compiling, self.compiles = 0.0, True  # seconds of it; whether the next step does
        self.steps: deque[float] = deque(maxlen=16)
        self.written = self.last = clock()
        self.entering = 0.0  # seconds that the last entry took

    @property
    def spent(self) -> float:
        """Seconds that this process and those before it have worked on the run."""
        return self.seconds + self.clock()

    @property
    def paid(self) -> float | None:
        """Dollars that they have cost, each with the devices it had, where those have a price."""
        if self.rate is None and not self.dollars:
            return None
        return self.dollars + (self.rate or 0.0) * self.clock() / 3600

    @property
    def limit(self) -> float | None:
        """Seconds that may be spent in all, by the clock or by what an hour costs now."""
        found = []
        if self.config and self.config.seconds is not None:
            found.append(self.config.seconds)
        if self.config and self.config.dollars is not None and self.rate:
            found.append(self.seconds + 3600 * (self.config.dollars - self.dollars) / self.rate)
        return min(found, default=None)

    @property
    def left(self) -> float:
        """Seconds that the budget pays for from now on, its FLOPs at today's pace."""
        found = [math.inf if self.limit is None else self.limit - self.spent]
        if self.config and self.config.flops is not None and self.each and self.steps:
            found.append((self.config.flops - self.flops) / self.each * self.usual)
        return max(0.0, min(found))

    @property
    def usual(self) -> float:
        """Seconds of a step, the median of the last ones."""
        return statistics.median(self.steps) if self.steps else 0.0

    @property
    def closing(self) -> float:
        """Seconds that the last checkpoint will take, and the end of the process."""
        return ENDING + max(CLOSING, self.saving or self.guess)

    def check(self, step: float) -> None:
        """Refuse a budget that does not pay for the first step, of so many FLOPs.

        Errors  BadRecipe, with one that does.
        """
        config, needed = self.config, self.spent + self.closing
        if config is None:
            return
        if config.flops is not None and config.flops < self.flops + step:
            raise BadRecipe(
                f"a budget of {config.flops:.3g} FLOP is too small for one step: give at least "
                f"--budget {1.01 * (self.flops + step):.2e}flop"
            )
        if self.limit is None or self.limit >= needed:
            return
        if config.seconds is not None and config.seconds <= self.limit:
            given, enough = f"{config.seconds:.3g} s", f"{math.ceil(2 * needed)}s"
        else:
            assert self.rate is not None
            more = self.dollars + self.rate * (2 * needed - self.seconds) / 3600
            given = f"{config.dollars:.3g} usd, at {self.rate:.4g} an hour,"
            enough = f"{math.ceil(100 * more) / 100:.2f}usd"
        before = f"with {self.seconds:.0f} s of earlier starts, " if self.seconds else ""
        raise BadRecipe(
            f"a budget of {given} is spent before the first step, {before}by start-up and saving a "
            f"checkpoint: give at least --budget {enough}"
        )

    def step(
        self, flops: float, following: float, new: bool = False, compiles: bool = False
    ) -> None:
        """Enter a step that was taken, of so many `flops`; the `following` one has so many.

        How long it took says nothing of others if it was `new`: the first of a stage or of this
        process. `compiles` tells whether the following one has to compile.
        """
        now = self.clock()
        if not new:
            self.steps.append(now - self.last)
        elif self.compiles:
            self.compiling = max(self.compiling, now - self.last)
        self.last = now
        self.each, self.compiles = following, compiles
        self.flops += flops
        self.tick()

    def saved(self, seconds: float) -> None:
        """Hear how long a checkpoint took; time between steps is none of the next step's."""
        self.saving = max(self.saving, seconds)
        self.last = self.clock()

    def drew(self, seconds: float) -> None:
        """Hear how long a grid took, or another thing between two steps."""
        self.drawing = max(self.drawing, seconds)
        self.last = self.clock()

    @property
    def gone(self) -> float:
        """Share of the budget that is spent, as of now."""
        shares = [0.0]
        if self.config and self.config.seconds:
            shares.append(self.spent / max(self.config.seconds - self.closing, 1e-9))
        if self.config and self.config.dollars and self.rate and self.paid:
            closing = self.rate * self.closing / 3600
            shares.append(self.paid / max(self.config.dollars - closing, 1e-9))
        if self.config and self.config.flops:
            shares.append(self.flops / self.config.flops)
        return max(shares)

    @property
    def factor(self) -> float:
        """What multiplies the learning rate: 1, then falling to 0 at the end of the budget."""
        if self.config is None or not self.config.cooldown:
            return 1.0
        return min(1.0, max(0.0, 1 - self.gone) / self.config.cooldown)

    def late(self, first: float = 0.0) -> bool:
        """Whether there is no time for another step, and a checkpoint after it.

        `first` is how many seconds something else, a grid, takes before that step.
        """
        if self.limit is None:
            return False
        step = self.usual + (max(0.0, self.compiling - GRACE) if self.compiles else 0.0)
        return self.spent + first + step + self.closing > self.limit

    @property
    def full(self) -> bool:
        """Whether another step would take more FLOPs than there are."""
        if self.config is None or self.config.flops is None:
            return False
        return self.flops + self.each > self.config.flops

    @property
    def over(self) -> bool:
        """Whether another step would be one too many."""
        return self.late() or self.full

    def tick(self) -> None:
        """Enter what is spent, if the last entry is a second old; where disks are slow, older."""
        if self.clock() - self.written >= max(EVERY, self.entering / SHARE):
            self.write()

    def end(self) -> None:
        """Make the last entry of a process, whose end is paid for too."""
        self.seconds += ENDING
        self.dollars += ENDING * (self.rate or 0.0) / 3600
        self.write()

    def write(self) -> None:
        """Enter what is spent; a full disk delays the entry, and does not end the run."""
        self.written = self.clock()
        if not self.writes:  # of several ranks one does
            return
        mine = {
            "seconds": round(self.spent, 3),
            **({} if self.paid is None else {"dollars": round(self.paid, 4)}),
            "seconds_of_a_save": round(self.saving, 3),
            "flops": self.flops,
            "flops_of_a_step": self.each,
            "sessions": self.sessions,
        }
        with suppress(OSError, BadStorage), disk.fresh(self.file) as staged:
            told = facts.read(self.file.parent) | {"ledger": mine}
            staged.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        self.entering = self.clock() - self.written
