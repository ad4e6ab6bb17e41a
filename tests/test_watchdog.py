"""A run that hangs says where, and ends.

Run as a script under torchrun's environment, this file is what each rank does.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from daybreak.failure import BadData, Failure, LostPeer
from daybreak.train import parallel, watchdog
from tests import warm

LIMIT = 1.0


def spin() -> None:
    """Hang as a careless loop does."""
    while True:
        pass


def slow(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
    """Compile nothing, at leisure."""
    time.sleep(2 * LIMIT)
    return graph.forward


def wrote(path: Path) -> Callable[[LostPeer], object]:
    """Write down what is heard, and whom it blames."""

    def write(error: LostPeer) -> None:
        path.write_text(str(error))
        path.with_name(f"{path.name}-blames").write_text(str(error.rank))

    return write


def main(how: str, out: Path) -> None:
    """Let the last rank hang after a few steps."""
    if compiles := how == "compiles":  # what the compiler needs is loaded before time counts
        torch.compile(torch.cos, backend="eager")(torch.ones(1))
    told = "fails" in how or how == "is killed"
    limit, watchdog.HEARD = (60.0 if told else LIMIT), 2 * LIMIT
    with (
        parallel.world(parallel.Config(start_timeout=60)) as here,
        watchdog.Watchdog(here, limit, wrote(out / f"rank-{here.rank}"), compiles) as dog,
    ):
        for step in range(1, 4):
            parallel.gather(here, torch.ones(1))
            dog.beat(step)
        if how == "patience":
            with dog.patience(60):
                time.sleep(3 * LIMIT)
            dog.beat(4)
            time.sleep(0.5 * LIMIT)
            return
        if how == "is broken off":
            with suppress(KeyError), dog.patience(600):
                raise KeyError
        if compiles:
            if here.rank == here.size - 1:
                torch.compile(torch.sin, backend=slow)(torch.ones(1))
            parallel.gather(here, torch.ones(1))
            dog.beat(4)
            time.sleep(0.5 * LIMIT)
        if how == "fails, and another busily":  # none of its steps needs the one that has failed
            for step in range(4, 9):
                if here.rank == here.size - 1:
                    raise BadData("tooth.png is not a picture")
                time.sleep(LIMIT)
                dog.beat(step)
        if here.rank == here.size - 1:
            if how == "fails":
                raise BadData("tooth.png is not a picture")
            if how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            spin()
        if how in {"fails", "is killed"}:
            time.sleep(120)  # as NCCL waits for one that is gone
        parallel.gather(here, torch.ones(1))


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except Failure as failure:
        print(failure, file=sys.stderr, flush=True)
        os._exit(failure.code)  # as the command line leaves


@contextmanager
def ranks(size: int, how: str, out: Path) -> Iterator[list[warm.Started]]:
    """Start processes that know of one another; none is left behind."""
    started = warm.ranks(size, __file__, how, out)
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_a_hang_ends_with_its_stack_and_a_reason(tmp_path: Path) -> None:
    with ranks(1, "spins", tmp_path) as (alone,):
        _, said = alone.communicate(timeout=60)
    assert alone.returncode == LostPeer.code
    assert "in spin" in said
    reason = (tmp_path / "rank-0").read_text()
    assert "for the step after 3 to finish" in reason
    assert reason in said
    assert (tmp_path / "rank-0-blames").read_text() == "None"


def test_every_rank_shows_its_stack(tmp_path: Path) -> None:
    with ranks(2, "spins", tmp_path) as started:
        said = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [LostPeer.code] * 2
    assert "in gather" in said[0]
    assert "in spin" in said[1]
    assert not any("does not answer" in text for text in said)


def test_a_rank_that_cannot_answer_is_named(tmp_path: Path) -> None:
    with ranks(2, "stops", tmp_path) as started:
        _, said = started[0].communicate(timeout=60)
        assert started[0].returncode == LostPeer.code
    assert "in gather" in said
    assert "rank 1 does not answer" in said
    assert (tmp_path / "rank-0-blames").read_text() == "1"


def test_what_may_take_long_is_waited_for(tmp_path: Path) -> None:
    with ranks(1, "patience", tmp_path) as (alone,):
        _, said = alone.communicate(timeout=60)
    assert alone.returncode == 0, said
    assert not list(tmp_path.iterdir())


def test_patience_ends_with_what_was_broken_off(tmp_path: Path) -> None:
    with ranks(1, "is broken off", tmp_path) as (alone,):
        _, said = alone.communicate(timeout=60)
    assert alone.returncode == LostPeer.code, said
    assert "in spin" in said


def test_ranks_wait_for_one_that_compiles_and_not_for_what_it_does_after(tmp_path: Path) -> None:
    with ranks(2, "compiles", tmp_path) as started:
        said = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [LostPeer.code] * 2
    assert all("for the step after 4 to finish" in text for text in said)
    assert "in spin" in said[1]


def test_who_does_not_notice_that_another_has_failed_leaves_for_its_reason(tmp_path: Path) -> None:
    with ranks(2, "fails", tmp_path) as started:
        said = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [LostPeer.code, BadData.code]
    reason = (tmp_path / "rank-0").read_text()
    assert reason.startswith("rank 0 lost the others (rank 1: tooth.png is not a picture): ")
    assert reason in said[0]
    assert not (tmp_path / "rank-1").exists()
    assert (tmp_path / "rank-0-blames").read_text() == "1"


def test_who_is_killed_is_missed_before_the_limit(tmp_path: Path) -> None:
    with ranks(2, "is killed", tmp_path) as started:
        started[1].communicate(timeout=60)
        killed = time.monotonic()
        started[0].communicate(timeout=60)
        assert time.monotonic() - killed < 10 * LIMIT
    assert started[0].returncode == LostPeer.code
    reason = (tmp_path / "rank-0").read_text()
    assert reason.startswith(
        "rank 0 lost the others (rank 1: its process ended without a message): "
    )
    assert (tmp_path / "rank-0-blames").read_text() == "1"


def test_who_still_takes_steps_notices_by_itself(tmp_path: Path) -> None:
    with ranks(2, "fails, and another busily", tmp_path) as started:
        said = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [LostPeer.code, BadData.code]
    assert "lost the others (rank 1: tooth.png is not a picture)" in said[0]
    assert not (tmp_path / "rank-0").exists()


def test_ten_usual_steps_are_waited_for_and_what_needs_more_patience(tmp_path: Path) -> None:
    here = parallel.World(0, 1, torch.device("cpu"), None, HashStore())
    dog = watchdog.Watchdog(here, LIMIT, print)
    assert dog.allowed == 5 * LIMIT, "the first step compiles"
    for step, seconds, allowed in ((1, 100.0, LIMIT), (2, 3.0, 30.0), (3, 0.0, 15.0), (4, 3, 30.0)):
        dog.last = time.monotonic() - seconds
        dog.beat(step)
        assert dog.allowed == pytest.approx(allowed, rel=0.2), "the first one is not usual"
    for seconds, allowed in ((5.0, 30.0), (600.0, 600.0)):
        with dog.patience(seconds):
            assert dog.allowed == pytest.approx(allowed, rel=0.2)
        assert dog.allowed == pytest.approx(30.0, rel=0.2)


def test_who_waits_is_told_what_is_compiled_once_for_each_shape() -> None:
    here, said = parallel.World(0, 1, torch.device("cpu"), None, HashStore()), list[str]()
    wave, decay = (
        torch.compile(function, backend="eager", dynamic=False)
        for function in (torch.sin, torch.exp)
    )
    with watchdog.Watchdog(here, 60.0, print, compiled=True, tell=said.append) as dog:
        torch.compile(torch.cos, backend="eager")(torch.ones(1))
        assert said == [], "what is compiled between steps is for no picture"
        dog.beat(0)
        for step, (height, width) in enumerate(((48, 80), (56, 72), (48, 80), (56, 72)), start=1):
            dog.begin(height, width)
            decay(wave(torch.ones(height, width)))
            dog.beat(step)
            torch.compile(torch.tan, backend="eager", dynamic=False)(torch.ones(step))
    assert said == [
        "compiling for pictures of 80 x 48 px",
        "compiling for pictures of 72 x 56 px",
    ]
