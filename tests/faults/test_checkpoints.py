"""Rows C: whatever happens to a checkpoint, one that is whole is loaded, or none is."""

import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daybreak.failure import BadRecipe, BadStorage, LostPeer, NoCheckpoint
from daybreak.train import checkpoint
from tests.faults.faults import Calling, Late, Least, Limit, Refuse, Touch, die, fill, flip, leave
from tests.faults.jobs import Place, begun, few, ranks_of_the_matrix, state, tensors

Unbroken = Callable[..., Place]
Five = Callable[..., Place]
RANKS = ranks_of_the_matrix()


@pytest.fixture(scope="session")
def five(tmp_path_factory: pytest.TempPathFactory) -> Five:
    """A run that was killed between step 5 and 10; copies of it begin quickly."""
    made: dict[int, Place] = {}

    def stopped(ranks: int = RANKS) -> Place:
        if ranks not in made:
            place = Place(tmp_path_factory.mktemp("five"))
            job = place.begin(ranks=ranks)
            place.wait(job, 6)
            job.kill()
            job.end()
            assert place.checkpoints() == [5]
            made[ranks] = place
        return made[ranks]

    return stopped


# The save of step 15 opens, renames or removes a file 19 times on the first rank and twice on the
# other. Before one of these somebody is killed: before the manifest, the rename, the pruning...
POINTS = [(0, point, "") for point in (11, *range(1, 11), *range(12, 20))]
POINTS += [(1, 1, ""), (1, 2, "")]
POINTS += [(rank, point, "save_async") for rank, point in ((0, 10), (0, 12), (1, 2))]


@pytest.mark.parametrize(("rank", "point", "how"), few(POINTS, 0))
def test_C1_a_kill_inside_a_save_leaves_one_that_loads(
    tmp_path: Path, five: Five, unbroken: Unbroken, rank: int, point: int, how: str
) -> None:
    place = five().copy(tmp_path / "job")
    if how:
        place.change("save_async = false", "save_async = true")
    job = place.begin(ranks=RANKS, fault=Touch(15, point, die), faulty=rank)
    assert job.end().codes[rank] == -9
    good = checkpoint.newest(place.run, print)
    assert good is not None
    assert good.step in {10, 15}
    again = place.finish(ranks=RANKS)
    assert begun(again.said) == good.step
    assert not list(place.run.glob(".*checkpoint*"))
    assert place.bits() == unbroken(ranks=RANKS).bits()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: os.truncate(path, 0),
    "a quarter": lambda path: os.truncate(path, path.stat().st_size // 4),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "nearly all": lambda path: os.truncate(path, path.stat().st_size * 99 // 100),
    "missing": Path.unlink,
}


def files(folder: Path) -> list[Path]:
    """Every file of a checkpoint."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def newest(run: Path) -> tuple[int, list[str]]:
    """The step that is loaded, and what is said on the way there."""
    said: list[str] = []
    found = checkpoint.newest(run, said.append)
    return found.step if found else 0, said


@pytest.mark.parametrize("ranks", few([RANKS, 1], 1))
@pytest.mark.parametrize("damage", few([*DAMAGES.values()], 1), ids=DAMAGES)
def test_C2_a_damaged_file_is_found_whichever_it_is(
    tmp_path: Path, unbroken: Unbroken, damage: Callable[[Path], None], ranks: int
) -> None:
    run = unbroken(ranks=ranks).run
    names = [path.relative_to(run / "checkpoint-40") for path in files(run / "checkpoint-40")]
    assert len(names) > 5
    for name in names:
        copy = tmp_path / "run"
        shutil.copytree(run, copy, symlinks=True)
        size = (copy / "checkpoint-40" / name).stat().st_size
        damage(copy / "checkpoint-40" / name)
        step, said = newest(copy)
        assert step == 35, name
        if name.name != "manifest.json":
            assert len(said) == 1
            assert f"checkpoint-40 is damaged and skipped: {name}" in said[0]
            assert "missing" in said[0] or f"not {size:,}" in said[0]
        shutil.rmtree(copy)


def test_C2_swapped_files_are_found(tmp_path: Path, unbroken: Unbroken) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken(ranks=RANKS).run, run, symlinks=True)
    one, other = tensors(run / "checkpoint-40")[:2]
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)
    assert newest(run)[0] == 35


@pytest.mark.fault
def test_C2_a_run_goes_on_from_the_one_before_or_says_that_there_is_none(
    tmp_path: Path, unbroken: Unbroken
) -> None:
    place = unbroken(ranks=RANKS).copy(tmp_path / "job")
    dice = random.Random(1)
    flip(tensors(place.run / "checkpoint-40")[0], dice)
    ended = place.finish(ranks=RANKS)
    assert "checkpoint-40 is damaged and skipped" in ended.said
    assert "sha256" in ended.said
    assert begun(ended.said) == 35
    assert place.bits() == unbroken(ranks=RANKS).bits()
    for folder in place.run.glob("checkpoint-??"):
        flip(tensors(folder)[0], dice)
    ended = place.begin(ranks=RANKS).end()
    assert set(ended.codes) == {NoCheckpoint.code}, ended.said
    assert place.step == 40, "not a line of the log is lost"


@pytest.mark.parametrize("bits", few([20, 80], 1))
def test_C3_one_bit_is_enough(tmp_path: Path, unbroken: Unbroken, bits: int) -> None:
    run, dice = tmp_path / "run", random.Random(bits)
    shutil.copytree(unbroken(ranks=RANKS).run, run, symlinks=True)
    there = files(run / "checkpoint-40")
    sizes = [path.stat().st_size for path in there]
    missed = []
    for _ in range(bits):
        # Every file as often as every other: a manifest is small, and matters most.
        path = dice.choice(there) if dice.random() < 0.5 else dice.choices(there, sizes)[0]
        before = path.read_bytes()
        flip(path, dice)
        if newest(run)[0] != 35:
            missed.append((path.name, _where(before, path.read_bytes())))
        path.write_bytes(before)
    assert not missed
    assert newest(run)[0] == 40


def _where(before: bytes, after: bytes) -> str:
    place = next(n for n, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
    return f"{before[max(0, place - 20) : place + 20]!r} -> {after[place : place + 1]!r}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("only root can make a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.fault
def test_C4_a_disk_that_is_full_ends_the_run_at_the_third_save(
    small_disk: Path, five: Five
) -> None:
    place = five().copy(small_disk / "job")
    full = Calling("daybreak.train.saving", "Saver.save", fill)
    ended = place.begin(ranks=RANKS, fault=full, faulty=0).end()
    assert set(ended.codes) == {BadStorage.code}, ended.said
    assert place.checkpoints() == [5]
    assert newest(place.run)[0] == 5
    assert not list(place.run.glob(".*checkpoint*")), "partial files are removed"
    for step in (10, 15, 20):
        target = re.escape(str(place.run / f"checkpoint-{step}"))
        assert re.search(rf"cannot write {target}: (rank 0: )?No space left", ended.said)
    assert ended.said.count("training goes on") == 2
    assert "MiB are free" in ended.said
    assert "it needs" in ended.said
    assert place.status()["code"] == BadStorage.code


@pytest.mark.fault
def test_C4_a_run_that_its_disk_cannot_hold_does_not_begin(small_disk: Path) -> None:
    place = Place(small_disk / "job")
    (small_disk / "ballast").write_bytes(bytes(6 * 2**20))
    ended = place.begin("dit.width=64", ranks=RANKS).end()
    assert set(ended.codes) == {BadStorage.code}, ended.said
    assert "MiB free, and 3 checkpoints of" in ended.said
    assert not (place.run / "recipe.toml").exists()


@pytest.mark.fault
def test_C4_files_that_may_not_grow_are_like_a_full_disk(tmp_path: Path, five: Five) -> None:
    place = five().copy(tmp_path / "job")
    ended = place.begin(ranks=RANKS, fault=Limit(resource.RLIMIT_FSIZE, 50_000)).end()
    assert set(ended.codes) == {BadStorage.code}, ended.said
    assert newest(place.run) == (5, [])
    assert place.step == 20
    assert not list(place.run.glob(".*checkpoint*"))


@pytest.mark.fault
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("rank", range(RANKS))
def test_C5_a_disk_that_stumbles_is_tried_again(
    tmp_path: Path, five: Five, unbroken: Unbroken, times: int, rank: int
) -> None:
    place = five().copy(tmp_path / "job")
    fault = Touch(10, 2, Refuse(times))
    ended = place.finish(ranks=RANKS, fault=fault, faulty=rank)
    assert "training goes on" not in ended.said
    assert place.bits() == unbroken(ranks=RANKS).bits()


@pytest.mark.fault
@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS], ids=["broken", "read-only"])
def test_C5_a_disk_that_stays_broken_ends_the_run(tmp_path: Path, five: Five, number: int) -> None:
    place = five().copy(tmp_path / "job")
    began = time.monotonic()
    ended = place.begin(ranks=RANKS, fault=Touch(10, 2, Refuse(0, number))).end()
    assert time.monotonic() - began < 30
    assert set(ended.codes) == {BadStorage.code}, ended.said
    assert newest(place.run)[0] == 5


@pytest.mark.fault
def test_C6_a_save_in_the_background_holds_what_was_when_it_began(
    place: Place, unbroken: Unbroken
) -> None:
    more = ("stage.0.steps=50", "keep=12")
    late = Calling("daybreak.train.saving", "Saver._part", Late(0.2))
    place.finish(*more, "save_async=true", ranks=RANKS, fault=late)
    whole = unbroken(*more, ranks=RANKS)
    assert place.checkpoints() == whole.checkpoints() == list(range(50, 0, -5))
    for step in whole.checkpoints():
        assert state(folder(place, step)) == state(folder(whole, step)), step


@pytest.mark.fault
@pytest.mark.parametrize("act", [Refuse(0), leave], ids=["raises", "exits"])
def test_C6_a_writer_that_fails_stops_all(
    tmp_path: Path, five: Five, act: Callable[[str, str], None]
) -> None:
    place = five().copy(tmp_path / "job")
    place.change("save_async = false", "save_async = true")
    ended = place.begin(ranks=RANKS, fault=Touch(10, 2, act), faulty=1).end()
    if act is leave:
        assert ended.codes == [LostPeer.code, 17], ended.said
    else:
        assert set(ended.codes) == {BadStorage.code}, ended.said
    assert place.checkpoints() == [5]
    assert (place.run / "latest").resolve().name == "checkpoint-5"


@pytest.mark.fault
def test_C7_two_good_ones_are_there_at_every_moment(tmp_path: Path, five: Five) -> None:
    place, counts = five().copy(tmp_path / "job"), tmp_path / "counts"
    fault = Touch(15, 0, Least(place.run, counts))  # from its save on, at every touch
    place.finish(ranks=RANKS, fault=fault, faulty=0)
    found = [int(line) for line in counts.read_text().splitlines()]
    assert len(found) > 50
    assert min(found) >= 2


@pytest.mark.fault
def test_C7_a_damaged_one_is_not_counted_among_those_that_are_kept(
    tmp_path: Path, five: Five
) -> None:
    place = five().copy(tmp_path / "job")
    job = place.begin(ranks=RANKS)
    place.wait(job, 16)
    job.kill(19)  # SIGSTOP
    flip(tensors(place.run / "checkpoint-15")[0], random.Random(0))
    job.kill(18)  # SIGCONT
    until = time.monotonic() + 60
    while 20 not in place.checkpoints() or place.step < 21:
        assert time.monotonic() < until
        time.sleep(0.005)
    job.kill()
    job.end()
    good = [step for step in place.checkpoints() if checkpoint.verify(folder(place, step)) is None]
    assert set(good) >= {20, 10}


def folder(place: Place, step: int) -> Path:
    return place.run / f"checkpoint-{step}"


@pytest.mark.fault
def test_C7_milestones_stay(tmp_path: Path) -> None:
    place = Place(tmp_path / "job")
    place.finish("keep_every=20", ranks=RANKS)
    assert place.checkpoints() == [40, 35, 30, 20]


@pytest.mark.fault
def test_C8_a_folder_belongs_to_one_run(tmp_path: Path, five: Five) -> None:
    place = five().copy(tmp_path / "job")
    one = place.begin(ranks=RANKS)
    place.wait(one, 8)
    one.kill(19)
    other = place.begin(ranks=RANKS).end()
    assert set(other.codes) == {BadRecipe.code}, other.said
    assert other.seconds < 5
    assert f"process {one.ranks[0].pid}" in other.said
    one.kill(18)
    one.kill()
    one.end()
    again = place.finish(ranks=RANKS)
    assert f"took over the lock of process {one.ranks[0].pid}" in again.said


CANARY = "import pathlib; pathlib.Path({path!r}).write_text('it ran')"


def payload(canary: Path) -> bytes:
    """A pickle that runs code when it is loaded."""
    code = CANARY.format(path=str(canary)).encode()
    return b"c__builtin__\nexec\n(S" + repr(code.decode()).encode() + b"\ntR."


def reseal(folder: Path) -> None:
    """Make the manifest agree with what is there, as who can write the files can."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files(folder)
        if path.name != "manifest.json"
    }
    sign(folder, manifest)


def sign(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest that agrees with itself."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    said["sha256"] = checkpoint.digest(said)
    (folder / "manifest.json").write_text(json.dumps(said))


def test_C9_the_payload_is_one(tmp_path: Path) -> None:
    import pickle

    pickle.loads(payload(tmp_path / "canary"))
    assert (tmp_path / "canary").read_text() == "it ran"


@pytest.mark.parametrize("ranks", few([RANKS, 1], 1))
def test_C9_no_file_of_a_checkpoint_is_ever_executed(
    tmp_path: Path, unbroken: Unbroken, ranks: int
) -> None:
    whole, canary = unbroken(ranks=ranks), tmp_path / "canary"
    names = [path.relative_to(whole.run) for path in files(whole.run / "checkpoint-40")]
    names += [Path("checkpoint-40/extra.pt"), Path("checkpoint-40/state/.metadata")]
    for number, name in enumerate(names):
        place = whole.copy(tmp_path / str(number))
        shutil.rmtree(place.run / "checkpoint-35")
        (place.run / name).parent.mkdir(exist_ok=True)
        (place.run / name).write_bytes(payload(canary))
        if name.name != "manifest.json":
            reseal(place.run / "checkpoint-40")
        place.change("steps = 40", "steps = 41")
        ended = place.begin(ranks=ranks).end()
        assert not canary.exists(), name
        if name.suffix in {".safetensors", ".pt"} or name.name == "manifest.json":
            assert set(ended.codes) == {NoCheckpoint.code}, f"{name}: {ended.said}"
            assert name.name in ended.said
        shutil.rmtree(place.folder)


def test_C9_headers_and_paths_that_cannot_be_meant_are_refused(
    tmp_path: Path, unbroken: Unbroken
) -> None:
    place = unbroken(ranks=RANKS).copy(tmp_path / "job")
    large = tensors(place.run / "checkpoint-40")[0]
    large.write_bytes((2**30).to_bytes(8, "little") + b"{" + b" " * 1000)
    reseal(place.run / "checkpoint-40")
    step, said = newest(place.run)
    assert step == 35
    assert large.name in said[0]
    assert "header" in said[0]
    older = place.run / "checkpoint-35"
    table = json.loads((older / "manifest.json").read_text())
    outside = place.folder / "outside"
    outside.write_bytes(b"x")
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    sign(older, table | {"files": table["files"] | {"../../outside": entry}})
    step, said = newest(place.run)
    assert step == 0
    assert "outside" in said[1]


@pytest.mark.parametrize("kind", ["newer", "weights only", "diffusers"])
def test_C10_what_is_no_checkpoint_of_this_version_is_named(
    tmp_path: Path, unbroken: Unbroken, kind: str
) -> None:
    place = unbroken().copy(tmp_path / "job")
    place.change("steps = 40", "steps = 41")
    shutil.rmtree(place.run / "checkpoint-35")
    folder = place.run / "checkpoint-40"
    if kind == "newer":
        manifest = json.loads((folder / "manifest.json").read_text())
        sign(folder, manifest | {"schema": 99})
        said = "schema 99"
    elif kind == "weights only":
        (folder / "optimizer.safetensors").unlink()
        reseal(folder)
        said = "checkpoint-40"
    else:
        shutil.rmtree(folder)
        (folder / "transformer").mkdir(parents=True)
        (folder / "model_index.json").write_text('{"_class_name": "PRXPixelPipeline"}')
        said = "checkpoint-40"
    ended = place.begin().end()
    assert ended.code in {BadRecipe.code, NoCheckpoint.code}, ended.said
    assert said in ended.said
    assert place.step == 40, "no line of the log is lost"


def test_C10_a_checkpoint_of_another_model_is_refused_before_anything_is_loaded(
    tmp_path: Path, unbroken: Unbroken
) -> None:
    place = unbroken().copy(tmp_path / "job")
    place.change("steps = 40", "steps = 41")
    place.change("width = 32", "width = 48")
    ended = place.begin().end()
    assert ended.code in {BadRecipe.code, NoCheckpoint.code}, ended.said
