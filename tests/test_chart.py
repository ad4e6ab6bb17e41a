"""The picture of a comparison: everything that is given to it can be seen in it."""

import math

import numpy as np
import pytest
from PIL import Image

from daybreak.evaluate import chart
from daybreak.evaluate.chart import COLOURS, Arm
from daybreak.generate.grid import PAPER


def rising(gain: float = 0.0, points: int = 6) -> list[list[tuple[float, float]]]:
    return [
        [(1000.0 * (k + 1), 0.1 * k + gain + 0.01 * seed) for k in range(points)] for seed in (0, 1)
    ]


def holds(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    """How many pixels are nearly of a colour."""
    apart = np.abs(np.asarray(sheet).astype(int) - colour).max(-1)
    return int((apart < 24).sum())


def test_every_arm_has_its_colour_and_its_line() -> None:
    alone = chart.chart([Arm("base", rising())], "scenes.exact", "pictures seen")
    both = chart.chart(
        [Arm("base", rising()), Arm("other", rising(0.2), [0.2, 0.21], (0.19, 0.2, 0.22))],
        "scenes.exact",
        "pictures seen",
    )
    assert alone.size == both.size == (chart.WIDTH, chart.HEIGHT)
    assert holds(alone, COLOURS[1]) == 0
    assert holds(both, COLOURS[1]) > 500


def test_what_was_measured_once_is_a_dot() -> None:
    once, never = ([Arm("base", rising()), Arm("other", rising(0.2, n))] for n in (1, 0))
    assert holds(chart.chart(once, "m", "u"), COLOURS[1]) > 30 + holds(
        chart.chart(never, "m", "u"), COLOURS[1]
    )


def test_a_target_is_a_line_across() -> None:
    arms = [Arm("base", rising())]
    without = chart.chart(arms, "m", "u")
    within = chart.chart(arms, "m", "u", target=0.25)
    rows = (np.asarray(without) != np.asarray(within)).any(-1).sum(1)
    assert rows.max() > 300


@pytest.mark.parametrize(
    "arms",
    [
        [Arm("one point", [[(5.0, 0.5)]])],
        [Arm("all the same", [[(1.0, 0.5), (2.0, 0.5)]] * 3)],
        [Arm("uneven", [[(1.0, 0.5)], [(1.0, 0.5), (2.0, 0.7)]])],
        [Arm("a gap", [[(1.0, math.nan), (2.0, 0.7)]])],
        [Arm("diverged", [[]]), Arm("not", [[(1e18, 1e-9), (2e18, -3e5)]])],
        [Arm(f"arm {n}", rising(n)) for n in range(9)],
        [Arm("base", rising()), Arm("equal", rising(), [0.0], (0.0, 0.0, 0.0))],
    ],
    ids=lambda arms: arms[0].name,
)
def test_what_a_comparison_may_give_can_be_drawn(arms: list[Arm]) -> None:
    assert holds(chart.chart(arms, "metric", "FLOP"), PAPER) > 1000


def test_nothing_is_not_drawn() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        chart.chart([Arm("empty", [[]])], "m", "u")


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.0, 80_000.0), (-0.013, 0.002), (3.0, 3.1)]
)
def test_axes_have_a_few_round_numbers(low: float, high: float) -> None:
    ticks = chart.ticks(low, high)
    assert 4 <= len(ticks) <= 11
    assert low <= ticks[0] + 1e-9
    assert ticks[-1] <= high + 1e-9


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1e-17, "0"), (0.25, "0.25"), (80_000, "80k"), (3.2e15, "3.2P"), (-1500, "-1.5k")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert chart.short(value) == text


def test_neighbouring_ticks_have_different_labels() -> None:
    for low, high in ((0.1231, 0.1236), (2800.0, 2806.0), (0.0, 1.0), (999.0, 1001.0)):
        said = chart.labels(chart.ticks(low, high))
        assert len(set(said)) == len(said) >= 3
    assert chart.labels([0.0, 0.5, 1.0]) == ["0", "0.5", "1"]
    assert chart.short(999.7) == "1k"
