"""What goes wrong, beyond how often: confusions of attributes, and fidelity of the drawing.

    confusions      which red became orange, which three became two
    psnr            the picture against a clean render of what the checker found in it

Confusions say what a model takes for what, where the checker's marks only say that something was
wrong. PSNR says how well it draws whatever it draws: a picture may be sharp and wrong, or right and
smeared.

Shapes  picture (s, s, 3) uint8.
Units   decibels, of the full range of a byte.
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

ROUNDING = 1 / 12  # mean squared error of rounding to bytes: no render is nearer than that
MOST = 5  # things that are told apart by trying every order; more are only counted


class Confusion(NamedTuple):
    """One attribute as it was asked for, and as it is."""

    attribute: str  # count, shapes, colours, sizes or relation
    wanted: str
    seen: str


def confusions(detection: Detection, specification: Specification) -> list[Confusion]:
    """Everything the specification states, beside what is there.

    Where the number of things is right they are given out to the objects so that most attributes
    agree; where it is wrong nobody knows which is which, and the count alone is compared. Things
    stand for the best explanation of their component, accepted or not.
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
    """How often each was taken for each: attribute, wanted, seen; all in the order of the words."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for (attribute, wanted, seen), number in sorted(Counter(found).items()):
        table.setdefault(attribute, {}).setdefault(wanted, {})[seen] = number
    return table


def psnr(picture: npt.NDArray[np.uint8], detection: Detection) -> float:
    """Decibels between a picture and the render of what was found in it; about 59 at most.

    Each thing is drawn in the exact colour of the palette on an even background.
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
    """Share of the picture that stands out and belongs to no thing."""
    return detection.leftover / CANVASES[canvas].size ** 2


def well_formed(things: tuple[Found, ...]) -> bool:
    """Whether a picture shows at least one thing, and nothing that cannot be explained."""
    return bool(things) and all(found.accepted for found in things)


def _likeness(thing: Thing, wanted: Wanted) -> int:
    return sum(
        (thing.shape == wanted.shape, thing.colour == wanted.colour, thing.size == wanted.size)
    )
