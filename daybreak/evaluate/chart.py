"""A comparison as one picture: the curves of the recipes and their final differences.

Left, the metric against the cost: a thin line for each seed, a thick one for their mean, a dashed
one for the target. Right, each seed's difference from the baseline as a dot, their mean as a large
dot and its interval as a bar: if the bar crosses zero, the difference is not resolved.

Units   pixels; values and costs in the caller's units.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from daybreak.generate.grid import FRAME, INK, PAPER

Point = tuple[float, float]

SCALE = 2  # supersampling factor, for smooth lines
WIDTH, HEIGHT, RIGHT = 960, 420, 320  # size of the picture, and width of the right panel
LEFT, TOP, BOTTOM, GAP = 76, 48, 64, 28  # margins of a panel
FONT = 14
# Okabe and Ito's palette, which is safe for colour-blind readers. The baseline is drawn in ink.
COLOURS = (INK, (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0))


class Arm(NamedTuple):
    """The curves of an arm, one for each seed, and its final differences from the baseline."""

    name: str
    curves: Sequence[Sequence[Point]]
    differences: Sequence[float] = ()
    interval: tuple[float, float, float] | None = None  # low, mean, high


class Frame(NamedTuple):
    """A panel: its box in pixels, and the values at its edges."""

    box: tuple[float, float, float, float]
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, point: Point) -> Point:
        """Return the pixel position of a point."""
        left, top, right, bottom = self.box
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return left + across * (right - left), bottom - up * (bottom - top)


def chart(arms: Sequence[Arm], metric: str, unit: str, target: float | None = None) -> Image.Image:
    """Draw arms, the baseline first. Errors: ValueError if no curve has a point."""
    values = [y for arm in arms for curve in arm.curves for _, y in curve if math.isfinite(y)]
    costs = [x for arm in arms for curve in arm.curves for x, _ in curve]
    if not values:
        raise ValueError("there is nothing to draw")
    sheet = Image.new("RGB", (SCALE * WIDTH, SCALE * HEIGHT), PAPER)
    draw = ImageDraw.Draw(sheet)
    compared = [arm for arm in arms if arm.interval is not None]
    end = WIDTH - (RIGHT if compared else 0) - GAP
    seen = values if target is None else [*values, target]
    frame = Frame(
        (LEFT, TOP, end, HEIGHT - BOTTOM), (0.0, 1.02 * max(costs)), _room(min(seen), max(seen))
    )
    _axes(draw, frame, metric, unit, ticks(*frame.x))
    if target is not None:
        _dashed(draw, frame, target)
    for arm, colour in zip(arms, _colours(len(arms)), strict=True):
        for curve in arm.curves:
            _curve(draw, [frame.at(p) for p in curve if math.isfinite(p[1])], _pale(colour), 1)
        _curve(draw, [frame.at(point) for point in _mean(arm.curves)], colour, 3)
    _legend(draw, arms, frame)
    if compared:
        _differences(draw, arms, metric)
    return sheet.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _differences(draw: ImageDraw.ImageDraw, arms: Sequence[Arm], metric: str) -> None:
    """The right panel: one column for each arm that is compared."""
    colours = _colours(len(arms))
    compared = [(arm, c) for arm, c in zip(arms, colours, strict=True) if arm.interval is not None]
    spread = [d for arm, _ in compared for d in (*arm.differences, *(arm.interval or ()), 0.0)]
    box = (WIDTH - RIGHT + LEFT, TOP, WIDTH - GAP, HEIGHT - BOTTOM)
    frame = Frame(box, (0.0, float(len(compared))), _room(min(spread), max(spread)))
    _axes(draw, frame, f"gain in {metric}", "", ())
    _line(draw, [frame.at((0, 0)), frame.at((len(compared), 0))], INK, 1)
    for place, (arm, colour) in enumerate(compared):
        assert arm.interval is not None
        low, mean, high = arm.interval
        for number, difference in enumerate(arm.differences):
            aside = 0.5 + 0.3 * ((number + 1) / (len(arm.differences) + 1) - 0.5)
            _dot(draw, frame.at((place + aside, difference)), _pale(colour), 4)
        _line(draw, [frame.at((place + 0.5, low)), frame.at((place + 0.5, high))], colour, 3)
        _dot(draw, frame.at((place + 0.5, mean)), colour, 6)


def _axes(
    draw: ImageDraw.ImageDraw, frame: Frame, title: str, unit: str, across: Sequence[float]
) -> None:
    left, top, right, bottom = frame.box
    up = ticks(*frame.y)
    for tick, text in zip(up, labels(up), strict=True):
        _, y = frame.at((0, tick))
        _line(draw, [(left, y), (right, y)], FRAME, 1)
        _write(draw, (left - 8, y), text, "rm")
    for tick, text in zip(across, labels(across), strict=True):
        x, _ = frame.at((tick, 0))
        _write(draw, (x, bottom + 8), text, "ma")
    _write(draw, ((left + right) / 2, bottom + 32), unit, "ma")
    _write(draw, (left, top - 18), title, "ls")


def _legend(draw: ImageDraw.ImageDraw, arms: Sequence[Arm], frame: Frame) -> None:
    """Draw the arms' names where curves leave room: at the bottom if they rise, else on top."""
    left, top, right, bottom = frame.box
    ends = [curve[-1][1] - curve[0][1] for arm in arms for curve in arm.curves if curve]
    rising = sum(end for end in ends if math.isfinite(end)) > 0
    once = all(len(curve) < 2 for arm in arms for curve in arm.curves)  # points lie on the right
    across = left + (0.05 if once else 0.6) * (right - left)
    start = bottom - 14 - 20 * len(arms) if rising else top + 8
    for number, (arm, colour) in enumerate(zip(arms, _colours(len(arms)), strict=True)):
        y = start + 20 * number + 8
        _line(draw, [(across, y), (across + 24, y)], colour, 3)
        _write(draw, (across + 32, y), arm.name[:28], "lm")


def _mean(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean of the curves, or no points if they differ in length."""
    if len({len(curve) for curve in curves}) != 1:
        return []
    points = np.mean(np.asarray(curves, dtype=np.float64), axis=0)
    return [(float(x), float(y)) for x, y in points if math.isfinite(y)]


def _room(low: float, high: float) -> tuple[float, float]:
    """The values at the edges of a panel: the range of the data with a margin."""
    spread = (high - low) or abs(high) or 1.0
    return low - 0.06 * spread, high + 0.06 * spread


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers between `low` and `high`."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= max(factor for factor in (1, 2, 5) if factor * step <= (high - low) / 4)
    first = math.ceil(low / step)
    return [step * k for k in range(first, math.floor(high / step) + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Format numbers with as few digits as keep them distinct."""
    said = [short(value) for value in values]
    digits = 3
    while len(set(said)) < len(said) and digits < 12:
        digits += 1
        said = [short(value, digits) for value in values]
    return said


def short(value: float, digits: int = 3) -> str:
    """Format a number briefly: 12k, 0.5."""
    for size, sign in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 - 0.5 * 10.0**-digits):  # 999.7 is 1k, not 1e+03
            return f"{value / size:.{digits}g}{sign}"
    return f"{value:.{digits}g}" if abs(value) > 1e-12 else "0"


def _colours(count: int) -> list[tuple[int, int, int]]:
    return [COLOURS[0], *(COLOURS[1 + k % (len(COLOURS) - 1)] for k in range(count - 1))]


def _pale(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = ((part + 2 * paper) // 3 for part, paper in zip(colour, PAPER, strict=True))
    return red, green, blue


def _curve(
    draw: ImageDraw.ImageDraw, points: Sequence[Point], colour: tuple[int, int, int], width: int
) -> None:
    """Draw a line, or a dot for a single point."""
    _line(draw, points, colour, width)
    if len(points) == 1:
        _dot(draw, points[0], colour, 3 + width)


def _line(
    draw: ImageDraw.ImageDraw, points: Sequence[Point], colour: tuple[int, int, int], width: int
) -> None:
    if len(points) > 1:
        scaled = [(SCALE * x, SCALE * y) for x, y in points]
        draw.line(scaled, fill=colour, width=SCALE * width, joint="curve")


def _dashed(draw: ImageDraw.ImageDraw, frame: Frame, value: float) -> None:
    left, _, right, _ = frame.box
    _, y = frame.at((0, value))
    for start in range(round(left), round(right), 12):
        _line(draw, [(start, y), (min(start + 7, right), y)], INK, 1)


def _dot(
    draw: ImageDraw.ImageDraw, centre: Point, colour: tuple[int, int, int], radius: float
) -> None:
    x, y = (SCALE * part for part in centre)
    reach = SCALE * radius
    draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=colour)


def _write(draw: ImageDraw.ImageDraw, place: Point, text: str, anchor: str) -> None:
    font = ImageFont.load_default(SCALE * FONT)
    draw.text((SCALE * place[0], SCALE * place[1]), text, INK, font, anchor=anchor)
