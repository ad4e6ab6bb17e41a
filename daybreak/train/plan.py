"""The output of `daybreak plan`: a run's estimate as tables for people, as JSON for programs."""

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from daybreak import config, host
from daybreak.config import Recipe
from daybreak.data.batches import Config as Data
from daybreak.train import budget, flops, measure
from daybreak.train.budget import Plan

TIMES = ((3600, "h"), (60, "min"), (1, "s"))
UNITS = {1e18: "EFLOP", 1e15: "PFLOP", 1e12: "TFLOP"}
BAR = 32  # characters
# Epochs above which the plan warns. The run of docs/records/emoji.md drew new combinations better
# after 155 epochs (step 4,000) than at its end, after 282, when it had memorised its pictures.
BY_HEART = 200
PRICES = "RunPod's Community Cloud, March 2026; --price changes it"


def tables(recipe: Recipe, made: Plan, times: float | None = None) -> Iterator[Table]:
    """Yield what is printed, in order; `times` is how many times a budget buys the run."""
    yield verdict(made)
    yield stages(recipe, made)
    unit = next(size for size in UNITS if made.flops >= size or size == min(UNITS))
    yield bars("arithmetic", totals(made), unit, UNITS[unit])
    yield bars(f"memory of each {made.cluster.device.name}", made.fullest, 1e9, "GB")
    notes = Table.grid(padding=(0, 2))
    for name, value in remarks(recipe, made).items():
        notes.add_row(Text(name, "bold"), value)
    if times is not None:
        notes.add_row(Text("the budget", "bold"), purchase(recipe, made, times))
    yield notes


def verdict(made: Plan) -> Table:
    """Hours, price, and whether it fits: the line to read if you read only one."""
    table = Table.grid()
    paid = f", ${dollars(made, made.seconds)}" if made.price is not None else ""
    fits, sizes = _room(made)
    table.add_row(f"{made.cluster}: {_time(made.seconds)}{paid}, {fits} ({sizes})", style="bold")
    return table


def _room(made: Plan) -> tuple[str, str]:
    """Whether it fits, and by how much."""
    sizes = f"{made.needed / 1e9:.1f} of {made.room / 1e9:.1f} GB"
    return "fits" if made.fits else "DOES NOT FIT", sizes


def stages(recipe: Recipe, made: Plan) -> Table:
    """One row for each stage, and one for all."""
    table = Table(box=None, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for name in ("steps", "batch", "GFLOP", "s/step", "img/s", "time", "$"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("limited by")
    for number, (stage, paper) in enumerate(zip(recipe.stage, made.stages, strict=True)):
        table.add_row(
            f"{number}: {paper.resolution} px",
            f"{paper.steps:,}",
            f"{paper.batch:,}",
            _three(sum(flops.work(recipe, stage, made.cached).picture.values()) / 1e9),
            _three(paper.step),
            _three(paper.batch / paper.step),
            _time(paper.whole),
            dollars(made, paper.whole),
            paper.limit,
        )
    last = _time(made.seconds), dollars(made, made.seconds), ""
    table.add_row("all", f"{recipe.steps:,}", "", "", "", "", *last, style="bold")
    return table


def bars(title: str, parts: Mapping[str, float], unit: float, name: str) -> Table:
    """Draw a bar for each part, as long as its share of the whole."""
    table = Table(box=None, pad_edge=False)
    whole = sum(parts.values())
    table.add_column(title)
    table.add_column(name, justify="right")
    table.add_column("%", justify="right")
    table.add_column("")
    for part, amount in sorted(parts.items(), key=lambda item: -item[1]):
        if amount:
            length = max(1, round(BAR * amount / whole))
            share = 100 * amount / whole
            shown = f"{share:.0f}" if share >= 0.5 else "<1"
            table.add_row(part, _three(amount / unit), shown, "█" * length if share >= 0.5 else "")
    table.add_row("all", _three(whole / unit), "", "", style="bold")
    return table


def remarks(recipe: Recipe, made: Plan) -> dict[str, str]:
    """What the figures are based on, and other useful remarks."""
    count, device = made.cluster
    fits, sizes = _room(made)
    inside, across = _traffic(recipe, made)
    price = "none known; give one with --price"
    if made.price is not None:
        price = f"${made.price:.2f} per device and hour"
        price += f" ({PRICES})" if made.price == device.price else ""
    slower = ""
    if round(100 * made.reached) < round(100 * made.share):
        slower = f", {100 * made.share:.0f} % without waiting for other devices"
    found = {
        "speed": f"{100 * made.reached:.0f} % of {_three(device.flops / 1e12)} TFLOP/s{slower} "
        f"({made.source}{_busy(made)})",
        "memory": f"{fits}: {sizes}, in passes of "
        f"{max(budget.at_once(recipe, stage, count) for stage in recipe.stage)} pictures",
        "pictures": f"{made.pictures:,}" + _epochs(recipe, made),
        "weights": f"{made.weights / 1e6:,.1f} M trained",
        "price": price,
        "captions": f"counted as {recipe.text.max_tokens} words (text.max_tokens)",
    }
    if made.start:
        found["start"] = (
            f"{_time(made.start)} of this time goes to building networks and compiling blocks"
        )
    elif recipe.compile:
        found["start"] = "not counted: compiling blocks takes time, which --measure finds out"
    if made.energy is not None:
        found["energy"] = f"{_three(made.energy)} kWh at full power"
    if count > 1:
        found["mesh"] = f"{made.mesh.replicate} x {made.mesh.shard}; each step a device sends "
        found["mesh"] += f"{inside / 1e9:.1f} GB in its node, {across / 1e9:.1f} GB to other nodes"
    busiest = max(made.stages, key=lambda paper: paper.batch / paper.step * paper.resolution**2)
    wanted = busiest.batch / count / busiest.step
    ready = 1 / measure.preparing(recipe, busiest.resolution)
    found["loader"] = (
        f"{wanted:,.0f} img/s needed per device at {busiest.resolution} px; a core here loads "
        f"{ready:,.0f}: needs data.workers = {math.ceil(wanted / ready)}, has "
        f"{recipe.data.workers}"
    )
    if made.cached:
        fastest = max(paper.batch / paper.step for paper in made.stages)
        caption = recipe.text.max_tokens * flops.text_encoder(recipe).width
        read = fastest * caption * budget.precision(recipe, made.cluster).itemsize
        found["disk"] = (
            f"{read / count / 1e9:.2g} GB/s of encoded captions for each device, "
            f"{read / 1e9:.3g} GB/s for all"
        )
    if not made.cached and recipe.text.encoder is not None:
        share = totals(made)["text encoder"] / made.flops
        found["text"] = (
            f"`daybreak prepare --cache-text` would save {100 * share:.0f} % of the arithmetic"
        )
    return found


def _busy(made: Plan) -> str:
    """Whether other work was running while the CPU was measured, which makes it seem slower."""
    load = os.getloadavg()[0] / host.usable()
    busy = made.cluster.device.name == "cpu" and load > 0.5
    return f"; this machine was busy, load {load:.1f} per core: it may be faster" if busy else ""


def purchase(recipe: Recipe, made: Plan, times: float) -> str:
    """What a budget buys: how many times the run, and what that run would be."""
    bought, paper = _bought(recipe, made, times)
    sets = " ".join(f"--set {change}" for change in config.assignments(recipe, bought))
    cost = [_time(paper.seconds)]
    if paper.dollars is not None:
        cost.append(f"${paper.dollars:,.2f}")
    if paper.energy is not None:
        cost.append(f"{_three(paper.energy)} kWh")
    return (
        f"buys {_three(times)} times this run: {', '.join(cost)}, {paper.pictures:,} pictures"
        f"{_epochs(bought, paper)}{', with ' if sets else ''}{sets}"
    )


def _bought(recipe: Recipe, made: Plan, times: float) -> tuple[Recipe, Plan]:
    """The run `times` as long, and its estimate."""
    bought = budget.times_as_long(recipe, times)
    pace = zip(made.stages, bought.stage, strict=True)
    stages = tuple(old._replace(steps=new.count) for old, new in pace)
    return bought, made._replace(stages=stages)


def totals(made: Plan) -> dict[str, float]:
    """FLOPs of the whole run by part."""
    found: dict[str, float] = {}
    for stage in made.stages:
        for name, amount in stage.flops.items():
            found[name] = found.get(name, 0.0) + amount
    return found


def facts(recipe: Recipe, made: Plan, times: float | None = None) -> dict[str, Any]:
    """Everything as plain values; units are seconds, dollars, FLOP, bytes and kWh."""
    inside, across = _traffic(recipe, made)
    found: dict[str, Any] = {
        "devices": {"count": made.cluster.number, **made.cluster.device._asdict()},
        "mesh": made.mesh._asdict(),
        "share_of_peak": made.reached,
        "share_of_arithmetic": made.share,
        "share_from": made.source,
        "weights": made.weights,
        "flops": totals(made),
        "pictures": made.pictures,
        "seconds": made.seconds,
        "start": made.start,
        "device_hours": made.device_hours,
        "price": made.price,
        "dollars": made.dollars,
        "energy": made.energy,
        "memory": made.fullest,
        "room": made.room,
        "fits": made.fits,
        "traffic": {"inside": inside, "across": across},
        "stages": [
            {**stage._asdict(), "step": stage.step, "limit": stage.limit} for stage in made.stages
        ],
    }
    if times is None:
        return found
    recipe, paper = _bought(recipe, made, times)
    bought = {
        "times": times,
        "steps": [stage.count for stage in recipe.stage],
        "pictures": paper.pictures,
        "seconds": paper.seconds,
        "dollars": paper.dollars,
        "energy": paper.energy,
    }
    return found | {"budget_buys": bought}


def dollars(made: Plan, seconds: float) -> str:
    """Price of all devices for that many seconds; with cents if it is small."""
    if made.price is None:
        return "-"
    paid = made.price * made.cluster.number * seconds / 3600
    return f"{paid:,.0f}" if paid >= 100 else f"{paid:.2f}"


def _traffic(recipe: Recipe, made: Plan) -> tuple[float, float]:
    """Bytes that a device sends in a step, in the stage with the most passes per step."""
    count = made.cluster.number
    most = max(budget.passes(recipe, stage, count) for stage in recipe.stage)
    return budget.traffic(recipe, made.mesh, most, budget.precision(recipe, made.cluster))


def _epochs(recipe: Recipe, made: Plan) -> str:
    """How often the run sees its pictures, if their number is known."""
    seen: dict[Data, int] = defaultdict(int)
    for stage, paper in zip(recipe.stage, made.stages, strict=True):
        seen[recipe.data_of(stage)] += paper.steps * paper.batch
    there = {data: budget.stored(data) for data in seen}
    times = [(seen[data] / count, count) for data, count in there.items() if count]
    said = ", then ".join(f"{_three(often)} times each of {count:,}" for often, count in times)
    known = f" (past some {BY_HEART} times a model knows them by heart)"
    return (f": {said}" if said else "") + known * any(often > BY_HEART for often, _ in times)


def _time(seconds: float) -> str:
    """A duration, with three significant digits."""
    size, unit = next((size, unit) for size, unit in TIMES if seconds >= size or size == 1)
    return f"{_three(seconds / size)} {unit}"


def _three(amount: float) -> str:
    """A number with three significant digits."""
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:.3g}"
