"""Intervals and comparisons against known values, brute force and simulated runs."""

from itertools import product
from operator import mul

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from daybreak.evaluate.statistics import (
    Paired,
    Reached,
    Verdict,
    cluster_bootstrap,
    difference,
    holm,
    mcnemar,
    mean_interval,
    meets,
    paired,
    race,
    seeds_needed,
    share_interval,
    sign_flip,
    to_target,
    verdict,
    wilson,
)


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


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),  # Newcombe 1998, table II, method 10
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0),
    ],
)
def test_differences_have_the_published_intervals(
    one: tuple[int, int], other: tuple[int, int], low: float, high: float
) -> None:
    assert difference(*one, *other) == pytest.approx((low, high), abs=5e-5)


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


# One recipe against another


def outcomes(sd: float, gain: float, seeds: int, rng: np.random.Generator) -> Paired:
    """Results of a baseline of 1, and of a candidate that is better by `gain`."""
    shared = rng.normal(0, sd, seeds)
    baseline = 1 + shared + rng.normal(0, sd, seeds)
    return paired(1 + gain + shared + rng.normal(0, sd, seeds), baseline)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9))
def test_sign_flips_are_counted_as_their_definition_says(differences: list[int]) -> None:
    sums = [
        sum(map(mul, signs, differences)) for signs in product((1, -1), repeat=len(differences))
    ]
    share = sum(one >= sum(differences) for one in sums) / len(sums)
    assert sign_flip(list(map(float, differences))) == share


@pytest.mark.parametrize(("n", "p"), [(1, 0.5), (4, 0.0625), (5, 0.03125), (7, 0.0078125)])
def test_the_smallest_p_needs_the_known_number_of_seeds(n: int, p: float) -> None:
    assert sign_flip([0.1 + 0.01 * i for i in range(n)]) == p


def test_forty_seeds_are_flipped_exactly() -> None:
    """Equal differences make a binomial: at least 30 of 40 signs as they are."""
    differences = [1.0] * 30 + [-1.0] * 10
    assert sign_flip(differences) == pytest.approx(
        stats.binomtest(30, 40, alternative="greater").pvalue
    )
    with pytest.raises(ValueError, match="1 to 40"):
        sign_flip([1.0] * 41)


def test_a_comparison_is_that_of_the_differences() -> None:
    found = paired([3.0, 5.0, 4.0, 4.0], [2.0, 2.0, 4.0, 5.0])
    assert (found.gain, found.n) == (0.75, 4)
    assert found.wins == (2 + 0.5) / 4
    assert found.sd == pytest.approx(np.std([1, 3, 0, -1], ddof=1))
    assert found.low < 0.75 < found.high
    assert found.p == found.p_better < found.p_worse


def test_where_lower_is_better_a_lower_result_is_a_gain() -> None:
    up, down = (
        paired([2.0, 3.0, 5.0], [1.0, 1.0, 1.0]),
        paired([2.0, 3.0, 5.0], [1.0, 1.0, 1.0], True),
    )
    assert down.gain == -up.gain
    assert (down.p_better, down.p_worse) == (up.p_worse, up.p_better)
    assert down.low == pytest.approx(-up.high, abs=0.05)


def test_p_values_are_uniform_where_there_is_no_difference() -> None:
    rng = np.random.default_rng(0)
    found = [outcomes(0.03, 0.0, 7, rng).p_better for _ in range(200)]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    words = [verdict(outcomes(0.03, 0.0, 5, rng)).word for _ in range(200)]
    assert words.count("better") / 200 == pytest.approx(1 / 32, abs=0.03)
    assert words.count("worse") / 200 == pytest.approx(1 / 32, abs=0.03)


def test_five_seeds_find_ten_per_cent_and_not_half_a_per_cent() -> None:
    rng = np.random.default_rng(1)
    large = [verdict(outcomes(0.02, 0.1, 5, rng)).word for _ in range(50)]
    small = [verdict(outcomes(0.02, 0.005, 5, rng)).word for _ in range(50)]
    assert large.count("better") >= 48
    assert small.count("not resolved") >= 40


def test_a_verdict_gives_its_reasons() -> None:
    better = verdict(paired([1.3, 1.2, 1.4, 1.3, 1.2], [1.0] * 5))
    assert better.word == "better"
    assert better.sentence.startswith("better: the mean difference over 5 seeds is +0.28 (95 % ")
    assert "p = 0.031, better in 100% of seeds" in better.sentence
    assert verdict(paired([0.7, 0.8, 0.6, 0.7, 0.8], [1.0] * 5)).word == "worse"


def test_a_gain_that_few_seeds_show_is_no_improvement() -> None:
    comparison = paired([0.3] * 26 + [-0.2] * 14, [0.0] * 40)
    found = verdict(comparison)
    assert found.word == "not resolved"
    assert found.sentence.endswith(
        "better in 65% of seeds); to be called better an arm must win in at least 75% of "
        "seeds, however small p is"
    )


def test_a_gain_within_the_margin_is_not_resolved() -> None:
    def asked(margin: float) -> Verdict:
        return verdict(paired([1.3, 1.2, 1.4, 1.3, 1.2], [1.0] * 5, margin=margin))

    assert asked(0.1).word == "better"
    assert asked(0.26).word == "not resolved"
    assert "no difference beyond 0.5" in asked(0.5).sentence


def test_a_gain_of_just_the_margin_is_rarely_called_better() -> None:
    rng = np.random.default_rng(5)
    pairs = [paired(rng.normal(1.1, 0.02, 5), [1.0] * 5, margin=0.1) for _ in range(300)]
    words = [verdict(pair).word for pair in pairs]
    assert words.count("better") / 300 == pytest.approx(1 / 32, abs=0.025)
    assert words.count("worse") == 0


@pytest.mark.parametrize(("n", "share"), [(5, 0.91), (8, 0.94), (20, 0.95)])
def test_intervals_of_few_seeds_cover_what_they_say(n: int, share: float) -> None:
    rng = np.random.default_rng(n)
    covered = 0
    for _ in range(800):
        low, high = cluster_bootstrap(rng.normal(0, 1, n), range(n), resamples=2000)
        covered += low < 0 < high
    assert covered / 800 == pytest.approx(share, abs=0.03)


def test_a_p_adjusted_for_several_comparisons_decides() -> None:
    comparison = paired([1.3, 1.2, 1.4, 1.3, 1.2], [1.0] * 5)
    assert verdict(comparison, p=holm([comparison.p, 0.6])[0]).word == "not resolved"


def test_what_is_not_resolved_says_how_many_seeds_would_do() -> None:
    comparison = paired([1.1, 0.9, 1.2, 0.95, 1.0], [1.0] * 5)
    needed = seeds_needed(comparison.sd, comparison.gain)
    assert verdict(comparison).sentence.endswith(
        f"needs about {needed} seeds, and must show in 75% of them"
    )
    assert "fewer than 5 seeds" in verdict(paired([2.0], [1.0])).sentence
    assert "no difference to be resolved" in verdict(paired([1.0] * 5, [1.0] * 5)).sentence


def test_the_number_of_seeds_it_names_is_enough_for_all_comparisons() -> None:
    comparison = paired([1.30, 1.31, 1.29, 1.30, 1.30], [1.0] * 5)
    found = verdict(comparison, p=holm([comparison.p, *[0.5] * 4])[0], comparisons=5)
    assert found.word == "not resolved"
    assert "needs about 7 seeds" in found.sentence
    alone = verdict(paired([2.0], [1.0]), comparisons=5)
    assert "fewer than 7 seeds" in alone.sentence


def test_the_number_of_seeds_it_names_would_indeed_prove_it() -> None:
    rng = np.random.default_rng(2)
    sd, gain = 0.02, 0.015
    needed = seeds_needed(sd * np.sqrt(2), gain)
    found = [outcomes(sd, gain, needed, rng) for _ in range(60)]
    assert sum(one.p_better <= 0.05 and one.low > 0 for one in found) / 60 > 0.7


@pytest.mark.parametrize(
    ("ratio", "rho", "seeds"),
    [(1, 0.5, 8), (1, 0.8, 5), (2, 0.5, 32), (2, 0.8, 13), (2, 0.9, 7), (0.5, 0.5, 5)],
)
def test_the_number_of_seeds_is_that_of_the_known_formula(
    ratio: float, rho: float, seeds: int
) -> None:
    assert seeds_needed(ratio * np.sqrt(2 * (1 - rho)), 1.0) == seeds


def test_several_comparisons_need_more_seeds() -> None:
    """Five arms, a difference of one deviation: 8 seeds find it in 36 of 100 cases, not in 80."""
    assert seeds_needed(1.0, 1.0) == 8
    assert seeds_needed(1.0, 1.0, comparisons=5) == 12


@pytest.mark.parametrize("n", [2, 3, 4])
def test_intervals_of_fewer_than_five_seeds_are_students(n: int) -> None:
    rng = np.random.default_rng(n)
    covered = 0
    for _ in range(2000):
        low, high = mean_interval(rng.normal(0, 1, n))
        covered += low < 0 < high
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)
    assert mean_interval([0.3]) == (0.3, 0.3)


def test_results_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="cannot be paired"):
        paired([], [])
    with pytest.raises(ValueError, match="not finite"):
        paired([1.0, np.nan], [1.0, 1.0])


def test_mcnemar_looks_at_prompts_that_differ() -> None:
    candidate = [True] * 50 + [True] * 15 + [False] * 5 + [False] * 30
    baseline = [True] * 50 + [False] * 15 + [True] * 5 + [False] * 30
    found = mcnemar(candidate, baseline)
    assert found[:2] == (15, 5)
    assert found.p == pytest.approx(0.041389, abs=1e-6)  # 2 P(X >= 15), X ~ binomial(20, 1/2)
    assert mcnemar([True, False], [True, False]) == (0, 0, 1.0)


def test_mcnemar_has_the_power_that_the_number_of_prompts_was_chosen_for() -> None:
    """psi = 20 % discordant, 5 points apart: 620 prompts find it in 80 % of all cases."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(300):
        die = rng.random(620)
        candidate, baseline = die < 0.125, (die >= 0.125) & (die < 0.2)
        found.append(mcnemar(candidate.tolist(), baseline.tolist()).p < 0.05)
    assert np.mean(found) == pytest.approx(0.8, abs=0.07)


def test_holm_gives_the_textbook_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


# Cost until a target is met


def test_the_first_point_of_the_grid_that_passes_counts() -> None:
    costs, scores = [10.0, 20.0, 30.0, 40.0], [0.2, 0.6, 0.5, 0.9]
    assert to_target(costs, scores, 0.5)[:2] == (20.0, True)
    assert to_target(costs, scores, 0.5, interpolate=True).cost == pytest.approx(17.5)
    assert to_target(costs, scores, 0.1, interpolate=True)[:2] == (10.0, True)
    assert to_target(costs, scores, 0.95)[:2] == (40.0, False)


def test_a_loss_meets_its_target_from_above_and_nan_never_does() -> None:
    costs, losses = [1.0, 2.0, 3.0], [0.9, float("nan"), 0.4]
    assert to_target(costs, losses, 0.5, lower_is_better=True)[:2] == (3.0, True)
    assert to_target(costs, losses, 0.5, True, interpolate=True)[:2] == (3.0, True)
    with pytest.raises(ValueError, match="rising costs"):
        to_target([2.0, 1.0], [0.1, 0.2], 0.5)


def test_a_race_is_decided_by_ratios() -> None:
    baseline = [Reached(cost, True) for cost in (100.0, 120.0, 90.0, 110.0, 80.0)]
    found = race([Reached(0.5 * run.cost, True) for run in baseline], baseline)
    assert (found.ratio, found.low, found.high, found.median) == pytest.approx((0.5,) * 4)
    assert found.met == (5, 5)
    assert found.means == (50.0, 100.0)
    assert verdict(found.logs).word == "better"


def test_a_run_that_misses_the_target_is_censored_and_not_dropped() -> None:
    candidate = [Reached(50.0, True), Reached(200.0, False), Reached(60.0, True)]
    baseline = [Reached(100.0, True), Reached(200.0, False), Reached(200.0, False)]
    found = race(candidate, baseline)
    assert found.met == (2, 1)
    assert found.horizon == 200
    assert found.ratio == pytest.approx((0.5 * 1 * 0.3) ** (1 / 3))
    assert found.logs.wins == pytest.approx((1 + 0.5 + 1) / 3)


def test_nobody_is_counted_beyond_the_first_who_was_given_up() -> None:
    found = race([Reached(150.0, True)], [Reached(100.0, False)])
    assert (found.horizon, found.ratio) == (100, 1)


def test_a_mean_meets_its_target_if_enough_runs_say_so() -> None:
    losses = [3.277, 3.279, 3.276, 3.278, 3.275]
    assert meets(losses, 3.28, lower_is_better=True) == pytest.approx(
        stats.ttest_1samp(losses, 3.28, alternative="less").pvalue
    )
    assert meets(losses, 3.277, lower_is_better=True) == pytest.approx(0.5)
    assert meets([0.9, 0.9], 0.8) == 0
    assert meets([0.8, 0.8], 0.8) == 1
    with pytest.raises(ValueError, match="no spread"):
        meets([0.9], 0.8)


def test_where_every_value_is_the_same_clusters_of_any_size_make_a_point() -> None:
    clusters = [0] * 90 + [*range(1, 11)]
    assert cluster_bootstrap([1.0] * 100, clusters) == (1.0, 1.0)


def test_a_small_p_alone_is_not_better_where_the_interval_holds_no_gain() -> None:
    differences = np.array([0.2, 1.9, 0.5, -0.3, 0.6, 0.7])
    for margin in (0.0, 0.5):
        found = paired(differences + margin, np.zeros(6), margin=margin)
        assert found.p_better < 0.05
        assert found.low < margin
        assert verdict(found).word == "not resolved"


def test_exactly_three_quarters_of_the_seeds_are_enough() -> None:
    assert verdict(paired([0.3] * 30 + [-0.2] * 10, [0.0] * 40)).word == "better"


def test_to_reach_the_target_is_to_meet_it() -> None:
    assert to_target([10.0, 20.0], [0.2, 0.5], 0.5)[:2] == (20.0, True)
    assert to_target([10.0, 20.0], [0.9, 0.5], 0.5, lower_is_better=True)[:2] == (20.0, True)


def test_a_loss_within_the_margin_is_no_evidence_of_a_worse_one() -> None:
    assert paired([0.95] * 5, [1.0] * 5, margin=0.1).p_worse == 1


def test_quantiles_of_few_values_are_taken_as_far_out_as_the_docstring_says() -> None:
    from scipy import stats

    values = np.array([0.0, 1.0, 2.0, 4.0, 8.0])
    drawn = np.random.default_rng(1).choice(values, (100_000, 5)).mean(1)
    out = stats.t.ppf(0.975, 4) * (5 / 4) ** 0.5
    expected = np.quantile(drawn, stats.norm.cdf([-out, out]))
    found = cluster_bootstrap(values, range(5), resamples=100_000)
    assert found == pytest.approx(tuple(expected), abs=0.11)


def test_a_share_without_exception_is_as_sure_as_its_clusters_are_many() -> None:
    prompts = [number // 4 for number in range(80)]  # four pictures of each of twenty
    assert share_interval(np.ones(80), prompts, [0] * 80) == wilson(20, 20)
    assert share_interval(np.zeros(80), prompts, [0] * 80) == wilson(0, 20)
    tasks = [number % 2 for number in range(80)]  # a prompt of two tasks is one of each
    assert share_interval(np.ones(80), prompts, tasks) == wilson(40, 40)


def test_an_interval_holds_its_share_to_the_last_digit() -> None:
    for n in range(1, 500):
        assert wilson(n, n)[1] == 1
        assert wilson(0, n)[0] == 0
