"""Tables of pictures: parquet files, and whatever Hugging Face `datasets` opens.

Pictures are a column of bytes, or of `{bytes, path}` as `datasets` stores its images; the first
column of that kind is taken unless one is named. Of the other columns only the requested ones are
read. Pictures are never decoded by the table's reader, only by data/images.

Parquet is read by row groups, a few rows at a time. A saved dataset, or one from the hub, is mapped
into memory and read by rows; streaming reads it shard by shard, without storing it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from daybreak.data import records
from daybreak.data.captions import KEYWORDS, USUAL_COLUMNS
from daybreak.data.records import CONTAINER, LICENCES, Columns, Fault, Record, printable, why
from daybreak.failure import BadData

ROWS = 16  # rows of a parquet file held at a time


class Parquet(NamedTuple):
    """A part of a source: some row groups of a parquet file."""

    path: Path
    name: str
    groups: tuple[int, ...]
    first: int  # row
    image: str
    others: tuple[str, ...]
    bytes: int

    def read(self) -> Iterator[Record | Fault]:
        """Read the rows of these groups; after a damaged group, the next one is still read."""
        first = self.first
        for group in self.groups:
            number = end = first
            try:
                with pq.ParquetFile(self.path) as table:
                    end = first + table.metadata.row_group(group).num_rows
                    for batch in table.iter_batches(ROWS, [group], [self.image, *self.others]):
                        for row in range(batch.num_rows):
                            yield _record(f"{self.name}:{number}", batch, row, self.image)
                            number += 1
            except (pa.ArrowException, OSError) as error:
                reason = f"cannot be read from row {number} to {end - 1} ({why(error)})"
                yield Fault(self.name, CONTAINER, f"{reason}; fetch it again.")
            first = end


class Broken(NamedTuple):
    """A part of a source: a file that cannot be opened at all."""

    name: str
    reason: str
    bytes: int = 0

    def read(self) -> Iterator[Record | Fault]:
        """Yield the fault."""
        yield Fault(self.name, CONTAINER, self.reason)


class Rows(NamedTuple):
    """A part of a source: some rows of a dataset that is mapped into memory."""

    dataset: Any  # datasets.Dataset of Arrow tables; pickled as the names of its files
    first: int
    rows: int
    image: str
    bytes: int

    def read(self) -> Iterator[Record | Fault]:
        """Read the rows."""
        for number in range(self.first, self.first + self.rows):
            try:
                table = self.dataset[number : number + 1]
            except (pa.ArrowException, OSError) as error:
                yield Fault(str(number), CONTAINER, f"cannot be read ({why(error)}).")
            else:
                yield _record(str(number), table, 0, self.image)


class Stream(NamedTuple):
    """A part of a source: one shard of a dataset that is streamed and not stored."""

    dataset: Any  # datasets.IterableDataset of Arrow tables
    shard: int
    of: int
    image: str
    bytes: int = 0

    def read(self) -> Iterator[Record | Fault]:
        """Read the shard."""
        number = 0
        try:
            for table in self.dataset.shard(self.of, self.shard):
                for row in range(table.num_rows):
                    yield _record(f"{self.shard}:{number}", table, row, self.image)
                    number += 1
        except (pa.ArrowException, OSError) as error:
            reason = f"cannot be read from row {number} on ({why(error)}); try again."
            yield Fault(f"shard {self.shard}", CONTAINER, reason)


def parquet(
    paths: Sequence[Path], root: Path, name: str, wanted: Columns, shard: int
) -> records.Source:
    """Cut parquet files into parts of whole row groups with about `shard` rows."""
    cut: list[records.Part] = []
    digest = hashlib.sha256()
    for path in paths:
        file = printable(path.relative_to(root).as_posix())
        digest.update(f"{file}\0{path.stat().st_size}\0{path.stat().st_mtime_ns}\n".encode())
        try:
            with pq.ParquetFile(path) as table:
                where = records.place(name, file)
                image = image_column(where, table.schema_arrow, wanted.image)
                others = other_columns(where, table.schema_arrow.names, wanted)
                _refuse_twice(where, table.schema_arrow.names, (image, *others))
                cut += _row_groups(path, file, table.metadata, image, others, shard)
        except (pa.ArrowException, OSError) as error:
            cut.append(Broken(file, f"is no parquet file, or a damaged one ({why(error)})."))
    return records.Source(name, "parquet", digest.hexdigest(), tuple(cut))


def saved(path: Path, name: str, wanted: Columns, shard: int) -> records.Source:
    """Cut a folder that `datasets.save_to_disk` has written into parts of `shard` rows."""
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise BadData(f"{path}: is a damaged dataset ({why(error)}); save it again.") from error
    digest = hashlib.sha256()
    for file in sorted(path.glob("[!.]*.arrow")):
        digest.update(f"{file.name}\0{file.stat().st_size}\0{file.stat().st_mtime_ns}\n".encode())
    return _rows(dataset, name, "datasets", digest.hexdigest(), wanted, shard)


def hub(name: str, wanted: Columns, shard: int, stream: bool) -> records.Source:
    """Cut a dataset of the hub into parts: `owner/name:split`, or `owner/name` for split `train`.

    Errors  BadData if it cannot be loaded.
    """
    from datasets import load_dataset

    path, _, split = name.partition(":")
    try:
        dataset = load_dataset(path, split=split or "train", streaming=stream)
    except Exception as error:  # its own, or one of its file system or server
        raise BadData(
            f"{name}: is neither a local file or folder nor a dataset that can be loaded from the "
            f"Hugging Face hub ({why(error)})."
        ) from error
    if not stream:
        return _rows(dataset, name, "datasets", dataset._fingerprint, wanted, shard)
    if dataset.features is None:
        dataset = dataset._resolve_features()
    image = image_column(name, dataset.features.arrow_schema, wanted.image)
    dataset = _undecoded(dataset, name, image, wanted)
    of = dataset.num_shards
    cut = tuple(Stream(dataset, number, of, image) for number in range(of))
    fingerprint = hashlib.sha256(f"{name}\0{of}\0{dataset.features}".encode()).hexdigest()
    return records.Source(name, "streamed", fingerprint, cut)


def image_column(where: str, schema: pa.Schema, asked: str | None) -> str:
    """The column that holds the pictures. Errors: BadData, listing the columns there are."""
    able = [field.name for field in schema if _holds_bytes(field.type)]
    if asked in able or (asked is None and able):
        return asked or able[0]
    listed = ", ".join(f"`{field}`" for field in schema.names)
    what = f"column `{asked}` with pictures" if asked else "column of pictures"
    raise BadData(f"{where}: has no {what}; name one of {listed} with --image-column.")


def other_columns(where: str, there: Sequence[str], wanted: Columns) -> tuple[str, ...]:
    """The caption and licence columns to read, of the columns that are there.

    Errors  BadData, listing the columns there are, if none of them holds captions.
    """
    captions = [one for one in wanted.captions or (*USUAL_COLUMNS, KEYWORDS) if one in there]
    if not captions:
        listed = ", ".join(f"`{name}`" for name in there)
        raise BadData(
            f"{where}: has no matching caption column; name one of {listed} with --caption-column."
        )
    licences = (wanted.licence,) if wanted.licence else LICENCES
    return (*captions, *(one for one in licences if one in there))


def _refuse_twice(where: str, there: Sequence[str], taken: Sequence[str]) -> None:
    for name in taken:
        if (number := there.count(name)) > 1:
            raise BadData(f"{where}: has {number} columns `{name}`; rename all but one.")


def _rows(
    dataset: Any, name: str, layout: str, fingerprint: str, wanted: Columns, shard: int
) -> records.Source:
    image = image_column(name, dataset.features.arrow_schema, wanted.image)
    dataset = _undecoded(dataset, name, image, wanted)
    count = len(dataset)
    weight = dataset.data.nbytes // max(1, count)
    cut = tuple(
        Rows(dataset, first, length := min(shard, count - first), image, length * weight)
        for first in range(0, count, shard)
    )
    return records.Source(name, layout, fingerprint, cut)


def _undecoded(dataset: Any, name: str, image: str, wanted: Columns) -> Any:
    """The dataset as Arrow tables of the wanted columns, with undecoded pictures."""
    from datasets import Image

    others = other_columns(name, dataset.column_names, wanted)
    dataset = dataset.select_columns([image, *others])
    if isinstance(dataset.features[image], Image):
        dataset = dataset.cast_column(image, Image(decode=False))
    return dataset.with_format("arrow")


def _row_groups(
    path: Path, name: str, metadata: Any, image: str, others: tuple[str, ...], shard: int
) -> Iterator[Parquet]:
    """Gather row groups until they hold `shard` rows."""
    groups, first, row, size = list[int](), 0, 0, 0
    for number in range(metadata.num_row_groups):
        groups.append(number)
        row += metadata.row_group(number).num_rows
        size += metadata.row_group(number).total_byte_size
        if row - first >= shard or number == metadata.num_row_groups - 1:
            yield Parquet(path, name, tuple(groups), first, image, others, size)
            groups, first, size = [], row, 0


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        names = [kind.field(number).name for number in range(kind.num_fields)]
        return "bytes" in names and _holds_bytes(kind.field("bytes").type)
    if pa.types.is_dictionary(kind):  # equal pictures are stored once
        return _holds_bytes(kind.value_type)
    plain = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return plain or pa.types.is_binary_view(kind)


def _record(where: str, table: Any, row: int, image: str) -> Record | Fault:
    """One row of a table or batch."""
    cells = {name: _cell(table.column(name)[row]) for name in table.schema.names}
    cell = cells.pop(image)
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if data is None:
        path = isinstance(cell, dict) and cell.get("path")
        reason = "has the path of a picture, and not its bytes." if path else "has no picture."
        return Fault(where, "missing", reason)
    if len(data) > records.LARGEST:
        return Fault(where, "bomb", records.too_large(len(data)))
    return Record(where, data, cells)


def _cell(scalar: Any) -> Any:
    """The value of a cell; for text that is not UTF-8, its bytes."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error.object
