"""One step of a run: forward, backward, the guard's verdict, optimisers, average, a log line.

    for each micro-batch    loss(model, image, words, dice)  and its gradient
    over all ranks          loss, norm and "asked to stop" of each, in one exchange
    if the guard allows it  theta <- Muon or AdamW
    always                  average <- average + (1 - decay) (theta - average)

All of this is queued on the device before the host reads any number. The host waits once a step,
for the exchanged numbers, while the device still has the optimisers to run.

`Run` holds what the steps of a run have in common; train/loop creates it and takes the steps.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from daybreak import config
from daybreak.data import batches
from daybreak.model.text_to_image import TextToImage
from daybreak.objective.objective import Objective
from daybreak.optim import groups
from daybreak.optim.ema import Ema
from daybreak.train import accelerator, checkpoint, health, parallel
from daybreak.train.checkpoint import State
from daybreak.train.dice import Dice
from daybreak.train.ledger import Ledger
from daybreak.train.log import Log, say
from daybreak.train.parallel import World
from daybreak.train.saving import Saver
from daybreak.train.status import Status
from daybreak.train.stop import BrokenOff, Stop
from daybreak.train.watchdog import Watchdog

SAVE = 600.0  # seconds that a checkpoint may take


class Run(NamedTuple):
    """A run under way: what its steps have in common."""

    recipe: config.Recipe
    folder: Path
    here: World
    sources: Sequence[batches.Pictures]  # by stage
    objective: Objective
    state: State
    trained: list[nn.Parameter]
    ema: Ema[TextToImage]
    guard: health.Guard
    pace: health.Pace
    ledger: Ledger
    flops: list[float]  # of a step with the longest captions, by stage; 0 if unknown
    worked: Callable[[int, int], float]  # FLOPs of a step, by stage and words
    expect: Callable[[list[str]], object]  # is told which captions come next
    saver: Saver
    status: Status
    stop: Stop
    log: Log
    watchdog: Watchdog
    trial: bool


def networks(model: TextToImage, objective: Objective) -> list[nn.Module]:
    """Return the modules that learn, in the units in which train/parallel prepares them."""
    words = [model.text] if model.text.trained else []
    return [model.dit, *words, *objective.learned.children()]


def take(run: Run, number: int, batch: batches.Batch, step: int, rate: float) -> int:
    """Take one step, or skip it; returns the exit code if a rank was asked to stop, else 0.

    Errors  BrokenOff if the run was asked to stop while this step was being compiled.
    """
    began, here, stage = time.monotonic(), run.here, run.recipe.stage[number]
    run.watchdog.begin(*batch.image.shape[-2:])
    try:
        sums = _gradient(run, stage, batch, step)
    except Exception as error:
        # Ctrl-C also reaches the compiler's processes, which makes the compilation fail.
        compiling = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if compiling and run.stop.code and here.mesh is None:
            raise BrokenOff from error
        raise
    norm = parallel.clip(here, run.trained, run.recipe.clip)
    counts = [norm.new_full((), count) for count in (batch.substituted, run.stop.code)]  # no copy
    parts = [sums[name] for name in sums if name != "loss"]
    table = parallel.gather(here, torch.stack([sums["loss"], norm, *parts, *counts]))
    arrived = accelerator.fetch(table)
    groups.set_rate(run.state.optimizers, rate)
    groups.step(run.state.optimizers, run.guard.refuses(table[:, :2]))
    run.ema.update(run.state.model, step)  # even if the weights have not moved
    for optimizer, _ in run.state.optimizers.values():
        optimizer.zero_grad()

    table = arrived()
    first = batch.first - parallel.share(here, stage.batch)[0]
    verdict = run.guard.judge(step, table[:, :2], range(first, first + stage.batch))
    if verdict.back:
        _return(run, step)

    means = table.mean(0).tolist()
    values = {"loss": means[0]}
    values |= dict(zip((name for name in sums if name != "loss"), means[2:-2], strict=True))
    values |= {"norm": means[1], "lr": rate, "waited": run.pace.last}
    values["worked"] = time.monotonic() - began
    if substituted := int(table[:, -2].sum()):
        values["substituted"] = substituted
    if not verdict.step:
        values["skipped"] = 1
    for complaint in batch.complaints:
        note(run, complaint)
    run.log.step(
        step,
        values,
        stage.batch,
        run.worked(number, round(values["words"])),
        run.ledger.paid,
        to_go(run.recipe, run.flops, step),
        run.ledger.left,
    )
    return int(table[:, -1].max())


def _gradient(
    run: Run, stage: config.Stage, batch: batches.Batch, step: int
) -> dict[str, Float[Tensor, ""]]:
    """Accumulate the gradient of this rank's share of a batch; returns the loss and its parts."""
    recipe, count = run.recipe, len(batch.image)
    size, resting = recipe.micro or count, recipe.resting(stage, step)
    learning = networks(run.state.model, run.objective)
    sums: dict[str, Tensor] = {}
    for first in range(0, count, size):
        image = batch.image[first : first + size]
        captions = batch.captions[first : first + size]
        dice = Dice(recipe.seed, step, batch.first + first, len(image), image.device)
        parallel.accumulate(learning, recipe.parallel, first + size >= count)
        loss, parts = run.objective(
            run.state.model, run.state.average, image, captions, dice, resting, stage.shift
        )
        (loss * (len(image) / count)).backward()
        for name, part in {"loss": loss.detach(), **parts}.items():
            sums[name] = sums.get(name, 0.0) + part * (len(image) / count)
    return sums


def to_go(recipe: config.Recipe, flops: Sequence[float], step: int) -> float:
    """Return how much work is left after a step, in units of a step of its stage."""
    each, left = flops[recipe.stage_at(step)], 0.0
    for stage, before, one in zip(recipe.stage, recipe.starts, flops, strict=True):
        steps = min(stage.count, max(0, before + stage.count - step))
        left += steps * (one / each if each else 1.0)
    return left


def _return(run: Run, step: int) -> None:
    """Return to the weights of the newest checkpoint.

    Only checkpoints at multiples of `save_every` count, because every run of the recipe has them. A
    run that was stopped has others too, but must take the same steps as one that was not.
    """
    recipe = run.recipe
    with run.watchdog.patience(SAVE):
        run.saver.settle()
        every = recipe.save_every
        found = checkpoint.to_continue(run.folder, run.here, run.log.note, every)
        if found is None:
            run.log.note("there is no checkpoint to return to yet")
            return
        checkpoint.load(found, run.state, alone=run.here.mesh is None)
        run.guard.return_to(found.facts["guard"])
        if recipe.stage_at(found.step) != recipe.stage_at(step):
            run.guard.new_stage()
    run.log.note(f"returned to the weights of step {found.step}")


def compare(run: Run) -> None:
    """Check that the ranks hold equal weights, and name slow ranks. Errors: LostPeer."""
    state = run.state
    learned = dict(run.objective.learned.named_parameters())
    held = {"model": state.model.weights(), "average": state.average.weights()}
    health.compare(run.here, checkpoint.flat({**held, "objective": learned}))
    for line in run.pace.laggards(run.here):
        run.log.note(line)


def note(run: Run, line: str) -> None:
    """Report something that only this rank has seen; an empty line is ignored."""
    if not line:
        return
    if run.here.first:
        run.log.note(line)
    else:
        say(f"rank {run.here.rank}: {line}")
