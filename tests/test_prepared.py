"""Reading a prepared dataset: the right pixels and words, and nothing damaged passed over."""

import io
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from daybreak.data import batches, images, ingest, prepare
from daybreak.data.buckets import buckets, nearest
from daybreak.data.plan import Slot
from daybreak.data.prepared import SUBSTITUTES, Prepared, chosen, crop, is_prepared
from daybreak.failure import BadData, BadRecipe

Write = Callable[..., Path]
SQUARE, WIDE, TALL = {"bucket": "64x64"}, {"bucket": "32x128"}, {"bucket": "128x32"}


def opened(*folders: Path, seed: int = 0, patch: int = 16) -> Prepared:
    return Prepared([(str(folder), 1.0) for folder in folders], seed, patch)


def photo(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Something smooth with every colour in it, different at every pixel."""
    y, x = np.mgrid[:height, :width] / 48
    waves = [np.sin(y + 2 * x), np.cos(2 * y - x), np.sin(y * x / 3)]
    return np.rint(127.5 + 90 * np.stack(waves, axis=-1)).astype(np.uint8)


def encoded(picture: np.ndarray[Any, np.dtype[np.uint8]], kind: str, **how: Any) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **how)
    return {"image": {"bytes": file.getvalue(), "path": None}}


def numbered(count: int, *shapes: dict[str, str]) -> list[dict[str, Any]]:
    return [shapes[n % len(shapes)] | {"captions": [f"number {n}"]} for n in range(count)]


def test_every_row_is_read_as_datasets_reads_it(prepared: Write) -> None:
    folder = prepared(numbered(7, SQUARE, WIDE, TALL), shards=3)
    source, rows = opened(folder), load_from_disk(str(folder))
    for number, row in enumerate(rows):
        height, width = map(int, row["bucket"].split("x"))
        sample = source.sample(Slot(number, number, height, width))
        np.testing.assert_array_equal(sample.picture, np.asarray(row["image"]))
        assert sample == (sample.picture, row["captions"][0], "")
    assert list(source.captions()) == [f"number {number}" for number in range(7)]


def test_the_plan_has_every_picture_in_its_own_shape(prepared: Write) -> None:
    source = opened(prepared(numbered(12, SQUARE, WIDE, TALL), shards=2))
    plan = source.plan(resolution=64, batch=2, first=100)
    slots = [slot for number in range(6) for slot in plan(number)]
    assert [slot.sample for slot in slots] == list(range(100, 112))
    assert sorted(slot.row for slot in slots) == list(range(12))
    for slot in slots:
        assert (slot.height, slot.width) == [(64, 64), (32, 128), (128, 32)][slot.row % 3]


def test_at_half_the_resolution_shapes_and_pictures_are_half_as_large(prepared: Write) -> None:
    source = opened(prepared(numbered(6, SQUARE, WIDE, TALL)), patch=8)
    slots = [slot for number in range(3) for slot in source.plan(32, 2, first=0)(number)]
    assert {(slot.height, slot.width) for slot in slots} == {(32, 32), (16, 64), (64, 16)}
    for slot in slots:
        assert source.sample(slot).picture.shape == (slot.height, slot.width, 3)
    long = opened(prepared(numbered(2, {"bucket": "32x96"}), called="long"), patch=4)
    assert {slot[2:] for slot in long.plan(32, 2, first=0)(0)} == {(16, 48)}, "by unit, not patch"


def test_several_datasets_are_one_numbering_and_share_by_weight(prepared: Write) -> None:
    a = prepared(numbered(6, SQUARE), called="a")
    b = prepared([{"captions": [f"other {n}"]} for n in range(30)], called="b")
    source = Prepared([(str(a), 0.5), (str(b), 0.5)], seed=0, patch=16)
    plan = source.plan(64, 4, first=0)
    said = [source.sample(slot).caption for number in range(90) for slot in plan(number)]
    ours = sum(caption.startswith("number") for caption in said)
    assert abs(ours / len(said) - 0.5) < 0.02
    assert len(set(said)) == 36


def test_small_buckets_join_and_the_picture_is_cut_to_the_new_shape(prepared: Write) -> None:
    rows = [*numbered(8, {"bucket": "48x80"}), *numbered(2, SQUARE | {"bucket": "48x64"})]
    source = opened(prepared(rows))
    slots = [slot for number in range(5) for slot in source.plan(64, 4, first=0)(number)]
    assert {(slot.height, slot.width) for slot in slots} == {(48, 80)}
    joined = next(slot for slot in slots if slot.row >= 8)
    assert source.sample(joined).picture.shape == (48, 80, 3)


def test_a_bucket_is_as_large_as_what_an_epoch_takes_from_it(prepared: Write) -> None:
    many = prepared(numbered(60, {"bucket": "32x128"}), called="many")
    few = prepared(numbered(2, {"bucket": "32x112"}), called="few")
    source = Prepared([(str(many), 1.0), (str(few), 1.0)], seed=0, patch=16)
    plan = source.plan(64, batch=4, first=0)
    shapes = Counter(slot[2:] for number in range(40) for slot in plan(number))
    assert shapes.keys() == {(32, 128), (32, 112)}, "31 of 62 samples, though of two pictures"
    assert abs(shapes[32, 112] / 160 - 0.5) < 0.1


def test_a_batch_larger_than_the_dataset_is_refused_with_the_arithmetic(prepared: Write) -> None:
    source = opened(prepared(numbered(3, SQUARE)))
    with pytest.raises(BadRecipe, match=r"holds 3 pictures and a batch takes 4.*stage\.batch"):
        source.plan(64, batch=4, first=0)
    assert sorted(slot.row for slot in source.plan(64, batch=3, first=0)(0)) == [0, 1, 2]


def test_another_seed_and_another_stage_have_another_order(prepared: Write) -> None:
    folder = prepared(numbered(40, SQUARE))

    def rows(seed: int, first: int) -> list[int]:
        config = batches.Config(source=str(folder))
        return [
            slot.row for slot in batches.pictures(config, None, seed, 16).plan(64, 40, first)(0)
        ]

    assert rows(0, first=0) == rows(0, first=0)
    assert rows(0, first=0) != rows(1, first=0)
    assert rows(0, first=0) != rows(0, first=40)


def test_a_resolution_that_was_not_prepared_for_is_refused(prepared: Write) -> None:
    with pytest.raises(BadRecipe, match="at most 64 px and a stage asks for 128"):
        opened(prepared(numbered(3, SQUARE))).plan(128, batch=1, first=0)


def test_a_crop_takes_pixels_as_they_are_and_moves_with_the_dice(prepared: Write) -> None:
    stored = photo(64, 80)
    source = opened(prepared([SQUARE | {"width": 80} | encoded(stored, "PNG")]))
    lefts = set()
    for index in range(200):
        picture = source.sample(Slot(index, 0, 64, 64)).picture
        lefts.add(next(n for n in range(17) if np.array_equal(picture, stored[:, n : n + 64])))
    assert lefts == set(range(17))
    tall = opened(
        prepared([SQUARE | {"height": 80} | encoded(stored.swapaxes(0, 1), "PNG")], called="tall")
    )
    for index in (0, 1, 2):
        upright = tall.sample(Slot(index, 0, 64, 64)).picture.swapaxes(0, 1)
        np.testing.assert_array_equal(upright, source.sample(Slot(index, 0, 64, 64)).picture)


def test_where_a_picture_is_cut_says_nothing_about_its_caption(prepared: Write) -> None:
    stored = photo(64, 80)
    row = SQUARE | {"width": 80, "captions": ["a", "b"], "caption_weights": [1.0, 1.0]}
    source = opened(prepared([row | encoded(stored, "PNG")]))
    lefts: dict[str, set[int]] = {"a": set(), "b": set()}
    for index in range(300):
        picture, caption, _ = source.sample(Slot(index, 0, 64, 64))
        left = next(n for n in range(17) if np.array_equal(picture, stored[:, n : n + 64]))
        lefts[caption].add(left)
    assert lefts == {"a": set(range(17)), "b": set(range(17))}


@settings(deadline=None)
@given(
    st.integers(8, 90),
    st.integers(8, 90),
    st.integers(8, 70),
    st.integers(8, 70),
    st.floats(0, 0.999),
)
def test_a_crop_never_stretches(
    have_height: int, have_width: int, height: int, width: int, across: float
) -> None:
    y, x = np.mgrid[:have_height, :have_width]
    ramp = np.stack([y * 2, x * 2, y * 0], axis=-1).astype(np.uint8)  # a slope of two per pixel
    got = crop(ramp, height, width, across)
    assert got.shape == (height, width, 3)
    scale = max(height / have_height, width / have_width)
    inner = got[height // 4 : -(height // 4), width // 4 : -(width // 4)].astype(float)
    if min(inner.shape[:2]) >= 12 and 0.5 < scale < 2:
        for channel, axis in ((0, 0), (1, 1)):
            slope = np.polyfit(np.arange(inner.shape[axis]), inner[..., channel].mean(1 - axis), 1)
            assert slope[0] == pytest.approx(2 / scale, rel=0.1, abs=0.1)


@pytest.mark.parametrize("across", [0.0, 0.5, 0.999])
def test_a_crop_of_what_has_to_be_scaled_lies_where_the_dice_say(across: float) -> None:
    wide = np.tile(np.arange(100, dtype=np.uint8)[:, None], (40, 1, 3))
    for ramp in (wide, wide.swapaxes(0, 1).copy()):
        assert crop(ramp, 20, 20, across).mean() == pytest.approx(60 * across + 19.5, abs=0.6)


def test_captions_are_chosen_by_their_weights(prepared: Write) -> None:
    row = {"captions": ["long", "short"], "caption_weights": [3.0, 1.0]}
    source = opened(prepared([row]))
    said = Counter(source.sample(Slot(index, 0, 64, 64)).caption for index in range(2000))
    assert said.keys() == {"long", "short"}
    assert abs(said["long"] / 2000 - 0.75) < 0.04


def test_a_die_falls_on_every_caption_up_to_the_last() -> None:
    dice = (0.0, 0.24, 0.25, 0.26, 0.74, 0.75, 0.76, 0.9999)
    assert "".join(chosen("abc", (1, 2, 1), die) for die in dice) == "aabbbccc"


@pytest.mark.parametrize("side", [(64, 64), (37, 64), (61, 90), (512, 300)])
@pytest.mark.parametrize("by", [1, 2, 4, 8])
def test_a_jpeg_is_decoded_small_and_covers_what_is_asked(
    side: tuple[int, int], by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = photo(*side)
    data = encoded(original, "JPEG", quality=92)["image"]["bytes"]
    height, width = max(side[0] // by, 8), max(side[1] // by, 8)
    small = images.decode_to_cover(data, "it", height, width)
    assert height <= small.shape[0] < 2 * height + 2 or by == 1
    assert width <= small.shape[1]
    if by == 1:
        np.testing.assert_array_equal(small, images.decode(data, "it"))
    smooth = Image.fromarray(original).resize(small.shape[1::-1], Image.Resampling.LANCZOS)
    middle = np.s_[1:-1, 1:-1]
    error = np.abs(small[middle].astype(float) - np.asarray(smooth)[middle])
    assert error.mean() < 6

    monkeypatch.setattr(images, "simplejpeg", None)
    np.testing.assert_array_equal(small, images.decode_to_cover(data, "it", height, width))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_pictures_are_read_exactly(prepared: Write, kind: str) -> None:
    stored = photo(64, 64)
    source = opened(prepared([encoded(stored, kind, lossless=True)]))
    np.testing.assert_array_equal(source.sample(Slot(0, 0, 64, 64)).picture, stored)


@pytest.mark.parametrize("without", [False, True])
def test_grey_and_cmyk_jpegs_come_as_three_channels(
    without: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without:
        monkeypatch.setattr(images, "simplejpeg", None)
    for mode in ("L", "CMYK"):
        file = io.BytesIO()
        Image.fromarray(photo(64, 64)).convert(mode).save(file, "JPEG")
        picture = images.decode_to_cover(file.getvalue(), "it", 32, 32)
        assert picture.ndim == 3
        assert picture.shape[2] == 3


JPEG = encoded(photo(64, 64), "JPEG", quality=92)["image"]["bytes"]
DAMAGED = {
    "truncated": JPEG[: len(JPEG) // 2],
    "empty": b"",
    "page": b"<html>not found</html>",
    "header only": JPEG[:30],
    "noise": b"\xff\xd8" + bytes(range(256)) * 4,
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_what_cannot_be_read_is_replaced_and_named(prepared: Write, fault: str) -> None:
    rows = [*numbered(6, WIDE, SQUARE)]
    rows[3] |= {"image": {"bytes": DAMAGED[fault], "path": None}, "where": "photos/3.jpg"}
    folder = prepared(rows)
    slot = Slot(77, 3, 64, 64)
    sample = opened(folder).sample(slot)
    assert sample.caption in {"number 1", "number 5"}
    assert sample.picture.shape == (64, 64, 3)
    assert "photos/3.jpg" in sample.complaint
    assert str(folder) in sample.complaint
    again = opened(folder).sample(slot)
    assert (again.caption, again.complaint) == sample[1:]
    assert opened(folder).sample(Slot(77, 1, 64, 64)).complaint == ""


def test_substitutes_of_a_picture_are_not_always_the_same(prepared: Write) -> None:
    rows = numbered(8, SQUARE)
    rows[0]["image"] = {"bytes": b"", "path": None}
    source = opened(prepared(rows))
    assert len({source.sample(Slot(index, 0, 64, 64)).caption for index in range(50)}) > 3


def test_a_dataset_of_damaged_pictures_ends_in_one_sentence(prepared: Write) -> None:
    rows = [{"image": {"bytes": b"", "path": None}} for _ in range(5)]
    with pytest.raises(BadData, match=f"Its {SUBSTITUTES - 1} substitutes cannot"):
        opened(prepared(rows)).sample(Slot(0, 0, 64, 64))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("Cannot allocate memory", "is one file more than a process may map: raise vm.max_map_cou"),
        ("No such device", r"cannot be read \(Memory mapping file failed: No such device\): mend"),
    ],
)
def test_files_that_cannot_be_mapped_are_not_called_damaged(
    prepared: Write, monkeypatch: pytest.MonkeyPatch, error: str, told: str
) -> None:
    def refused(path: str) -> None:  # as pyarrow says it after vm.max_map_count files, or of FUSE
        raise OSError(f"Memory mapping file failed: {error}")

    folder = prepared([SQUARE])
    monkeypatch.setattr(pa, "memory_map", refused)
    with pytest.raises(BadData, match=rf"data-\S+ {told}"):
        opened(folder)


def test_a_worker_that_is_not_forked_opens_the_dataset_itself(prepared: Write) -> None:
    source = opened(prepared([encoded(photo(64, 64), "PNG") for _ in range(50)]), seed=9)
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    there = pickle.loads(sent)
    slot = Slot(5, 7, 64, 64)
    np.testing.assert_array_equal(there.sample(slot).picture, source.sample(slot).picture)
    assert there.plan(64, 50, first=0)(0) == source.plan(64, 50, first=0)(0)


def test_a_folder_that_is_none_says_how_to_make_one(tmp_path: Path, prepared: Write) -> None:
    with pytest.raises(BadData, match="daybreak prepare SOURCE"):
        opened(tmp_path / "nothing")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(BadData, match=r"prepare \S+pictures --out OTHER` makes a dataset of it"):
        opened(tmp_path / "pictures")
    (tmp_path / "pictures" / ".staging").mkdir()
    with pytest.raises(BadData, match="daybreak prepare SOURCE"):
        opened(tmp_path / "pictures")
    saved = prepared(numbered(2, SQUARE))
    (saved / "manifest.json").unlink()
    assert is_prepared(saved)
    with pytest.raises(BadData, match=f"daybreak prepare {saved} --out OTHER"):
        opened(saved)


def test_a_manifest_that_the_disk_does_not_give_is_not_called_damaged(prepared: Write) -> None:
    folder = prepared([SQUARE])
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    with pytest.raises(
        BadData, match=r"manifest\.json cannot be read \(Is a directory\): fix that"
    ):
        opened(folder)


def test_a_shard_that_is_missing_or_cut_is_named(prepared: Write) -> None:
    folder = prepared(numbered(4, SQUARE), shards=2)
    shard = folder / "data-00001-of-00002.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(BadData, match=f"data-00001-of-00002.arrow has .* not {len(whole)}"):
        opened(folder)
    shard.unlink()
    with pytest.raises(BadData, match=r"data-00001-of-00002\.arrow is missing"):
        opened(folder)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("schema", 2, "has schema 2, not 1"),
        ("settings", {}, "manifest cannot be read"),
        ("counts", {"kept": 5}, "holds 4 pictures and its manifest says 5"),
        ("counts", {"kept": 3}, "holds 4 pictures and its manifest says 3"),
        ("files", None, "manifest cannot be read"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    prepared: Write, key: str, value: object, said: str
) -> None:
    folder = prepared(numbered(4, SQUARE))
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(BadData, match=said):
        opened(folder)


@pytest.mark.parametrize("lacks", [{"captions": []}, {"image": None}])
def test_a_row_that_lacks_caption_or_picture_is_refused_at_the_door(
    prepared: Write, lacks: dict[str, Any]
) -> None:
    with pytest.raises(BadData, match="without a picture or a caption"):
        opened(prepared([SQUARE, SQUARE | lacks]))


def test_what_prepare_writes_is_read(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ingest.Config(resolution=32, unit=4, max_aspect=2.0, near=0, shard=3)
    prepare.prepare([str(pictures)], out, settings)
    source = opened(out, patch=4)
    slots = [slot for number in range(4) for slot in source.plan(32, 2, first=0)(number)]
    said = {}
    for slot in slots:
        sample = source.sample(slot)
        assert sample.picture.shape == (slot.height, slot.width, 3)
        assert (slot.height, slot.width) == nearest(buckets(32, 4, 2.0), 30, 40)
        said[sample.caption] = sample.picture.mean((0, 1))
    assert len(said) == 8
    for number in range(8):
        colour = [30 * number, 255 - 30 * number, 17 * number]
        np.testing.assert_allclose(said[f"colour number {number}"], colour, atol=3)


def test_a_picture_of_a_second_dataset_is_replaced_by_one_of_the_same(prepared: Write) -> None:
    second = [row | {"captions": ["second"]} for row in numbered(6, SQUARE)]
    second[3]["image"] = {"bytes": b"", "path": None}
    folders = prepared(numbered(7, SQUARE), called="a"), prepared(second, called="b")
    source = Prepared([(str(folder), 1.0) for folder in folders], 0, 16)
    for index in range(20):
        sample = source.sample(Slot(index, 7 + 3, 64, 64))
        assert sample.complaint
        assert sample.caption == "second"


def test_where_all_of_a_bucket_is_damaged_another_of_the_dataset_stands_in(
    prepared: Write,
) -> None:
    rows = numbered(6, WIDE, SQUARE)
    for number, row in enumerate(rows):
        if row.get("bucket") == rows[1].get("bucket"):
            row["image"] = {"bytes": b"", "path": None}
            row["where"] = f"photos/{number}.jpg"
    sample = opened(prepared(rows)).sample(Slot(5, 1, 64, 64))
    assert sample.caption in {"number 0", "number 2", "number 4"}
    assert "photos/1.jpg" in sample.complaint, "the one that was planned, not its substitutes"


def test_shards_of_one_name_in_two_datasets_are_two_files(prepared: Write, tmp_path: Path) -> None:
    folders = [prepared(numbered(3, SQUARE), called=name) for name in "ab"]
    both = Prepared([(str(folder), 1.0) for folder in folders], 0, 16).files
    assert {Path(name).parent for name in both} == set(folders)
