"""What `prepare` reads: records, and the faults among them, from parts that stand alone.

A source (a folder, some tars, a table) is cut into parts. A part is plain data that another process
can be handed, and reads to the same records every time, so that a part is the unit of parallel work
and of what a kill can lose. Nothing of a picture is decoded here.

    Record   a picture's bytes, and the columns that go with it
    Fault    an input that is none, with one word and one sentence saying why

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
CONTAINER = "container"  # the kind of a fault that may hide others


class Refused(BadData):
    """One input among many that cannot be taken; `kind` is the word it is counted under."""

    def __init__(self, sentence: str, kind: str = "damaged") -> None:
        super().__init__(sentence)
        self.kind = kind


class Record(NamedTuple):
    """A picture as it was found: undecoded, with its row's other values."""

    where: str  # its name within the source
    data: bytes
    columns: Mapping[str, object]


class Fault(NamedTuple):
    """An input that is no record; `where: reason` is a sentence."""

    where: str
    kind: str
    reason: str


class Columns(NamedTuple):
    """The columns to look for; without names, the usual ones."""

    captions: tuple[str, ...] = ()
    image: str | None = None
    licence: str | None = None


class Part(Protocol):
    """A stretch of a source: the same records and faults in the same order, however often read."""

    @property
    def bytes(self) -> int:
        """Roughly how much there is to read."""

    def read(self) -> Iterator[Record | Fault]:
        """Read it, holding one record at a time."""


class Source(NamedTuple):
    """A source, looked at but not yet read."""

    name: str  # as the user wrote it
    layout: str
    fingerprint: str  # sha256 over what was found: names, sizes, texts, of large files their time
    parts: tuple[Part, ...]


def columns(text: bytes | None, metadata: bytes | None) -> dict[str, object]:
    """The columns that stand in files beside a picture: picture.txt is `text`, picture.json a row.

    Errors  Refused for JSON that is no object.
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
        row["text"] = text  # bytes: whether they are UTF-8 is for the captions to judge
    return row


def printable(name: str | Path) -> str:
    """A name as it can be written down: bytes that are not UTF-8 become escapes."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def place(source: str, where: str) -> str:
    """Where in a source, unless it is all of it: one tar, one table."""
    return source if Path(source).name == where else f"{source}: {where}"


def why(error: Exception) -> str:
    """What a decoder or a reader said, short enough for one sentence."""
    return told(error)[:120].rstrip(". ")


def too_large(size: int) -> str:
    """Say that so many bytes are no picture."""
    return f"has {size / 2**20:,.0f} MiB; no picture has more than {LARGEST // 2**20} MiB."
