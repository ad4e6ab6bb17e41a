"""Controls for the score of scenes: trivial baselines, diversity and memorisation.

    unconditional   pictures of the empty prompt: share well formed, share passing prompts by chance
    retrieval       score if the training picture with the nearest caption replaces the model's
    diversity       one prompt with several seeds: positions and sizes of things, and their colours
                    where the prompt names none
    memorisation    distance to the nearest training picture, beside that of fresh true pictures

A model that always draws the same circle, or copies training pictures, may score well but is found
out here. Diversity and memorisation compare with true scenes that are not in the training set, so
each value has an expected one beside it, which a perfect model would reach.

Source  tests of positions: two-sample Kolmogorov-Smirnov; copies by nearest neighbours: arXiv
        2212.03860.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse, stats

from daybreak.data import scenes
from daybreak.data.scenes import Config, Demand, Thing
from daybreak.data.scenes_captions import COLOURS, OPPOSITE, Specification, parse
from daybreak.evaluate import scenes_diagnosis
from daybreak.evaluate.scenes_checker import Detection, detect, judge
from daybreak.evaluate.scenes_questions import SCORED, Item, held_out, tasks
from daybreak.evaluate.scenes_suite import Generate, Pictures, share_of
from daybreak.evaluate.statistics import cluster_bootstrap
from daybreak.failure import BadRecipe

Floats = npt.NDArray[np.float64]

SEEDS = 4  # pictures for each prompt
REPEATED = ("single", "two")  # tasks whose prompts are drawn SEEDS times: they specify the least
TRAINING = 100_000  # training pictures that are searched
BLOCK = 2_000  # training pictures at a time
SIDE = 32  # side to which pictures are reduced before distances are computed
NEAR = 0.05  # share of fresh pictures that count as near
TRUTH, FIRST_TRUE = 2_000, 1 << 61  # true scenes to compare with, and the index of the first


class Searched(NamedTuple):
    """The result of a search of the training set."""

    distances: Floats  # of each picture to its nearest training picture
    numbers: npt.NDArray[np.int64]  # the training picture with the nearest caption, by prompt


def evaluate(
    generate: Generate,
    config: Config,
    seed: int,
    training_seed: int,
    prompts: int = 40,
    training: int = TRAINING,
) -> dict[str, Any]:
    """Draw, detect and compare; the result is ready for JSON.

    `training_seed` is that of the run, which determines its training set. SEEDS pictures are drawn
    for each of `prompts` prompts of each repeated task, and `prompts` pictures of the empty prompt.

    Errors  BadRecipe if the recipe's scenes never have one or two things.
    """
    asked = tasks(config, seed, prompts * (1 + SEEDS))
    repeated = [[item for item in asked if item.task == task] for task in REPEATED]
    free = [item for items in repeated for item in items[:prompts]]
    if not free:
        raise BadRecipe(
            "--controls draws one or two objects, and this recipe's scenes.objects allows neither"
        )
    turns = [
        generate([item.prompt for item in free], [item.seed + turn for item in free])
        for turn in range(SEEDS)
    ]
    blank = generate([""] * prompts, [free[0].seed + SEEDS + number for number in range(prompts)])
    fresh = scenes.renders([item.scene for items in repeated for item in items[prompts:]])

    scored = [item for item in tasks(config, seed, prompts) if item.task in SCORED]
    known = [*scored, *held_out(config, seed, prompts)]
    searched = search(
        config,
        training_seed,
        np.concatenate((*turns, fresh)),
        [item.specification for item in known],
        training,
    )
    single = [item for item in free if item.task == "single"]
    seen = [[detect(turn[place], config.canvas) for turn in turns] for place in range(len(single))]
    return {
        "controls": "scenes",
        "seed": seed,
        "training_seed": training_seed,
        "unconditional": unconditional(blank, config, scored),
        "retrieval": retrieval(config, training_seed, known, searched.numbers),
        "diversity": diversity(config, seed, single, seen),
        "memorisation": memorisation(searched.distances, len(free) * SEEDS, training),
    }


# Baselines without a prompt, or without a model


def unconditional(blank: Pictures, config: Config, asked: Sequence[Item]) -> dict[str, Any]:
    """Of the empty prompt: the share of pictures that are well formed, and that pass by chance.

    Every picture is judged against every prompt, as only the prompts' mix of tasks matters.
    """
    seen = [detect(picture, config.canvas) for picture in blank]
    passed = [
        float(np.mean([judge(one, item.specification, config.canvas).passed for item in asked]))
        for one in seen
    ]
    low, high = cluster_bootstrap(passed, range(len(seen)))
    return {
        "well_formed": share_of([scenes_diagnosis.well_formed(one.things) for one in seen]),
        "passed": {"exact": float(np.mean(passed)), "low": low, "high": high, "n": len(seen)},
    }


def retrieval(
    config: Config, training_seed: int, asked: Sequence[Item], numbers: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """The score of a baseline that returns the training picture with the nearest caption."""
    passed: dict[str, list[bool]] = {}
    for item, number in zip(asked, numbers.tolist(), strict=True):
        picture = scenes.sample(config, training_seed, number).image
        verdict = judge(detect(picture, config.canvas), item.specification, config.canvas)
        passed.setdefault(item.split or item.task, []).append(verdict.passed)
    by_task = {task: share_of(passed[task]) for task in SCORED if task in passed}
    return {
        "overall": float(np.mean([share["exact"] for share in by_task.values()])),
        "tasks": by_task,
        "held_out": {
            split: share_of(passed[split]) for split in config.held_out if split in passed
        },
    }


# Several pictures of one prompt


def diversity(
    config: Config, seed: int, asked: Sequence[Item], seen: Sequence[Sequence[Detection]]
) -> dict[str, Any]:
    """How much pictures of prompts that name only a shape vary, compared with true scenes.

    Only pictures of exactly one thing, of the right shape, count: `n` of them.

    spread       deviation of centres among pictures of one prompt, divided by that of true scenes:
                 1 is as varied, 0 the same position every time
    across, down, radius    two-sample Kolmogorov-Smirnov distance from true scenes, and its p-value
                 (`p`)
    colours      total variation distance from the colours of true things, and its expectation for
                 as many true things (`by_chance`)
    """
    right = [
        [
            found.things[0].thing
            for found in pictures
            if len(found.things) == 1
            and found.things[0].accepted
            and found.things[0].thing.shape == item.specification.objects[0].shape
        ]
        for item, pictures in zip(asked, seen, strict=True)
    ]
    things = list(chain.from_iterable(right))
    truth = [
        scenes.scene(config, seed, FIRST_TRUE + number, Demand(things=1)).things[0]
        for number in range(TRUTH if things else 0)
    ]
    inner = [_variance(some) for some in right if len(some) > 1]
    spread = float(np.sqrt(np.mean(inner) / _variance(truth))) if inner else None
    return {
        "n": len(things),
        "spread": spread,
        "across": _apart([thing.x for thing in things], [thing.x for thing in truth]),
        "down": _apart([thing.y for thing in things], [thing.y for thing in truth]),
        "radius": _apart([thing.radius for thing in things], [thing.radius for thing in truth]),
        "colours": _colours(things, truth),
    }


def _variance(things: Sequence[Thing]) -> float:
    """The variance of the centres, summed over both directions."""
    return float(np.var([(thing.x, thing.y) for thing in things], axis=0, ddof=1).sum())


def _apart(seen: Sequence[float], truth: Sequence[float]) -> dict[str, float | None]:
    if not seen:
        return {"distance": None, "p": None}
    found = stats.ks_2samp(seen, truth)
    return {"distance": float(found.statistic), "p": float(found.pvalue)}


def _colours(things: Sequence[Thing], truth: Sequence[Thing]) -> dict[str, float | None]:
    """Colours by shape, because with held-out pairs some shapes lack some colours."""
    if not things:
        return {"distance": None, "by_chance": None}
    generator = np.random.Generator(np.random.Philox(key=0))
    seen, expected = (Counter(thing[:2] for thing in some) for some in (things, truth))
    apart = chance = 0.0
    for shape in sorted({thing.shape for thing in things}):
        counts = np.array([seen[shape, colour] for colour in COLOURS])
        shares = np.array([expected[shape, colour] for colour in COLOURS], dtype=np.float64)
        shares /= shares.sum()
        others = generator.multinomial(counts.sum(), shares, 1_000)
        apart += float(np.abs(counts - counts.sum() * shares).sum()) / 2
        chance += float(np.abs(others - counts.sum() * shares).sum(1).mean()) / 2
    return {"distance": apart / len(things), "by_chance": chance / len(things)}


# The training set


def memorisation(distances: Floats, drawn: int, training: int) -> dict[str, Any]:
    """Whether the model's pictures are nearer to the training set than fresh true ones.

    `near` is the share of the model's pictures nearer than the NEAR quantile of the fresh ones: a
    model that copies has more, one that smears has less. Distances are RMS, in units of a byte.
    """
    ours, fresh = distances[:drawn], distances[drawn:]
    return {
        "training": training,
        "median": float(np.median(ours)),
        "fresh_median": float(np.median(fresh)),
        "near": share_of((ours <= np.quantile(fresh, NEAR)).tolist()),
        "near_by_chance": NEAR,
    }


def search(
    config: Config,
    training_seed: int,
    pictures: Pictures,
    asked: Sequence[Specification],
    training: int,
) -> Searched:
    """Search the training set, in one pass, for the nearest pictures and the nearest captions."""
    wanted = _reduced(pictures)
    squares = np.square(wanted).sum(1)
    nearest = np.full(len(wanted), np.inf, dtype=np.float32)
    features = sorted({feature for one in asked for feature in _features(one)}, key=repr)
    places = {feature: place for place, feature in enumerate(features)}
    words = _rows(asked, places)
    likeness, numbers = np.full(len(asked), -1.0), np.zeros(len(asked), dtype=np.int64)
    for first in range(0, training, BLOCK):
        samples = [
            scenes.sample(config, training_seed, index)
            for index in range(first, min(first + BLOCK, training))
        ]
        known = _reduced(np.stack([sample.image for sample in samples]))
        apart = squares[:, None] + np.square(known).sum(1) - 2 * (wanted @ known.T)
        nearest = np.minimum(nearest, apart.min(1))

        alike = (words @ _rows([parse(sample.caption) for sample in samples], places).T).toarray()
        best = alike.max(1)
        better = best > likeness
        likeness[better], numbers[better] = best[better], first + alike.argmax(1)[better]
    rms = np.sqrt(nearest.clip(0) / wanted.shape[1])
    return Searched(rms.astype(np.float64), numbers)


def _reduced(pictures: Pictures) -> npt.NDArray[np.float32]:
    """Pictures as rows, averaged down to SIDE, minus the background to reduce cancellation."""
    n, size = pictures.shape[:2]
    by = size // SIDE
    small = pictures.reshape(n, SIDE, by, SIDE, by, 3).mean((2, 4), dtype=np.float32)
    rows: npt.NDArray[np.float32] = small.reshape(n, -1) - np.float32(scenes.BACKGROUND)
    return rows


def _features(specification: Specification) -> Counter[Hashable]:
    """The features by which captions are compared: objects, attributes, number, relation."""
    objects, relation = specification
    found: Counter[Hashable] = Counter({("number", len(objects)): 1})
    for wanted in objects:
        found.update([wanted, *(attribute for attribute in wanted if attribute)])
    if relation in ("right", "below"):  # to the equal relation of the swapped objects
        objects, relation = objects[::-1], OPPOSITE[relation]
    if relation is not None:
        found.update([relation, (relation, *objects)])
    return found


def _rows(specifications: Sequence[Specification], places: dict[Hashable, int]) -> sparse.csr_array:
    """Features as rows of length 1; features that are not in `places` count only in the length."""
    rows, columns, values = [], [], []
    for row, specification in enumerate(specifications):
        features = _features(specification)
        length = np.sqrt(sum(number**2 for number in features.values()))
        for feature, number in features.items():
            if feature in places:
                rows.append(row)
                columns.append(places[feature])
                values.append(number / length)
    return sparse.csr_array(
        (values, (rows, columns)), shape=(len(specifications), len(places)), dtype=np.float64
    )


# For printing


def table(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (name, value, value to compare with); None is printed as a dash."""
    blank, memory = result["unconditional"], result["retrieval"]
    varied, copies = result["diversity"], result["memorisation"]
    rows = [
        ("no prompt: well formed", _percent(blank["well_formed"]["exact"]), "as with prompts"),
        ("no prompt: passed by chance", _percent(blank["passed"]["exact"]), "the score, far above"),
        ("nearest caption: overall", _percent(memory["overall"]), "the score"),
        *(
            (f"nearest caption: {split}", _percent(share["exact"]), "the score of the split")
            for split, share in memory["held_out"].items()
        ),
        ("one prompt: spread of centres", _number(varied["spread"]), "1"),
    ]
    for name in ("across", "down", "radius"):
        p = _number(varied[name]["p"])
        rows.append((f"one prompt: {name}", _number(varied[name]["distance"]), f"p = {p}"))
    colours = varied["colours"]
    rows += [
        (
            "one prompt: colours",
            _number(colours["distance"]),
            f"{_number(colours['by_chance'])} by chance",
        ),
        (
            "nearest training picture",
            _number(copies["median"]),
            f"{_number(copies['fresh_median'])} of fresh pictures",
        ),
        ("among the nearest", _percent(copies["near"]["exact"]), _percent(NEAR)),
    ]
    return rows


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
