"""A few steps of a run as torch's profiler sees them, for perfetto.dev or chrome://tracing.

    daybreak train RECIPE --trace 200:3         steps 200 to 202, in RUN/trace-200.json.gz

Every kernel and operator with its time, on the CPU and on the GPU: where a step waits, and for
what. Traced steps are slower, but compute the same numbers. Only the first rank is traced.

Source  pytorch.org/docs/stable/profiler.html.
"""

import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from daybreak.failure import BadRecipe

Step = TypeVar("Step")


class Trace(NamedTuple):
    """Which steps are traced: the first of them, counted over the whole run, and how many."""

    first: int
    steps: int


def parse(text: str) -> Trace:
    """Read `STEP:COUNT`. Errors: BadRecipe."""
    found = re.fullmatch(r"([1-9]\d{0,8})(?::([1-9]\d{0,2}))?", text.strip())
    if not found:
        raise BadRecipe(f"--trace {text}: write STEP:COUNT, for example 200:3")
    return Trace(int(found[1]), int(found[2] or 1))


def traced(
    steps: Iterator[Step], wanted: Trace, folder: Path, start: int, tell: Callable[[str], None]
) -> Generator[Step]:
    """Yield the same steps, of which the first is `start` + 1, and trace the wanted ones.

    A step lasts until the next one is requested. If the run ends before the last wanted step, the
    trace has the earlier ones. `tell` is told where the trace is.
    """
    seen: profile | None = None
    try:
        for number, step in enumerate(steps, start=start + 1):
            if number == wanted.first:
                activities = [ProfilerActivity.CPU]
                activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
                seen = profile(activities=activities)
                seen.start()
            yield step
            if number >= wanted.first + wanted.steps - 1:
                break
    finally:
        if seen is not None:
            seen.stop()
            file = folder / f"trace-{wanted.first}.json.gz"
            try:
                seen.export_chrome_trace(str(file))
                tell(f"trace: {file}")
            except (OSError, RuntimeError) as error:  # no reason to end a run
                tell(f"the trace could not be written: {error}")
    yield from steps
