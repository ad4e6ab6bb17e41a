"""`daybreak evaluate` on two processes: all draw, one judges and writes as if it were alone."""

import json
from pathlib import Path

import pytest

from daybreak.failure import BadRecipe, LostPeer
from tests.faults.faults import Calling, die
from tests.faults.jobs import Place

pytestmark = pytest.mark.xdist_group("scoring_ranks")  # one process makes what its tests share

SMALL = ("--per-task", "5", "--steps", "2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run of a few steps."""
    place = Place(tmp_path_factory.mktemp("scored"))
    place.finish("stage.0.steps=4")
    return place


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The same by two processes, of which each has saved a part."""
    place = Place(tmp_path_factory.mktemp("scored"))
    place.finish("stage.0.steps=4", ranks=2)
    return place


@pytest.mark.parametrize("by", ["trained", "together"])
def test_two_processes_write_the_score_of_one(
    by: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    trained: Place = request.getfixturevalue(by)
    found, said = {}, {}
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        ended = trained.verb("evaluate", str(trained.run), *SMALL, "--out", str(out), ranks=ranks)
        assert ended.codes == [0] * ranks, ended.said
        (score,) = out.iterdir()
        found[ranks] = json.loads(score.read_text())
        said[ranks] = ended.said.replace(str(out), "out")
    assert found[2] == found[1]
    assert said[2] == said[1], "one of them speaks"


def test_what_is_refused_ends_all_processes_and_writes_nothing(
    trained: Place, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = ("evaluate", str(trained.run), "--canvas", "64", "--out", str(out))
    ended = trained.verb(*given, ranks=2)
    assert ended.codes == [BadRecipe.code] * 2, ended.said
    assert "are 64 px and this run draws 32 px" in ended.said
    assert not out.exists()


def test_a_process_that_dies_ends_the_other(trained: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ("evaluate", str(trained.run), *SMALL, "--out", str(out))
    fault = Calling("daybreak.generate.sampler", "euler", die)
    ended = trained.verb(*given, ranks=2, fault=fault, faulty=1)
    assert ended.code == LostPeer.code, ended.said
    assert "rank 1 does not answer" in ended.said
    assert not out.exists()
