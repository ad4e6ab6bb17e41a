"""The census: every number is right, and what would end a training is said before it."""

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daybreak.data import census
from daybreak.data.buckets import Bucket
from daybreak.data.prepared import Prepared
from daybreak.failure import BadData, BadRecipe

Prepare = Callable[..., Path]
Rows = list[dict[str, Any]]

REJECTED = [
    {"source": "pictures", "where": "a.png", "kind": "damaged", "reason": "cannot be decoded"},
    {"source": "pictures", "where": "b.png", "kind": "small", "reason": "is 3 x 3"},
    {"source": "pictures", "where": "c.png", "kind": "small", "reason": "is 2 x 2"},
]
NEAR = {"kind": "near", "kept": "0123456789abcdef"}
NEAR |= {"dropped": [{"where": "d.png", "source": "pictures", "distance": 3}]}  # type: ignore[dict-item]
SQUARE, WIDE, LESS_WIDE = ({"bucket": name} for name in ("64x64", "32x128", "32x112"))


def test_every_number_is_counted(prepared: Prepare) -> None:
    rows: Rows = [
        SQUARE | {"captions": ["A red DOG.", "the dog's red ball"], "licence": ""},
        SQUARE | {"captions": ["dog"]},
        SQUARE | {"captions": ["ein grüner Löwe, 数字 7"]},
        WIDE | {"height": 16, "width": 64},
        WIDE,
    ]
    found = census.count(census.read(prepared(rows, REJECTED, [NEAR])), batch=2)
    assert found.pictures == 5
    assert found.captions == 6
    assert found.read == 8
    assert found.resolution == 64
    assert found.steps == 2.5
    wide, square = Bucket(32, 128), Bucket(64, 64)
    assert found.fillings == (
        census.Filling(wide, wide, pictures=2, batches=1, over=0, enlarged=1),
        census.Filling(square, square, pictures=3, batches=1, over=1, enlarged=0),
    )
    assert found.sides == (("32–47", 1), ("48–63", 0), ("64–95", 4))
    assert found.lengths == (("1", 1), ("2", 2), ("3–4", 2), ("5–8", 1))
    assert found.median_length == 2
    assert found.words[:3] == (("colour", 2), ("dog", 2), ("red", 2))
    assert {("löwe", 1), ("数", 1), ("dog's", 1)} <= set(found.words)
    assert not {"a", "the"} & {word for word, _ in found.words}
    assert found.licences == (("CC0", 4), ("not stated", 1))
    assert found.sources == (("pictures", 5),)
    assert found.rejected == (("small", 2), ("damaged", 1))
    assert found.groups == (("near", 1),)
    assert found.problems == ()


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("一只红色的猫", ["一", "只", "红", "色", "的", "猫"]),
        ("コーヒー、飲む", ["コ", "ー", "ヒ", "ー", "飲", "む"]),
        ("แมว สีแดง", ["แ", "ม", "ว", "สี", "แ", "ด", "ง"]),
        ("고양이 한 마리", ["고양이", "한", "마리"]),
        ("a 猫's cat", ["a", "猫", "'s", "cat"]),
    ],
)
def test_signs_of_scripts_without_spaces_are_counted_one_by_one(
    prepared: Prepare, caption: str, words: list[str]
) -> None:
    found = census.tally(census.read(prepared([{"captions": [caption]}])).opened.table)
    assert found.words == Counter(words)
    assert found.lengths == {len(words): 1}


def test_the_columns_are_counted_alike_however_they_are_cut(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [["a red dog", "dog"], ["cat"], ["", "x"], [" \t"], ["two  cats"]]
    folder = prepared([{"captions": captions[number % 5]} for number in range(23)])
    table = census.read(folder).opened.table
    whole = census.tally(table)
    assert whole.lengths == {3: 5, 1: 15, 0: 9, 2: 4}
    assert whole.bare == [f"{number}.png" for number in range(23) if number % 5 in (2, 3)]
    for rows in (1, 3, 22):
        monkeypatch.setattr(census, "ROWS", rows)
        assert census.tally(table) == whole


@given(
    values=st.dictionaries(st.integers(0, 400), st.integers(1, 50), min_size=1),
    starts=st.lists(st.integers(1, 300), min_size=2, unique=True).map(lambda s: tuple(sorted(s))),
)
def test_a_histogram_holds_everything_once(values: dict[int, int], starts: tuple[int, ...]) -> None:
    bars = census.histogram(Counter(values), starts)
    assert sum(bar.number for bar in bars) == sum(values.values())
    assert bars[0].number
    assert bars[-1].number
    assert census.histogram(Counter(), starts) == ()


def test_buckets_fill_as_the_plan_of_the_training_does(prepared: Prepare) -> None:
    rows: Rows = [SQUARE] * 11 + [WIDE] * 9 + [LESS_WIDE] * 3
    folder = prepared(rows)
    found = census.count(census.read(folder), batch=4)
    by_name = {one.bucket.name: one for one in found.fillings}
    assert by_name["32x112"].home == Bucket(32, 128)
    assert by_name["32x112"].enlarged == 3
    assert (by_name["32x128"].batches, by_name["32x128"].over) == (3, 0)
    assert (by_name["64x64"].batches, by_name["64x64"].over) == (2, 3)
    assert len(found.remarks) == 2
    assert "trained in 32x128, which cuts 12% off each" in found.remarks[0]

    slots = Prepared([(str(folder), 1.0)], seed=0, patch=16).plan(64, 4, first=0)
    epoch = [slots(number)[0] for number in range(sum(one.batches for one in found.fillings))]
    planned = Counter(Bucket(slot.height, slot.width) for slot in epoch)
    assert planned == {one.bucket: one.batches for one in found.fillings if one.batches}


def test_a_small_bucket_without_neighbours_is_a_remark(prepared: Prepare) -> None:
    found = census.count(census.read(prepared([SQUARE] * 12 + [WIDE] * 3)), batch=6)
    assert found.problems == ()
    assert "32x128 has fewer pictures (3) than a batch" in found.remarks[0]
    assert "every 2.0 epochs" in found.remarks[0]


def test_lost_captions_are_a_remark(prepared: Prepare) -> None:
    written = census.read(prepared([SQUARE] * 2))
    written.manifest["counts"]["captions_lost"] = 1200
    [remark] = census.count(written, batch=2).remarks
    assert remark.startswith("1,200 captions could not be used")


def test_a_smaller_resolution_has_its_own_buckets(prepared: Prepare) -> None:
    written = census.read(prepared([SQUARE] * 3 + [WIDE] * 2 + [LESS_WIDE]))
    found = census.count(written, batch=3, resolution=32)
    assert [(one.bucket.name, one.pictures) for one in found.fillings] == [
        ("16x64", 3),
        ("32x32", 3),
    ]
    for resolution, words in ((128, "at most 64 px"), (40, "not a multiple")):
        with pytest.raises(BadRecipe, match=words):
            census.count(written, 3, resolution=resolution)


def test_a_batch_is_dealt_evenly_or_refused(prepared: Prepare) -> None:
    written = census.read(prepared([SQUARE] * 8))
    assert census.count(written, batch=8, world=4).world == 4
    with pytest.raises(BadRecipe, match="--batch 8 is not divisible by --world 3"):
        census.count(written, batch=8, world=3)


def test_fewer_pictures_than_a_batch_are_a_problem_of_the_recipe(prepared: Prepare) -> None:
    [problem] = census.count(census.read(prepared([SQUARE] * 5)), batch=6).problems
    assert isinstance(problem, BadRecipe)
    assert "holds 5 pictures and a batch takes 6" in str(problem)


def test_an_empty_caption_is_a_problem_of_the_data(prepared: Prepare) -> None:
    rows: Rows = [SQUARE] * 6 + [SQUARE | {"captions": ["fine", "  "]}] * 7
    [problem] = census.count(census.read(prepared(rows)), batch=2).problems
    assert isinstance(problem, BadData)
    assert "6.png, 7.png, 8.png, 9.png, 10.png and 2 more have an empty caption" in str(problem)


def flipped(folder: Path) -> None:
    path = next(folder.glob("data-*.arrow"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(folder: Path) -> None:
    path = next(folder.glob("data-*.arrow"))
    path.write_bytes(path.read_bytes()[:-100])


def gone(folder: Path) -> None:
    (folder / "rejected.jsonl").unlink()


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def other_schema(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema": 2}))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (flipped, r"data-\S+ has sha256 \w+, not"),
        (cut, r"data-\S+ has \d+ bytes, not"),
        (gone, r"rejected\.jsonl is missing"),
        (no_manifest, "has no manifest"),
        (other_schema, "schema 2, not 1"),
    ],
)
def test_what_is_not_as_it_was_written_is_refused(
    prepared: Prepare, harm: Callable[[Path], None], words: str
) -> None:
    folder = prepared([SQUARE] * 4)
    harm(folder)
    with pytest.raises(BadData, match=words):
        census.read(folder)


def test_a_picture_without_any_caption_is_refused(prepared: Prepare) -> None:
    with pytest.raises(BadData, match="a caption: prepare it again"):
        census.read(prepared([SQUARE, SQUARE | {"captions": []}]))


def test_progress_counts_every_byte(prepared: Prepare) -> None:
    folder = prepared([SQUARE] * 4)
    heard: list[tuple[int, int]] = []
    found = census.count(census.read(folder, lambda *now: heard.append(now)), 2)
    assert heard[-1] == (found.bytes, found.bytes)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_memory_does_not_grow_with_what_was_left_out(prepared: Prepare) -> None:
    def most(rejected: int) -> int:
        lists = REJECTED * rejected, [NEAR] * rejected
        folder = prepared([SQUARE] * 2, *lists, called=str(rejected))
        tracemalloc.start()
        written = census.read(folder)
        found = census.count(written, batch=2)
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sum(bar.number for bar in found.rejected) == 3 * rejected
        return taken

    most(1)  # what is imported and cached only once
    assert most(6_000) < most(2_000) + 1_000_000


def test_rare_words_are_forgotten_where_there_are_too_many(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(census, "ROWS", 10)
    monkeypatch.setattr(census, "WORDS_HELD", 20)
    rows = [SQUARE | {"captions": [f"red word{n}"]} for n in range(100)]
    written = census.read(prepared(rows))
    assert len(census.tally(written.opened.table).words) <= 20
    assert census.count(written, batch=2).words[0] == ("red", 100)
