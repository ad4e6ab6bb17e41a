"""Evaluations of a run: one line each in the run folder, and the checkpoint that was best.

    RUN/evaluation/steps.jsonl      step, images, resolution of the stage, sides of the pictures by
                                    suite, seconds it took, every value
    RUN/evaluation/interim/         the newest result of each suite in full
    RUN/best/                       that checkpoint; hard links, so it takes extra space only once
                                    it is no longer among the newest

Under torchrun every rank evaluates, because they draw together; the first one writes. A failed
write is only reported: the run does not depend on it.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from daybreak.config import Recipe
from daybreak.data import disk
from daybreak.failure import BadRecipe, BadStorage, NoCheckpoint
from daybreak.model.text_to_image import TextToImage
from daybreak.train import checkpoint, runs
from daybreak.train.checkpoint import Checkpoint
from daybreak.train.parallel import World, gather

if TYPE_CHECKING:
    from daybreak.evaluate.artist import Draw, Pictures

FILE = Path("evaluation/steps.jsonl")


class Taken(NamedTuple):
    """The result of an evaluation in words, and whether it is the best so far."""

    note: str
    best: bool


def check(recipe: Recipe, metric: str | None = None) -> None:
    """Refuse a recipe whose evaluations are not possible, or do not include a metric.

    The default `metric` is the one that selects the best checkpoint.

    Errors  BadRecipe and BadData, before anything is written.
    """
    from daybreak.evaluate import interim

    config = recipe.evaluate
    if config is None:
        return
    resolutions = []
    for stage, before in zip(recipe.stage, recipe.starts, strict=True):
        after = before + stage.count
        if after == recipe.steps or before // config.every < after // config.every:
            resolutions.append(stage.resolution)
    interim.check(config, recipe.drawn, resolutions, recipe.dit.patch, metric or config.best)


def due(recipe: Recipe, step: int, last: bool = False) -> bool:
    """Whether the recipe has an evaluation after this step; `last` if a budget ends with it."""
    config = recipe.evaluate
    return config is not None and (step % config.every == 0 or step == recipe.steps or last)


def missing(recipe: Recipe, run: Path, step: int) -> bool:
    """Whether a run that continues from this step was stopped before evaluating it."""
    return due(recipe, step) and all(line["step"] != step for line in lines(run))


def lines(run: Path) -> list[dict[str, Any]]:
    """All evaluations of a run, in order. Errors: BadStorage if they cannot be read."""
    return disk.read_lines(run / FILE)


def cut(run: Path, start: int) -> None:
    """Remove evaluations of steps after `start`, which will be repeated, and unfinished files."""
    for folder in (*run.glob(".tmp-best-*"), *run.glob(".old-best-*")):
        shutil.rmtree(folder, ignore_errors=True)
    disk.cut_lines(run / FILE, start)


def take(
    recipe: Recipe,
    run: Path,
    model: TextToImage,
    step: int,
    here: World,
    heed: Callable[[], object] = lambda: None,
) -> Taken:
    """Evaluate averaged weights after a step, and write down the result.

    The first rank decides whether they are the best: the others may not see its file yet.

    `heed` is called before each batch of pictures; if it raises, the evaluation is broken off.

    Errors  those of the suites.
    """
    from daybreak.evaluate import artist, interim, suite  # SciPy: half a second for most runs

    config = recipe.evaluate
    assert config is not None
    began = time.monotonic()
    scenes, resolution = recipe.drawn, recipe.stage[recipe.stage_at(step)].resolution
    sides = {name: interim.side(config, name, scenes, resolution) for name in config.suites}
    drawn_by = artist.ours(
        model, resolution, recipe.sample, recipe.flow, recipe.tread, taught=recipe.taught
    )
    found = interim.measure(
        config,
        model,
        drawn_by._replace(draw=_heeding(artist.shared(drawn_by.draw, here), heed)),
        scenes,
        recipe.flow.noise_scale,
        recipe.seed,
        run / "evaluation" / "reference",
    )
    values = {
        f"{name}.{key}": suite.as_json(value)
        for name, result in found.items()
        for key, value in result.values.items()
    }
    took = round(time.monotonic() - began, 3)
    line = {"step": step, "images": runs.pictures_seen(recipe, step), "resolution": resolution}
    note, best = _note(step, values, took), False
    if here.first:
        try:
            taken = [*lines(run), line | {"sides": sides, "took": took, "values": values}]
            _write(run, taken)
            for name, result in found.items():
                kept = suite.record(name, drawn_by, result, recipe.seed, {"step": step})
                suite.write(run / "evaluation" / "interim" / f"{name}.json", kept)
            best = config.best is not None and is_best(taken, config.best)
        except (OSError, BadStorage) as error:
            note = f"{note}; it is not written down: {error}"
    return Taken(note, bool(gather(here, torch.tensor([int(best)]))[0]))


def is_best(taken: list[dict[str, Any]], metric: str) -> bool:
    """Whether the last evaluation is better than all earlier ones on pictures of the same size.

    So when a stage is evaluated on pictures of a new size, its first evaluation is the best.
    """
    from daybreak.evaluate import suite

    sign = -1 if suite.lower_is_better(metric) else 1
    rivals = [
        sign * value(line, metric)
        for line in taken
        if side(line, metric) == side(taken[-1], metric)
    ]
    return math.isfinite(rivals[-1]) and not any(other >= rivals[-1] for other in rivals[:-1])


def value(line: Mapping[str, Any], metric: str) -> float:
    """A value of one evaluation, NaN if it was not finite.

    Errors  BadRecipe, naming the metrics there are, for one that this run does not have.
    """
    if metric not in line["values"]:
        raise BadRecipe(f"{metric} was not measured: name one of {', '.join(line['values'])}")
    found = line["values"][metric]["value"]
    return math.nan if found is None else float(found)


def side(line: Mapping[str, Any], metric: str) -> int:
    """The side of the pictures on which a value of one evaluation is based."""
    sides: Mapping[str, int] = line["sides"]
    return sides.get(metric.partition(".")[0], line["resolution"])


def keep(run: Path, step: int) -> None:
    """Make the checkpoint of a step RUN/best. Errors: BadStorage."""
    staged = run / f".tmp-best-{os.getpid()}"
    try:
        shutil.copytree(run / f"checkpoint-{step}", staged, copy_function=link)
        shutil.rmtree(disk.swap(staged, run / "best"), ignore_errors=True)
    except OSError as error:
        raise BadStorage(f"cannot write {run / 'best'}: {disk.reason(error)}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def best(run: Path) -> Checkpoint:
    """Return the best checkpoint of a run.

    Errors  NoCheckpoint if it is not a run, if none was kept, or if the kept one is damaged.
    """
    runs.recorded(run)  # is it a run at all?
    folder = run / "best"
    if not (folder / "trainer.json").is_file():
        raise NoCheckpoint(
            f"{run} holds no best checkpoint: train with --set evaluate.best=METRIC, or leave "
            "--best out"
        )
    wrong = checkpoint.verify(folder)
    if wrong is not None:
        raise NoCheckpoint(f"{folder} is damaged: {wrong}; leave --best out")
    return Checkpoint(folder, int(json.loads((folder / "trainer.json").read_text())["step"]))


def link(source: str, target: str) -> None:
    """Make a hard link to a file, or a copy if the disk has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _heeding(draw: "Draw", heed: Callable[[], object]) -> "Draw":
    """Return `draw` with a call of `heed` before it."""

    def heedful(
        prompts: Sequence[str], seeds: Sequence[int], height: int, width: int
    ) -> "Pictures":
        heed()
        return draw(prompts, seeds, height, width)

    return heedful


def _note(step: int, values: Mapping[str, Mapping[str, float | None]], took: float) -> str:
    """The first value of each suite, which is its headline."""
    heads: dict[str, str] = {}
    for name, numbers in values.items():
        value = numbers["value"]
        shown = "not finite" if value is None else f"{value:.4g}"
        heads.setdefault(name.partition(".")[0], f"{name} {shown}")
    return f"evaluation after step {step}: {', '.join(heads.values())} ({took:.0f} s)"


def _write(run: Path, kept: list[dict[str, Any]]) -> None:
    path = run / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.fresh(path) as staged:
            staged.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    except OSError as error:
        raise BadStorage(f"cannot write {path}: {error.strerror}") from error
