"""What a run may spend, what it has spent, and how it ends in time: the recipe's [budget].

Seconds count from the start of each process that works on the run (and on nothing else), start-up
and compilation included, because they are paid for too. Dollars are what the devices of each
process cost in its seconds. The amount spent is kept in RUN/run.json: it is written before the
first step, every second during steps and evaluations, and with every checkpoint. So it survives
interruptions, and steps lost in one still count as spent.

The learning rate falls to zero over the last share `cooldown` of the budget, in addition to the
stage's schedule. The run ends when another step and a checkpoint would no longer fit, or when its
steps are done, if that is sooner. How long a compiling step (when the resolution changes), a
checkpoint or a grid takes is known only after one was seen: until then a compilation and a grid
count as 0 s, and a checkpoint as its bytes at an assumed disk speed. A budget does not shorten one
stage in favour of the next: `daybreak plan --budget` says how many steps make all stages fit.

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

MOST = 1e30  # upper limit of any budget, larger than any real one
EVERY, SHARE = 1.0, 0.005  # seconds between two entries, and the share of time they may take
CLOSING = 1.0  # least seconds for the last checkpoint
ENDING = 1.5  # seconds that a process takes to end, after its last entry
DISK = 5e8  # bytes written per second, assumed until the first checkpoint
GRACE = 3.0  # seconds by which compiling may make a run end late, so that less time stays unused


class Config(BaseModel):
    """How much may be spent; if several limits are given, the first one reached ends the run.

    `dollars` needs a `price` in dollars an hour for one device, like `daybreak plan --price`.
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
    """Seconds since this process started, or since this module was loaded if that is unknown."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        born = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - born
    except (OSError, IndexError, ValueError, AttributeError):
        return time.monotonic() - LOADED


LOADED = time.monotonic()


def stopwatch(gone: float) -> Callable[[], float]:
    """Return a clock that counts seconds from now on, starting at `gone`."""
    began = time.monotonic()
    return lambda: gone + time.monotonic() - began


class Ledger:
    """Keeps account of the spending in a run's run.json. Without a budget it only records.

    An hour of all devices costs `rate` dollars, if known; a checkpoint has `size` bytes.
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
        # Only the writing rank reads the file: it may have just been written, and on a network disk
        # other machines may not see a new folder for a while.
        before = facts.read(file.parent).get("ledger", {}) if writes else {}
        self.seconds, self.flops = before.get("seconds", 0.0), before.get("flops", 0.0)
        self.dollars = before.get("dollars", self.seconds * (rate or 0.0) / 3600)
        self.sessions = before.get("sessions", 0) + 1
        self.saving = before.get("seconds_of_a_save", 0.0)
        self.guess = size / DISK
        self.drawing = 0.0
        self.each = before.get("flops_of_a_step", 0.0)  # FLOPs of the next step
        self.compiling, self.compiles = 0.0, True  # seconds of such a step; whether the next is one
        self.steps: deque[float] = deque(maxlen=16)
        self.written = self.last = clock()
        self.entering = 0.0  # seconds that the last entry took

    @property
    def spent(self) -> float:
        """Seconds that this process and earlier ones have worked on the run."""
        return self.seconds + self.clock()

    @property
    def paid(self) -> float | None:
        """Dollars that these processes have cost, each with its own devices; None if unknown."""
        if self.rate is None and not self.dollars:
            return None
        return self.dollars + (self.rate or 0.0) * self.clock() / 3600

    @property
    def limit(self) -> float | None:
        """Total seconds that may be spent, by `seconds` or by `dollars` at the current rate."""
        found = []
        if self.config and self.config.seconds is not None:
            found.append(self.config.seconds)
        if self.config and self.config.dollars is not None and self.rate:
            found.append(self.seconds + 3600 * (self.config.dollars - self.dollars) / self.rate)
        return min(found, default=None)

    @property
    def left(self) -> float:
        """Seconds that the budget still pays for; FLOPs are converted at the current speed."""
        found = [math.inf if self.limit is None else self.limit - self.spent]
        if self.config and self.config.flops is not None and self.each and self.steps:
            found.append((self.config.flops - self.flops) / self.each * self.usual)
        return max(0.0, min(found))

    @property
    def usual(self) -> float:
        """Seconds of a step: the median of the last steps."""
        return statistics.median(self.steps) if self.steps else 0.0

    @property
    def closing(self) -> float:
        """Seconds that the last checkpoint and the end of the process will take."""
        return ENDING + max(CLOSING, self.saving or self.guess)

    def check(self, step: float) -> None:
        """Refuse a budget that does not pay for the first step, which takes `step` FLOPs.

        Errors  BadRecipe, naming a budget that does.
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
        """Enter a finished step and its `flops`; the next step has `following` FLOPs.

        If it was `new`, the first of a stage or of this process, its duration is not typical of
        others. `compiles` says whether the next step has to compile.
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
        """Note how long a checkpoint took; this time does not count towards the next step."""
        self.saving = max(self.saving, seconds)
        self.last = self.clock()

    def drew(self, seconds: float) -> None:
        """Note how long a grid, or anything else between two steps, took."""
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
        """Whether there is no time left for another step and a checkpoint after it.

        `first` is how many seconds something else, such as a grid, takes before that step.
        """
        if self.limit is None:
            return False
        step = self.usual + (max(0.0, self.compiling - GRACE) if self.compiles else 0.0)
        return self.spent + first + step + self.closing > self.limit

    @property
    def full(self) -> bool:
        """Whether another step would take more FLOPs than are left."""
        if self.config is None or self.config.flops is None:
            return False
        return self.flops + self.each > self.config.flops

    @property
    def over(self) -> bool:
        """Whether another step would exceed the budget, in time or in FLOPs."""
        return self.late() or self.full

    def tick(self) -> None:
        """Enter what is spent, if the last entry is a second old, or older on a slow disk."""
        if self.clock() - self.written >= max(EVERY, self.entering / SHARE):
            self.write()

    def end(self) -> None:
        """Make the last entry of a process, which includes the time it takes to end."""
        self.seconds += ENDING
        self.dollars += ENDING * (self.rate or 0.0) / 3600
        self.write()

    def write(self) -> None:
        """Enter what is spent; a full disk delays the entry but does not end the run."""
        self.written = self.clock()
        if not self.writes:  # only the first rank does
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
