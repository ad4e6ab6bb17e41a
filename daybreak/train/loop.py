"""The training loop.

For each stage and step: a batch, the loss of its micro-batches, clipped gradients, the guard's
verdict, Muon and AdamW, the average. Steps are numbered from 1 over the whole run. Checkpoints,
grids and log lines happen between steps and do not change what the next step computes. Only a
[budget] in seconds or dollars depends on the clock: it lowers the learning rate as time runs out
(train/ledger), so such a run cannot be repeated bit for bit.

Under torchrun every rank runs this loop with its share of each batch. What the ranks must agree on
is exchanged together with the loss, once a step; the first rank prints and writes for all.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from daybreak import config
from daybreak.data import batches, disk, loader
from daybreak.failure import BadStorage
from daybreak.model.text_to_image import TextToImage
from daybreak.optim import groups
from daybreak.train import (
    building,
    checkpoint,
    encoded,
    evaluations,
    grids,
    health,
    ledger,
    parallel,
    runs,
    spending,
)
from daybreak.train.checkpoint import Checkpoint
from daybreak.train.ledger import Ledger
from daybreak.train.log import Log, say
from daybreak.train.parallel import World
from daybreak.train.saving import Saver
from daybreak.train.spending import Allowance
from daybreak.train.status import Status
from daybreak.train.step import SAVE, Run, compare, note, take
from daybreak.train.stop import PREEMPTED, BrokenOff, Stop
from daybreak.train.trace import Trace, traced
from daybreak.train.watchdog import Watchdog

LOOK = 3600.0  # seconds that an evaluation may take


class Outcome(NamedTuple):
    """How training ended: the last finished step, and the exit code."""

    step: int
    code: int


class Entered(NamedTuple):
    """A run whose data and ranks have been found, before any network is built."""

    recipe: config.Recipe
    folder: Path
    sources: Sequence[batches.Pictures]  # by stage
    here: World
    found: Checkpoint | None  # to continue from
    changes: Sequence[str]  # to the recipe or data since the run began
    tell: Callable[[str], None]

    @property
    def start(self) -> int:
        """The last step that is done."""
        return self.found.step if self.found else 0


def train(
    recipe: config.Recipe,
    tell: Callable[[str], None] = say,
    changed: bool = False,
    gone: float = 0.0,
    trial: bool = False,
    trace: Trace | None = None,
) -> Outcome:
    """Train a recipe in its run folder, from the newest good checkpoint there or from the start.

    `changed` allows a run to continue with a recipe or data other than those it began with. `gone`
    is how many seconds of a time budget were already spent on starting this process. A `trial`
    saves no checkpoint. `trace` says which steps to trace.

    Errors  BadRecipe, BadData and BadStorage before anything is written; NotFinite, BadStorage and
            LostPeer during the run, whose checkpoints stay.
    """
    began, clock = time.monotonic(), ledger.stopwatch(gone)
    folder = runs.enter(recipe)
    sources = building.sources(recipe)
    evaluations.check(recipe)
    changes = runs.changes(folder, recipe, batches.files(sources), changed)
    sizes = [stage.batch for stage in recipe.stage]
    with (
        Status(folder, tell) as status,
        parallel.world(recipe.parallel, sizes) as here,
        Stop() as stop,
        building.room(recipe),
    ):
        begun = here.first and folder.is_dir()
        parallel.together(here, lambda: status.take() if begun else None)
        runs.check_pairs(recipe, here.size)
        tell = tell if here.first else _silent
        found = checkpoint.to_continue(folder, here, tell)
        if found and (why := _is_over(found, recipe, folder, here, clock)):
            tell(f"{folder} {why}")
            return Outcome(found.step, 0)
        for change in changes:
            tell(f"continues with a change: {change}")
        entered = Entered(recipe, folder, sources, here, found, changes, tell)
        return _train(entered, status, stop, began, clock, trial, trace)


def _train(
    entered: Entered,
    status: Status,
    stop: Stop,
    began: float,
    clock: Callable[[], float],
    trial: bool,
    trace: Trace | None,
) -> Outcome:
    """Build everything, load the checkpoint if there is one, and take the remaining steps."""
    recipe, folder, sources, here, found, _, tell = entered
    dtype, start = runs.precision(recipe), entered.start
    known = encoded.known(recipe, dtype, tell)
    objective, state, ema = building.build(
        recipe, sources, here, found, dtype, known.tokens if known else None, tell
    )
    model, counted = state.model, spending.of_steps(recipe, known is not None, here)
    size = checkpoint.size(model)
    if not trial:
        runs.check_space(folder, size, recipe.keep)
    if found:
        checkpoint.load(found, state, alone=here.mesh is None)
    peak, price = spending.rates(recipe, here, dtype)
    book = partial(Ledger, folder / "run.json", recipe.budget, clock, here.first, price, size)
    if not found:
        parallel.together(here, lambda: book().check(counted[0]) if here.first else None)
    parallel.together(here, lambda: _open(entered, dtype))
    status.begin(here.first, start, start or None)
    _announce(entered, model, dtype)
    with (
        Log(
            folder if here.first else None,
            recipe.steps,
            start,
            peak=peak,
            price=price,
            held=torch.cuda.max_memory_allocated if here.device.type == "cuda" else None,
        ) as log,
        Saver(recipe, folder, here, model, log.note, start or None) as saver,
        Watchdog(
            here, recipe.health.step_timeout, status.fail, recipe.compile, log.note
        ) as watchdog,
    ):
        incidents = folder / "incidents.jsonl" if here.first else None
        guard = health.Guard(recipe.health, incidents, start, log.note)
        if found:
            guard.restore(found.facts["guard"])
        run = Run(
            recipe=recipe,
            folder=folder,
            here=here,
            sources=sources,
            objective=objective,
            state=state,
            trained=[*model.parameters(), *objective.learned.parameters()],
            ema=ema,
            guard=guard,
            pace=health.Pace(here.device),
            ledger=book(),
            flops=counted,
            worked=spending.of_words(recipe, known is not None, here),
            expect=known.expect if known else _silent,
            saver=saver,
            status=status,
            stop=stop,
            log=log,
            watchdog=watchdog,
            trial=trial,
        )
        outcome = _steps(run, start, began, trace)
    if not outcome.code and start < outcome.step == recipe.steps:
        tell(
            f"trained steps {start + 1:,} to {outcome.step:,} in {time.monotonic() - began:.0f} s: "
            f"{folder / 'latest'}"
        )
    return outcome


def _announce(entered: Entered, model: TextToImage, dtype: torch.dtype) -> None:
    """Print what is about to be trained, where, from which start, and what may be unexpected."""
    recipe, folder, _, here, found, _, tell = entered
    start, threads = entered.start, torch.get_num_threads()
    shared = f" on each of {here.size} processes" if here.size > 1 else ""
    for number, stage in enumerate(recipe.stage):
        if stage.warmup >= stage.count:
            tell(
                f"stage.{number}.warmup = {stage.warmup}, and the stage has {stage.count} steps: "
                f"its learning rate never reaches stage.{number}.lr"
            )
    tell(
        f"{runs.millions(model):.1f} M weights, "
        f"{str(dtype).removeprefix('torch.')} on {here.device.type} with "
        f"{threads} thread{'s' * (threads > 1)}{shared}, "
        f"{'from step ' + str(start) if start else 'from random weights'}; run folder {folder}"
    )
    if here.size == 1 and here.device.type == "cuda" and torch.cuda.device_count() > 1:
        tell(
            f"only one of the {torch.cuda.device_count()} GPUs of this machine is used: torchrun "
            "--standalone --nproc-per-node gpu -m daybreak train ... uses all"
        )
    if found and (before := found.ranks) != here.size:
        tell(
            f"checkpoint-{start} was saved by {before} processes and continues with {here.size}: "
            "same batches, but results agree to rounding and not bit for bit"
        )


def _open(entered: Entered, dtype: torch.dtype) -> None:
    """Create the run folder, or remove what a killed run has left in it."""
    recipe, folder, changes = entered.recipe, entered.folder, entered.changes
    if not entered.here.first:
        return
    if changes or not all((folder / name).is_file() for name in ("recipe.toml", "run.json")):
        runs.begin(folder, recipe, dtype, batches.files(entered.sources), changes)
    disk.sweep(folder)
    checkpoint.clear_unfinished(folder)
    evaluations.cut(folder, entered.start)


def _steps(run: Run, start: int, began: float, trace: Trace | None) -> Outcome:
    """Take the remaining steps, with the grids, evaluations and checkpoints between them."""
    recipe, here, log, stop = run.recipe, run.here, run.log, run.stop
    if start and _unevaluated(recipe, run.folder, here, start) and _evaluate(run, start):
        _keep(run, start)
    run.ledger.each = run.flops[recipe.stage_at(start + 1)]
    run.ledger.write()
    done, may = start, spending.allowed(run, start)
    if code := _heard(here, stop.code):
        return _leave(run, done, code, "stopped before the first step")
    if may.over and start < recipe.steps:
        return _spent(run, start)
    steps = _batches(run, start)
    if trace and here.first:
        steps = traced(steps, trace, run.folder, start, log.note)
    for number, now, batch in steps:
        stage, done = recipe.stage[number], done + 1
        if now == 1:
            run.guard.new_stage()
            if number and stage.resolution != recipe.stage[number - 1].resolution:
                torch.compiler.reset()  # the new stage's variants replace the old ones
                run.watchdog.listen()
        rate = stage.lr * groups.schedule(now, stage.count, stage.warmup, stage.cooldown)
        try:
            code = take(run, number, batch, done, rate * may.factor)
        except BrokenOff:
            if done > start + 1:
                _save(run, done - 1, wait=True)
            return _leave(run, done - 1, stop.code, f"stopped before step {done} had compiled")
        ahead = recipe.stage_at(done + 1)
        run.ledger.step(
            run.flops[number],
            run.flops[ahead],
            new=now == 1 or done == start + 1,
            compiles=recipe.stage[ahead].resolution != stage.resolution,
        )
        may = spending.allowed(run, done)
        run.watchdog.beat(done)
        if done == start + 1:
            log.note(f"first step after {time.monotonic() - began:.0f} s")
        if done == start + spending.FORECAST:
            spending.forecast(run, done)
        last = done == recipe.steps or may.over
        if done % recipe.health.check_every == 0:
            compare(run)
        best = False
        if (done % recipe.sample.every == 0 or last) and not code and not may.late:
            _show(run, done, stage.resolution)
            code, may = _listen(run, done, code)
        if evaluations.due(recipe, done, last) and not code and not may.late:
            best = _evaluate(run, done)
            code, may = _listen(run, done, code)
        last = last or may.over
        if done % recipe.save_every == 0 or last or code or best:
            _save(run, done, wait=bool(last or code or best))
            may = spending.allowed(run, done)
        if may.over:
            run.saver.finish()  # too late for another save: wait for the one under way
        if best:
            _keep(run, done)
        run.status.at(done, run.saver.newest)
        if code:
            return _leave(run, done, code, f"stopped and saved at step {done}")
        if may.over:
            return _spent(run, done)
    run.status.end(0, "all steps are done")
    return Outcome(done, 0)


def _batches(run: Run, start: int) -> Iterator[tuple[int, int, batches.Batch]]:
    """Yield the remaining batches: number of the stage, step within it, this rank's share."""
    recipe = run.recipe
    for number, (stage, before) in enumerate(zip(recipe.stage, recipe.starts, strict=True)):
        had = min(stage.count, max(0, start - before))
        if had < stage.count:
            stream = loader.stream(
                run.sources[number],
                recipe.data,
                recipe.seed,
                stage.resolution,
                stage.batch,
                first=runs.pictures_seen(recipe, before),
                count=stage.count - had,
                done=had,
                device=run.here.device,
                rank=run.here.rank,
                world=run.here.size,
                late=lambda waited: note(run, run.pace.late(waited)),
                expect=run.expect,
            )
            for now, batch in enumerate(run.pace.timed(stream), start=had + 1):
                yield number, now, batch


def _save(run: Run, step: int, wait: bool) -> None:
    """Check that the ranks hold equal weights, then save; `wait` until it is on the disk."""
    if run.trial:
        return
    began = time.monotonic()
    with run.watchdog.patience(SAVE):
        compare(run)
        run.saver.save(step, run.state, run.guard.state)
        if wait:
            run.saver.finish()
    run.ledger.saved(max(time.monotonic() - began, run.saver.took))  # a run waits for its last save
    run.ledger.write()


def _show(run: Run, step: int, side: int) -> None:
    """Draw the recipe's prompts on all ranks; the first writes the grid, if the disk allows."""
    if spending.allowed(run, step, first=run.ledger.drawing).late:
        run.log.note(f"no grid at step {step}: the budget leaves no time for one")
        return
    began = time.monotonic()
    with run.watchdog.patience(LOOK):
        pictures = grids.draw(run.ema.model, run.recipe, side)
    run.ledger.drew(time.monotonic() - began)
    if not run.here.first:
        return
    try:
        place = grids.write(run.folder, pictures, run.recipe, step)
    except (OSError, BadStorage) as error:
        run.log.note(f"the grid of step {step} could not be written: {error}")
    else:
        run.log.note(f"grid: {place}")


def _evaluate(run: Run, step: int) -> bool:
    """Evaluate the average; returns whether this is the best evaluation so far.

    It is broken off if the run is asked to stop or runs out of time, and repeated on resuming.
    """

    def heed() -> None:
        run.ledger.tick()
        late = run.here.first and run.ledger.late()  # the first rank's clock also decides on steps
        if _heard(run.here, run.stop.code or int(late)):
            raise BrokenOff

    try:
        with run.watchdog.patience(LOOK):
            heed()
            note, best = evaluations.take(
                run.recipe, run.folder, run.ema.model, step, run.here, heed
            )
    except BrokenOff:
        return False
    run.ledger.drew(0.0)
    run.log.note(note)
    return best


def _keep(run: Run, step: int) -> None:
    """Mark a checkpoint as the best one, if it is on the disk."""
    if run.here.first and run.saver.newest == step:
        try:
            evaluations.keep(run.folder, step)
        except BadStorage as failure:
            run.log.note(str(failure))


def _leave(run: Run, step: int, code: int, what: str) -> Outcome:
    """Report that a run was asked to stop."""
    run.log.note(f"{what}; the same command continues")
    run.ledger.end()
    run.status.end(code, "preempted" if code == PREEMPTED else "interrupted")
    return Outcome(step, code)


def _spent(run: Run, step: int) -> Outcome:
    """Report that the budget pays for no further step."""
    run.log.note(
        f"the budget is spent: {run.ledger.spent:.0f} s, {run.ledger.flops:.3g} FLOP, {step:,} of "
        f"{run.recipe.steps:,} steps{spending.unreached(run.recipe, step)}"
    )
    run.ledger.end()
    run.status.end(0, "the budget is spent")
    return Outcome(step, 0)


def _heard(here: World, code: int) -> int:
    """Return the exit code if any rank was asked to stop, else 0; the same on all ranks."""
    return int(parallel.gather(here, torch.tensor([code])).max())


def _listen(run: Run, done: int, code: int) -> tuple[int, Allowance]:
    """After a long task, check again whether a rank was asked to stop and what may be spent."""
    return max(code, _heard(run.here, run.stop.code)), spending.allowed(run, done)


def _is_over(
    found: Checkpoint,
    recipe: config.Recipe,
    folder: Path,
    here: World,
    clock: Callable[[], float],
) -> str:
    """Say why there is nothing left to do; empty if there is something."""
    done = f"{found.step} steps of {recipe.steps}"
    if found.step >= recipe.steps:
        if _unevaluated(recipe, folder, here, found.step):
            return ""
        more = f"more steps with --set stage.{len(recipe.stage) - 1}.steps=... --changed"
        return f"is finished: {done}; to continue, give it {more}"
    if spending.spent(recipe, folder, here, clock):
        return f"has spent its budget: {done}; to continue, give it a larger one"
    return ""


def _unevaluated(recipe: config.Recipe, folder: Path, here: World, step: int) -> bool:
    """Whether the evaluation after this step is still missing, as the first rank sees it."""
    return parallel.together(here, lambda: evaluations.missing(recipe, folder, step))[0]


def _silent(_: object) -> None:
    """Do nothing: replaces `tell` on all ranks but the first, and `expect` without a cache."""
