"""Training on several processes: the same steps as on one, and none of them is ever alone."""

import json
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from daybreak import config
from daybreak.failure import BadRecipe
from daybreak.train import checkpoint, evaluations, loop, runs
from tests import test_text, warm
from tests.faults.faults import Calling, Sleep
from tests.faults.jobs import Place

pytestmark = pytest.mark.xdist_group("loop_ranks")  # one process makes what its tests share

QUIET = ("sample.every=1000", "stage.0.batch=24")
PARTS = "micro=8"  # of a share of twelve


def start(ranks: int, recipe: Path, out: Path, *sets: str) -> list[warm.Started]:
    """Start `daybreak train` on so many ranks."""
    settings = [word for each in (*QUIET, *sets) for word in ("--set", each)]
    return warm.ranks(ranks, "-m", "daybreak", "train", recipe, "--out", out, *settings)


def ended(processes: Sequence[warm.Started]) -> tuple[list[int | None], str]:
    said = ["".join(process.communicate(timeout=300)) for process in processes]
    return [process.returncode for process in processes], "".join(said)


def finish(ranks: int, recipe: Path, out: Path, *sets: str) -> str:
    codes, said = ended(start(ranks, recipe, out, *sets))
    assert codes == [0] * ranks, said
    return said


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log(run)]


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


def shards(run: Path) -> dict[str, bytes]:
    """The tensors of the newest checkpoint, rank by rank, to the last bit."""
    found = {}
    for path in (run / "latest" / "state").iterdir():
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                found[f"{path.name}.{name}"] = file.get_tensor(name).numpy().tobytes()
    return found


def wait_for_step(run: Path, step: int) -> None:
    path = run / "metrics.jsonl"
    for _ in range(2400):
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within two minutes")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    path = folder / "tiny.toml"
    path.write_text(tiny_text.format(out=(folder / "run").as_posix()))
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    """The run of one process."""
    torch.set_num_threads(1)
    out = recipe.parent / "alone"
    loop.train(config.load(recipe, (*QUIET, f"out={out.as_posix()}")), lambda line: None)
    return out


@pytest.fixture(scope="module")
def pair(recipe: Path) -> Path:
    """The same run on two processes, a step of each in two unequal parts."""
    out = recipe.parent / "pair"
    finish(2, recipe, out, PARTS)
    return out


def test_two_ranks_take_the_steps_of_one(alone: Path, pair: Path) -> None:
    np.testing.assert_allclose(losses(pair), losses(alone), rtol=1e-5)
    here, there = ([line["norm"] for line in log(run)] for run in (pair, alone))
    np.testing.assert_allclose(here, there, rtol=1e-4)
    assert [line["images"] for line in log(pair)] == [line["images"] for line in log(alone)]
    assert status(pair) == status(alone)
    assert (status(pair)["state"], status(pair)["checkpoint"]) == ("finished", 10)
    assert (pair / "lock").read_text() == ""
    machines = [json.loads((run / "run.json").read_text())["machine"] for run in (alone, pair)]
    assert [machine.get("processes") for machine in machines] == [None, 2]


def test_what_several_have_saved_one_can_draw_from(alone: Path, pair: Path) -> None:
    models = [runs.trained(run)[2] for run in (pair, alone)]
    found = checkpoint.required(pair, print)
    assert found.sharded
    assert found.weights != checkpoint.required(alone, print).weights
    for mine, other in zip(*(model.weights().values() for model in models), strict=True):
        assert (mine - other).norm() <= 1e-3 * other.norm()


def test_a_frozen_encoder_stays_whole_beside_what_is_cut_up(recipe: Path) -> None:
    tower = recipe.parent / "tower"
    test_text.saved(test_text.flan_t5, tower)
    sets = (f"text.encoder={tower.as_posix()}", "stage.0.steps=4")
    one, two = recipe.parent / "frozen-1", recipe.parent / "frozen-2"
    for ranks, out in ((1, one), (2, two)):
        finish(ranks, recipe, out, *sets)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    averages = [runs.trained(run)[2].dit.state_dict() for run in (one, two)]
    for name, weight in averages[0].items():
        torch.testing.assert_close(averages[1][name], weight, rtol=1e-3, atol=1e-4)


def test_an_evaluation_that_one_rank_is_slow_to_write_down_is_nothing_to_the_others(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path / "slow")
    slow = Calling("daybreak.train.evaluations", "_write", Sleep(1, 1.0))
    sets = ("evaluate.every=2", "evaluate.pictures=32", "evaluate.best=validation.loss")
    place.finish("stage.0.steps=2", *sets, ranks=2, fault=slow, faulty=0)
    assert evaluations.best(place.run).step == 2


def test_killed_without_warning_it_continues_bit_for_bit(recipe: Path, pair: Path) -> None:
    out = recipe.parent / "killed"
    ranks = start(2, recipe, out, PARTS)
    wait_for_step(out, 6)
    began = time.monotonic()
    ranks[1].send_signal(signal.SIGKILL)
    codes, said = ended(ranks)
    assert codes == [6, -signal.SIGKILL], said
    assert time.monotonic() - began < 15
    assert "rank 1 does not answer" in said
    assert (status(out)["state"], status(out)["code"], status(out)["rank"]) == ("failed", 6, 1)
    said = finish(2, recipe, out, PARTS)
    assert "from step 5" in said
    assert "took over the lock" not in said  # rank 0 has left by itself
    assert losses(out) == losses(pair)
    assert shards(out) == shards(pair)


def test_asked_on_one_rank_all_save_and_leave(recipe: Path) -> None:
    out = recipe.parent / "asked"
    ranks = start(2, recipe, out, "stage.0.steps=100000", "save_async=true")
    wait_for_step(out, 3)
    ranks[1].send_signal(signal.SIGTERM)
    codes, said = ended(ranks)
    assert codes == [75, 75], said
    assert (status(out)["state"], status(out)["code"]) == ("stopped", 75)
    assert status(out)["step"] == status(out)["checkpoint"] == len(losses(out))
    assert checkpoint.required(out, print).step == len(losses(out))


@pytest.mark.slow
def test_a_run_moves_from_four_ranks_to_two_to_three_to_one(recipe: Path, alone: Path) -> None:
    out = recipe.parent / "elastic"
    for ranks, step in ((4, 3), (2, 6), (3, 9)):
        said = finish(ranks, recipe, out, "save_every=3", "keep=4")
        assert (f"continues with {ranks}" in said) == (ranks != 4)
        for later in checkpoint.found(out):
            if later.step > step:
                shutil.rmtree(later.folder)
    loop.train(
        config.load(recipe, (*QUIET, "save_every=3", "keep=4", f"out={out.as_posix()}")),
        lambda line: None,
    )
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-5)
    assert not checkpoint.required(out, print).sharded


def test_a_folder_in_use_is_refused_by_name_and_a_dead_ones_is_taken_over(recipe: Path) -> None:
    out = recipe.parent / "used"
    (holder,) = start(1, recipe, out, "stage.0.steps=100000")
    wait_for_step(out, 1)
    mine = config.load(recipe, (*QUIET, "stage.0.steps=100000", f"out={out.as_posix()}"))
    began = time.monotonic()
    with pytest.raises(BadRecipe, match=rf"in use by process {holder.pid} on .*--out"):
        loop.train(mine, lambda line: None)
    assert time.monotonic() - began < 5
    assert status(out)["state"] == "running"
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    told: list[str] = []
    with pytest.raises(BadRecipe, match="another recipe"):
        loop.train(config.load(recipe, (*QUIET, f"out={out.as_posix()}")), told.append)
    (again,) = start(1, recipe, out, "stage.0.steps=100000")
    wait_for_step(out, 8)
    again.send_signal(signal.SIGUSR1)
    codes, said = ended([again])
    assert codes == [75]
    assert f"took over the lock of process {holder.pid}" in said


def test_pairs_are_never_torn_apart(recipe: Path) -> None:
    contrastive = config.load(recipe, ("contrastive.weight=0.05",))
    runs.check_pairs(contrastive, 4)
    with pytest.raises(BadRecipe, match=r"8 devices .*batch = 8: .* set a batch that 16 divides"):
        runs.check_pairs(contrastive, 8)
