"""Sources: where captioned pictures come from.

`find` says which layout a source has and cuts it into the parts that `prepare` reads. `folder`
reads a folder as one list, ordered by name, to train on it without `prepare`; the first thing that
is wrong is an error.

A picture may have several captions, from several columns; the weight of a column is shared by its
captions. Each time the picture is used, training draws one of them.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from daybreak.data import captions, folders, images, scenes
from daybreak.data.captions import KEYWORDS, USUAL_COLUMNS
from daybreak.data.metadata import Row, joined, metadata_of, rows_of
from daybreak.data.records import Columns, Fault, Record, Refused, Source
from daybreak.failure import BadData, BadRecipe

NAMED_AT_MOST = 5
DRAWN = re.compile(r"scenes:(\d+)(?::([\w-]+))?")  # how many, on which canvas
HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class Captioned(NamedTuple):
    """A picture on disk, and its captions."""

    path: Path
    captions: tuple[str, ...]  # at least one, none of them empty
    weights: tuple[float, ...]  # one for each caption, positive, not normalised


class Drawn(NamedTuple):
    """A part of the built-in source: some of the scenes of seed 0.

    They are passed on as PNG, so that a checker finds exactly the colours that were drawn. The
    caption of a scene is also its specification, which `scenes_captions.parse` returns.
    """

    config: scenes.Config
    first: int
    scenes: int

    @property
    def bytes(self) -> int:
        """Roughly the size of their files."""
        return self.scenes * scenes.CANVASES[self.config.canvas].size ** 2 // 4

    def read(self) -> Iterator[Record | Fault]:
        """Draw the scenes."""
        for index in range(self.first, self.first + self.scenes):
            sample = scenes.sample(self.config, 0, index)
            yield Record(str(index), images.encode(sample.image, "png"), {"text": sample.caption})


def find(name: str, wanted: Columns, shard: int, stream: bool = False) -> Source:
    """Recognise the layout of a source and cut it into parts; no picture is read yet.

    Tried in this order: a tar or parquet file; a folder that `datasets.save_to_disk` wrote, one
    with metadata.jsonl or metadata.csv, one with tars, one with parquet files, one with pictures;
    `scenes:N` or `scenes:N:CANVAS`. If neither the path nor its parent folder exists, an
    `owner/name` is taken for a dataset on the Hugging Face hub.

    Errors  BadData if it cannot be read or has none of these layouts; BadRecipe for an unknown
            canvas or no scenes.
    """
    from daybreak.data import tables, tars

    path = Path(name)
    if path.is_file():
        if path.suffix == ".tar":
            return tars.parts([path], path.parent, name)
        if path.suffix == ".parquet":
            return tables.parquet([path], path.parent, name, wanted, shard)
        if folders.is_packed(name):
            raise BadData(
                f"{name}: is a compressed archive; unpack it, and give the folder or the .tar."
            )
        raise BadData(
            f"{name}: is neither .tar nor .parquet; give one of these, or a folder of pictures."
        )
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            raise BadData(f"{name}: holds several splits; give the folder of one of them.")
        if (path / "state.json").is_file():
            return tables.saved(path, name, wanted, shard)
        inner = [] if metadata_of(path) else folders.walk(path)
        packed = [path / one for one in inner if one.endswith(".tar")]
        listed = [path / one for one in inner if one.endswith(".parquet")]
        loose = [path / one for one in inner if folders.is_picture(one)]
        if loose and (other := packed or listed):  # tars and tables may mix: img2dataset does it
            remedy = (
                "write what it says into a metadata.jsonl there."
                if other[0].name == "metadata.parquet"  # `datasets` reads it for an imagefolder
                else "put them into folders of their own, and give both."
            )
            raise BadData(
                f"{name}: holds both pictures (such as {loose[0]}) and {other[0]}; {remedy}"
            )
        if packed:
            return folders.with_links(tars.parts(packed, path, name), path)
        if listed:
            return folders.with_links(tables.parquet(listed, path, name, wanted, shard), path)
        return folders.parts(path, name, shard)
    if drawn := DRAWN.fullmatch(name):
        return _drawn(name, int(drawn[1]), drawn[2], shard)
    if HUB.fullmatch(name) and not path.parent.exists():
        return tables.hub(name, wanted, shard, stream)
    raise BadData(
        f"{name}: there is no such file or folder; give one, scenes:N, or owner/name of the hub."
    )


def _drawn(name: str, count: int, canvas: str | None, shard: int) -> Source:
    try:
        config = scenes.Config.model_validate({"canvas": canvas} if canvas else {})
    except ValueError as error:
        listed = ", ".join(scenes.CANVASES)
        raise BadRecipe(f"{name}: there is no canvas {canvas!r}; there are {listed}") from error
    if not count:
        raise BadRecipe(f"{name}: asks for no scenes; write scenes:10000")
    parts = tuple(
        Drawn(config, first, min(shard, count - first)) for first in range(0, count, shard)
    )
    fingerprint = hashlib.sha256(f"{config.model_dump_json()} {count}".encode()).hexdigest()
    return Source(name, "scenes", fingerprint, parts)


def folder(path: Path, caption_columns: Sequence[tuple[str, float]] = ()) -> list[Captioned]:
    """All pictures of a folder, each with its captions, in the order of their names.

    `caption_columns` are (name, weight); without them the usual columns are used, as in `prepare`
    (data/captions). A list of texts counts as that many captions, each with an equal part of the
    weight; a list of keywords is one caption, joined by commas. Rows that name the same picture are
    merged as in `prepare`, but here even if they are not consecutive. Where a value is missing or
    empty, the picture lacks that caption and keeps its others. Pictures that the metadata does not
    name are not part of the dataset.

    Errors  BadData for a folder or a row that cannot be used, naming it; BadRecipe for a weight
            that is not a positive number.
    """
    for column, weight in caption_columns:
        if not (math.isfinite(weight) and weight > 0):
            raise BadRecipe(f"caption column `{column}` has weight {weight}; it must be positive.")
    folders.check_folder(path)
    metadata = metadata_of(path)
    if metadata:
        captioned = _from_metadata(metadata, caption_columns)
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
    """Open every picture and check its header, so that a bad one is found before the first step.

    Errors  BadData with the number of pictures that cannot be read, and up to five of them.
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
    rows = []
    for row, _ in rows_of(file):
        if isinstance(row, Fault):
            raise BadData(f"{file.parent / row.where}: {row.reason}")
        rows.append(row)
    if not rows:
        raise BadData(f"{file}: names no pictures; write one row for each, with `file_name`.")
    _check_columns(file, rows, caption_columns)
    named: dict[Path, list[Row]] = {}
    for row in rows:
        try:
            named.setdefault(folders.inside(file.parent, row), []).append(row)
        except Refused as fault:
            raise BadData(f"{file}:{row.line}: {fault}") from fault
    return [
        _captioned(file, picture, joined(first, others), caption_columns)
        for picture, (first, *others) in named.items()
    ]


def _captioned(
    file: Path, picture: Path, row: Row, caption_columns: Sequence[tuple[str, float]]
) -> Captioned:
    found = list[tuple[str, float]]()
    try:
        for name, weight in caption_columns or captions.usual(row.values):
            texts = captions.several(row.values.get(name), name)
            found += [(text, weight / len(texts)) for text in texts]
    except Refused as fault:
        raise BadData(f"{file}:{row.line}: {fault}") from fault
    return Captioned(
        picture, tuple(text for text, _ in found), tuple(weight for _, weight in found)
    )


def _side_by_side(path: Path) -> list[Captioned]:
    captioned, there = [], folders.walk(path)
    for name in there:
        picture = path / name
        if not folders.is_picture(name):
            continue
        if not folders.within(path, picture):
            raise BadData(f"{picture}: is a link that leads out of {path}; copy the picture.")
        caption = _caption_beside(path, folders.beside(picture, ".txt"))
        captioned.append(
            Captioned(picture, (caption,), (1.0,)) if caption else Captioned(picture, (), ())
        )
    if not captioned:
        packed = next((name for name in there if name.endswith((".tar", ".parquet"))), None)
        raise BadData(
            f"{path}: holds {packed} and no loose picture; `daybreak prepare {path} --out DATASET` "
            "makes a dataset of it."
            if packed
            else folders.no_pictures(path)
        )
    return captioned


def _caption_beside(path: Path, file: Path) -> str:
    if not file.is_file():
        return ""
    if not folders.within(path, file):
        raise BadData(f"{file}: is a link that leads out of {path}; copy the caption.")
    try:
        return captions.words(folders.contents(file), "text")
    except Refused as fault:
        raise BadData(f"{file}: {fault}") from fault


def _refuse_uncaptioned(path: Path, captioned: Sequence[Captioned]) -> None:
    bare = sorted(one.path.relative_to(path).as_posix() for one in captioned if not one.captions)
    if bare:
        others = f" (and {len(bare) - 1} more)" if len(bare) > 1 else ""
        raise BadData(
            f"{path / bare[0]}{others}: has no caption; write one, or remove the picture."
        )


def _check_columns(file: Path, rows: Sequence[Row], asked: Sequence[tuple[str, float]]) -> None:
    """Refuse requested columns that no row has; if none is requested, the lack of usual ones."""
    there = {name: None for row in rows for name in row.values if name != "file_name"}
    listed = ", ".join(f"`{name}`" for name in there) or "none"
    for name, _ in asked:
        if name not in there:
            raise BadData(f"{file}: has no column `{name}`; it has {listed}.")
    if not asked and there.keys().isdisjoint((*USUAL_COLUMNS, KEYWORDS)):
        raise BadData(
            f"{file}: has no column `text`, `caption` or `prompt`; name one of its own "
            f"({listed}) in `caption_columns`."
        )
