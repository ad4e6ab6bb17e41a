"""Runs on several processes, with everything that a run can have: replicas of shards, compiled
blocks, steps that are not taken, a return to a checkpoint, a budget.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from daybreak import config, doctor
from daybreak.train import evaluations, flops
from daybreak.train.stop import PREEMPTED
from tests.faults.faults import At, Both, Fault, Older, Spoil, terminate
from tests.faults.jobs import Place

pytestmark = pytest.mark.xdist_group("loop_meshes")  # one process makes what its tests share

FEW = ("stage.0.steps=8", "save_every=3")
HYBRID = "parallel.dp_replicate=2"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Place]:
    """A run that is over, by what is set otherwise; each is made once."""
    runs: dict[Any, Place] = {}

    def make(*sets: str, ranks: int = 1, fault: Fault | None = None) -> Place:
        key = (sets, ranks, fault)
        if key not in runs:
            runs[key] = Place(tmp_path_factory.mktemp("mesh"))
            runs[key].finish(*sets, ranks=ranks, fault=fault)
        return runs[key]

    return make


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "job")


def values(place: Place, name: str) -> list[float]:
    return [line[name] for line in place.lines()]


def agree(place: Place, wanted: Place, rtol: float = 1e-5) -> None:
    """Losses, gradients and rates are equal to rounding."""
    np.testing.assert_allclose(values(place, "loss"), values(wanted, "loss"), rtol=rtol)
    np.testing.assert_allclose(values(place, "norm"), values(wanted, "norm"), rtol=10 * rtol)
    assert values(place, "lr") == values(wanted, "lr")


def test_two_replicas_of_two_shards_take_the_steps_of_one(made: Callable[..., Place]) -> None:
    agree(made(*FEW, HYBRID, "health.check_every=2", ranks=4), made(*FEW))


def test_what_every_replica_computes_is_counted(made: Callable[..., Place]) -> None:
    alone, both = made(*FEW), made(*FEW, HYBRID, "health.check_every=2", ranks=4)
    recipe = config.load(alone.run / "recipe.toml")
    again = sum(flops.work(recipe, recipe.stage[0]).step.values())
    told = [json.loads((place.run / "run.json").read_text())["ledger"] for place in (alone, both)]
    assert told[1]["flops"] - told[0]["flops"] == pytest.approx(8 * again) != 0


@pytest.mark.slow
def test_replicas_of_shards_go_on_bit_for_bit_and_on_other_meshes(
    made: Callable[..., Place], tmp_path: Path
) -> None:
    whole = made(*FEW, HYBRID, "health.check_every=2", ranks=4)
    place = Place(tmp_path / "killed")
    job = place.begin(*FEW, HYBRID, "health.check_every=2", ranks=4)
    place.wait(job, 5)
    job.kill()
    job.end()
    other = place.copy(tmp_path / "other")
    said = place.finish(*FEW, HYBRID, "health.check_every=2", ranks=4).said
    assert "from step 3" in said or "from step 6" in said
    assert place.bits() == whole.bits()
    assert "continues with 2" in other.finish(*FEW, "health.check_every=2", ranks=2).said
    agree(other, whole)


@pytest.mark.slow
@pytest.mark.skipif(doctor.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("more", [(), ("parallel.recompute=true",)], ids=["plain", "recomputed"])
def test_compiled_blocks_take_the_same_steps_in_shards(
    made: Callable[..., Place], more: tuple[str, ...]
) -> None:
    few = ("stage.0.steps=3", "health.step_timeout=600", *more)
    agree(made(*few, "compile=true", ranks=2), made(*few, ranks=2))


@pytest.mark.slow
def test_after_a_spike_all_ranks_return_to_the_checkpoint(made: Callable[..., Place]) -> None:
    sets = ("stage.0.steps=20", "health.spike=rollback")
    spike = Spoil("spike", call=18)
    pair, alone = (made(*sets, ranks=ranks, fault=spike) for ranks in (2, 1))
    agree(pair, alone)
    assert [line["step"] for line in pair.lines() if line.get("skipped")] == [18]
    said = (pair.folder / "log-0").read_text()
    assert said.count("returned to the weights of step 15") == 1


def test_a_run_that_was_stopped_on_the_way_returns_to_the_same_weights(tmp_path: Path) -> None:
    sets = ("stage.0.steps=20", "health.spike=rollback")
    once, stopped = Place(tmp_path / "once"), Place(tmp_path / "stopped")
    once.finish(*sets, fault=Spoil("spike", call=19))
    for step in (15, 17):  # saved after the next step: as many as `keep` says, and the target
        ended = stopped.begin(*sets, fault=At(step, terminate)).end()
        assert ended.code == PREEMPTED, ended.said
    assert stopped.checkpoints() == [18, 16, 15]
    said = stopped.finish(*sets, fault=Spoil("spike", call=1)).said
    assert "returned to the weights of step 15" in said
    assert stopped.bits() == once.bits()
    assert stopped.checkpoints() == [20, 18]


def test_a_return_to_an_earlier_stage_forgets_how_large_losses_were_there(place: Place) -> None:
    place.add("[[stage]]\nresolution = 32\nsteps = 24\nbatch = 8\nlr = 1e-5\n")
    larger, spike = Spoil("spike", call=21, count=99), Spoil("spike", call=38)
    sets = ("stage.0.steps=20", "save_every=20", "health.spike=rollback")
    said = place.finish(*sets, fault=Both(larger, spike)).said
    assert said.count("returned to the weights of step 20") == 1
    assert [line["step"] for line in place.lines() if line.get("skipped")] == [38]


def test_a_step_that_is_not_taken_does_not_cost_the_average_its_turn(place: Place) -> None:
    average = ("ema.every=5", "ema.ramp=false", "ema.decay=0.999")
    place.finish("stage.0.steps=5", *average, fault=Spoil("loss", call=5))
    assert place.lines()[-1]["skipped"] == 1
    found = place.run / "checkpoint-5"
    model, copied = (load_file(found / f"{name}.safetensors") for name in ("model", "ema"))
    assert all(torch.equal(model[name], value) for name, value in copied.items())


def test_a_run_that_is_asked_to_stop_saves_before_it_draws(place: Place) -> None:
    ended = place.begin("sample.every=5", fault=At(4, terminate)).end()
    assert ended.code == PREEMPTED, ended.said
    assert place.checkpoints()[0] == 5
    assert not (place.run / "samples" / "step-0000005").exists()


def test_a_budget_of_arithmetic_ends_on_all_ranks_after_the_same_step(
    place: Place, made: Callable[..., Place]
) -> None:
    alone = made(*FEW)
    each = json.loads((alone.run / "run.json").read_text())["ledger"]["flops_of_a_step"]
    place.finish(*FEW, f"budget.flops={5.5 * each}", "budget.cooldown=0.0", ranks=2)
    assert place.status()["step"] == place.checkpoints()[0] == 5
    assert place.status()["reason"] == "the budget is spent"
    np.testing.assert_allclose(values(place, "loss"), values(alone, "loss")[:5], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("old", "steps"), [(0, 1), (1, 8)])
def test_a_budget_of_time_goes_by_the_first_ranks_clock(
    place: Place, made: Callable[..., Place], old: int, steps: int
) -> None:
    look = ("evaluate.every=4", 'evaluate.suites=["validation"]', "evaluate.pictures=32")
    sets = (*FEW, *look, "budget.seconds=1000", "budget.cooldown=0.5")
    place.finish(*sets, ranks=2, fault=Older(5000), faulty=old)
    assert place.status()["step"] == place.checkpoints()[0] == steps
    looked = [line["step"] for line in evaluations.lines(place.run)]
    assert looked == ([4, 8] if steps == 8 else []), "who is late by his own clock breaks none off"
    if steps == 8:
        agree(place, made(*FEW))
