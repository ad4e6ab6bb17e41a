"""Steps as the profiler sees them: those that were asked for, and the same steps."""

import gzip
import json
from itertools import islice
from pathlib import Path

import pytest

from daybreak import config
from daybreak.failure import BadRecipe
from daybreak.train import loop, trace
from daybreak.train.trace import Trace


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_steps_that_are_traced_are_written_down_and_compute_the_same(
    tiny: Path, tmp_path: Path
) -> None:
    plain = config.load(tiny, ("stage.0.steps=4", f"out={(tmp_path / 'plain').as_posix()}"))
    seen = config.load(tiny, ("stage.0.steps=4", f"out={(tmp_path / 'seen').as_posix()}"))
    loop.train(plain, lambda line: None, trial=True)
    loop.train(seen, lambda line: None, trial=True, trace=Trace(2, 2))
    assert losses(tmp_path / "seen") == losses(tmp_path / "plain")
    with gzip.open(tmp_path / "seen" / "trace-2.json.gz") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 2


@pytest.mark.parametrize("taken", [2, 4], ids=["stopped", "at its end"])
def test_a_run_that_ends_before_the_last_of_them_has_a_trace_of_the_others(
    taken: int, tmp_path: Path
) -> None:
    said = list[str]()
    steps = trace.traced(iter([1, 2, 3]), Trace(2, 5), tmp_path, 0, said.append)
    assert list(islice(steps, taken)) == [1, 2, 3][:taken]
    steps.close()
    assert said == [f"trace: {tmp_path / 'trace-2.json.gz'}"]


def test_steps_that_a_run_has_behind_it_are_not_traced(tmp_path: Path) -> None:
    said = list[str]()
    assert list(trace.traced(iter([5, 6, 7]), Trace(2, 2), tmp_path, 4, said.append)) == [5, 6, 7]
    assert said == []


def test_a_trace_is_asked_for_by_step_and_count() -> None:
    assert trace.parse("200:3") == Trace(200, 3)
    assert trace.parse("7") == Trace(7, 1)
    for wrong in ("", "0:3", "3:", "a:b", "1:0", "1:2:3"):
        with pytest.raises(BadRecipe, match="write STEP:COUNT"):
            trace.parse(wrong)
