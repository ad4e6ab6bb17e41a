"""Fetched ahead: the same things in the same order, and nothing left behind."""

import multiprocessing
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from types import FrameType

import pytest

from daybreak.data import ahead as module
from daybreak.data import batches, loader, scenes
from daybreak.data.ahead import ahead
from daybreak.data.plan import Slot
from daybreak.data.prepared import Sample
from daybreak.failure import BadData


class Made:
    """Numbers, and what became of the making of them."""

    def __init__(self, count: int, pause: float = 0.0, failing: int | None = None) -> None:
        self.count, self.pause, self.failing = count, pause, failing
        self.begun, self.closed, self.threads = 0, 0, set[str]()

    def __call__(self) -> Generator[int]:
        try:
            for number in range(self.count):
                self.begun += 1
                self.threads.add(threading.current_thread().name)
                time.sleep(self.pause)
                if number == self.failing:
                    raise OSError("the disk has gone")
                yield number
        finally:
            self.closed += 1
            self.threads.add(threading.current_thread().name)


def fetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def until(count: int, made: Made) -> None:
    end = time.monotonic() + 5
    while made.begun < count and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.parametrize("ready", [1, 2, 5])
def test_everything_arrives_once_and_in_order(ready: int) -> None:
    assert list(ahead(Made(100)(), ready)) == list(range(100))
    assert list(ahead(Made(0)(), ready)) == []
    assert fetching() == []


def test_what_comes_next_is_there_before_it_is_asked_for_and_no_more_than_that() -> None:
    made = Made(100)
    with closing(ahead(made(), 2)) as things:
        assert next(things) == 0
        until(4, made)
        time.sleep(0.1)
        assert made.begun == 4  # one was had, two lie ready, one is held
        assert next(things) == 1
        until(5, made)
    assert made.threads == {"ahead"}


def test_work_and_fetching_go_on_side_by_side() -> None:
    began = time.monotonic()
    for _ in ahead(Made(10, pause=0.05)(), 2):
        time.sleep(0.05)
    assert time.monotonic() - began < 0.85  # 1.0 one after the other


def test_a_failure_arrives_after_all_that_came_before_it() -> None:
    things, had = ahead(Made(9, failing=5)(), 2), list[int]()
    with pytest.raises(OSError, match="the disk has gone"):
        had.extend(things)
    assert had == [0, 1, 2, 3, 4]
    assert fetching() == []


def test_even_what_would_end_a_process_arrives() -> None:
    def leaving() -> Generator[int]:
        yield 0
        raise SystemExit(3)

    def late(seconds: float) -> None:
        assert seconds < 2, "it was lost in the thread"

    with pytest.raises(SystemExit):
        list(ahead(leaving(), 2, late))
    assert fetching() == []


@pytest.mark.parametrize("taken", [1, 3])
def test_who_leaves_early_leaves_nothing_running(taken: int) -> None:
    made = Made(100)
    things = ahead(made(), 2)
    assert list(islice(things, taken)) == list(range(taken))
    del things
    assert fetching() == []
    assert made.closed == 1


def test_a_receiver_that_fails_leaves_nothing_running() -> None:
    made = Made(100)

    def receive() -> None:
        for number in ahead(made(), 2):
            assert number < 3, "a step that fails"

    with pytest.raises(AssertionError, match="a step that fails"):
        receive()
    assert fetching() == []
    assert made.closed == 1


def test_who_leaves_does_not_wait_for_a_read_that_never_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LEAVE", 0.2)
    release = threading.Event()

    def hung() -> Generator[int]:
        yield 0
        release.wait()

    things = ahead(hung(), 2)
    assert next(things) == 0
    began = time.monotonic()
    del things
    assert time.monotonic() - began < 2
    release.set()


def test_a_long_wait_is_told_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK", 0.1)
    told: list[float] = []
    assert list(ahead(Made(1, pause=0.55)(), 2, told.append)) == [0]
    assert 2 <= len(told) <= 5
    assert told == sorted(told)
    assert 0.1 <= told[0] < 0.55


@contextmanager
def signalled(after: float) -> Iterator[None]:
    def hear(number: int, frame: FrameType | None) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, hear)
    signal.setitimer(signal.ITIMER_REAL, after)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_signal_reaches_a_receiver_that_waits() -> None:
    began = time.monotonic()
    with signalled(0.1), pytest.raises(InterruptedError):
        next(ahead(Made(1, pause=1.0)(), 2))
    assert time.monotonic() - began < 3
    assert fetching() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_left_early_leave_no_thread_and_no_worker(workers: int) -> None:
    source = batches.Scenes(scenes.Config(canvas="32"), seed=5)
    config = batches.Config(source="scenes", workers=workers)
    before = multiprocessing.active_children()
    stream = loader.stream(source, config, 5, 32, batch=4, first=0, count=1000)
    assert next(stream).first == 0
    assert len(fetching()) == 1
    assert len(multiprocessing.active_children()) == len(before) + workers
    del stream
    assert fetching() == []
    assert multiprocessing.active_children() == before


class Slow(batches.Scenes):
    """One picture takes its time."""

    def samples(self, slots: Sequence[Slot]) -> list[Sample | BadData]:
        if any(slot.sample == 40 for slot in slots):
            time.sleep(2.5)
        return super().samples(slots)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_picture_is_waited_for_longer_than_workers_are_trusted(workers: int) -> None:
    """A worker that says nothing for a while is looked after, and then waited for again."""
    config, told = batches.Config(source="scenes", workers=workers), list[float]()
    here, there = (
        list(loader.stream(source, config, 5, 32, batch=4, first=0, count=14, late=told.append))
        for source in (
            batches.Scenes(scenes.Config(canvas="32"), seed=5),
            Slow(scenes.Config(canvas="32"), seed=5),
        )
    )
    assert max(told) > 1.5
    assert [batch.captions for batch in here] == [batch.captions for batch in there]
    assert all(bool((a.image == b.image).all()) for a, b in zip(here, there, strict=True))
