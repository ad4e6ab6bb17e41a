"""Aspect-ratio buckets: the few shapes that pictures are cropped to, so as to share batches.

With n = resolution / unit, a square has n^2 units, and that is the budget of every bucket. For each
width w (in units) between n / sqrt(max_aspect) and n sqrt(max_aspect) there is a bucket of height
floor(n^2 / w), and its transpose. At 512 px with unit 32 and aspects up to 2 these are

    352x704 384x640 384x672 416x608 448x576 480x544 512x512 and the six upright ones,

of 240 to 256 units each. A picture belongs to the bucket that crops least of it: it is scaled to
cover the bucket and cropped, never stretched. The share lost is 1 - exp(-|log a - log b|), a and b
being height / width of picture and bucket, so the least crop is also the nearest aspect.

Units   heights and widths in pixels; max_aspect is the longer side over the shorter one.
Source  PRX's buckets (github.com/Photoroom/PRX); the choice by |log aspect| is ours.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Self


class Bucket(NamedTuple):
    """A shape of pictures; its name is written as in "512x704", height first."""

    height: int
    width: int

    @property
    def name(self) -> str:
        """Height and width as text."""
        return f"{self.height}x{self.width}"

    @classmethod
    def named(cls, name: str) -> Self:
        """Read a name. Errors: ValueError if it is not one."""
        height, width = name.split("x")
        return cls(int(height), int(width))


@lru_cache
def buckets(resolution: int, unit: int, max_aspect: float) -> tuple[Bucket, ...]:
    """All buckets of a resolution, sorted; the transpose of each is among them.

    All sides are multiples of `unit`: the patch of the model, or a multiple of it for fewer
    buckets. With `max_aspect` 1 there are only squares. Because heights are rounded down to whole
    units, the aspect of the longest bucket may be slightly above `max_aspect`.

    Errors  ValueError if the resolution is not a multiple of unit, or max_aspect is below 1.
    """
    if resolution <= 0 or unit <= 0 or resolution % unit:
        raise ValueError(f"resolution {resolution} is not a multiple of unit {unit}")
    if not max_aspect >= 1:
        raise ValueError(f"max_aspect {max_aspect} is below 1")
    budget = (resolution // unit) ** 2
    found: set[Bucket] = set()
    for width in range(1, budget + 1):
        if width * width <= budget * max_aspect and budget <= width * width * max_aspect:
            height = budget // width
            found |= {Bucket(height * unit, width * unit), Bucket(width * unit, height * unit)}
    return tuple(sorted(found))


def nearest(choice: Sequence[Bucket], height: int, width: int) -> Bucket:
    """The bucket that crops least of a picture; of two that crop the same, the larger."""
    return min(choice, key=lambda one: (cropped(one, height, width), -one.height * one.width))


def cropped(bucket: Bucket, height: int, width: int) -> float:
    """The share of a picture's area that is lost when it is scaled to cover the bucket."""
    tall, wide = height * bucket.width, width * bucket.height
    return 1 - min(tall, wide) / max(tall, wide)


def at(
    bucket: Bucket, largest: int, resolution: int, unit: int, patch: int, max_aspect: float
) -> Bucket:
    """The bucket in which pictures of `bucket` are trained at another resolution.

    `bucket` is one of `buckets(largest, unit, max_aspect)`. If the unit, scaled down with the
    resolution, is still a multiple of the patch, every bucket has an exact counterpart. If not, the
    nearest bucket made of whole patches is taken, and several buckets may merge into one.

    Errors  ValueError if the resolution is not a multiple of patch.
    """
    shrunk, rest = divmod(unit * resolution, largest)
    whole = not rest and shrunk % patch == 0
    return nearest(buckets(resolution, shrunk if whole else patch, max_aspect), *bucket)
