"""The captions of the scenes: a small grammar, written and parsed without loss.

    object  := [size] [colour] shape
    caption := frame ( a object | two/three/four objects | a list of objects
                     | a object relation a object )

Captions are a closed world: they name every object, and the picture contains nothing else. An
attribute that is left out is free. So what "there are two red circles" demands is unambiguous, and
a program can decide for any picture whether it matches its caption.

`write` chooses frame and synonym by two dice; `parse` removes them again. `readings` returns all
ways to understand a caption; the grammar never allows more than one.

Source  closed-world captions with an exact check; GenEval (arXiv 2310.11513), in contrast, names
only what it looks for, and cannot penalise other objects in the picture.
"""

import re
from itertools import product
from typing import NamedTuple

from daybreak.failure import BadData

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SIZES = ("small", "large")
RELATIONS = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

NUMBERS = {2: "two", 3: "three", 4: "four"}
BARE = 0.4
FRAMES = ("{}", "a picture of {}", "an image of {}", "a drawing of {}")
FRAMES_ONE = (*FRAMES, "there is {}")
FRAMES_MANY = (*FRAMES, "there are {}")


class Wanted(NamedTuple):
    """One object as a caption describes it; None means that the attribute is free."""

    shape: str
    colour: str | None = None
    size: str | None = None


class Specification(NamedTuple):
    """What a caption asks for: exactly these objects, and the first in `relation` to the second.

    A count is n equal objects. `relation` is a key of `RELATIONS`, and needs exactly two objects.
    """

    objects: tuple[Wanted, ...]
    relation: str | None = None


def write(specification: Specification, frame: float = 0.0, synonym: float = 0.0) -> str:
    """The caption of a specification; two dice in [0, 1) choose among equivalent wordings.

    A share `BARE` of captions has no frame, so that most words that a model reads matter.
    """
    objects, relation = specification
    frames = FRAMES_ONE
    if relation is not None:
        words = RELATIONS[relation][int(synonym * len(RELATIONS[relation]))]
        phrase = f"{_a(objects[0])} {words} {_a(objects[1])}"
    elif len(objects) > 1 and len(set(objects)) == 1:
        phrase, frames = f"{NUMBERS[len(objects)]} {_plural(_noun(objects[0]))}", FRAMES_MANY
    elif len(objects) > 1:
        phrase = ", ".join(map(_a, objects[:-1])) + f" and {_a(objects[-1])}"
    else:
        phrase = _a(objects[0])
    framed = 0 if frame < BARE else 1 + int((frame - BARE) / (1 - BARE) * (len(frames) - 1))
    return frames[framed].format(phrase)


def parse(caption: str) -> Specification:
    """What a caption asks for.

    Errors  BadData for words outside the grammar.
    """
    found = readings(caption)
    if len(found) != 1:
        raise BadData(
            f"The caption {caption!r} is not one the scenes can express; write it like 'a red "
            f"circle above a blue square', 'two green stars' or 'a circle, a cross and a star'."
        )
    return next(iter(found))


def readings(caption: str) -> set[Specification]:
    """All specifications that `caption` can mean: one, or none if it is outside the grammar."""
    found = set()
    for frames, plural in ((FRAMES_ONE, False), (FRAMES_MANY, True)):
        for frame in frames:
            start = frame.removesuffix("{}")
            if caption.startswith(start):
                phrase = caption.removeprefix(start)
                found |= _counted(phrase) if plural else _named(phrase)
    return found


def _noun(wanted: Wanted) -> str:
    return " ".join(word for word in (wanted.size, wanted.colour, wanted.shape) if word)


def _a(wanted: Wanted) -> str:
    noun = _noun(wanted)
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


_KINDS = [
    Wanted(shape, colour, size)
    for shape, colour, size in product(SHAPES, (None, *COLOURS), (None, *SIZES))
]
_ONE = {_a(kind): kind for kind in _KINDS}
_MANY = {
    f"{word} {_plural(_noun(kind))}": Specification((kind,) * n)
    for n, word in NUMBERS.items()
    for kind in _KINDS
}


def _counted(phrase: str) -> set[Specification]:
    return {_MANY[phrase]} if phrase in _MANY else set()


def _named(phrase: str) -> set[Specification]:
    """Readings as one object, a list of objects, or two objects in a relation."""
    found = set()
    names = re.split(r", | and ", phrase)
    proper = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else phrase
    if len(names) <= 4 and phrase == proper and all(name in _ONE for name in names):
        found.add(Specification(tuple(_ONE[name] for name in names)))
    for relation, synonyms in RELATIONS.items():
        for words in synonyms:
            first, _, second = phrase.partition(f" {words} ")
            if first in _ONE and second in _ONE:
                found.add(Specification((_ONE[first], _ONE[second]), relation))
    return found
