"""The batch plan: which picture stands at which place, whoever asks."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from daybreak.data import batches, scenes
from daybreak.failure import BadData

SCENES = scenes.Config(canvas="32")


def read(
    config: batches.Config, source: batches.Pictures, first: int = 0, count: int = 3
) -> list[batches.Batch]:
    return list(batches.stream(source, config, 5, 32, batch=4, first=first, count=count))


def test_workers_change_nothing() -> None:
    source = batches.Scenes(SCENES, seed=5)
    here = read(batches.Config(source="scenes", workers=0), source)
    there = read(batches.Config(source="scenes", workers=2), source)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.image, other.image)
        assert one.captions == other.captions
        assert one.first == other.first


def test_a_plan_taken_up_later_is_the_rest_of_the_plan() -> None:
    config = batches.Config(source="scenes", workers=0)
    source = batches.Scenes(SCENES, seed=5)
    assert torch.equal(
        read(config, source)[2].image, read(config, source, first=8, count=1)[0].image
    )


def test_pictures_arrive_in_minus_one_to_one_with_their_captions() -> None:
    source = batches.Scenes(SCENES, seed=5)
    batch = read(batches.Config(source="scenes", workers=0, empty_captions=0), source)[1]
    expected = scenes.sample(SCENES, 5, 4)
    assert batch.image.shape == (4, 3, 32, 32)
    restored = (batch.image[0].permute(1, 2, 0) + 1) * 127.5
    np.testing.assert_allclose(restored.numpy(), expected.image, atol=1e-3)
    assert batch.captions[0] == expected.caption


def test_every_epoch_of_a_folder_holds_each_picture_once(pictures: Path) -> None:
    config = batches.Config(source=str(pictures), empty_captions=0, workers=0)
    source = batches.Folder(config, seed=1)
    drawn = [source.sample(index, 16)[1] for index in range(24)]
    epochs = [drawn[start : start + 8] for start in (0, 8, 16)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_captions_are_chosen_by_weight_and_dropped_by_share(tmp_path: Path) -> None:
    from PIL import Image

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
    source = batches.Folder(config, seed=1)
    stream = batches.stream(source, config, 1, 8, batch=100, first=0, count=20)
    counts = Counter(caption for batch in stream for caption in batch.captions)
    assert counts.keys() == {"x", "y, z", ""}
    assert abs(counts[""] / 2000 - 0.2) < 0.04
    assert abs(counts["x"] / (counts["x"] + counts["y, z"]) - 0.75) < 0.04


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_vanishes_is_named(pictures: Path, workers: int) -> None:
    config = batches.Config(source=str(pictures), workers=workers)
    source = batches.Folder(config, seed=1)
    (pictures / "3.png").unlink()
    with pytest.raises(BadData, match=r"3\.png"):
        list(batches.stream(source, config, 1, 32, batch=8, first=0, count=1))
