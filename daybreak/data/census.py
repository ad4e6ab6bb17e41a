"""A prepared dataset in numbers: what is in it, what was left out and why, how it fills batches.

Everything is counted from the columns beside the pictures, the manifest and the two lists that
`prepare` wrote. No picture is decoded, and memory does not grow with the number of pictures or of
rejected inputs: the lists are read again each time, and rare words are dropped. A problem is a
failure that would end training, reported before the first step. A remark is something that makes
training worse than necessary.

Source  the folder that daybreak/data/prepare.py writes.
"""

import json
import math
from bisect import bisect, bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow.compute as pc

from daybreak.data import buckets, disk, plan
from daybreak.data.prepared import Opened, open_dataset
from daybreak.failure import BadData, BadRecipe, Failure

COLUMNS = ("bucket", "height", "width", "captions", "source", "where", "licence")
ROWS = 16_384  # read at a time
FREQUENT, BARS = 40, 30  # words, and other names, that are listed
WORDS_HELD = 2**18  # if there are more, the most frequent ones are kept, half this number
NAMED_AT_MOST = 5
UNSTATED = "not stated"

SIDES = tuple(side * 2**power for power in range(3, 13) for side in (2, 3))  # 16, 24, 32, ... 12288
WORDS = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257)

# Function words, which do not say what is in a picture.
SMALL_WORDS = frozenset({
    "a", "an", "and", "are", "as", "at", "by", "for", "from", "has", "in", "into", "is", "it",
    "its", "of", "on", "or", "that", "the", "their", "there", "this", "to", "was", "which", "while",
    "with",
})  # fmt: skip

# A character of a script without spaces between words; each is counted as a word.
UNSPACED = r"([\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\pM*)"

T = TypeVar("T")


class Bar(NamedTuple):
    """One bar of a histogram."""

    label: str
    number: int


class Filling(NamedTuple):
    """How the pictures of one bucket fill batches in one pass through them.

    A bucket that joins another has no batches of its own: they are counted for the other.
    """

    bucket: buckets.Bucket
    home: buckets.Bucket  # the bucket its pictures are trained in, mostly itself
    pictures: int
    batches: int  # full ones
    over: int  # pictures left over for the first batch of the next pass
    enlarged: int  # pictures stored smaller than the size they are trained at


class Rejected(NamedTuple):
    """An input that was left out, and why."""

    source: str
    where: str
    kind: str
    reason: str


class Dropped(NamedTuple):
    """A picture left out because it is like another; `distance` in bits of the perceptual hash."""

    source: str
    where: str
    distance: int


class Group(NamedTuple):
    """Pictures that are alike: the id of the one that was kept, and the dropped ones."""

    kind: str  # "exact" or "near"
    kept: str
    dropped: tuple[Dropped, ...]


class Lines(Generic[T]):
    """A list on disk, which is read again for each iteration and never held in memory."""

    def __init__(self, path: Path, made: Callable[[dict[str, Any]], T]) -> None:
        self.path, self.made = path, made

    def __iter__(self) -> Iterator[T]:
        with self.path.open(encoding="utf-8") as file:
            yield from map(self.made, map(json.loads, file))


class Written(NamedTuple):
    """All that `prepare` wrote: the dataset as training opens it, and what it left out."""

    opened: Opened
    manifest: dict[str, Any]
    rejected: Iterable[Rejected]
    groups: Iterable[Group]


class Tally(NamedTuple):
    """What is counted row by row."""

    shapes: Counter[tuple[str, int, int]]  # bucket, height, width
    lengths: Counter[int]  # words of a caption
    words: Counter[str]
    sources: Counter[str]
    licences: Counter[str]
    bare: list[str]  # pictures with an empty caption


class Census(NamedTuple):
    """The numbers of a prepared dataset, at one resolution, global batch and world size."""

    pictures: int
    captions: int
    read: int
    bytes: int
    resolution: int
    batch: int
    world: int
    fillings: tuple[Filling, ...]
    sides: tuple[Bar, ...]  # of the square with the area of the picture, in pixels
    lengths: tuple[Bar, ...]  # words of a caption
    median_length: int
    words: tuple[Bar, ...]
    sources: tuple[Bar, ...]
    licences: tuple[Bar, ...]
    rejected: tuple[Bar, ...]
    groups: tuple[Bar, ...]
    problems: tuple[Failure, ...]
    remarks: tuple[str, ...]

    @property
    def steps(self) -> float:
        """Average batches per epoch; pictures left over go into the next epoch."""
        return self.pictures / self.batch


def read(folder: Path, progress: Callable[[int, int], None] | None = None) -> Written:
    """Open a prepared dataset, and compare every file of it with the manifest.

    `progress` is called with the bytes compared so far and the bytes in all.

    Errors  BadData, as in training, or for a file with another sha256.
    """
    opened = open_dataset(folder)
    manifest = disk.read_json(folder / "manifest.json")
    disk.compare(folder, manifest["files"], progress)
    return Written(
        opened,
        manifest,
        Lines(folder / "rejected.jsonl", _rejected),
        Lines(folder / "duplicates.jsonl", _group),
    )


def _rejected(row: dict[str, Any]) -> Rejected:
    return Rejected(*(row[name] for name in Rejected._fields))


def _group(row: dict[str, Any]) -> Group:
    dropped = (Dropped(*(one[name] for name in Dropped._fields)) for one in row["dropped"])
    return Group(row["kind"], row["kept"], tuple(dropped))


def tally(table: Any) -> Tally:
    """Count the columns beside the pictures in an Arrow table; the pictures are never read."""
    shapes, lengths = Counter[tuple[str, int, int]](), Counter[int]()
    words, sources, licences = Counter[str](), Counter[str](), Counter[str]()
    bare: list[str] = []
    for rows in pieces(table, COLUMNS):
        grouped = rows.group_by(["bucket", "height", "width"]).aggregate([([], "count_all")])
        for row in grouped.to_pylist():
            shapes[row["bucket"], row["height"], row["width"]] += row["count_all"]
        sources.update(_values(rows["source"]))
        licences.update(_values(rows["licence"]))

        captions = pc.list_flatten(rows["captions"])
        apart = pc.replace_substring_regex(pc.utf8_lower(captions), UNSPACED, r" \1 ")
        spoken = pc.split_pattern_regex(apart, r"[^\pL\pM\pN']+")
        owner, word = pc.list_parent_indices(spoken), pc.list_flatten(spoken)
        real = pc.not_equal(word, "")
        words.update(_values(pc.filter(word, real)))
        if len(words) > WORDS_HELD:
            words = Counter(dict(words.most_common(WORDS_HELD // 2)))
        per_caption = np.bincount(pc.filter(owner, real).to_numpy(), minlength=len(captions))
        lengths.update(per_caption.tolist())
        bare += _bare(rows)
    return Tally(shapes, lengths, words, sources, licences, bare)


def pieces(table: Any, columns: Sequence[str]) -> Iterator[Any]:
    """The columns of a table, ROWS rows at a time, so that counting takes little memory."""
    for first in range(0, len(table), ROWS):
        yield table.select(columns).slice(first, ROWS).combine_chunks()


def _values(column: Any) -> dict[str, int]:
    return {row["values"]: row["counts"] for row in pc.value_counts(column).to_pylist()}


def _bare(rows: Any) -> list[str]:
    """The pictures that have an empty caption."""
    captions = rows["captions"]
    blank = pc.equal(pc.utf8_trim_whitespace(pc.list_flatten(captions)), "")
    places = pc.unique(pc.filter(pc.list_parent_indices(captions), blank))
    return rows["where"].take(places).to_pylist()


def count(written: Written, batch: int, world: int = 1, resolution: int | None = None) -> Census:
    """Count a dataset, for global batches of `batch` pictures shared by `world` processes.

    `resolution` is that of a stage; by default the largest the dataset was prepared for. The patch
    is assumed to be the unit of the dataset.

    Errors  BadRecipe if the resolution or the batch is impossible.
    """
    opened, manifest = written.opened, written.manifest
    side = resolution or opened.largest
    opened.check(side)
    if batch % world:
        raise BadRecipe(f"--batch {batch} is not divisible by --world {world}: change one of them")
    found = tally(opened.table)
    fillings = fill(found.shapes, batch, _places(opened, side))
    return Census(
        pictures=len(opened.table),
        captions=found.lengths.total(),
        read=int(manifest["counts"]["read"]),
        bytes=sum(file["bytes"] for file in manifest["files"].values()),
        resolution=side,
        batch=batch,
        world=world,
        fillings=fillings,
        sides=_sides(found.shapes),
        lengths=histogram(found.lengths, WORDS),
        median_length=_median(found.lengths),
        words=_frequent(found.words),
        sources=_bars(found.sources),
        licences=_bars(found.licences),
        rejected=_bars(Counter(row.kind for row in written.rejected)),
        groups=_bars(Counter(group.kind for group in written.groups)),
        problems=tuple(_problems(opened, found, batch)),
        remarks=tuple(_remarks(fillings, batch, manifest["counts"]["captions_lost"])),
    )


def fill(
    shapes: Counter[tuple[str, int, int]], batch: int, places: dict[str, buckets.Bucket]
) -> tuple[Filling, ...]:
    """How the pictures fill batches; `places` maps each stored bucket to its bucket in training."""
    pictures, enlarged, gathered = (Counter[buckets.Bucket]() for _ in range(3))
    for (name, _, _), number in shapes.items():
        pictures[places[name]] += number
    homes = plan.settle(pictures, batch)
    for (name, height, width), number in shapes.items():
        place, home = places[name], homes[places[name]]
        gathered[home] += number
        enlarged[place] += number * (height < home.height or width < home.width)
    fillings = []
    for place, home in sorted(homes.items()):
        batches, over = divmod(gathered[place], batch) if home == place else (0, 0)
        fillings.append(Filling(place, home, pictures[place], batches, over, enlarged[place]))
    return tuple(fillings)


def histogram(values: Counter[int], starts: tuple[int, ...]) -> tuple[Bar, ...]:
    """Count values in bins, each from one of `starts` to the next; empty end bins are left out.

    Values below the first start have a bin of their own, as have values from the last start on.
    """
    bins = Counter[int]()
    for value, number in values.items():
        bins[bisect(starts, value)] += number
    inner = [f"{start}–{end - 1}".removesuffix(f"–{start}") for start, end in pairwise(starts)]
    labels = [f"under {starts[0]}", *inner, f"{starts[-1]} and more"]
    filled = range(min(bins), max(bins) + 1) if bins else ()
    return tuple(Bar(labels[place], bins[place]) for place in filled)


def _places(opened: Opened, side: int) -> dict[str, buckets.Bucket]:
    """The bucket at a resolution for each bucket of the dataset."""
    if side % opened.unit:
        raise BadRecipe(
            f"--resolution {side} is not a multiple of {opened.unit}, the dataset's unit"
        )
    shape = opened.largest, side, opened.unit, opened.unit, opened.max_aspect
    return {bucket.name: buckets.at(bucket, *shape) for bucket in opened.buckets}


def _problems(opened: Opened, found: Tally, batch: int) -> Iterator[Failure]:
    """Reasons why training on this dataset would fail, or learn nothing."""
    if found.bare:
        yield BadData(
            f"{opened.folder}: {_named(found.bare)} {'has' if len(found.bare) == 1 else 'have'} an "
            "empty caption; correct the captions, and prepare the dataset again"
        )
    if len(opened.table) < batch:
        yield BadRecipe(
            f"{opened.folder} holds {len(opened.table):,} pictures and a batch takes {batch:,}: "
            "take a smaller --batch, or prepare more pictures"
        )


def _remarks(fillings: tuple[Filling, ...], batch: int, lost: int) -> Iterator[str]:
    """Ways in which training may differ from what one expects."""
    for one in fillings:
        if one.home != one.bucket:
            cut = buckets.cropped(one.home, *one.bucket)
            yield (
                f"{one.bucket.name} has fewer pictures ({one.pictures:,}) than a batch: they are "
                f"trained in {one.home.name}, which cuts {cut:.0%} off each"
            )
        elif not one.batches:
            yield (
                f"{one.bucket.name} has fewer pictures ({one.over:,}) than a batch and no bucket "
                f"near it: a batch of it comes every {batch / one.over:.1f} epochs, and shows a "
                "picture more than once"
            )
    enlarged = sum(filling.enlarged for filling in fillings)
    if enlarged:
        yield f"{enlarged:,} pictures are stored smaller than they are trained, and are enlarged"
    if lost:
        yield f"{lost:,} captions could not be used; their pictures have others"


def _named(names: list[str]) -> str:
    more = f" and {len(names) - NAMED_AT_MOST:,} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more


def _bars(counts: Counter[str]) -> tuple[Bar, ...]:
    """Bars, most frequent first; an empty name is `not stated`, rare names share one bar."""
    ordered = [Bar(name or UNSTATED, number) for name, number in _ordered(counts)]
    rest = sum(bar.number for bar in ordered[BARS:])
    return (*ordered[:BARS], *([Bar(f"{len(ordered) - BARS:,} others", rest)] if rest else []))


def _frequent(words: Counter[str]) -> tuple[Bar, ...]:
    said = Counter({word: number for word, number in words.items() if word not in SMALL_WORDS})
    return tuple(Bar(*pair) for pair in _ordered(said)[:FREQUENT])


def _ordered(counts: Counter[str]) -> list[tuple[str, int]]:
    """Sorted by descending number, then by name: the same on every machine."""
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def _sides(shapes: Counter[tuple[str, int, int]]) -> tuple[Bar, ...]:
    sides = Counter[int]()
    for (_, height, width), number in shapes.items():
        sides[math.isqrt(height * width)] += number
    return histogram(sides, SIDES)


def _median(values: Counter[int]) -> int:
    ordered = sorted(values)
    passed = list(accumulate(values[value] for value in ordered))
    return ordered[bisect_left(passed, passed[-1] / 2)] if ordered else 0
