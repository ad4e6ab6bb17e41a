"""Rows D: pictures, captions and containers as they come, and loaders that fail.

What a file is and what becomes of it is tested beside the code; the rows take those tests up by
name, so that the matrix is whole here.
"""

import functools
import os
import random
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daybreak.data import images, prepare, tars
from daybreak.failure import BadData, BadRecipe, LostPeer
from tests import test_captions, test_images, test_ingest, test_prepare, test_prepared, test_tars
from tests.faults.faults import Calling, Once, Pipe, Sleep, flip
from tests.faults.jobs import Place, children, ranks_of_the_matrix

Unbroken = Callable[..., Place]
Write = Callable[..., Path]
RANKS = ranks_of_the_matrix()
fault = pytest.mark.fault


def row(test: Callable[..., None]) -> Callable[..., None]:
    """A test as a row of the matrix; where it stands it remains what it is."""

    @functools.wraps(test)
    def again(*given: Any, **named: Any) -> None:
        test(*given, **named)

    return fault(again)


# -- D1: corrupt samples -----------------------------------------------------------------------

DAMAGED = [data for name, data in test_prepared.DAMAGED.items()]


def rows(count: int, bad: range) -> list[dict[str, Any]]:
    """Rows of a dataset of which some cannot be decoded, whatever their manifest says."""
    found: list[dict[str, Any]] = []
    for number in range(count):
        row: dict[str, Any] = {"captions": [f"number {number}"], "where": f"photos/{number}.jpg"}
        if number in bad:
            row["image"] = {"bytes": DAMAGED[number % len(DAMAGED)], "path": None}
        found.append(row)
    return found


def on(place: Place, source: Path) -> tuple[str, ...]:
    """Train a place's recipe on a prepared dataset."""
    place.of(source)
    return ("stage.0.resolution=64", "dit.patch=16", "data.empty_captions=0.0")


def test_D1_samples_that_cannot_be_read_are_replaced_and_counted(
    place: Place, prepared: Write
) -> None:
    bad = range(0, 480, 100)  # 1 %, all five kinds
    more = (*on(place, prepared(rows(480, bad), shards=2)), "stage.0.steps=20")
    ended = place.finish(*more, ranks=RANKS)
    for number in bad:
        assert f"photos/{number}.jpg" in ended.said
    assert ended.said.count("photos/") == len(bad)
    assert sum(line.get("substituted", 0) for line in place.lines()) == len(bad)


@fault
def test_D1_too_many_end_the_run_with_ten_of_them(place: Place, prepared: Write) -> None:
    more = on(place, prepared(rows(96, range(0, 96, 3))))
    ended = place.begin(*more, ranks=RANKS).end()
    assert BadData.code in ended.codes, ended.said
    assert "more than 1%" in ended.said
    assert place.status()["code"] == BadData.code


@fault
def test_D1_prepare_leaves_out_what_cannot_be_read_and_says_why(tmp_path: Path) -> None:
    source = test_prepare.folder(tmp_path / "in", 500)
    for number, data in zip(range(7, 500, 100), DAMAGED, strict=True):
        (source / f"{number:05d}.png").write_bytes(data)
    manifest = test_prepare.run(tmp_path / "out", source)
    listed = test_prepare.lines(tmp_path / "out" / "rejected.jsonl")
    assert [row["where"] for row in listed] == [f"{n:05d}.png" for n in range(7, 500, 100)]
    assert manifest["counts"]["rejected"] == {"damaged": 3, "format": 2}
    assert manifest["counts"]["kept"] == 495


# -- D2: odd kinds of pictures -----------------------------------------------------------------

test_D2_every_kind = row(test_ingest.test_every_kind_of_picture_is_stored_as_a_viewer_shows_it)
test_D2_upright = row(test_images.test_photographs_stand_upright)
test_D2_profiles = row(test_images.test_an_embedded_profile_is_applied)
test_D2_cmyk = row(test_images.test_cmyk_becomes_the_colour_it_prints)
test_D2_too_small_or_long = row(
    test_ingest.test_pictures_that_do_not_fit_are_refused_before_they_are_decoded
)

# -- D3: decompression bombs -------------------------------------------------------------------

test_D3_bombs = row(test_images.test_bombs_are_refused_from_the_header)
test_D3_text = row(test_images.test_text_that_unfolds_to_gigabytes_is_refused_from_the_header)


def test_D3_bombs_cost_neither_time_nor_memory() -> None:
    noise = test_prepare.encoded(test_prepare.drawing(0), "JPEG")
    start = noise.index(b"\xff\xc0") + 5
    jpeg = noise[:start] + (65500).to_bytes(2, "big") * 2 + noise[start + 4 :]
    bombs = [test_prepare.bomb(30_000, 30_000), test_prepare.bomb(12_000, 12_000), jpeg]
    with pytest.raises(BadData):
        images.decode(b"\0", "Pillow's plugins load with the first picture it does not know")
    before = resident()
    for data in bombs * 10:
        began = time.perf_counter()
        with pytest.raises(BadData, match="bomb"):
            images.decode(data, "bomb")
        assert time.perf_counter() - began < 0.05
    assert resident() - before < 64 * 2**20


def resident() -> int:
    """Bytes that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# -- D4: containers ----------------------------------------------------------------------------

test_D4_tars_that_are_cut = row(test_tars.test_every_way_to_cut_a_tar_is_found)
test_D4_tars_with_damage = row(test_tars.test_the_place_of_the_damage_is_named)
test_D4_no_tars = row(test_tars.test_what_is_no_tar_is_named)
test_D4_missing_pairs = row(test_tars.test_a_sample_without_its_picture_or_with_two_is_named)
test_D4_names_twice = row(test_tars.test_a_name_that_occurs_again_is_refused)
test_D4_salvage = row(test_prepare.test_a_damaged_tar_is_refused_unless_it_is_to_be_salvaged)
test_D4_verify = row(test_prepare.test_verify_finds_what_has_changed)


@fault
def test_D4_no_bit_of_a_dataset_can_change_unnoticed(tmp_path: Path) -> None:
    out, dice = tmp_path / "out", random.Random(4)
    test_prepare.run(out, test_prepare.folder(tmp_path / "in", 24))
    shards = sorted(out.glob("*.arrow"))
    for number in range(100):
        shard = dice.choice(shards)
        whole = shard.read_bytes()
        if number % 2:
            flip(shard, dice)
        else:
            shard.write_bytes(whole[: dice.randrange(len(whole))])
        with pytest.raises(BadData, match=shard.name):
            prepare.verify(out)
        shard.write_bytes(whole)
    prepare.verify(out)


# -- D5: captions ------------------------------------------------------------------------------

test_D5_captions = row(test_captions.test_what_is_no_caption_is_refused_with_the_reason)
test_D5_odd_ones = row(test_captions.test_cleaning_takes_nothing_that_a_prompt_may_ask_for)


@fault
def test_D5_any_caption_can_be_trained_on(place: Place, prepared: Write) -> None:
    odd = [
        "",
        "   ",
        "x" * 100_000,
        "قطة حمراء",
        "👨‍👩‍👦 🎈",
        "a\0b",
        "猫 " * 5000,
        "e\u0301" * 500,
    ]
    found = [{"captions": [caption]} for caption in odd * 6]
    more = (*on(place, prepared(found)), "stage.0.steps=4")
    place.finish(*more, ranks=RANKS)


# -- D6: hostile tars --------------------------------------------------------------------------

test_D6_hostile_members = row(test_tars.test_hostile_members_are_refused_by_name)
test_D6_ten_gigabytes = row(test_tars.test_a_member_of_ten_gigabytes_is_refused_unread)
test_D6_everything_at_once = row(test_prepare.test_every_fault_of_a_torture_folder_is_named_right)


@fault
def test_D6_a_hundred_thousand_members_do_not_fill_the_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("0.txt")
    info.size = 1
    with (tmp_path / "a.tar").open("wb") as file:
        for number in range(100_000):
            info.name = f"{number}.txt"
            file.write(info.tobuf() + b"x" + bytes(511))
        file.write(bytes(1024))
    (part,) = tars.parts([tmp_path / "a.tar"], tmp_path, "a").parts
    before = resident()
    assert sum(1 for _ in part.read()) == 100_000
    assert resident() - before < 100 * 2**20


# -- D7, D8: loaders ---------------------------------------------------------------------------


@fault
@pytest.mark.parametrize("at", [random.Random(7).randrange(1, 38) for _ in range(10)])
def test_D7_a_loader_that_dies_is_named_and_the_run_goes_on_later(
    place: Place, unbroken: Unbroken, many_pictures: Path, at: int
) -> None:
    job = place.begin("data.workers=1", ranks=RANKS)
    place.wait(job, at)
    rank = at % RANKS
    (victim,) = children(job.ranks[rank].pid)
    os.kill(victim, signal.SIGKILL)
    died = time.monotonic()
    ended = job.end()
    assert time.monotonic() - died < 5
    assert set(ended.codes) == {LostPeer.code}, ended.said
    assert f"pid(s) {victim}" in ended.said or f"pid {victim}" in ended.said
    place.finish("data.workers=1", ranks=RANKS)
    assert place.bits()["losses"] == unbroken(ranks=RANKS).bits()["losses"]
    assert place.bits()["state"] == unbroken(ranks=RANKS).bits()["state"]


@fault
@pytest.mark.parametrize("act", [os._exit, RuntimeError], ids=["exit", "error"])
def test_D7_a_loader_that_leaves_ends_the_run(place: Place, act: Callable[[int], Any]) -> None:
    leave = Calling("daybreak.data.scenes", "renders", Once(16, act))
    ended = place.begin("data.workers=1", ranks=RANKS, fault=leave, faulty=0).end()
    assert 0 not in ended.codes
    if act is os._exit:
        assert set(ended.codes) == {LostPeer.code}, ended.said


@fault
@pytest.mark.parametrize("workers", [0, 1])
def test_D8_a_slow_read_is_told_while_it_lasts_and_changes_nothing(
    place: Place, unbroken: Unbroken, workers: int
) -> None:
    slow = Calling("daybreak.data.scenes", "renders", Sleep(25, 5))
    ended = place.finish(f"data.workers={workers}", ranks=RANKS, fault=slow, faulty=RANKS - 1)
    assert ended.said.count("waiting for the next pictures") == 1, ended.said
    assert place.bits()["losses"] == unbroken(ranks=RANKS).bits()["losses"]
    assert place.bits()["state"] == unbroken(ranks=RANKS).bits()["state"]


@fault
@pytest.mark.parametrize("how", ["sleep", "pipe"])
def test_D8_a_read_that_never_ends_is_shown_and_ends_the_run(
    place: Place, many_pictures: Path, tmp_path: Path, how: str
) -> None:
    if how == "sleep":
        hung = Calling("daybreak.data.scenes", "renders", Sleep(16, 0))
    else:
        pictures = tmp_path / "pictures"
        shutil.copytree(many_pictures, pictures)
        place.of(pictures)
        hung = Calling("daybreak.train.runs", "check_space", Pipe(pictures / "07.png"))
    began = time.monotonic()
    ended = place.begin("health.step_timeout=3", ranks=RANKS, fault=hung, faulty=RANKS - 1).end()
    assert time.monotonic() - began < 40
    assert set(ended.codes) == {LostPeer.code}, ended.said
    assert "no step for" in ended.said
    assert "in sample" in ended.said or "read_bytes" in ended.said, "the stack shows where"


# -- D9, D10: other data, uneven data ----------------------------------------------------------


@fault
def test_D9_data_that_has_changed_is_refused(place: Place, prepared: Write) -> None:
    found = [{"captions": [f"number {number}"]} for number in range(48)]
    more = (*on(place, prepared(found, shards=2)), "stage.0.steps=10")
    job = place.begin(*more, ranks=RANKS)
    place.wait(job, 6)
    job.kill()
    job.end()
    found[40] = {"captions": ["edited"]}
    import shutil

    shutil.rmtree(place.folder.parent / "prepared")
    prepared(found, shards=2)
    ended = place.begin(*more, ranks=RANKS).end()
    assert set(ended.codes) == {BadRecipe.code}, ended.said
    assert "data-00001-of-00002.arrow" in ended.said


@fault
def test_D10_all_ranks_take_as_many_steps(place: Place, prepared: Write) -> None:
    found = [{"captions": [f"number {number}"]} for number in range(59)]
    more = (*on(place, prepared(found, shards=3)), "stage.0.steps=12", "data.workers=1")
    place.finish(*more, ranks=RANKS)
    assert place.step == 12


@fault
def test_D10_fewer_pictures_than_a_batch_are_refused_with_the_arithmetic(
    place: Place, prepared: Write
) -> None:
    more = on(place, prepared([{}] * 10))
    ended = place.begin(*more, ranks=RANKS).end()
    assert set(ended.codes) == {BadRecipe.code}, ended.said
    assert "24" in ended.said
    assert "10" in ended.said
