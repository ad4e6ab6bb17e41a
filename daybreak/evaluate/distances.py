"""Distances between a model's pictures and a reference, in the features of a network.

    frechet     |mu - nu|^2 + tr(S + T - 2 (S^1/2 T S^1/2)^1/2)                  FID, FD-DINOv2
    kernel      MMD^2 with k(x, y) = (x.y / f + 1)^3                             KID, KD-DINOv2
    cmmd        1000 MMD^2 with k(x, y) = exp(-|x - y|^2 / 200), |x| = |y| = 1
    manifold    precision, recall, density, coverage; balls that reach to the 5th neighbour

    MMD^2 = mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j),  i != j within a set

The Frechet distance assumes that both sets are Gaussian, and is biased upwards for few pictures:
compare it only at equal numbers. `Estimate.bias` estimates the bias. MMD^2 without the diagonal is
unbiased for any number of pictures and may be negative. With this kernel width, cmmd is practically
10 times the squared distance of the mean features: do not report it alone.

Intervals are at 95 % and show how much the value would vary with other pictures of the same model,
for a fixed reference. Those of recall and coverage, which are shares of the reference, show how
much it would vary with another reference. Values do not depend on the order of pictures. Distances
between all pairs are never stored at once: the memory needed is a few copies of the features.

Shapes  features (n, f) of the model, (m, f) of the reference; any float, computed in float64.
Errors  BadData for too few pictures; ValueError for features of another width or not finite.
Source  FID arXiv 1706.08500, its bias 1911.07023; KID 1801.01401; CMMD 2401.09603; precision and
        recall 1904.06991, density and coverage 2002.09797; jackknife: Efron and Stein 1981.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from daybreak.evaluate.statistics import Z, wilson
from daybreak.failure import BadData

Features = npt.NDArray[np.floating[Any]]
Floats = npt.NDArray[np.float64]
Kernel = Callable[[Floats, Floats], Floats]

BLOCK = 2048  # rows of each set that are compared at a time: 32 MiB
GROUPS = 10  # groups of pictures for the jackknife of the Frechet distance
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
NEIGHBOURS = 5
FEWEST, FEWEST_TRUE = 2 * GROUPS, NEIGHBOURS + 1  # pictures of model and reference for all measures


class Estimate(NamedTuple):
    """A value, its interval, and its bias from the finite number of pictures."""

    value: float
    low: float
    high: float
    bias: float = 0.0


class Moments(NamedTuple):
    """Mean (f,) and covariance (f, f) of features, all that the Frechet distance depends on."""

    mean: Floats
    covariance: Floats


class Manifold(NamedTuple):
    """Two sets as unions of balls around their points, each reaching to its k-th neighbour.

    precision   share of the model's pictures inside a ball of the reference
    recall      share of the reference inside a ball of the model's pictures
    density     reference balls around a picture of the model, divided by k; may exceed 1
    coverage    share of the reference whose ball holds a picture of the model
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def check(number: int, of: str, least: int = FEWEST) -> None:
    """Check a number of pictures, also before drawing. Errors: BadData for fewer than `least`."""
    if number < least:
        raise BadData(f"{number} {of} are too few for these distances: give {least} or more")


def moments(features: Features) -> Moments:
    """Mean and covariance (divided by n - 1)."""
    x = _matrix(features, 2, "pictures")
    mean = x.mean(0)
    return Moments(mean, (x - mean).T @ (x - mean) / (len(x) - 1))


def between(one: Moments, other: Moments) -> float:
    """The Frechet distance of two Gaussians."""
    return _between(one, other, _root(other.covariance))


def frechet(features: Features, reference: Moments) -> Estimate:
    """The Frechet distance to a reference given by its moments.

    Interval and bias come from a jackknife that leaves out a tenth of the pictures at a time. The
    bias is of first order: subtract it to compare different numbers of pictures, if it is small.
    """
    x = _matrix(features, FEWEST, "pictures of the model")
    if x.shape[1] != len(reference.mean):
        raise ValueError(f"features {x.shape} and a reference of {len(reference.mean)} features")
    root = _root(reference.covariance)
    value = _between(moments(x), reference, root)

    n, centre = len(x), x.mean(0)
    x = x - centre
    square = x.T @ x
    without = np.empty(GROUPS)
    for group in range(GROUPS):
        out = x[group::GROUPS]
        rest = n - len(out)
        mean = -out.sum(0) / rest
        covariance = (square - out.T @ out - rest * np.outer(mean, mean)) / (rest - 1)
        without[group] = _between(Moments(centre + mean, covariance), reference, root)
    error = np.sqrt((GROUPS - 1) / GROUPS * np.square(without - without.mean()).sum())
    half = float(stats.t.ppf(0.975, GROUPS - 1) * error)
    bias = float((GROUPS - 1) * (without.mean() - value))
    return Estimate(value, value - half, value + half, bias)


def kernel(features: Features, reference: Features) -> Estimate:
    """The unbiased kernel distance over all pairs: no subsets, hence no seed."""
    x, y = _pair(features, reference, least=3)
    width = x.shape[1]

    def cubed(one: Floats, other: Floats) -> Floats:
        base = one @ other.T / width + 1
        return base * base * base

    return _mmd(x, y, cubed)


def cmmd(features: Features, reference: Features) -> Estimate:
    """The kernel distance of features scaled to length 1; the paper uses those of CLIP.

    Errors  ValueError for features of length zero.
    """
    x, y = (_unit(rows) for rows in _pair(features, reference, least=3))

    def bell(one: Floats, other: Floats) -> Floats:
        return np.exp((one @ other.T - 1) / CMMD_SIGMA**2)  # |x - y|^2 = 2 - 2 x.y

    return Estimate(*(CMMD_SCALE * number for number in _mmd(x, y, bell)))


def manifold(features: Features, reference: Features, k: int = NEIGHBOURS) -> Manifold:
    """Precision, recall, density and coverage; compare only at equal k, n and m.

    Intervals treat the balls as fixed and cover only the number of points inside.
    """
    x, y = _pair(features, reference, least=k + 1)
    centre = y.mean(0)  # distances of points far from the origin lose digits
    x, y = x - centre, y - centre
    around_x, around_y = _reach(x, k), _reach(y, k)

    in_y, balls = np.zeros(len(x), dtype=bool), np.zeros(len(x))
    in_x, filled = np.zeros(len(y), dtype=bool), np.zeros(len(y), dtype=bool)
    for rows in _blocks(len(x)):
        for columns in _blocks(len(y)):
            apart = _squared(x[rows], y[columns])
            inside = apart <= around_y[columns]
            in_y[rows] |= inside.any(1)
            balls[rows] += inside.sum(1)
            filled[columns] |= inside.any(0)
            in_x[columns] |= (apart <= around_x[rows, None]).any(0)
    density = balls / k
    mean = float(density.mean())
    half = Z * float(density.std(ddof=1)) / math.sqrt(len(x))
    return Manifold(
        _share(in_y), _share(in_x), Estimate(mean, mean - half, mean + half), _share(filled)
    )


def warning(name: str, estimate: Estimate, n: int) -> str | None:
    """Return a warning if the bias exceeds a twentieth of the value, else None."""
    if abs(estimate.bias) <= 0.05 * abs(estimate.value):
        return None
    return (
        f"{name} {estimate.value:.4g} ({estimate.low:.4g} to {estimate.high:.4g}) is raised by "
        f"about {estimate.bias:.2g} because it was measured on {n} pictures: compare it only with "
        "values from as many, or draw more"
    )


# The Frechet distance


def _between(one: Moments, other: Moments, root: Floats) -> float:
    """Frechet distance, given the root of the other's covariance.

    The trace of a matrix root is the sum of the roots of its eigenvalues.
    """
    spread = np.linalg.eigvalsh(root @ one.covariance @ root)
    trace = np.trace(one.covariance) + np.trace(other.covariance)
    apart = np.square(one.mean - other.mean).sum()
    # With fewer pictures than features, rounding makes some eigenvalues slightly negative.
    return float(apart + trace - 2 * np.sqrt(spread.clip(0)).sum())


def _root(covariance: Floats) -> Floats:
    values, vectors = np.linalg.eigh(covariance)
    root: Floats = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


# Kernels


def _mmd(x: Floats, y: Floats, of: Kernel) -> Estimate:
    """MMD^2; the interval is a jackknife over x, computed from row sums at no further cost."""
    n, m = len(x), len(y)
    own, cross, other = _row_sums(x, x, of), _row_sums(x, y, of), _row_sums(y, y, of)
    within = other.sum() / (m * (m - 1))
    value = own.sum() / (n * (n - 1)) + within - 2 * cross.sum() / (n * m)
    without = (own.sum() - 2 * own) / ((n - 1) * (n - 2))
    without -= 2 * (cross.sum() - cross) / ((n - 1) * m)
    half = Z * np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    return Estimate(float(value), float(value - half), float(value + half))


def _row_sums(x: Floats, y: Floats, of: Kernel) -> Floats:
    """Sum over y of k(x_i, y), without the diagonal if both are the same set, (n,)."""
    sums, same = np.zeros(len(x)), x is y
    for rows in _blocks(len(x)):
        for columns in _blocks(len(y)):
            if same and columns.start < rows.start:
                continue  # symmetric, done already
            block = of(x[rows], y[columns])
            if same and columns.start == rows.start:
                np.fill_diagonal(block, 0.0)
            elif same:
                sums[columns] += block.sum(0)
            sums[rows] += block.sum(1)
    return sums


# Neighbours


def _reach(x: Floats, k: int) -> Floats:
    """The squared distance of each point to its k-th nearest other point, (n,)."""
    reach = np.empty(len(x))
    for rows in _blocks(len(x)):
        nearest = np.full((rows.stop - rows.start, k), np.inf)
        for columns in _blocks(len(x)):
            apart = _squared(x[rows], x[columns])
            if columns.start == rows.start:
                np.fill_diagonal(apart, np.inf)
            nearest = np.partition(np.concatenate((nearest, apart), 1), k - 1, axis=1)[:, :k]
        reach[rows] = nearest[:, k - 1]
    return reach


def _squared(x: Floats, y: Floats) -> Floats:
    apart = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * (x @ y.T)
    return apart.clip(0, out=apart)


def _share(inside: npt.NDArray[np.bool_]) -> Estimate:
    return Estimate(float(inside.mean()), *wilson(int(inside.sum()), len(inside)))


# Inputs


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))


def _pair(features: Features, reference: Features, least: int) -> tuple[Floats, Floats]:
    x = _matrix(features, least, "pictures of the model")
    y = _matrix(reference, least, "pictures of the reference")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features {x.shape} and {y.shape} are not of one network")
    return x, y


def _matrix(features: Features, least: int, of: str) -> Floats:
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
        raise ValueError(f"features are floats (n, f), not {features.dtype} {features.shape}")
    check(len(features), of, least)
    if not np.isfinite(features).all():
        raise ValueError("features are not finite")
    return features.astype(np.float64)


def _unit(x: Floats) -> Floats:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not length.all():
        raise ValueError("a picture without features has no direction")
    unit: Floats = x / length
    return unit
