"""Intervals of scores, and tests of whether one recipe is better than another.

95 % intervals, with which every score is printed:

    wilson              independent images: one task, one held-out split
    difference          difference of two independent shares
    cluster_bootstrap   everything else: images of one specification are not independent, and a
                        mean of task means is not a share

Comparisons of a candidate with a baseline, paired by seed: both have the same initial weights,
order of data and evaluation noise, so most random variation cancels.

    paired, verdict     mean gain, interval, exact p-value, and the conclusion
    mcnemar             the same prompts within one seed
    holm                several candidates against one baseline
    race                cost until a target is met, where some runs may never meet it
    meets               whether the mean of several runs meets a target

All p-values are exact or from Student's t. Those of `paired` are one-sided, one for each direction,
because five seeds cannot give a two-sided p below 0.05. So, if there is no difference, up to one
comparison in twenty says better and as many say worse.

Source  Wilson 1927; Newcombe 1998; expanded percentiles: Hesterberg, arXiv 1411.5279; clustering of
        evaluations: Miller, "Adding error bars to evals", arXiv 2411.00640; paired seeds and
        P(A > B): Bouthillier et al., arXiv 2103.03098; sign flips: Fisher 1935; McNemar 1947;
        Holm 1979.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
CHUNK = 500  # resamples at a time, to bound the table of counts, (CHUNK, clusters)

ALPHA = 0.05  # largest p of "better" or "worse", for each direction
WINS = 0.75  # least share of seeds in which a candidate called better must be better
FEWEST, MOST = 5, 40  # seeds: 2^-5 is the first p below ALPHA; 2^40 flips can still be counted
FOUND = 0.8416212335729143  # 80 % quantile of the standard normal, for a power of 80 %


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, for `successes` of n.

    Unlike share +- 2 standard errors it stays within [0, 1] and is not a point for n of n.

    Errors  ValueError unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} have no interval")
    share = successes / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2) / (1 + Z * Z / n)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return low if successes else 0.0, high if successes < n else 1.0  # exact despite rounding


def difference(successes: int, n: int, others: int, m: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two independent shares, successes/n - others/m.

    It combines Wilson's intervals of both (Newcombe's method 10), so it stays within [-1, 1].

    Errors  ValueError as `wilson`.
    """
    one, other = successes / max(n, 1), others / max(m, 1)
    (low, high), (lower, higher) = wilson(successes, n), wilson(others, m)
    return (
        one - other - math.hypot(one - low, higher - other),
        one - other + math.hypot(high - one, other - lower),
    )


def cluster_bootstrap(
    values: Sequence[float] | npt.NDArray[np.float64],
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, resampling whole clusters with replacement.

    With `strata` the statistic is the mean of the strata's means, and clusters are resampled within
    each: for a score over a fixed set of tasks. A stratum of one cluster cannot vary and adds no
    width. If all values are equal, the interval is a point (`share_interval` avoids that).

    Bootstrap means of few values vary too little. The quantiles are therefore moved outwards, to
    match Student's t and division by n - 1 instead of n: for five normal values the coverage is
    then 91 % instead of 85, for eight 94 instead of 87.

    Shapes  values, clusters and strata have one entry per image.
    Errors  ValueError if they differ in length or are empty.
    """
    strata = [0] * len(values) if strata is None else strata
    if not len(values) == len(clusters) == len(strata) > 0:
        raise ValueError(
            f"{len(values)} values, {len(clusters)} clusters and {len(strata)} strata must be "
            f"equally many, and at least one"
        )
    generator = np.random.Generator(np.random.Philox(key=seed))
    numbers = np.asarray(values, dtype=np.float64)
    means, free = np.zeros(resamples), 0
    names = sorted(set(strata), key=repr)
    for name in names:
        chosen = [i for i, stratum in enumerate(strata) if stratum == name]
        keys = {key: k for k, key in enumerate(dict.fromkeys(clusters[i] for i in chosen))}
        place = np.array([keys[clusters[i]] for i in chosen])
        sums, sizes = np.bincount(place, weights=numbers[chosen]), np.bincount(place)
        free += len(keys) - 1
        for start in range(0, resamples, CHUNK):
            rows = min(CHUNK, resamples - start)
            drawn = generator.multinomial(len(keys), np.full(len(keys), 1 / len(keys)), rows)
            means[start : start + rows] += (drawn @ sums) / (drawn @ sizes) / len(names)
    if not free:
        return float(means[0]), float(means[0])
    out = stats.t.ppf(0.975, free) * math.sqrt((free + len(names)) / free)
    low, high = np.quantile(means, stats.norm.cdf([-out, out]))
    return float(low), float(high)


def share_interval(
    passed: npt.NDArray[np.float64], clusters: Sequence[Hashable], strata: Sequence[Hashable]
) -> tuple[float, float]:
    """The 95 % interval of a share, for clustered verdicts 0 and 1.

    If all verdicts are equal, the bootstrap interval would be a point. Then it is Wilson's, with
    the number of clusters as n, since the verdicts of a cluster may not be independent.

    Shapes, errors  as `cluster_bootstrap`.
    """
    if len(passed) and passed.min() == passed.max():
        n = len(set(zip(clusters, strata, strict=True)))
        return wilson(n if passed[0] else 0, n)
    return cluster_bootstrap(passed, clusters, strata)


def mean_interval(values: Sequence[float] | npt.NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % interval of the mean of a few independent results, such as those of seeds.

    For two, three or four of them the bootstrap covers only 50, 76 and 88 %: for fewer than FEWEST
    the interval is Student's t. For one result both ends are its value.
    """
    n = len(values)
    if not 1 < n < FEWEST:
        return cluster_bootstrap(values, range(n))
    off = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return float(np.mean(values)) - off, float(np.mean(values)) + off


# One recipe against another


class Paired(NamedTuple):
    """Candidate against baseline over seeds, signed so that a positive gain is an improvement."""

    gain: float  # mean of the differences
    low: float
    high: float
    p_better: float  # p-value of a gain this large if the true gain is at most the margin
    p_worse: float
    wins: float  # share of seeds in which the candidate is better; a tie is half a win
    sd: float  # of the differences; 0 for a single seed
    n: int  # number of seeds
    margin: float = 0.0  # the smallest gain that matters, fixed before the runs

    @property
    def p(self) -> float:
        """The p-value of the observed direction, which `holm` adjusts."""
        return min(self.p_better, self.p_worse)


class Verdict(NamedTuple):
    """The conclusion of a comparison, and its reasons."""

    word: Literal["better", "worse", "not resolved"]
    sentence: str


class McNemar(NamedTuple):
    """The numbers of prompts on which two models differ, and the two-sided p of such a split."""

    gained: int  # only the candidate passes
    lost: int  # only the baseline passes
    p: float


def paired(
    candidate: Sequence[float] | npt.NDArray[np.float64],
    baseline: Sequence[float] | npt.NDArray[np.float64],
    lower_is_better: bool = False,
    margin: float = 0.0,
) -> Paired:
    """Compare results of the same seeds, in the same order.

    The p-values are those of a gain, and of a loss, beyond the `margin`.

    Errors  ValueError unless equally many, at least one, all finite.
    """
    if not len(candidate) == len(baseline) > 0:
        raise ValueError(
            f"{len(candidate)} results of the candidate and {len(baseline)} of the baseline "
            "cannot be paired"
        )
    differences = np.subtract(candidate, baseline, dtype=np.float64)
    if lower_is_better:
        differences = -differences
    if not np.isfinite(differences).all():
        raise ValueError("a result is not finite, so nothing can be compared with it")
    n = len(differences)
    low, high = mean_interval(differences)
    return Paired(
        gain=float(differences.mean()),
        low=low,
        high=high,
        p_better=sign_flip(differences - margin),
        p_worse=sign_flip(-differences - margin),
        wins=float((np.sign(differences) / 2 + 0.5).mean()),
        sd=float(differences.std(ddof=1)) if n > 1 else 0.0,
        n=n,
        margin=margin,
    )


def sign_flip(differences: Sequence[float] | npt.NDArray[np.float64]) -> float:
    """Exact one-sided p-value of the hypothesis that the mean difference is not above zero.

    If candidate and baseline were equal, each difference could as well have the opposite sign. Of
    all 2^n choices of signs, p is the share with a sum at least as large as the observed one. The
    signed sums of each half are sorted and matched, so only about 2^(n/2) numbers are stored.

    Errors  ValueError for none or more than MOST differences.
    """
    numbers = np.asarray(differences, dtype=np.float64)
    if not 0 < len(numbers) <= MOST:
        raise ValueError(f"{len(numbers)} differences; sign flips are counted for 1 to {MOST}")
    half = len(numbers) // 2
    first, second = (np.sort(_signed_sums(part)) for part in (numbers[:half], numbers[half:]))
    least = numbers.sum() - 1e-9 * np.abs(numbers).sum()  # equal sums differ by rounding
    reached = len(first) - np.searchsorted(first, least - second)
    return float(reached.sum() / 2 ** len(numbers))


def _signed_sums(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    sums = np.zeros(1)
    for number in numbers:
        sums = np.concatenate((sums + number, sums - number))
    return sums


def verdict(comparison: Paired, p: float | None = None, comparisons: int = 1) -> Verdict:
    """Say better or worse only if the exact test and the interval agree.

    `p` replaces the comparison's own p if it is one of several `comparisons` (`holm`). With enough
    seeds even a gain far smaller than their noise is significant, so a candidate that is better in
    fewer than WINS of them is not called better.
    """
    gain, low, high, *_, wins, sd, n, margin = comparison
    p = comparison.p if p is None else p
    seen = (
        f"the mean difference over {n} {'seed' if n == 1 else 'seeds'} is {gain:+.4g} "
        f"(95 % interval {low:+.4g} to {high:+.4g}, p = {p:.2g}, better in {wins:.0%} of seeds)"
    )
    if p <= ALPHA and (low > margin or high < -margin):
        if gain > 0 and wins < WINS:
            return Verdict(
                "not resolved",
                f"not resolved: {seen}; to be called better an arm must win in at least {WINS:.0%} "
                "of seeds, however small p is",
            )
        word: Literal["better", "worse"] = "better" if gain > 0 else "worse"
        return Verdict(word, f"{word}: {seen}")
    least = seeds_for(comparisons)
    if n < FEWEST:
        return Verdict(
            "not resolved",
            f"not resolved: {seen}; nothing can be resolved with fewer than {least} seeds",
        )
    beyond = abs(gain) - margin
    if beyond <= 0:
        what = "no difference" if margin == 0 else f"no difference beyond {margin:.4g}"
        return Verdict("not resolved", f"not resolved: {seen}; there is {what} to be resolved")
    needed = max(n + 1, least, seeds_needed(sd, beyond, comparisons))
    many = f"about {needed:,} seeds" if needed <= 10_000 else "more than 10,000 seeds"
    rare = f", and must show in {WINS:.0%} of them" if gain > 0 and wins < WINS else ""
    return Verdict(
        "not resolved", f"not resolved: {seen}; a difference of this size needs {many}{rare}"
    )


def seeds_for(comparisons: int) -> int:
    """The fewest seeds with which this many comparisons can be resolved at all.

    The smallest p of n seeds is 2^-n, and Holm multiplies the smallest of several by their number.
    """
    return max(FEWEST, math.ceil(math.log2(max(1, comparisons) / ALPHA)))


def seeds_needed(sd: float, difference: float, comparisons: int = 1) -> int:
    """Number of seeds to detect a mean difference with a power of 80 %, at least FEWEST.

    `sd` is that of the paired differences: sqrt(2 (1 - rho)) times that of one recipe's results.
    The level is 5 % two-sided, divided by the number of `comparisons` (Holm's first). The normal
    approximation is slightly too low for small numbers.
    """
    sure = float(stats.norm.isf(ALPHA / 2 / comparisons))
    return max(FEWEST, math.ceil((sure + FOUND) ** 2 * (sd / difference) ** 2))


def mcnemar(candidate: Sequence[bool], baseline: Sequence[bool]) -> McNemar:
    """Exact test on the prompts that one of two models passes and the other fails.

    It covers only the variation over prompts: two seeds of one recipe may differ significantly.

    Errors  ValueError unless equally many.
    """
    pairs = list(zip(candidate, baseline, strict=True))
    gained = sum(one and not other for one, other in pairs)
    lost = sum(other and not one for one, other in pairs)
    p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return McNemar(gained, lost, p)


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values for several comparisons: 5 % is then the chance of any false claim.

    With `Paired.p`, the p-value of the observed direction, it is 5 % for each direction.
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


# Cost until a target is met


class Reached(NamedTuple):
    """The cost at which a run met its target or, if it did not, up to which it was observed."""

    cost: float
    met: bool
    first: bool = False  # met at the first evaluation, so possibly long before


class Race(NamedTuple):
    """Two recipes compared by cost to a target; `ratio` is the candidate's over the baseline's."""

    ratio: float  # geometric mean over seeds
    low: float
    high: float
    median: float  # of the ratios
    met: tuple[int, int]  # runs of candidate and baseline that met the target
    means: tuple[float, float]  # their mean costs, each limited to the horizon
    horizon: float  # cost up to which every run was observed
    early: int  # runs that met it at their first evaluation, so possibly long before
    logs: Paired  # of log cost, lower is better


def to_target(
    costs: Sequence[float],
    values: Sequence[float],
    target: float,
    lower_is_better: bool = False,
    interpolate: bool = False,
) -> Reached:
    """Find the first evaluation that meets the target.

    A published cost is that of an evaluation. To compare recipes, the crossing can be interpolated
    between the first evaluation that passes and the one before. NaN never passes.

    Errors  ValueError unless there are as many costs as values, at least one, and costs rise.
    """
    if not len(costs) == len(values) > 0 or any(np.diff(costs) <= 0):
        raise ValueError(f"{len(costs)} rising costs and as many values are needed")
    sign = -1 if lower_is_better else 1
    for i, value in enumerate(values):
        if sign * value >= sign * target:
            if not interpolate or i == 0 or not math.isfinite(values[i - 1]):
                return Reached(costs[i], met=True, first=i == 0)
            way = (target - values[i - 1]) / (value - values[i - 1])
            return Reached(costs[i - 1] + way * (costs[i] - costs[i - 1]), met=True)
    return Reached(costs[-1], met=False)


def race(candidate: Sequence[Reached], baseline: Sequence[Reached]) -> Race:
    """Compare costs to a target over the same seeds.

    A run that missed the target is censored, not dropped: all costs are limited to the horizon, the
    smallest cost at which a run ended without meeting it. So if one of a pair missed, their ratio
    is nearer to 1 than the true one; if both did, it is 1.

    Errors  ValueError as `paired`.
    """
    horizon = min((run.cost for run in (*candidate, *baseline) if not run.met), default=math.inf)
    ours, theirs = ([min(run.cost, horizon) for run in runs] for runs in (candidate, baseline))
    logs = paired(np.log(ours), np.log(theirs), lower_is_better=True)
    ratios = np.divide(ours, theirs)
    return Race(
        ratio=math.exp(-logs.gain),
        low=math.exp(-logs.high),
        high=math.exp(-logs.low),
        median=float(np.median(ratios)),
        met=(sum(run.met for run in candidate), sum(run.met for run in baseline)),
        means=(float(np.mean(ours)), float(np.mean(theirs))),
        horizon=horizon,
        early=sum(run.first for run in (*candidate, *baseline)),
        logs=logs,
    )


def meets(values: Sequence[float], target: float, lower_is_better: bool = False) -> float:
    """One-sided p-value, by Student's t, of the hypothesis that a mean does not meet a target.

    A speedrun record needs enough runs that this is below 0.01.

    Errors  ValueError for fewer than two runs, which have no spread.
    """
    if len(values) < 2:
        raise ValueError("one run has no spread: give two at least")
    side = "less" if lower_is_better else "greater"
    if np.ptp(values) == 0:  # t is infinite or undefined
        return float(not (values[0] < target if lower_is_better else values[0] > target))
    return float(stats.ttest_1samp(values, target, alternative=side).pvalue)
