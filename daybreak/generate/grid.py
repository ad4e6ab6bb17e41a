"""A contact sheet: pictures in rows, with a label under each and an optional title.

Small pictures are enlarged by a whole number, each pixel to a square, so that the network's own
pixels are visible. `save` writes a sheet or a single picture as a PNG; the caller's metadata, such
as prompt and seed, become text chunks.

Shapes  images (n, h, w, 3), or a list of (h, w, 3).     Units  uint8, sRGB; lengths in pixels.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from daybreak.data import disk

PAPER, INK, FRAME = (244, 244, 241), (52, 52, 50), (214, 214, 208)
AT_LEAST = 128  # smallest side of a picture on the sheet
LINES = 3  # most lines of a label

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def grid(
    images: npt.NDArray[np.uint8] | Sequence[npt.NDArray[np.uint8]],
    labels: Sequence[str],
    columns: int | None = None,
    title: str | None = None,
) -> Image.Image:
    """Return the sheet.

    Labels wrap within the width of their picture and end in an ellipsis after three lines. Pictures
    of different sizes are centred in cells of the largest size.

    Errors  ValueError if there are no pictures, or if pictures and labels differ in number.
    """
    if len(images) == 0:
        raise ValueError("a grid needs at least one picture")
    if len(labels) != len(images):
        raise ValueError(f"{len(images)} pictures, {len(labels)} labels")

    factor = math.ceil(AT_LEAST / max(max(image.shape[:2]) for image in images))
    cell_height = factor * max(image.shape[0] for image in images)
    cell_width = factor * max(image.shape[1] for image in images)
    columns = min(columns or _columns(len(images)), len(images))
    rows = math.ceil(len(images) / columns)

    size = max(13, cell_width // 14)
    font, title_font = ImageFont.load_default(size), ImageFont.load_default(round(1.5 * size))
    gap, leading = size, round(1.3 * size)
    wrapped = [_wrap(label, font, cell_width) for label in labels]
    lines = [max(map(len, wrapped[row * columns : (row + 1) * columns])) for row in range(rows)]
    label_heights = [count * leading + (gap // 2 if count else 0) for count in lines]

    margin = 2 * gap
    width = 2 * margin + columns * cell_width + (columns - 1) * gap
    titled = _wrap(title, title_font, width - 2 * margin) if title else []
    top = margin + len(titled) * 2 * size + (gap if titled else 0)
    height = top + sum(cell_height + extra + gap for extra in label_heights) - gap + margin

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(titled):
        draw.text((margin, margin + i * 2 * size), line, INK, title_font)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        x = margin + column * (cell_width + gap)
        y = top + sum(cell_height + extra + gap for extra in label_heights[:row])
        high, wide = factor * image.shape[0], factor * image.shape[1]
        left, up = x + (cell_width - wide) // 2, y + (cell_height - high) // 2
        draw.rectangle((left - 1, up - 1, left + wide, up + high), outline=FRAME)
        large = Image.fromarray(image).resize((wide, high), Image.Resampling.NEAREST)
        sheet.paste(large, (left, up))
        below = y + cell_height + gap // 2
        for k, line in enumerate(wrapped[i]):
            draw.text((x, below + k * leading), line, INK, font)
    return sheet


def save(image: Image.Image, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a PNG with its metadata as text chunks, atomically."""
    chunks = PngInfo()
    for key, text in metadata.items():
        if text.isascii():
            chunks.add_text(key, text)
        else:
            chunks.add_itxt(key, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.fresh(path) as staged:
        image.save(staged, "PNG", pnginfo=chunks)


def _columns(count: int) -> int:
    """Columns of a sheet about 1.5 times as wide as high, preferably without empty cells."""
    wanted = math.sqrt(1.5 * count)
    whole = [c for c in range(math.ceil(math.sqrt(count)), count + 1) if count % c == 0]
    best = min(whole, key=lambda c: abs(c - wanted))
    return best if best <= 2 * wanted else math.ceil(wanted)


def _wrap(label: str, font: Font, width: int) -> list[str]:
    """Break the label into lines no wider than `width`."""
    lines: list[str] = []
    words = label.split()
    while words:
        fitting = len(words)
        while fitting > 1 and font.getlength(" ".join(words[:fitting])) > width:
            fitting -= 1
        if len(lines) == LINES - 1 and fitting < len(words):
            return [*lines, _shorten(" ".join(words), font, width)]
        lines.append(_shorten(" ".join(words[:fitting]), font, width))
        words = words[fitting:]
    return lines


def _shorten(line: str, font: Font, room: int) -> str:
    if font.getlength(line) <= room:
        return line
    while line and font.getlength(line + "…") > room:
        line = line[:-1]
    return line.rstrip(" ,.;:") + "…"
