"""The grammar of the scenes: written and read without loss."""

import itertools

import pytest

from daybreak.data import scenes
from daybreak.data.scenes_captions import (
    FRAMES_ONE,
    RELATIONS,
    SHAPES,
    SIZES,
    Specification,
    Wanted,
    parse,
    readings,
    write,
)
from daybreak.failure import BadData


@pytest.mark.parametrize("canvas", ["32", "64"])
def test_ten_thousand_captions_say_what_was_meant_and_nothing_else(canvas: str) -> None:
    config = scenes.Config.model_validate({"canvas": canvas, "under_specified": 0.4})
    for index in range(10_000):
        scene = scenes.scene(config, 3, index)
        caption = scenes.caption(config, scene, index)
        (read,) = readings(caption)
        assert any(
            read == scenes.describe(scene, colours, sizes, related)
            for colours, sizes in itertools.product((True, False), repeat=2)
            for related in {False, scenes.relation(scene) is not None}
        ), caption


def test_every_wording_of_a_specification_is_read_back() -> None:
    circle, star = Wanted("circle", "orange", "small"), Wanted("star", None, "large")
    forms = [
        Specification((circle,)),
        Specification((Wanted("cross"),) * 2),
        Specification((star,) * 4),
        Specification((circle, star)),
        Specification((circle, circle, star)),
        *(Specification((circle, star), relation) for relation in RELATIONS),
    ]
    for specification in forms:
        wordings = {
            write(specification, frame / 50, synonym / 6)
            for frame in range(50)
            for synonym in range(6)
        }
        assert len(wordings) >= len(FRAMES_ONE) >= 4
        assert all(readings(words) == {specification} for words in wordings)


def test_captions_read_like_english() -> None:
    blue = Wanted("square", "blue")
    assert write(Specification((Wanted("circle", "orange"),))) == "an orange circle"
    assert write(Specification((blue,) * 3), frame=0.99) == "there are three blue squares"
    assert write(Specification((Wanted("cross"),) * 2)) == "two crosses"
    three = (Wanted("circle", "red"), Wanted("star", "blue"), Wanted("cross", "green"))
    assert write(Specification(three)) == "a red circle, a blue star and a green cross"
    assert (
        write(Specification((Wanted("star", "red"), blue), "left"), 0.99, 0.5)
        == "there is a red star to the left of a blue square"
    )


def test_no_two_kinds_share_a_name() -> None:
    kinds = [Wanted(shape, None, size) for shape in SHAPES for size in (None, *SIZES)]
    assert len({write(Specification((kind,))) for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(
    "words",
    [
        "a dog",
        "a circle red",
        "two circle",
        "a orange circle",
        "a circle and",
        "a circle, a star",
        "",
    ],
)
def test_words_outside_the_grammar_are_refused_with_an_example(words: str) -> None:
    with pytest.raises(BadData, match="write it like 'a red circle above a blue square'"):
        parse(words)
