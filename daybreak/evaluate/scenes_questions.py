"""The evaluation prompts for models of scenes, by task.

    single        a circle                          two           a circle and a star
    colours       a red circle                      attribution   a red circle and a blue star
    counting      three blue squares                position      a red star above a blue circle
    size, three   reported separately

Prompts describe scenes that are generated like those of training, at indices that training never
reaches. So every prompt can be drawn, and only those of `held_out` ask for held-out combinations.
Tasks whose scenes the recipe does not generate are left out.

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
FIRST = 1 << 62  # index of the first scene of the evaluation
SEED_RULE = "an item's noise is that of its own seed: Philox(seed)'s first number >> 2, + its index"
_FORMS: dict[Split, tuple[str, ...]] = {  # the tasks whose words can express a split
    "H1": ("colours", "attribution"),
    "H2": ("counting",),
    "H3": ("position",),
    "H4": ("attribution",),
    "H5": ("counting", "three"),
}


class Item(NamedTuple):
    """A prompt. `scene` is a true scene that shows it, for the upper bound of the score."""

    task: str
    prompt: str
    specification: Specification
    split: Split | None  # None: training contains such scenes
    seed: int  # of the noise; unique
    scene: Scene


def tasks(config: Config, seed: int, per_task: int) -> list[Item]:
    """`per_task` prompts for each task of the recipe, about combinations that training contains."""
    return [
        _item(config, seed, task, None, number)
        for task in TASKS
        if _things(config, task, None)
        for number in range(per_task)
    ]


def held_out(config: Config, seed: int, per_task: int) -> list[Item]:
    """`per_task` prompts for each held-out split of the recipe; each names the new combination."""
    items = []
    for split in config.held_out:
        forms = [task for task in _FORMS[split] if _things(config, task, split)]
        items += [
            _item(config, seed, forms[number % len(forms)], split, number)
            for number in range(per_task if forms else 0)
        ]
    return items


def names(config: Config) -> list[str]:
    """The values of this recipe's score: `exact`, its tasks, and its held-out splits."""
    asked = [task for task in TASKS if _things(config, task, None)]
    splits = [
        split
        for split in config.held_out
        if any(_things(config, task, split) for task in _FORMS[split])
    ]
    return [*(["exact"] if set(asked) & set(SCORED) else []), *asked, *splits]


def _things(config: Config, task: str, split: Split | None) -> list[int]:
    """The numbers of things that a task's scenes can have; empty if the task is impossible."""
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
    """Item `number` of a task, which depends only on the arguments."""
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
        # Without colours the two may be equal; they would be counted, as in another task.
        alone = len(specification.objects) == 1
        if alone or (len(set(specification.objects)) == 1) == (task == "counting"):
            break
    else:
        raise BadRecipe(f"No scene of this recipe can be asked for by the task {task!r}.")
    words = scenes_captions.write(specification, scene.dice.frame, scene.dice.synonym)
    noise = int(np.random.Philox(key=seed).random_raw() >> 2) + index
    return Item(task, words, specification, split, noise, scene)
