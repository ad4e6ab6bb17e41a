"""Intervals against known values."""

import numpy as np
import pytest

from daybreak.evaluate.statistics import cluster_bootstrap, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_gives_the_published_intervals(
    successes: int, n: int, low: float, high: float
) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_has_the_half_widths_the_test_size_was_chosen_by() -> None:
    for n, half in ((200, 0.069), (400, 0.049), (1_200, 0.028), (2_400, 0.020)):
        low, high = wilson(n // 2, n)
        assert (high - low) / 2 == pytest.approx(half, abs=6e-4)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_of_nothing_is_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="have no interval"):
        wilson(successes, n)


def test_clusters_of_one_give_the_binomial_interval() -> None:
    values = np.array([1.0] * 300 + [0.0] * 100)
    low, high = cluster_bootstrap(values, range(400))
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.004)


def test_repeating_every_image_adds_no_certainty() -> None:
    values = [1.0] * 30 + [0.0] * 70
    once = cluster_bootstrap(values, range(100), seed=3)
    thrice = cluster_bootstrap(values * 3, [*range(100)] * 3, seed=3)
    assert thrice == pytest.approx(once)


def test_strata_weigh_alike_whatever_their_size() -> None:
    values, strata = [1.0] * 10 + [0.0] * 990, ["few"] * 10 + ["many"] * 990
    assert cluster_bootstrap(values, range(1_000), strata) == (0.5, 0.5)


def test_an_interval_depends_on_its_seed_alone() -> None:
    values, clusters = np.linspace(0, 1, 100) ** 3, [*range(50)] * 2
    assert cluster_bootstrap(values, clusters) == cluster_bootstrap(values, clusters)
    assert cluster_bootstrap(values, clusters, seed=1) != cluster_bootstrap(values, clusters)


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="equally many"):
        cluster_bootstrap([1.0, 0.0], [0])
    with pytest.raises(ValueError, match="at least one"):
        cluster_bootstrap([], [])
