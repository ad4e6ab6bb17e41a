"""A prepared dataset to look at: a summary for the terminal, and one page with its pictures.

Pictures are sampled, and long lists end with the name of the file that holds all entries, so that
the page stays below PAGE_BYTES.

A thumbnail is cropped to the bucket, as training crops the picture. A duplicate that was left out
is shown beside the picture that was kept, if its source is a folder that still exists; if it came
from an archive, only its name is shown.
"""

import html
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from daybreak.data import buckets, census, images
from daybreak.data.prepared import Opened
from daybreak.failure import BadData
from daybreak.web import page as web

PAGE_BYTES = 10_000_000
SHEETS_BYTES, GROUPS_BYTES, REJECTED_BYTES = 6_000_000, 1_500_000, 1_500_000  # parts of the page
PICTURES, PER_SHEET = 256, 16  # at most so many thumbnails, but at least PER_SHEET of each bucket
PER_GROUP, CAPTIONS = 5, 3
SIDE = 192  # pixels along the longer side of a thumbnail: sharp at the 120 px at which it is shown
MARKUP = 300  # upper bound for the bytes of HTML around a thumbnail or a row

T = TypeVar("T")


class Thumbnail(NamedTuple):
    """A picture in the page, or why it cannot be shown."""

    where: str
    captions: tuple[str, ...]
    uri: str = ""
    absent: str = ""

    @property
    def bytes(self) -> int:
        """What it adds to the page."""
        return MARKUP + len(self.uri) + _bytes(self.where, self.absent, *self.captions)


class Sheet(NamedTuple):
    """A sample of one bucket."""

    bucket: buckets.Bucket
    pictures: int
    shown: tuple[Thumbnail, ...]


class Alike(NamedTuple):
    """A picture that was kept, and some of the duplicates that were dropped for it."""

    kind: str
    kept: Thumbnail
    dropped: tuple[tuple[Thumbnail, int], ...]  # with the distance
    more: int

    @property
    def bytes(self) -> int:
        """What it adds to the page."""
        return MARKUP + sum(one.bytes for one in (self.kept, *(one for one, _ in self.dropped)))


def page(written: census.Written, found: census.Census) -> str:
    """The page of a dataset, as text.

    Errors  BadData if a stored picture cannot be decoded.
    """
    rejected: dict[str, list[census.Rejected]] = {}
    for row in _within(REJECTED_BYTES, written.rejected, lambda row: MARKUP + _bytes(*row)):
        rejected.setdefault(row.kind, []).append(row)
    return web.render(
        "dataset.html",
        name=written.opened.folder.resolve().name,
        largest=written.opened.largest,
        census=found,
        sheets=list(_sheets(written.opened)),
        groups=list(_within(GROUPS_BYTES, _groups(written), lambda group: group.bytes)),
        rejected=sorted(rejected.items(), key=lambda pair: -len(pair[1])),
        listed=sum(map(len, rejected.values())),
        several_sources=len({row.source for row in written.rejected}) > 1,
    )


def summary(found: census.Census) -> RenderableType:
    """The dataset at a glance, for a terminal."""
    out = sum(bar.number for bar in found.rejected)
    head = Text(
        f"{found.pictures:,} pictures of {found.read:,} read, {found.captions:,} captions, "
        f"{web.size(found.bytes)}"
    )
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim")
    rows = {
        "sources": _listed(found.sources),
        "licences": _listed(found.licences),
        "sizes in px": _listed(found.sides),
        "words a caption": f"{_listed(found.lengths)}; median {found.median_length}",
        "frequent words": _listed(found.words[:12]),
        "rejected": f"{out:,}: {_listed(found.rejected)}" if out else "none",
        "duplicates": f"groups: {_listed(found.groups)}" if found.groups else "none",
    }
    for name, said in rows.items():
        facts.add_row(name, Text(said))  # as plain text, without markup: users wrote it

    filled = Table("bucket", box=None, pad_edge=False, header_style="dim")
    for name in ("pictures", "full batches", "over", "enlarged"):
        filled.add_column(name, justify="right")
    for one in found.fillings:
        own = one.home == one.bucket
        filled.add_row(
            one.bucket.name,
            f"{one.pictures:,}",
            f"{one.batches:,}" if own else f"joins {one.home.name}",
            f"{one.over:,}" if own else "",
            f"{one.enlarged:,}",
        )
    each = f" ({found.batch // found.world:,} on each of {found.world})" if found.world > 1 else ""
    epoch = Text(
        f"at {found.resolution} px with batches of {found.batch:,}{each}, an epoch is "
        f"{web.steps(found.steps)} steps"
    )
    remarks = [Text(f"note: {remark}", style="yellow") for remark in found.remarks]
    problems = [Text(f"stops training: {problem}", style="red") for problem in found.problems]
    return Group(head, facts, Text(), filled, Text(), epoch, *remarks, *problems)


def _sheets(opened: Opened) -> Iterator[Sheet]:
    """A sample of each bucket, spread evenly over its rows."""
    budget = SHEETS_BYTES // len(opened.buckets)
    most = max(PER_SHEET, PICTURES // len(opened.buckets))
    for number in sorted(range(len(opened.buckets)), key=opened.buckets.__getitem__):
        rows = np.flatnonzero(opened.numbers == number)
        spread = np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int)
        shown = (_thumbnail(opened, place) for place in rows[spread].tolist())
        yield Sheet(
            opened.buckets[number],
            len(rows),
            tuple(_within(budget, shown, lambda one: one.bytes)),
        )


def _groups(written: census.Written) -> Iterator[Alike]:
    """The groups of duplicates, near ones first: they show whether `--near` is well chosen."""
    near = (group for group in written.groups if group.kind == "near")
    exact = (group for group in written.groups if group.kind != "near")
    ordered = list(islice(chain(near, exact), GROUPS_BYTES // MARKUP))  # more do not fit
    wanted = pa.array([group.kept for group in ordered], pa.string())
    names = written.opened.table["id"]
    places = pc.indices_nonzero(pc.is_in(names, wanted))
    at = dict(zip(names.take(places).to_pylist(), places.to_pylist(), strict=True))
    for group in ordered:
        yield Alike(
            group.kind,
            _thumbnail(written.opened, at[group.kept]),
            tuple((_left_out(one), one.distance) for one in group.dropped[:PER_GROUP]),
            max(0, len(group.dropped) - PER_GROUP),
        )


def _thumbnail(opened: Opened, place: int) -> Thumbnail:
    """A stored picture, cropped to its bucket."""
    table, bucket = opened.table, opened.buckets[opened.numbers[place]]
    where = table["where"][place].as_py()
    height, width = _small(*bucket)
    data = table["image"][place]["bytes"].as_py()
    pixels = images.fit(images.decode_to_cover(data, where, height, width), height, width)
    return Thumbnail(where, tuple(table["captions"][place].as_py()[:CAPTIONS]), web.uri(pixels))


def _left_out(one: census.Dropped) -> Thumbnail:
    """A picture that is not in the dataset, read from its source if that is a folder.

    Only files inside the folder are opened: the list may come from someone untrusted.
    """
    folder = Path(one.source)
    path = folder / one.where
    try:
        if not (path.is_file() and path.resolve().is_relative_to(folder.resolve())):
            return Thumbnail(one.where, (), absent=f"in {web.cut(folder.name)}")
        pixels = images.decode(path.read_bytes(), one.where)
    except (BadData, OSError, ValueError):  # ValueError: a name that no file can have
        return Thumbnail(one.where, (), absent="cannot be read any more")
    return Thumbnail(one.where, (), web.uri(images.fit(pixels, *_small(*pixels.shape[:2]))))


def _small(height: int, width: int) -> tuple[int, int]:
    """A shape with SIDE as its longer side."""
    longer = max(height, width)
    return max(1, round(SIDE * height / longer)), max(1, round(SIDE * width / longer))


def _within(budget: int, items: Iterable[T], size: Callable[[T], int]) -> Iterator[T]:
    """The first items whose sizes together stay within the budget."""
    for item in items:
        budget -= size(item)
        if budget < 0:
            return
        yield item


def _bytes(*texts: str) -> int:
    """The bytes that texts take in the page, after cutting and escaping."""
    return sum(len(html.escape(web.cut(text)).encode()) for text in texts)


def _listed(bars: Iterable[census.Bar]) -> str:
    return ", ".join(f"{web.cut(bar.label)} {bar.number:,}" for bar in bars)
