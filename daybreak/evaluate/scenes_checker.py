"""Does a picture show what its caption asks for? Answered by drawing it again.

Whatever stands out from the background is taken apart into components. Each is explained as one
thing of the generator: its colour by a vote of its inner pixels, its shape by comparing its
coverage map with renders of all five shapes at the same area and centre. A component no render
explains well enough is accepted as nothing, and its picture counts as undetermined, hence failed.
So smudges, ghosts, two-coloured and fused things fail without a rule for any of them.

The same code must accept nearly every true render, also a noisy or blurred one; the calibration
in tests/test_scenes_checker.py says so before a score is believed. The checker is never a reward,
a filter or a training signal. `VERSION` and `thresholds_hash` stand in every result.

`detect` looks at the picture alone, `judge` compares what it saw with a specification; `check` is
both. One detection can be judged against many specifications.

Shapes  picture (s, s, 3) uint8, as sampled: no compression.
Units   pixels. Thresholds are those of canvas 64; where things are twice as large (`Canvas.scale`)
        lengths double and pixel counts quadruple, blurs and erosions included.
Source  the analysis-by-synthesis idea is old; contour counting, which it replaces, got two thirds
        of clean renders right.
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
    """Every number of the checker, frozen; lengths in pixels at scale 1, areas in pixels."""

    frame: int = 2  # width of the border that shows the background
    smoothing: float = 0.9  # blur before colours are compared
    contrast: float = 18.0  # Lab distance from the background that makes foreground
    smallest: int = 25  # area of a component; below, its pixels are leftovers
    erosions: int = 2  # from a component to its core
    core: int = 6  # area below which a core is eroded half as often
    core_least: int = 4  # area below which it is not eroded at all
    purity: float = 0.92  # share of the core that votes for the winning colour
    colour: float = 20.0  # median Lab distance of the core from that colour
    radii: tuple[float, ...] = (0.90, 0.95, 1.00, 1.05)  # of the templates, times that of the area
    blurs: tuple[float, ...] = (0.0, 0.7, 1.2)  # of the templates
    score: float = 0.95  # cosine between coverage and best template
    lead: tuple[float, ...] = (0.010, 0.0115, 0.022, 0.015, 0.022)  # over the second; as SHAPES
    misfit_blur: float = 1.0
    misfit: float = 0.22  # difference of blurred coverages that makes a pixel a misfit
    misfits: tuple[float, float] = (4.0, 0.05)  # allowed: this many, or this share of the area
    between_sizes: float = 7.75  # radius that parts small from large
    leftover: int = 12  # foreground pixels that belong to no component
    side: float = 0.1  # offset of a relation, in sums of extents


THRESHOLDS = Thresholds()


def thresholds_hash() -> str:
    """Twelve hex digits of all that decides a verdict: thresholds, canvases, colours, outlines."""
    parts = (
        VERSION,
        THRESHOLDS,
        sorted(CANVASES.items()),
        PALETTE.tolist(),
        scenes_shapes.OUTLINES,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


class Found(NamedTuple):
    """A component, explained as a thing. `thing` is the best explanation, accepted or not."""

    thing: Thing
    accepted: bool
    width: int  # of its box
    height: int


class Detection(NamedTuple):
    """All a picture shows, in the order of rows."""

    things: tuple[Found, ...]
    leftover: int  # foreground pixels of components too small to be things
    background: float


class Marks(NamedTuple):
    """Single virtues of a picture, for finding out what a model cannot do yet.

    They count the best explanation of each component, accepted or not. None where the
    specification says nothing.
    """

    number: bool  # as many components as objects
    colours: bool | None  # the stated colours can be given out to them
    shapes: bool
    relation: bool | None  # holds for the only best way to tell which object is which


class Verdict(NamedTuple):
    """Whether the picture passes, and why."""

    passed: bool
    undetermined: bool  # a component could not be explained; counts as failed
    things: tuple[Found, ...]
    leftover: int
    marks: Marks


def check(image: npt.NDArray[np.uint8], specification: Specification, canvas: str) -> Verdict:
    """Whether the picture shows exactly what is specified.

    Errors  ValueError for a picture that is not uint8 of the canvas' size.
    """
    return judge(detect(image, canvas), specification, canvas)


def detect(image: npt.NDArray[np.uint8], canvas: str) -> Detection:
    """Everything in a picture, explained as far as possible.

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
    """Compare what was seen with what was asked for."""
    things, leftover, _ = detection
    undetermined = not all(found.accepted for found in things)
    clean = leftover <= THRESHOLDS.leftover * CANVASES[canvas].scale ** 2
    fits = any(
        all(map(_is, order, specification.objects)) and _related(order, specification.relation)
        for order in _orders(things, specification)
    )
    passed = fits and clean and not undetermined
    return Verdict(passed, undetermined, things, leftover, _marks(things, specification))


# What is there


def _background(pixels: Floats, frame: int) -> Floats:
    inside = np.ones(pixels.shape[:2], dtype=bool)
    inside[frame:-frame, frame:-frame] = False
    median: Floats = np.median(pixels[inside], axis=0)
    return median


def _lab(rgb: Floats) -> Floats:
    """CIE Lab of sRGB values in 0-255, white D65: equal distances look equally different."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _XYZ.T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    lab: Floats = f @ _OPPONENT.T - np.array([16.0, 0.0, 0.0])
    return lab


_XYZ = np.array(  # linear sRGB to XYZ, rows divided by those of white
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
    """The thing that explains a component best, and whether well enough."""
    core = _core(component, canvas.scale)
    distances = np.linalg.norm(smooth[core][:, None] - _LAB_PALETTE, axis=-1)
    votes = np.bincount(distances.argmin(1), minlength=len(COLOURS))
    colour = int(votes.argmax())
    purity = float(votes[colour] / votes.sum())

    alpha = _coverage(pixels, background, component, core, canvas.scale)
    area = float(alpha.sum())
    if area == 0:  # the core looks like the background: nothing to compare shapes with
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
    """The inner pixels, free of the blur at the edge; all of them if that would leave too few."""
    whole = round(THRESHOLDS.erosions * scale)
    for times, least in ((whole, THRESHOLDS.core), (whole // 2, THRESHOLDS.core_least)):
        core: Mask = ndimage.binary_erosion(component, np.ones((3, 3)), iterations=times)
        if core.sum() >= least * scale**2:
            return core
    return component


def _coverage(
    pixels: Floats, background: Floats, component: Mask, core: Mask, scale: float
) -> Floats:
    """How much of each pixel the component covers, (s, s), from the linear mix at its edge.

    The generator mixes colour and background by coverage, so the way from one to the other is the
    coverage. No filter touches it: a median would round the tips of a star.
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
    """Best shape, its score, its lead over the second, and its misfits."""
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
    """The coverage around a component, wide enough for its templates, and its corner.

    Reaches beyond the canvas where it must, over zeros: a thing that is cut off by the border is
    compared with whole ones.
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
    """The blur as a symmetric matrix (n, n): for small maps faster than a convolution."""
    apart = np.subtract.outer(np.arange(n), np.arange(n))
    bell = np.exp(-0.5 * (apart / sigma) ** 2)
    blur: Floats = bell / np.exp(-0.5 * (np.arange(-n, n + 1) / sigma) ** 2).sum()
    return blur


# Whether it is what was asked for


def _orders(things: tuple[Found, ...], specification: Specification) -> list[tuple[Found, ...]]:
    """Every way to give the things out to the objects: at most 24, none if the numbers differ."""
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
    """Whether the first stands so to the second: the longer offset decides, and must be clear."""
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
    """Whether the relation holds; a tie over which object is which cannot hold both ways."""
    likeness = [
        sum(
            (found.thing.shape == wanted.shape) + (wanted.colour == found.thing.colour)
            for found, wanted in zip(order, specification.objects, strict=True)
        )
        for order in orders
    ]
    best = [o for o, like in zip(orders, likeness, strict=True) if like == max(likeness)]
    return bool(best) and all(_related(order, specification.relation) for order in best)
