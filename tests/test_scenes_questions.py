"""The questions: each can be drawn, asks for what it should, and stays as it is."""

import pytest

from daybreak.data import scenes
from daybreak.data.scenes import Config
from daybreak.data.scenes_captions import parse
from daybreak.evaluate.scenes_questions import SCORED, held_out, tasks

SMALL = Config(canvas="32")


@pytest.mark.parametrize("canvas", ["32", "64", "64-large"])
def test_prompts_are_in_the_grammar_and_ask_only_for_what_training_shows(canvas: str) -> None:
    config = Config.model_validate({"canvas": canvas})
    for item in tasks(config, 3, 30):
        assert parse(item.prompt) == item.specification
        assert not any(scenes.held_out(item.scene, split) for split in config.held_out)
        numbers = len(item.specification.objects), len(set(item.specification.objects))
        assert (item.specification.relation is not None) == (item.task == "position")
        if item.task == "counting":
            assert numbers in ((2, 1), (3, 1))
        elif item.task in ("two", "attribution", "position"):
            assert numbers == (2, 2)


@pytest.mark.parametrize("canvas", ["32", "64"])
def test_held_out_prompts_ask_for_what_training_never_shows(canvas: str) -> None:
    config = Config.model_validate({"canvas": canvas})
    items = held_out(config, 3, 20)
    expected = {"H1", "H2", "H3", "H4"} | ({"H5"} if canvas == "64" else set())
    assert {item.split for item in items} == expected
    for item in items:
        assert parse(item.prompt) == item.specification
        assert item.split is not None
        assert scenes.held_out(item.scene, item.split)


def test_no_two_items_share_their_noise_and_lists_only_grow() -> None:
    items = [*tasks(SMALL, 0, 50), *held_out(SMALL, 0, 50)]
    assert len({item.seed for item in items}) == len(items)
    assert all(0 <= item.seed < 1 << 63 for item in items)
    assert set(tasks(SMALL, 0, 20)) < set(items)
    assert {item.task for item in items if item.split is None} == set(SCORED)
