"""Examples: the same pictures in every call, each once, in the shapes a model can draw."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from daybreak.data import scenes
from daybreak.evaluate import examples
from daybreak.failure import BadData

CONFIG = scenes.Config(canvas="32")
SHAPES = ("64x64", "32x128", "128x32")


def dataset(prepared: Callable[..., Path], count: int = 30) -> Path:
    rows = [{"bucket": SHAPES[n % 3], "captions": [f"number {n}"]} for n in range(count)]
    return prepared(rows)


def test_scenes_are_fresh_and_the_same_in_every_call() -> None:
    found = examples.of_scenes(CONFIG, 3, 70)
    first, second = list(found.read()), list(found.read())
    assert [len(batch.captions) for batch in first] == [64, 6]
    assert [batch.first for batch in first] == [0, 64]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.pictures, other.pictures)
        assert one.captions == other.captions
    trained = {scenes.sample(CONFIG, 3, index).image.tobytes() for index in range(200)}
    assert not trained & {picture.tobytes() for picture in first[0].pictures}


def test_fewer_examples_are_the_first_of_more() -> None:
    few, many = (examples.of_scenes(CONFIG, 3, n).read() for n in (10, 40))
    np.testing.assert_array_equal(next(few).pictures, next(many).pictures[:10])


def test_every_picture_of_a_dataset_comes_once_and_in_its_own_shape(
    prepared: Callable[..., Path],
) -> None:
    found = examples.of_dataset(dataset(prepared), 64, 16, 0, 30)
    batches = list(found.read())
    captions = [caption for batch in batches for caption in batch.captions]
    assert sorted(captions) == sorted(f"number {n}" for n in range(30))
    assert sorted(batch.pictures.shape[1:3] for batch in batches) == [
        (32, 128),
        (64, 64),
        (128, 32),
    ]
    assert [batch.first for batch in batches] == [0, 10, 20]


def test_a_smaller_model_sees_the_same_pictures_smaller(prepared: Callable[..., Path]) -> None:
    folder = dataset(prepared)
    small = list(examples.of_dataset(folder, 32, 8, 0, 30).read())
    assert sorted(batch.pictures.shape[1:3] for batch in small) == [(16, 64), (32, 32), (64, 16)]


def test_a_part_of_a_dataset_is_drawn_from_all_of_it(prepared: Callable[..., Path]) -> None:
    folder = dataset(prepared)
    both = (examples.of_dataset(folder, 64, 16, seed, 12) for seed in (0, 1))
    some, others = ({c for batch in one.read() for c in batch.captions} for one in both)
    assert len(some) == 12
    assert some != {f"number {n}" for n in range(12)}
    assert some != others


def test_the_digest_names_what_decides_the_pictures(prepared: Callable[..., Path]) -> None:
    folder = dataset(prepared)
    known = examples.of_dataset(folder, 64, 16, 0, 30).digest
    assert examples.of_dataset(folder, 64, 16, 0, 30).digest == known
    others = [
        examples.of_dataset(folder, 32, 8, 0, 30),
        examples.of_dataset(folder, 64, 16, 1, 30),
        examples.of_dataset(folder, 64, 16, 0, 29),
        examples.of_scenes(CONFIG, 0, 30),
        examples.of_scenes(scenes.Config(canvas="64"), 0, 30),
    ]
    assert len({known, *(one.digest for one in others)}) == 6


def test_too_few_pictures_are_refused_with_the_number_there_is(
    prepared: Callable[..., Path],
) -> None:
    with pytest.raises(BadData, match=r"holds 20 pictures and 34 .* ask for 20 \(--count"):
        examples.of_dataset(dataset(prepared, 20), 64, 16, 0, 34)


def test_what_no_command_can_ask_for_is_not_advised(prepared: Callable[..., Path]) -> None:
    with pytest.raises(
        BadData, match=r"holds 19 pictures and 31 are needed for the comparison: give a large"
    ):
        examples.of_dataset(dataset(prepared, 19), 64, 16, 0, 31)


def test_pictures_smaller_than_the_models_are_refused(prepared: Callable[..., Path]) -> None:
    with pytest.raises(BadData, match=r"prepared for 64 px and the model draws 128 px"):
        examples.of_dataset(dataset(prepared), 128, 16, 0, 10)


def test_a_damaged_picture_ends_the_evaluation(prepared: Callable[..., Path]) -> None:
    folder = prepared([{"image": {"bytes": b"", "path": None}}] + [{}] * 9)
    with pytest.raises(BadData, match=r"0\.png"):
        list(examples.of_dataset(folder, 64, 16, 0, 10).read())


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="is not a prepared dataset"):
        examples.of_dataset(tmp_path, 64, 16, 0, 10)
