"""Whether a run fits its devices, and if not, the smallest change that makes it fit.

Tried in this order: fewer pictures in a pass, blocks that recompute their activations, devices with
more memory, more devices, a narrower network.
"""

import math
from bisect import bisect
from collections.abc import Iterator
from pathlib import Path

from daybreak.config import Recipe
from daybreak.data.prepared import is_prepared, open_dataset
from daybreak.failure import BadRecipe
from daybreak.train import budget, hardware, memory
from daybreak.train.hardware import Cluster


def check_memory(recipe: Recipe, made: budget.Plan) -> None:
    """Refuse a run that does not fit. Errors: BadRecipe, with the smallest change that helps."""
    if made.fits:
        return
    device = made.cluster.device
    remedy = next(remedies(recipe, made.cluster), None) or (
        f"no micro is small enough on {made.cluster}, nor on any GPU in the table: "
        + (narrower(recipe, made.cluster) or "use smaller teachers or a smaller text encoder")
    )
    wants, has = f"{made.needed / hardware.GB:.1f} GB", f"{made.room / hardware.GB:.1f} GB"
    raise BadRecipe(
        f"a run of this recipe needs {wants} of memory on each {device.name}, which offers {has}: "
        f"{remedy}"
    )


def check_data(recipe: Recipe) -> None:
    """Refuse a prepared dataset (if it is here) too small for a stage. Errors: BadRecipe."""
    largest: dict[Path, int] = {}
    for stage in recipe.stage:
        for folder in recipe.data_of(stage).paths:
            largest[folder] = max(stage.resolution, largest.get(folder, 0))
    for folder, resolution in largest.items():
        if is_prepared(folder):
            open_dataset(folder).check(resolution)


def remedies(recipe: Recipe, first: Cluster) -> Iterator[str]:
    """What would fit, from the smallest change to the largest."""
    for cluster in clusters(recipe, first):
        place = "" if cluster == first else f"{cluster} with "
        there = recipe if cluster.number == first.number else spread(recipe, cluster)
        for changed, words in ((there, ""), (recomputing(there), "--set parallel.recompute=true ")):
            if smaller := largest_pass(changed, cluster):
                yield f"{place}{words}--set micro={smaller} would fit"


def narrower(recipe: Recipe, cluster: Cluster) -> str | None:
    """The largest width that fits, with heads as wide as now and blocks recomputed."""
    size, again = recipe.dit, recomputing(recipe)

    def pass_of(heads: int) -> int | None:
        changed = size.model_copy(update={"width": heads * size.head_width, "heads": heads})
        return largest_pass(again.model_copy(update={"dit": changed}), cluster)

    heads = bisect(range(1, size.heads), False, key=lambda heads: pass_of(heads) is None)
    if not heads:
        return None
    return (
        f"--set dit.width={heads * size.head_width} --set dit.heads={heads} "
        f"--set parallel.recompute=true --set micro={pass_of(heads)} would fit"
    )


def clusters(recipe: Recipe, first: Cluster) -> Iterator[Cluster]:
    """Yield these devices, then as many larger ones, then more of the same kind."""
    count, device = first
    yield first
    for other in sorted(hardware.DEVICES.values(), key=lambda device: device.memory):
        if other.memory > device.memory:
            yield Cluster(count, other)
    common = math.gcd(*(stage.batch for stage in recipe.stage))
    for more in range(count + 1, common + 1):
        if common % more == 0 and device.name != "cpu":
            yield Cluster(more, device)


def spread(recipe: Recipe, cluster: Cluster) -> Recipe:
    """The recipe with a mesh for these devices."""
    mesh = {"dp_replicate": memory.mesh_for(cluster.number).replicate, "dp_shard": 0}
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=mesh)})


def fitted(recipe: Recipe, cluster: Cluster) -> Recipe:
    """The recipe with a mesh for these devices, and the largest passes that fit them.

    If none fits, blocks are recomputed, which takes them a third more time.

    Errors  BadRecipe if none fits even then.
    """
    budget.check_shares(recipe, cluster.number)
    recipe = spread(recipe, cluster)
    pictures = largest_pass(recipe, cluster)
    if pictures is None:
        recipe = recomputing(recipe)
        pictures = largest_pass(recipe, cluster)
    if pictures is None:
        check_memory(recipe, budget.plan(recipe, cluster))  # refuses
    return recipe.model_copy(update={"micro": pictures})


def recomputing(recipe: Recipe) -> Recipe:
    """The recipe with blocks that drop their activations and compute them again."""
    parallel = recipe.parallel.model_copy(update={"recompute": True})
    return recipe.model_copy(update={"parallel": parallel})


def largest_pass(recipe: Recipe, cluster: Cluster) -> int | None:
    """The most pictures that a device can take at once, the same in every pass of a stage.

    If the loss compares pictures in pairs, it is an even number.
    """
    count, device = cluster
    mesh, dtype = budget.mesh_of(recipe, count), budget.precision(recipe, cluster)
    shares = [stage.batch // count for stage in recipe.stage]
    largest = max(shares)
    small = [part for part in range(1, math.isqrt(largest) + 1) if largest % part == 0]
    for pictures in sorted({*small, *(largest // part for part in small)}, reverse=True):
        taken = [min(pictures, mine) for mine in shares]
        if any(mine % one for mine, one in zip(shares, taken, strict=True)):
            continue
        if recipe.contrastive and any(one % 2 for one in taken):
            continue
        if all(
            sum(budget.held(recipe, stage, mesh, one, dtype, device.name).values())
            <= budget.FILL * device.memory
            for stage, one in zip(recipe.stage, taken, strict=True)
        ):
            return pictures
    return None
