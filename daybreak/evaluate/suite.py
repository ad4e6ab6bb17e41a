"""Evaluations: suites, their results with intervals, and the names of metrics.

A suite is a function from an artist and its prompts or examples to a `Result`:

    scenes, validation          here
    distribution, coco30k       evaluate/distribution
    prompts                     evaluate/prompts
    geneval                     evaluate/geneval

A metric's name starts with its suite: `scenes.exact`, `validation.loss`, `distribution.clip.cmmd`.
`lower_is_better` tells best checkpoints and comparisons which direction is better.

No two pictures of a suite share their noise, and each can be drawn again: a result records its seed
and the rule by which each picture's seed follows from it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from daybreak import host
from daybreak.data import disk
from daybreak.data import scenes as scenes_data
from daybreak.data.loader import to_unit
from daybreak.data.scenes import CANVASES, SPLITS
from daybreak.evaluate import scenes_questions, scenes_suite, validation
from daybreak.evaluate.artist import Artist, square
from daybreak.evaluate.distances import Estimate
from daybreak.evaluate.examples import Examples
from daybreak.evaluate.statistics import Z
from daybreak.failure import BadRecipe, BadStorage
from daybreak.model.text_to_image import TextToImage

Progress = Callable[[int, int], None]
Suite = Literal["validation", "scenes", "distribution"]  # suites by which runs can be compared

LOWER = ("loss", "velocity", "image", "frechet", "kernel", "cmmd")  # errors and distances
DISTANCES = ("frechet", "kernel", "cmmd", "precision", "recall", "density", "coverage")
METRICS: dict[Suite, tuple[str, ...]] = {
    "scenes": ("exact", *scenes_questions.TASKS, *SPLITS),
    "validation": validation.NAMES,
    "distribution": DISTANCES,
}
SEED_RULE = "picture i is drawn with the noise of seed + i"  # unless a suite has its own
FEW = 240  # with fewer pictures, starting further processes takes longer than checking


class Result(NamedTuple):
    """Values by name, the number of pictures, and further details to record.

    `remarks` are sentences for the reader of the values.
    """

    values: Mapping[str, Estimate]
    pictures: int
    details: Mapping[str, Any] = {}
    remarks: Sequence[str] = ()


def scenes(
    artist: Artist,
    config: scenes_data.Config,
    seed: int,
    per_task: int,
    progress: Progress | None = None,
) -> Result:
    """The share of pictures that show exactly what the prompt asks for; details: `scenes_suite`.

    Errors  BadRecipe if the artist does not draw pictures of the canvas' size.
    """
    size = CANVASES[config.canvas].size
    if artist.side != size:
        raise BadRecipe(
            f"scenes of canvas {config.canvas!r} are {size} px and the model draws {artist.side} "
            f"px: give --resolution {size}, or the canvas it was trained for"
        )
    asked = (len(scenes_questions.TASKS) + len(config.held_out)) * per_task
    workers = 1 if asked < FEW else max(1, host.cores() // host.processes())
    found = scenes_suite.evaluate(square(artist), config, seed, per_task, progress, workers)
    shares = {"exact": found["overall"]}
    for group in ("tasks", "held_out", "controls"):
        shares |= found[group]
    values = {
        name: Estimate(share["exact"], share["low"], share["high"])
        for name, share in shares.items()
        if share["n"]
    }
    return Result(values, found["prompts"], found)


def validate(
    model: TextToImage, examples: Examples, noise_scale: float = 1.0, seed: int = 0
) -> Result:
    """The validation loss, whole and by bin of t, with intervals over pictures."""
    parts = [
        validation.errors(
            model,
            to_unit(torch.from_numpy(batch.pictures)),
            batch.captions,
            noise_scale,
            seed,
            batch.first,
        )
        for batch in examples.read()
    ]
    errors = validation.Errors(*(np.concatenate(rows) for rows in zip(*parts, strict=True)))
    values = {name: mean(column) for name, column in validation.by_name(errors).items()}
    details = examples.facts | {"seed": seed, "seed_rule": validation.SEED_RULE}
    return Result(values, examples.total, details)


def mean(values: npt.NDArray[np.float64]) -> Estimate:
    """The mean over independent pictures and its 95 % interval."""
    half = Z * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else np.inf
    centre = float(values.mean())
    return Estimate(centre, centre - half, centre + half)


# Names


def suite_of(metric: str) -> Suite:
    """The suite of a metric. Errors: BadRecipe for an unknown metric; it lists the known ones."""
    for suite, values in METRICS.items():
        if metric.startswith(f"{suite}."):
            if _value(metric) in values:
                return suite
            example = ", as in distribution.clip.cmmd" if suite == "distribution" else ""
            raise BadRecipe(f"{suite} has no {metric!r}: there are {', '.join(values)}{example}")
    raise BadRecipe(
        f"there is no metric {metric!r}: name a suite ({', '.join(METRICS)}) and a value of it, "
        "for example scenes.exact or validation.loss"
    )


def lower_is_better(metric: str) -> bool:
    """Whether smaller values of a metric are better."""
    return _value(metric).startswith(LOWER)


def _value(metric: str) -> str:
    """The name of the value, without suite and, for distances, without network."""
    suite, _, name = metric.partition(".")
    return name.rpartition(".")[2] if suite == "distribution" else name


# Records


def record(
    name: str, artist: Artist, result: Result, seed: int, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole record of a result, ready for JSON; `about` describes code and machine.

    A suite's own seed or seed rule, in its details, replaces the general one.
    """
    return {
        "suite": name,
        "seed": seed,
        "seed_rule": SEED_RULE,
        **plain(result),
        "weights_sha256": artist.digest,
        **artist.facts,
        **about,
    }


def plain(result: Result) -> dict[str, Any]:
    """The result alone, ready for JSON."""
    return {
        **result.details,
        "values": {key: as_json(value) for key, value in result.values.items()},
        "pictures": result.pictures,
        "remarks": list(result.remarks),
    }


def as_json(value: Estimate) -> dict[str, float | None]:
    """A value and its interval; numbers that are not finite become None, as JSON lacks them."""
    numbers = {"value": value.value, "low": value.low, "high": value.high}
    numbers |= {"bias": value.bias} if value.bias else {}
    return {key: number if np.isfinite(number) else None for key, number in numbers.items()}


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write JSON atomically. Errors: BadStorage."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.fresh(path) as staged:
            staged.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadStorage(
            f"cannot write {path}: {error.strerror}; choose another folder with --out"
        ) from error


def table(result: Result) -> list[tuple[str, str, str, str]]:
    """Rows (name, value, 95 % interval, pictures) for printing."""
    return [
        (name, f"{value:.4g}", f"{low:.4g} - {high:.4g}", str(result.pictures))
        for name, (value, low, high, _) in result.values.items()
    ]
