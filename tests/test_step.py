"""One step of a run."""

from pathlib import Path

from daybreak import config
from daybreak.train import step


def test_what_is_left_is_told_in_steps_of_the_stage_under_way(tiny: Path) -> None:
    stages = ("steps=4,batch=8,lr=1e-3", "steps=3,batch=8,lr=1e-3", "samples=15,batch=8,lr=1e-3")
    rows = ",".join(f"{{resolution=32,{stage}}}" for stage in stages)
    recipe = config.load(tiny, (f"stage=[{rows}]",))
    flops = [1.0, 2.0, 4.0]
    left = [step.to_go(recipe, flops, done) for done in range(1, 10)]
    assert left == [17, 16, 15, 14, 6, 5, 4, 1, 0]
    assert [step.to_go(recipe, [0.0] * 3, done) for done in (1, 5, 9)] == [8, 4, 0]
