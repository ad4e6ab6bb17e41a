"""A folder of pictures with captions, cut into parts for `prepare`, where each input counts.

    metadata.jsonl or metadata.csv     one row per picture: `file_name` and columns of captions
    picture.png and picture.txt        side by side, in sub-folders too; picture.json adds columns

The first is Hugging Face's `imagefolder`, the second what most training tools and img2dataset
write. Metadata is read by stretches of its lines, never as a whole; the names and sizes of the
files in the folder are what memory holds.

Nothing outside the folder is ever read, whatever the metadata or a link inside it says.
"""

import csv
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

from daybreak.data import images, records
from daybreak.data.records import Fault, Record, Refused, printable
from daybreak.failure import BadData

METADATA = ("metadata.jsonl", "metadata.csv")
FOREIGN = frozenset({".avif", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".psd", ".svg", ".tga"})


class Row(NamedTuple):
    """A row of the metadata, and the line it stands on."""

    line: int
    values: dict[str, object]


class Place(NamedTuple):
    """Where a row of the metadata begins; the header of a CSV file goes along."""

    offset: int = 0
    line: int = 1
    header: tuple[str, ...] = ()


class Rows(NamedTuple):
    """A part of a folder: a stretch of its metadata."""

    file: Path
    first: Place
    rows: int
    bytes: int

    def read(self) -> Iterator[Record | Fault]:
        """Read the rows and the pictures they name."""
        for row, _ in islice(rows(self.file, self.first), self.rows):
            yield row if isinstance(row, Fault) else _named(self.file, row)


class Files(NamedTuple):
    """A part of a folder: some of its files, with those beside them."""

    root: Path
    names: tuple[str, ...]
    bytes: int

    def read(self) -> Iterator[Record | Fault]:
        """Read the pictures, and what stands in the text files beside them."""
        for name in self.names:
            try:
                yield _beside(self.root, name)
            except Refused as fault:
                yield Fault(printable(name), fault.kind, str(fault))


class Unnamed(NamedTuple):
    """A part of a folder: pictures that its metadata does not name."""

    names: tuple[str, ...]
    metadata: str
    bytes: int = 0

    def read(self) -> Iterator[Record | Fault]:
        """Say of each that it is not named."""
        for name in self.names:
            yield Fault(printable(name), "unnamed", f"is not named in {self.metadata}.")


def parts(path: Path, name: str, shard: int) -> records.Source:
    """Cut a folder into parts of `shard` pictures, in the order of the metadata or of their names.

    The names and sizes of all files are held in memory, nothing else.

    Errors  BadData for a folder without pictures, or with metadata that cannot be read at all.
    """
    check_folder(path)
    metadata = metadata_of(path)
    sizes = {
        file: (path / file).lstat().st_size
        for file in walk(path)
        if is_picture(file) or file.endswith((".txt", ".json"))
    }
    if metadata:
        return _parts_of_metadata(name, metadata, sizes, shard)

    _refuse_deeper_metadata(path)
    pictures = {_stem(file) for file in sizes if is_picture(file)}
    if not pictures:
        raise BadData(no_pictures(path))
    lonely = {file for file in sizes if file.endswith(".txt") and _stem(file) not in pictures}
    named = [file for file in sizes if is_picture(file) or file in lonely]
    stretches = [tuple(named[start : start + shard]) for start in range(0, len(named), shard)]
    cut = tuple(Files(path, names, sum(sizes[one] for one in names)) for names in stretches)
    return records.Source(name, "sidecars", _fingerprint(sizes.items()), cut)


def _parts_of_metadata(
    name: str, metadata: Path, sizes: dict[str, int], shard: int
) -> records.Source:
    named, places, count = set[str](), [Place()], 0
    for count, (row, after) in enumerate(rows(metadata), start=1):
        if isinstance(row, Row) and isinstance(row.values.get("file_name"), str):
            named.add(os.path.normpath(str(row.values["file_name"])))
        if count % shard == 0:
            places.append(after)
    if not count:
        raise BadData(f"{metadata}: names no pictures; write one row for each, with `file_name`.")
    weight = sum(sizes.get(one, 0) for one in named) // count
    cut: list[records.Part] = [
        Rows(metadata, place, length := min(shard, count - number * shard), length * weight)
        for number, place in enumerate(places)
        if number * shard < count
    ]
    others = [file for file in sizes if is_picture(file) and file not in named]
    cut += [
        Unnamed(tuple(others[start : start + shard]), metadata.name)
        for start in range(0, len(others), shard)
    ]
    with metadata.open("rb") as file:
        written = hashlib.file_digest(file, "sha256").hexdigest()
    fingerprint = _fingerprint([*sizes.items(), (metadata.name, written)])
    return records.Source(name, "imagefolder", fingerprint, tuple(cut))


# One picture, from either layout


def _named(file: Path, row: Row) -> Record | Fault:
    """The picture that a row of metadata names."""
    line = f"{file.name}:{row.line}"
    try:
        picture = inside(file.parent, row)
    except Refused as fault:
        return Fault(line, fault.kind, str(fault))
    name = printable(picture.relative_to(file.parent))
    try:
        data = contents(picture)
    except Refused as fault:
        return Fault(name, fault.kind, str(fault))
    values = {key: value for key, value in row.values.items() if key != "file_name"}
    return Record(name, data, values)


def _beside(root: Path, name: str) -> Record:
    """A picture and the files beside it. Errors: Refused for what is none."""
    picture = root / name
    suffix = picture.suffix.lower()
    if suffix in FOREIGN:
        raise Refused(
            f"is a picture of another kind ({suffix}); convert it to PNG, JPEG or WebP.", "format"
        )
    if suffix not in images.SUFFIXES:
        raise Refused("has no picture beside it; add the picture or remove the text.", "missing")
    for file in (picture, picture.with_suffix(".txt"), picture.with_suffix(".json")):
        if file.is_symlink() and not within(root, file):
            raise Refused(f"{file.name} is a link that leads out of the folder; copy it.", "unsafe")
    text, metadata = picture.with_suffix(".txt"), picture.with_suffix(".json")
    columns = records.columns(
        contents(text) if text.exists() else None, contents(metadata) if metadata.exists() else None
    )
    return Record(printable(name), contents(picture), columns)


def contents(file: Path) -> bytes:
    """What a file holds. Errors: Refused for a pipe, a giant, or what cannot be read."""
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise Refused(f"{file.name} is no ordinary file; replace it.", "missing")
        if found.st_size > records.LARGEST:
            raise Refused(f"{file.name} {records.too_large(found.st_size)}", "bomb")
        return file.read_bytes()
    except OSError as error:
        raise Refused(f"{file.name} cannot be read ({error.strerror}).", "missing") from error


def inside(root: Path, row: Row) -> Path:
    """The picture a row names, which must be a file inside the folder. Errors: Refused."""
    name = row.values.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name or printable(name) != name:
        raise Refused("has no `file_name`; write the name of the picture.", "metadata")
    picture = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not within(root, picture):
        raise Refused(
            f"`file_name` {name!r} lies outside the folder; move the picture into it.", "unsafe"
        )
    try:
        there = picture.is_file()
    except OSError:  # a name too long for the file system
        there = False
    if not there:
        raise Refused(f"names {name!r}, which does not exist in the folder.", "missing")
    return picture


# What is in the folder


def check_folder(path: Path) -> None:
    """Errors: BadData if there is no such folder."""
    if not path.is_dir():
        raise BadData(f"{path}: there is no such folder; give the folder that holds the pictures.")


def metadata_of(path: Path) -> Path | None:
    """The metadata of a folder, if it has some."""
    found = [path / name for name in METADATA if (path / name).is_file()]
    if len(found) == 2:
        raise BadData(f"{path}: has both metadata.jsonl and metadata.csv; remove one of them.")
    return found[0] if found else None


def _refuse_deeper_metadata(path: Path) -> None:
    for name in walk(path):
        if Path(name).name in METADATA:
            deeper = path / Path(name).parent
            raise BadData(f"{path}: the metadata lies deeper, in {deeper}; give that folder.")


def no_pictures(path: Path) -> str:
    """Say that a folder holds none."""
    return f"{path}: holds no pictures; put metadata.jsonl there, or picture.png with picture.txt."


def walk(path: Path) -> list[str]:
    """The files below a folder by their relative names, sorted; hidden ones are left out."""
    found = []
    for root, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        inner = os.path.relpath(root, path)
        inner = "" if inner == "." else f"{inner}/"
        found += [f"{inner}{name}" for name in names if not name.startswith(".")]
    return sorted(found)


def is_picture(name: str) -> bool:
    """Whether a file is meant to be a picture, by its ending."""
    return Path(name).suffix.lower() in images.SUFFIXES | FOREIGN


def within(path: Path, file: Path) -> bool:
    """Whether the file, all links followed, still lies in the folder."""
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(path))


def _stem(name: str) -> str:
    return str(Path(name).with_suffix(""))


def _fingerprint(found: Iterable[tuple[str, object]]) -> str:
    digest = hashlib.sha256()
    for name, size in found:
        digest.update(f"{printable(name)}\0{size}\n".encode())
    return digest.hexdigest()


# Rows of the metadata


class _Lines:
    """The lines of a text file, how far they have been read, and which byte is no UTF-8."""

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
        """Say what byte was wrong since this was last asked."""
        wrong, self.wrong = self.wrong, -1
        return f"is not UTF-8 (byte {wrong}); save it as UTF-8." if wrong >= 0 else None


def rows(file: Path, first: Place = Place()) -> Iterator[tuple[Row | Fault, Place]]:  # noqa: B008
    """The rows of a metadata file from a place on, each with the place after it.

    Errors  BadData if the file cannot be read at all.
    """
    reader = _csv_rows if file.suffix == ".csv" else _jsonl_rows
    try:
        with file.open("rb") as opened:
            yield from reader(file.name, _Lines(opened, first.offset), first)
    except OSError as error:
        raise BadData(f"{file}: cannot be read ({error.strerror}).") from error


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
    reader = csv.reader(lines, strict=True)
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
        yield row, Place(lines.offset, first.line + reader.line_num, header)


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
