"""Duplicates: the same file twice, or the same picture saved another time.

Exact duplicates share the sha256 of their bytes. Near duplicates are what recompressing and
rescaling leave: their 64-bit perceptual hashes (which of the 64 lowest cosine coefficients of the
grey picture exceed the median) differ in a few bits.

That hash is blind to colour and to what is small: of 1,661 emoji 58 pairs share it, among them
hearts of several colours, and 52 of these pairs are different drawings. So a pair must also look
alike in a thumbnail of 16 x 16, where no value may differ by more than 28 of 255. Different emoji
begin at 31; of their JPEG copies of quality 50 this finds 98 %, of those of half the size and
quality 92 it finds 95 %.

Of what is alike the picture with the richest captions is kept: most characters, then most pixels,
then first come. Each of the others is a duplicate of the one kept, never of another duplicate, so
that a chain of small changes does not swallow different pictures.

Source  the hash: `phash` of ImageHash, github.com/JohannesBuchner/imagehash; finding pairs:
        split into n + 1 bands, two hashes that differ in n bits agree in one of them.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.fft
import scipy.sparse.csgraph
from PIL import Image

Picture = npt.NDArray[np.uint8]
Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
Look = npt.NDArray[np.int16]  # a thumbnail, or several

BITS = 64
SIDE = 16  # of a thumbnail
APART = 28  # the most that a value of two thumbnails may differ
STRIDE = 16  # one in so many values of a thumbnail is compared first


class Looks(NamedTuple):
    """Thumbnails, and a few values of each, which mostly tell them apart."""

    whole: Look
    few: Look


class Group(NamedTuple):
    """Rows that are alike: the one that is kept, and each other with its distance in bits."""

    kind: Literal["exact", "near"]
    kept: int
    dropped: tuple[tuple[int, int], ...]


def perceptual_hash(picture: Picture) -> int:
    """64 bits as a signed integer, alike for pictures that look alike."""
    grey = Image.fromarray(picture).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    low = np.rint(scipy.fft.dctn(np.asarray(grey, dtype=np.float64))[:8, :8])
    return int(np.packbits(low > np.median(low)).view(">i8")[0])


def thumbnail(picture: Picture) -> Look:
    """The picture as 16 x 16 means, in one row."""
    small = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.int16).ravel()


def find(
    ids: Hashes,
    hashes: Hashes,
    order: Rows,
    near: int,
    look: Callable[[int], Look],
) -> list[Group]:
    """The groups of rows that are alike.

    `ids` are equal for equal files, `order` lists all rows from the first to be kept to the last,
    `near` is the largest distance of a near duplicate (0: only exact ones are looked for), and
    `look` gives the thumbnail of a row. Memory is about 100 bytes a row, and 1.5 kB for each row of
    the largest set of hashes that hang together by such distances.
    """
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    exact = list(_exact(ids, rank))
    if not near:
        return exact
    gone = np.zeros(len(ids), bool)
    gone[[row for group in exact for row, _ in group.dropped]] = True
    copies = {group.kept: group for group in exact}
    alike = [
        _with_copies(group, copies)
        for group in _near(hashes, np.flatnonzero(~gone), rank, near, look)
    ]
    return [*copies.values(), *alike]


def _with_copies(near: Group, copies: dict[int, Group]) -> Group:
    """A near group with the exact copies of what it drops, whose own groups are at an end."""
    dropped = list(near.dropped)
    for row, far in near.dropped:
        if row in copies:
            dropped += [(copy, far) for copy, _ in copies.pop(row).dropped]
    return near._replace(dropped=tuple(sorted(dropped)))


def _exact(ids: Hashes, rank: Rows) -> Iterator[Group]:
    """Groups of equal ids, in the order of the rows that are kept."""
    by_id = np.lexsort((rank, ids))
    starts = np.flatnonzero(np.r_[True, ids[by_id][1:] != ids[by_id][:-1]])
    groups = [by_id[a:b].tolist() for a, b in pairwise([*starts.tolist(), len(ids)]) if b - a > 1]
    for kept, *others in sorted(groups):
        yield Group("exact", kept, tuple((row, 0) for row in sorted(others)))


def _near(
    hashes: Hashes,
    rows: Rows,
    rank: Rows,
    near: int,
    look: Callable[[int], Look],
) -> Iterator[Group]:
    """Groups of rows that look alike, in the order in which their kept rows rank.

    Rows are visited from the best to the last, and each that is in no group yet takes all such rows
    that look like it. Hashes that a chain of close pairs joins are visited together, so that no
    more than the thumbnails of one chain are held.
    """
    values, belongs = np.unique(hashes[rows], return_inverse=True)
    neighbours: dict[int, list[int]] = {}
    for one, other in _close(values, near):
        neighbours.setdefault(one, []).append(other)
        neighbours.setdefault(other, []).append(one)
    sizes = np.bincount(belongs, minlength=len(values))
    starts, by_value = np.r_[0, np.cumsum(sizes)], rows[np.argsort(belongs, kind="stable")]
    bundle = _bundles(neighbours, len(values))
    together = np.flatnonzero((np.bincount(bundle, sizes)[bundle] > 1)[belongs])
    ordered = together[np.lexsort((rank[rows[together]], bundle[belongs[together]]))]

    def of(value: int) -> Rows:
        return by_value[starts[value] : starts[value + 1]]

    taken, held = np.zeros(len(hashes), bool), -1
    looks: dict[int, Looks] = {}
    groups = []
    for row, value in zip(rows[ordered].tolist(), belongs[ordered].tolist(), strict=True):
        if bundle[value] != held:
            held = bundle[value]
            looks.clear()
        if taken[row]:
            continue
        taken[row] = True
        alike = list[int]()
        for near_by in (value, *neighbours.get(value, ())):
            left = np.flatnonzero(~taken[of(near_by)])
            if not len(left):
                continue
            for one in {value, near_by} - looks.keys():
                whole = np.stack([look(other) for other in of(one).tolist()])
                looks[one] = Looks(whole, whole[:, ::STRIDE].copy())
            own = looks[value].whole[np.searchsorted(of(value), row)]
            alike += of(near_by)[_alike(looks[near_by], left, own)].tolist()
        taken[alike] = True
        if alike:
            distances = np.bitwise_count(hashes[alike] ^ hashes[row]).tolist()
            dropped = sorted(zip(alike, distances, strict=True))
            groups.append(Group("near", row, tuple(dropped)))
    yield from sorted(groups, key=lambda group: int(rank[group.kept]))


def _bundles(neighbours: dict[int, list[int]], count: int) -> Rows:
    """A number for each of `count` places, the same for those that a chain of neighbours joins."""
    ends = np.array([(one, other) for one, near_by in neighbours.items() for other in near_by])
    ends = ends.reshape(-1, 2).astype(np.int64)
    pairs = scipy.sparse.coo_array((np.ones(len(ends), bool), tuple(ends.T)), (count, count))
    found: Rows = scipy.sparse.csgraph.connected_components(pairs, directed=False)[1]
    return found


def _alike(looks: Looks, left: Rows, own: Look) -> Rows:
    """Which of the thumbnails that are left differ nowhere by more than APART from one's own."""
    few = np.abs(looks.few[left] - own[::STRIDE]) <= APART
    left = left[few.all(1)]
    return left[(np.abs(looks.whole[left] - own) <= APART).all(1)] if len(left) else left


def _close(values: Hashes, near: int) -> Iterator[tuple[int, int]]:
    """Pairs of places in an array of different hashes that differ in at most `near` bits."""
    seen = set[tuple[int, int]]()
    edges = np.linspace(0, BITS, near + 2).astype(np.uint64)
    for low, high in pairwise(edges):
        band = (values >> low) & ((np.uint64(1) << (high - low)) - np.uint64(1))
        by_band = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.r_[True, band[by_band][1:] != band[by_band][:-1]]).tolist()
        for start, end in pairwise([*starts, len(values)]):
            run = by_band[start:end]
            for place in range(len(run) - 1):
                distance = np.bitwise_count(values[run[place + 1 :]] ^ values[run[place]])
                for other in run[place + 1 :][distance <= near].tolist():
                    pair = min(int(run[place]), other), max(int(run[place]), other)
                    if pair not in seen:
                        seen.add(pair)
                        yield pair
