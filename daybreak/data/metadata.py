"""The metadata of a folder of pictures: the rows of its table, and where each of them begins.

    metadata.jsonl     one object a line
    metadata.csv       a header, then one row for each picture; a cell may contain line breaks;
                       cells are separated by commas, or by semicolons or tabs as in spreadsheets

A row names its picture (`file_name`); its other values are columns. Reading can begin at any row
without reading those before it, and a faulty row is replaced by a Fault.
"""

import contextlib
import csv
import json
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, islice
from pathlib import Path
from typing import IO, NamedTuple

from daybreak.data.records import Fault
from daybreak.failure import BadData

METADATA = ("metadata.jsonl", "metadata.csv")
MARKS = (",", ";", "\t")  # between the cells of a CSV file


class Row(NamedTuple):
    """A row of the metadata, and its line number."""

    line: int
    values: dict[str, object]


class Place(NamedTuple):
    """Where a row of the metadata begins, and for CSV the header and the separator of cells."""

    offset: int = 0
    line: int = 1
    header: tuple[str, ...] = ()
    mark: str = MARKS[0]


def metadata_of(path: Path) -> Path | None:
    """The metadata file of a folder, if there is one."""
    found = [path / name for name in METADATA if (path / name).is_file()]
    if len(found) == 2:
        raise BadData(f"{path}: has both metadata.jsonl and metadata.csv; remove one of them.")
    return found[0] if found else None


def rows_of(file: Path, first: Place = Place()) -> Iterator[tuple[Row | Fault, Place]]:  # noqa: B008
    """The rows of a metadata file from a place on, each with the place where the next begins.

    Errors  BadData if the file cannot be read at all.
    """
    reader = _csv_rows if file.suffix == ".csv" else _jsonl_rows
    try:
        with file.open("rb") as opened:
            yield from reader(file.name, _Lines(opened, first.offset), first)
    except OSError as error:
        raise BadData(f"{file}: cannot be read ({error.strerror}).") from error
    except csv.Error as error:
        raise BadData(f"{file}: its header is not CSV ({error}).") from error


def stretch(file: Path, first: Place, count: int) -> Iterator[Row | Fault]:
    """The next `count` rows; consecutive rows that name the same picture are merged."""
    here = (row for row, _ in islice(rows_of(file, first), count))
    for _, same in groupby(here, key=_picture_of):
        row, *others = same
        yield row if isinstance(row, Fault) else joined(row, others)


def joined(row: Row, others: Sequence[Row | Fault]) -> Row:
    """Merge rows that name the same picture: different texts in a column become a list."""
    same = [row, *(one for one in others if isinstance(one, Row))]
    if len(same) == 1:
        return row
    values: dict[str, object] = {}
    for key in dict.fromkeys(key for one in same for key in one.values):
        found = [one.values.get(key) for one in same]
        texts = [text for one in found for text in (one if isinstance(one, list) else [one])]
        different = list(dict.fromkeys(text for text in texts if isinstance(text, str) and text))
        told = next((one for one in found if one not in (None, "", [])), found[0])
        values[key] = different if len(different) > 1 else told
    return row._replace(values=values)


def _picture_of(row: Row | Fault) -> object:
    """A key that rows of the same picture share; rows without a picture get a unique one."""
    name = row.values.get("file_name") if isinstance(row, Row) else None
    return name if isinstance(name, str) else object()


class _Lines:
    """The lines of a text file, how far it has been read, and the last byte that is not UTF-8."""

    def __init__(self, file: IO[bytes], offset: int) -> None:
        file.seek(offset)
        self.file, self.offset, self.wrong = file, offset, -1

    def __iter__(self) -> Iterator[str]:
        # Not splitlines(): a caption may hold U+2028, which JSON does not escape.
        while data := self.file.readline():
            try:
                text = data.decode("utf-8" if self.offset else "utf-8-sig")
            except UnicodeDecodeError as error:
                self.wrong = self.offset + error.start
                text = data.decode("utf-8", "replace")
            self.offset += len(data)
            yield text

    def complaint(self) -> str | None:
        """The message for a byte that is not UTF-8, if one was read since the last call."""
        wrong, self.wrong = self.wrong, -1
        return f"is not UTF-8 (byte {wrong}); save it as UTF-8." if wrong >= 0 else None


def _jsonl_rows(name: str, lines: _Lines, first: Place) -> Iterator[tuple[Row | Fault, Place]]:
    for line, text in enumerate(lines, start=first.line):
        if text.strip():
            yield _json_row(name, line, text, lines.complaint()), Place(lines.offset, line + 1)


def _json_row(name: str, line: int, text: str, complaint: str | None) -> Row | Fault:
    if complaint:
        return Fault(name, "metadata", complaint)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return _fault(name, line, "is not JSON; write one object per line.")
    if not isinstance(values, dict):
        return _fault(name, line, "is not a JSON object; write one object per line.")
    return Row(line, values)


def _csv_rows(name: str, lines: _Lines, first: Place) -> Iterator[tuple[Row | Fault, Place]]:
    text = next(iter(lines), "")
    mark = first.mark if first.header else _mark(text)
    reader = csv.reader(chain((text,), lines), delimiter=mark, strict=True)
    header = first.header or tuple(next(reader, ()))
    row: Row | Fault
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row = _fault(name, first.line - 1 + reader.line_num, f"is not CSV ({error}).")
        else:
            row = _csv_row(name, first.line - 1 + reader.line_num, header, cells, lines)
            if not cells:
                continue
        yield row, Place(lines.offset, first.line + reader.line_num, header, mark)


def _mark(header: str) -> str:
    """The separator of cells: one that makes `file_name` a cell of the header, else a comma."""
    for mark in MARKS:
        with contextlib.suppress(csv.Error):
            if "file_name" in next(csv.reader((header,), delimiter=mark), ()):
                return mark
    return MARKS[0]


def _csv_row(
    name: str, line: int, header: tuple[str, ...], cells: list[str], lines: _Lines
) -> Row | Fault:
    complaint = lines.complaint()
    if complaint:
        return Fault(name, "metadata", complaint)
    if len(cells) > len(header):
        return _fault(
            name, line, "has more cells than the header; put captions with commas in quotes."
        )
    return Row(line, dict(zip(header, cells, strict=False)))


def _fault(name: str, line: int, reason: str) -> Fault:
    return Fault(f"{name}:{line}", "metadata", reason)
