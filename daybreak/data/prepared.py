"""Reading what `daybreak prepare` has written: from a slot of the plan to a picture and a caption.

A dataset is Arrow on disk, mapped into memory and never copied: loader workers share its pages,
and opening millions of pictures takes as long as reading one column. A stored picture is decoded
no larger than necessary, scaled to cover its bucket at the resolution of the stage, and cropped;
dice choose the position of the crop and one of the captions.

`prepare` has decoded every picture once, so one that cannot be read now points to a faulty disk. It
is replaced by another (of its bucket, if one can be read), the same on every machine, and the
sample says so.

Shapes  picture (height, width, 3) of the slot.     Units  uint8, sRGB.
Errors  BadData for a folder that is no prepared dataset, or not the one its manifest describes.
"""

import errno
import itertools
import json
import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from daybreak.data import images
from daybreak.data.buckets import Bucket, at
from daybreak.data.plan import Plan, Rows, Shelf, Slot, rates, settle
from daybreak.failure import BadData, BadRecipe
from daybreak.train import dice

SCHEMA = 1
NEEDED = ("id", "image", "bucket", "captions", "caption_weights", "where")
SUBSTITUTES = 8  # pictures tried before giving up on a sample

Picture = npt.NDArray[np.uint8]


class Sample(NamedTuple):
    """A picture with its caption; `complaint` says why it is not the one that was planned."""

    picture: Picture
    caption: str
    complaint: str = ""


def one_by_one(sample: Callable[[Slot], Sample], slots: Sequence[Slot]) -> list[Sample | BadData]:
    """Read the slots one by one; a failure takes the place of its sample."""
    had: list[Sample | BadData] = []
    for slot in slots:
        try:
            had.append(sample(slot))
        except BadData as failure:
            had.append(failure)
    return had


class Opened(NamedTuple):
    """A dataset on disk: its table, and for each row the number of its bucket in `buckets`.

    Training reads one row at a time, from `columns`: a column newly taken from the table searches
    all its chunks before it returns the first value.
    """

    folder: Path
    table: pa.Table
    columns: Mapping[str, Any]
    buckets: tuple[Bucket, ...]
    numbers: npt.NDArray[np.int32]
    largest: int  # `largest` to `max_aspect`: the settings it was prepared with
    unit: int
    max_aspect: float
    files: dict[str, str]  # sha256 of each shard, as the manifest has it

    def check(self, resolution: int) -> None:
        """Refuse a resolution above the one it was prepared for. Errors: BadRecipe."""
        if resolution > self.largest:
            raise BadRecipe(
                f"{self.folder} was prepared for at most {self.largest} px and a stage asks for "
                f"{resolution}: prepare it again with --resolution {resolution}"
            )


class Prepared:
    """Captioned pictures from one prepared dataset, or from several in shares by weight.

    Row numbers run through all datasets. `patch` is the model's; all sides are multiples of it.
    """

    def __init__(self, folders: Sequence[tuple[str, float]], seed: int, patch: int) -> None:
        self.folders, self.seed, self.patch = tuple(folders), seed, patch
        self.datasets = [open_dataset(Path(folder)) for folder, _ in folders]
        counts = [len(one.numbers) for one in self.datasets]
        self.starts = [0, *itertools.accumulate(counts)]
        self.rates = rates(counts, [weight for _, weight in folders])

    def __reduce__(self) -> tuple[type["Prepared"], tuple[object, ...]]:
        """Pickle the arguments only: a worker that is not forked opens the files itself."""
        return Prepared, (self.folders, self.seed, self.patch)

    @property
    def files(self) -> dict[str, str]:
        """The sha256 of every shard, as the manifests have them."""
        return {
            f"{one.folder}/{name}": digest
            for one in self.datasets
            for name, digest in one.files.items()
        }

    def plan(self, resolution: int, batch: int, first: int) -> Callable[[int], list[Slot]]:
        """Return the function that lists the slots of each batch of a stage.

        `first` is the global index of the stage's first sample.

        Errors  BadRecipe for a resolution above the prepared one, or a batch larger than the
                number of pictures.
        """
        plan = Plan(self._shelves(resolution, batch), batch, dice.key(self.seed, "stage", first))

        def slots(number: int) -> list[Slot]:
            bucket, rows = plan[number]
            start = first + number * batch
            return [Slot(start + place, int(row), *bucket) for place, row in enumerate(rows)]

        return slots

    def samples(self, slots: Sequence[Slot]) -> list[Sample | BadData]:
        """Read the sample of each slot; a failure takes the place of its sample."""
        return one_by_one(self.sample, slots)

    def sample(self, slot: Slot) -> Sample:
        """Read the picture of a slot, or its first substitute that can be read."""
        row, complaint = slot.row, ""
        for attempt in range(SUBSTITUTES):
            try:
                picture, caption = self._read(row, slot)
            except BadData as error:
                complaint = complaint or str(error)
                row = self._substitute(slot, attempt)
            else:
                return Sample(picture, caption, complaint)
        raise BadData(f"{complaint} Its {SUBSTITUTES - 1} substitutes cannot be read either.")

    def captions(self) -> Iterator[str]:
        """Yield every caption of every picture."""
        for one in self.datasets:
            for chunk in one.columns["captions"].chunks:
                yield from chunk.flatten().to_pylist()

    def _shelves(self, resolution: int, batch: int) -> list[Shelf]:
        """Group all rows by the bucket in which they are trained."""
        count = self.starts[-1]
        if count < batch:
            names = " and ".join(folder for folder, _ in self.folders)
            raise BadRecipe(
                f"{names} holds {count} pictures and a batch takes {batch}: set stage.batch "
                f"to {count} or less, or prepare more pictures"
            )
        pieces = [
            (bucket, dataset, rows)
            for dataset in range(len(self.datasets))
            for bucket, rows in self._by_bucket(dataset, resolution)
        ]
        due: dict[Bucket, float] = defaultdict(float)
        for bucket, dataset, rows in pieces:
            due[bucket] += self.rates[dataset] * len(rows)
        home = settle(due, batch)
        joined: dict[Bucket, dict[int, list[Rows]]] = {}
        for bucket, dataset, rows in pieces:
            joined.setdefault(home[bucket], {}).setdefault(dataset, []).append(rows)
        return [
            Shelf(
                bucket,
                tuple(np.sort(np.concatenate(parts[dataset])) for dataset in sorted(parts)),
                tuple(self.rates[dataset] for dataset in sorted(parts)),
            )
            for bucket, parts in sorted(joined.items())
        ]

    def _by_bucket(self, dataset: int, resolution: int) -> Iterator[tuple[Bucket, Rows]]:
        """Yield the rows of each bucket of a dataset, with the bucket for this resolution."""
        one = self.datasets[dataset]
        one.check(resolution)
        order = np.argsort(one.numbers, kind="stable") + self.starts[dataset]
        ends = np.cumsum(np.bincount(one.numbers, minlength=len(one.buckets)))[:-1]
        for bucket, rows in zip(one.buckets, np.split(order, ends), strict=True):
            yield at(bucket, one.largest, resolution, one.unit, self.patch, one.max_aspect), rows

    def _read(self, row: int, slot: Slot) -> tuple[Picture, str]:
        dataset = bisect_right(self.starts, row) - 1
        one, place = self.datasets[dataset], row - self.starts[dataset]
        try:
            data = one.columns["image"][place]["bytes"].as_py()
            captions = one.columns["captions"][place].as_py()
            weights = one.columns["caption_weights"][place].as_py()
            name, found = one.columns["id"][place], one.columns["where"][place]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise BadData(f"{one.folder}: row {place} is damaged ({error}).") from error
        where = f"{one.folder}: picture {name} ({found})"
        picture = images.decode_to_cover(data, where, slot.height, slot.width)
        across = dice.fraction(self.seed, "crop", slot.sample)
        caption = chosen(captions, weights, dice.fraction(self.seed, "caption", slot.sample))
        return crop(picture, slot.height, slot.width, across), caption

    def _substitute(self, slot: Slot, attempt: int) -> int:
        """Another row of the same dataset, by dice; from its bucket in the first attempts."""
        dataset = bisect_right(self.starts, slot.row) - 1
        start, numbers = self.starts[dataset], self.datasets[dataset].numbers
        alike = np.flatnonzero(numbers == numbers[slot.row - start])
        choice = alike if attempt < SUBSTITUTES // 2 else np.arange(len(numbers))
        die = dice.key(self.seed, "substitute", slot.sample, attempt)
        return start + int(choice[die % len(choice)])


def is_prepared(folder: Path) -> bool:
    """Whether a folder is meant to be a prepared dataset; `open_dataset` says if it is one."""
    return any((folder / name).exists() for name in ("manifest.json", "state.json", ".staging"))


def open_dataset(folder: Path) -> Opened:
    """Map a prepared dataset into memory.

    Only sizes and counts are compared with the manifest; `daybreak prepare --verify` compares
    every byte.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise BadData(
                f"{folder}/manifest.json has schema {manifest['schema']}, not {SCHEMA}: prepare "
                "the dataset again with this version"
            )
        kept, settings = manifest["counts"]["kept"], manifest["settings"]
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        names = [entry["filename"] for entry in state["_data_files"]]
        files = {name: manifest["files"][name]["sha256"] for name in names}
        shape = int(settings["resolution"]), int(settings["unit"]), float(settings["max_aspect"])
    except FileNotFoundError as error:
        name = Path(error.filename).name
        ours = any((folder / one).exists() for one in ("manifest.json", ".staging"))
        remedy = (
            f"`daybreak prepare SOURCE --out {folder}` makes it, or finishes it"
            if ours or not folder.exists()
            else f"`daybreak prepare {folder} --out OTHER` makes a dataset of it"
        )
        raise BadData(f"{folder} is not a prepared dataset, it has no {name}: {remedy}") from error
    except OSError as error:
        raise BadData(f"{error.filename} cannot be read ({error.strerror}): fix that") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadData(f"{folder}: its manifest cannot be read ({error}); prepare it again") from (
            error
        )
    for name, size in sizes.items():
        path = folder / name
        have = path.stat().st_size if path.is_file() else None
        if have != size:
            found = "is missing" if have is None else f"has {have} bytes, not {size}"
            raise BadData(f"{folder} is damaged: {name} {found}; copy it again or prepare it again")
    return _mapped(folder, kept, shape, files)


def _mapped(
    folder: Path, kept: int, shape: tuple[int, int, float], files: dict[str, str]
) -> Opened:
    try:
        # One by one: a map does not need its file open, and open files are limited.
        table = pa.concat_tables(
            [pa.ipc.open_stream(_file(folder / name)).read_all() for name in files]
        )
        missing = [name for name in NEEDED if name not in table.column_names]
        if missing:
            raise BadData(f"{folder} has no column {missing[0]!r}: prepare it again")
        coded = pc.dictionary_encode(table["bucket"]).combine_chunks()
        empty = pc.struct_field(table["image"], "bytes").null_count
        least = pc.min(pc.list_value_length(table["captions"])).as_py()
        buckets = tuple(Bucket.named(name) for name in coded.dictionary.to_pylist())
    except (pa.ArrowException, OSError, ValueError, AttributeError) as error:
        raise BadData(
            f"{folder} is damaged ({error}); copy it again or prepare it again"
        ) from error
    if len(table) != kept or not kept:
        raise BadData(
            f"{folder} holds {len(table)} pictures and its manifest says {kept}: prepare it again"
        )
    if empty or not least:
        raise BadData(f"{folder} holds rows without a picture or a caption: prepare it again")
    numbers = coded.indices.to_numpy().astype(np.int32)
    columns = {name: table[name] for name in NEEDED}
    return Opened(folder, table, columns, buckets, numbers, *shape, files)


def _file(path: Path) -> Any:
    """An existing file, mapped into memory. Errors: BadData; the file need not be damaged."""
    try:
        return pa.memory_map(str(path))
    except OSError as error:
        full = os.strerror(errno.ENOMEM) in str(error)  # pyarrow leaves out the number
        reason = (
            "is one file more than a process may map: raise vm.max_map_count, or prepare the "
            "datasets again with a larger --shard"
            if full
            else f"cannot be read ({error.strerror or error}): mend that"
        )
        raise BadData(f"{path} {reason}") from error


def chosen(captions: Sequence[str], weights: Sequence[float], die: float) -> str:
    """The caption on which a die in [0, 1) falls."""
    bounds = itertools.accumulate(weights)
    place = next((i for i, bound in enumerate(bounds) if die * sum(weights) < bound), -1)
    return captions[place]


def crop(picture: Picture, height: int, width: int, across: float) -> Picture:
    """Scale a picture to cover a shape and crop the excess, a share `across` at top or left.

    A picture that covers the shape exactly is only cropped, so that no pixel changes.
    """
    have_height, have_width = picture.shape[:2]
    scale = max(height / have_height, width / have_width)
    if scale == 1:
        top = int(across * (have_height - height + 1))
        left = int(across * (have_width - width + 1))
        return picture[top : top + height, left : left + width]
    high, wide = min(height / scale, have_height), min(width / scale, have_width)
    top, left = across * (have_height - high), across * (have_width - wide)
    box = (left, top, min(left + wide, have_width), min(top + high, have_height))
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS, box))
