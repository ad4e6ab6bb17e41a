"""The loader: the same batches, however many help, and no silence about what goes wrong."""

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from daybreak.data import batches, loader, scenes
from daybreak.data.plan import Slot
from daybreak.data.prepared import Sample
from daybreak.failure import BadData, LostPeer

Write = Callable[..., Path]
SCENES = scenes.Config(canvas="32")


def read(
    config: batches.Config, source: batches.Pictures, done: int = 0, count: int = 3
) -> list[batches.Batch]:
    return list(loader.stream(source, config, 5, 32, batch=4, first=0, count=count, done=done))


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
        read(config, source)[2].image, read(config, source, done=2, count=1)[0].image
    )


def test_pictures_arrive_in_minus_one_to_one_with_their_captions() -> None:
    source = batches.Scenes(SCENES, seed=5)
    batch = read(batches.Config(source="scenes", workers=0, empty_captions=0), source)[1]
    expected = scenes.sample(SCENES, 5, 4)
    assert batch.image.shape == (4, 3, 32, 32)
    restored = (batch.image[0].permute(1, 2, 0) + 1) * 127.5
    np.testing.assert_allclose(restored.numpy(), expected.image, atol=1e-3)
    assert batch.captions[0] == expected.caption


def test_workers_look_as_far_ahead_as_memory_allows() -> None:
    picture = 3 * 512**2
    assert loader.foresight(0, 32, 512) is None
    assert loader.foresight(8, 32, 512) == loader.FORESIGHT
    assert loader.foresight(8, 256, 512) == 1
    assert loader.foresight(16, 2**14, 1024) == 1
    for workers in (1, 2, 5, 8, 64):
        for share in (1, 7, 100, 300, 1000):
            ahead = loader.foresight(workers, share, 512)
            assert ahead is not None
            assert 1 <= ahead <= loader.FORESIGHT
            assert ahead == 1 or ahead * workers * share * picture <= loader.UNDERWAY
            more = (ahead + 1) * workers * share * picture
            assert ahead == loader.FORESIGHT or more > loader.UNDERWAY


@pytest.mark.skipif(sys.platform != "linux", reason="forking is safe on Linux only")
def test_workers_are_forked_whatever_python_does_by_default() -> None:
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)  # as from Python 3.14 on
    try:
        config = batches.Config(source="scenes", workers=1)
        source = batches.Scenes(SCENES, seed=5)
        stream = loader.stream(source, config, 5, 32, batch=4, first=0, count=9)
        with closing(stream):
            next(stream)
            (worker,) = multiprocessing.active_children()
            assert type(worker).__name__ == "ForkProcess"
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_ctrl_c_while_a_worker_starts_is_not_meant_for_it() -> None:
    """Where workers are not forked (macOS), they are in the terminal's group for seconds."""
    code = """if True:
        import multiprocessing, os, signal, threading
        from daybreak.data import batches, loader, scenes
        loader.PROCESSES = multiprocessing.get_context("spawn")
        heard = []
        signal.signal(signal.SIGINT, lambda *_: heard.append(1))
        threading.Timer(0.7, os.killpg, (0, signal.SIGINT)).start()
        config = batches.Config(source="scenes", workers=1)
        stream = loader.stream(
            batches.Scenes(scenes.Config(), 5), config, 5, 32, batch=4, first=0, count=3
        )
        print(len(list(stream)), len(heard))
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    assert (done.stdout, done.returncode) == ("3 1\n", 0), done.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_vanishes_is_named(pictures: Path, workers: int) -> None:
    config = batches.Config(source=str(pictures), workers=workers)
    source = batches.Folder(pictures, seed=1)
    (pictures / "3.png").unlink()
    with pytest.raises(BadData, match=r"3\.png"):
        list(loader.stream(source, config, 1, 32, batch=8, first=0, count=1))


SHAPES = ("64x64", "32x128", "128x32")


def rows(count: int) -> list[dict[str, Any]]:
    """Pictures of three shapes, taller or wider than they need be, each with its own caption."""
    return [
        {"bucket": SHAPES[number % 3], "captions": [f"number {number}"]} for number in range(count)
    ]


def damaged(count: int, *bad: int) -> list[dict[str, Any]]:
    made = rows(count)
    for number in bad:
        made[number] |= {"image": {"bytes": b"", "path": None}, "where": f"photos/{number}.jpg"}
    return made


def test_a_stage_taken_up_in_the_middle_meets_the_rest_of_its_batches(prepared: Write) -> None:
    config = batches.Config(source=str(prepared(rows(20))), workers=0)
    source = batches.pictures(config, None, 9, patch=16)
    whole = list(loader.stream(source, config, 9, 64, 4, first=0, count=12))
    rest = list(loader.stream(source, config, 9, 64, 4, first=0, count=5, done=7))
    for one, other in zip(whole[7:], rest, strict=True):
        assert torch.equal(one.image, other.image)
        assert (one.captions, one.first) == (other.captions, other.first)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_replaced_counted_and_named_once(
    prepared: Write, workers: int
) -> None:
    folder = str(prepared(damaged(24, 4)))
    config = batches.Config(source=folder, workers=workers, empty_captions=0)
    source = batches.pictures(config, None, 9, patch=16)
    stream = list(loader.stream(source, config, 9, 64, 4, first=0, count=12))
    assert all(len(batch.image) == len(batch.captions) == 4 for batch in stream)
    said = [caption for batch in stream for caption in batch.captions]
    assert "number 4" not in said
    assert len(set(said)) == 23
    assert sum(batch.substituted for batch in stream) == 2  # in two passes
    complaints = [complaint for batch in stream for complaint in batch.complaints]
    assert len(complaints) == 1
    assert "photos/4.jpg" in complaints[0]


def test_too_many_pictures_that_cannot_be_read_end_in_a_list_of_ten(prepared: Write) -> None:
    folder = str(prepared(damaged(60, *range(0, 60, 2))))
    config = batches.Config(source=folder, workers=0)
    source = batches.pictures(config, None, 9, patch=16)
    with pytest.raises(BadData, match=r"samples could not be read, more than 1%") as caught:
        list(loader.stream(source, config, 9, 64, 4, first=0, count=60))
    assert len(re.findall(r"photos/\d+\.jpg", str(caught.value))) == 10


def test_pictures_are_mirrored_by_their_share() -> None:
    class Half(batches.Scenes):
        """Dark on the left, bright on the right."""

        def samples(self, slots: Sequence[Slot]) -> list[Sample | BadData]:
            picture = np.zeros((slots[0].height, slots[0].width, 3), np.uint8)
            picture[:, slots[0].width // 2 :] = 255
            return [Sample(picture, "")] * len(slots)

    config = batches.Config(source="folder", workers=0, mirrored=0.3)
    stream = loader.stream(Half(SCENES, 5), config, 5, 8, batch=100, first=0, count=20)
    turned = sum(int((batch.image[:, 0, 0, 0] > 0).sum()) for batch in stream)
    assert abs(turned / 2000 - 0.3) < 0.04


def test_a_worker_that_is_killed_is_named_at_once() -> None:
    class Slow(batches.Scenes):
        """Says who draws, and takes its time."""

        def samples(self, slots: Sequence[Slot]) -> list[Sample | BadData]:
            time.sleep(0.2)
            return [Sample(np.zeros((32, 32, 3), np.uint8), str(os.getpid()))] * len(slots)

    config = batches.Config(source="scenes", workers=1, empty_captions=0)
    stream = loader.stream(Slow(SCENES, 5), config, 5, 32, batch=4, first=0, count=1000)
    victim = int(next(stream).captions[0])
    assert victim != os.getpid()
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(LostPeer, match=str(victim)) as caught:
        list(islice(stream, 20))
    assert time.monotonic() - began < 8
    assert caught.value.code == 6


class Leaving:
    """Says in which process it is swept up."""

    def __init__(self, file: Path) -> None:
        self.file, self.itself = file, self  # only a sweep finds it

    def __del__(self) -> None:
        with self.file.open("a") as file:
            file.write(f"{os.getpid()}\n")


class Sweeping(batches.Scenes):
    """Sweeps up before it makes pictures."""

    def samples(self, slots: Sequence[Slot]) -> list[Sample | BadData]:
        gc.collect()
        return super().samples(slots)


def test_a_worker_does_not_sweep_up_what_the_main_process_has_left(tmp_path: Path) -> None:
    file = tmp_path / "swept"
    gc.disable()
    try:
        Leaving(file)
        read(batches.Config(source="scenes", workers=1), Sweeping(SCENES, seed=5))
        assert not file.exists()
    finally:
        gc.enable()
    gc.collect()
    assert file.read_text() == f"{os.getpid()}\n"


class Sleepy:
    """Steps aside as a worker should, but for the first so many, which hang, deaf to signals."""

    def __init__(self, place: Path, many: int) -> None:
        self.place, self.many, self.real = place, many, loader._step_aside

    def __call__(self, *arguments: Any) -> None:
        for number in range(self.many):
            with suppress(FileExistsError):
                (self.place / str(number)).touch(exist_ok=False)
                (self.place / f"pid-{os.getpid()}").touch()
                time.sleep(1000)
        self.real(*arguments)


def hanging(place: Path, many: int, patch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    patch.setattr(loader, "START", 1.0)
    patch.setattr(loader, "_step_aside", Sleepy(place, many))
    config = batches.Config(source="scenes", workers=1)
    return [batch.image for batch in read(config, batches.Scenes(SCENES, seed=5))]


def test_a_worker_that_hangs_at_its_start_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = hanging(tmp_path, 1, monkeypatch)
    config = batches.Config(source="scenes", workers=0)
    expected = [batch.image for batch in read(config, batches.Scenes(SCENES, seed=5))]
    assert all(map(torch.equal, found, expected))
    (hung,) = tmp_path.glob("pid-*")
    with pytest.raises(ProcessLookupError):
        os.kill(int(hung.name.removeprefix("pid-")), 0)


def test_workers_that_hang_again_and_again_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LostPeer, match="a loader worker did not start within 1 s, 3 times"):
        hanging(tmp_path, 3, monkeypatch)


class Loader:
    """Does what it is told, batch by batch."""

    def __init__(self, *does: Exception | None) -> None:
        self.does = iter(does)

    def __call__(self) -> "Loader":
        return self

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> loader.Stacked:
        if failure := next(self.does):
            raise failure
        return torch.zeros(1, 8, 8, 3, dtype=torch.uint8), [""], []


RESET = ConnectionResetError(104, "Connection reset by peer")
DEAD = RuntimeError("DataLoader worker (pid(s) 71) exited unexpectedly")
SILENT = RuntimeError("DataLoader timed out after 1 seconds")


def test_a_worker_that_is_killed_while_it_sends_is_named() -> None:
    with pytest.raises(LostPeer, match=r"pid\(s\) 71"):
        list(loader._arriving(Loader(None, RESET, DEAD)))


@pytest.mark.parametrize("then", [(None,), ()], ids=["another", "the end"])
def test_a_batch_that_is_lost_on_its_way_is_never_passed_over(then: tuple[None, ...]) -> None:
    arriving = loader._arriving(Loader(None, RESET, *then))
    next(arriving)
    with pytest.raises(LostPeer, match="batch was lost"):
        next(arriving)


def test_a_worker_that_is_silent_is_waited_for_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(list(loader._arriving(Loader(SILENT, SILENT, None)))) == 1
    monkeypatch.setattr(loader, "PATIENCE", 0.0)
    with pytest.raises(LostPeer, match="timed out"):
        list(loader._arriving(Loader(SILENT, None)))


def test_bytes_become_the_same_floats_with_numpy_as_with_torch() -> None:
    pixels = (
        torch.arange(256, dtype=torch.uint8).repeat(2 * 3 * 8 * 8).view(4, 64, 32, 12)[..., 3:6]
    )
    floats = loader.to_unit(pixels)
    assert torch.equal(floats, pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1))
    assert floats.is_contiguous()
    assert (float(floats.min()), float(floats.max())) == (-1, 1)


def test_a_worker_is_patient_with_a_step_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "PATIENCE", 0.2)
    arriving = loader._arriving(Loader(None, SILENT, None))
    next(arriving)
    time.sleep(0.3)  # in the step; the silence begins when the next batch is asked for
    next(arriving)


def test_what_is_no_fault_of_a_worker_is_not_laid_at_its_door() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        next(loader._arriving(Loader(RuntimeError("CUDA error: out of memory"))))


@pytest.mark.parametrize(
    ("torn", "done", "fine"),
    [
        (range(11), 0, True),  # ten are spare, and one in a hundred
        (range(12), 0, False),
        (range(1000, 1012), 10, False),  # what was read before an interruption makes up for nothing
    ],
)
def test_ten_pictures_and_one_in_a_hundred_may_fail(torn: range, done: int, fine: bool) -> None:
    class Torn(batches.Scenes):
        """Some cannot be read, and others stand in for them."""

        def samples(self, slots: Sequence[Slot]) -> list[Sample | BadData]:
            said = ["torn" if slot.sample in torn else "" for slot in slots]
            return [Sample(np.zeros((8, 8, 3), np.uint8), "", complaint) for complaint in said]

    config = batches.Config(source="scenes", workers=0)
    stream = loader.stream(Torn(SCENES, 5), config, 5, 8, 100, first=0, count=1, done=done)
    if fine:
        (batch,) = stream
        assert (batch.substituted, batch.complaints) == (len(torn), ("torn",))
    else:
        with pytest.raises(BadData, match="12 of 100 samples could not be read"):
            list(stream)


def test_more_pictures_may_fail_as_more_are_read() -> None:
    class Rare(batches.Scenes):
        """One in every hundred cannot be read."""

        def samples(self, slots: Sequence[Slot]) -> list[Sample | BadData]:
            torn = ["torn" if slot.sample % 100 == 99 else "" for slot in slots]
            return [Sample(np.zeros((8, 8, 3), np.uint8), "", said) for said in torn]

    config = batches.Config(source="scenes", workers=0)
    stream = loader.stream(Rare(SCENES, 5), config, 5, 8, batch=100, first=0, count=30)
    assert sum(batch.substituted for batch in stream) == 30


def test_whether_a_picture_is_mirrored_says_nothing_about_its_caption() -> None:
    class Half(batches.Scenes):
        """Dark on the left, bright on the right."""

        def samples(self, slots: Sequence[Slot]) -> list[Sample | BadData]:
            picture = np.zeros((8, 8, 3), np.uint8)
            picture[:, 4:] = 255
            return [Sample(picture, "half")] * len(slots)

    config = batches.Config(source="folder", workers=0, mirrored=0.5, empty_captions=0.5)
    stream = loader.stream(Half(SCENES, 5), config, 5, 8, batch=100, first=0, count=20)
    both = sum(
        int(image[0, 0, 0] > 0) and not caption
        for batch in stream
        for image, caption in zip(batch.image, batch.captions, strict=True)
    )
    assert abs(both / 2000 - 0.25) < 0.04


def test_captions_are_told_before_their_batch_comes() -> None:
    heard: list[list[str]] = []
    config = batches.Config(source="scenes", workers=0)
    source = batches.Scenes(SCENES, 5)
    stream = loader.stream(source, config, 5, 32, 4, first=0, count=3, expect=heard.append)
    came = [batch.captions for batch in stream]
    assert heard == came
