"""Scenes: reproducible, spaced, and closed to what is held out."""

import itertools
from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from daybreak.data import scenes
from daybreak.data.scenes import CANVASES, Config, Demand, Scene, Thing
from daybreak.data.scenes_captions import COLOURS, SHAPES, parse
from daybreak.failure import BadRecipe

EVERY_CANVAS = [Config.model_validate({"canvas": name}) for name in CANVASES]
NO_DICE = scenes.Dice(0, 0, 0, 0, 0, 0)


def of(canvas: str, *things: Thing) -> Scene:
    return Scene(canvas, things, 90.0, NO_DICE)


def test_a_scene_depends_on_its_seed_and_index_alone() -> None:
    config = Config(canvas="32")
    forth = [scenes.sample(config, 7, index) for index in range(20)]
    back = [scenes.sample(config, 7, index) for index in reversed(range(20))][::-1]
    for one, other in zip(forth, back, strict=True):
        assert one.scene == other.scene
        assert one.caption == other.caption
        assert np.array_equal(one.image, other.image)
    assert scenes.scene(config, 8, 0) != forth[0].scene
    assert len({sample.scene for sample in forth}) == 20


def test_the_first_scene_is_what_it_was_when_the_benchmark_was_frozen() -> None:
    sample = scenes.sample(Config(canvas="32"), 0, 0)
    assert (sample.caption, int(sample.image.sum())) == (
        "there is an orange circle",
        277_353,
    )


def test_a_seed_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="must be in 0"):
        scenes.scene(Config(), -1, 0)


def matches(config: Config, number: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for index in range(number):
        scene = scenes.scene(config, 11, index)
        found.update(split for split in scenes.SPLITS if scenes.held_out(scene, split))
    return found


@pytest.mark.parametrize("config", EVERY_CANVAS, ids=list(CANVASES))
def test_nothing_held_out_is_in_three_thousand_training_scenes(config: Config) -> None:
    assert matches(config, 3_000) == Counter()


@pytest.mark.slow
@pytest.mark.parametrize("config", EVERY_CANVAS, ids=list(CANVASES))
def test_nothing_held_out_is_in_a_hundred_thousand_training_scenes(config: Config) -> None:
    assert matches(config, 100_000) == Counter()


def test_without_held_out_splits_all_of_them_turn_up() -> None:
    assert set(matches(Config(canvas="64", held_out=()), 2_000)) == set(scenes.SPLITS)


@pytest.mark.parametrize("split", ["H1", "H2", "H3", "H4", "H5"])
def test_a_demanded_split_comes_alone(split: scenes.Split) -> None:
    demand = Demand(things=4 if split == "H5" else 2, split=split)
    for index in range(30):
        scene = scenes.scene(Config(canvas="64"), 5, index, demand)
        assert [s for s in scenes.SPLITS if scenes.held_out(scene, s)] == [split]


def test_a_demand_nothing_can_meet_is_refused() -> None:
    with pytest.raises(BadRecipe, match="No scene of canvas '32'"):
        scenes.scene(Config(canvas="32"), 0, 0, Demand(things=1, split="H2"))


def test_every_shape_keeps_its_colours_and_every_colour_its_shapes() -> None:
    kept = [
        (shape, colour)
        for shape, colour in itertools.product(SHAPES, COLOURS)
        if not scenes.held_out(of("64", Thing(shape, colour, None, 30, 30, 6)), "H1")
    ]
    assert len(kept) == 32
    assert all(count >= 6 for count in Counter(shape for shape, _ in kept).values())
    assert all(count == 4 for count in Counter(colour for _, colour in kept).values())


def test_swaps_hold_out_one_of_the_two_ways_to_give_out_colours() -> None:
    held = 0
    for one, other in itertools.combinations(SHAPES, 2):
        for first, second in itertools.combinations(COLOURS, 2):
            ways = [
                scenes.held_out(
                    of("64", Thing(one, a, None, 20, 20, 6), Thing(other, b, None, 40, 40, 6)), "H4"
                )
                for a, b in ((first, second), (second, first))
            ]
            assert not all(ways)
            held += sum(ways)
    assert held == 10 * 28 // 4


def test_a_relation_is_held_out_whichever_thing_comes_first() -> None:
    red = Thing("circle", "red", None, 20, 30, 6)
    yellow = Thing("star", "yellow", None, 45, 30, 6)
    assert scenes.held_out(of("64", red, yellow), "H3")
    assert scenes.held_out(of("64", yellow, red), "H3")
    assert not scenes.held_out(of("64", red._replace(x=45), yellow._replace(x=20)), "H3")


@pytest.mark.parametrize(
    "words",
    [
        "a red circle",
        "three blue squares",
        "a red circle and a blue star",
        "a red star above a blue circle",
        "a red circle above a blue square",
        "a small red circle and a large blue star",
        "a red circle, a blue star and a green cross",
    ],
)
def test_what_the_documentation_shows_is_not_held_out(words: str) -> None:
    specification = parse(words)
    things = tuple(
        Thing(wanted.shape, wanted.colour or "red", wanted.size, 20.0, 15.0 + 12 * place, 6.0)
        for place, wanted in enumerate(specification.objects)
    )
    assert not any(scenes.held_out(of("64", *things), split) for split in scenes.SPLITS)


@pytest.mark.parametrize("config", EVERY_CANVAS, ids=list(CANVASES))
def test_things_keep_their_distance_and_stay_on_the_canvas(config: Config) -> None:
    canvas = CANVASES[config.canvas]
    for index in range(1_000):
        things = scenes.scene(config, 2, index).things
        for one, other in itertools.combinations(things, 2):
            apart = np.hypot(one.x - other.x, one.y - other.y)
            assert apart > 1.2 * (one.radius + other.radius) + canvas.gap
        for thing in things:
            band = canvas.bands[0 if thing.size != "large" else 1]
            assert band[0] - 1e-9 <= thing.radius <= band[1] + 1e-9
            reach = 1.2 * thing.radius + 1
            for centre in (thing.x, thing.y):
                assert reach - 1e-9 <= centre <= canvas.size - 1 - reach + 1e-9


def test_a_picture_is_background_and_the_stored_colours() -> None:
    thing = Thing("square", "yellow", None, 15.5, 15.5, 6.0)
    picture = scenes.render(of("32", thing))
    assert picture.shape == (32, 32, 3)
    assert picture[15, 15].tolist() == [240, 220, 50]
    assert picture[0, 0].tolist() == [90, 90, 90]


@pytest.mark.parametrize("canvas", ["32", "64", "64-large", "128"])
def test_scenes_drawn_together_look_as_they_do_alone(canvas: str) -> None:
    config = Config.model_validate({"canvas": canvas, "held_out": ()})
    drawn = [scenes.scene(config, 3, index) for index in range(60)]
    alone = np.stack([scenes.render(scene) for scene in drawn])
    assert np.array_equal(scenes.renders(drawn), alone)


def test_the_training_set_has_every_form_of_caption_in_a_useful_share() -> None:
    config = Config(canvas="32")
    drawn = [scenes.sample(config, 1, index) for index in range(4_000)]
    specifications = [parse(sample.caption) for sample in drawn]
    several = [s for s in specifications if len(s.objects) == 2]
    counted = sum(len(set(s.objects)) == 1 for s in several) / 4_000
    related = sum(s.relation is not None for s in several) / 4_000
    bare = sum(s.objects[0].colour is None for s in specifications) / 4_000
    assert len(several) / 4_000 == pytest.approx(0.65, abs=0.03)
    assert 0.10 < counted < 0.18
    assert 0.15 < related < 0.25
    assert bare == pytest.approx(config.under_specified, abs=0.03)
    assert max(len(sample.caption.split()) for sample in drawn) <= 14


def test_the_first_scenes_may_leave_nothing_out_and_are_otherwise_the_same() -> None:
    usual, complete = Config(canvas="32"), Config(canvas="32", complete=300)
    for index in range(600):
        one, other = (scenes.sample(config, 1, index) for config in (usual, complete))
        assert one.scene == other.scene
        if index >= 300:
            assert one.caption == other.caption
        else:
            assert all(wanted.colour for wanted in parse(other.caption).objects)


def test_a_relation_is_only_put_into_words_where_it_is_plain() -> None:
    config = Config(canvas="64-large")
    for index in range(2_000):
        sample = scenes.sample(config, 4, index)
        if parse(sample.caption).relation is not None:
            one, other = sample.scene.things
            assert abs(abs(one.x - other.x) - abs(one.y - other.y)) >= 6


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"canvas": "32", "objects": (1, 3)}, "holds 1 to 2 objects"),
        ({"canvas": "64", "objects": (3, 1)}, "give the fewest"),
        ({"canvas": "64", "objects": (4, 4)}, "leaves nothing to train on"),
        ({"canvas": "65"}, "'32', '64', '64-large' or '128'"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_a_section_that_cannot_be_drawn_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Config.model_validate(values)


def test_the_objects_of_a_recipe_default_to_those_of_its_canvas() -> None:
    assert Config(canvas="32").objects == (1, 2)
    assert Config().objects == (1, 4)


def test_a_canvas_may_be_named_by_its_number() -> None:
    numbered = Config.model_validate({"canvas": 32})
    assert numbered == Config(canvas="32")
    assert numbered.objects == (1, 2)
    for wrong in (65, True, 32.0):
        with pytest.raises(ValidationError, match="'64-large'"):
            Config.model_validate({"canvas": wrong})
