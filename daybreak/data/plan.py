"""The batch plan: which pictures make which batch, as a function of (seed, epoch).

Every batch has one shape, that of its bucket. The pictures of a bucket form an endless sequence,
pass after pass, each pass shuffled again; batch j of the bucket is the slice [j b, (j + 1) b). So
pictures left over at the end of a pass go into the first batch of the next: nothing is left out,
nothing is padded, and after any epoch the pictures of a bucket have been seen equally often, to
within one. Epoch e consists of the batches that end in pass e, in an order of its own.

    samples of a bucket before pass e   s(e) = sum over datasets of floor(e x),   x = rate * count
    batches before epoch e              sum over buckets of floor(s(e) / b)

So batch k can be found without computing those before it. Nothing here depends on processes or
loader workers: each process takes its slice of the batch.

Small buckets   A bucket with fewer pictures than a batch joins the nearest one (smallest buckets
                first), if none of its pictures loses more than a quarter of its area. Without such
                a neighbour it stays alone: it has a batch only once in a few epochs, which holds
                the same picture more than once.
Mixing          `rate` is the number of passes through a dataset in an epoch: 1 if there is only
                one. An epoch of several datasets is as long as all of them together, each has a
                share of it by its weight, and the rate of a dataset is the same in every bucket.

Letters  b pictures of a batch, n pictures of a bucket.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from daybreak.data.buckets import Bucket, cropped, nearest
from daybreak.train import dice

Rows = npt.NDArray[np.int64]
MOST_CUT = 0.25  # share of a picture's area that may be cut when its bucket joins another


class Slot(NamedTuple):
    """One place in a batch: the global index of its sample, the picture's row, and its shape.

    All dice of a sample are keyed by that index.
    """

    sample: int
    row: int
    height: int
    width: int


class Planned(NamedTuple):
    """A global batch: its bucket, and the rows of its pictures (b,)."""

    bucket: Bucket
    rows: Rows


class Shelf(NamedTuple):
    """All pictures of one bucket: their rows (n,) in each dataset, and each dataset's rate."""

    bucket: Bucket
    rows: tuple[Rows, ...]
    rates: tuple[float, ...]

    def before(self, turn: int) -> int:
        """Number of samples of the endless sequence before a pass."""
        return sum(
            _due(turn, rate, len(rows)) for rows, rate in zip(self.rows, self.rates, strict=True)
        )


class Plan:
    """Endless global batches; `plan[k]` is batch k.

    In `shelves`, small buckets have already joined others (`settle`).
    """

    def __init__(self, shelves: Sequence[Shelf], batch: int, seed: int) -> None:
        self.shelves, self.batch, self.seed = tuple(shelves), batch, seed
        self.kept: tuple[int, list[Planned]] = (-1, [])

    def before(self, epoch: int) -> int:
        """Number of batches before an epoch."""
        return sum(shelf.before(epoch) // self.batch for shelf in self.shelves)

    def locate(self, number: int) -> tuple[int, int]:
        """The epoch of a batch, and its place there."""
        # By rounding, the count before an epoch is short by at most one batch for each bucket and
        # one sample for each dataset in it. So this bound lies beyond the epoch, and bisection
        # needs only a few dozen sums.
        lost = sum(1 + len(shelf.rows) for shelf in self.shelves)
        size = sum(
            rate * len(rows)
            for shelf in self.shelves
            for rows, rate in zip(shelf.rows, shelf.rates, strict=True)
        )
        bound = math.ceil((number + lost + 1) * self.batch / size) + 1
        epoch = bisect.bisect_right(range(bound + 1), number, key=self.before) - 1
        return epoch, number - self.before(epoch)

    def epoch(self, number: int) -> list[Planned]:
        """All batches of an epoch, in order."""
        planned = [
            Planned(shelf.bucket, rows)
            for shelf in self.shelves
            for rows in _slices(self.seed, shelf, number, self.batch)
        ]
        return [planned[place] for place in shuffle(len(planned), self.seed, "batches", number)]

    def __getitem__(self, number: int) -> Planned:
        epoch, place = self.locate(number)
        if self.kept[0] != epoch:
            self.kept = (epoch, self.epoch(epoch))
        return self.kept[1][place]


def settle(pictures: Mapping[Bucket, float], batch: int) -> dict[Bucket, Bucket]:
    """The bucket in which each bucket's pictures are trained, given the number of pictures."""
    held = dict(sorted(pictures.items()))
    home = {bucket: bucket for bucket in held}
    alone: set[Bucket] = set()
    while small := [one for one in held if held[one] < batch and one not in alone]:
        least = min(small, key=lambda one: (held[one], one))
        others = [one for one in held if one != least]
        members = [one for one in home if home[one] == least]
        to = nearest(others, *least) if others else None
        if to is None or max(cropped(to, *one) for one in members) > MOST_CUT:
            alone.add(least)
        else:
            held[to] += held.pop(least)
            home |= dict.fromkeys(members, to)
    return home


def rates(counts: Sequence[int], weights: Sequence[float]) -> tuple[float, ...]:
    """Passes through each dataset per epoch, so that samples are shared in ratio of `weights`."""
    return tuple(
        sum(counts) * weight / (sum(weights) * count)
        for count, weight in zip(counts, weights, strict=True)
    )


def _slices(seed: int, shelf: Shelf, epoch: int, batch: int) -> list[Rows]:
    """The batches of a bucket that end in this pass; the first may begin in an earlier one."""
    first, last = shelf.before(epoch) // batch, shelf.before(epoch + 1) // batch
    if first == last:
        return []
    turn = epoch
    while shelf.before(turn) > first * batch:
        turn -= 1
    sequence = np.concatenate([_pass(seed, shelf, one) for one in range(turn, epoch + 1)])
    skipped = first * batch - shelf.before(turn)
    rows = sequence[skipped : skipped + (last - first) * batch]
    return list(rows.reshape(last - first, batch))


def _pass(seed: int, shelf: Shelf, turn: int) -> Rows:
    """One pass through a bucket: the samples due from each dataset, mixed."""
    drawn = []
    for dataset, (rows, rate) in enumerate(zip(shelf.rows, shelf.rates, strict=True)):
        start, stop = _due(turn, rate, len(rows)), _due(turn + 1, rate, len(rows))
        rounds = range(start // len(rows), -(-stop // len(rows)))
        orders = [
            shuffle(len(rows), seed, "rows", shelf.bucket.name, dataset, one) for one in rounds
        ]
        skipped = start - rounds.start * len(rows)
        order = np.concatenate(orders)[skipped : skipped + stop - start] if orders else rows[:0]
        drawn.append(rows[order])
    if len(drawn) == 1:
        return drawn[0]
    mixed = np.concatenate(drawn)
    return mixed[shuffle(len(mixed), seed, "mix", shelf.bucket.name, turn)]


def _due(turn: int, rate: float, count: int) -> int:
    """Samples taken before a pass, from the `count` pictures of one dataset in one bucket."""
    return math.floor(turn * rate * count)


def shuffle(count: int, *key: int | str) -> Rows:
    """A permutation of 0 .. count - 1 that depends on the key alone."""
    return np.random.Generator(np.random.Philox(dice.key(*key))).permutation(count)
