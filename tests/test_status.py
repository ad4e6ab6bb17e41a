"""How a run stands: of several ranks that fail, the first one knows why."""

import json
from pathlib import Path

import pytest

from daybreak.failure import BadData, LostPeer
from daybreak.train.status import Status


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Status]:
    """The two ranks of a run that is under way."""
    ranks = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        ranks.append(Status(tmp_path, pytest.fail))
        ranks[rank].begin(rank == 0, step=3, checkpoint=None)
    return ranks


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_first_rank_that_fails_is_believed(pair: list[Status], order: tuple[int, int]) -> None:
    knows, misses = (pair[rank] for rank in order)
    with pytest.raises(BadData), knows:
        raise BadData("tooth.png is not a picture")
    with pytest.raises(LostPeer), misses:
        raise LostPeer("lost the others", order[0])
    found = json.loads(knows.file.read_text())
    assert (found["state"], found["code"], found["rank"]) == ("failed", BadData.code, order[0])
    assert found["reason"] == "tooth.png is not a picture"


def test_a_hang_is_written_down_unless_the_reason_is_known(pair: list[Status]) -> None:
    with pair[0]:
        pair[0].fail(LostPeer("rank 0 waited 60 s", 1))
        pair[1].fail(LostPeer("rank 1 waited 60 s"))
    found = json.loads(pair[0].file.read_text())
    assert (found["reason"], found["code"]) == ("rank 0 waited 60 s", LostPeer.code)
    assert found["rank"] == 1
