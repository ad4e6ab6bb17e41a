"""Duplicates: the same file twice, or the same picture saved again.

Exact duplicates have the same sha256. Near duplicates are recompressed or rescaled copies: their
64-bit perceptual hashes (which of the 64 lowest cosine coefficients of the grey picture exceed the
median) differ in only a few bits.

That hash ignores colour and small details: of 1,661 emoji, 58 pairs have the same hash, among them
hearts of several colours, and 52 of these pairs are different drawings. So the 16 x 16 thumbnails
of a pair must be alike too: no value may differ by more than 28 of 255. Different emoji differ by
31 or more; of JPEG copies of quality 50 this finds 98 %, of copies of half the size and quality 92
it finds 95 %.

Of pictures that are alike, the one with the longest captions is kept; then the one with most
pixels; then the first. Each of the others is a duplicate of the one kept, never of another
duplicate, so that a chain of small changes cannot join different pictures.

Source  the hash: `phash` of ImageHash, github.com/JohannesBuchner/imagehash; finding pairs: of two
        hashes that differ in n bits, split into n + 1 bands, at least one band is equal.
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
APART = 28  # the most by which a value of two thumbnails may differ
STRIDE = 16  # every 16th value of a thumbnail is compared first


class Looks(NamedTuple):
    """Thumbnails, and a few values of each, which are mostly enough to tell them apart."""

    whole: Look
    few: Look


class Group(NamedTuple):
    """Rows that are alike: the one kept, and each of the others with its distance in bits."""

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

    `ids` are equal for equal files; `order` lists all rows, those to be kept first at the front;
    `near` is the largest distance of near duplicates in bits (0: only exact ones are searched for);
    `look` returns the thumbnail of a row. Memory is about 100 bytes for each row, and 1.5 kB for
    each row of the largest set of hashes that are connected by such distances.
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
    """Add the exact copies of the dropped rows to a near group; take these from `copies`."""
    dropped = list(near.dropped)
    for row, far in near.dropped:
        if row in copies:
            dropped += [(copy, far) for copy, _ in copies.pop(row).dropped]
    return near._replace(dropped=tuple(sorted(dropped)))


def _exact(ids: Hashes, rank: Rows) -> Iterator[Group]:
    """Groups of equal ids, in the order of their kept rows."""
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
    """Groups of rows that look alike, ordered by the rank of their kept rows.

    Rows are visited in order of rank; a row that is in no group yet forms one with all other such
    rows that look like it. Hashes connected by a chain of close pairs are visited together, so that
    only the thumbnails of one chain are held in memory.
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
    """A number for each of `count` places, equal for places connected by a chain of neighbours."""
    ends = np.array([(one, other) for one, near_by in neighbours.items() for other in near_by])
    ends = ends.reshape(-1, 2).astype(np.int64)
    pairs = scipy.sparse.coo_array((np.ones(len(ends), bool), tuple(ends.T)), (count, count))
    found: Rows = scipy.sparse.csgraph.connected_components(pairs, directed=False)[1]
    return found


def _alike(looks: Looks, left: Rows, own: Look) -> Rows:
    """Those of the thumbnails `left` in which no value differs by more than APART from `own`."""
    few = np.abs(looks.few[left] - own[::STRIDE]) <= APART
    left = left[few.all(1)]
    return left[(np.abs(looks.whole[left] - own) <= APART).all(1)] if len(left) else left


def _close(values: Hashes, near: int) -> Iterator[tuple[int, int]]:
    """Pairs of places in an array of distinct hashes that differ in at most `near` bits."""
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
