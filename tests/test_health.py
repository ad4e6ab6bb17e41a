"""What cannot be learned from is passed over, on all ranks alike; broken ranks are named.

Run as a script under torchrun, this file is what each rank does.
"""

import json
import math
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from daybreak.failure import LostPeer, NotFinite
from daybreak.train import health, parallel
from daybreak.train.health import Config, Guard

pytestmark = pytest.mark.xdist_group("health")  # one process makes what its tests share

NAN, INF = math.nan, math.inf
LEARN, SKIP, BACK = health.Verdict(True), health.Verdict(False), health.Verdict(False, back=True)


def numbers(*losses: float, norm: float = 1.0) -> Tensor:
    """The rows that ranks of these losses give."""
    return torch.tensor([[loss, norm] for loss in losses])


def guard(tmp_path: Path, start: int = 0, **config: Any) -> Guard:
    return Guard(Config(**config), tmp_path / "incidents.jsonl", start, lambda line: None)


def incidents(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "rows",
    [
        numbers(1.0, NAN),
        numbers(INF, 1.0),
        numbers(INF, -INF),
        numbers(1.0, 1.0, norm=NAN),
        numbers(1.0, norm=INF),
    ],
)
def test_what_is_not_finite_on_any_rank_is_not_learned_from(tmp_path: Path, rows: Tensor) -> None:
    watching = guard(tmp_path, spike="rollback")
    assert watching.judge(1, numbers(1.0), range(4)) == LEARN
    assert watching.judge(2, rows, range(4, 8)) == SKIP
    assert watching.judge(3, numbers(1.0), range(8, 12)) == LEARN
    (incident,) = incidents(tmp_path)
    assert incident["step"] == 2
    assert incident["samples"] == [4, 5, 6, 7]


def test_the_rank_with_a_bad_number_is_named(tmp_path: Path) -> None:
    said: list[str] = []
    watching = Guard(Config(), tmp_path / "incidents.jsonl", tell=said.append)
    watching.judge(7, numbers(1.0, 1.0, NAN), range(24))
    assert said == [
        "step 7: loss nan, gradient norm 1 on rank 2 (samples 0 to 23); skipped",
    ]
    assert incidents(tmp_path)[0]["loss"] == [1.0, 1.0, "nan"]


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    watching = guard(tmp_path, bad_steps=3)
    for step in range(1, 10):  # two in a row, over and over
        rows = numbers(1.0) if step % 3 == 0 else numbers(NAN)
        assert watching.judge(step, rows, range(2)) == (LEARN if step % 3 == 0 else SKIP)
    watching.judge(10, numbers(NAN), range(2))
    watching.judge(11, numbers(NAN), range(2))
    again = guard(tmp_path, start=11, bad_steps=3)  # a run that goes on counts on
    again.restore(json.loads(json.dumps(watching.state)))
    with pytest.raises(NotFinite, match=r"step 12: loss nan.*samples 24 to 25.*3 steps in a row"):
        again.judge(12, numbers(NAN), range(24, 26))
    assert [incident["step"] for incident in incidents(tmp_path)][-3:] == [10, 11, 12]


def settled(watching: Guard, loss: float = 0.5) -> Guard:
    """Let a guard see enough steps to know what is usual."""
    for step in range(1, health.ENOUGH + 1):
        assert watching.judge(step, numbers(loss), range(1)) == LEARN
    return watching


@pytest.mark.parametrize(
    ("policy", "verdict"), [("log", LEARN), ("skip", SKIP), ("rollback", BACK)]
)
def test_a_loss_that_leaps_is_recorded_and_answered(
    tmp_path: Path, policy: str, verdict: health.Verdict
) -> None:
    watching = settled(guard(tmp_path, spike=policy))
    assert not watching.refuses(numbers(watching.limit))
    assert watching.judge(20, numbers(watching.limit), range(1)) == LEARN
    assert watching.judge(21, numbers(500.0), range(60, 63)) == verdict
    (incident,) = incidents(tmp_path)
    assert incident["samples"] == [60, 61, 62]
    assert incident["usual"] == 0.5


@pytest.mark.parametrize("policy", ["log", "skip", "rollback"])
def test_what_the_device_refuses_is_what_the_host_says_was_refused(
    tmp_path: Path, policy: str
) -> None:
    watching = settled(guard(tmp_path, spike=policy, bad_steps=10_000))
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for step in range(20, 400):
        around = watching.limit * (1 + 1e-7 * torch.randn(7, generator=generator))
        rows = torch.stack((around, torch.ones(7)), dim=1)
        if step % 50 == 0:
            rows[step % 7, 1] = NAN
        refused = bool(watching.refuses(rows))
        assert refused == bool(watching.refuses(rows.flip(0)))  # in whatever order it adds up
        assert refused is not watching.judge(step, rows, range(1)).step
        watching.recent.extend([0.5] * health.RECENT)
        seen.add((refused, step % 50 == 0))
    assert seen == {(False, False), (True, True), *([(True, False)] if policy != "log" else [])}


def test_a_loss_below_zero_leaps_too(tmp_path: Path) -> None:
    watching = settled(guard(tmp_path, spike="skip"), loss=-0.5)
    assert watching.judge(20, numbers(-0.1), range(1)) == LEARN
    assert watching.judge(21, numbers(1.1), range(1)) == SKIP


def test_the_first_losses_and_those_of_a_new_stage_are_no_leaps(tmp_path: Path) -> None:
    watching = guard(tmp_path, spike="skip")
    assert watching.judge(1, numbers(0.001), range(1)) == LEARN
    assert watching.judge(2, numbers(500.0), range(1)) == LEARN
    watching = settled(guard(tmp_path, spike="skip"))
    watching.new_stage()
    assert watching.judge(20, numbers(500.0), range(1)) == LEARN


def test_a_return_undoes_every_step_since_the_checkpoint(tmp_path: Path) -> None:
    watching = settled(guard(tmp_path, spike="rollback"))
    saved = watching.state
    for step in (17, 18):
        watching.judge(step, numbers(0.5), range(1))
    assert watching.judge(19, numbers(500.0), range(1)) == BACK
    watching.return_to(saved)
    assert watching.state == saved | {"bad": 1}
    assert watching.judge(20, numbers(0.5), range(1)) == LEARN


def test_returns_that_do_not_help_end_the_run(tmp_path: Path) -> None:
    watching = settled(guard(tmp_path, spike="rollback", bad_steps=2))
    saved = watching.state
    assert watching.judge(17, numbers(500.0), range(1)) == BACK
    watching.return_to(saved)
    with pytest.raises(NotFinite, match=r"2 steps in a row"):
        watching.judge(18, numbers(500.0), range(1))


def test_a_replay_judges_alike(tmp_path: Path) -> None:
    losses = [0.5 + 0.01 * (step % 7) for step in range(40)]
    losses[25], losses[33] = 90.0, NAN
    whole, verdicts, states = guard(tmp_path, spike="skip"), [], []
    for step, loss in enumerate(losses):
        verdicts.append(whole.judge(step, numbers(loss), range(1)))
        states.append(json.loads(json.dumps(whole.state)))
    written = (tmp_path / "incidents.jsonl").read_text()
    with (tmp_path / "incidents.jsonl").open("a") as file:
        file.write('{"step": 3')  # a crash
    again = guard(tmp_path, start=20, spike="skip")
    again.restore(states[20])
    replayed = [again.judge(step, numbers(losses[step]), range(1)) for step in range(21, 40)]
    assert replayed == verdicts[21:]
    assert again.state == whole.state
    assert (tmp_path / "incidents.jsonl").read_text() == written


def test_a_rank_without_a_file_judges_alike_and_says_nothing(tmp_path: Path) -> None:
    silent = Guard(Config(), None, tell=pytest.fail)
    assert silent.judge(1, numbers(NAN), range(1)) == SKIP


def flip(tensor: Tensor) -> None:
    """Flip one bit of the exponent of one number."""
    mine = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    mine.detach().view(torch.int32).flatten()[0] ^= 1 << 24


def verdict(here: parallel.World, tensors: dict[str, Tensor]) -> str:
    try:
        health.compare(here, tensors)
    except LostPeer as error:
        return str(error)
    return "equal"


def slow(seconds: float) -> Iterator[int]:
    for number in range(5):
        time.sleep(seconds)
        yield number


def main(out: Path) -> None:
    found: dict[str, Any] = {}
    with parallel.world(parallel.Config(dp_replicate=2)) as here:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7))
        parallel.prepare(model, (), here, parallel.Config())
        frozen = torch.randn(4, 4)
        tensors: dict[str, Tensor] = {**dict(model.named_parameters()), "frozen": frozen}
        found["before"] = verdict(here, tensors)
        if here.rank == 2:
            flip(frozen)
        found["frozen"] = verdict(here, tensors)
        if here.rank == 2:
            flip(frozen)
        if here.rank == 3:
            flip(tensors["1.weight"])
        found["sharded"] = verdict(here, tensors)
        alike = parallel.gather(here, torch.tensor([zlib.crc32(json.dumps(found).encode())]))
        found["alike"] = len(set(alike.flatten().tolist())) == 1

        pace = health.Pace(here.device)
        for _ in pace.timed(slow(0.1 if here.rank == 1 else 0.0)):
            parallel.gather(here, torch.ones(1))  # where the others wait
        found["slow"] = pace.laggards(here)
        if here.first:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, on_ranks: Callable[..., str]) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("health") / "found.json"
    on_ranks(4, __file__, out)
    measured: dict[str, Any] = json.loads(out.read_text())
    return measured


def test_a_flipped_bit_is_found_and_its_rank_named(found: dict[str, Any]) -> None:
    assert found["before"] == "equal"
    assert found["frozen"].startswith("rank 2 holds other bits of frozen than")


def test_of_two_replicas_that_differ_both_are_named(found: dict[str, Any]) -> None:
    assert found["sharded"].startswith("rank 1, rank 3 holds other bits of 1.weight than")


def test_all_ranks_come_to_the_same_verdict(found: dict[str, Any]) -> None:
    assert found["alike"]


def test_the_rank_that_waits_for_its_pictures_is_named(found: dict[str, Any]) -> None:
    waiting = [line for line in found["slow"] if "pictures" in line]
    assert len(waiting) == 1
    assert waiting[0].startswith("rank 1 waits 0.1")


def test_a_wait_of_five_usual_steps_is_told_once() -> None:
    pace = health.Pace(torch.device("cpu"))
    assert pace.late(1000.0) == "", "nothing is usual yet"
    for _ in pace.timed(range(8)):
        time.sleep(0.05)
    assert 0.05 <= statistics.median(pace.durations) < 0.2
    assert pace.late(0.2) == ""
    said = pace.late(1.5)
    assert said.startswith("still waiting for the next pictures after 1.5 s, while a step")
    assert pace.late(2.0) == "", "it has been said"


def test_the_next_wait_can_be_told_again() -> None:
    said: list[str] = []
    pace = health.Pace(torch.device("cpu"))

    def pictures() -> Iterator[int]:
        for number in range(10):
            said.append(pace.late(60.0 if number in {6, 7, 9} else 0.0))
            yield number

    for _ in pace.timed(pictures()):
        time.sleep(0.01)
    assert [bool(line) for line in said] == [False] * 6 + [True, True, False, True]


def test_alone_there_is_nothing_to_compare() -> None:
    with parallel.world(parallel.Config()) as here:
        health.compare(here, {"weight": torch.ones(3)})
        assert health.Pace(here.device).laggards(here) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (4, 8)])
def test_any_flipped_bit_is_another_sum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    before = health._bits(tensor)
    assert before.dtype == torch.int64
    flat = tensor.view(-1).view(torch.uint8)
    for place in {0, len(flat) // 2, len(flat) - 1}:
        for bit in range(8):
            flat[place] ^= 1 << bit
            assert health._bits(tensor) != before
            flat[place] ^= 1 << bit
    assert health._bits(tensor) == before


def test_equal_bits_are_one_sum_wherever_they_lie() -> None:
    wide = torch.randn(3, 9)
    for mine in (wide[:, 1:], wide.flatten()[1:9], wide.T[:, :2]):
        assert health._bits(mine) == health._bits(mine.clone(memory_format=torch.contiguous_format))
    assert health._bits(torch.ones(0, 4)) == 0


def test_a_sum_of_bits_makes_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(64, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(health, "WORDS", {})  # of narrow words, which are copied
    assert health._bits(whole) == whole.view(torch.int64).sum()


def test_the_incident_of_the_step_that_was_saved_stays(tmp_path: Path) -> None:
    watching = guard(tmp_path)
    for step in (1, 2):
        watching.judge(step, numbers(math.nan), range(1))
    guard(tmp_path, start=1)
    assert [line["step"] for line in incidents(tmp_path)] == [1]


def test_usual_is_the_median_of_the_last_64(tmp_path: Path) -> None:
    watching = guard(tmp_path, spike="skip")
    watching.restore(watching.state)  # as after a checkpoint
    for step in range(1, 101):
        assert watching.judge(step, numbers(3.0 if step <= 60 else 1.0), range(1)).step
    assert not watching.judge(101, numbers(5.0), range(1)).step


def test_a_level_that_is_learned_from_becomes_the_usual_one(tmp_path: Path) -> None:
    watching = guard(tmp_path, spike="log")
    for step in range(1, 17):
        watching.judge(step, numbers(0.5), range(1))
    for step in range(17, 60):
        assert watching.judge(step, numbers(500.0), range(1)).step
    assert [line["step"] for line in incidents(tmp_path)] == list(range(17, 33))
