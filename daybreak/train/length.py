"""A recipe made longer or shorter: new numbers of steps, and settings that depend on them.

Warm-up is shortened with its stage but never lengthened. REPA's last step and the last scene whose
caption is complete keep their relative place in the run.
"""

from collections.abc import Sequence
from typing import Any

from daybreak import config
from daybreak.config import Recipe


def lasting(recipe: Recipe, steps: Sequence[int], where: str = "length") -> Recipe:
    """The recipe with these steps for each stage, checked as a whole. Errors: BadRecipe."""
    counts = [stage.count for stage in recipe.stage]
    stages = []
    for stage, count in zip(recipe.stage, steps, strict=True):
        size = {"steps": count} if stage.samples is None else {"samples": count * stage.batch}
        warmup = round(min(1.0, count / stage.count) * stage.warmup)
        stages.append(stage.model_dump() | size | {"warmup": warmup})
    changes: dict[str, Any] = {"stage": stages}
    if recipe.repa is not None and recipe.repa.until is not None:
        until = max(1, _moved(recipe.repa.until, [1] * len(steps), counts, steps))
        changes["repa"] = recipe.repa.model_dump() | {"until": until}
    if recipe.scenes is not None and recipe.scenes.complete:
        batches = [stage.batch for stage in recipe.stage]
        complete = _moved(recipe.scenes.complete, batches, counts, steps)
        changes["scenes"] = recipe.scenes.model_dump() | {"complete": complete}
    return config.parse(recipe.model_dump() | changes, where)


def _moved(place: int, batches: Sequence[int], before: Sequence[int], after: Sequence[int]) -> int:
    """The new index of a picture of the run when the stages get new numbers of steps.

    Ends of stages map to ends of stages; between them the index scales in proportion.
    """
    left, start = place, 0
    for batch, old, new in zip(batches, before, after, strict=True):
        if left <= old * batch:
            return start + round(left * new / old)
        left -= old * batch
        start += new * batch
    return start + left  # beyond the last stage
