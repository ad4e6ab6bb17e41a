"""A run's hours, dollars and memory, estimated before its first step; and what a budget buys.

    seconds of a step = max(arithmetic, communication)
    arithmetic        = FLOPs / (peak x share)           share: assumed, given, or measured
    communication     = bytes in a node / link + bytes between nodes / network

The two overlap, so the slower one sets the time. Arithmetic and memory are counted (`train/flops`,
`train/memory`), peaks and prices looked up (`train/hardware`). The remaining unknown is the share
of its peak that a device reaches: `train/measure` finds it with real steps. Pictures are assumed to
arrive in time; the number of workers this needs is printed, but not part of the estimate.

Units   seconds, dollars, FLOP, bytes; energy in kWh, of devices at full power.
"""

import math
import re
from typing import Literal, NamedTuple

import torch

from daybreak.config import Recipe, Stage
from daybreak.data import prepared
from daybreak.data.batches import Config as Data
from daybreak.failure import BadRecipe
from daybreak.model import text_cache
from daybreak.train import flops, hardware, length, log, measure, memory, parallel, runs
from daybreak.train.hardware import Cluster
from daybreak.train.ledger import MOST
from daybreak.train.memory import Mesh

FILL = 0.95  # of a datasheet's memory: allocators leave gaps, and the driver needs some too
# Shares of the peak where nothing was measured. torchtitan gives 33 to 39 % without and with
# compilation in benchmarks/llama3_h100_202412_torchtitan.md; this is the middle.
GPU_SHARE = 0.36
GPU_SOURCE = "assumed: what torchtitan reports for Llama 3.1 8B in bfloat16 on 8 and 128 H100"
# 390, 382 and 424 GFLOP/s in the stages of docs/records/quickstart/metrics.jsonl (medians), on two
# cores whose products make 920.
CPU_SHARE = 0.4
CPU_SOURCE = "assumed: what the quickstart's record reached on two cores"

Kind = Literal["seconds", "dollars", "flops", "pictures"]
UNITS: dict[str, tuple[Kind, float]] = {
    "s": ("seconds", 1),
    "min": ("seconds", 60),
    "h": ("seconds", 3600),
    "d": ("seconds", 86400),
    "usd": ("dollars", 1),
    "flop": ("flops", 1),
    "images": ("pictures", 1),
    "k-images": ("pictures", 1e3),
    "m-images": ("pictures", 1e6),
}
SPELT = {"sec": "s", "m": "min", "minutes": "min", "hour": "h", "hours": "h", "day": "d"}
SPELT |= {"days": "d", "dollars": "usd", "flops": "flop"}


class Budget(NamedTuple):
    """What may be spent: an amount of seconds, dollars, FLOPs or pictures."""

    kind: Kind
    amount: float


class StagePlan(NamedTuple):
    """One stage: its size, FLOPs by part over all its steps, and what limits its speed."""

    resolution: int
    steps: int
    batch: int
    flops: dict[str, float]
    seconds: dict[str, float]
    memory: dict[str, float]
    start: float  # seconds until steps are at full speed, after compilation; 0 if not measured

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return max(self.seconds.values())

    @property
    def limit(self) -> str:
        """What limits a step: arithmetic or communication."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def whole(self) -> float:
        """Seconds of the stage."""
        return self.start + self.steps * self.step


class Plan(NamedTuple):
    """The estimate of a run. `share` is the share of the peak, and `source` says where from."""

    cluster: Cluster
    mesh: Mesh
    price: float | None
    share: float
    source: str
    cached: bool
    weights: int
    stages: tuple[StagePlan, ...]

    @property
    def seconds(self) -> float:
        """Seconds from the start to the last step, without grids and checkpoints."""
        return sum(stage.whole for stage in self.stages)

    @property
    def reached(self) -> float:
        """Share of the peak over a step: below `share` if communication is the limit."""
        steps = sum(stage.steps * stage.step for stage in self.stages)
        return self.flops / (steps * self.cluster.number * self.cluster.device.flops)

    @property
    def start(self) -> float:
        """The part of `seconds` for building networks and compiling blocks; 0 if not measured."""
        return sum(stage.start for stage in self.stages)

    @property
    def flops(self) -> float:
        """FLOPs of all stages."""
        return sum(sum(stage.flops.values()) for stage in self.stages)

    @property
    def pictures(self) -> int:
        """Pictures seen, repeats included."""
        return sum(stage.steps * stage.batch for stage in self.stages)

    @property
    def dollars(self) -> float | None:
        """Price of the run on all devices, or None without a price per hour."""
        return None if self.price is None else self.price * self.device_hours

    @property
    def device_hours(self) -> float:
        """Hours, summed over all devices."""
        return self.cluster.number * self.seconds / 3600

    @property
    def energy(self) -> float | None:
        """Energy of all devices in kWh, or None if their power is unknown."""
        power = self.cluster.device.power
        return None if power is None else self.device_hours * power / 1000

    @property
    def fullest(self) -> dict[str, float]:
        """Memory by part, in the stage that needs the most."""
        return max((stage.memory for stage in self.stages), key=lambda parts: sum(parts.values()))

    @property
    def needed(self) -> float:
        """Bytes of all these parts."""
        return sum(self.fullest.values())

    @property
    def fits(self) -> bool:
        """Whether a device has that much."""
        return self.needed <= self.room

    @property
    def room(self) -> float:
        """Bytes of a device that a run can use."""
        return FILL * self.cluster.device.memory


def parse(text: str) -> Budget:
    """Read `1500usd`, `$1500`, `24h`, `90s`, `4e20flop` or `200k-images`. Errors: BadRecipe."""
    # Commas and underscores only separate thousands: dropped from 1,5h they would make it 15h.
    plain = re.sub(r"(?<=[0-9])[,_](?=[0-9]{3}(?![0-9]))", "", text.strip().lower())
    plain = f"{plain[1:]}usd" if plain.startswith("$") else plain
    found = re.fullmatch(r"([0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?)\s*-?([a-z-]+)", plain)
    unit = SPELT.get(found[2], found[2]) if found else ""
    kind, size = UNITS.get(unit, ("seconds", 0))
    amount = float(found[1]) * size if found else 0
    if not 0 < amount < MOST:
        raise BadRecipe(
            f"--budget {text}: write an amount above 0 and a unit ({', '.join(UNITS)}), "
            "for example 1500usd, 1.5h or 4e20flop"
        )
    return Budget(kind, amount)


def assigned(text: str) -> str:
    """Write a run's budget as `--set` takes it. Errors: BadRecipe, also if it is in pictures."""
    asked = parse(text)
    if asked.kind == "pictures":
        raise BadRecipe(
            f"--budget {text}: train takes a budget in time, dollars or flop; for a number of "
            "pictures set stage.0.steps, as pictures are steps times batch"
        )
    return f"budget.{asked.kind}={asked.amount}"


def granted(recipe: Recipe) -> tuple[Budget, ...]:
    """What the recipe's own [budget] lets a run spend: seconds, dollars and FLOPs."""
    if recipe.budget is None:
        return ()
    given = recipe.budget
    amounts: dict[Kind, float | None] = {
        "seconds": given.seconds,
        "dollars": given.dollars,
        "flops": given.flops,
    }
    return tuple(Budget(kind, amount) for kind, amount in amounts.items() if amount is not None)


def cluster(recipe: Recipe, gpus: str | None) -> Cluster:
    """The devices that `gpus` names, or those of this machine. Errors: BadRecipe."""
    dtype = runs.precision(recipe)
    if gpus is None:
        return hardware.here(dtype)
    found = hardware.parse(gpus, dtype)
    return found._replace(device=found.device.at(precision(recipe, found)))


def plan(
    recipe: Recipe,
    cluster: Cluster,
    price: float | None = None,
    share: float | None = None,
    measured: bool = False,
    cached: bool = False,
) -> Plan:
    """Estimate a run; with `measured`, real steps are taken on this machine.

    `cached` says that captions are encoded already; if the dataset is here, this is found out.

    Errors  BadRecipe if the devices cannot divide a batch evenly, or if something is to be measured
            and they are not those of this machine.
    """
    number, device = cluster
    if price is None and recipe.budget is not None:
        price = recipe.budget.price
    if price is not None and price >= MOST:
        raise BadRecipe(f"--price {price} is not a price: give dollars per device and hour")
    check_shares(recipe, number)
    there = has_words(recipe, precision(recipe, cluster))
    if measured and cached and not there:
        raise BadRecipe(
            "--measure times real steps, and these captions are not encoded: leave --cached-text "
            "out, or encode them first with daybreak prepare --cache-text"
        )
    if cached and recipe.text.encoder is None:
        raise BadRecipe(
            "--cached-text: this recipe trains its own text encoder, so nothing can be encoded "
            "beforehand: leave it out"
        )
    cached = cached or there
    if measured:
        check_here(recipe, cluster)
    mesh = mesh_of(recipe, number)
    taken = measure.steps(recipe, number) if measured else [None] * len(recipe.stage)
    source = "as given"
    if share is None:
        share, source = (CPU_SHARE, CPU_SOURCE) if device.name == "cpu" else (GPU_SHARE, GPU_SOURCE)
    stages = tuple(
        stage_plan(recipe, stage, cluster, mesh, share, cached, pace)
        for stage, pace in zip(recipe.stage, taken, strict=True)
    )
    if measured:
        reached = sum(sum(stage.flops.values()) for stage in stages)
        possible = number * device.flops * sum(s.steps * s.seconds["arithmetic"] for s in stages)
        share, source = reached / possible, f"measured: {measure.STEPS} real steps of each stage"
    return Plan(
        cluster=cluster,
        mesh=mesh,
        price=device.price if price is None else price,
        share=share,
        source=source,
        cached=cached,
        weights=sum(shape.numel() for shape, _ in flops.learned(recipe)),
        stages=stages,
    )


def stage_plan(
    recipe: Recipe,
    stage: Stage,
    cluster: Cluster,
    mesh: Mesh,
    share: float,
    cached: bool,
    taken: measure.Pace | None,
) -> StagePlan:
    """Estimate a stage, from measured steps if there are any, else from this share of the peak."""
    number, device = cluster
    dtype = precision(recipe, cluster)
    work = flops.work(recipe, stage, cached)
    pictures, once = stage.batch // number * sum(work.picture.values()), sum(work.step.values())
    if taken is None:
        arithmetic = (pictures + once / mesh.shard) / (share * device.flops)
    else:
        arithmetic = dealt(taken.step, pictures, once, mesh.shard)
    moving = communication(recipe, mesh, device.link, passes(recipe, stage, number), dtype)
    counted = {name: stage.count * stage.batch * each for name, each in work.picture.items()}
    # Replicas do the same work on the same gradients.
    counted |= {n: stage.count * mesh.replicate * each for n, each in work.step.items()}
    return StagePlan(
        resolution=stage.resolution,
        steps=stage.count,
        batch=stage.batch,
        flops=counted,
        seconds={"arithmetic": arithmetic, "communication": moving},
        memory=held(recipe, stage, mesh, at_once(recipe, stage, number), dtype, device.name),
        start=0.0 if taken is None else taken.start,
    )


def dealt(step: float, pictures: float, once: float, shard: int) -> float:
    """Seconds that a measured step takes if `shard` devices divide the work done once a step.

    `step` was measured on one device, which handled all of Muon's matrices. `pictures` is the FLOPs
    of its share of the batch, `once` those of a step that do not depend on the batch.
    """
    return step * (pictures + once / shard) / (pictures + once)


def check_here(recipe: Recipe, cluster: Cluster) -> None:
    """Refuse to measure devices that are not in this machine. Errors: BadRecipe."""
    local = hardware.here(runs.precision(recipe))
    if local.device.name != cluster.device.name:
        raise BadRecipe(
            f"--measure takes steps on this machine, which is {local} and not {cluster}: leave "
            "--gpus out, or measure there"
        )


def has_words(recipe: Recipe, dtype: torch.dtype) -> bool:
    """Whether the datasets are here and hold their captions, encoded as the run needs them."""
    try:
        return recipe.text.encoder is not None and not text_cache.partial(
            recipe.paths, recipe.text, dtype
        )
    except BadRecipe:  # without the encoder it is unknown which version of it encoded the captions
        return False


def stored(data: Data) -> int | None:
    """How many pictures the datasets hold; None unless prepared and here. Errors: BadData."""
    if not all((folder / "manifest.json").is_file() for folder in data.paths):
        return None
    return sum(len(prepared.open_dataset(folder).numbers) for folder in data.paths)


def precision(recipe: Recipe, cluster: Cluster) -> torch.dtype:
    """Precision of the blocks on a cluster; every GPU in the table is fast in bfloat16."""
    if recipe.precision == "auto" and cluster.device.name != "cpu":
        return torch.bfloat16
    return runs.precision(recipe)


def check_shares(recipe: Recipe, count: int) -> None:
    """Refuse a number of devices that does not divide every batch. Errors: BadRecipe.

    If the loss compares pictures in pairs, each device's share must be even.
    """
    runs.check_pairs(recipe, count)
    parallel.check_shares([stage.batch for stage in recipe.stage], count)


def mesh_of(recipe: Recipe, count: int) -> Mesh:
    """The mesh that [parallel] makes of `count` devices.

    Errors  BadRecipe if it does not fit that number.
    """
    replicate = recipe.parallel.dp_replicate
    shard = recipe.parallel.dp_shard or count // replicate
    if replicate * shard != count:
        best = memory.mesh_for(count)
        raise BadRecipe(
            f"parallel.dp_replicate = {replicate} with dp_shard = {recipe.parallel.dp_shard} does "
            f"not make {count} devices: give --set parallel.dp_replicate={best.replicate} "
            "--set parallel.dp_shard=0, or --fit"
        )
    return Mesh(replicate, shard)


def at_once(recipe: Recipe, stage: Stage, count: int) -> int:
    """Pictures in one pass of one device."""
    mine = stage.batch // count
    return min(recipe.micro or mine, mine)


def passes(recipe: Recipe, stage: Stage, count: int) -> int:
    """Passes of one device in a step."""
    return math.ceil(stage.batch // count / at_once(recipe, stage, count))


def held(
    recipe: Recipe, stage: Stage, mesh: Mesh, pictures: int, dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Memory by part; on a CPU that of the program itself counts too."""
    parts = memory.parts(recipe, stage, mesh, pictures, dtype, "cpu" if device == "cpu" else "cuda")
    return parts | ({"program": float(log.memory())} if device == "cpu" else {})


def communication(
    recipe: Recipe,
    mesh: Mesh,
    link: float,
    passes: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """Seconds that one device needs to exchange weights and gradients in a step."""
    inside, across = traffic(recipe, mesh, passes, dtype)
    return inside / link + across / min(link, hardware.NETWORK)


def traffic(
    recipe: Recipe, mesh: Mesh, passes: int = 1, dtype: torch.dtype = torch.bfloat16
) -> tuple[float, float]:
    """Bytes that one device sends in a step: to devices of its node, and to other nodes.

    Weights are gathered in the precision of the blocks: once a step, or with
    `reshard_after_forward` twice a pass; those of an average used as teacher, once a pass.
    Gradients are summed in float32. Each matrix is sent to the device that makes its momentum
    orthogonal and back, in the precision of the blocks.
    """
    learned = [(shape.numel(), learner) for shape, learner in flops.learned(recipe)]
    weights = sum(count for count, _ in learned)
    matrices = sum(count for count, learner in learned if learner == "muon")
    others = (mesh.shard - 1) / mesh.shard
    times = 2 * passes if recipe.parallel.reshard_after_forward else 1
    if recipe.repa is not None and recipe.repa.network is None:
        times += passes
    gathered = dtype.itemsize * times
    cut = (gathered + 4) * weights * others + 2 * dtype.itemsize * matrices / mesh.shard * others
    copied = 2 * 4 * weights / mesh.shard * (mesh.replicate - 1) / mesh.replicate
    inside, across = (cut, copied) if mesh.shard <= hardware.PER_NODE else (0.0, cut + copied)
    return (inside, across) if mesh.devices > hardware.PER_NODE else (inside + across, 0.0)


def bought(made: Plan, budget: Budget) -> float:
    """How many times the run fits into a budget. Errors: BadRecipe if not one step per stage."""
    rate = (made.dollars or 0) / made.seconds
    seconds = sum(stage.step for stage in made.stages)
    flops = sum(sum(stage.flops.values()) / stage.steps for stage in made.stages)
    start, whole, step, unit = {
        "seconds": (made.start, made.seconds, seconds, "s"),
        "dollars": (rate * made.start, made.dollars, rate * seconds, "usd"),
        "flops": (0, made.flops, flops, "flop"),
        "pictures": (0, made.pictures, sum(stage.batch for stage in made.stages), "images"),
    }[budget.kind]
    if not whole:
        raise BadRecipe(
            f"no price above 0 is known for an hour of {made.cluster.device.name}: give one with "
            "--price, or a --budget in h"
        )
    if budget.amount < (least := start + step):
        digit = 10.0 ** (math.floor(math.log10(least)) - 2)
        raise BadRecipe(
            f"a budget of {budget.amount:g} {unit} is too small for a step of each stage: give "
            f"at least --budget {math.ceil(least / digit) * digit:.4g}{unit}"
        )
    return (budget.amount - start) / (whole - start)


def times_as_long(recipe: Recipe, times: float) -> Recipe:
    """The recipe with `times` its steps, at least one in every stage."""
    steps = [max(1, int(times * stage.count * (1 + 1e-12))) for stage in recipe.stage]
    return length.lasting(recipe, steps, "--budget")
