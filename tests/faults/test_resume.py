"""Rows R: a run that was killed and started again is the run that was not."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from daybreak.failure import BadRecipe
from tests.faults.faults import At, Calling, Fault, Seen, die
from tests.faults.jobs import Place, begun, few, ranks_of_the_matrix

Unbroken = Callable[..., Place]
RANKS = ranks_of_the_matrix()
DICE = random.Random(20)
KILLS = [(DICE.randrange(1, 40), ("false", "true")[n % 2]) for n in range(20)]  # after a step


@pytest.mark.parametrize(("at", "background"), few(KILLS, 1))
def test_R1_a_killed_run_ends_with_the_bits_of_one_that_was_not(
    place: Place, unbroken: Unbroken, at: int, background: str
) -> None:
    more = f"save_async={background}"
    job = place.begin(more, ranks=RANKS)
    place.wait(job, at)
    job.kill()
    job.end()
    done = place.step
    again = place.finish(more, ranks=RANKS)
    assert done - begun(again.said) <= (10 if background == "true" else 5)
    assert place.bits() == unbroken(ranks=RANKS).bits()


@pytest.mark.fault
@pytest.mark.parametrize("run", range(10))
def test_R2_a_run_killed_three_times_ends_with_the_same_bits(
    place: Place, unbroken: Unbroken, run: int
) -> None:
    first, last = sorted(random.Random(run).sample(range(5, 39), 2))
    for step in (first, None, last):
        job = place.begin(ranks=RANKS)
        saved = max(place.checkpoints(), default=0)
        place.wait(job, saved + 1 if step is None else max(step, saved + 1))
        job.kill()
        job.end()
    place.finish(ranks=RANKS)
    assert place.bits() == unbroken(ranks=RANKS).bits()


@pytest.mark.fault
def test_R3_the_order_of_the_data_survives_kills_and_other_workers(
    tmp_path: Path, many_pictures: Path
) -> None:
    seen = []
    for workers in (0, 2, 4):
        place, notes = Place(tmp_path / str(workers)), tmp_path / f"notes-{workers}"
        place.of(many_pictures)
        more = (f"data.workers={workers}", "data.empty_captions=0.0", "stage.0.steps=20")
        job = place.begin(*more, fault=Seen(notes))
        place.wait(job, 12)
        job.kill()
        job.end()
        kept = notes.read_text().splitlines()[: max(place.checkpoints())]
        notes.unlink()
        place.finish(*more, fault=Seen(notes))
        seen.append(kept + notes.read_text().splitlines())
    assert seen[0] == seen[1] == seen[2]
    captions = [caption for line in seen[0] for caption in json.loads(line)[1]]
    for epoch in range(20 * 24 // 48):
        assert len(set(captions[48 * epoch : 48 * (epoch + 1)])) == 48


@pytest.mark.fault
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_R4_another_number_of_ranks_takes_the_same_steps(
    tmp_path: Path, unbroken: Unbroken, ranks: int
) -> None:
    whole = unbroken("stage.0.steps=60", ranks=2)
    part = Place(tmp_path / "part")
    job = part.begin("stage.0.steps=60", ranks=2)
    part.wait(job, 11)
    job.kill()
    job.end()
    again = part.finish("stage.0.steps=60", ranks=ranks)
    assert begun(again.said) == 10
    assert "bit" in again.said, "the promise is another one, and the log says so"
    losses, wanted = ([line["loss"] for line in place.lines()] for place in (part, whole))
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)


STAGES = (
    "tread.start=1",
    "tread.stop=2",
    "dit.depth=3",
    "stage.0.steps=20",
    "stage.0.resolution=16",
    'stage.0.without=["tread"]',
    "evaluate.every=10",
    "evaluate.pictures=32",
    "sample.every=10",
)
SECOND = "\n[[stage]]\nresolution = 32\nsteps = 20\nbatch = 24\nlr = 1e-3\ncooldown = 0.5\n"
PHASES = {
    "evaluation": Calling("daybreak.train.evaluations", "take", die),
    "average drawn from": Calling("daybreak.train.grids", "draw", die),
    "last step of a stage": At(20, die),
    "other resolution, with a route": At(21, die),
    "rate begins to fall": At(31, die),
}


@pytest.fixture(scope="session")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The run of two stages that nothing happened to."""
    place = Place(tmp_path_factory.mktemp("staged"))
    place.add(SECOND)
    place.finish(*STAGES, ranks=RANKS)
    return place


@pytest.mark.fault
@pytest.mark.parametrize("fault", PHASES.values(), ids=PHASES)
def test_R5_a_kill_in_any_phase_changes_nothing(place: Place, staged: Place, fault: Fault) -> None:
    place.add(SECOND)
    job = place.begin(*STAGES, ranks=RANKS, fault=fault)
    assert set(job.end().codes) == {-9}
    assert place.step < 40
    place.finish(*STAGES, ranks=RANKS)
    assert place.bits() == staged.bits()


def test_R6_another_recipe_is_refused_with_every_key(place: Place, unbroken: Unbroken) -> None:
    done = unbroken(ranks=RANKS).copy(place.folder / "copy")
    ended = done.begin("stage.0.lr=0.1", "dit.width=64", "seed=4").end()
    assert ended.code == BadRecipe.code, ended.said
    for change in ("stage.0.lr: 0.003 -> 0.1", "dit.width: 32 -> 64", "seed: 3 -> 4"):
        assert change in ended.said
    assert done.bits() == unbroken(ranks=RANKS).bits()


@pytest.mark.fault
def test_R7_one_seed_is_one_run(tmp_path: Path, unbroken: Unbroken) -> None:
    again, other = Place(tmp_path / "again"), Place(tmp_path / "other")
    again.finish(ranks=RANKS)
    other.finish("seed=4", ranks=RANKS)
    bits = unbroken(ranks=RANKS).bits()
    assert again.bits() == bits
    assert other.bits()["losses"][1] != bits["losses"][1]
    assert other.bits()["state"] != bits["state"]


@pytest.mark.fault
def test_R8_fifty_runs_end_cleanly_and_leave_nothing(tmp_path: Path, many_pictures: Path) -> None:
    shared = set(os.listdir("/dev/shm"))  # noqa: PTH208 - compared as names
    for number in range(50):
        place = Place(tmp_path / str(number))
        place.of(many_pictures)
        job = place.begin("stage.0.steps=2", "data.workers=1", ranks=RANKS)
        ended = job.end()
        assert ended.codes == [0] * RANKS, ended.said
        assert not [p for rank in job.ranks for p in session(rank.pid)]
        assert not list(place.run.glob(".*")), list(place.run.iterdir())
        shutil.rmtree(place.folder)
    assert set(os.listdir("/dev/shm")) == shared  # noqa: PTH208


def session(leader: int) -> list[int]:
    """The processes of the session that a rank has opened."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.getsid(int(folder.name)) == leader:
                    found.append(int(folder.name))
            except OSError:
                continue
    return found
