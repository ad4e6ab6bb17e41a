"""Is the run well? Asked after the backward pass, answered alike on all ranks.

    Guard       a loss or gradient that is not finite is never learned from; a loss that leaps is
                logged, skipped, or answered with a return to the last checkpoint
    compare     what several ranks hold twice must be equal to the last bit
    Pace        which rank keeps the others waiting, and with what

Every verdict follows from numbers that all ranks have (parallel.gather), so none has to be sent.

Letters  r ranks, n tensors.
"""

import json
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from daybreak.data import disk
from daybreak.failure import LostPeer, NotFinite
from daybreak.train.parallel import World, gather, local

RECENT, ENOUGH = 64, 16  # losses that the next is compared with, and how many there must be
SLOW = 5  # times a usual step is a long wait: the median of LAST steps, if KNOWN are done
KNOWN, LAST = 5, 20
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Thing = TypeVar("Thing")


class Config(BaseModel):
    """When to worry, and what to do.

    A run ends after `bad_steps` in a row that could not be learned from. A spike is a loss that
    lies `spike_ratio` times as high as the median of the last 64: "log" learns from it all the
    same, "skip" does not, "rollback" returns to the weights of the last checkpoint and goes on with
    the next batch. Ranks are compared every `check_every` steps. A step that takes `step_timeout`
    seconds, and ten times as long as usual, is a hang.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bad_steps: int = Field(default=3, gt=0)
    spike: Literal["log", "skip", "rollback"] = "log"
    spike_ratio: float = Field(default=4.0, gt=1)
    check_every: int = Field(default=50, gt=0)
    step_timeout: float = Field(default=120.0, gt=0)


class Verdict(NamedTuple):
    """Whether to take the step; if not, whether to return to the last checkpoint."""

    step: bool
    back: bool = False


class Guard:
    """Decides whether a step is taken, from every rank's loss and gradient norm.

    `refuses` is the decision, on the device where those are; `judge` is told afterwards what they
    were, and comes to the same one.

    Incidents go to RUN/incidents.jsonl, with the samples of the batch. A checkpoint has to hold
    `state`, so that a replay judges alike.
    """

    def __init__(
        self,
        config: Config,
        file: Path | None,
        start: int = 0,
        tell: Callable[[str], None] = print,
    ) -> None:
        """Begin after step `start`. The rank that has a `file` writes; later lines in it go."""
        self.config, self.file, self.tell = config, file, tell
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.bad = 0  # steps in a row that were not taken
        if file:
            disk.cut_lines(file, start)

    @property
    def usual(self) -> float:
        """The median of late losses, or infinity as long as there are few."""
        return statistics.median(self.recent) if len(self.recent) >= ENOUGH else math.inf

    @property
    def limit(self) -> float:
        """The loss above which one leaps."""
        return self.usual + (self.config.spike_ratio - 1) * abs(self.usual)

    def refuses(self, rows: Float[Tensor, "r 2"]) -> Float[Tensor, ""]:
        """Return 1 for a step that must not be taken, else 0; no host has to wait for it.

        A mean of float32 in float64 is the same in any order.
        """
        good = rows.isfinite().all()
        if self.config.spike != "log":
            good &= rows[:, 0].double().mean() <= self.limit
        return 1 - good.float()

    def judge(self, step: int, rows: Float[Tensor, "r 2"], samples: Sequence[int]) -> Verdict:
        """Say what was decided, and remember the loss. A batch that is refused is used up.

        Errors  NotFinite after `bad_steps` in a row that were not taken, on all ranks.
        """
        losses, norms = rows.T.tolist()
        loss, norm = rows.double().mean(0).tolist()
        good = rows.isfinite().all(1).tolist()  # by rank
        usual, finite = self.usual, all(good)
        if finite and loss <= self.limit:
            return self._taken(loss)
        where = f"samples {samples[0]} to {samples[-1]}"
        what = f"loss {loss:.4g}, gradient norm {norm:.4g}"
        if finite:
            what += f", recent median {usual:.4g}"
        elif len(good) > 1:
            what += f" on rank {good.index(False)}"
        take = not self.refuses(rows)
        self._record(
            f"step {step}: {what} ({where}); {'learned from anyway' if take else 'skipped'}",
            {"step": step, "loss": losses, "norm": norms, "usual": usual, "samples": list(samples)},
        )
        if take:
            return self._taken(loss)
        self.bad += 1
        if self.bad >= self.config.bad_steps:
            raise NotFinite(
                f"step {step}: {what} ({where}), {self.bad} steps in a row were unusable: lower "
                "the stage's lr, or clip; the same command continues from the last checkpoint, if "
                "there is one"
            )
        return Verdict(step=False, back=finite and self.config.spike == "rollback")

    def return_to(self, state: Mapping[str, Any]) -> None:
        """Take the losses that a checkpoint holds; what was bad since then still counts."""
        self.recent = deque(state["recent"], maxlen=RECENT)

    def new_stage(self) -> None:
        """Forget the losses so far: at another resolution they are of another size."""
        self.recent.clear()

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold, as JSON can."""
        return {"recent": list(self.recent), "bad": self.bad}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the guard that had this state."""
        self.return_to(state)
        self.bad = state["bad"]

    def _taken(self, loss: float) -> Verdict:
        self.recent.append(loss)
        self.bad = 0
        return Verdict(step=True)

    def _record(self, sentence: str, facts: dict[str, Any]) -> None:
        """Say it, and add a line to the file; a disk that is full does not matter now."""
        if self.file is None:
            return
        self.tell(sentence)
        line = json.dumps(_readable(facts)) + "\n"
        with suppress(OSError), self.file.open("a", encoding="utf-8") as file:
            file.write(line)


def compare(here: World, tensors: Mapping[str, Tensor]) -> None:
    """Check that ranks which hold the same rows hold the same bits of them.

    Under HSDP those are the replicas of a row; what is no DTensor is the same on all ranks. A sum
    over the bits is compared, so that little has to travel.

    Errors  LostPeer on all ranks, with the tensor, and the rank that differs from most; of two
            that differ from one another, both.
    """
    if here.mesh is None:
        return

    from torch.distributed.tensor import DTensor

    if here.mesh.ndim == 1:  # of rows there is one copy
        tensors = {name: value for name, value in tensors.items() if not isinstance(value, DTensor)}
    if not tensors:
        return
    sums = gather(here, torch.stack([_bits(tensor) for tensor in tensors.values()])).T.tolist()
    replicas = here.mesh.mesh.T.tolist() if here.mesh.ndim == 2 else []
    for (name, tensor), by_rank in zip(tensors.items(), sums, strict=True):
        for equal in replicas if isinstance(tensor, DTensor) else [range(here.size)]:
            if len({by_rank[rank] for rank in equal}) == 1:
                continue
            usual, votes = Counter(by_rank[rank] for rank in equal).most_common(1)[0]
            odd = [rank for rank in equal if by_rank[rank] != usual or 2 * votes <= len(equal)]
            raise LostPeer(
                f"{', '.join(f'rank {rank}' for rank in odd)} holds other bits of {name} than the "
                "ranks that should have identical copies: suspect its memory or its device; the "
                "same command continues from the last checkpoint",
                odd[0],
            )


class Pace:
    """Seconds that a rank spends by itself, before it meets the others.

    In the step itself all ranks are equally slow: each waits for the slowest. What tells them
    apart is the wait for pictures, and how long a small fixed computation takes on its device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.durations: deque[float] = deque(maxlen=LAST)  # of steps, with their waiting
        self.warned = False  # of the thing that is waited for now
        self.waited, self.steps, self.since = 0.0, 0, time.monotonic()
        self.last = 0.0  # seconds that the newest thing was waited for

    def timed(self, things: Iterable[Thing]) -> Iterator[Thing]:
        """Pass things on, one a step, and measure how long each was waited for."""
        remaining, received = iter(things), 0.0
        while True:
            began = time.monotonic()
            self.warned = False
            try:
                thing = next(remaining)
            except StopIteration:
                return
            now = time.monotonic()
            if received:
                self.durations.append(now - received)
            received, self.last = now, now - began
            self.waited += self.last
            self.steps += 1
            yield thing

    def late(self, waited: float) -> str:
        """Say, once for each thing, that it is waited for longer than five usual steps.

        `waited` is what it has taken so far, in seconds.
        """
        usual = statistics.median(self.durations) if len(self.durations) >= KNOWN else math.inf
        if self.warned or waited <= SLOW * usual:
            return ""
        self.warned = True
        return (
            f"waiting for the next pictures since {waited:.1f} s, while a step usually takes "
            f"{usual:.2f} s: the disk is slow, or data.workers is too low"
        )

    def laggards(self, here: World) -> list[str]:
        """Name the ranks that the others have waited for since the last call, and with what.

        Waiting counts if it makes up a tenth of a step, computing if it takes half as long again.
        """
        steps, passed = max(1, self.steps), time.monotonic() - self.since
        self.steps, waited, self.waited = 0, self.waited / steps, 0.0
        if here.mesh is None:
            return []
        row = torch.tensor([waited, _probe(self.device), passed / steps])
        self.since = time.monotonic()
        table = gather(here, row)
        waits, probes, whole = table.T.tolist()
        wait, probe, step = (statistics.median(column) for column in (waits, probes, whole))
        said = []
        for rank in range(here.size):
            if waits[rank] - wait > 0.1 * step:
                said.append(
                    f"rank {rank} waits {waits[rank]:.2f} s a step for its pictures, others "
                    f"{wait:.2f} s"
                )
            if probes[rank] > 1.5 * probe:
                said.append(
                    f"rank {rank} computes {probes[rank] / probe:.1f} times as slowly as others"
                )
        return said


def _probe(device: torch.device) -> float:
    """Seconds of a product of two square matrices, the best of three."""
    side, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    factor = torch.ones(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(3):
        began = time.monotonic()
        float((factor @ factor)[0, 0])  # waits for the device
        times.append(time.monotonic() - began)
    return min(times)


def _bits(tensor: Tensor) -> Int[Tensor, ""]:
    """Add up the bits of this rank's part of a tensor, as integers that wrap around.

    In words of eight bytes, if they come out even: a sum of narrower ones would copy them to wide
    ones first, which for a frozen encoder's embedding takes gigabytes.
    """
    mine = local(tensor.detach()).contiguous().flatten()
    if mine.nbytes % 8:
        return mine.view(WORDS[mine.element_size()]).sum(dtype=torch.int64)
    if mine.storage_offset() * mine.element_size() % 8:
        mine = mine.clone()  # a view of wide words begins at one
    return mine.view(torch.int64).sum()


def _readable(value: Any) -> Any:
    """Write what JSON has no number for as text."""
    if isinstance(value, dict):
        return {key: _readable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_readable(entry) for entry in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
