"""GenEval, which is run separately: write pictures in its layout, and read back its results.

    FOLDER/00000/metadata.jsonl         line 0 of its evaluation_metadata.jsonl
    FOLDER/00000/samples/0000.png       and 0001 to 0003

    python evaluation/evaluate_images.py FOLDER --outfile results.jsonl     in its own environment

Its detector needs libraries that conflict with others, so it is not imported. The score is the mean
of the six tasks' shares, as in GenEval's own summary; intervals treat the pictures of one prompt as
a cluster, because they are not independent.

A score of zero in every task usually means that the detector's weights and configuration do not
match: then it also rejects pictures that are known to be good.

Source  arXiv 2310.11513; djghosh13/geneval, evaluation/summary_scores.py.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from daybreak.evaluate.artist import Artist, square
from daybreak.evaluate.distances import Estimate
from daybreak.evaluate.prompts import Prompts
from daybreak.evaluate.statistics import share_interval
from daybreak.evaluate.suite import Progress, Result
from daybreak.failure import BadData, BadRecipe, BadStorage
from daybreak.generate import grid

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
EACH = 4  # pictures for each prompt


def write(
    artist: Artist,
    asked: Prompts,
    folder: Path,
    each: int = EACH,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Draw every prompt and write the pictures in GenEval's layout; the result has no score yet.

    Errors  BadData for a line without a tag; BadRecipe if the folder already has pictures;
            BadStorage if the folder cannot be written.
    """
    for number, row in enumerate(asked.rows, start=1):
        if not isinstance(row, dict) or row.get("tag") not in TASKS:
            raise BadData(
                f"line {number} of the prompts has no tag of GenEval ({', '.join(TASKS)}): give "
                "its evaluation_metadata.jsonl"
            )
    if any(folder.glob("[0-9]" * 5)):
        raise BadRecipe(
            f"{folder} holds pictures of an earlier call, which GenEval would count too: remove "
            "them or choose another folder with --out"
        )
    draw = square(artist)
    try:
        for number, row in enumerate(asked.rows):
            first = seed + number * each
            pictures = draw([row["prompt"]] * each, list(range(first, first + each)))
            place = folder / f"{number:05}"
            (place / "samples").mkdir(parents=True)
            (place / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
            for turn, picture in enumerate(pictures):
                facts = {"prompt": row["prompt"], "seed": str(first + turn)}
                facts |= {"weights": artist.digest[:16]}
                grid.save(Image.fromarray(picture), place / "samples" / f"{turn:04}.png", facts)
            if progress is not None:
                progress((number + 1) * each, len(asked.rows) * each)
    except OSError as error:
        raise BadStorage(f"cannot write {folder}: {error.strerror}") from error
    judge = f"python evaluation/evaluate_images.py {folder} --outfile results.jsonl"
    remark = f"let GenEval judge them ({judge}), then give --results results.jsonl"
    details = {"prompts": asked.digest, "each": each, "folder": str(folder)}
    return Result({}, len(asked.rows) * each, details, [remark])


def read(results: Path) -> Result:
    """Read the score from GenEval's results file.

    Errors  BadData if the file is not one of GenEval's, or if a task is missing.
    """
    rows = _rows(results)
    passed = np.array([bool(row["correct"]) for row in rows], dtype=np.float64)
    tags, prompts = [row["tag"] for row in rows], [row["prompt"] for row in rows]
    missing = [task for task in TASKS if task not in tags]
    if missing:
        raise BadData(
            f"{results} has no pictures of {', '.join(missing)}: the score is the mean of all six "
            "tasks, so let GenEval judge all of its prompts"
        )
    shares = {task: _share(passed, tags, prompts, (task,)) for task in TASKS}
    values = {"score": _share(passed, tags, prompts, TASKS), **shares}
    remarks = []
    if not passed.any():
        remarks.append(
            "every picture failed: known-good pictures must reach their known score first, because "
            "a detector with the wrong weights or configuration fails everything without an error"
        )
    sizes = {prompts.count(prompt) for prompt in set(prompts)}
    if len(sizes) > 1:
        remarks.append(f"prompts have {min(sizes)} to {max(sizes)} pictures each, not equally many")
    return Result(values, len(rows), {"results": str(results)}, remarks)


def _rows(results: Path) -> list[Mapping[str, Any]]:
    try:
        lines = results.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        wrong = next(
            (i for i, row in enumerate(rows, 1) if not {"tag", "prompt", "correct"} <= row.keys()),
            None,
        )
    except OSError as error:
        raise BadData(f"cannot read GenEval's results {results}: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise BadData(f"{results} is not the JSON lines that GenEval writes ({error})") from error
    if wrong is not None:
        raise BadData(f"{results}, line {wrong} lacks tag, prompt or correct: is it GenEval's?")
    return rows


def _share(
    passed: np.ndarray[Any, np.dtype[np.float64]],
    tags: Sequence[str],
    prompts: Sequence[str],
    tasks: Sequence[str],
) -> Estimate:
    """The mean of the tasks' shares; the pictures of one prompt are a cluster."""
    rows = [i for i, tag in enumerate(tags) if tag in tasks]
    names = [tags[i] for i in rows]
    means = [passed[[i for i in rows if tags[i] == task]].mean() for task in tasks]
    low, high = share_interval(passed[rows], [prompts[i] for i in rows], names)
    return Estimate(float(np.mean(means)), low, high)
