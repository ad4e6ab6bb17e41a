"""Distances against closed forms, brute force and other people's programs."""

import json
import math
import os
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daybreak.evaluate import distances
from daybreak.evaluate.distances import Estimate, Moments, between, cmmd, frechet, kernel, moments
from daybreak.failure import BadData

Floats = npt.NDArray[np.float64]


def normal(n: int, f: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=(n, f))


def unit(x: Floats) -> Floats:
    rows: Floats = x / np.linalg.norm(x, axis=1, keepdims=True)
    return rows


def symmetric(f: int, seed: int) -> Floats:
    """A positive matrix without any structure."""
    square = normal(f, f, seed)
    return square @ square.T / f + np.eye(f) / 10


# Frechet


@pytest.mark.parametrize("f", [1, 8, 64, 300])
def test_gaussians_whose_distance_is_known(f: int) -> None:
    """With S = P^2 and T = P^-1 M^2 P^-1 the root of S^1/2 T S^1/2 is M, and nothing commutes."""
    root, middle = symmetric(f, 1), symmetric(f, 2)
    inverse = np.linalg.inv(root)
    one, other = root @ root, inverse @ middle @ middle @ inverse
    shift = normal(1, f, 3)[0]
    known = shift @ shift + np.trace(one) + np.trace(other) - 2 * np.trace(middle)
    found = between(Moments(shift, one), Moments(np.zeros(f), other))
    assert found == pytest.approx(known, rel=1e-6)


def test_spherical_gaussians_are_apart_by_mean_and_radius() -> None:
    f = 768
    one, other = Moments(np.full(f, 0.5), 4 * np.eye(f)), Moments(np.zeros(f), np.eye(f))
    assert between(one, other) == pytest.approx(f * 0.25 + f * (2 - 1) ** 2, rel=1e-12)


def test_gaussians_without_full_rank_have_a_distance() -> None:
    """On a line in 50 dimensions: (mean difference)^2 + (difference of deviations)^2."""
    line = normal(50, 1, 4)[:, 0]
    line /= np.linalg.norm(line)
    one, other = (
        Moments(3 * line, 4 * np.outer(line, line)),
        Moments(0 * line, np.outer(line, line)),
    )
    assert between(one, other) == pytest.approx(3**2 + 1**2, abs=1e-6)


@pytest.mark.parametrize("n", [100, 1_000])
def test_a_set_has_no_distance_to_itself(n: int) -> None:
    x = normal(n, 256)
    assert abs(frechet(x, moments(x)).value) < 1e-3
    assert distances.manifold(x, x).precision.value == 1


def test_moments_are_those_of_numpy() -> None:
    x = normal(40, 7)
    assert moments(x).mean == pytest.approx(x.mean(0))
    assert moments(x).covariance == pytest.approx(np.cov(x, rowvar=False))


def test_few_pictures_raise_the_frechet_distance_by_what_it_says() -> None:
    truth = Moments(np.zeros(32), np.eye(32))
    for n in (400, 4_000):
        found = [frechet(normal(n, 32, seed), truth) for seed in range(8)]
        values, biases = ([one[place] for one in found] for place in (0, 3))
        assert np.mean(values) == pytest.approx(np.mean(biases), rel=0.15)  # the truth is 0
        assert np.mean(values) == pytest.approx((32 + 32 * 33 / 4) / n, rel=0.15)  # first order


def test_the_interval_of_the_frechet_distance_is_as_wide_as_it_varies() -> None:
    truth = Moments(np.full(16, 0.3), np.eye(16))
    found = [frechet(normal(1_000, 16, seed), truth) for seed in range(60)]
    inside = [one.low <= np.mean([other.value for other in found]) <= one.high for one in found]
    assert 0.85 <= np.mean(inside) <= 1


def test_leaving_out_groups_is_the_same_as_computing_without_them() -> None:
    x, truth = normal(100, 5) + 3, Moments(np.zeros(5), np.eye(5))
    without = np.array(
        [
            frechet(np.delete(x, range(group, 100, 10), 0), truth).value
            for group in range(distances.GROUPS)
        ]
    )
    found = frechet(x, truth)
    assert found.bias == pytest.approx(9 * (without.mean() - found.value), abs=1e-9)
    error = math.sqrt(0.9 * np.square(without - without.mean()).sum())
    assert found.high - found.value == pytest.approx(2.262157 * error, rel=1e-5)


def test_a_value_raised_by_few_pictures_comes_with_a_warning() -> None:
    truth = Moments(np.zeros(32), np.eye(32))
    few, many = normal(200, 32), normal(20_000, 32) + 0.2
    sentence = distances.warning("FD", frechet(few, truth), len(few))
    assert sentence is not None
    assert "on 200 pictures" in sentence
    assert distances.warning("FD", frechet(many, truth), len(many)) is None


# Kernels


def brute(x: Floats, y: Floats, of: Callable[[Floats, Floats], float]) -> float:
    """MMD^2 by its definition."""

    def mean(pairs: list[tuple[Floats, Floats]]) -> float:
        return float(np.mean([of(one, other) for one, other in pairs]))

    n, m = range(len(x)), range(len(y))
    return (
        mean([(x[i], x[j]) for i in n for j in n if i != j])
        + mean([(y[i], y[j]) for i in m for j in m if i != j])
        - 2 * mean([(one, other) for one in x for other in y])
    )


@given(n=st.integers(3, 9), m=st.integers(3, 9), f=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_kernel_distances_are_their_definitions(n: int, m: int, f: int, seed: int) -> None:
    x, y = normal(n, f, seed), normal(m, f, seed + 1) + 0.5
    known = brute(x, y, lambda a, b: float(a @ b / f + 1) ** 3)
    assert kernel(x, y).value == pytest.approx(known, rel=1e-9, abs=1e-9)
    x, y = unit(x), unit(y)
    known = 1000 * brute(x, y, lambda a, b: float(np.exp(-np.square(a - b).sum() / 200)))
    assert cmmd(x, y).value == pytest.approx(known, rel=1e-6, abs=1e-9)


def test_kernel_distances_of_equal_sources_are_zero_on_average_at_any_number() -> None:
    for n in (10, 200):
        found = [kernel(normal(n, 8, seed), normal(50, 8, 1000 + seed)) for seed in range(200)]
        values = np.array([one.value for one in found])
        assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
        assert (values < 0).mean() > 0.2


@pytest.mark.parametrize("distance", [kernel, cmmd])
def test_the_interval_of_a_kernel_distance_is_as_wide_as_it_varies(
    distance: Callable[[Floats, Floats], Estimate],
) -> None:
    reference = normal(400, 8, 999)
    found = [distance(normal(200, 8, seed) + 0.5, reference) for seed in range(100)]
    spread = np.std([one.value for one in found])
    half = np.mean([one.high - one.value for one in found])
    assert half == pytest.approx(1.96 * spread, rel=0.25)


def test_cmmd_is_ten_times_the_squared_distance_of_the_means() -> None:
    """As known of its kernel: it sees nothing but the mean, hence is never reported alone."""
    x, y = unit(normal(400, 20)), unit(normal(400, 20, 1) + 0.4)
    apart = np.square(x.mean(0) - y.mean(0)).sum()
    apart -= (1 - np.square(x.mean(0)).sum()) / 399 + (1 - np.square(y.mean(0)).sum()) / 399
    assert cmmd(x, y).value == pytest.approx(10 * apart, rel=0.01)


# Manifolds


def test_manifolds_are_their_definitions() -> None:
    x, y, k = normal(60, 3), normal(80, 3, 1) * 1.3 + 0.3, 5
    apart = np.linalg.norm(x[:, None] - y, axis=-1)
    around_x = np.sort(np.linalg.norm(x[:, None] - x, axis=-1), 1)[:, k]
    around_y = np.sort(np.linalg.norm(y[:, None] - y, axis=-1), 1)[:, k]
    inside_y = apart <= around_y
    found = distances.manifold(x, y, k)
    assert found.precision.value == pytest.approx(inside_y.any(1).mean())
    assert found.recall.value == pytest.approx((apart <= around_x[:, None]).any(0).mean())
    assert found.density.value == pytest.approx(inside_y.sum() / k / len(x))
    assert found.coverage.value == pytest.approx(inside_y.any(0).mean())


def test_density_and_coverage_of_equal_sources_are_as_predicted() -> None:
    """Naeem et al.: density is 1 and coverage 1 - (m-1)...(m-k) / (n+m-1)...(n+m-k)."""
    n, m, k = 300, 200, 5
    found = [
        distances.manifold(normal(n, 6, seed), normal(m, 6, 500 + seed), k) for seed in range(20)
    ]
    missed = math.prod((m - i) / (n + m - i) for i in range(1, k + 1))
    assert np.mean([one.coverage.value for one in found]) == pytest.approx(1 - missed, abs=0.005)
    assert np.mean([one.density.value for one in found]) == pytest.approx(1, abs=0.03)


def test_a_forgotten_mode_costs_recall_and_a_foreign_one_precision() -> None:
    both = np.concatenate((normal(200, 4), normal(200, 4, 1) + 20))
    half = normal(400, 4, 2)
    forgotten, foreign = distances.manifold(half, both), distances.manifold(both, half)
    assert forgotten.recall.value < 0.51
    assert forgotten.precision.value > 0.9
    assert foreign.precision.value < 0.51
    assert foreign.recall.value > 0.9


# All of them


def everything(x: Floats, y: Floats) -> list[float]:
    found = [frechet(x, moments(y)), kernel(x, y), cmmd(x, y), *distances.manifold(x, y)]
    return [one.value for one in found]


def test_the_order_of_pictures_does_not_matter() -> None:
    x, y = normal(150, 6), normal(120, 6, 1) + 0.2
    order = np.random.default_rng(0)
    assert everything(order.permutation(x), order.permutation(y)) == pytest.approx(everything(x, y))


def test_the_size_of_blocks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(150, 6), normal(120, 6, 1) + 0.2
    whole = everything(x, y)
    monkeypatch.setattr(distances, "BLOCK", 37)
    assert everything(x, y) == pytest.approx(whole)


def test_half_precision_and_single_precision_features_are_taken() -> None:
    x, y = normal(150, 6), normal(120, 6, 1) + 0.2
    single = everything(x.astype(np.float32), y.astype(np.float32))
    assert single == pytest.approx(everything(x, y), rel=1e-4)


def test_memory_is_a_few_copies_of_the_features() -> None:
    x, y = normal(7_000, 64), normal(7_000, 64, 1)  # all pairs would be 392 MB
    tracemalloc.start()
    distances.manifold(x, y)
    kernel(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * x.nbytes + 8 * 8 * distances.BLOCK**2


@pytest.mark.parametrize(
    "distance", [lambda x, y: frechet(x, moments(y)), kernel, cmmd, distances.manifold]
)
def test_too_few_pictures_are_refused(distance: Callable[[Floats, Floats], object]) -> None:
    with pytest.raises(BadData, match="2 pictures of the model are too few"):
        distance(normal(2, 4), normal(40, 4))


@pytest.mark.parametrize("distance", [kernel, cmmd, distances.manifold])
def test_of_two_sets_the_one_that_is_too_small_is_named(
    distance: Callable[[Floats, Floats], object],
) -> None:
    with pytest.raises(BadData, match="2 pictures of the reference are too few"):
        distance(normal(40, 4), normal(2, 4))


def test_features_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="not of one network"):
        kernel(normal(10, 4), normal(10, 5))
    with pytest.raises(ValueError, match="a reference of 5"):
        frechet(normal(40, 4), moments(normal(40, 5)))
    with pytest.raises(ValueError, match="not finite"):
        kernel(np.full((10, 4), np.nan), normal(10, 4))
    with pytest.raises(ValueError, match="not uint8"):
        kernel(np.zeros((10, 4), dtype=np.uint8), normal(10, 4))
    with pytest.raises(ValueError, match="no direction"):
        cmmd(np.zeros((10, 4)), normal(10, 4))


# How long it takes, and how much memory, of sets as large as people use


def measured(pictures: int, width: int) -> dict[str, float]:
    """Seconds of one core, and bytes, that all distances of two sets take in their own process.

    Seconds are the core's, so that it does not matter what else runs on the machine.
    """
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, __file__, str(pictures), str(width)],
        env=os.environ | one,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    sys.stdout.write(f"{pictures:,} x {width}: {found}\n")
    return found


@pytest.mark.slow
def test_all_distances_of_5000_pictures_take_less_than_20_seconds_of_one_core() -> None:
    assert measured(5_000, 768)["seconds"] < 20


@pytest.mark.slow
def test_the_memory_of_50000_pictures_is_a_few_copies_of_their_features() -> None:
    """All pairs at once would be 20 GB."""
    copies = 6 * 50_000 * 64 * 8
    assert measured(50_000, 64)["bytes"] < copies + 8 * 8 * distances.BLOCK**2


# Other people's programs, where they are installed


def test_torchmetrics_agrees() -> None:
    pytest.importorskip("torchmetrics")
    import torch
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    x, y = normal(300, 24), normal(300, 24, 1) * 1.2 + 0.3
    one, other = moments(x), moments(y)
    theirs = _compute_fid(*(torch.from_numpy(part) for part in (*one, *other)))
    assert frechet(x, other).value == pytest.approx(float(theirs), rel=1e-6)
    theirs = poly_mmd(torch.from_numpy(x), torch.from_numpy(y))
    assert kernel(x, y).value == pytest.approx(float(theirs), rel=1e-6)


def test_torch_fidelity_agrees() -> None:
    pytest.importorskip("torch_fidelity", exc_type=(ImportError, RuntimeError))  # type: ignore[arg-type]
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_kid import kernel_mmd

    x, y = normal(300, 24), normal(300, 24, 1) * 1.2 + 0.3
    one, other = ({"mu": m.mean, "sigma": m.covariance} for m in (moments(x), moments(y)))
    theirs = fid_statistics_to_metric(one, other, verbose=False)["frechet_inception_distance"]
    assert frechet(x, moments(y)).value == pytest.approx(theirs, rel=1e-6)
    theirs = kernel_mmd(x, y, kid_kernel="poly")
    assert kernel(x, y).value == pytest.approx(theirs, rel=1e-6)


if __name__ == "__main__":
    n, f = map(int, sys.argv[1:])
    features, reference = (normal(n, f, seed).astype(np.float32) for seed in (0, 1))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    frechet(features, moments(reference))
    kernel(features, reference)
    cmmd(features, reference)
    distances.manifold(features, reference)
    took, peak = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.stdout.write(json.dumps({"seconds": round(took, 1), "bytes": 1024 * (peak - before)}))


@pytest.mark.parametrize("distance", [kernel, cmmd])
def test_leaving_out_a_picture_is_the_same_as_computing_without_it(
    distance: Callable[..., Estimate],
) -> None:
    x, y = normal(30, 4) + 0.3, normal(25, 4, 1) - 1
    without = np.array([distance(np.delete(x, i, 0), y).value for i in range(30)])
    error = math.sqrt(29 / 30 * np.square(without - without.mean()).sum())
    found = distance(x, y)
    assert found.high - found.value == pytest.approx(1.959964 * error, rel=1e-6)
    assert found.value - found.low == pytest.approx(1.959964 * error, rel=1e-6)


def test_a_twentieth_is_where_the_warning_begins() -> None:
    assert distances.warning("FD", Estimate(1.0, 0.9, 1.1, 0.049), 200) is None
    assert distances.warning("FD", Estimate(1.0, 0.9, 1.1, 0.051), 200) is not None
