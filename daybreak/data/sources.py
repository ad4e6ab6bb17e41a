"""Sources: a folder of pictures with captions, read into one list.

Two layouts are understood, both those of Hugging Face's `imagefolder` and of most training tools:

    metadata.jsonl or metadata.csv     one row per picture: `file_name` and columns of captions
    picture.png and picture.txt        side by side, in sub-folders too

A picture may carry several captions, one from each column asked for, with the weight of that
column: `batches` draws one of them each time. The list is ordered by file name, so that it is the
same on every machine. With metadata, pictures it does not name are not part of the dataset.

Nothing outside the folder is ever read, whatever the metadata or a link inside it says.
"""

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from daybreak.data import images
from daybreak.failure import BadData, BadRecipe

USUAL_COLUMNS = ("text", "caption", "prompt")
NAMED_AT_MOST = 5


class Captioned(NamedTuple):
    """A picture on disk, and what may be said of it."""

    path: Path
    captions: tuple[str, ...]  # at least one, none of them empty
    weights: tuple[float, ...]  # one for each caption, positive, not normalised


class Row(NamedTuple):
    """A row of the metadata, and the line it stands on."""

    line: int
    values: dict[str, object]


def folder(path: Path, caption_columns: Sequence[tuple[str, float]] = ()) -> list[Captioned]:
    """All pictures of a folder, each with its captions.

    `caption_columns` are (name, weight); without them, the first of `text`, `caption` and `prompt`
    that the metadata has. A list of words is one caption, joined by commas. A value that is missing
    or empty drops that caption from that picture, and the others stay.

    Errors  BadData for a folder or a row that cannot be used, naming it; BadRecipe for a weight
            that is not a positive number.
    """
    for column, weight in caption_columns:
        if not (math.isfinite(weight) and weight > 0):
            raise BadRecipe(f"caption column `{column}` has weight {weight}; it must be positive.")
    if not path.is_dir():
        raise BadData(f"{path}: there is no such folder; give the folder that holds the pictures.")

    metadata = [path / name for name in ("metadata.jsonl", "metadata.csv")]
    metadata = [file for file in metadata if file.is_file()]
    if len(metadata) == 2:
        raise BadData(f"{path}: has both metadata.jsonl and metadata.csv; remove one of them.")
    if metadata:
        captioned = _from_metadata(metadata[0], caption_columns)
    elif caption_columns:
        raise BadData(
            f"{path}: caption columns are asked for, but there is no metadata.jsonl or "
            "metadata.csv; remove `caption_columns` to read picture.txt beside picture.png."
        )
    else:
        captioned = _side_by_side(path)

    _refuse_uncaptioned(path, captioned)
    return sorted(captioned, key=lambda one: one.path.relative_to(path).as_posix())


def check(captioned: Sequence[Captioned]) -> None:
    """Open every picture and check its header, before the first step and not in the middle.

    Errors  BadData naming up to five of those that cannot be read, and their number.
    """
    with ThreadPoolExecutor(max_workers=min(16, 4 * (os.cpu_count() or 1))) as pool:
        answers = pool.map(_complaint, [one.path for one in captioned])
        complaints = [complaint for complaint in answers if complaint]
    if complaints:
        count = f"{len(complaints)} of {len(captioned)} pictures cannot be read"
        more = " ..." if len(complaints) > NAMED_AT_MOST else ""
        raise BadData(f"{count}: " + " ".join(complaints[:NAMED_AT_MOST]) + more)


def _complaint(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            images.verify(file, str(path))
    except BadData as error:
        return str(error)
    except OSError as error:
        return f"{path}: {error.strerror or error}."
    return None


def _from_metadata(file: Path, caption_columns: Sequence[tuple[str, float]]) -> list[Captioned]:
    rows = _read_csv(file) if file.suffix == ".csv" else _read_jsonl(file)
    if not rows:
        raise BadData(f"{file}: names no pictures; write one row for each, with `file_name`.")
    columns = _columns(file, rows, caption_columns)
    captioned = []
    for row in rows:
        found = [(_text(file, row, name), weight) for name, weight in columns]
        kept = [(text, weight) for text, weight in found if text]
        captioned.append(
            Captioned(
                path=_inside(file, row),
                captions=tuple(text for text, _ in kept),
                weights=tuple(weight for _, weight in kept),
            )
        )
    return captioned


def _side_by_side(path: Path) -> list[Captioned]:
    captioned = []
    for root, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        for name in names:
            picture = Path(root, name)
            if name.startswith(".") or picture.suffix.lower() not in images.SUFFIXES:
                continue
            if not _within(path, picture):
                raise BadData(f"{picture}: is a link that leads out of {path}; copy the picture.")
            caption = _caption_beside(path, picture.with_suffix(".txt"))
            captioned.append(Captioned(picture, (caption,), (1.0,)) if caption else _bare(picture))
    if not captioned:
        raise BadData(
            f"{path}: holds no pictures; put metadata.jsonl there, or picture.png with picture.txt."
        )
    return captioned


def _bare(picture: Path) -> Captioned:
    return Captioned(picture, (), ())


def _caption_beside(path: Path, file: Path) -> str:
    if not file.is_file():
        return ""
    if not _within(path, file):
        raise BadData(f"{file}: is a link that leads out of {path}; copy the caption.")
    return _one_line(_read_text(file))


def _refuse_uncaptioned(path: Path, captioned: Sequence[Captioned]) -> None:
    bare = sorted(one.path.relative_to(path).as_posix() for one in captioned if not one.captions)
    if bare:
        others = f" (and {len(bare) - 1} more)" if len(bare) > 1 else ""
        raise BadData(
            f"{path / bare[0]}{others}: has no caption; write one, or remove the picture."
        )


def _columns(
    file: Path, rows: Sequence[Row], asked: Sequence[tuple[str, float]]
) -> Sequence[tuple[str, float]]:
    """The columns to read, each of which occurs in at least one row."""
    there = {name: None for row in rows for name in row.values if name != "file_name"}
    listed = ", ".join(f"`{name}`" for name in there) or "none"
    for name, _ in asked:
        if name not in there:
            raise BadData(f"{file}: has no column `{name}`; it has {listed}.")
    if asked:
        return asked
    usual = [name for name in USUAL_COLUMNS if name in there]
    if not usual:
        raise BadData(
            f"{file}: has no column `text`, `caption` or `prompt`; name one of its own "
            f"({listed}) in `caption_columns`."
        )
    return [(usual[0], 1.0)]


def _text(file: Path, row: Row, column: str) -> str:
    """The caption of one cell; empty where there is none."""
    value = row.values.get(column)
    if value is None:
        return ""
    if isinstance(value, str):
        return _one_line(value)
    if isinstance(value, list):
        words = [word for word in value if isinstance(word, str)]
        if len(words) == len(value):
            return ", ".join(filter(None, map(_one_line, words)))
    raise BadData(
        f"{file}:{row.line}: column `{column}` holds {json.dumps(value)[:60]}; "
        "a caption is a text or a list of texts."
    )


def _inside(file: Path, row: Row) -> Path:
    """The picture a row names, which must be a file inside the folder of the metadata."""
    name = row.values.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadData(f"{file}:{row.line}: has no `file_name`; write the name of the picture.")
    picture = file.parent / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not _within(file.parent, picture):
        raise BadData(
            f"{file}:{row.line}: `file_name` {name!r} lies outside the folder; "
            "move the picture into it."
        )
    try:
        there = picture.is_file()
    except OSError:  # a name too long for the file system
        there = False
    if not there:
        raise BadData(f"{file}:{row.line}: names {name!r}, which does not exist in the folder.")
    return picture


def _within(path: Path, file: Path) -> bool:
    """Whether the file, all links followed, still lies in the folder."""
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(path))


def _read_jsonl(file: Path) -> list[Row]:
    rows = []
    # Not splitlines(): a caption may hold U+2028, which JSON does not escape.
    for line, text in enumerate(_read_text(file).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadData(f"{file}:{line}: is not JSON; write one object per line.") from error
        if not isinstance(values, dict):
            raise BadData(f"{file}:{line}: is not a JSON object; write one object per line.")
        rows.append(Row(line, values))
    return rows


def _read_csv(file: Path) -> list[Row]:
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), strict=True)
    rows = []
    try:
        for values in reader:
            if None in values:
                raise BadData(
                    f"{file}:{reader.line_num}: has more cells than the header; "
                    "put captions with commas in quotes."
                )
            rows.append(Row(reader.line_num, dict(values)))
    except csv.Error as error:
        raise BadData(f"{file}:{reader.line_num}: is not CSV ({error}).") from error
    return rows


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise BadData(f"{file}: is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise BadData(f"{file}: cannot be read ({error.strerror}).") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())
