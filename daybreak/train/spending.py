"""What steps of a run cost, and what its budget still allows; the same on all ranks.

The first rank keeps account (train/ledger); the loop asks here before each step, and before each
task between steps. Without a budget everything is allowed, and the cost of steps is only logged.

Units   FLOPs of all devices together; dollars an hour of all of them.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from daybreak import config
from daybreak.failure import BadRecipe
from daybreak.train import flops, hardware, parallel
from daybreak.train.ledger import Ledger
from daybreak.train.parallel import World
from daybreak.train.step import Run

FORECAST = 10  # steps after which a run warns if its budget will not reach the last stage


def of_steps(recipe: config.Recipe, cached: bool, here: World) -> list[float]:
    """FLOPs of a step of each stage. Errors: BadRecipe if a budget in FLOPs cannot be kept."""
    try:
        return [flops.of_step(recipe, stage, cached, here.replicas) for stage in recipe.stage]
    except BadRecipe:
        if recipe.budget and recipe.budget.flops:
            raise
        return [0.0] * len(recipe.stage)


def of_words(recipe: config.Recipe, cached: bool, here: World) -> Callable[[int, int], float]:
    """Return a function: FLOPs of a step, by stage and words of its captions; 0 if unknown."""

    @cache
    def worked(number: int, words: int) -> float:
        return of_steps(flops.as_read(recipe, words), cached, here)[number]

    return worked


def rates(recipe: config.Recipe, here: World, dtype: torch.dtype) -> tuple[float, float | None]:
    """Peak FLOP/s of all devices, and their dollars an hour, or None if not known."""
    device = hardware.here(dtype).device
    return device.flops * here.size, _rate(recipe, here, device.price)


class Allowance(NamedTuple):
    """What a budget still allows: `factor` multiplies the learning rate of the next step.

    `over`: no further step fits; `late`: that is for lack of time.
    """

    factor: float = 1.0
    over: bool = False
    late: bool = False


def allowed(run: Run, done: int, first: float = 0.0) -> Allowance:
    """Return what the budget allows after `done` steps, if something first takes `first` seconds.

    The first rank's clock decides for all, because learning rates must be equal on all ranks.
    """
    if run.recipe.budget is None:
        return Allowance()
    late = run.ledger.late(first)
    over = late or (run.ledger.full and done < run.recipe.steps)
    mine = torch.tensor([run.ledger.factor, over, late], dtype=torch.float64)
    factor, over, late = parallel.gather(run.here, mine)[0].tolist()
    return Allowance(factor, bool(over), bool(late))


def spent(recipe: config.Recipe, folder: Path, here: World, clock: Callable[[], float]) -> bool:
    """Whether the budget of a run to be continued is spent, by the first rank's clock."""
    file, rate = folder / "run.json", _rate(recipe, here)
    return parallel.together(here, lambda: Ledger(file, recipe.budget, clock, rate=rate).over)[0]


def forecast(run: Run, done: int) -> None:
    """Warn if at this speed the budget ends before the last stage begins."""
    left, usual = run.ledger.left, run.ledger.usual
    if not math.isfinite(left) or not usual:
        return
    ahead = end(run.recipe, run.flops, done, left / usual)
    if missed := unreached(run.recipe, ahead):
        run.log.note(
            f"at this pace the budget pays for about {ahead:,} of {run.recipe.steps:,} "
            f"steps{missed}"
        )


def end(recipe: config.Recipe, flops: Sequence[float], done: int, left: float) -> int:
    """Return the step at which a budget ends that pays for `left` more steps of this stage."""
    each, ahead = flops[recipe.stage_at(done)] or 1.0, done
    while ahead < recipe.steps and left > 0:
        ahead += 1
        left -= (flops[recipe.stage_at(ahead)] or 1.0) / each
    return ahead


def unreached(recipe: config.Recipe, step: int) -> str:
    """Say which stages a run that ends at this step does not reach, if any."""
    last, reached = len(recipe.stage) - 1, recipe.stage_at(step)
    if reached == last:
        return ""
    many = f"stages {reached + 1} to {last} are" if reached + 1 < last else f"stage {last} is"
    return (
        f"; {many} not reached: `daybreak plan` with the same recipe and budget says how to fit "
        "every stage"
    )


def _rate(recipe: config.Recipe, here: World, usual: float | None = None) -> float | None:
    """Dollars an hour for all devices, by the recipe's price or else the `usual` one."""
    price = recipe.budget.price if recipe.budget and recipe.budget.price else usual
    return price * here.size if price else None
