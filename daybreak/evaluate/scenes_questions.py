"""What a model of scenes is asked to draw, task by task.

    single        a circle                          two           a circle and a star
    colours       a red circle                      attribution   a red circle and a blue star
    counting      three blue squares                position      a red star above a blue circle
    size, three   reported apart

Prompts come from scenes, drawn like those of training at indices that training never reaches, so
every prompt can be drawn, and none outside `held_out` asks for what is held out. Tasks a recipe
cannot draw are left out.

Source  tasks after GenEval, arXiv 2310.11513.
"""

from typing import NamedTuple

import numpy as np

from daybreak.data import scenes, scenes_captions
from daybreak.data.scenes import CANVASES, Config, Demand, Scene, Split
from daybreak.data.scenes_captions import Specification
from daybreak.failure import BadRecipe

SCORED = ("single", "colours", "two", "counting", "attribution", "position")
TASKS = (*SCORED, "size", "three")
FIRST = 1 << 62  # index of the first scene that belongs to the evaluation
SEED_RULE = "an item's noise is that of its own seed: Philox(seed)'s first number >> 2, + its index"
_FORMS: dict[Split, tuple[str, ...]] = {  # the tasks whose words can express a split
    "H1": ("colours", "attribution"),
    "H2": ("counting",),
    "H3": ("position",),
    "H4": ("attribution",),
    "H5": ("counting", "three"),
}


class Item(NamedTuple):
    """One picture to ask for. `scene` is one that would pass, for the ceiling."""

    task: str
    prompt: str
    specification: Specification
    split: Split | None  # None: training shows such scenes
    seed: int  # of the noise; no two items share one
    scene: Scene


def tasks(config: Config, seed: int, per_task: int) -> list[Item]:
    """The prompts of all tasks the recipe can draw, `per_task` each, from what training shows."""
    return [
        _item(config, seed, task, None, number)
        for task in TASKS
        if _things(config, task, None)
        for number in range(per_task)
    ]


def held_out(config: Config, seed: int, per_task: int) -> list[Item]:
    """`per_task` prompts for each held-out split the canvas can draw, each naming what is new."""
    items = []
    for split in config.held_out:
        forms = [task for task in _FORMS[split] if _things(config, task, split)]
        items += [
            _item(config, seed, forms[number % len(forms)], split, number)
            for number in range(per_task if forms else 0)
        ]
    return items


def names(config: Config) -> list[str]:
    """What a score of this recipe consists of: `exact`, its tasks, and its held-out splits."""
    asked = [task for task in TASKS if _things(config, task, None)]
    splits = [
        split
        for split in config.held_out
        if any(_things(config, task, split) for task in _FORMS[split])
    ]
    return [*(["exact"] if set(asked) & set(SCORED) else []), *asked, *splits]


def _things(config: Config, task: str, split: Split | None) -> list[int]:
    """The numbers of things with which a task can be asked; none if it cannot be."""
    canvas = CANVASES[config.canvas]
    fewest, most = config.objects
    if task == "size" and len(canvas.bands) == 1:
        return []
    if split == "H5":
        return [4] if canvas.most >= 4 and most >= 3 else []  # one more than training shows
    if "H5" in config.held_out:
        most = min(most, 3)
    asks = {"single": [1], "colours": [1], "counting": [2, 3, 4], "three": [3]}.get(task, [2])
    return [n for n in asks if fewest <= n <= most]


def _item(config: Config, seed: int, task: str, split: Split | None, number: int) -> Item:
    """Item `number` of a task: a function of its arguments, whatever else is asked for."""
    numbers = _things(config, task, split)
    demand = Demand(
        things=numbers[number % len(numbers)],
        alike=task == "counting",
        relation=task == "position",
        split=split,
    )
    place = TASKS.index(task) + len(TASKS) * (1 + scenes.SPLITS.index(split) if split else 0)
    index = (place << 24 | number) << 10
    for again in range(1 << 10):
        scene = scenes.scene(config, seed, FIRST + index + again, demand)
        specification = scenes.describe(
            scene,
            colours=task not in ("single", "two"),
            sizes=task == "size",
            related=task == "position",
        )
        # Without its colour a pair may be alike and would be counted, which is another task.
        alone = len(specification.objects) == 1
        if alone or (len(set(specification.objects)) == 1) == (task == "counting"):
            break
    else:
        raise BadRecipe(f"No scene of this recipe can be asked for by the task {task!r}.")
    words = scenes_captions.write(specification, scene.dice.frame, scene.dice.synonym)
    noise = int(np.random.Philox(key=seed).random_raw() >> 2) + index
    return Item(task, words, specification, split, noise, scene)
