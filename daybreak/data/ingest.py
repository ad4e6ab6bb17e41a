"""Each input becomes one stored picture, or one rejection with its reason.

    skip list, licence, captions      checks that need no pixels come first
    header                            format, bombs, and whether the picture fits a bucket
    pixels                            decoded, turned upright, converted to sRGB on a background
    stored                            scaled once so that it just covers its bucket, and encoded

What extends beyond the bucket is stored too: dice decide where to crop each time the picture is
loaded. A picture smaller than its bucket is stored unscaled. Rejections depend only on the file,
its size, captions and licence and the user's skip list; nothing is judged by its quality.

With `auto`, JPEG input is stored as JPEG of quality 92. Other input is stored as PNG if that takes
at most twice the bytes of the JPEG, as for drawings, whose hard edges JPEG blurs. If not, it is
stored as JPEG too, which takes a third of the bytes and of the decoding time, with no effect on
training that shows for photographs.

Kinds of rejection here: skipped, licence, caption, small, aspect, and those of data/images (format,
damaged, bomb, pixels); the kinds of the readers are in data/records.

Source  JPEG 92 against PNG, upscale to 4/3, aspects to 2: huggingface.co/blog/Photoroom, PRX parts
        2 and 4.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import ImageColor
from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator

from daybreak.data import buckets, captions, disk, duplicates, images, records
from daybreak.data.records import LICENCES, Fault, Record, Refused, printable

Picture = npt.NDArray[np.uint8]

LOSSLESS = 2.0  # a PNG may have at most this many times the bytes of the JPEG
BATCH_ROWS, BATCH_BYTES = 100, 32 * 2**20  # at most held before they are written


class Config(BaseModel):
    """Everything that decides what is stored. `settled` replaces `resolution` and `unit` if 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resolution: int = Field(default=0, ge=0)
    unit: int = Field(default=0, ge=0)
    max_aspect: float = Field(default=2.0, ge=1, le=16)
    max_crop: float = Field(default=0.15, ge=0, lt=1)
    max_upscale: float = Field(default=4 / 3, ge=1)
    min_side: int = Field(default=0, ge=0)
    caption_columns: tuple[tuple[str, float], ...] = ()
    min_caption: int = Field(default=1, ge=1)
    max_caption: int = Field(default=8000, ge=1)
    image_column: str | None = None
    licence_column: str | None = None
    licences: tuple[str, ...] = ()
    skip: frozenset[str] = frozenset()
    format: Literal["auto", "jpeg", "webp", "png"] = "auto"
    background: tuple[int, int, int] = images.WHITE
    near: int = Field(default=4, ge=0, le=16)
    shard: int = Field(default=1024, ge=1)
    stream: bool = False

    @field_validator("caption_columns", mode="before")
    @classmethod
    def _weighed(cls, value: Any) -> Any:
        """Read `text:0.9` as a column and its weight, and `text` as a column of weight 1."""
        return [_weighed(one) if isinstance(one, str) else one for one in value]

    @field_validator("background", mode="before")
    @classmethod
    def _coloured(cls, value: Any) -> Any:
        """Accept the name of a colour, or #rrggbb."""
        return ImageColor.getrgb(value)[:3] if isinstance(value, str) else value

    @field_serializer("skip")
    def _in_order(self, value: frozenset[str]) -> list[str]:
        return sorted(value)


def _weighed(text: str) -> tuple[str, float]:
    name, colon, weight = text.rpartition(":")
    try:
        found = (name, float(weight)) if colon else (text, 1.0)
    except ValueError:
        raise ValueError(f"{text!r} is no column with a weight, such as text:0.9") from None
    if not (found[0] and math.isfinite(found[1]) and found[1] > 0):
        raise ValueError(f"{text!r} needs a name, and a weight above 0")
    return found


class Shard(NamedTuple):
    """The result of storing one part of a source."""

    kept: int
    rejected: tuple[dict[str, str], ...]
    captions_lost: int  # unusable captions of pictures that have other, usable ones
    bytes: int
    sha256: str


def take(record: Record, source: str, config: Config) -> tuple[dict[str, Any], int]:
    """Make a row of the dataset from a record; also return how many of its captions were lost.

    Errors  Refused, with the kind and the sentence for the list of rejected inputs.
    """
    digest = hashlib.sha256(record.data).hexdigest()
    if not {record.where, digest, digest[:16]}.isdisjoint(config.skip):
        raise Refused("is on the skip list.", "skipped")
    licence = _licence(record, config)
    said = captions.read(
        record.columns, config.caption_columns, config.min_caption, config.max_caption
    )
    height, width = images.size(record.data, record.where)
    _check_size(height, width, config)
    scale = fitted(height, width, config)[1]
    shrink = next((by for by in (8, 4, 2) if by * scale <= 0.5), 1)
    picture = images.decode(record.data, record.where, config.background, shrink)
    height, width = picture.shape[:2]  # upright now, and perhaps smaller
    bucket, scale = fitted(height, width, config)
    if scale < 1:
        high, wide = math.floor(height * scale + 1e-6), math.floor(width * scale + 1e-6)
        picture = images.fit(picture, max(bucket.height, high), max(bucket.width, wide))
    row = {
        "id": digest[:16],
        "image": {"bytes": _encoded(picture, record.data, config), "path": None},
        "height": picture.shape[0],
        "width": picture.shape[1],
        "bucket": bucket.name,
        "captions": list(said.texts),
        "caption_weights": list(said.weights),
        "source": source,
        "where": record.where,
        "licence": licence,
        "hash": duplicates.perceptual_hash(picture),
    }
    return row, len(said.faults)


def fitted(height: int, width: int, config: Config) -> tuple[buckets.Bucket, float]:
    """The bucket of a picture, and the scale at which the picture just covers it."""
    choice = buckets.buckets(config.resolution, config.unit, config.max_aspect)
    bucket = buckets.nearest(choice, height, width)
    return bucket, max(bucket.height / height, bucket.width / width)


def _check_size(height: int, width: int, config: Config) -> None:
    """Errors: Refused if a picture is too small, or too long for every bucket."""
    bucket, scale = fitted(height, width, config)
    lost = buckets.cropped(bucket, height, width)
    size, fills = f"is {width} x {height}", f"{bucket.width} x {bucket.height}"
    if min(height, width) < config.min_side:
        raise Refused(f"{size}; --min-side asks for {config.min_side} px.", "small")
    if lost > config.max_crop:
        remedy = (
            f"--max-aspect {config.max_aspect:g} makes no longer ones."
            if max(height, width) > config.max_aspect * min(height, width)
            else "A smaller --unit or a larger --resolution makes finer shapes."
        )
        raise Refused(
            f"{size}; its nearest bucket, {fills}, would cut away {lost:.0%} of it, and "
            f"--max-crop allows {config.max_crop:.0%}. {remedy}",
            "aspect",
        )
    if scale > config.max_upscale:
        raise Refused(
            f"{size}; to fill {fills} it would be enlarged {scale:.2f} times, and --max-upscale "
            f"allows {config.max_upscale:.2f}.",
            "small",
        )


def store(
    part: records.Part,
    source: str,
    config: Config,
    schema: pa.Schema,
    path: Path,
    tick: Callable[[int, int, int], None],
) -> Shard:
    """Write the pictures of a part to an Arrow file, holding only a few of them at a time.

    `tick` gets, after each input, inputs read, inputs rejected and bytes read since the last.
    """
    rows: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    kept = lost = held = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for item in part.read():
            try:
                if isinstance(item, Fault):
                    raise Refused(item.reason, item.kind)
                row, faults = take(item, source, config)
            except Refused as fault:
                reason = str(fault).removeprefix(f"{item.where}: ")
                rejected.append(
                    {"source": source, "where": item.where, "kind": fault.kind, "reason": reason}
                )
                tick(1, 1, len(item.data) if isinstance(item, Record) else 0)
                continue
            rows.append(row)
            kept, lost, held = kept + 1, lost + faults, held + len(row["image"]["bytes"])
            if len(rows) == BATCH_ROWS or held >= BATCH_BYTES:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
                rows, held = [], 0
            tick(1, 0, len(item.data))
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
    return Shard(kept, tuple(rejected), lost, path.stat().st_size, disk.sha256(path))


def features() -> Any:
    """The columns of a prepared dataset, as `datasets` describes them."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    return Features(
        {
            "id": text,
            "image": Image(),
            "height": Value("int32"),
            "width": Value("int32"),
            "bucket": text,
            "captions": List(text),
            "caption_weights": List(Value("float32")),
            "source": text,
            "where": text,
            "licence": text,
            "hash": Value("int64"),
        }
    )


def _licence(record: Record, config: Config) -> str:
    """The licence of a picture. Errors: Refused if it is not one of the allowed ones."""
    names = (config.licence_column,) if config.licence_column else LICENCES
    found = next((record.columns[name] for name in names if record.columns.get(name)), "")
    licence = captions.clean(printable(str(found)))
    allowed = {name.casefold() for name in config.licences}
    if allowed and licence.casefold() not in allowed:
        has = f"has the licence {licence!r}" if licence else "states no licence"
        raise Refused(f"{has}; --licence allows {', '.join(config.licences)}.", "licence")
    return licence


def _encoded(picture: Picture, original: bytes, config: Config) -> bytes:
    if config.format != "auto":
        return images.encode(picture, config.format)
    jpeg = images.encode(picture, "jpeg")
    if original.startswith(b"\xff\xd8"):
        return jpeg
    png = images.encode(picture, "png")
    return png if len(png) <= LOSSLESS * len(jpeg) else jpeg
