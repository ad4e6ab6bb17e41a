"""How often a model draws exactly what it was asked to, task by task.

The questions are those of `evaluate/scenes_questions`. The score is the mean of the six tasks'
shares; tasks a recipe cannot draw are left out and say so with n = 0. Beside it stand what makes it
believable: the same pictures under shuffled prompts (chance), renders of true scenes (what the
checker lets through at best), single virtues ("attributes"), combinations that training never
showed ("held_out") and how far they fall behind the same tasks with seen ones ("gaps"), what
independent attributes would predict ("product": a score well below means right things bound
wrongly), what was taken for what ("confusion") and how cleanly things are drawn ("fidelity"). More
controls, which draw pictures of their own: `evaluate/scenes_controls`.

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
BATCH = 60  # pictures per call of the generator


class Seen(NamedTuple):
    """What the checker found in a picture, and how near that is to the picture, in decibels."""

    detection: Detection
    psnr: float


class Score(NamedTuple):
    """A picture's verdict on its own prompt, on another's, and that of a true render."""

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

    `progress` hears how many pictures of how many are drawn. Checking runs in `workers` processes
    (1 stays in this process) while the next pictures are drawn.

    Shares stand as {exact, low, high, n} with 95 % intervals: `overall`, `tasks.NAME`,
    `held_out.SPLIT`, `attributes.NAME`, `controls.shuffled`, `controls.ground_truth`. Where n is 0
    the others are None. `gaps.SPLIT` are differences of shares in the same form. `confusion` and
    `fidelity` have one table for the model and one for true renders. `items` lists every prompt
    with its verdict.

    Errors  ValueError if the generator returns other pictures than it was asked for.
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


# What came back


def _pool(workers: int) -> Executor:
    """Processes, or one thread of this one. Spawned: a fork would copy a running torch."""
    if workers <= 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _check(pictures: Pictures, number: int, canvas: str) -> None:
    """Make sure that all pictures came back that were asked for, as bytes. Errors: ValueError."""
    size = CANVASES[canvas].size
    if pictures.dtype != np.uint8 or pictures.shape != (number, size, size, 3):
        raise ValueError(
            f"asked for {number} pictures, uint8 ({number}, {size}, {size}, 3); the generator "
            f"returned {pictures.dtype} {pictures.shape}"
        )


def look(pictures: Pictures, canvas: str) -> list[Seen]:
    """Take pictures apart."""
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
    """Verdicts in the order of the items."""
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
    """For each scored item the specification of another one of its task, by chance."""
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
    """How much better the same tasks go with combinations that training showed."""
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
    """What was taken for what, and how cleanly it was drawn: by the model, and in true renders."""
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
    """How many of them passed, as a share with its interval; None where there are none."""
    if not passed:
        return {"exact": None, "low": None, "high": None, "n": 0}
    low, high = wilson(sum(passed), len(passed))
    return {"exact": sum(passed) / len(passed), "low": low, "high": high, "n": len(passed)}


def _product(verdicts: Sequence[Verdict]) -> float | None:
    """The share that would pass if each attribute went right or wrong on its own.

    The number of things comes first; the others are counted where it is right, because a picture
    with the wrong number has no other attribute right either.
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
    """What somebody who looks at failures wants to read."""
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
    """(name, exact, 95 % interval, n) for people, the score first; None is a dash."""
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
