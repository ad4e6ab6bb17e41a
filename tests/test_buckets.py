"""Buckets: the shapes are those of the source, and every picture finds the one that cuts least."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daybreak.data.buckets import Bucket, at, buckets, cropped, nearest

SIDES = st.integers(1, 5000)


def test_the_shapes_of_512_pixels_are_the_published_ones() -> None:
    lying = "352x704 384x640 384x672 416x608 448x576 480x544"
    upright = "544x480 576x448 608x416 640x384 672x384 704x352"
    names = [bucket.name for bucket in buckets(512, 32, 2.0)]
    assert names == f"{lying} 512x512 {upright}".split()


@pytest.mark.parametrize(
    ("resolution", "unit", "number", "fewest", "most", "mean"),
    [(256, 32, 7, 55, 64, 60.0), (512, 32, 13, 240, 256, 248.6), (1024, 32, 27, 984, 1024, 1004.6)],
)
def test_numbers_of_buckets_and_tokens_are_the_published_ones(
    resolution: int, unit: int, number: int, fewest: int, most: int, mean: float
) -> None:
    tokens = [one.height * one.width // unit**2 for one in buckets(resolution, unit, 2.0)]
    assert len(tokens) == number
    assert (min(tokens), max(tokens)) == (fewest, most)
    assert sum(tokens) / len(tokens) == pytest.approx(mean, abs=0.05)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 64), st.floats(1, 8))
def test_buckets_keep_to_unit_budget_and_symmetry(side: int, unit: int, aspect: float) -> None:
    found = buckets(side * unit, unit, aspect)
    assert list(found) == sorted(set(found))
    assert Bucket(side * unit, side * unit) in found
    for height, width in found:
        assert height % unit == width % unit == 0
        assert height * width <= (side * unit) ** 2
        assert Bucket(width, height) in found


def test_without_aspects_there_are_squares_only() -> None:
    assert buckets(64, 8, 1.0) == (Bucket(64, 64),)


@pytest.mark.parametrize(("resolution", "unit", "aspect"), [(100, 32, 2), (0, 32, 2), (64, 8, 0.5)])
def test_what_makes_no_buckets_is_refused(resolution: int, unit: int, aspect: float) -> None:
    with pytest.raises(ValueError, match=r"unit|max_aspect"):
        buckets(resolution, unit, aspect)


@settings(deadline=None)
@given(SIDES, SIDES)
def test_the_nearest_bucket_has_the_nearest_aspect_and_cuts_least(height: int, width: int) -> None:
    choice = buckets(512, 32, 2.0)
    chosen = nearest(choice, height, width)
    away = [abs(math.log(height / width) - math.log(one.height / one.width)) for one in choice]
    mine = abs(math.log(height / width) - math.log(chosen.height / chosen.width))
    assert mine == pytest.approx(min(away), abs=1e-12)
    assert cropped(chosen, height, width) == pytest.approx(1 - math.exp(-mine))
    assert nearest(choice, width, height) == Bucket(chosen.width, chosen.height)


@settings(deadline=None)
@given(SIDES, SIDES, st.sampled_from(buckets(512, 32, 2.0)))
def test_the_share_that_is_cut_is_what_stands_over_when_scaled_to_cover(
    height: int, width: int, bucket: Bucket
) -> None:
    scale = max(bucket.height / height, bucket.width / width)
    area = height * scale * width * scale
    assert cropped(bucket, height, width) == pytest.approx(
        1 - bucket.height * bucket.width / area, abs=1e-9
    )


def test_of_buckets_that_cut_the_same_the_largest_is_nearest() -> None:
    alike = Bucket(16, 32), Bucket(32, 64), Bucket(8, 16)
    assert nearest(alike, 10, 20) == nearest(alike, 10, 10) == Bucket(32, 64)


def test_half_the_resolution_has_the_image_of_every_bucket_where_the_unit_allows() -> None:
    for one in buckets(1024, 64, 2.0):
        half = at(one, largest=1024, resolution=512, unit=64, patch=32, max_aspect=2.0)
        assert half == Bucket(one.height // 2, one.width // 2)


def test_where_the_unit_cannot_shrink_the_nearest_bucket_in_patches_is_taken() -> None:
    small = buckets(512, 32, 2.0)
    for one in buckets(1024, 32, 2.0):
        there = at(one, largest=1024, resolution=512, unit=32, patch=32, max_aspect=2.0)
        assert there == nearest(small, *one)


@settings(deadline=None)
@given(st.sampled_from(buckets(512, 32, 2.0)), st.sampled_from([16, 32]))
def test_at_its_own_resolution_a_bucket_is_itself(bucket: Bucket, patch: int) -> None:
    assert at(bucket, 512, 512, unit=32, patch=patch, max_aspect=2.0) == bucket


def test_a_patch_larger_than_the_unit_rounds_the_shapes_to_whole_patches() -> None:
    there = at(Bucket(352, 704), 512, 512, unit=32, patch=64, max_aspect=2.0)
    assert there == nearest(buckets(512, 64, 2.0), 352, 704)
    assert there.height % 64 == there.width % 64 == 0


@settings(deadline=None)
@given(st.sampled_from(buckets(1024, 32, 2.0)))
def test_a_name_is_read_back(bucket: Bucket) -> None:
    assert Bucket.named(bucket.name) == bucket
