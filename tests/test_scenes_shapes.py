"""Outlines and their coverage, against areas and against the definition."""

import numpy as np
import pytest

from daybreak.data.scenes_captions import SHAPES
from daybreak.data.scenes_shapes import AREA, coverage


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [5.0, 7.3, 14.0])
def test_a_render_covers_the_area_of_its_shape(shape: str, radius: float) -> None:
    m = coverage(shape, 20.3, 19.8, radius, 40, 40)
    assert (m.min(), m.max()) == (0, 1)
    assert m.sum() == pytest.approx(AREA[shape] * radius**2, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_counting_points_by_rows_is_counting_points(shape: str) -> None:
    x, y, radius = 9.37, 8.81, 6.43
    points = (np.arange(8 * 20) + 0.5) / 8 - 0.5
    inside = np.array(
        [[within(shape, (px - x) / radius, (py - y) / radius) for px in points] for py in points]
    )
    expected = inside.reshape(20, 8, 20, 8).mean((1, 3))
    assert np.array_equal(coverage(shape, x, y, radius, 20, 20), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_many_things_are_covered_as_each_of_them(shape: str) -> None:
    x, y, radius = np.array([9.4, 8.8, 12.0]), np.array([8.1, 10.3, 7.9]), np.array([5.0, 6.4, 7.0])
    each = [coverage(shape, *one, 19, 21) for one in zip(x, y, radius, strict=True)]
    assert np.array_equal(coverage(shape, x, y, radius, 19, 21), each)
    sizes = [coverage(shape, 9.4, 8.1, one, 19, 21) for one in radius]
    assert np.array_equal(coverage(shape, 9.4, 8.1, radius, 19, 21), sizes)


def within(shape: str, x: float, y: float) -> bool:
    """The definition of each outline, by half-planes and angles instead of half-widths."""
    if shape == "circle":
        return x * x + y * y < 1
    if shape == "square":
        return max(abs(x), abs(y)) < 0.92
    if shape == "cross":
        return max(abs(x), abs(y)) < 1.05 and min(abs(x), abs(y)) < 0.36
    if shape == "triangle":
        downs = (0.0, 1.0), (np.sqrt(3) / 2, -0.5), (-np.sqrt(3) / 2, -0.5)
        return all(x * a + y * b < 1.15 / 2 for a, b in downs)
    fold = np.pi / 5  # a tenth of the star, mirrored ten times
    angle = abs((np.arctan2(x, -y) + fold) % (2 * fold) - fold)
    p, q = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    inner_p, inner_q = 0.48 * np.cos(fold), 0.48 * np.sin(fold)
    return bool((inner_p - 1.15) * q - inner_q * (p - 1.15) > 0)
