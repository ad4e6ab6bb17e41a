"""The log of a run: one JSON line per step in `metrics.jsonl`, and progress for whoever watches.

The file is the reference. When a run resumes at step k, lines of later steps are removed first, so
the file has every step exactly once, however often the run was interrupted.

On a terminal progress is a live bar, elsewhere a plain line every ten seconds. Neither can stop
the training: a closed pipe ends the output, a full disk delays lines until there is room again.

Letters  step counts from 1 to `steps`; `start` is the last step already done.
Units    images_per_second, flops_per_second (of all devices), its share of their peak and waiting,
         the share of time spent waiting for data, over the last seconds; seconds of training,
         without the pauses between runs; dollars of all devices; memory_mib is the most this
         process has used, in MiB.
"""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from daybreak.data import disk

EVERY = 10.0  # seconds between plain lines
REFRESH = 0.1  # seconds between updates of the bar
WINDOW = 30.0  # seconds over which the speed is averaged
SMOOTHING = 0.98  # of the loss shown; the file has the exact one
MIB = 2**20
FACTS = ("loss", "speed", "work", "waiting", "elapsed", "left", "memory")
WORK = {"PFLOP/s": 1e15, "TFLOP/s": 1e12, "GFLOP/s": 1e9}


class Mark(NamedTuple):
    """A moment, and what had been done by then."""

    time: float
    images: int
    flops: float = 0.0
    waited: float = 0.0


class Log:
    """The metrics file, and the progress display as a context manager.

        with Log(folder, steps=2000, start=0) as log:
            log.step(1, {"loss": 0.7, "norm": 1.3, "lr": 1e-4}, images=64)
            log.note("checkpoint-1000 saved")

    Everything happens inside the calls: no thread, no timer. Without a folder nothing happens at
    all, because only one rank keeps the log. `peak` is the peak of all devices in FLOP/s, and
    `price` their cost in dollars an hour; what is not known is not written. `held` returns the
    bytes used on an accelerator, which are then logged instead of this process's memory.
    """

    def __init__(
        self,
        folder: Path | None,
        steps: int,
        start: int = 0,
        stream: TextIO | None = None,
        every: float = EVERY,
        peak: float | None = None,
        price: float | None = None,
        held: Callable[[], int] | None = None,
    ) -> None:
        self.steps, self.peak, self.price = steps, peak, price
        self.peak_memory, self.memory = held or peak_memory, held or memory
        self.start = start
        self.every = every
        self.stream = stream or sys.stdout
        self.watched = folder is not None  # until printing fails

        self.path: Path | None = None
        last: dict[str, float] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / "metrics.jsonl"
            last = disk.cut_lines(self.path, start)
        self.images = int(last.get("images", 0))
        self.seconds = float(last.get("seconds", 0.0))
        self.unwritten = b""
        self.file: BinaryIO | None = None  # kept open: on a shared disk, closing waits for writing
        self.warned = False

        self.began = self.printed = time.monotonic()
        self.recent = deque([Mark(self.began, self.images)])
        self.paid: float | None = None
        self.to_go, self.may = float(steps - start), math.inf
        self.loss = 0.0
        self.weight = 0.0
        console = _Console(file=self.stream, highlight=False)
        live = self.watched and console.is_terminal and not console.is_dumb_terminal
        self.progress = _bar(console) if live else None
        if self.progress:
            facts = self._facts(self.began)
            self.task = self.progress.add_task("", total=steps, completed=start, **facts)

    def __enter__(self) -> Self:
        """Start the bar, if there is one."""
        if self.progress:
            self._show(self.progress.start)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar's last state visible; write lines that could not be written before."""
        self._write(b"")
        self._close()
        if self.progress:
            with contextlib.suppress(OSError, ValueError):
                self.progress.stop()  # also restores stdout, which the bar had redirected

    def step(
        self,
        step: int,
        values: Mapping[str, float],
        images: int,
        flops: float = 0.0,
        paid: float | None = None,
        to_go: float | None = None,
        may: float = math.inf,
    ) -> None:
        """Record a finished step: its numbers, its images, its FLOPs if they were counted.

        `paid` is the dollars that the run has cost so far, `to_go` the remaining work in units of
        this step, `may` how many seconds a budget still pays for. The line holds `step`, all of
        `values`, `images` (since step 1), the recent speeds, then `seconds`, `memory_mib` and, if
        devices have a price, `dollars` and `dollars_to_go`. The first line after a pause is marked
        `resumed`. A number that is not finite becomes null, because JSON has none.
        """
        now = time.monotonic()
        self.images += images
        self.paid, self.may = paid, may
        self.to_go = self.steps - step if to_go is None else to_go
        last = self.recent[-1]
        self.recent.append(
            Mark(now, self.images, last.flops + flops, last.waited + values.get("waited", 0.0))
        )
        while len(self.recent) > 2 and now - self.recent[1].time > WINDOW:
            self.recent.popleft()

        finite = {name: _finite(value) for name, value in values.items()}
        line = {"step": step, **finite, "images": self.images, **self._reached()} | {
            "seconds": round(self.seconds + now - self.began, 3),
            "memory_mib": self.peak_memory() // MIB,
        }
        if self.price is not None and paid is not None:
            line |= {"dollars": paid, "dollars_to_go": self.price * self._left() / 3600}
        if self.start and step == self.start + 1:
            line["resumed"] = 1
        self._write(json.dumps(line).encode() + b"\n")

        loss = finite.get("loss")
        if loss is not None:
            self.loss = SMOOTHING * self.loss + (1 - SMOOTHING) * loss
            self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)
        self._report(step, now)
        if step == self.start + 1:  # it included building and compiling: later steps are faster
            self.recent = deque([self.recent[-1]])

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.progress:
            console = self.progress.console
            self._show(lambda: console.print(text, markup=False, soft_wrap=True))
        else:
            self._show(lambda: print(text, file=self.stream, flush=True))

    def _report(self, step: int, now: float) -> None:
        first, last = step == self.start + 1, step == self.steps
        pause = REFRESH if self.progress else self.every
        if not (first or last or now - self.printed >= pause):
            return
        self.printed = now
        facts = self._facts(now)
        if self.progress:
            self.progress.update(self.task, completed=step, **facts)
            self._show(self.progress.refresh)
        else:
            digits = len(str(self.steps))
            place = f"step {step:{digits}}/{self.steps}"
            self._show(
                lambda: print(
                    place, *filter(None, facts.values()), sep="   ", file=self.stream, flush=True
                )
            )

    def _facts(self, now: float) -> dict[str, Any]:
        begun = len(self.recent) > 1
        reached, left = self._reached(), self._left() if begun else math.nan
        loss = f"{self.loss / self.weight:.4f}" if self.weight else "-"
        speed = f"{reached['images_per_second']:.1f}" if begun else "-"
        remaining = f"left {_clock(left)}"
        if self.price is not None and self.paid is not None and begun:
            remaining += f"   ${self.paid:,.2f}, ${self.price * left / 3600:,.2f} to go"
        values = (
            f"loss {loss:>7}",
            f"{speed:>7} img/s",
            _work(reached),
            f"waits {100 * reached['waiting']:.0f} %",
            f"elapsed {_clock(self.seconds + now - self.began)}",
            remaining,
            f"{self.memory() // MIB:6,} MiB",
        )
        return dict(zip(FACTS, values, strict=True))

    def _reached(self) -> dict[str, float]:
        """Speeds per second over the window, or since the start while that is shorter."""
        first, last = self.recent[0], self.recent[-1]
        passed = max(last.time - first.time, 1e-9)
        found = {"images_per_second": round((last.images - first.images) / passed, 2)}
        flops = (last.flops - first.flops) / passed
        if flops:
            found["flops_per_second"] = flops
            if self.peak:
                found["share_of_peak"] = flops / self.peak
        return found | {"waiting": round((last.waited - first.waited) / passed, 4)}

    def _left(self) -> float:
        """Seconds for the remaining steps at the recent speed, or as a budget allows."""
        first, last = self.recent[0], self.recent[-1]
        need = self.to_go * (last.time - first.time) / max(len(self.recent) - 1, 1)
        return min(need, self.may)

    def _write(self, line: bytes) -> None:
        """Append, or keep for the next time; a partly written line is removed again."""
        self.unwritten += line if self.path else b""
        if not self.path or not self.unwritten:
            return
        try:
            file = self.file = self.file or self.path.open("ab", buffering=0)
            end = file.seek(0, os.SEEK_END)
            written = file.write(self.unwritten)
            if written != len(self.unwritten):
                file.truncate(end)
                raise OSError(None, "no room")
            self.unwritten = b""
        except OSError as error:
            self._close()
            if not self.warned:
                self.warned = True
                self.note(
                    f"{self.path} cannot be written ({error.strerror}); it will be tried again."
                )

    def _close(self) -> None:
        """Close the file; the next line opens it again."""
        if self.file:
            with contextlib.suppress(OSError):
                self.file.close()
        self.file = None

    def _show(self, show: Callable[[], object]) -> None:
        """Print, unless the output was closed: training continues without it."""
        if not self.watched:
            return
        try:
            show()
        except (OSError, ValueError):  # ValueError: the stream was closed from inside
            self.watched = False
            _silence(self.stream)


def say(text: str) -> None:
    """Print a line, unless the output is closed: training continues without it."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        _silence(sys.stdout)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Pass the error on, to `_show`: rich's own answer is to leave the program."""
        raise  # noqa: PLE0704 - rich calls this inside its except clause


def memory() -> int:
    """Bytes of memory this process uses now, or its maximum if the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return peak_memory()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """The most bytes of memory this process has used."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
        BarColumn(bar_width=None),
        *(TextColumn(f"{{task.fields[{name}]}}") for name in FACTS),
        console=console,
        auto_refresh=False,
        expand=True,
    )


def _silence(stream: TextIO) -> None:
    """Redirect a closed stream to nowhere, or Python reports it once more on exit."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _work(reached: Mapping[str, float]) -> str:
    """FLOP/s with a suitable prefix, and their share of the peak, if counted."""
    flops = reached.get("flops_per_second", 0.0)
    if not flops:
        return ""
    unit = next((unit for unit, size in WORK.items() if flops >= size), "GFLOP/s")
    share = f" ({100 * reached['share_of_peak']:.0f} %)" if "share_of_peak" in reached else ""
    return f"{flops / WORK[unit]:.3g} {unit}{share}"


def _clock(seconds: float) -> str:
    """1:02:03, or -:--:-- for what is not known."""
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
