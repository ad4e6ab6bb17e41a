"""The training loop.

For each stage and step: a batch, the loss of its micro-batches, clipped gradients, Muon and AdamW,
the average. A step counts from 1 over the whole run. Checkpoints, grids and log lines happen
between steps and change nothing that the next step computes. Only a [budget] in seconds looks at
the clock: it brings the rate down as the time runs out (train/ledger), so such a run cannot be
repeated bit for bit.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import torch
from PIL import Image
from torch.nn.utils import clip_grad_norm_

from daybreak import config, doctor
from daybreak.data import batches
from daybreak.failure import NotFinite
from daybreak.generate import grid
from daybreak.generate.draw import draw
from daybreak.model import text
from daybreak.model.text_to_image import TextToImage, build
from daybreak.objective.objective import Objective
from daybreak.optim import groups
from daybreak.optim.ema import Ema
from daybreak.train import checkpoint, encoded, evaluations, flops, runs
from daybreak.train.dice import Dice
from daybreak.train.ledger import Ledger
from daybreak.train.log import Log

PREEMPTED, INTERRUPTED = 75, 130
VARIANTS = 64  # of a block that may be compiled


class Outcome(NamedTuple):
    """How training ended: the last finished step, and the exit code."""

    step: int
    code: int


class Stop:
    """Remembers the first signal it hears, as an exit code; a second one leaves at once.

    A context manager: the handlers of before are back afterwards.
    """

    def __init__(self) -> None:
        self.code = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Begin to listen."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self.before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self.code:
            os._exit(INTERRUPTED if number == signal.SIGINT else 128 + number)
        self.code = INTERRUPTED if number == signal.SIGINT else PREEMPTED


def train(recipe: config.Recipe, tell: Callable[[str], None] = print) -> Outcome:
    """Train a recipe in its run folder, from the newest good checkpoint there or from nothing.

    Errors  BadRecipe, BadData and BadStorage before anything is written; NotFinite and BadStorage
            during the run, whose checkpoints stay.
    """
    began = time.monotonic()
    folder = runs.enter(recipe)
    source = batches.pictures(recipe.data, recipe.scenes, recipe.seed, recipe.dit.patch)
    for stage in recipe.stage:  # what no stage can have is refused here, not when its turn comes
        source.plan(stage.resolution, stage.batch, first=0)
    runs.check_data(folder, source.files)
    found = checkpoint.newest(folder, tell)
    if found and found.step >= recipe.steps:
        tell(f"{folder} is finished: {found.step} steps of {recipe.steps}")
        return Outcome(found.step, 0)
    if found and Ledger(folder / "run.json", recipe.budget).over:
        tell(f"{folder} has spent its budget: {found.step} steps of {recipe.steps}")
        return Outcome(found.step, 0)

    dtype, device = runs.precision(recipe), runs.device()
    objective = runs.objective(recipe, dtype)
    tokenizer = None
    if recipe.text.encoder is None:
        tokenizer = (
            text.load_tokenizer(found.folder / "tokenizer")
            if found
            else text.learn_tokenizer(source.captions(), recipe.text)
        )
    known = encoded.known(recipe, dtype, tell)
    model, twin = (
        build(recipe.dit, recipe.text, tokenizer, recipe.seed, dtype, recipe.tread, known).to(
            device
        )
        for _ in range(2)
    )
    optimizers = groups.optimizers(model, recipe.muon, recipe.adamw, objective.learned)
    ema = Ema(twin, recipe.ema)
    runs.check_space(folder, checkpoint.size(model), recipe.keep)
    if not (folder / "recipe.toml").is_file():
        runs.begin(folder, recipe, dtype, source.files)
    checkpoint.clear_unfinished(folder)
    evaluations.cut(folder, found.step if found else 0)
    start = 0
    if found:
        checkpoint.load(found, model, ema.model, optimizers, objective.learned)
        start = found.step
    _compile(model, recipe, tell)
    tell(
        f"{runs.millions(model):.1f} M weights, "
        f"{str(dtype).removeprefix('torch.')} on {device} with {torch.get_num_threads()} threads, "
        f"{'from step ' + str(start) if start else 'from random weights'}; run folder {folder}"
    )

    if start and evaluations.missing(recipe, folder, start):
        note, best = evaluations.take(recipe, folder, ema.model, start)
        tell(note)
        if best:
            evaluations.keep(folder, start)
    spent = Ledger(folder / "run.json", recipe.budget)
    step, done, seen = 0, start, 0
    with Stop() as stop, Log(folder, recipe.steps, start) as log:
        for stage in recipe.stage:
            before, step = step, step + stage.count
            if step <= start:
                seen += stage.count * stage.batch
                continue
            skipped = max(0, start - before)
            each = flops.of_step(recipe, stage, known is not None) if recipe.budget else 0.0
            stream = batches.stream(
                source,
                recipe.data,
                recipe.seed,
                stage.resolution,
                stage.batch,
                first=seen,
                count=stage.count - skipped,
                done=skipped,
                device=device,
            )
            for now, (waited, batch) in enumerate(_timed(stream), start=skipped + 1):
                done = before + now
                then = time.monotonic()
                rate = stage.lr * groups.schedule(now, stage.count, stage.warmup, stage.cooldown)
                rate *= spent.factor
                values = _step(
                    model, ema.model, batch, recipe, stage, objective, optimizers, done, rate
                )
                ema.update(model, done)
                spent.step(each)
                values |= {"lr": rate, "waited": waited, "worked": time.monotonic() - then}
                if batch.substituted:
                    values["substituted"] = batch.substituted
                for complaint in batch.complaints:
                    log.note(complaint)
                log.step(done, values, images=stage.batch)
                if done == start + 1:
                    log.note(f"first step after {time.monotonic() - began:.0f} s")
                over = spent.over
                last = done == recipe.steps or over
                if (done % recipe.sample.every == 0 or last) and not over:
                    log.note(f"grid: {_show(ema.model, recipe, folder, done, stage.resolution)}")
                best = False
                if evaluations.due(recipe, done) and (last or not stop.code) and not over:
                    note, best = evaluations.take(recipe, folder, ema.model, done)
                    log.note(note)
                if done % recipe.save_every == 0 or last or stop.code or best:
                    then = time.monotonic()
                    checkpoint.save(
                        folder, done, model, ema.model, optimizers, recipe.keep, objective.learned
                    )
                    spent.saved(time.monotonic() - then)
                    spent.write()
                if best:
                    evaluations.keep(folder, done)
                if stop.code:
                    log.note(f"stopped and saved at step {done}; the same command continues")
                    return Outcome(done, stop.code)
                if over:
                    log.note(f"the budget is spent: {spent.spent:.0f} s, {done} steps")
                    return Outcome(done, 0)
            seen += stage.count * stage.batch
    tell(f"trained {done} steps in {time.monotonic() - began:.0f} s: {folder / 'latest'}")
    return Outcome(done, 0)


def _step(
    model: TextToImage,
    average: TextToImage,
    batch: batches.Batch,
    recipe: config.Recipe,
    stage: config.Stage,
    objective: Objective,
    optimizers: dict[str, tuple[torch.optim.Optimizer, float]],
    step: int,
    rate: float,
) -> dict[str, float]:
    """Take one step; returns the loss, its parts and the gradient norm."""
    count = len(batch.image)
    size, resting = recipe.micro or count, recipe.resting(stage, step)
    sums: dict[str, torch.Tensor] = {}
    for first in range(0, count, size):
        image = batch.image[first : first + size]
        captions = batch.captions[first : first + size]
        dice = Dice(recipe.seed, step, batch.first + first, len(image), image.device)
        loss, parts = objective(model, average, image, captions, dice, resting, stage.shift)
        (loss * (len(image) / count)).backward()
        for name, part in {"loss": loss.detach(), **parts}.items():
            sums[name] = sums.get(name, 0.0) + part * (len(image) / count)
    trained = [*model.parameters(), *objective.learned.parameters()]
    norm = clip_grad_norm_([p for p in trained if p.requires_grad], recipe.clip)
    values = {name: float(value) for name, value in {**sums, "norm": norm}.items()}
    if not all(map(_finite, values.values())):
        raise NotFinite(
            f"step {step}: loss {values['loss']}, gradient norm {values['norm']} "
            f"(samples {batch.first} to {batch.first + count - 1}): lower stage.lr or clip, or "
            "continue from the last checkpoint with the same command"
        )
    groups.set_rate(optimizers, rate)
    for optimizer, _ in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    return values


def _timed(stream: Iterator[batches.Batch]) -> Iterator[tuple[float, batches.Batch]]:
    """Yield each batch with the seconds that were spent waiting for it."""
    began = time.monotonic()
    for batch in stream:
        yield time.monotonic() - began, batch
        began = time.monotonic()


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _compile(model: TextToImage, recipe: config.Recipe, tell: Callable[[str], None]) -> None:
    """Compile each block if this machine can; a slower run is no reason to refuse one."""
    if not recipe.compile:
        return
    if doctor.compiler() is None:
        tell("no C++ compiler with Python headers: torch.compile is off, training is slower")
        return
    # Each number of image tokens, and of words, is a variant; past the limit they run uncompiled.
    torch._dynamo.config.recompile_limit = VARIANTS
    for block in model.dit.blocks:
        block.compile(dynamic=False)


def _show(model: TextToImage, recipe: config.Recipe, folder: Path, step: int, side: int) -> Path:
    """Draw the recipe's prompts with fixed noise; returns the grid's path."""
    prompts = recipe.sample.prompts or ("",) * 4
    seeds = [recipe.sample.seed + number for number in range(len(prompts))]
    pictures = draw(model, prompts, seeds, side, side, recipe.sample, recipe.flow, recipe.tread)
    place = folder / "samples" / f"step-{step:07d}"
    place.mkdir(parents=True, exist_ok=True)
    facts = {"step": str(step), "recipe": config.digest(recipe)}
    for number, (prompt, seed, picture) in enumerate(zip(prompts, seeds, pictures, strict=True)):
        grid.save(
            Image.fromarray(picture),
            place / f"{number:02d}.png",
            facts | {"prompt": prompt, "seed": str(seed)},
        )
    (place / "prompts.json").write_text(
        json.dumps(
            [{"prompt": p, "seed": s} for p, s in zip(prompts, seeds, strict=True)], indent=1
        )
    )
    sheet = grid.grid(pictures, list(prompts), None, f"step {step}")
    grid.save(sheet, place / "grid.png", facts)
    return place / "grid.png"
