"""Decide exactly whether a picture shows what its caption asks for, by drawing it again.

The foreground is split into connected components. Each is explained as one thing of the generator:
its colour by a vote of its inner pixels, its shape by comparing its coverage map with renders of
all five shapes at the same area and centre. If no render explains a component well enough, it is
not accepted, and the picture counts as undetermined, hence failed. So smudges, faint, two-coloured
and fused things fail without special rules.

The checker must accept nearly every true render, noisy and blurred ones included, which the
calibration in tests/test_scenes_checker.py tests. It is never used as a reward, filter or training
signal. `VERSION` and `thresholds_hash` are part of every result.

`detect` looks only at the picture, `judge` compares a detection with a specification, and `check`
does both. One detection can be judged against many specifications.

Shapes  picture (s, s, 3) uint8, as sampled: no compression.
Units   pixels. Thresholds are for canvas 64; where things are twice as large (`Canvas.scale`),
        lengths, blurs and erosions double and pixel counts quadruple.
Source  analysis by synthesis, an old idea; it replaces contour counting, which judged two thirds of
        clean renders correctly.
"""

import hashlib
import math
from itertools import permutations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from daybreak.data import scenes_shapes
from daybreak.data.scenes import CANVASES, PALETTE, Canvas, Thing
from daybreak.data.scenes_captions import COLOURS, SHAPES, SIZES, Specification, Wanted
from daybreak.data.scenes_shapes import AREA

VERSION = "1"

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class Thresholds(NamedTuple):
    """All thresholds of the checker, frozen; lengths in pixels at scale 1, areas in pixels."""

    frame: int = 2  # width of the border from which the background is measured
    smoothing: float = 0.9  # blur before colours are compared
    contrast: float = 18.0  # least Lab distance of the foreground from the background
    smallest: int = 25  # least area of a component; pixels of smaller ones are leftovers
    erosions: int = 2  # from a component to its core
    core: int = 6  # if the core is smaller, it is eroded half as often
    core_least: int = 4  # if it is still smaller than this, it is not eroded at all
    purity: float = 0.92  # least share of the core that votes for the winning colour
    colour: float = 20.0  # largest median Lab distance of the core from that colour
    radii: tuple[float, ...] = (0.90, 0.95, 1.00, 1.05)  # of templates, relative to the area's
    blurs: tuple[float, ...] = (0.0, 0.7, 1.2)  # of the templates
    score: float = 0.95  # least cosine between coverage and best template
    lead: tuple[float, ...] = (0.010, 0.0115, 0.022, 0.015, 0.022)  # to the second, by SHAPES
    misfit_blur: float = 1.0
    misfit: float = 0.22  # difference of blurred coverages above which a pixel is a misfit
    misfits: tuple[float, float] = (4.0, 0.05)  # allowed: this many, or this share of the area
    between_sizes: float = 7.75  # radius that separates small from large
    leftover: int = 12  # most foreground pixels that belong to no component
    side: float = 0.1  # least offset of a relation, as a share of the summed extents


THRESHOLDS = Thresholds()


def thresholds_hash() -> str:
    """Twelve hex digits that identify thresholds, canvases, colours and outlines."""
    parts = (
        VERSION,
        THRESHOLDS,
        sorted(CANVASES.items()),
        PALETTE.tolist(),
        scenes_shapes.OUTLINES,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


class Found(NamedTuple):
    """A component and its best explanation as a `thing`, accepted or not."""

    thing: Thing
    accepted: bool
    width: int  # of its bounding box
    height: int


class Detection(NamedTuple):
    """Everything found in a picture; things in raster order of their components."""

    things: tuple[Found, ...]
    leftover: int  # foreground pixels of components too small to be things
    background: float


class Marks(NamedTuple):
    """Which single aspects of a picture are right, to show what a model cannot do yet.

    They use the best explanation of each component, accepted or not. None where the specification
    states nothing.
    """

    number: bool  # as many components as objects
    colours: bool | None  # some assignment of things to objects has the stated colours
    shapes: bool
    relation: bool | None  # holds for every best assignment of things to objects


class Verdict(NamedTuple):
    """Whether the picture passes, and why."""

    passed: bool
    undetermined: bool  # a component could not be explained; counts as failed
    things: tuple[Found, ...]
    leftover: int
    marks: Marks


def check(image: npt.NDArray[np.uint8], specification: Specification, canvas: str) -> Verdict:
    """Check whether the picture shows exactly what is specified.

    Errors  ValueError for a picture that is not uint8 of the canvas' size.
    """
    return judge(detect(image, canvas), specification, canvas)


def detect(image: npt.NDArray[np.uint8], canvas: str) -> Detection:
    """Find all things in a picture, each with its best explanation.

    Errors  ValueError for a picture that is not uint8 of the canvas' size.
    """
    row = CANVASES[canvas]
    if image.dtype != np.uint8 or image.shape != (row.size, row.size, 3):
        raise ValueError(
            f"a picture of canvas {canvas!r} is uint8 ({row.size}, {row.size}, 3), "
            f"not {image.dtype} {image.shape}"
        )
    scale, area = row.scale, row.scale**2
    pixels = image.astype(np.float64)
    background = _background(pixels, round(THRESHOLDS.frame * scale))
    sigma = THRESHOLDS.smoothing * scale
    smooth = _lab(ndimage.gaussian_filter(pixels, (sigma, sigma, 0)))
    foreground = np.linalg.norm(smooth - _lab(background), axis=-1) > THRESHOLDS.contrast
    labels, number = ndimage.label(foreground, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=number + 1)[1:]
    big = areas >= THRESHOLDS.smallest * area
    found = tuple(
        _explain(pixels, smooth, background, labels == label, row)
        for label in np.flatnonzero(big) + 1
    )
    return Detection(found, int(areas[~big].sum()), float(background.mean()))


def judge(detection: Detection, specification: Specification, canvas: str) -> Verdict:
    """Compare a detection with a specification."""
    things, leftover, _ = detection
    undetermined = not all(found.accepted for found in things)
    clean = leftover <= THRESHOLDS.leftover * CANVASES[canvas].scale ** 2
    fits = any(
        all(map(_is, order, specification.objects)) and _related(order, specification.relation)
        for order in _orders(things, specification)
    )
    passed = fits and clean and not undetermined
    return Verdict(passed, undetermined, things, leftover, _marks(things, specification))


# Detection


def _background(pixels: Floats, frame: int) -> Floats:
    inside = np.ones(pixels.shape[:2], dtype=bool)
    inside[frame:-frame, frame:-frame] = False
    median: Floats = np.median(pixels[inside], axis=0)
    return median


def _lab(rgb: Floats) -> Floats:
    """CIE Lab of sRGB values in 0-255, white point D65: distances are about perceptual."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _XYZ.T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    lab: Floats = f @ _OPPONENT.T - np.array([16.0, 0.0, 0.0])
    return lab


_XYZ = np.array(  # linear sRGB to XYZ, each row divided by the white point
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
) / np.array([[0.95047], [1.0], [1.08883]])
_OPPONENT = np.array([[0.0, 116.0, 0.0], [500.0, -500.0, 0.0], [0.0, 200.0, -200.0]])
_LAB_PALETTE = _lab(PALETTE)


def _explain(
    pixels: Floats, smooth: Floats, background: Floats, component: Mask, canvas: Canvas
) -> Found:
    """Return the thing that explains a component best, and whether well enough."""
    core = _core(component, canvas.scale)
    distances = np.linalg.norm(smooth[core][:, None] - _LAB_PALETTE, axis=-1)
    votes = np.bincount(distances.argmin(1), minlength=len(COLOURS))
    colour = int(votes.argmax())
    purity = float(votes[colour] / votes.sum())

    alpha = _coverage(pixels, background, component, core, canvas.scale)
    area = float(alpha.sum())
    if area == 0:  # the core has the background's colour, so there is no shape
        area = 1e-9
    rows, columns = np.indices(alpha.shape)
    y, x = float((alpha * rows).sum() / area), float((alpha * columns).sum() / area)
    shape, score, lead, misfits = _synthesis(alpha, x, y, area, canvas)

    radius = math.sqrt(area / AREA[shape])
    least, share = THRESHOLDS.misfits
    accepted = (
        score >= THRESHOLDS.score
        and lead >= THRESHOLDS.lead[SHAPES.index(shape)]
        and purity >= THRESHOLDS.purity
        and float(np.median(distances[:, colour])) < THRESHOLDS.colour
        and misfits <= max(least * canvas.scale**2, share * area)
        and canvas.accepted[0] <= radius <= canvas.accepted[1]
    )
    size = None
    if len(canvas.bands) == 2:
        size = SIZES[int(radius > THRESHOLDS.between_sizes * canvas.scale)]
    down, across = ndimage.find_objects(component.astype(np.int8))[0]
    return Found(
        Thing(shape, COLOURS[colour], size, x, y, radius),
        accepted,
        across.stop - across.start,
        down.stop - down.start,
    )


def _core(component: Mask, scale: float) -> Mask:
    """Return the pixels away from the blurred edge, or the whole component if it is too small."""
    whole = round(THRESHOLDS.erosions * scale)
    for times, least in ((whole, THRESHOLDS.core), (whole // 2, THRESHOLDS.core_least)):
        core: Mask = ndimage.binary_erosion(component, np.ones((3, 3)), iterations=times)
        if core.sum() >= least * scale**2:
            return core
    return component


def _coverage(
    pixels: Floats, background: Floats, component: Mask, core: Mask, scale: float
) -> Floats:
    """Return the component's coverage of each pixel, (s, s), from the linear mix at its edge.

    The generator mixes colour and background by coverage, so a pixel's position between the two is
    the coverage. It is not filtered: a median would round the tips of a star.
    """
    way = np.median(pixels[core], axis=0) - background
    near = ndimage.binary_dilation(component, np.ones((3, 3)), iterations=round(scale))
    length = float(way @ way)
    if length == 0:
        return np.zeros(component.shape)
    alpha: Floats = np.clip((pixels - background) @ way / length, 0, 1.2) * near
    return alpha


def _synthesis(
    alpha: Floats, x: float, y: float, area: float, canvas: Canvas
) -> tuple[str, float, float, int]:
    """Return the best shape, its score, its lead over the second, and its number of misfits."""
    window, left, top = _window(alpha, x, y, area, canvas.scale)
    flat = window.ravel()
    norm = math.sqrt(float(flat @ flat)) or 1.0
    best: list[tuple[float, str, Floats]] = []
    for shape in SHAPES:
        radii = math.sqrt(area / AREA[shape]) * np.array(THRESHOLDS.radii)
        sharp = scenes_shapes.coverage(shape, x - left, y - top, radii, *window.shape)
        templates = np.concatenate(
            [_blur(sharp, sigma * canvas.scale) for sigma in THRESHOLDS.blurs]
        )
        each = templates.reshape(len(templates), -1)
        scores = each @ flat / (np.linalg.norm(each, axis=1) * norm + 1e-12)
        winner = int(scores.argmax())
        best.append((float(scores[winner]), shape, templates[winner]))
    best.sort(key=lambda entry: -entry[0])
    (score, shape, template), second = best[0], best[1][0]
    difference = _blur(window - template, THRESHOLDS.misfit_blur * canvas.scale)
    return shape, score, score - second, int((np.abs(difference) > THRESHOLDS.misfit).sum())


def _window(
    alpha: Floats, x: float, y: float, area: float, scale: float
) -> tuple[Floats, int, int]:
    """Return the coverage in a window wide enough for the templates, and the window's corner.

    If it extends beyond the canvas, it is padded with zeros: a thing that is cut off by the border
    is compared with whole ones.
    """
    largest = math.sqrt(area / min(AREA.values())) * max(THRESHOLDS.radii)
    reach = math.ceil(1.2 * largest + 3 * max(THRESHOLDS.blurs) * scale)
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    top = min(math.floor(y) - reach, int(rows.min(initial=0)))
    left = min(math.floor(x) - reach, int(columns.min(initial=0)))
    bottom = max(math.ceil(y) + reach, int(rows.max(initial=0))) + 1
    right = max(math.ceil(x) + reach, int(columns.max(initial=0))) + 1
    height, width = alpha.shape
    window = np.zeros((bottom - top, right - left))
    window[max(0, -top) : height - top, max(0, -left) : width - left] = alpha[
        max(0, top) : bottom, max(0, left) : right
    ]
    return window, left, top


def _blur(maps: Floats, sigma: float) -> Floats:
    """Gaussian blur of (..., h, w) over its last two axes; zeros outside."""
    if sigma == 0:
        return maps
    return _kernel(maps.shape[-2], sigma) @ maps @ _kernel(maps.shape[-1], sigma)


def _kernel(n: int, sigma: float) -> Floats:
    """The blur as a symmetric matrix (n, n), which is faster than a convolution for small maps."""
    apart = np.subtract.outer(np.arange(n), np.arange(n))
    bell = np.exp(-0.5 * (apart / sigma) ** 2)
    blur: Floats = bell / np.exp(-0.5 * (np.arange(-n, n + 1) / sigma) ** 2).sum()
    return blur


# Judgement


def _orders(things: tuple[Found, ...], specification: Specification) -> list[tuple[Found, ...]]:
    """All assignments of things to objects: at most 24, none if the numbers differ."""
    if len(things) != len(specification.objects):
        return []
    return list(permutations(things))


def _is(found: Found, wanted: Wanted) -> bool:
    return (
        found.thing.shape == wanted.shape
        and wanted.colour in (None, found.thing.colour)
        and wanted.size in (None, found.thing.size)
    )


def _related(order: tuple[Found, ...], relation: str | None) -> bool:
    """Whether the relation holds: its axis must have the larger offset, clearly above zero."""
    if relation is None:
        return True
    one, other = order
    across, down = one.thing.x - other.thing.x, one.thing.y - other.thing.y
    if relation in ("left", "right"):
        offset = across if relation == "right" else -across
        return offset > THRESHOLDS.side * (one.width + other.width) and abs(across) >= abs(down)
    offset = down if relation == "below" else -down
    return offset > THRESHOLDS.side * (one.height + other.height) and abs(down) >= abs(across)


def _marks(things: tuple[Found, ...], specification: Specification) -> Marks:
    objects, relation = specification
    orders = _orders(things, specification)
    stated = any(wanted.colour for wanted in objects)
    return Marks(
        number=bool(orders),
        colours=any(all(map(_coloured, order, objects)) for order in orders) if stated else None,
        shapes=any(
            all(f.thing.shape == wanted.shape for f, wanted in zip(order, objects, strict=True))
            for order in orders
        ),
        relation=None if relation is None else _relation_mark(orders, specification),
    )


def _coloured(found: Found, wanted: Wanted) -> bool:
    return wanted.colour in (None, found.thing.colour)


def _relation_mark(orders: list[tuple[Found, ...]], specification: Specification) -> bool:
    """Whether the relation holds in all best assignments; if both are equally good it cannot."""
    likeness = [
        sum(
            (found.thing.shape == wanted.shape) + (wanted.colour == found.thing.colour)
            for found, wanted in zip(order, specification.objects, strict=True)
        )
        for order in orders
    ]
    best = [o for o, like in zip(orders, likeness, strict=True) if like == max(likeness)]
    return bool(best) and all(_related(order, specification.relation) for order in best)
