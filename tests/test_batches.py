"""Batches: the same pictures at the same places, whoever asks."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from daybreak.data import batches, loader
from daybreak.data.prepared import Sample
from daybreak.failure import BadData, BadRecipe

Write = Callable[..., Path]
RECORDED_ROWS = [6, 1, 6, 4, 5, 0, 3, 7, 2, 3, 4, 5]


def test_every_epoch_of_a_folder_holds_each_picture_once(pictures: Path) -> None:
    source = batches.Folder(pictures, seed=1)
    plan = source.plan(16, batch=8, first=0)
    epochs = [[source.sample(slot).caption for slot in plan(number)] for number in range(3)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_of_a_folder_is_the_recorded_one(pictures: Path) -> None:
    """Who continues a run begun with an older version meets the same pictures."""
    source = batches.Folder(pictures, seed=1)
    slots = source.plan(16, batch=12, first=3)(1)
    assert [slot.sample for slot in slots] == list(range(15, 27))
    assert [slot.row for slot in slots] == RECORDED_ROWS


def test_captions_are_chosen_by_weight_and_dropped_by_share(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "x", "tags": ["y", "z"]}'
    )
    config = batches.Config(
        source=str(tmp_path),
        caption_columns=(("text", 3.0), ("tags", 1.0)),
        empty_captions=0.2,
        workers=0,
    )
    source = batches.Folder(tmp_path, 1, config.caption_columns)
    stream = loader.stream(source, config, 1, 8, batch=100, first=0, count=20)
    counts = Counter(caption for batch in stream for caption in batch.captions)
    assert counts.keys() == {"x", "y, z", ""}
    assert abs(counts[""] / 2000 - 0.2) < 0.04
    assert abs(counts["x"] / (counts["x"] + counts["y, z"]) - 0.75) < 0.04


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"source": "scenes", "mirrored": 0.5}, "tell left from right"),
        ({"source": []}, "no source is named"),
        ({"source": ["a", "b"]}, r"^1 validation error[^$]*weights as \[\['a"),
        ({"source": 5}, "5 names no source"),
        ({"source": [["a", 0.5], ["b", -1.0]]}, "'b' has weight -1"),
        ({"source": [["a", 0.5], ["b", math.inf]]}, "'b' has weight inf"),
        ({"source": "a", "mirrored": 1.5}, "less than or equal to 1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_the_recipe(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        batches.Config.model_validate(config)


def test_captions_chosen_twice_are_refused(prepared: Write) -> None:
    folder = str(prepared([{}] * 3))
    config = batches.Config(source=folder, caption_columns=(("text", 1.0),))
    with pytest.raises(BadRecipe, match="caption_columns is for pictures that are not prepared"):
        batches.pictures(config, None, 0, patch=16)


def test_what_is_mixed_must_be_prepared(prepared: Write, pictures: Path) -> None:
    folder = str(prepared([{}] * 3))
    config = batches.Config(source=((folder, 1.0), (str(pictures), 1.0)))
    with pytest.raises(BadRecipe, match="pictures is not prepared"):
        batches.pictures(config, None, 0, patch=16)


def test_datasets_are_mixed_by_the_weights_of_the_recipe(prepared: Write) -> None:
    few = str(prepared([{"captions": ["one"]}] * 6, called="few"))
    many = str(prepared([{"captions": ["another"]}] * 60, called="many"))
    config = batches.Config(source=((few, 3.0), (many, 1.0)), workers=0, empty_captions=0)
    source = batches.pictures(config, None, 0, patch=16)
    said = [
        caption
        for batch in loader.stream(source, config, 0, 64, 6, first=0, count=100)
        for caption in batch.captions
    ]
    assert abs(said.count("another") / len(said) - 0.25) < 0.03


def test_a_folder_is_opened_with_the_caption_columns_of_the_recipe(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x", "tags": "y"}')
    config = batches.Config(source=str(tmp_path), caption_columns=(("tags", 1.0),))
    assert list(batches.pictures(config, None, 0, patch=8).captions()) == ["y"]


def test_a_folder_whose_captions_have_other_shares_is_another(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x", "tags": "y"}')
    known = [
        batches.Folder(tmp_path, 0, (("text", text), ("tags", 1.0))).files for text in (1.0, 2.0)
    ]
    assert known[0] != known[1]
    assert known[0] == batches.Folder(tmp_path, 0, (("text", 3.0), ("tags", 3.0))).files
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes() + b"more")
    assert known[0] != batches.Folder(tmp_path, 0, (("text", 1.0), ("tags", 1.0))).files


def test_a_worker_keeps_no_more_decoded_pictures_than_it_may(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "CACHE_BYTES", 3 * 3 * 16**2)
    source = batches.Folder(pictures, seed=1)
    for _ in range(2):
        assert all(isinstance(one, Sample) for one in source.samples(source.plan(16, 8, 0)(0)))
    assert sum(picture.nbytes for picture in source.kept.values()) == batches.CACHE_BYTES


def test_a_picture_that_is_kept_is_not_read_again(pictures: Path) -> None:
    source = batches.Folder(pictures, seed=1)
    slots = source.plan(16, batch=8, first=0)(0)
    before = [sample for sample in source.samples(slots) if isinstance(sample, Sample)]
    for file in pictures.glob("*.png"):
        file.unlink()
    again = [sample for sample in source.samples(slots) if isinstance(sample, Sample)]
    assert len(before) == len(again) == 8
    for one, other in zip(before, again, strict=True):
        np.testing.assert_array_equal(one.picture, other.picture)
    larger = source.samples(source.plan(24, batch=8, first=0)(0))
    assert all(isinstance(sample, BadData) for sample in larger), "of another size they are not"


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_any_ranks_and_workers_make_the_same_global_batches(prepared: Write) -> None:
    shapes = ("64x64", "32x128", "128x32")
    rows = [{"bucket": shapes[n % 3], "captions": [f"number {n}"]} for n in range(40)]
    folder = str(prepared(rows, shards=3))
    made: dict[tuple[int, int], list[tuple[list[str], torch.Tensor, int]]] = {}
    for world in (1, 2, 4):
        for workers in (0, 1, 3):
            config = batches.Config(source=folder, workers=workers, mirrored=0.5)
            source = batches.pictures(config, None, 9, patch=16)
            ranks = [
                list(
                    loader.stream(
                        source, config, 9, 64, 4, first=12, count=14, rank=rank, world=world
                    )
                )
                for rank in range(world)
            ]
            assert all(len(part.image) == 4 // world for rank in ranks for part in rank)
            assert [rank[0].first for rank in ranks] == [12 + 4 // world * r for r in range(world)]
            made[world, workers] = [
                (
                    [caption for part in parts for caption in part.captions],
                    torch.cat([part.image for part in parts]),
                    parts[0].first,
                )
                for parts in zip(*ranks, strict=True)
            ]
    expected = made[1, 0]
    assert {tuple(image.shape[2:]) for _, image, _ in expected} == {(64, 64), (32, 128), (128, 32)}
    for batch in made.values():
        for (captions, image, first), (captions0, image0, first0) in zip(
            batch, expected, strict=True
        ):
            assert captions == captions0
            assert torch.equal(image, image0)
            assert first == first0
