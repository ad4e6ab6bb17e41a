"""Intervals for shares, so that no score is printed as if it were exact.

    wilson              independent images: one task, one held-out split
    cluster_bootstrap   everything else: images of one specification are not independent, and a
                        mean of task means is not a share

Both are 95 % intervals, (low, high) in [0, 1] for values in [0, 1].

Source  Wilson 1927; clustering of evaluations: Miller, "Adding error bars to evals",
        arXiv 2411.00640.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

Z = 1.959963984540054  # the standard normal stays within +-Z in 95 % of all cases
CHUNK = 500  # resamples at a time: a table (CHUNK, clusters) of counts stays small


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The shares that `successes` of n would not surprise.

    Unlike share +- 2 standard errors it never leaves [0, 1], and n of n is not certainty.

    Errors  ValueError unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} have no interval")
    share = successes / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2) / (1 + Z * Z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def cluster_bootstrap(
    values: Sequence[float] | npt.NDArray[np.float64],
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """The middle 95 % of means when whole clusters are drawn again, with replacement.

    With `strata` the statistic is the mean of the strata's means and clusters are drawn within
    each: a score over tasks, whose number and choice is fixed. A stratum of one cluster cannot
    vary and adds no width. Where every value is the same the interval is a point: a perfect score
    is read with Wilson's interval beside it.

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
    means = np.zeros(resamples)
    names = sorted(set(strata), key=repr)
    for name in names:
        chosen = [i for i, stratum in enumerate(strata) if stratum == name]
        keys = {key: k for k, key in enumerate(dict.fromkeys(clusters[i] for i in chosen))}
        place = np.array([keys[clusters[i]] for i in chosen])
        sums, sizes = np.bincount(place, weights=numbers[chosen]), np.bincount(place)
        for start in range(0, resamples, CHUNK):
            rows = min(CHUNK, resamples - start)
            drawn = generator.multinomial(len(keys), np.full(len(keys), 1 / len(keys)), rows)
            means[start : start + rows] += (drawn @ sums) / (drawn @ sizes) / len(names)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
