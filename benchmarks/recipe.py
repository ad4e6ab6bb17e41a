"""Where the time of a recipe's step goes, and how much of the machine it reaches.

    python benchmarks/recipe.py [quickstart] [--set KEY=VALUE] [--batch N] [--cached-text] [--plain]
                                [--mesh 4x8] [--json FILE]

Real steps of each stage, taken apart: pictures, words, denoiser, what the other terms of the loss
ask of their teachers, the way back, each optimiser, the average. Between two parts the device is
waited for, which a run does not do. FLOPs are counted from shapes as `daybreak plan` does, but for
as many words as there were, for all networks and for the denoiser alone; the peak is the
datasheet's, or on a processor that of a large product. Pictures that are not here are replaced by
noise, networks by random ones of their size. Captions that a dataset holds encoded are read, and
with `--cached-text` noise stands in their place.

With `--mesh 4x8` this device is one of 32, with weights cut over 8 and repeated 4 times, and the
only one there: what they would send one another is packed and unpacked, and never sent. Without, it
has all matrices of Muon to itself. (A mesh that cuts weights over more devices than there are
matrices of a shape, as of a small model, is refused by torch's stand-in for collectives.)

With `--plain` the same code takes the plain path: eager blocks in float32, products as torch makes
them, threads and memory as torch and the C library have them by themselves.
"""

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from daybreak import host

PLAIN = "--plain"
if PLAIN not in sys.argv:
    host.settle()

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from turns import now, write

from daybreak import config
from daybreak.data import batches, loader
from daybreak.model import product, text
from daybreak.model.text_to_image import TextToImage
from daybreak.objective.objective import Objective
from daybreak.optim import groups
from daybreak.optim.ema import Ema
from daybreak.train import (
    accelerator,
    building,
    encoded,
    flops,
    hardware,
    measure,
    memory,
    parallel,
    runs,
)
from daybreak.train.checkpoint import State
from daybreak.train.dice import Dice
from daybreak.train.memory import Mesh
from daybreak.train.parallel import World
from daybreak.train.step import networks

SETTLE = 4  # steps of a stage that do not count: they compile
Parts = dict[str, float]


class Clock:
    """Seconds of one step by part."""

    def __init__(self) -> None:
        self.parts: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        began = now()
        yield
        self.parts[name] += now() - began

    def watch(self, module: nn.Module, name: str) -> None:
        """Time every call of a network, too."""
        began: list[float] = []
        module.register_forward_pre_hook(lambda *_: began.append(now()))
        module.register_forward_hook(lambda *_: self._add(name, now() - began.pop()))

    def _add(self, name: str, seconds: float) -> None:
        self.parts[name] += seconds

    def take(self) -> Parts:
        """Return the parts of the step that is over, and begin the next."""
        taken = dict(self.parts)
        self.parts.clear()
        return taken


@contextmanager
def alone_among(mesh: Mesh) -> Iterator[World]:
    """Be one rank of a mesh whose others are not there: collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=mesh.devices)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    names = ("dp_replicate", "dp_shard")
    whole = init_device_mesh(kind, (mesh.replicate, mesh.shard), mesh_dim_names=names)
    cut = whole if mesh.replicate > 1 else whole["dp_shard"]
    try:
        yield World(0, mesh.devices, accelerator.choose(), cut, dist.HashStore())  # type: ignore[attr-defined]
    finally:
        parallel.leave()


def step(
    here: World,
    recipe: config.Recipe,
    stage: config.Stage,
    number: int,
    stream: Iterator[batches.Batch],
    objective: Objective,
    state: State,
    ema: Ema[TextToImage],
    clock: Clock,
) -> Parts:
    """Take one step as the loop does; returns the seconds of its parts."""
    model, began = state.model, now()
    with clock.part("pictures"):
        batch = next(stream)
    count = len(batch.image)
    size = recipe.micro or count
    for first in range(0, count, size):
        image, captions = batch.image[first : first + size], batch.captions[first : first + size]
        dice = Dice(recipe.seed, number, batch.first + first, len(image), image.device)
        parallel.accumulate(networks(model, objective), recipe.parallel, first + size >= count)
        with clock.part("forward"):
            loss, _ = objective(
                model, state.average, image, captions, dice, stage.without, stage.shift
            )
        with clock.part("backward"):
            (loss * (len(image) / count)).backward()
    with clock.part("clipping"):
        learned = [*model.parameters(), *objective.learned.parameters()]
        refused = parallel.clip(here, learned, recipe.clip).isnan().float()
    groups.set_rate(state.optimizers, stage.lr)
    for name, (optimizer, rate) in state.optimizers.items():
        with clock.part(name):
            groups.step({name: (optimizer, rate)}, refused)
            optimizer.zero_grad()
    with clock.part("average"):
        ema.update(model, number)
    whole, parts = now() - began, clock.take()
    parts["terms and noise"] = parts.pop("forward") - parts["text, forward"] - parts["denoiser"]
    parts["the rest"] = whole - sum(parts.values())
    return parts


def main() -> None:
    """Take the steps of every stage, print where their time goes, write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, help="pictures of a step, on this device")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(PLAIN, action="store_true", help="eager, float32, as torch is by itself")
    parser.add_argument("--cached-text", action="store_true", help="captions encoded beforehand")
    parser.add_argument("--mesh", type=_mesh, metavar="4x8", help="be one of so many devices")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    product.MKL_IS_SLOW &= not arguments.plain
    plain = ("compile=false", "precision=float32") if arguments.plain else ()
    recipe = config.load(arguments.recipe, (*plain, *arguments.set))
    with tempfile.TemporaryDirectory(prefix="daybreak-benchmark-") as folder:
        recipe = measure.shortened(recipe, 1, Path(folder))
        rows = measured(
            recipe, arguments.batch, arguments.steps, arguments.cached_text, arguments.mesh
        )
    write(arguments.json, {"recipe": arguments.recipe, "mesh": arguments.mesh, "stages": rows})


def _mesh(text: str) -> Mesh:
    replicate, shard = map(int, text.split("x"))
    return Mesh(replicate, shard)


def held(
    recipe: config.Recipe, stage: config.Stage, mesh: Mesh | None, dtype: torch.dtype
) -> dict[str, float]:
    """Bytes of a GPU's memory at its fullest, and what a plan says of it."""
    mesh = mesh or Mesh(1, 1)
    share = stage.batch // mesh.devices
    parts = memory.parts(recipe, stage, mesh, min(recipe.micro or share, share), dtype, "cuda")
    return {"memory": torch.cuda.max_memory_allocated(), "planned": sum(parts.values())}


def encoded_before(recipe: config.Recipe, dtype: torch.dtype) -> text.Known:
    """Noise in the place of words that a dataset holds encoded, as long as they may be."""
    shape = recipe.text.max_tokens, flops.text_encoder(recipe).width
    pinned = torch.cuda.is_available()

    @cache
    def noise(count: int) -> text.Text:
        words = torch.empty(count, *shape, dtype=dtype, pin_memory=pinned).normal_()
        return text.Text(words, torch.ones(words.shape[:2], dtype=torch.bool))

    return lambda captions: noise(len(captions))


def measured(
    recipe: config.Recipe, batch: int | None, steps: int, cached: bool, mesh: Mesh | None = None
) -> list[dict[str, Any]]:
    """Measure every stage of a recipe; prints a table of each."""
    devices = mesh.devices if mesh else 1
    stages = [s.model_copy(update={"batch": devices * (batch or s.batch)}) for s in recipe.stage]
    recipe = recipe.model_copy(update={"stage": tuple(stages)})
    sources = building.sources(recipe)
    dtype, rows, number = runs.precision(recipe), [], 0
    clock, cluster = Clock(), hardware.here(dtype)
    with alone_among(mesh) if mesh else parallel.world(recipe.parallel) as here:
        known = encoded.known(recipe, dtype, print)
        asked = known.tokens if known else encoded_before(recipe, dtype) if cached else None
        expect: Callable[[list[str]], object] = known.expect if known else lambda _: None
        cached = asked is not None
        objective, state, ema = building.build(recipe, sources, here, None, dtype, asked, print)
        clock.watch(state.model.text, "text, forward")
        clock.watch(state.model.dit, "denoiser")
        words = [0]
        state.model.text.register_forward_hook(
            lambda _, __, text: words.append(text.tokens.shape[1])
        )
        for stage, source in zip(recipe.stage, sources, strict=True):
            stream = loader.stream(
                source, recipe.data, recipe.seed, stage.resolution, stage.batch,
                first=0, count=SETTLE + steps, device=here.device, expect=expect,
                world=here.size,
            )  # fmt: skip
            taken = []
            for settled in range(SETTLE + steps):
                number += 1
                if settled == SETTLE and cluster.device.name != "cpu":
                    torch.cuda.reset_peak_memory_stats()
                taken.append(
                    step(here, recipe, stage, number, stream, objective, state, ema, clock)
                )
            parts = {
                name: statistics.median(parts[name] for parts in taken[SETTLE:])
                for name in taken[0]
            }
            whole = statistics.median(sum(parts.values()) for parts in taken[SETTLE:])
            read = flops.as_read(recipe, max(words))
            work = flops.work(read, stage, cached)
            share = stage.batch // devices
            muon = {name: here.replicas * each / devices for name, each in work.step.items()}
            counted = {name: share * each for name, each in work.picture.items()} | muon
            reached, alone = sum(counted.values()) / whole, counted["denoiser"] / whole
            peak = {} if cluster.device.name == "cpu" else held(recipe, stage, mesh, dtype)
            rows.append(
                {
                    "resolution": stage.resolution,
                    "batch": share,
                    "seconds": whole,
                    "parts": parts,
                    "words": max(words),
                    "flops": counted,
                    "flops_per_second": reached,
                    "flops_per_second_of_denoiser": alone,
                    "peak": cluster.device.flops,
                    **peak,
                }
            )
            print(
                f"{stage.resolution} px, batch {share}: {share / whole:.1f} img/s, "
                f"{reached / 1e12:.3f} TFLOP/s, {reached / cluster.device.flops:.1%} of "
                f"{cluster.device.name}'s peak, {alone / cluster.device.flops:.1%} by the denoiser "
                "alone" + "".join(f", {name} {size / 1e9:.2f} GB" for name, size in peak.items())
            )
            for name, seconds in sorted(parts.items(), key=lambda row: -row[1]):
                print(f"  {name:18} {1000 * seconds:10.2f} ms {seconds / whole:7.1%}")
    return rows


if __name__ == "__main__":
    main()
