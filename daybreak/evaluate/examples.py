"""Captioned pictures for evaluation: fresh scenes, or those of a prepared dataset.

Example k is the same picture with the same caption in every call and for every model: it depends on
source, seed, size and count alone. Scenes have indices that training never reaches. Whether a
dataset was used for training is not checked.

Each caption is drawn in the shape of its picture, so examples come in batches of one shape, a
bucket of the dataset at the model's resolution.

Shapes  pictures (b, h, w, 3) uint8.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daybreak.data import scenes
from daybreak.data.plan import Slot
from daybreak.data.prepared import Prepared
from daybreak.evaluate.distances import FEWEST
from daybreak.failure import BadData

BATCH = 64
FIRST = 1 << 60  # index of the first scene, beyond those of training


class Batch(NamedTuple):
    """Consecutive examples of one shape, numbered from `first`."""

    first: int
    pictures: npt.NDArray[np.uint8]
    captions: list[str]


class Examples(NamedTuple):
    """`total` captioned pictures; `read` iterates over them from the start."""

    source: str
    digest: str  # 16 hex digits that identify the pictures
    total: int
    read: Callable[[], Iterator[Batch]]
    seed: int = 0  # with which they were chosen

    @property
    def facts(self) -> dict[str, Any]:
        """The facts about them that a result records, for JSON."""
        return {"examples": self.digest, "examples_seed": self.seed, "source": self.source}


def of_scenes(config: scenes.Config, seed: int, count: int) -> Examples:
    """Scenes distributed as in training, at indices that training never reaches."""

    def read() -> Iterator[Batch]:
        for first in range(0, count, BATCH):
            drawn = [
                scenes.sample(config, seed, FIRST + number)
                for number in range(first, min(first + BATCH, count))
            ]
            pictures = np.stack([sample.image for sample in drawn])
            yield Batch(first, pictures, [sample.caption for sample in drawn])

    # `complete` concerns only scenes with smaller indices, so it does not change these.
    facts = [config.model_dump(mode="json", exclude={"complete"}), seed, count]
    return Examples("scenes", _digest(facts), count, read, seed)


def of_dataset(folder: Path, side: int, unit: int, seed: int, count: int) -> Examples:
    """Distinct pictures of a prepared dataset at resolution `side`; sides are multiples of `unit`.

    Errors  BadData if there is no such dataset, or if its pictures are too few or too small.
    """
    source = Prepared([(str(folder), 1.0)], seed, unit)
    opened = source.datasets[0]
    if len(opened.numbers) < count:
        there, ask = len(opened.numbers), ""
        if there >= FEWEST:  # a number that can be asked for
            ask = (
                f"ask for {there} (--count of evaluate, --pictures of compare, evaluate.pictures "
                "of a recipe), or "
            )
        raise BadData(
            f"{folder} holds {there} pictures and {count} are needed for the comparison: "
            f"{ask}give a larger dataset"
        )
    if opened.largest < side:
        raise BadData(
            f"{folder} was prepared for {opened.largest} px and the model draws {side} px: prepare "
            f"it again with --resolution {side}"
        )
    plan = source.plan(side, batch=1, first=0)
    slots = sorted((plan(number)[0] for number in range(count)), key=_shape)

    def read() -> Iterator[Batch]:
        first = 0
        for _, alike in groupby(slots, _shape):
            some = list(alike)
            for start in range(0, len(some), BATCH):
                samples = [source.sample(slot) for slot in some[start : start + BATCH]]
                for sample in samples:
                    if sample.complaint:
                        raise BadData(sample.complaint)
                pictures = np.stack([sample.picture for sample in samples])
                yield Batch(first, pictures, [sample.caption for sample in samples])
                first += len(samples)

    facts = [sorted(opened.files.values()), side, seed, count, [list(slot) for slot in slots]]
    return Examples(str(folder), _digest(facts), count, read, seed)


def _shape(slot: Slot) -> tuple[int, int]:
    return slot.height, slot.width


def _digest(facts: list[object]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
