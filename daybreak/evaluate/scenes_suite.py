"""The score of scenes: how often a model draws exactly what the prompt asks for, task by task.

The prompts are those of `evaluate/scenes_questions`. The score is the mean of the six tasks'
shares; tasks that a recipe cannot draw are left out and have n = 0. The result also contains

    controls        the same pictures under shuffled prompts (chance), and renders of true scenes
                    (the checker's upper bound)
    attributes      shares for single attributes
    held_out, gaps  combinations that training never showed, and how far their share is below that
                    of the same tasks with combinations that it showed
    product         the share if attributes were independent: a score well below it means right
                    attributes on the wrong things
    confusion       which attribute was drawn in place of which
    fidelity        how cleanly things are drawn

Further controls, which draw pictures of their own: `evaluate/scenes_controls`.

Source  clustered intervals, arXiv 2411.00640.
"""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daybreak.data import scenes
from daybreak.data.scenes import CANVASES, Config
from daybreak.data.scenes_captions import Specification
from daybreak.evaluate import scenes_diagnosis
from daybreak.evaluate.scenes_checker import (
    VERSION,
    Detection,
    Verdict,
    detect,
    judge,
    thresholds_hash,
)
from daybreak.evaluate.scenes_questions import SCORED, SEED_RULE, TASKS, Item, held_out, tasks
from daybreak.evaluate.statistics import difference, share_interval, wilson
from daybreak.train.stop import deaf

Pictures = npt.NDArray[np.uint8]
Generate = Callable[[list[str], list[int]], Pictures]
"""Draw one picture (n, s, s, 3) uint8 per prompt, the noise of each from its own seed."""

ATTRIBUTES = ("count", "colours", "shapes", "relation")
BATCH = 60  # pictures per call of `generate`


class Seen(NamedTuple):
    """What the checker found in a picture, and the PSNR of the picture against a render of that."""

    detection: Detection
    psnr: float


class Score(NamedTuple):
    """The verdicts of a picture on its own prompt and on another one, and of a true render."""

    verdict: Verdict
    shuffled: Verdict | None
    truth: Verdict


def evaluate(
    generate: Generate,
    config: Config,
    seed: int,
    per_task: int = 120,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Draw, check and count; the result is ready for JSON.

    `progress` is called with the numbers of pictures drawn and in all. Checking runs in `workers`
    processes (1: in a thread of this one) while the next pictures are drawn.

    Shares have the form {exact, low, high, n} with 95 % intervals: `overall`, `tasks.NAME`,
    `held_out.SPLIT`, `attributes.NAME`, `controls.shuffled`, `controls.ground_truth`. If n is 0 the
    others are None. `gaps.SPLIT` are differences of shares in the same form. `confusion` and
    `fidelity` have one table for the model and one for true renders. `items` lists every prompt
    with its verdict.

    Errors  ValueError if `generate` returns pictures of the wrong number, size or type.
    """
    asked = [*tasks(config, seed, per_task), *held_out(config, seed, per_task)]
    with _pool(workers) as pool:
        pending, truths = [], []
        for start in range(0, len(asked), BATCH):
            batch = asked[start : start + BATCH]
            pictures = generate([item.prompt for item in batch], [item.seed for item in batch])
            _check(pictures, len(batch), config.canvas)
            renders = scenes.renders([item.scene for item in batch])
            with deaf():
                pending.append(pool.submit(look, pictures, config.canvas))
                truths.append(pool.submit(look, renders, config.canvas))
            if progress is not None:
                progress(start + len(batch), len(asked))
        seen = [one for batch in pending for one in batch.result()]
        true = [one for batch in truths for one in batch.result()]
    scores = _scores(config, seed, asked, seen, true)
    return _result(config, seed, asked, scores) | _diagnosis(config, asked, seen, true)


# Checking


def _pool(workers: int) -> Executor:
    """Return worker processes, or one thread. They are spawned: torch may not survive a fork."""
    if workers <= 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _check(pictures: Pictures, number: int, canvas: str) -> None:
    """Check number, size and type of the returned pictures. Errors: ValueError."""
    size = CANVASES[canvas].size
    if pictures.dtype != np.uint8 or pictures.shape != (number, size, size, 3):
        raise ValueError(
            f"asked for {number} pictures, uint8 ({number}, {size}, {size}, 3); the generator "
            f"returned {pictures.dtype} {pictures.shape}"
        )


def look(pictures: Pictures, canvas: str) -> list[Seen]:
    """Run the checker's detection on pictures."""
    found = [detect(picture, canvas) for picture in pictures]
    return [
        Seen(detection, scenes_diagnosis.psnr(picture, detection))
        for picture, detection in zip(pictures, found, strict=True)
    ]


def _scores(
    config: Config,
    seed: int,
    asked: Sequence[Item],
    seen: Sequence[Seen],
    true: Sequence[Seen],
) -> list[Score]:
    """The scores in the order of the items."""
    another = _shuffled(asked, seed)
    return [
        Score(
            judge(seen[i].detection, item.specification, config.canvas),
            judge(seen[i].detection, another[i], config.canvas) if i in another else None,
            judge(true[i].detection, item.specification, config.canvas),
        )
        for i, item in enumerate(asked)
    ]


def _shuffled(asked: Sequence[Item], seed: int) -> dict[int, Specification]:
    """For each scored item, the specification of a random other one of its task."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    another = {}
    for task in SCORED:
        places = [i for i, item in enumerate(asked) if item.task == task and item.split is None]
        order = generator.permutation(len(places)).tolist()
        for one, other in zip(order, order[1:] + order[:1], strict=True):
            if one != other:
                another[places[one]] = asked[places[other]].specification
    return another


# Counting


def _result(
    config: Config, seed: int, asked: Sequence[Item], scores: Sequence[Score]
) -> dict[str, Any]:
    rows = list(zip(asked, scores, strict=True))
    known = [(item, score) for item, score in rows if item.split is None]
    scored = [(item, score) for item, score in known if item.task in SCORED]
    by_task: dict[str, list[tuple[Item, Score]]] = {
        task: [row for row in known if row[0].task == task] for task in TASKS
    }
    by_split = {split: [row for row in rows if row[0].split == split] for split in config.held_out}
    few = [score.verdict.marks for item, score in known if len(item.specification.objects) <= 2]
    return {
        "benchmark": "scenes",
        "canvas": config.canvas,
        "objects": list(config.objects),
        "seed": seed,
        "seed_rule": SEED_RULE,
        "checker": {"version": VERSION, "thresholds": thresholds_hash()},
        "prompts": len(asked),
        "overall": _mean([(item, score.verdict) for item, score in scored]),
        "tasks": {
            task: share_of([s.verdict.passed for _, s in its]) for task, its in by_task.items()
        },
        "held_out": {
            split: share_of([s.verdict.passed for _, s in its]) for split, its in by_split.items()
        },
        "gaps": {split: _gap(by_task, its) for split, its in by_split.items()},
        "controls": {
            "shuffled": _mean([(i, s.shuffled) for i, s in scored if s.shuffled is not None]),
            "ground_truth": _mean([(item, score.truth) for item, score in scored]),
        },
        "attributes": {
            name: share_of([mark for marks in few if (mark := marks[place]) is not None])
            for place, name in enumerate(ATTRIBUTES)
        },
        "undetermined": share_of([score.verdict.undetermined for _, score in rows]),
        "product": {
            name: _product([score.verdict for _, score in its])
            for name, its in [*by_task.items(), *by_split.items()]
        },
        "items": [_row(item, score.verdict) for item, score in rows],
    }


def _gap(
    by_task: dict[str, list[tuple[Item, Score]]],
    held: Sequence[tuple[Item, Score]],
) -> dict[str, float | int | None]:
    """How much larger the share of the same tasks is for combinations that training showed."""
    tasks = {item.task for item, _ in held}
    known = [score.verdict.passed for task in tasks for _, score in by_task[task]]
    new = [score.verdict.passed for _, score in held]
    if not known or not new:
        return share_of([])
    gap = sum(known) / len(known) - sum(new) / len(new)
    low, high = difference(sum(known), len(known), sum(new), len(new))
    return {"exact": gap, "low": low, "high": high, "n": len(new)}


def _diagnosis(
    config: Config, asked: Sequence[Item], seen: Sequence[Seen], true: Sequence[Seen]
) -> dict[str, Any]:
    """Confusions and fidelity, for the model's pictures and for true renders."""
    confusion, fidelity = {}, {}
    for name, pictures in (("model", seen), ("ground_truth", true)):
        confusion[name] = scenes_diagnosis.matrices(
            found
            for item, one in zip(asked, pictures, strict=True)
            for found in scenes_diagnosis.confusions(one.detection, item.specification)
        )
        decibels = [one.psnr for one in pictures]
        left = [scenes_diagnosis.leftover(one.detection, config.canvas) for one in pictures]
        fidelity[name] = {
            "psnr": float(np.median(decibels)) if decibels else None,
            "psnr_worst_tenth": float(np.quantile(decibels, 0.1)) if decibels else None,
            "leftover": float(np.mean(left)) if left else None,
        }
    return {"confusion": confusion, "fidelity": fidelity}


def _mean(rows: Sequence[tuple[Item, Verdict]]) -> dict[str, float | int | None]:
    """The mean of the tasks' shares; images of one specification are one cluster."""
    if not rows:
        return share_of([])
    passed = np.array([verdict.passed for _, verdict in rows], dtype=np.float64)
    names = [item.task for item, _ in rows]
    means = [passed[[name == task for name in names]].mean() for task in SCORED if task in names]
    low, high = share_interval(passed, [item.specification for item, _ in rows], names)
    return {"exact": float(np.mean(means)), "low": low, "high": high, "n": len(rows)}


def share_of(passed: Sequence[bool]) -> dict[str, float | int | None]:
    """The share that passed, with its interval; None if there are none."""
    if not passed:
        return {"exact": None, "low": None, "high": None, "n": 0}
    low, high = wilson(sum(passed), len(passed))
    return {"exact": sum(passed) / len(passed), "low": low, "high": high, "n": len(passed)}


def _product(verdicts: Sequence[Verdict]) -> float | None:
    """The share that would pass if attributes were right or wrong independently of one another.

    The other attributes are counted only where the number of things is right, because a picture
    with the wrong number has no other attribute right.
    """
    if not verdicts:
        return None
    marks = [verdict.marks for verdict in verdicts]
    right = [mark for mark in marks if mark.number]
    product = len(right) / len(marks)
    for place in range(1, len(ATTRIBUTES)):
        stated = [mark[place] for mark in right if mark[place] is not None]
        product *= sum(map(bool, stated)) / len(stated) if stated else 1.0
    return product


def _row(item: Item, verdict: Verdict) -> dict[str, Any]:
    """The record of one prompt, for looking at failures."""
    return {
        "task": item.task,
        "split": item.split,
        "prompt": item.prompt,
        "seed": item.seed,
        "passed": verdict.passed,
        "undetermined": verdict.undetermined,
        "leftover": verdict.leftover,
        "marks": dict(zip(ATTRIBUTES, verdict.marks, strict=True)),
        "seen": [
            {
                "shape": found.thing.shape,
                "colour": found.thing.colour,
                "size": found.thing.size,
                "x": round(found.thing.x, 1),
                "y": round(found.thing.y, 1),
                "radius": round(found.thing.radius, 1),
                "accepted": found.accepted,
            }
            for found in verdict.things
        ],
    }


def table(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (name, exact, 95 % interval, n) for printing, the score first; None is a dash."""
    rows = [("overall", result["overall"])]
    for group in ("tasks", "held_out", "controls", "attributes"):
        title = group.replace("_", " ")
        rows += [(f"{title}: {name}", share) for name, share in result[group].items()]
    rows.append(("undetermined", result["undetermined"]))
    return [_written(name, share) for name, share in rows]


def _written(name: str, share: Mapping[str, Any]) -> tuple[str, str, str, str]:
    if share["exact"] is None:
        return name, "-", "-", "0"
    interval = f"{100 * share['low']:.1f} - {100 * share['high']:.1f} %"
    return name, f"{100 * share['exact']:.1f} %", interval, str(share["n"])
