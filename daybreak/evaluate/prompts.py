"""Pictures of a user's own prompts: files, labelled sheets, and CLIPScore if there is a CLIP.

    FOLDER/0007-1.png       second picture of the eighth prompt; prompt and seed are in the file
    FOLDER/prompts.jsonl    one line for each picture, so that other programs can score the folder
    FOLDER/grid-0.png       sheets of about SHEET pictures; a prompt is never split over two sheets

A list of prompts is UTF-8 text with one prompt per line, or (.jsonl) JSON lines with a `prompt`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from daybreak.evaluate import clip_score
from daybreak.evaluate.artist import Artist, square
from daybreak.evaluate.clip_score import Clip
from daybreak.evaluate.distances import Estimate
from daybreak.evaluate.features import fit
from daybreak.evaluate.statistics import cluster_bootstrap
from daybreak.evaluate.suite import Progress, Result
from daybreak.failure import BadData, BadStorage
from daybreak.generate import grid

SHEET = 64  # most pictures on a sheet, unless a single prompt has more
SHOWN = 256  # largest side of a picture on a sheet


class Prompts(NamedTuple):
    """The prompts in order, and the sha256 of their file.

    `rows` are the parsed lines, which may hold more than a prompt.
    """

    texts: list[str]
    digest: str
    rows: list[Any]


def read(file: Path) -> Prompts:
    """Read a list of prompts.

    Only a newline ends a line: a prompt may contain other Unicode line separators.

    Errors  BadData, with the line, for a file that is missing, empty or not UTF-8, and for a line
            that is empty or has no prompt; also for any .json file.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BadData(f"cannot read the prompts {file}: {error.strerror}") from error
    form = file.suffix.lower()
    if form == ".json":
        raise BadData(
            f'{file} is no list of prompts: write one {{"prompt": "..."}} a line into a file whose '
            "name ends in .jsonl, or plain text into one that ends in .txt"
        )
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        place = data[: error.start].count(b"\n") + 1
        raise BadData(
            f"{file}, line {place}: byte {data[error.start]:#04x} is not UTF-8: save the file as "
            "UTF-8"
        ) from error
    if not lines[-1]:  # what follows the last newline
        lines.pop()
    if not lines:
        raise BadData(f"{file} holds no prompts")
    texts, rows = [], []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            raise BadData(f"{file}, line {number} is empty: give a prompt or remove it")
        row = _row(text, f"{file}, line {number}") if form == ".jsonl" else text.strip()
        rows.append(row)
        texts.append(row if isinstance(row, str) else row["prompt"])
    return Prompts(texts, hashlib.sha256(data).hexdigest(), rows)


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadData(f"{where} is not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise BadData(f'{where} has no prompt: write {{"prompt": "..."}}')
    return row


def prompts(
    artist: Artist,
    asked: Prompts,
    folder: Path,
    each: int = 4,
    clip: Clip | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Draw every prompt `each` times; with a CLIP, score the pictures.

    Errors  BadStorage if the folder cannot be written.
    """
    texts = [text for text in asked.texts for _ in range(each)]
    scores, cut, lines = [], 0, []
    draw, size = square(artist), max(SHEET // each, 1) * each
    for sheet, first in enumerate(range(0, len(texts), size)):
        some = texts[first : first + size]
        seeds = list(range(seed + first, seed + first + len(some)))
        pictures = draw(some, seeds)
        labels, found = some, None
        if clip is not None:
            found = clip_score.score(clip, pictures, some)
            scores.append(found.values)
            cut += found.cut
            labels = [f"{s:.1f}  {text}" for s, text in zip(found.values, some, strict=True)]
        names = [f"{(first + i) // each:04}-{(first + i) % each}.png" for i in range(len(some))]
        for i, (name, text, number) in enumerate(zip(names, some, seeds, strict=True)):
            line = {"file_name": name, "prompt": text, "seed": number}
            lines.append(line if found is None else line | {"clip_score": float(found.values[i])})
            facts = {"prompt": text, "seed": str(number), "weights": artist.digest[:16]}
            _save(Image.fromarray(pictures[i]), folder / name, facts)
        _save(_sheet(pictures, labels, each), folder / f"grid-{sheet}.png", {})
        if progress is not None:
            progress(first + len(some), len(texts))
    _list(folder / "prompts.jsonl", lines)

    details = {"prompts": asked.digest, "each": each, "folder": str(folder)}
    if clip is None:
        return Result({}, len(texts), details, ["no --clip was given: there is nothing to score"])
    every = np.concatenate(scores)
    low, high = cluster_bootstrap(every, texts)
    remarks = [f"{cut} pictures have a prompt longer than CLIP reads"] if cut else []
    values = {"clip_score": Estimate(float(every.mean()), low, high)}
    details |= {"clip": clip.pictures.digest}
    return Result(values, len(texts), details, remarks)


def _list(path: Path, lines: list[dict[str, Any]]) -> None:
    try:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadStorage(f"cannot write {path}: {error.strerror}") from error


def _save(picture: Image.Image, path: Path, facts: dict[str, str]) -> None:
    try:
        grid.save(picture, path, facts)
    except OSError as error:
        raise BadStorage(f"cannot write {path}: {error.strerror}") from error


def _sheet(pictures: npt.NDArray[np.uint8], labels: list[str], each: int) -> Image.Image:
    """A sheet with a row per prompt if `each` is at least 3; pictures are reduced to SHOWN."""
    shown = list(pictures)
    if pictures.shape[1] > SHOWN:
        shown = [fit(picture, SHOWN, SHOWN) for picture in pictures]
    return grid.grid(shown, labels, each if each > 2 else None)
