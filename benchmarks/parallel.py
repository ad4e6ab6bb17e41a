"""What FSDP2 costs where there is nothing to cut, and how long a checkpoint holds training up.

    python benchmarks/parallel.py [quickstart] [--set KEY=VALUE] [--batch N] [--json FILE]

step    A whole step of the recipe's first stage in one process, pictures aside: plainly, and by way
        of FSDP2 over a mesh of one, which `daybreak train` never takes: it would copy and change
        nothing. What it costs there, it costs everywhere, whatever else is gained.
save    A checkpoint of that model, written before training goes on, or in the background: how long
        the step after it waits, and how much longer the steps beside it take in all, until it is on
        the disk.

Arms take turns; the table gives medians, and ratios of each turn. Steps are also counted in seconds
of the processor, which other work on the machine changes less.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from daybreak import host

host.settle()

import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from turns import in_turn, now, write

from daybreak import config
from daybreak.data import batches, loader
from daybreak.model.text_to_image import TextToImage
from daybreak.objective.objective import Objective
from daybreak.optim import groups
from daybreak.optim.ema import Ema
from daybreak.train import building, checkpoint, measure, parallel, runs
from daybreak.train.checkpoint import State
from daybreak.train.dice import Dice
from daybreak.train.parallel import World
from daybreak.train.saving import Saver
from daybreak.train.step import networks

PLAIN, CUT = "step, plain", "step, FSDP2 over a mesh of one"
PROCESSOR = f"{CUT}: processor"
WAITS = "save, before training goes on"
BLOCKS, COSTS = "save, in the background: blocks", "save, in the background: costs in all"
AGAINST = {CUT: PLAIN, PROCESSOR: f"{PLAIN}: processor", BLOCKS: WAITS, COSTS: WAITS}
WARM = 3  # rounds that do not count


class Arm(NamedTuple):
    """What a run has, in one world or the other."""

    here: World
    objective: Objective
    state: State
    ema: Ema[TextToImage]


@contextmanager
def mesh_of_one(alone: World) -> Iterator[World]:
    """The same process, as the only rank of a mesh."""
    backend = "cpu:gloo,cuda:nccl" if alone.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(alone.device.type, (1,), mesh_dim_names=("dp_shard",))
    try:
        yield alone._replace(mesh=mesh, group=dist.new_group(backend="gloo"))
    finally:
        parallel.leave()


def step(arm: Arm, recipe: config.Recipe, batch: batches.Batch) -> None:
    """Take a step as the loop does, on the same pictures each time."""
    here, objective, state, ema = arm
    count = len(batch.image)
    size = recipe.micro or count
    for first in range(0, count, size):
        image, captions = batch.image[first : first + size], batch.captions[first : first + size]
        dice = Dice(recipe.seed, 1, first, len(image), image.device)
        learning = networks(state.model, objective)
        parallel.accumulate(learning, recipe.parallel, first + size >= count)
        stage = recipe.stage[0]
        loss, _ = objective(
            state.model, state.average, image, captions, dice, stage.without, stage.shift
        )
        (loss * (len(image) / count)).backward()
    norm = parallel.clip(
        here, [*state.model.parameters(), *objective.learned.parameters()], recipe.clip
    )
    refused = parallel.gather(here, norm[None]).isnan().any().float()
    groups.set_rate(state.optimizers, recipe.stage[0].lr)
    groups.step(state.optimizers, refused)
    for optimizer, _ in state.optimizers.values():
        optimizer.zero_grad()
    ema.update(state.model, 1)


def saves(
    arm: Arm, recipe: config.Recipe, take: Callable[[], object], rounds: int
) -> dict[str, list[float]]:
    """Save in turn, either way. Steps go on beside a save in the background; then as many alone."""
    seconds: dict[str, list[float]] = {WAITS: [], BLOCKS: [], COSTS: []}
    before, beside = (
        Saver(
            recipe.model_copy(update={"save_async": background}),
            Path(recipe.out),
            arm.here,
            arm.state.model,
        )
        for background in (False, True)
    )
    for turn in range(1 + rounds):  # the first one finds its memory
        began = now()
        before.save(2 * turn + 1, arm.state, {})
        waited = now() - began

        began, steps = now(), 0
        beside.save(2 * turn + 2, arm.state, {})
        blocked = now() - began
        while beside.pending is not None and not beside.pending.done():
            take()
            steps += 1
        beside.finish()
        whole, began = now() - began, now()
        for _ in range(steps):
            take()
        whole -= now() - began
        if turn:
            for name, found in ((WAITS, waited), (BLOCKS, blocked), (COSTS, whole)):
                seconds[name].append(found)
    return seconds


def processor(arm: Callable[[], object], spent: list[float]) -> None:
    """Note the seconds of the processor that something takes, in all threads."""
    began = time.process_time()
    arm()
    spent.append(time.process_time() - began)


def ratios(seconds: dict[str, list[float]], one: str, other: str) -> Sequence[float]:
    """Those of each turn, in order."""
    return sorted(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def measured(recipe: config.Recipe, batch: int | None, rounds: int) -> dict[str, Any]:
    """Time steps and saves; prints the table."""
    sources = building.sources(recipe)
    dtype, stage = runs.precision(recipe), recipe.stage[0]
    with parallel.world(recipe.parallel) as alone, mesh_of_one(alone) as one:
        plain, cut = (
            Arm(here, *building.build(recipe, sources, here, None, dtype, None, print))
            for here in (alone, one)
        )
        share = batch or stage.batch
        stream = loader.stream(
            sources[0],
            recipe.data,
            recipe.seed,
            stage.resolution,
            share,
            first=0,
            count=1,
            device=alone.device,
        )
        given = next(stream)
        arms = {
            name: partial(step, arm, recipe, given) for name, arm in ((PLAIN, plain), (CUT, cut))
        }
        spent: dict[str, list[float]] = {name: [] for name in arms}
        noted = {name: partial(processor, arm, spent[name]) for name, arm in arms.items()}
        seconds = in_turn(noted, rounds, warm=WARM)
        seconds |= {f"{name}: processor": taken[WARM:] for name, taken in spent.items()}
        runs.begin(Path(recipe.out), recipe, dtype, batches.files(sources))
        seconds |= saves(plain, recipe, arms[PLAIN], rounds)
        stored = checkpoint.size(plain.state.model)

    found = {}
    print(f"batch {len(given.image)}, a checkpoint of {stored / 2**20:.0f} MiB")
    for name, times in seconds.items():
        print(f"  {name:40} {1000 * statistics.median(times):9.1f} ms", end="")
        against = AGAINST.get(name)
        if against is not None:
            every = ratios(seconds, name, against)
            found[name] = statistics.median(every)
            print(f"   x {found[name]:.3f} ({every[0]:.3f} to {every[-1]:.3f})", end="")
        print()
    return {"bytes": stored, "seconds": seconds, "ratios": found}


def main() -> None:
    """Measure, print the table, write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, help="pictures of a step")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    recipe = config.load(arguments.recipe, tuple(arguments.set))
    with tempfile.TemporaryDirectory(prefix="daybreak-benchmark-") as folder:
        recipe = measure.shortened(recipe, 1, Path(folder))
        found = measured(recipe, arguments.batch, arguments.rounds)
    write(arguments.json, {"recipe": arguments.recipe, **found})


if __name__ == "__main__":
    main()
