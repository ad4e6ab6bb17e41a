"""What a run may spend, what it has spent, and how it ends in time: the recipe's [budget].

Seconds count from the birth of each process that works on the run and on nothing else, start-up
and compilation included, because that is what is paid for. What is spent stands in RUN/run.json: it
is written before the first step, every second while steps are taken, and with every checkpoint, so
that it survives interruptions, and steps that were lost with one stay spent.

The learning rate falls to zero over the last `cooldown` of the budget, whatever the schedule of
the stage says. The run ends when another step, and the checkpoint, would not fit any more; or
when its steps are done, if that is sooner. A budget does not shorten one stage in favour of the
next: `daybreak plan --budget` says with how many steps all of them fit.

Units   seconds of all processes together are one second; dollars of all devices together.
"""

import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from daybreak.failure import BadRecipe

EVERY = 1.0  # seconds between two entries
CLOSING = 1.0  # seconds for the last checkpoint, until one was saved


class Config(BaseModel):
    """How much may be spent; where several are given, what is reached first ends the run.

    `dollars` needs a `price`: dollars an hour for all devices together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float | None = Field(default=None, gt=0)
    dollars: float | None = Field(default=None, gt=0)
    flops: float | None = Field(default=None, gt=0)
    price: float | None = Field(default=None, gt=0)
    cooldown: float = Field(default=0.2, ge=0, le=1)

    @model_validator(mode="after")
    def _says_how_much(self) -> "Config":
        if self.seconds is None and self.dollars is None and self.flops is None:
            raise ValueError("say how much: seconds, dollars or flops")
        if self.dollars is not None and self.price is None:
            raise ValueError(
                "dollars need a price, in dollars an hour for all devices together: for example "
                "--set budget.price=3.5"
            )
        return self

    @property
    def limit(self) -> float | None:
        """Seconds that may be spent, by the clock or by the price of an hour."""
        clock = [] if self.seconds is None else [self.seconds]
        if self.dollars is not None and self.price is not None:
            clock.append(3600 * self.dollars / self.price)
        return min(clock, default=None)


def age() -> float:
    """Seconds since this process was born; since this module was loaded where that is not known."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        born = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - born
    except (OSError, IndexError, ValueError, AttributeError):
        return time.monotonic() - LOADED


LOADED = time.monotonic()


def stopwatch(gone: float = 0.0) -> Callable[[], float]:
    """Return a clock that counts seconds from now on, and those that are gone already."""
    began = time.monotonic()
    return lambda: gone + time.monotonic() - began


def check(config: Config, step: float, gone: float) -> None:
    """Refuse a budget that does not pay for the first step, of so many FLOPs.

    Errors  BadRecipe, with one that does.
    """
    limit, gone = config.limit, gone + CLOSING
    if config.flops is not None and config.flops < step:
        raise BadRecipe(
            f"a budget of {config.flops:.3g} FLOP is too small for one step: give at least "
            f"--budget {1.01 * step:.2e}flop"
        )
    if limit is not None and limit < gone:
        raise BadRecipe(
            f"a budget of {limit:.3g} s is spent before the first step, by start-up and the time "
            f"that a checkpoint takes: give at least --budget {math.ceil(2 * gone)}s"
        )


class Ledger:
    """Keeps account in a JSON file that is there already. Without a budget it only writes."""

    def __init__(
        self,
        file: Path,
        config: Config | None,
        clock: Callable[[], float],
        writes: bool = True,
    ) -> None:
        self.file, self.config, self.clock, self.writes = file, config, clock, writes
        # Others need not see the file yet, which the first rank has just written: over a network
        # a folder that was not there stays so for a while.
        before = self._read().get("ledger", {}) if writes else {}
        self.seconds, self.flops = before.get("seconds", 0.0), before.get("flops", 0.0)
        self.sessions = before.get("sessions", 0) + 1
        self.closing = max(CLOSING, before.get("seconds_of_a_save", 0.0))
        self.each = before.get("flops_of_a_step", 0.0)  # the next one's
        self.steps: deque[float] = deque(maxlen=16)
        self.written = self.last = clock()

    @property
    def spent(self) -> float:
        """Seconds that this process and those before it have worked on the run."""
        return self.seconds + self.clock()

    def step(self, flops: float, following: float, compiled: bool = False) -> None:
        """Hear that a step was taken, of how much arithmetic, and of how much the `following` is.

        One that also `compiled` says nothing about how long others take.
        """
        now = self.clock()
        if not compiled:
            self.steps.append(now - self.last)
        self.last = now
        self.each = following
        self.flops += flops
        if now - self.written >= EVERY:
            self.write()

    def saved(self, seconds: float) -> None:
        """Hear how long a checkpoint took; time between steps is none of the next step's."""
        self.closing = max(self.closing, seconds)
        self.last = self.clock()

    @property
    def gone(self) -> float:
        """Share of the budget that is spent, as of now."""
        shares = [0.0]
        if self.config and self.config.limit:
            shares.append(self.spent / max(self.config.limit - self.closing, 1e-9))
        if self.config and self.config.flops:
            shares.append(self.flops / self.config.flops)
        return max(shares)

    @property
    def factor(self) -> float:
        """What multiplies the learning rate: 1, then falling to 0 at the end of the budget."""
        if self.config is None or not self.config.cooldown:
            return 1.0
        return min(1.0, max(0.0, 1 - self.gone) / self.config.cooldown)

    @property
    def late(self) -> bool:
        """Whether there is no time for another step, and a checkpoint after it."""
        if self.config is None or self.config.limit is None:
            return False
        usual = statistics.median(self.steps) if self.steps else 0.0
        return self.spent + usual + self.closing > self.config.limit

    @property
    def full(self) -> bool:
        """Whether another step would take more FLOPs than there are."""
        if self.config is None or self.config.flops is None:
            return False
        return self.flops + self.each > self.config.flops

    @property
    def over(self) -> bool:
        """Whether another step would be one too many."""
        return self.late or self.full

    def write(self) -> None:
        """Enter what is spent; a full disk delays the entry, and does not end the run."""
        self.written = self.clock()
        if not self.writes:  # of several ranks one does
            return
        mine = {
            "seconds": round(self.spent, 3),
            "seconds_of_a_save": round(self.closing, 3),
            "flops": self.flops,
            "flops_of_a_step": self.each,
            "sessions": self.sessions,
        }
        staged = self.file.with_name(f".tmp-{self.file.name}")
        try:
            facts = self._read() | {"ledger": mine}
            staged.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            staged.replace(self.file)
        except OSError:
            staged.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        return found
