"""Rows P: processes that die, hang, are sent away, or never come."""

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daybreak.failure import Failure, LostPeer
from daybreak.train import checkpoint
from tests import warm
from tests.faults.faults import (
    At,
    Calling,
    Clock,
    Limit,
    Sleep,
    Touch,
    die,
    hang_up,
    out_of_memory,
    spin,
)
from tests.faults.jobs import (
    Ended,
    Job,
    Place,
    begun,
    ranks_of_the_matrix,
    torchrun,
)

Unbroken = Callable[..., Place]
RANKS = ranks_of_the_matrix()
DICE = random.Random(75)
SCRIPT = Path(__file__).parents[2] / "launch" / "torchrun.sh"


def wait(until: Callable[[], Any], seconds: float = 300) -> None:
    """Wait for something to be so."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.fault
def test_P1_all_leave_when_one_rank_dies(place: Place, unbroken: Unbroken) -> None:
    job = place.begin(ranks=3)
    place.wait(job, 7)
    os.kill(job.ranks[1].pid, signal.SIGKILL)
    died = time.monotonic()
    ended = job.end()
    assert time.monotonic() - died < 10
    assert ended.codes == [LostPeer.code, -9, LostPeer.code], ended.said
    assert place.status()["code"] == LostPeer.code
    place.finish(ranks=3)
    assert place.bits() == unbroken(ranks=3).bits()


@pytest.mark.fault
def test_P1_torchrun_ends_too_and_leaves_no_orphans(place: Place, unbroken: Unbroken) -> None:
    launched = torchrun(place, 3)
    wait(lambda: place.step >= 7)
    ranks = launched.ranks()
    assert len(ranks) == 3
    os.kill(ranks[1], signal.SIGKILL)
    died = time.monotonic()
    code, said = launched.end()
    assert time.monotonic() - died < 10
    assert code == 1
    assert "rank      : 1" in said or "local_rank: 1" in said, said
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    again = torchrun(place, 3, options=["--max-restarts=1"])
    wait(lambda: place.step >= 20)
    os.kill(again.ranks()[1], signal.SIGKILL)
    code, said = again.end()
    assert code == 0, said
    assert place.bits() == unbroken(ranks=3).bits()


@pytest.mark.fault
@pytest.mark.parametrize("how", ["stopped", "busy"])
def test_P2_a_hang_is_noticed_and_shown(place: Place, how: str) -> None:
    fault = At(8, spin) if how == "busy" else None
    job = place.begin("health.step_timeout=6", ranks=3, fault=fault, faulty=1)
    place.wait(job, 7)
    if how == "stopped":
        os.kill(job.ranks[1].pid, signal.SIGSTOP)
    hung = time.monotonic()
    wait(lambda: all(job.ranks[rank].exitcode is not None for rank in (0, 2)))
    assert time.monotonic() - hung < 6 + 15
    if how == "stopped":
        os.kill(job.ranks[1].pid, signal.SIGKILL)
    ended = job.end()
    assert ended.codes[0] == ended.codes[2] == LostPeer.code, ended.said
    shown = {rank for rank in range(3) if f"rank {rank}: no step for" in ended.said}
    assert shown == ({0, 2} if how == "stopped" else {0, 1, 2})
    if how == "stopped":
        assert "rank 1 does not answer" in ended.said
    else:
        assert "in spin" in ended.said


def left(ended: Ended, place: Place) -> None:
    """Check that a run was sent away and has saved."""
    assert set(ended.codes) == {75}, ended.said
    status = place.status()
    if not place.step:
        assert "stopped before the first step" in ended.said
        return
    assert (status["state"], status["reason"], status["code"]) == ("stopped", "preempted", 75)
    assert place.checkpoints()[0] == status["checkpoint"] == status["step"] == place.step


@pytest.mark.fault
@pytest.mark.parametrize("at", [0, *(DICE.randrange(1, 39) for _ in range(9))])
def test_P3_one_rank_that_is_sent_away_takes_all_with_it(
    place: Place, unbroken: Unbroken, at: int
) -> None:
    job = place.begin(ranks=RANKS)
    if at:
        place.wait(job, at)
    else:  # before the first step
        wait((place.run / "status.json").exists)
    os.kill(job.ranks[at % RANKS].pid, signal.SIGTERM)
    left(job.end(), place)
    place.finish(ranks=RANKS)
    assert place.bits() == unbroken(ranks=RANKS).bits()


MOMENTS = {
    "evaluation": Calling("daybreak.train.evaluations", "take", Sleep(1, 2)),
    "save": Calling("daybreak.train.saving", "save_file", Sleep(1, 2)),
    "grid": Calling("daybreak.train.grids", "draw", Sleep(1, 2)),
    "first step": Calling("daybreak.train.step", "_gradient", Sleep(1, 2)),
}
LOOKS = ("evaluate.every=10", "evaluate.pictures=32", "sample.every=10")


@pytest.mark.fault
@pytest.mark.parametrize("moment", MOMENTS)
def test_P3_a_signal_in_the_middle_of_something_waits_for_its_end(
    place: Place, unbroken: Unbroken, moment: str
) -> None:
    job = place.begin(*LOOKS, ranks=RANKS, fault=MOMENTS[moment])
    step = {"first step": 0, "save": 5, "evaluation": 10, "grid": 10}[moment]
    if step:
        place.wait(job, step)
    else:
        wait((place.run / "status.json").exists)
    time.sleep(0.5)
    job.kill(signal.SIGTERM)  # to all of them at once, as to a group
    left(job.end(), place)
    place.finish(*LOOKS, ranks=RANKS)
    assert place.bits() == unbroken(*LOOKS, ranks=RANKS).bits()


@pytest.mark.fault
@pytest.mark.parametrize("at", [3, 10, 14, 22, 31, 37])
def test_P3_torchrun_passes_the_signal_on(place: Place, unbroken: Unbroken, at: int) -> None:
    launched = torchrun(place, RANKS, "data.workers=1")
    wait(lambda: place.step >= at)
    if at % 2:
        launched.process.terminate()
    else:
        os.killpg(launched.process.pid, signal.SIGTERM)
    launched.end()
    assert place.status()["code"] == 75
    assert place.checkpoints()[0] == place.step
    place.finish("data.workers=1", ranks=RANKS)
    assert place.bits()["state"] == unbroken("data.workers=1", ranks=RANKS).bits()["state"]


@pytest.mark.fault
def test_P3_the_launch_script_leaves_with_the_true_code(place: Place, unbroken: Unbroken) -> None:
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {"RECIPE": str(place.recipe), "RUN": str(place.run), "GPUS": str(RANKS)}
    given |= {"PORT": str(warm.free_port()), "PATH": tools}
    for code in (75, 0):
        launched = subprocess.Popen(["bash", str(SCRIPT)], env=os.environ | given)
        if code:
            wait(lambda: place.step >= 8)
            launched.terminate()
        assert launched.wait(300) == code
    assert place.bits() == unbroken(ranks=RANKS).bits()


@pytest.mark.fault
def test_P4_who_insists_is_obeyed_at_once(place: Place) -> None:
    slow = Calling("daybreak.train.saving", "save_file", Sleep(2, 30))
    job = place.begin(fault=slow)
    wait((place.run / ".tmp-checkpoint-5").exists)
    job.kill(signal.SIGINT)
    time.sleep(0.3)
    job.kill(signal.SIGINT)
    insisted = time.monotonic()
    ended = job.end()
    assert time.monotonic() - insisted < 2
    assert ended.code == 130
    job = place.begin(fault=Touch(15, 3, die))
    assert job.end().code == -9  # SIGKILL in the middle of a save
    job = place.begin()
    place.wait(job, 12)
    job.kill(signal.SIGTERM)
    job.kill(signal.SIGKILL)
    job.end()
    found = checkpoint.newest(place.run, print)
    assert found is not None
    assert found.step >= 10
    place.finish()


@pytest.mark.fault
@pytest.mark.parametrize("how", ["device", "process", "save"])
def test_P5_out_of_memory_says_what_to_lower(place: Place, how: str) -> None:
    no_more = Limit(resource.RLIMIT_AS, 1 << 20)  # than it has
    faults: dict[str, Callable[[], object]] = {
        "device": At(8, out_of_memory),
        "process": At(8, no_more),
        "save": Touch(10, 2, no_more),
    }
    job = place.begin(ranks=RANKS, fault=faults[how], faulty=RANKS - 1)
    place.wait(job, 7)
    began = time.monotonic()
    ended = job.end()
    assert time.monotonic() - began < 10
    assert Failure.code in ended.codes, ended.said
    assert "micro" in ended.said
    assert "24 at 32 px" in ended.said
    status = place.status()  # of the rank that knows why, not of one that misses it
    assert (status["code"], status["rank"]) == (Failure.code, RANKS - 1)


@pytest.mark.fault
@pytest.mark.parametrize("how", ["port taken", "a rank is missing", "wrong address"])
def test_P6_ranks_that_do_not_meet_say_who_is_missing(place: Place, how: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1] if how == "port taken" else warm.free_port()
        environment = {"WORLD_SIZE": "3", "MASTER_PORT": str(port)}
        if how == "wrong address":
            environment["MASTER_ADDR"] = "192.0.2.1"  # kept for examples: nobody is there
        began = time.monotonic()
        ended = place.begin("parallel.start_timeout=8", ranks=2, environment=environment).end()
    assert time.monotonic() - began < 20
    assert set(ended.codes) == {LostPeer.code}, ended.said
    assert {
        "port taken": "address already in use",
        "a rank is missing": "rank 2 of 3 did not connect",
        "wrong address": "cannot connect to the others at 192.0.2.1",
    }[how] in ended.said


@pytest.mark.fault
@pytest.mark.parametrize("by", [3600.0, -3600.0])
def test_P7_the_wall_clock_may_jump(place: Place, unbroken: Unbroken, by: float) -> None:
    place.finish("budget.seconds=600", "budget.cooldown=0.0", ranks=RANKS, fault=Clock(1.5, by))
    assert all(line["worked"] >= 0 and line["waited"] >= 0 for line in place.lines())
    assert place.bits()["losses"] == unbroken(ranks=RANKS).bits()["losses"]


@pytest.mark.fault
def test_P8_a_budget_of_time_is_kept(place: Place) -> None:
    began = time.monotonic()
    ended = place.finish("budget.seconds=30", "stage.0.steps=100000", ranks=RANKS)
    assert time.monotonic() - began < 32
    assert place.checkpoints()[0] == place.step
    assert place.status()["reason"] == "the budget is spent"
    assert "the budget is spent" in ended.said


@pytest.mark.fault
def test_P9_nobody_has_to_listen(place: Place, unbroken: Unbroken) -> None:
    place.finish(ranks=RANKS, fault=hang_up)
    assert place.bits() == unbroken(ranks=RANKS).bits()


@pytest.mark.fault
def test_P10_ten_kills_leave_nothing_that_is_in_the_way(
    place: Place, tmp_path: Path, unbroken: Unbroken
) -> None:
    shared = set(os.listdir("/dev/shm"))  # noqa: PTH208 - compared as names
    usual = started(place.begin("data.workers=1", ranks=RANKS), place)
    for _ in range(9):
        started(place.begin("data.workers=1", ranks=RANKS), place)
    ended = place.finish("data.workers=1", ranks=RANKS)
    again = Place(tmp_path / "again")
    usual = min(usual, started(again.begin("data.workers=1", ranks=RANKS), again))
    assert first(ended) < usual + 2
    assert set(os.listdir("/dev/shm")) == shared  # noqa: PTH208
    assert begun(ended.said) >= 0
    shutil.rmtree(again.folder)


def started(job: Job, place: Place) -> float:
    """Kill a run some steps after it began; returns the seconds until the first one was done."""
    saved = max(place.checkpoints(), default=0)

    def stepping() -> bool:
        return job.log.exists() and "first step after" in job.log.read_text(errors="replace")

    wait(lambda: stepping() or job.ranks[0].exitcode is not None)
    seconds = time.monotonic() - job.began
    place.wait(job, min(saved + 6, 25))
    job.kill()
    job.end()
    return seconds


def first(ended: Ended) -> float:
    """Seconds to the first step, as the log says."""
    return float(ended.said.partition("first step after ")[2].split()[0])
