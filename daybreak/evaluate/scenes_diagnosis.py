"""What kind of errors a model makes: confusions of attributes, and fidelity of the drawing.

    confusions      how often red became orange, or three became two
    psnr            the picture against a clean render of what the checker found in it

Confusions show which attribute was drawn in place of which, where the checker's marks only show
that something is wrong. PSNR shows how cleanly things are drawn, right or wrong: a picture may be
sharp and wrong, or right and smeared.

Shapes  picture (s, s, 3) uint8.
Units   decibels relative to 255.
"""

import math
from collections import Counter
from collections.abc import Iterable
from itertools import permutations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from daybreak.data import scenes_shapes
from daybreak.data.scenes import CANVASES, PALETTE, Thing, side
from daybreak.data.scenes_captions import COLOURS, Specification, Wanted
from daybreak.evaluate.scenes_checker import Detection, Found

ROUNDING = 1 / 12  # mean squared error of rounding to bytes, the lower bound of an error
MOST = 5  # most things that are assigned by trying every order; more are only counted


class Confusion(NamedTuple):
    """An attribute as the prompt states it and as the picture shows it."""

    attribute: str  # count, shapes, colours, sizes or relation
    wanted: str
    seen: str


def confusions(detection: Detection, specification: Specification) -> list[Confusion]:
    """Return every stated attribute beside the one in the picture.

    If the number of things is right, they are assigned to the objects so that as many attributes as
    possible agree; otherwise only the numbers are compared. A thing is the best explanation of its
    component, accepted or not.
    """
    objects, relation = specification
    things = [found.thing for found in detection.things]
    found = [Confusion("count", str(len(objects)), str(len(things)))]
    if len(things) != len(objects) or len(things) > MOST:
        return found
    orders = permutations(things)
    order = max(orders, key=lambda some: sum(map(_likeness, some, objects)))
    for thing, wanted in zip(order, objects, strict=True):
        found.append(Confusion("shapes", wanted.shape, thing.shape))
        if wanted.colour is not None:
            found.append(Confusion("colours", wanted.colour, thing.colour))
        if wanted.size is not None and thing.size is not None:
            found.append(Confusion("sizes", wanted.size, thing.size))
    if relation is not None:
        found.append(Confusion("relation", relation, side(*order)))
    return found


def matrices(found: Iterable[Confusion]) -> dict[str, dict[str, dict[str, int]]]:
    """Count confusions: attribute, wanted, seen; sorted by name."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for (attribute, wanted, seen), number in sorted(Counter(found).items()):
        table.setdefault(attribute, {}).setdefault(wanted, {})[seen] = number
    return table


def psnr(picture: npt.NDArray[np.uint8], detection: Detection) -> float:
    """PSNR of a picture against the render of what was found in it; about 59 dB at most.

    Each thing is rendered in the palette's exact colour on a uniform background.
    """
    height, width = picture.shape[:2]
    render = np.full((height, width, 3), detection.background)
    for thing in (found.thing for found in detection.things):
        m = scenes_shapes.coverage(thing.shape, thing.x, thing.y, thing.radius, height, width)
        colour = PALETTE[COLOURS.index(thing.colour)]
        render += m[..., None] * (colour - detection.background)
    error = float(np.square(np.rint(render) - picture).mean())
    return 10 * math.log10(255**2 / max(error, ROUNDING))


def leftover(detection: Detection, canvas: str) -> float:
    """Share of the picture's pixels that are foreground but belong to no thing."""
    return detection.leftover / CANVASES[canvas].size ** 2


def well_formed(things: tuple[Found, ...]) -> bool:
    """Whether a picture has at least one thing, and all of its things were accepted."""
    return bool(things) and all(found.accepted for found in things)


def _likeness(thing: Thing, wanted: Wanted) -> int:
    return sum(
        (thing.shape == wanted.shape, thing.colour == wanted.colour, thing.size == wanted.size)
    )
