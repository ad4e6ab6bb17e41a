"""What `prepare` reads: records and faults, from parts that are independent of one another.

A source (a folder, some tars, a table) is cut into parts. A part is plain data that can be sent to
another process, and reading it gives the same records every time. So a part is the unit of parallel
work, and of work that a kill can lose. No picture is decoded here.

    Record   a picture's bytes, and the columns that belong to it
    Fault    an input that is not a record; one word and one sentence say why

The words: metadata (a row or a JSON file that cannot be read), missing (no picture, or no such
file), unnamed (a picture the metadata does not name), unsafe (a name or link that leads elsewhere),
twice (a name that occurs again), container (a tar or table that ends early or is damaged).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from daybreak.failure import BadData, told

LARGEST = 256 * 2**20  # bytes; 64 megapixels of uncompressed colour are 192 MB
LICENCES = ("licence", "license")  # usual names of the column
CONTAINER = "container"  # the kind of a fault behind which inputs may be lost


class Refused(BadData):
    """One input among many that cannot be used; `kind` is the word it is counted under."""

    def __init__(self, sentence: str, kind: str = "damaged") -> None:
        super().__init__(sentence)
        self.kind = kind


class Record(NamedTuple):
    """A picture as it was found, undecoded, and the other values of its row."""

    where: str  # its name within the source
    data: bytes
    columns: Mapping[str, object]


class Fault(NamedTuple):
    """An input that is not a record; `where: reason` is a sentence."""

    where: str
    kind: str
    reason: str


class Columns(NamedTuple):
    """The columns to look for; the usual ones where no name is given."""

    captions: tuple[str, ...] = ()
    image: str | None = None
    licence: str | None = None


class Part(Protocol):
    """A part of a source: every reading gives the same records and faults in the same order."""

    @property
    def bytes(self) -> int:
        """Roughly how much there is to read."""

    def read(self) -> Iterator[Record | Fault]:
        """Read it, holding one record at a time."""


class Source(NamedTuple):
    """A source that was examined, but not yet read."""

    name: str  # as the user wrote it
    layout: str
    fingerprint: str  # sha256 of names, sizes, texts; modification times of large files
    parts: tuple[Part, ...]


def columns(text: bytes | None, metadata: bytes | None) -> dict[str, object]:
    """The columns in files beside a picture: picture.txt is `text`, picture.json holds the others.

    Errors  Refused for JSON that is invalid or not an object.
    """
    row: dict[str, object] = {}
    if metadata is not None:
        try:
            found = json.loads(metadata)
        except (ValueError, RecursionError) as error:
            raise Refused("its .json file is not JSON; mend or remove it.", "metadata") from error
        if not isinstance(found, dict):
            raise Refused("its .json file holds no JSON object; mend or remove it.", "metadata")
        row |= found
    if text is not None:
        row["text"] = text  # bytes: data/captions checks that they are UTF-8
    return row


def printable(name: str | Path) -> str:
    """A name that can be written as UTF-8: other bytes become escapes."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def place(source: str, where: str) -> str:
    """The source and a place in it; only the source if that is one file, a tar or a table."""
    return source if Path(source).name == where else f"{source}: {where}"


def why(error: Exception) -> str:
    """The message of a decoder or reader, short enough for one sentence."""
    return told(error)[:120].rstrip(". ")


def too_large(size: int) -> str:
    """The message for an input of more than LARGEST bytes."""
    return f"has {size / 2**20:,.0f} MiB; no picture has more than {LARGEST // 2**20} MiB."
