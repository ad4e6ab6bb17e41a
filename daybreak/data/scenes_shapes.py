"""The five outlines of the scenes, and how much of each pixel they cover.

    circle      radius r
    square      half side 0.92 r
    triangle    equilateral, circumradius 1.15 r, apex up
    star        five points, outer radius 1.15 r, inner 0.48 r, apex up
    cross       arms 1.05 r long, 0.36 r half as wide

Nothing is rotated. Generator and checker both draw with `coverage`; the checker's tests therefore
use a second, independent renderer.

Units   pixels; the centre of pixel i is at i.
"""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
SUPERSAMPLING = 8


def _corner(radius: float, degrees: float) -> tuple[float, float]:
    """(height, half-width) of a corner, `degrees` away from straight up."""
    angle = math.radians(degrees)
    return -radius * math.cos(angle), radius * math.sin(angle)


# Outlines as (height, half-width) in radii, from the top down, with straight lines in between. All
# shapes are symmetric about their vertical axis, and only the star has a gap on it.
_STEP = 1e-9  # np.interp needs increasing heights, also where the cross jumps
_OUTER = {
    "square": ((-0.92, 0.92), (0.92, 0.92)),
    "triangle": (_corner(1.15, 0), _corner(1.15, 120)),
    "star": (
        _corner(1.15, 0),
        _corner(0.48, 36),
        _corner(1.15, 72),
        _corner(0.48, 108),
        _corner(1.15, 144),
    ),
    "cross": (
        (-1.05, 0.36),
        (-0.36 - _STEP, 0.36),
        (-0.36, 1.05),
        (0.36, 1.05),
        (0.36 + _STEP, 0.36),
        (1.05, 0.36),
    ),
}
_INNER = {"star": (_corner(0.48, 180), _corner(1.15, 144))}

OUTLINES = (_OUTER, _INNER)  # for code that must notice a change of an outline

AREA = {  # of the shape with radius 1
    "circle": math.pi,
    "square": (2 * 0.92) ** 2,
    "triangle": 3 * math.sqrt(3) / 4 * 1.15**2,
    "star": 5 * 1.15 * 0.48 * math.sin(math.pi / 5),
    "cross": 8 * 1.05 * 0.36 - 4 * 0.36**2,
}
_OUTER_TABLE = {shape: np.array(corners).T for shape, corners in _OUTER.items()}
_INNER_TABLE = {shape: np.array(corners).T for shape, corners in _INNER.items()}


def coverage(
    shape: str,
    x: Floats | float,
    y: Floats | float,
    radius: Floats | float,
    height: int,
    width: int,
) -> Floats:
    """How much of each pixel a shape centred at (x, y) covers, in 64ths; for many shapes at once.

    This is the share of the pixel's 8 x 8 points that are inside. In one row of points the inside
    is an interval, so the points of a pixel are counted by subtraction, without testing each: forty
    times faster, with the same result.

    Shapes  x, y and radius (...), to be broadcast; result (..., height, width), in [0, 1].
    """
    x, y, radius = (np.asarray(one)[..., None] for one in (x, y, radius))
    rows = (np.arange(SUPERSAMPLING * height) + 0.5) / SUPERSAMPLING - 0.5 - y
    if shape == "circle":
        points = _points(np.sqrt(np.maximum(radius * radius - rows * rows, 0.0)), x, width)
    else:
        points = _points(_half_width(_OUTER_TABLE[shape], rows / radius) * radius, x, width)
    if shape in _INNER_TABLE:
        points -= _points(_half_width(_INNER_TABLE[shape], rows / radius) * radius, x, width)
    covered: Floats = np.divide(points, SUPERSAMPLING**2, order="C")
    return covered


def _half_width(table: Floats, heights: Floats) -> Floats:
    half: Floats = np.interp(heights, table[0], table[1], left=0.0, right=0.0)
    return half


def _points(half: Floats, x: Floats, width: int) -> npt.NDArray[np.int32]:
    """Points per pixel (..., height, width) within `half` (..., 8 height) of the line through x.

    Meanwhile the rows of pixels are the last axis, over which NumPy's loops are fast.
    """
    centre = (x + 0.5) * SUPERSAMPLING - 0.5
    first = np.ceil(centre - SUPERSAMPLING * half)
    end = np.ceil(centre + SUPERSAMPLING * half)
    edges = np.arange(0, SUPERSAMPLING * width + 1, SUPERSAMPLING, dtype=np.int32)
    below = np.minimum(  # points left of an edge: (edge, 8 rows of points, row of pixels)
        np.maximum(edges[:, None, None], _by_pixel(first)), _by_pixel(end)
    ).sum(1, dtype=np.int32)
    points: npt.NDArray[np.int32] = (below[1:] - below[:-1]).T
    return points.reshape(*first.shape[:-1], -1, width)


def _by_pixel(rows: Floats) -> npt.NDArray[np.int32]:
    """Rows of points as (8, rows of pixels)."""
    return np.ascontiguousarray(rows.reshape(-1, SUPERSAMPLING).T, dtype=np.int32)
