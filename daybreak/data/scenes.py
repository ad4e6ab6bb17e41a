"""Pictures of coloured shapes, drawn from (seed, index): a dataset without files.

A scene is one to four flat shapes on grey. Its picture is an antialiased render of known outlines,
and its caption comes from a closed grammar (`data/scenes_captions`). So whether a generated picture
shows what its prompt asks for can be decided exactly (`evaluate/scenes_checker`), and training
never sees the same picture twice.

Some combinations are held out (`HELD_OUT`). A split is a predicate on the scene, not on its
caption: whatever the words say, a matching scene is not in the training set. Every shape, colour
and relation occurs there; only some combinations of them do not.

Shapes  picture (s, s, 3) uint8, s the size of the canvas.
Units   pixels; the centre of pixel i lies at i, so the canvas reaches from -0.5 to s - 0.5.
        x to the right, y downwards.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from daybreak.data import scenes_captions, scenes_shapes
from daybreak.data.scenes_captions import COLOURS, OPPOSITE, SHAPES, SIZES, Specification, Wanted
from daybreak.failure import BadRecipe

Picture = npt.NDArray[np.uint8]
Split = Literal["H1", "H2", "H3", "H4", "H5"]
SPLITS: tuple[Split, ...] = ("H1", "H2", "H3", "H4", "H5")

LAYOUTS = 256  # tried per numpy call
ATTEMPTS = 10_000
ONE = 0.35  # share of scenes with one thing, if the recipe allows one and more
ALIKE = 0.18  # share of the others in which all things are of one kind; by chance it is 1/40


class Canvas(NamedTuple):
    """A size of picture, and what fits in it. Lengths in pixels."""

    size: int
    most: int  # things
    bands: tuple[tuple[float, float], ...]  # radii: one band, or small and large
    gap: float  # free space between two things beyond 1.2 radii
    scale: float  # factor on the lengths in the rules, which are for radii 5-10
    accepted: tuple[float, float]  # radii that the checker accepts as a thing


CANVASES = {
    "32": Canvas(32, 2, ((5.0, 7.0),), 3.0, 1.0, (4.0, 8.3)),
    "64": Canvas(64, 4, ((6.0, 7.0), (8.5, 10.0)), 3.0, 1.0, (5.0, 11.5)),
    "64-large": Canvas(64, 2, ((10.0, 14.0),), 6.0, 2.0, (8.0, 16.6)),
    "128": Canvas(128, 4, ((12.0, 14.0), (17.0, 20.0)), 6.0, 2.0, (10.0, 23.0)),
}

BACKGROUND = 90.0
BACKGROUND_SHIFT = 8.0
PALETTE = np.array(  # rows in the order of COLOURS
    [
        [220, 40, 40],
        [40, 160, 60],
        [50, 80, 220],
        [240, 220, 50],
        [150, 60, 190],
        [245, 140, 30],
        [60, 200, 220],
        [250, 250, 250],
    ],
    dtype=np.float64,
)


class Config(BaseModel):
    """Section `[scenes]` of a recipe.

    `under_specified` is the share of captions that leave out an attribute. If things have sizes,
    most of these captions leave out the size, as most of the evaluation's prompts do. The captions
    of the first `complete` scenes leave out nothing: they teach order sooner (docs/LOG.md).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    canvas: Literal["32", "64", "64-large", "128"] = "64"
    objects: tuple[int, int] = Field(  # fewest and most in a picture
        default_factory=lambda known: (1, CANVASES[known["canvas"]].most)
    )
    under_specified: float = Field(default=0.25, ge=0.0, le=1.0)
    complete: int = Field(default=0, ge=0)
    held_out: tuple[Split, ...] = SPLITS

    @field_validator("canvas", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """Accept a number as the name of a canvas: `--set scenes.canvas=32`."""
        return str(value) if type(value) is int else value

    @model_validator(mode="after")
    def _objects_fit(self) -> "Config":
        fewest, most = self.objects
        if not 1 <= fewest <= most <= CANVASES[self.canvas].most:
            raise ValueError(
                f"objects = [{fewest}, {most}] does not fit canvas {self.canvas!r}, which holds 1 "
                f"to {CANVASES[self.canvas].most} objects: give the fewest, then the most"
            )
        if fewest == 4 and "H5" in self.held_out:
            raise ValueError(
                "objects = [4, 4] leaves nothing to train on while H5 (four objects) is held out: "
                "allow fewer objects or take H5 out of held_out"
            )
        return self


class Thing(NamedTuple):
    """One shape on the canvas. `size` is a word, or None if the canvas has only one band."""

    shape: str
    colour: str
    size: str | None
    x: float
    y: float
    radius: float


class Dice(NamedTuple):
    """Numbers in [0, 1) that choose the wording; they are drawn with the scene and kept in it."""

    omit: float
    which: float
    form: float
    turn: float
    frame: float
    synonym: float


class Scene(NamedTuple):
    """A picture before it is drawn: its things in no special order, and the grey behind them."""

    canvas: str
    things: tuple[Thing, ...]
    background: float
    dice: Dice


class Sample(NamedTuple):
    """A picture (s, s, 3), its caption, and the scene that both come from."""

    image: Picture
    caption: str
    scene: Scene


class Demand(NamedTuple):
    """What an evaluation demands of the next scene; `ANY` demands nothing.

    With `split` None the scene is one that training could contain. Otherwise it belongs to that
    split and to no other, so that a failure has only one cause.
    """

    things: int | None = None  # None leaves it to the dice
    alike: bool = False  # all things of one kind, or not all
    relation: bool = False  # two things that clearly stand in a relation
    split: Split | None = None


ANY = Demand()


def sample(config: Config, seed: int, index: int) -> Sample:
    """Sample number `index` of the endless training set of `seed`."""
    drawn = scene(config, seed, index)
    return Sample(render(drawn), caption(config, drawn, index), drawn)


def scene(config: Config, seed: int, index: int, demand: Demand = ANY) -> Scene:
    """Scene number `index` of `seed`: a pure function of its arguments.

    The number of things, and whether all are alike, is drawn once; the rest is drawn repeatedly
    until the scene is not held out (or is, if demanded). So the shares of counts always follow
    `ONE` and `ALIKE`, whatever is held out.

    Errors  ValueError for a seed or an index outside 0 .. 2^64 - 1; BadRecipe if no scene of this
            recipe can meet the demand.
    """
    if not (0 <= seed < 1 << 64 and 0 <= index < 1 << 64):
        raise ValueError(f"seed {seed} and index {index} must be in 0 .. 2^64 - 1")
    generator = np.random.Generator(np.random.Philox(key=(index << 64) | seed))
    amount, same, grey, *dice = generator.random(3 + len(Dice._fields)).tolist()
    count = demand.things or _count(config, amount)
    alike = count > 1 and (demand.alike or (demand == ANY and same < ALIKE))
    splits = {*config.held_out, *((demand.split,) if demand.split else ())}
    by_kind: list[Split] = [split for split in splits if split != "H3"]  # these need no positions

    for _ in range(ATTEMPTS):
        things = _kinds(CANVASES[config.canvas], count, alike, generator)
        if count > 1 and not alike and len({thing[:2] for thing in things}) == 1:
            continue
        if any(_HELD_OUT[split](things) != (split == demand.split) for split in by_kind):
            continue
        things = _place(CANVASES[config.canvas], things, generator)
        if "H3" in splits and _crossed(things) != (demand.split == "H3"):
            continue
        shift = BACKGROUND_SHIFT * (2 * grey - 1)
        drawn = Scene(config.canvas, things, BACKGROUND + shift, Dice(*dice))
        if not demand.relation or relation(drawn) is not None:
            return drawn
    raise BadRecipe(f"No scene of canvas {config.canvas!r} meets {demand}; ask for another one.")


def _count(config: Config, die: float) -> int:
    """How many things: one with probability ONE, else each allowed number is equally likely."""
    fewest, most = config.objects
    if "H5" in config.held_out:
        most = min(most, 3)
    if fewest == 1 and (die < ONE or most == 1):
        return 1
    rest = (die - ONE) / (1 - ONE) if fewest == 1 else die
    fewest = max(fewest, 2) if most > 1 else 1
    return fewest + int(rest * (most - fewest + 1))


def _kinds(
    canvas: Canvas, count: int, alike: bool, generator: np.random.Generator
) -> tuple[Thing, ...]:
    """Things with shape, colour and size, but without a position and radius yet."""
    dice = generator.random(3 * (1 if alike else count)).tolist()
    things = tuple(
        Thing(
            SHAPES[int(shape * len(SHAPES))],
            COLOURS[int(colour * len(COLOURS))],
            SIZES[int(size * 2)] if len(canvas.bands) == 2 else None,
            0.0,
            0.0,
            0.0,
        )
        for shape, colour, size in zip(dice[::3], dice[1::3], dice[2::3], strict=True)
    )
    return things * count if alike else things


def _place(
    canvas: Canvas, things: tuple[Thing, ...], generator: np.random.Generator
) -> tuple[Thing, ...]:
    """Radii and centres, drawn together until no two things are too close.

    Rejecting whole layouts makes every layout that fits equally likely. Rejecting thing by thing
    would favour layouts around the first one; its only merit is speed, which a batch of layouts per
    numpy call gives as well. Crowded layouts fit more often with small radii, so on canvas 32 the
    mean radius is 5.5 for two things and 6 for one.
    """
    n = len(things)
    bands = [canvas.bands[SIZES.index(thing.size) if thing.size else 0] for thing in things]
    low = np.array([band[0] for band in bands])
    span = np.array([band[1] - band[0] for band in bands])
    tries = LAYOUTS if n > 1 else 1
    while True:
        dice = generator.random((3, tries, n))
        reach = 1.2 * (low + span * dice[0])
        x, y = (reach + 1) + (canvas.size - 3 - 2 * reach) * dice[1:]
        fits = np.ones(tries, dtype=bool)
        for i, j in combinations(range(n), 2):
            apart = reach[:, i] + reach[:, j] + canvas.gap
            fits &= (x[:, i] - x[:, j]) ** 2 + (y[:, i] - y[:, j]) ** 2 > apart * apart
        first = int(fits.argmax())
        if fits[first]:
            break
    rows = zip(things, x[first].tolist(), y[first].tolist(), reach[first].tolist(), strict=True)
    return tuple(
        Thing(thing.shape, thing.colour, thing.size, across, down, spread / 1.2)
        for thing, across, down, spread in rows
    )


# What is held out


def held_out(scene: Scene, split: Split) -> bool:
    """Whether a scene belongs to a split, whatever its caption says.

    H1  a thing has one of 8 of the 40 (shape, colour) pairs: every shape keeps at least 6 of its 8
        colours, every colour 4 of its 5 shapes
    H2  exactly two triangles, three stars or four crosses, of any colour
    H3  a thing stands in a relation to another whose colours are held out for it: a tenth of the
        ordered colour pairs, and as many for either axis
    H4  two things have the colours of a pair that is seen, swapped: circle red, star blue is seen,
        circle blue, star red is not; a quarter of all (shape pair, colour pair)
    H5  four things
    """
    return _HELD_OUT[split](scene.things)


# Shifted by two, so that "a red circle" and "a blue square", which everybody tries first, are not
# held out.
_PAIRS = {(SHAPES[(i + 2) % 5], colour) for i, colour in enumerate(COLOURS)}
_COUNTS = {"triangle": 2, "star": 3, "cross": 4}
_CROSSED = {("left", COLOURS[i], COLOURS[(i + 3) % 8]) for i in range(6)} | {
    ("above", COLOURS[i], COLOURS[(i + 5) % 8]) for i in range(6)
}


def _swaps() -> set[tuple[str, str, str, str]]:
    """(shape, colour, shape, colour) of every swap that is held out, either thing first."""
    swaps = set()
    for i, (one, other) in enumerate(combinations(SHAPES, 2)):
        for j, (low, high) in enumerate(combinations(COLOURS, 2)):
            if (i + j) % 4 == 1:
                first, second = (low, high) if (i + j) % 8 == 5 else (high, low)
                swaps |= {(one, first, other, second), (other, second, one, first)}
    return swaps


_SWAPS = _swaps()


def _paired(things: tuple[Thing, ...]) -> bool:
    return any((thing.shape, thing.colour) in _PAIRS for thing in things)


def _counted(things: tuple[Thing, ...]) -> bool:
    shapes = [thing.shape for thing in things]
    return any(shapes.count(shape) == n for shape, n in _COUNTS.items())


def _crossed(things: tuple[Thing, ...]) -> bool:
    for one, other in combinations(things, 2):
        word = side(one, other)
        if word in ("right", "below"):
            word, one, other = OPPOSITE[word], other, one
        if (word, one.colour, other.colour) in _CROSSED:
            return True
    return False


def _swapped(things: tuple[Thing, ...]) -> bool:
    return any(
        (one.shape, one.colour, other.shape, other.colour) in _SWAPS
        for one, other in combinations(things, 2)
    )


def _crowded(things: tuple[Thing, ...]) -> bool:
    return len(things) == 4


_HELD_OUT = {"H1": _paired, "H2": _counted, "H3": _crossed, "H4": _swapped, "H5": _crowded}


# Words


def relation(scene: Scene) -> str | None:
    """The relation of the first of two things to the second; None if it is not clear.

    The larger of the two offsets decides, so only one of the four relations holds. A pair near the
    diagonal has none.
    """
    if len(scene.things) != 2:
        return None
    one, other = scene.things
    margin = abs(abs(one.x - other.x) - abs(one.y - other.y))
    return side(one, other) if margin >= 3 * CANVASES[scene.canvas].scale else None


def side(one: Thing, other: Thing) -> str:
    """The relation of one thing to another, however near the diagonal they are."""
    across, down = one.x - other.x, one.y - other.y
    if abs(across) >= abs(down):
        return "left" if across < 0 else "right"
    return "above" if down < 0 else "below"


def describe(
    scene: Scene, colours: bool = True, sizes: bool = True, related: bool = False
) -> Specification:
    """The scene as a specification that states these attributes.

    With `related` it states the relation too, which must exist; but if the stated attributes of all
    things are equal, the things are counted and no relation is stated.
    """
    objects = tuple(
        Wanted(thing.shape, thing.colour if colours else None, thing.size if sizes else None)
        for thing in scene.things
    )
    if not related or len(set(objects)) == 1:
        return Specification(objects)
    word = relation(scene)
    assert word is not None, "asked for the relation of a scene that has none"
    if scene.dice.turn < 0.5:
        return Specification(objects, word)
    return Specification(objects[::-1], OPPOSITE[word])


def caption(config: Config, scene: Scene, index: int) -> str:
    """The caption of scene number `index`, chosen by the scene's dice: each scene has only one.

    From number `complete` on, a share `under_specified` of captions leaves something out: the
    colour if things have no sizes, else the size, the colour or both. If two things have a
    relation, three in four captions state it.
    """
    dice = scene.dice
    colours = sizes = True
    if index >= config.complete and dice.omit < config.under_specified:
        banded = len(CANVASES[scene.canvas].bands) == 2
        sizes = dice.which >= 0.85
        colours = banded and dice.which < 0.6
    related = dice.form < 0.75 and relation(scene) is not None
    return scenes_captions.write(describe(scene, colours, sizes, related), dice.frame, dice.synonym)


# Pixels


def render(scene: Scene) -> Picture:
    """The picture of a scene: the stored colour values, mixed linearly by coverage."""
    picture: Picture = renders([scene])[0]
    return picture


def renders(drawn: Sequence[Scene]) -> npt.NDArray[np.uint8]:
    """The pictures of scenes of one canvas, (b, s, s, 3).

    All things of a shape are drawn at once, in less than half the time of drawing them one by one.
    """
    size = CANVASES[drawn[0].canvas].size
    canvas = np.empty((len(drawn), 3, size, size))
    canvas[:] = np.array([scene.background for scene in drawn])[:, None, None, None]
    placed = [(number, thing) for number, scene in enumerate(drawn) for thing in scene.things]
    for shape in SHAPES:
        some = [one for one in placed if one[1].shape == shape]
        if not some:
            continue
        x, y, radius = np.array([(thing.x, thing.y, thing.radius) for _, thing in some]).T
        left, top = np.floor(x - 1.2 * radius), np.floor(y - 1.2 * radius)
        side = 2 + math.ceil(2.4 * radius.max())
        each = scenes_shapes.coverage(shape, x - left, y - top, radius, side, side)
        corners = zip(top.astype(int).tolist(), left.astype(int).tolist(), strict=True)
        for (number, thing), m, (row, column) in zip(some, each, corners, strict=True):
            part = canvas[number, :, row : row + side, column : column + side]
            mixed = PALETTE[COLOURS.index(thing.colour)] - drawn[number].background
            part += m[: part.shape[1], : part.shape[2]] * mixed[:, None, None]
    pictures = np.rint(canvas, out=canvas).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pictures)
