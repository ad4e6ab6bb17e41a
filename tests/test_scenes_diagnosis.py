"""What is taken for what, and how near a picture is to what was found in it."""

import numpy as np
import pytest
from scipy import ndimage

from daybreak.data import scenes
from daybreak.data.scenes import CANVASES, Config, Scene, Thing
from daybreak.data.scenes_captions import parse
from daybreak.evaluate.scenes_checker import Detection, detect
from daybreak.evaluate.scenes_diagnosis import (
    Confusion,
    confusions,
    leftover,
    matrices,
    psnr,
    well_formed,
)


def drawn(*things: Thing, canvas: str = "32") -> Detection:
    scene = Scene(canvas, things, 90.0, scenes.Dice(0, 0, 0, 0, 0, 0))
    return detect(scenes.render(scene), canvas)


STAR = Thing("star", "red", None, 16.0, 8.0, 5.5)
CIRCLE = Thing("circle", "blue", None, 15.0, 24.0, 5.5)


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("a red star above a blue circle", []),
        ("a blue circle and a red star", []),
        ("a circle and a star", []),
        ("a red star left of a blue circle", [("relation", "left", "above")]),
        ("a red star above a green circle", [("colours", "green", "blue")]),
        ("a red star above a blue cross", [("shapes", "cross", "circle")]),
        ("a red star", [("count", "1", "2")]),
        ("a red star and a red star", [("shapes", "star", "circle"), ("colours", "red", "blue")]),
    ],
)
def test_what_is_wrong_is_named(words: str, wrong: list[tuple[str, str, str]]) -> None:
    found = confusions(drawn(STAR, CIRCLE), parse(words))
    assert [one for one in found if one.wanted != one.seen] == [Confusion(*one) for one in wrong]


def test_only_what_is_stated_is_compared() -> None:
    found = confusions(drawn(STAR, CIRCLE), parse("a circle and a star"))
    assert [one.attribute for one in found] == ["count", "shapes", "shapes"]


def test_where_the_number_is_wrong_nothing_else_is_compared() -> None:
    for words in ("a red star", "three red stars"):
        assert len(confusions(drawn(STAR, CIRCLE), parse(words))) == 1


@pytest.mark.parametrize(
    ("x", "y", "seen"), [(8.0, 24.0, "above"), (24.0, 8.0, "left"), (22.5, 24.0, "above")]
)
def test_the_longer_offset_names_the_relation(x: float, y: float, seen: str) -> None:
    """The star stands at (7, 7)."""
    pair = STAR._replace(x=7.0, y=7.0), CIRCLE._replace(x=x, y=y)
    found = confusions(drawn(*pair), parse("a red star right of a blue circle"))
    assert found[-1] == Confusion("relation", "right", seen)


def test_sizes_are_compared_where_there_are_two() -> None:
    small = Thing("star", "red", "small", 32.0, 32.0, 6.5)
    found = confusions(drawn(small, canvas="64"), parse("a large red star"))
    assert found[-1] == Confusion("sizes", "large", "small")


def test_matrices_count_all_of_it() -> None:
    found = confusions(drawn(STAR, CIRCLE), parse("a red star above a green circle"))
    assert matrices(found * 3) == {
        "colours": {"green": {"blue": 3}, "red": {"red": 3}},
        "count": {"2": {"2": 3}},
        "relation": {"above": {"above": 3}},
        "shapes": {"circle": {"circle": 3}, "star": {"star": 3}},
    }


@pytest.mark.parametrize("canvas", list(CANVASES))
def test_true_renders_are_near_what_is_found_in_them(canvas: str) -> None:
    config = Config.model_validate({"canvas": canvas})
    for index in range(8):
        picture = scenes.sample(config, 0, index).image
        assert 30 < psnr(picture, detect(picture, canvas)) < 60


def test_smeared_and_noisy_pictures_are_farther() -> None:
    rng = np.random.default_rng(0)
    for index in range(8):
        picture = scenes.sample(Config(canvas="32"), 0, index).image
        soft = np.rint(ndimage.gaussian_filter(picture.astype(float), (1, 1, 0))).astype(np.uint8)
        noisy = np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
        clean = psnr(picture, detect(picture, "32"))
        assert psnr(soft, detect(soft, "32")) < clean - 5
        # Noise of deviation 8 alone is 30 dB.
        assert psnr(noisy, detect(noisy, "32")) == pytest.approx(30, abs=1.5)


def test_things_at_the_border_are_drawn_as_far_as_they_reach() -> None:
    cut = np.full((32, 32, 3), 90, dtype=np.uint8)
    whole = scenes.render(
        Scene("32", (STAR._replace(y=16.0),), 90.0, scenes.Dice(0, 0, 0, 0, 0, 0))
    )
    cut[:20] = whole[12:]
    assert psnr(cut, detect(cut, "32")) > 15


def test_an_empty_picture_is_exactly_as_found() -> None:
    grey = np.full((32, 32, 3), 90, dtype=np.uint8)
    seen = detect(grey, "32")
    assert psnr(grey, seen) == pytest.approx(58.9, abs=0.1)
    assert not well_formed(seen.things)


def test_specks_are_left_over() -> None:
    picture = np.full((32, 32, 3), 90, dtype=np.uint8)
    picture[10:13, 10:13] = 255
    seen = detect(picture, "32")
    assert 9 / 1024 <= leftover(seen, "32") <= 25 / 1024
    assert well_formed(drawn(STAR).things)
