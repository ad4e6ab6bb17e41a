"""Steps as the profiler sees them: those that were asked for, and the same steps."""

import gzip
import json
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


def test_a_trace_is_asked_for_by_step_and_count() -> None:
    assert trace.parse("200:3") == Trace(200, 3)
    assert trace.parse("7") == Trace(7, 1)
    for wrong in ("", "0:3", "3:", "a:b", "1:0", "1:2:3"):
        with pytest.raises(BadRecipe, match="write STEP:COUNT"):
            trace.parse(wrong)
