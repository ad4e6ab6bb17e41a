"""Controls know a copyist, a monomaniac and a true painter apart."""

import json
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest

from daybreak.data import scenes
from daybreak.data.scenes import Config, Demand, Scene
from daybreak.data.scenes_captions import Specification, Wanted, parse
from daybreak.evaluate import scenes_controls
from daybreak.evaluate.scenes_controls import evaluate, search, table
from daybreak.evaluate.scenes_questions import tasks
from daybreak.failure import BadRecipe
from daybreak.train.dice import key

Pictures = npt.NDArray[np.uint8]
CONFIG = Config(canvas="32")
TRAINED, PROMPTS, TRAINING = 8, 12, 4_000


def meets(scene: Scene, wanted: Specification) -> bool:
    shapes = sorted(thing.shape for thing in scene.things)
    return shapes == sorted(one.shape for one in wanted.objects)


def painter(prompts: list[str], seeds: list[int]) -> Pictures:
    """Draws a new true scene of the right shapes from each seed; anything for no prompt."""
    pictures = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        wanted = parse(prompt or "a circle")
        demand = Demand(things=len(wanted.objects))
        index = key(seed) >> 2
        scene = scenes.scene(CONFIG, 77, index, demand)
        while not meets(scene, wanted):
            index += 1
            scene = scenes.scene(CONFIG, 77, index, demand)
        pictures.append(scenes.render(scene))
    return np.stack(pictures)


@cache
def training_set() -> list[scenes.Sample]:
    return [scenes.sample(CONFIG, TRAINED, index) for index in range(TRAINING)]


def copyist(prompts: list[str], seeds: list[int]) -> Pictures:
    """Remembers one training picture for each prompt."""
    pictures = []
    for prompt in prompts:
        wanted = parse(prompt or "a circle")
        pictures.append(next(s.image for s in training_set() if meets(s.scene, wanted)))
    return np.stack(pictures)


def smear(prompts: list[str], seeds: list[int]) -> Pictures:
    return np.full((len(prompts), 32, 32, 3), 90, dtype=np.uint8)


@pytest.fixture(scope="module")
def painted() -> dict[str, object]:
    return evaluate(painter, CONFIG, 5, TRAINED, PROMPTS, TRAINING)


def at(result: object, path: str) -> float:
    for part in path.split("."):
        assert isinstance(result, dict)
        result = result[part]
    assert isinstance(result, float | int)
    return result


def test_a_painter_of_true_scenes_stands_where_truth_does(painted: dict[str, object]) -> None:
    assert at(painted, "diversity.n") == 4 * PROMPTS
    assert at(painted, "diversity.spread") == pytest.approx(1, abs=0.25)
    for name in ("across", "down", "radius"):
        assert at(painted, f"diversity.{name}.p") > 0.01
    assert at(painted, "diversity.colours.distance") < 1.6 * at(
        painted, "diversity.colours.by_chance"
    )
    assert at(painted, "memorisation.median") == pytest.approx(
        at(painted, "memorisation.fresh_median"), rel=0.2
    )
    assert at(painted, "memorisation.near.low") < 0.05 < at(painted, "memorisation.near.high")
    assert at(painted, "unconditional.well_formed.exact") == 1


def test_no_prompt_passes_as_often_as_chance_has_it(painted: dict[str, object]) -> None:
    """One circle meets those of `single` that ask for it, and of other tasks next to none."""
    single = [item for item in tasks(CONFIG, 5, PROMPTS) if item.task == "single"]
    circles = sum(item.specification.objects[0].shape == "circle" for item in single)
    chance = circles / len(single) / 6
    assert at(painted, "unconditional.passed.exact") == pytest.approx(chance, abs=0.02)


def test_a_copyist_is_found_out() -> None:
    result = evaluate(copyist, CONFIG, 5, TRAINED, PROMPTS, TRAINING)
    assert at(result, "memorisation.median") < 0.1
    assert at(result, "memorisation.near.exact") == 1
    assert at(result, "diversity.spread") == pytest.approx(0, abs=1e-6)
    assert at(result, "diversity.colours.distance") > 2 * at(result, "diversity.colours.by_chance")


def test_a_model_that_draws_nothing_has_nothing_to_vary() -> None:
    result = evaluate(smear, CONFIG, 5, TRAINED, 4, 200)
    diversity = result["diversity"]
    assert (diversity["n"], diversity["spread"], diversity["across"]["p"]) == (0, None, None)
    assert result["unconditional"]["well_formed"]["exact"] == 0
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert ("one prompt: spread of centres", "-", "1") in table(result)


def test_the_nearest_caption_knows_what_training_showed_and_nothing_else(
    painted: dict[str, object],
) -> None:
    assert at(painted, "retrieval.tasks.single.exact") > 0.9
    assert at(painted, "retrieval.tasks.colours.exact") > 0.9
    for split in ("H1", "H2", "H3", "H4"):
        assert at(painted, f"retrieval.held_out.{split}.exact") < 0.2


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("a red circle left of a blue star", "a blue star to the right of a red circle"),
        ("a circle and a cross", "a cross and a circle"),
        ("two red stars", "there are two red stars"),
    ],
)
def test_captions_that_say_the_same_are_nearest(prompt: str, caption: str) -> None:
    same, asked = parse(caption), parse(prompt)
    places = {feature: i for i, feature in enumerate(scenes_controls._features(asked))}
    others = [
        Specification((Wanted("circle", "blue"), Wanted("star", "red")), "left"),
        Specification((Wanted("circle"), Wanted("circle"))),
        Specification((Wanted("star", "red"),) * 3),
    ]
    rows = scenes_controls._rows([same, *others], places)
    alike = (rows @ scenes_controls._rows([asked], places).T).toarray()[:, 0]
    assert alike[0] == pytest.approx(1)
    assert (alike[1:] < 0.95).all()


@pytest.mark.parametrize("canvas", ["32", "64-large"])
def test_a_training_picture_is_found_and_is_the_nearest(canvas: str) -> None:
    config = Config.model_validate({"canvas": canvas})
    pictures = np.stack([scenes.sample(config, 3, index).image for index in (7, 2_500, 9_999)])
    found = search(config, 3, pictures, [parse("a circle")], 3_000)
    assert found.distances[:2] == pytest.approx(0, abs=0.05)
    assert found.distances[2] > 1
    every = np.stack([scenes.sample(config, 3, index).image for index in range(3_000)])
    small = every.reshape(3_000, 32, every.shape[1] // 32, 32, -1, 3).mean((2, 4))
    mine = pictures[2].reshape(32, every.shape[1] // 32, 32, -1, 3).mean((1, 3))
    nearest = np.sqrt(np.square(small - mine).mean((1, 2, 3)).min())
    assert found.distances[2] == pytest.approx(nearest, rel=1e-2)


def test_pictures_of_one_prompt_each_have_their_own_noise() -> None:
    seeds: list[int] = []

    def listening(prompts: list[str], given: list[int]) -> Pictures:
        seeds.extend(given)
        return smear(prompts, given)

    evaluate(listening, CONFIG, 5, TRAINED, 4, 200)
    assert len(set(seeds)) == len(seeds) == 2 * 4 * 4 + 4
    assert not set(seeds) & {item.seed for item in tasks(CONFIG, 5, 4) if item.task == "colours"}


def test_a_recipe_without_small_scenes_has_no_controls() -> None:
    config = Config.model_validate({"canvas": "64", "objects": (3, 3)})
    with pytest.raises(BadRecipe, match="allows neither"):
        evaluate(smear, config, 5, TRAINED, 4, 200)


def test_a_table_says_what_to_hold_each_figure_against(painted: dict[str, object]) -> None:
    rows = table(painted)
    assert all(all(isinstance(cell, str) and cell for cell in row) for row in rows)
    assert rows[-1][0] == "among the nearest"
    assert rows[-1][2] == "5.0 %"
