"""What `daybreak compare` runs: recipes, each with the same seeds and the same budget.

    daybreak compare a.toml b.toml                              the first is the baseline
    daybreak compare a.toml --without tread --set dit.width=256     a.toml, and each change alone
    daybreak compare a.toml a.toml                              an A/A test of the comparison itself

Run k of every arm has seed s + k, so arms share initial weights, data and evaluation noise. Two
arms with the same recipe would give the same numbers, so the second gets other seeds; it is still
compared pair by pair.

A budget shortens or lengthens the recipe's stages in proportion (train/length). A budget in
pictures or FLOPs is turned into steps by exact counting. One in seconds is turned into steps by the
speed of each arm, measured once with real steps on this machine and kept beside the runs: a slower
arm sees fewer pictures, and an interruption changes nothing.

Runs are kept under a digest of their recipe and reused; the same command continues where it was
stopped. A finished run is identified by what its steps depend on: under another name or evaluation
it is taken over, and only evaluated again.

Units   costs in the unit of the budget: pictures, FLOP or seconds of one step.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from daybreak import config
from daybreak.config import Recipe
from daybreak.data import disk
from daybreak.evaluate import examples, suite
from daybreak.evaluate.interim import Config as Evaluate
from daybreak.failure import BadRecipe, BadStorage, NotFinite
from daybreak.train import budget, evaluations, flops, length, measure, stand_ins
from daybreak.train.budget import Budget
from daybreak.train.runs import FREE, machine, precision

Unit = Literal["pictures", "flops", "seconds"]
LONGEST = 60  # bytes of an arm's name in that of its folder
OTHER_SEEDS = 1000  # distance between the seeds of arms with the same recipe


class Arm(NamedTuple):
    """A recipe with its budget and evaluation, before seed and folder are set."""

    name: str
    recipe: Recipe
    first_seed: int
    twin: bool  # same recipe as an earlier arm


class Run(NamedTuple):
    """One seed of one arm, as the recipe that will be trained."""

    arm: int
    number: int
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """The folder where the run is, or will be."""
        return Path(self.recipe.out)


def named(
    recipes: Sequence[str], sets: Sequence[str], without: Sequence[str]
) -> list[tuple[str, Recipe]]:
    """Load the recipes, or one recipe and its changes; each is an arm.

    Errors  BadRecipe for a bad recipe, or for changes to several recipes.
    """
    if len(recipes) > 1 and (sets or without):
        raise BadRecipe(
            "--set and --without make arms from one recipe: give one recipe, or several without "
            "these options"
        )
    loaded = [(Path(source).stem, config.load(source)) for source in recipes]
    loaded += [(f"without {name}", config.load(recipes[0], (), (name,))) for name in without]
    loaded += [(change, config.load(recipes[0], (change,))) for change in sets]
    names = [name for name, _ in loaded]
    return [
        (f"{name} {names[:place].count(name) + 1}" if name in names[:place] else name, recipe)
        for place, (name, recipe) in enumerate(loaded)
    ]


def arms(
    loaded: Sequence[tuple[str, Recipe]],
    given: Budget | None,
    evaluation: Evaluate,
    points: int,
    out: Path,
    metric: str | None = None,
) -> list[Arm]:
    """Give every recipe its budget, and the same evaluation `points` times during the run.

    Errors  BadRecipe for a budget in dollars or too small for a step, for recipes that cannot be
            evaluated on the same questions, or a metric that they do not have; BadData for a
            dataset unfit for evaluation. All of them before anything is written.
    """
    for name, recipe in loaded:
        for key, network in stand_ins.named(recipe):
            if Path(network).is_absolute() and not Path(network).is_dir():
                raise BadRecipe(
                    f"{name}: {key} = {network!r} does not exist: give a folder that does"
                )
        if recipe.budget is not None and given is None:
            raise BadRecipe(
                f"{name} has a [budget], which ends a run by the clock and before its last "
                "evaluation: give one budget for all with --budget"
            )
        on_scenes = recipe.drawn is not None
        if not on_scenes and (evaluation.data is None or "scenes" in evaluation.suites):
            raise BadRecipe(
                f"{name} is not trained on scenes: give a --metric of validation or distribution, "
                "and with --data a prepared dataset that no arm trains on"
            )
        if "distribution" in evaluation.suites and not on_scenes and evaluation.features is None:
            raise BadRecipe(
                "a --metric of distribution needs a feature network: give it with --features"
            )
        whole = _with(recipe, out="run", budget=None, evaluate=evaluation.model_dump())
        evaluations.check(whole, metric)
    _ask_alike([(name, questions(recipe, evaluation)) for name, recipe in loaded])
    first = loaded[0][1]
    made: list[Arm] = []
    for name, recipe in loaded:
        plain = _with(recipe, out="run", seed=first.seed, budget=None, evaluate=None)
        fitting = fit(plain, given, pace(plain, given, out)) if given else plain
        every = math.ceil(fitting.steps / points)
        whole = _with(
            fitting,
            evaluate=evaluation.model_copy(update={"every": every}).model_dump(),
            sample=fitting.sample.model_copy(update={"every": fitting.steps}).model_dump(),
        )
        alike = sum(arm.recipe == whole for arm in made)
        made.append(Arm(name, whole, first.seed + alike * OTHER_SEEDS, alike > 0))
    return made


def questions(recipe: Recipe, evaluation: Evaluate) -> dict[str, object]:
    """The settings, by name, with which a recipe influences the questions of its evaluation.

    Errors  BadData, as `examples.of_dataset`.
    """
    scenes = recipe.drawn
    shown = set(evaluation.suites) - {"scenes"}
    found: dict[str, object] = {}
    if scenes is not None and (evaluation.data is None or "scenes" in evaluation.suites):
        found |= {f"scenes.{key}": getattr(scenes, key) for key in ("canvas", "objects")}
        found["scenes.held_out"] = frozenset(scenes.held_out)
        if shown:  # evaluation uses captions as in training
            found["scenes.under_specified"] = scenes.under_specified
    if evaluation.data is not None and shown:
        side, patch = recipe.stage[-1].resolution, recipe.dit.patch
        seen = examples.of_dataset(Path(evaluation.data), side, patch, 0, evaluation.pictures)
        found |= {
            "the last stage's resolution": side,
            "what dit.patch makes of shapes": seen.digest,
        }
    if "validation" in evaluation.suites:
        found["flow.noise_scale"] = recipe.flow.noise_scale
    return found


def _ask_alike(asked: Sequence[tuple[str, dict[str, object]]]) -> None:
    """Refuse recipes that would be evaluated on other questions than the first.

    Errors  BadRecipe.
    """
    (baseline, ours), *others = asked
    for other, theirs in others:
        differ = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        if not differ:
            continue
        remedy = "compare recipes that agree on it"
        if differ[0] == "scenes.under_specified":
            remedy = "take --metric scenes.exact, or one dataset for all with --data"
        raise BadRecipe(
            f"{other} and {baseline} would be evaluated differently, because {differ[0]} differs: "
            + remedy
        )


def runs(arms: Sequence[Arm], seeds: int, out: Path) -> Iterator[Run]:
    """Yield every run: all arms of one seed, then of the next."""
    for number in range(seeds):
        for place, arm in enumerate(arms):
            digest = config.digest(arm.recipe)
            seed = arm.first_seed + number
            folder = out / f"{disk.plain(arm.name, LONGEST)}-{digest[:8]}" / f"seed-{seed}"
            yield Run(place, number, _with(arm.recipe, out=folder.as_posix(), seed=seed))


def reuse(runs: Sequence[Run], out: Path, whole: bool) -> list[Run]:
    """Take over runs that are trained already, and return them.

    A run that had the same evaluation is taken with its evaluations. Any other will be evaluated
    only after its last step, so it cannot be used if the `whole` curve is needed.

    Errors  BadStorage; BadRecipe for a run taken over earlier without the curve now needed.
    """
    taken = []
    for run in runs:
        if (run.folder / "recipe.toml").is_file():
            if whole and _ended(run.folder, run.recipe) == 0 and not _watched(run):
                raise BadRecipe(
                    f"{run.folder} was evaluated after its last step only, and --target needs "
                    "evaluations during training: remove that folder to train it again, or choose "
                    "another --out"
                )
        elif found := _same(run, out, whole):
            _take_over(*found, run)
            taken.append(run)
    return taken


def _same(run: Run, out: Path, whole: bool) -> tuple[Path, bool] | None:
    """The folder of a finished run with the same steps, and whether its evaluation is the same."""
    found = None
    for file in sorted(out.glob(f"*/seed-{run.recipe.seed}/recipe.toml")):
        try:
            before = config.load(file)
        except BadRecipe:  # of another version
            continue
        if _ended(file.parent, before) is None:
            continue
        wanted = run.recipe.model_copy(update={"out": before.out})
        if alike(before, wanted) and (before.evaluate, before.sample) == (
            wanted.evaluate,
            wanted.sample,
        ):
            return file.parent, True
        if not whole and alike(before, wanted.model_copy(update={"evaluate": before.evaluate})):
            found = file.parent, False
    return found


def alike(one: Recipe, other: Recipe) -> bool:
    """Whether the steps of two recipes are the same, and take as long."""
    return all(key.startswith(FREE) for key in config.differences(one, other))


def _ended(folder: Path, recipe: Recipe) -> int | None:
    """The exit code of a run that took all its steps or diverged; None if it may continue."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    whole = status["code"] == 0 and status["step"] == recipe.steps
    return int(status["code"]) if whole or status["code"] == NotFinite.code else None


def _watched(run: Run) -> bool:
    """Whether a run has the evaluations during training that its recipe asks for, if any."""
    recipe, taken = run.recipe, evaluations.lines(run.folder)
    once = recipe.evaluate is None or recipe.evaluate.every >= recipe.steps
    return once or any(line["step"] < recipe.steps for line in taken)


def _take_over(source: Path, asked_the_same: bool, run: Run) -> None:
    """Make the folder of a run from that of another; weights are hard links. Errors: BadStorage."""
    staged = run.folder.with_name(f".tmp-{run.folder.name}")
    ours = () if asked_the_same else ("evaluation", "samples")

    def copy(one: str, other: str) -> None:
        (evaluations.link if one.endswith(".safetensors") else shutil.copy2)(one, other)

    try:
        shutil.rmtree(staged, ignore_errors=True)
        ignored = shutil.ignore_patterns("lock", ".tmp-*", *ours)
        shutil.copytree(source, staged, symlinks=True, ignore=ignored, copy_function=copy)
        (staged / "recipe.toml").write_text(config.dump(run.recipe), encoding="utf-8")
        shutil.rmtree(disk.swap(staged, run.folder), ignore_errors=True)
    except OSError as error:
        raise BadStorage(f"cannot write {run.folder}: {disk.reason(error)}") from error


# Budgets


def pace(recipe: Recipe, given: Budget, out: Path) -> list[float]:
    """The cost of one step of each stage, in the budget's unit. Errors: BadRecipe for dollars."""
    if given.kind == "dollars":
        raise BadRecipe(
            "a budget in dollars depends on a price, and recipes are compared at equal cost: give "
            "--budget in min, flop or images"
        )
    if given.kind == "pictures":
        return [float(stage.batch) for stage in recipe.stage]
    if given.kind == "flops":
        cached = budget.has_words(recipe, precision(recipe))
        return [flops.of_step(recipe, stage, cached) for stage in recipe.stage]
    return _measured(recipe, out / "speeds.json")


def fit(recipe: Recipe, given: Budget, costs: Sequence[float]) -> Recipe:
    """The recipe with as many steps as a budget pays for, stages in proportion.

    What remains after rounding down goes to the last stage, so that what stays unused is less than
    the cost of one of its steps.

    Errors  BadRecipe if not every stage gets a step.
    """
    counts = [stage.count for stage in recipe.stage]
    whole = sum(count * cost for count, cost in zip(counts, costs, strict=True))
    times = given.amount / whole
    steps = [int(times * count) for count in counts]
    spent = sum(count * cost for count, cost in zip(steps, costs, strict=True))
    steps[-1] += int((given.amount - spent) / costs[-1] * (1 + 1e-12))
    if min(steps) < 1:
        raise BadRecipe(
            f"a budget of {given.amount:g} {given.kind} pays for no step of "
            f"stage.{steps.index(min(steps))}: give at least {whole / min(counts):.3g}"
        )
    return length.lasting(recipe, steps, "compare")


def unit(given: Budget | None, target: float | None) -> Unit:
    """The unit of costs: that of the budget; without a budget, seconds if there is a target."""
    if given is not None and given.kind != "dollars":
        return given.kind
    return "pictures" if target is None else "seconds"


def costs(recipe: Recipe, unit: Literal["pictures", "flops"]) -> list[float]:
    """The total cost up to each step, in pictures or FLOPs."""
    total, found, given = 0.0, [], Budget(unit, 1.0)
    for stage, one in zip(recipe.stage, pace(recipe, given, Path()), strict=True):
        for _ in range(stage.count):
            total += one
            found.append(total)
    return found


def _measured(recipe: Recipe, file: Path) -> list[float]:
    """Seconds of a step in each stage, measured once on each machine."""
    shape, here = _with(recipe, seed=0), machine()
    kept = json.loads(file.read_text()).get("speeds", []) if file.is_file() else []
    for one in kept:
        with contextlib.suppress(BadRecipe):  # of another version
            if one["machine"] == here and alike(config.parse(one["recipe"], str(file)), shape):
                return [float(seconds) for seconds in one["seconds"]]
    seconds = [pace.step for pace in measure.steps(recipe, 1)]
    new = {"machine": here, "recipe": shape.model_dump(mode="json"), "seconds": seconds}
    suite.write(file, {"speeds": [*kept, new]})
    return seconds


def _with(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with some values changed, checked as a whole."""
    return config.parse(recipe.model_dump() | changes, "compare")
