"""A folder of pictures with captions, cut into parts for `prepare`; every input is accounted for.

    metadata.jsonl or metadata.csv     one row per picture: `file_name` and columns of captions
    picture.png and picture.txt        side by side, in sub-folders too; picture.json adds columns

The first is Hugging Face's `imagefolder`; the second is written by most training tools and by
img2dataset. Metadata is read in stretches of rows (data/metadata), never as a whole; memory holds
only the names and sizes of the files in the folder.

Nothing outside the folder is ever read, whatever the metadata or links inside it say.
"""

import hashlib
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from daybreak.data import disk, images, records
from daybreak.data.metadata import METADATA, Place, Row, metadata_of, rows_of, stretch
from daybreak.data.records import Fault, Record, Refused, printable
from daybreak.failure import BadData

BESIDE = (".txt", ".json")  # files beside a picture
PACKED = (".7z", ".bz2", ".gz", ".rar", ".tgz", ".xz", ".zip", ".zst")
FOREIGN = frozenset({".avif", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".psd", ".svg", ".tga"})


class Rows(NamedTuple):
    """A part of a folder: a stretch of its metadata."""

    file: Path
    first: Place
    rows: int
    bytes: int

    def read(self) -> Iterator[Record | Fault]:
        """Read the rows and the pictures they name; consecutive rows of one picture are merged."""
        for row in stretch(self.file, self.first, self.rows):
            yield row if isinstance(row, Fault) else _named(self.file, row)


class Files(NamedTuple):
    """A part of a folder: some of its pictures, with the files beside them."""

    root: Path
    names: tuple[str, ...]
    bytes: int

    def read(self) -> Iterator[Record | Fault]:
        """Read the pictures and the text files beside them."""
        for name in self.names:
            try:
                yield _beside(self.root, name)
            except Refused as fault:
                yield Fault(printable(name), fault.kind, str(fault))


class Linked(NamedTuple):
    """A part of a folder: links to other folders, which are not followed."""

    names: tuple[str, ...]
    bytes: int = 0

    def read(self) -> Iterator[Record | Fault]:
        """Yield a fault for each link."""
        reason = "is a link to a folder, which is not followed; give that folder as a source."
        for name in self.names:
            yield Fault(printable(name), "unsafe", reason)


class Unnamed(NamedTuple):
    """A part of a folder: pictures that its metadata does not name."""

    names: tuple[str, ...]
    metadata: str
    bytes: int = 0

    def read(self) -> Iterator[Record | Fault]:
        """Yield a fault for each picture."""
        for name in self.names:
            yield Fault(printable(name), "unnamed", f"is not named in {self.metadata}.")


def parts(path: Path, name: str, shard: int) -> records.Source:
    """Cut a folder into parts of `shard` pictures, in the order of the metadata or of their names.

    Only the names and sizes of the files are held in memory.

    Errors  BadData for a folder without pictures, or with metadata that cannot be read at all.
    """
    check_folder(path)
    metadata, there = metadata_of(path), walk(path)
    sizes = {
        file: (path / file).lstat().st_size
        for file in there
        if is_picture(file) or file.lower().endswith(BESIDE)
    }
    if metadata:
        return _parts_of_metadata(name, metadata, sizes, shard)

    _refuse_deeper_metadata(path, there)
    pictures = {_stem(file) for file in sizes if is_picture(file)}
    if not pictures:
        raise BadData(no_pictures(path))
    texts = [file for file in sizes if not is_picture(file)]
    if pictures.isdisjoint(map(_stem, texts)):
        raise BadData(
            f"{path}: no picture has a caption; put picture.txt beside picture.png, or a "
            "metadata.jsonl with `file_name` and `text` of each into the folder."
        )
    lonely = {
        file for file in texts if file.lower().endswith(".txt") and _stem(file) not in pictures
    }
    named = [file for file in sizes if is_picture(file) or file in lonely]
    stretches = [tuple(named[start : start + shard]) for start in range(0, len(named), shard)]
    cut: list[records.Part] = [
        Files(path, names, sum(sizes[one] for one in names)) for names in stretches
    ]
    found = [*((one, sizes[one]) for one in named), *((one, _written(path / one)) for one in texts)]
    return with_links(records.Source(name, "sidecars", _fingerprint(found), tuple(cut)), path)


def with_links(source: records.Source, path: Path) -> records.Source:
    """A source with one more part, for links to folders below `path`; they are not followed."""
    links = linked(path)
    return source._replace(parts=(*source.parts, Linked(tuple(links)))) if links else source


def _parts_of_metadata(
    name: str, metadata: Path, sizes: dict[str, int], shard: int
) -> records.Source:
    named, places, counts, last, end = set[str](), [Place()], [0], None, Place()
    for row, after in rows_of(metadata):
        one = row.values.get("file_name") if isinstance(row, Row) else None
        if isinstance(one, str):
            named.add(next((form for form in _spelt(os.path.normpath(one)) if form in sizes), one))
        apart = one is None or one != last  # rows of one picture stay together
        if counts[-1] >= shard and apart:
            places.append(end)
            counts.append(0)
        counts[-1] += 1
        last, end = one, after
    count = sum(counts)
    if not count:
        raise BadData(f"{metadata}: names no pictures; write one row for each, with `file_name`.")
    weight = sum(sizes.get(one, 0) for one in named) // count
    cut: list[records.Part] = [
        Rows(metadata, place, length, length * weight)
        for place, length in zip(places, counts, strict=True)
    ]
    others = [file for file in sizes if is_picture(file) and file not in named]
    cut += [
        Unnamed(tuple(others[start : start + shard]), metadata.name)
        for start in range(0, len(others), shard)
    ]
    fingerprint = _fingerprint([*sizes.items(), (metadata.name, _written(metadata))])
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
    """A picture and the files beside it. Errors: Refused for a file that is not a picture."""
    picture = root / name
    suffix = picture.suffix.lower()
    if suffix in FOREIGN:
        raise Refused(
            f"is a picture of another kind ({suffix}); convert it to PNG, JPEG or WebP.", "format"
        )
    if suffix not in images.SUFFIXES:
        raise Refused("has no picture beside it; add the picture or remove the text.", "missing")
    text, metadata = (beside(picture, ending) for ending in BESIDE)
    for file in (picture, text, metadata):
        if file.is_symlink() and not within(root, file):
            raise Refused(f"{file.name} is a link that leads out of the folder; copy it.", "unsafe")
    columns = records.columns(
        contents(text) if text.exists() else None, contents(metadata) if metadata.exists() else None
    )
    return Record(printable(name), contents(picture), columns)


def contents(file: Path) -> bytes:
    """The bytes of a file. Errors: Refused if it is not a regular file, too large or unreadable."""
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
    """The picture a row names. Errors: Refused unless it is a file inside the folder."""
    name = row.values.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name or printable(name) != name:
        listed = ", ".join(f"`{key}`" for key in row.values)
        raise Refused(
            f"has no `file_name` with the name of a picture, but {listed or 'nothing'}.", "metadata"
        )
    try:
        there = next((one for one in _spelt(name) if (root / one).is_file()), None)
    except OSError:  # a name too long for the file system
        there = None
    picture = root / (there or name)
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise Refused(
            f"`file_name` {name!r} lies outside the folder; move the picture into it.", "unsafe"
        )
    if not within(root, picture):
        raise Refused(
            f"`file_name` {name!r} is a link that leads out of the folder; copy the picture.",
            "unsafe",
        )
    if not there:
        raise Refused(f"names {name!r}, which does not exist in the folder.", "missing")
    return picture


# What is in the folder


def check_folder(path: Path) -> None:
    """Errors: BadData if there is no such folder."""
    if path.is_file():
        raise BadData(
            f"{path}: is a file; `daybreak prepare {path} --out DATASET` makes a dataset of a tar "
            "or table."
        )
    if not path.is_dir():
        raise BadData(f"{path}: there is no such folder; give the folder that holds the pictures.")


def _refuse_deeper_metadata(path: Path, there: Sequence[str]) -> None:
    for name in there:
        if Path(name).name in METADATA:
            deeper = path / Path(name).parent
            raise BadData(f"{path}: the metadata lies deeper, in {deeper}; give that folder.")


def no_pictures(path: Path) -> str:
    """The message for a folder without pictures."""
    if packed := next(filter(is_packed, walk(path)), None):
        return f"{path}: holds {packed} and no loose picture; unpack it."
    return f"{path}: holds no pictures; put metadata.jsonl there, or picture.png with picture.txt."


def is_packed(name: str) -> bool:
    """Whether a file must be unpacked before anything in it can be read."""
    return name.lower().endswith(PACKED)


def walk(path: Path) -> list[str]:
    """The files below a folder by their relative names, sorted; hidden ones are left out.

    Errors  BadData for a folder that cannot be listed, which would otherwise count as empty.
    """
    found = []
    for root, folders, names in os.walk(path, onerror=_refuse_unlisted):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        inner = os.path.relpath(root, path)
        inner = "" if inner == "." else f"{inner}/"
        found += [f"{inner}{name}" for name in names if not name.startswith(".")]
    return sorted(found)


def _refuse_unlisted(error: OSError) -> None:
    raise BadData(
        f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or move it away."
    ) from error


def linked(path: Path) -> list[str]:
    """Links to folders below a folder by their relative names, sorted; hidden ones left out."""
    found = []
    for root, folders, _ in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in folders if Path(root, name).is_symlink()]
    return sorted(one.relative_to(path).as_posix() for one in found)


def beside(picture: Path, ending: str) -> Path:
    """The file beside a picture with this ending, in lower or upper case."""
    small, capital = picture.with_suffix(ending), picture.with_suffix(ending.upper())
    return capital if not small.exists() and capital.exists() else small


def is_picture(name: str) -> bool:
    """Whether a file is meant to be a picture, judged by its ending."""
    return Path(name).suffix.lower() in images.SUFFIXES | FOREIGN


def within(path: Path, file: Path) -> bool:
    """Whether the file still lies in the folder when all links are followed."""
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(path))


def _spelt(name: str) -> Iterator[str]:
    """A name as written, then in Unicode forms NFC and NFD: file systems differ in that."""
    yield name
    yield from (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))


def _stem(name: str) -> str:
    return str(Path(name).with_suffix(""))


def _written(file: Path) -> str:
    """The sha256 of a text file; empty if it is not a readable file."""
    try:
        return disk.sha256(file) if file.is_file() else ""
    except OSError:
        return ""


def _fingerprint(found: Iterable[tuple[str, object]]) -> str:
    digest = hashlib.sha256()
    for name, size in found:
        digest.update(f"{printable(name)}\0{size}\n".encode())
    return digest.hexdigest()
