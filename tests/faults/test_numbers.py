"""Rows N: what is no number is never learned from, and never saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from daybreak.failure import LostPeer, NotFinite
from tests.faults.faults import Flip, Spoil
from tests.faults.jobs import Place, ranks_of_the_matrix, tensors

Unbroken = Callable[..., Place]
RANKS = ranks_of_the_matrix()
TWENTY = "stage.0.steps=20"


def incidents(place: Place) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place.run / "incidents.jsonl").read_text().splitlines()]


def finite(checkpoint: Path) -> bool:
    return all(
        bool(torch.isfinite(value).all())
        for path in tensors(checkpoint)
        for value in load_file(path).values()
    )


@pytest.mark.fault
@pytest.mark.parametrize("micro", [0, 4])
def test_N1_all_ranks_skip_what_one_cannot_use(tmp_path: Path, micro: int) -> None:
    passes = 24 // RANKS // micro if micro else 1
    bits = []
    for how in ("input", "loss", "gradient"):
        place = Place(tmp_path / how)
        fault = Spoil(how, call=11 * passes + (2 if micro else 1))
        ended = place.finish(TWENTY, f"micro={micro}", ranks=RANKS, fault=fault, faulty=RANKS - 1)
        assert [line["step"] for line in place.lines() if line.get("skipped")] == [12]
        (incident,) = incidents(place)
        assert incident["step"] == 12
        assert incident["samples"] == list(range(11 * 24, 12 * 24))
        assert "step 12" in ended.said
        assert finite(place.run / "latest")
        bits.append(place.bits()["state"])
    assert all(one == bits[0] for one in bits), "nothing of the bad gradient is left"


@pytest.mark.fault
@pytest.mark.parametrize("how", ["loss", "input", "gradient"])
def test_N1_three_in_a_row_end_the_run(place: Place, how: str) -> None:
    fault = Spoil(how, call=12, count=3)
    ended = place.begin(TWENTY, ranks=RANKS, fault=fault, faulty=RANKS - 1).end()
    assert set(ended.codes) == {NotFinite.code}, ended.said
    assert [incident["step"] for incident in incidents(place)] == [12, 13, 14]
    assert place.status()["code"] == NotFinite.code
    assert place.checkpoints() == [10, 5]
    assert finite(place.run / "latest")


@pytest.mark.fault
@pytest.mark.parametrize("policy", ["log", "skip", "rollback"])
def test_N2_a_loss_that_leaps_is_answered_as_the_recipe_says(tmp_path: Path, policy: str) -> None:
    more = ("stage.0.steps=30", f"health.spike={policy}")
    bits = []
    for name in ("once", "killed"):
        place = Place(tmp_path / name)
        job = place.begin(*more, ranks=RANKS, fault=Spoil("spike", call=22))
        if name == "killed":
            place.wait(job, 26)
            job.kill()
        job.end()
        if name == "killed":
            place.finish(*more, ranks=RANKS)
        found = [incident["step"] for incident in incidents(place)]
        assert found == [22]
        assert incidents(place)[0]["samples"][0] == 21 * 24
        skipped = [line["step"] for line in place.lines() if line.get("skipped")]
        assert skipped == ([] if policy == "log" else [22])
        assert finite(place.run / "latest")
        bits.append(place.bits())
    assert bits[0] == bits[1]


@pytest.mark.fault
@pytest.mark.parametrize("part", ["model", "average"])
def test_N3_a_bit_that_flips_on_one_rank_is_found_and_not_saved(place: Place, part: str) -> None:
    more = (f"parallel.dp_replicate={RANKS}", "save_every=25", "health.check_every=50")
    fault = Flip(12, part)
    ended = place.begin(*more, ranks=RANKS, fault=fault, faulty=1).end()
    assert set(ended.codes) == {LostPeer.code}, ended.said
    assert f"holds other bits of {part}." in ended.said
    assert "rank 1" in ended.said
    assert place.step <= 12 + 50
    assert place.checkpoints() == []


@pytest.mark.fault
@pytest.mark.parametrize("part", ["average", "momentum"])
def test_N4_what_is_not_finite_is_not_saved(place: Place, part: str) -> None:
    ended = place.begin(ranks=RANKS, fault=Flip(15, part, nan=True), faulty=RANKS - 1).end()
    assert set(ended.codes) == {NotFinite.code}, ended.said
    assert "checkpoint-15 is not saved" in ended.said
    assert place.checkpoints() == [10, 5]
    assert (place.run / "latest").resolve().name == "checkpoint-10"
