"""A quantity over the steps of a run, as SVG lines: many steps drawn with few points.

Steps are grouped into at most BINS bins of equal length. The line goes through the means of the
bins; the band from the minimum to the maximum of each; rare extremes are cut off at the edge.

Units  pixels of the drawing, y downwards; values in their own unit.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from daybreak.evaluate.chart import labels, short, ticks

BINS = 240
RARE = 0.02  # share of the steps that may lie above the drawing, and likewise below
WIDE = 8.0  # ratio of maximum to minimum above which the scale is logarithmic

Point = tuple[float, float]  # step and value


class Frame(NamedTuple):
    """The size of a drawing, and the edges of the plot area in it."""

    width: int = 340
    height: int = 170
    left: int = 46
    right: int = 332
    top: int = 8
    bottom: int = 148


FRAME = Frame()


class Tick(NamedTuple):
    """A round value on an axis, and its position."""

    at: float
    text: str


class Curve(NamedTuple):
    """What a page needs to draw a curve; `last` is the mean of the newest bin."""

    title: str
    last: str
    line: str  # points of a polyline
    band: str  # points of a polygon; empty if every bin has one step
    across: list[Tick]
    up: list[Tick]
    stages: list[float]  # x at which another stage begins
    dots: list[Point]  # each measurement, if they are few
    logs: bool


def curve(
    title: str, points: Sequence[Point], stages: Sequence[int] = (), falls: bool = False
) -> Curve | None:
    """Draw the finite values; None if there are fewer than two steps with one.

    `stages` are the last steps of all stages but the newest. With `falls` the scale is logarithmic
    if the values are positive and their range is wider than WIDE.
    """
    known = [(step, value) for step, value in points if math.isfinite(value)]
    if len({step for step, _ in known}) < 2:
        return None
    steps, values = np.array(known, dtype=np.float64).T
    edges = np.linspace(steps[0], steps[-1], min(BINS, len(steps)) + 1)
    bins = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, len(edges) - 2)
    used = np.unique(bins)
    parts = [bins == one for one in used]
    middles = [float(steps[part].mean()) for part in parts]
    means = [float(values[part].mean()) for part in parts]
    least, most = ([float(find(values[part])) for part in parts] for find in (np.min, np.max))

    usual = np.quantile(values, (RARE, 1 - RARE)).tolist()
    low, high = min(*means, usual[0]), max(*means, usual[1])
    logs = falls and low > 0 and high > WIDE * low
    scale: Callable[[float], float] = math.log10 if logs else float
    bottom, top = scale(low), scale(high)
    room = 0.06 * (top - bottom) or 0.1 * abs(top) or 1.0
    bottom, top = bottom - room, top + room

    def x(step: float) -> float:
        along = (step - steps[0]) / (steps[-1] - steps[0])
        return FRAME.left + (FRAME.right - FRAME.left) * along

    def y(value: float) -> float:
        up = (scale(max(value, low / WIDE)) if logs else value) - bottom
        along = min(max(up / (top - bottom), 0.0), 1.0)
        return FRAME.bottom - (FRAME.bottom - FRAME.top) * along

    def path(pairs: Sequence[Point]) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in pairs)

    upper = list(zip(middles, most, strict=True))
    lower = list(zip(middles, least, strict=True))
    return Curve(
        title,
        short(means[-1]),
        path(list(zip(middles, means, strict=True))),
        path(upper + lower[::-1]) if len(used) < len(steps) else "",
        _ticks(x, [step for step in ticks(float(steps[0]), float(steps[-1])) if step == int(step)]),
        _ticks(y, _round(bottom, top, logs)),
        [x(step) for step in stages if steps[0] < step < steps[-1]],
        [(x(step), y(value)) for step, value in known] if len(known) <= BINS // 8 else [],
        logs,
    )


def _ticks(place: Callable[[float], float], values: Sequence[float]) -> list[Tick]:
    return [Tick(place(value), text) for value, text in zip(values, labels(values), strict=True)]


def _round(bottom: float, top: float, logs: bool) -> list[float]:
    """Round values between two values; with `logs`, between 10^bottom and 10^top."""
    if not logs:
        return ticks(bottom, top)
    found = [
        factor * 10.0**power
        for power in range(math.floor(bottom), math.ceil(top))
        for factor in (1, 2, 5)
    ]
    inside = [value for value in found if bottom <= math.log10(value) <= top]
    tens = [value for value in inside if math.log10(value).is_integer()]
    return tens[:: len(tens) // 7 + 1] if len(inside) > 7 and len(tens) > 2 else inside
