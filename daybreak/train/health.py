"""Is the run healthy? Checked after the backward pass, with the same answer on all ranks.

    Guard       a loss or gradient that is not finite is never learned from; a spike in the loss is
                logged, skipped, or answered with a return to the last checkpoint
    compare     what several ranks hold in copies must be equal to the last bit
    Pace        which rank keeps the others waiting, and why

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

RECENT, ENOUGH = 64, 16  # losses that the next is compared with, and the least number of them
SLOW = 5  # a wait is long if it takes 5 usual steps: the median of LAST steps, once KNOWN are done
KNOWN, LAST = 5, 20
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Thing = TypeVar("Thing")


class Config(BaseModel):
    """What counts as a problem, and what to do then.

    A run ends after `bad_steps` steps in a row that could not be learned from. A spike is a loss
    above `spike_ratio` times the median of the last 64: "log" still learns from it, "skip" does
    not, "rollback" returns to the weights of the last checkpoint and continues with the next batch.
    Ranks are compared every `check_every` steps. A step that takes more than `step_timeout` seconds
    and more than ten times as long as usual is a hang.
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

    `refuses` decides on the device; `judge` later gets the same numbers on the host and reaches the
    same decision.

    Incidents go to RUN/incidents.jsonl, with the samples of the batch. Checkpoints must hold
    `state`, so that a resumed run decides in the same way.
    """

    def __init__(
        self,
        config: Config,
        file: Path | None,
        start: int = 0,
        tell: Callable[[str], None] = print,
    ) -> None:
        """Begin after step `start`. The rank with a `file` writes; its later lines are removed."""
        self.config, self.file, self.tell = config, file, tell
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.bad = 0  # steps in a row that were not taken
        if file:
            disk.cut_lines(file, start)

    @property
    def usual(self) -> float:
        """The median of recent losses, or infinity while there are too few."""
        return statistics.median(self.recent) if len(self.recent) >= ENOUGH else math.inf

    @property
    def limit(self) -> float:
        """A loss above this is a spike."""
        return self.usual + (self.config.spike_ratio - 1) * abs(self.usual)

    def refuses(self, rows: Float[Tensor, "r 2"]) -> Float[Tensor, ""]:
        """Return 1 for a step that must not be taken, else 0; the host need not wait for it.

        The mean of float32 numbers in float64 does not depend on their order.
        """
        good = rows.isfinite().all()
        if self.config.spike != "log":
            good &= rows[:, 0].double().mean() <= self.limit
        return 1 - good.float()

    def judge(self, step: int, rows: Float[Tensor, "r 2"], samples: Sequence[int]) -> Verdict:
        """Return the decision, and remember the loss. A refused batch is not tried again.

        Errors  NotFinite on all ranks, after `bad_steps` steps in a row that were not taken.
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
        """Restore the losses of a checkpoint; bad steps since then still count."""
        self.recent = deque(state["recent"], maxlen=RECENT)

    def new_stage(self) -> None:
        """Forget the losses so far: at another resolution they have a different magnitude."""
        self.recent.clear()

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, ready for JSON."""
        return {"recent": list(self.recent), "bad": self.bad}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of an earlier guard."""
        self.return_to(state)
        self.bad = state["bad"]

    def _taken(self, loss: float) -> Verdict:
        self.recent.append(loss)
        self.bad = 0
        return Verdict(step=True)

    def _record(self, sentence: str, facts: dict[str, Any]) -> None:
        """Print an incident and add it to the file; a full disk is ignored."""
        if self.file is None:
            return
        self.tell(sentence)
        line = json.dumps(_readable(facts)) + "\n"
        with suppress(OSError), self.file.open("a", encoding="utf-8") as file:
            file.write(line)


def compare(here: World, tensors: Mapping[str, Tensor]) -> None:
    """Check that all copies of the same rows are equal bit by bit.

    Under HSDP these are the replicas of a row; a tensor that is no DTensor has a copy on every
    rank. A sum over the bits is compared, so that little has to be sent.

    Errors  LostPeer on all ranks, naming the tensor and the rank that differs from the majority;
            if two ranks differ from one another, both.
    """
    if here.mesh is None:
        return

    from torch.distributed.tensor import DTensor

    if here.mesh.ndim == 1:  # sharded rows exist only once
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
    """Measures the time that a rank spends on its own, outside collectives.

    Steps take equally long on all ranks, because each waits for the slowest. Ranks differ in how
    long they wait for pictures, and in how long a small fixed computation takes on their device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.durations: deque[float] = deque(maxlen=LAST)  # of steps, waiting included
        self.warned = False  # about the thing waited for now
        self.waited, self.steps, self.since = 0.0, 0, time.monotonic()
        self.last = 0.0  # seconds waited for the newest thing

    def timed(self, things: Iterable[Thing]) -> Iterator[Thing]:
        """Yield the things, one a step, and measure the wait for each."""
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
        """Return a warning, once for each thing, if the wait exceeds five usual steps; else "".

        `waited` is the wait so far, in seconds.
        """
        usual = statistics.median(self.durations) if len(self.durations) >= KNOWN else math.inf
        if self.warned or waited <= SLOW * usual:
            return ""
        self.warned = True
        return (
            f"still waiting for the next pictures after {waited:.1f} s, while a step usually takes "
            f"{usual:.2f} s: the disk is slow, or data.workers is too low"
        )

    def laggards(self, here: World) -> list[str]:
        """Name the ranks that held up the others since the last call, and why.

        A rank is named if it waits for pictures a tenth of a step longer than the median rank, or
        if it computes 1.5 times as long.
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
    """Seconds for a product of two square matrices, the best of three."""
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

    As 8-byte words, if the size is a multiple of 8 bytes: a sum of narrower words would first copy
    them to 8-byte words, which takes gigabytes for the embedding of a frozen encoder.
    """
    mine = local(tensor.detach()).contiguous().flatten()
    if mine.nbytes % 8:
        return mine.view(WORDS[mine.element_size()]).sum(dtype=torch.int64)
    if mine.storage_offset() * mine.element_size() % 8:
        mine = mine.clone()  # a view as 8-byte words must start at a multiple of 8 bytes
    return mine.view(torch.int64).sum()


def _readable(value: Any) -> Any:
    """Turn numbers that JSON cannot express (not finite) into text."""
    if isinstance(value, dict):
        return {key: _readable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_readable(entry) for entry in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
