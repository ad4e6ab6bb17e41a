"""Measure this machine: real steps of a recipe, and how fast a CPU core prepares pictures.

A recipe is measured by training it in a temporary folder, for a few steps of each stage and with
one device's share of the batch. Missing data is replaced by noise of the same size, captions by
ones as long as the recipe allows, missing networks by random ones (train/stand_ins).
"""

import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daybreak.config import Recipe
from daybreak.data import batches, images
from daybreak.train import hardware, log, stand_ins

FIRST, STEPS = 4, 20  # first steps, which compile and do not count; and steps that count
DRAWN = 32  # scenes drawn at once
TRIED = 0.05  # seconds for which preparing pictures is repeated


class Pace(NamedTuple):
    """Seconds of a usual step of a stage, and the extra seconds of its first steps together."""

    step: float
    start: float


def steps(recipe: Recipe, count: int) -> tuple[Pace, ...]:
    """Train for a few steps; returns the pace of each stage, by the median of its steps.

    During the first ones networks are built and blocks compiled, or kernels of an earlier run are
    loaded. `count` devices divide a batch, and this process takes one share. Progress goes to
    stderr.

    Errors  those of training.
    """
    from daybreak.train import loop  # a slow import that a plan without measuring does not need

    with tempfile.TemporaryDirectory(prefix="daybreak-measure-") as folder:
        with contextlib.redirect_stdout(sys.stderr):
            short, began = shortened(recipe, count, Path(folder)), time.monotonic()
            outcome = loop.train(short, trial=True)
        if outcome.code:
            raise SystemExit(outcome.code)
        whole = time.monotonic() - began
        lines = (Path(short.out) / "metrics.jsonl").read_text().splitlines()
    ends = [float(json.loads(line)["seconds"]) for line in lines]
    # The log's seconds begin when networks are built, and nothing comes after its last line.
    found, before = [], ends[-1] - whole
    for number in range(len(short.stage)):
        stage = ends[number * (FIRST + STEPS) :][: FIRST + STEPS]
        step = statistics.median(b - a for a, b in itertools.pairwise(stage[FIRST - 1 :]))
        found.append(Pace(step, max(0.0, stage[FIRST - 1] - before - FIRST * step)))
        before = stage[-1]
    return tuple(found)


def preparing(recipe: Recipe, side: int) -> float:
    """Seconds that a core takes to draw one scene of a batch, or to decode a JPEG of this size."""
    if recipe.drawn is not None:
        source = batches.Scenes(recipe.drawn, recipe.seed)
        slots = source.plan(side, DRAWN, first=0)(0)
        return hardware.fastest(lambda: source.samples(slots), TRIED) / DRAWN
    data = images.encode(noise(side, 0), "jpeg")
    return hardware.fastest(lambda: images.decode_to_cover(data, "a picture", side, side), TRIED)


def noise(side: int, seed: int) -> npt.NDArray[np.uint8]:
    """A picture of smooth noise, about as hard to decode as a photograph."""
    coarse = np.random.Generator(np.random.Philox(seed)).integers(0, 256, (side // 4, side // 4, 3))
    return images.fit(coarse.astype(np.uint8), side, side)


def shortened(recipe: Recipe, count: int, folder: Path) -> Recipe:
    """The recipe with fewer steps, and nothing between them."""
    stages = []
    for stage, before in zip(recipe.stage, recipe.starts, strict=True):
        without = recipe.resting(stage, before + 1)  # here the stage's first step comes sooner
        changed = {"steps": FIRST + STEPS, "samples": None, "batch": stage.batch // count}
        stages.append(stage.model_copy(update=changed | {"without": tuple(sorted(without))}))
    never = sum(stage.count for stage in stages) + 1
    changes: dict[str, Any] = {
        "out": str(folder / "run"),
        "stage": tuple(stages),
        "save_every": never,
        "evaluate": None,
        "budget": None,
        "parallel": recipe.parallel.model_copy(update={"dp_replicate": 1, "dp_shard": 0}),
        "sample": recipe.sample.model_copy(update={"every": never, "steps": 1, "prompts": ("",)}),
    }
    if recipe.drawn is None and not all(path.exists() for path in recipe.paths):
        changes["stage"] = tuple(stage.model_copy(update={"source": None}) for stage in stages)
        changes["data"] = recipe.data.model_copy(
            update={"source": str(_pretend(recipe, folder / "noise")), "caption_columns": ()}
        )
    return stand_ins.replaced(recipe.model_copy(update=changes), folder / "networks", log.say)


def _pretend(recipe: Recipe, folder: Path) -> Path:
    """Write a dataset of captioned noise in place of missing pictures."""
    folder.mkdir()
    for number in range(32):
        picture = noise(max(stage.resolution for stage in recipe.stage), number)
        (folder / f"{number}.jpg").write_bytes(images.encode(picture, "jpeg"))
        (folder / f"{number}.txt").write_text(f"{number} " + "a word " * recipe.text.max_tokens)
    return folder
