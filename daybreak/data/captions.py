"""The captions of a picture, each with its weight.

A picture may have several, from the requested columns; each time, training draws one of them by
weight. A list of texts in a column counts as that many captions, which share the column's weight; a
list of keywords or tags is one caption. If no columns are requested, the first of `text`, `caption`
and `prompt` that the picture has gets weight 0.9 and its `keywords`, if any, 0.1: whole sentences
teach most, and a few bare words keep short prompts working.

Cleaning is light. HTML entities are decoded, control characters removed, and each run of white
space becomes one space; words, case, digits and scripts stay, as a prompt may use any of them.
"""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from daybreak.data.records import Refused

USUAL_COLUMNS = ("text", "caption", "prompt")
KEYWORDS = "keywords"
LISTS = (KEYWORDS, "tags")  # columns in which a list is one caption
USUAL_WEIGHT, KEYWORDS_WEIGHT = 0.9, 0.1

CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]+")  # but white space


class Captions(NamedTuple):
    """The captions of a picture, and what was wrong with captions that were left out."""

    texts: tuple[str, ...]  # at least one, none of them empty
    weights: tuple[float, ...]
    faults: tuple[str, ...]  # one sentence each


def clean(text: str) -> str:
    """The text on one line, with HTML entities decoded and without control characters."""
    text = html.unescape(html.unescape(text))
    return " ".join(CONTROL.sub("", text).split())


def several(value: object, column: str) -> list[str]:
    """The captions in one cell, cleaned; empty ones are left out.

    A list counts as that many captions, but in a column of keywords or tags as one.

    Errors  Refused, as for `words`.
    """
    if isinstance(value, list) and column not in LISTS:
        return [text for one in value if (text := words(one, column))]
    text = words(value, column)
    return [text] if text else []


def words(value: object, column: str) -> str:
    """The caption in one cell, cleaned; empty if there is none. A list is joined by commas.

    Errors  Refused for a value that is not text, or not UTF-8.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _refused(
                f"its `{column}` is not UTF-8 (byte {error.start}); save it as UTF-8."
            ) from error
    if isinstance(value, str):
        _check_unicode(value, column)
        return clean(value)
    if isinstance(value, list):
        texts = [one for one in value if isinstance(one, str)]
        if len(texts) == len(value):
            for one in texts:
                _check_unicode(one, column)
            return ", ".join(filter(None, map(clean, texts)))
    raise _refused(
        f"column `{column}` holds {_shown(value)}; a caption is a text or a list of texts."
    )


def read(
    columns: Mapping[str, object],
    asked: Sequence[tuple[str, float]] = (),
    shortest: int = 1,
    longest: int = 8000,
) -> Captions:
    """The captions of one picture, of `shortest` to `longest` characters each.

    One that cannot be used is left out and listed in `faults`; the picture keeps the others.

    Errors  Refused, with the first fault, if none is left.
    """
    kept: list[tuple[str, float]] = []
    faults = list[str]()
    for column, weight in asked or usual(columns):
        try:
            said = several(columns.get(column), column)
        except Refused as fault:
            faults.append(str(fault))
            continue
        wrong = [_wrong_length(text, column, shortest, longest) for text in said]
        faults += filter(None, wrong)
        mine = [text for text, fault in zip(said, wrong, strict=True) if not fault]
        kept += [(text, weight / len(mine)) for text in mine]
    if not kept:
        raise Refused(faults[0] if faults else _nothing(columns, asked), "caption")
    texts, weights = zip(*kept, strict=True)
    return Captions(texts, weights, tuple(faults))


def usual(columns: Mapping[str, object]) -> list[tuple[str, float]]:
    """A picture's usual columns, one of sentences and one of keywords, with their weights."""
    first = next((name for name in USUAL_COLUMNS if _told(columns.get(name))), None)
    sentences = [(first, USUAL_WEIGHT)] if first else []
    keywords = [(KEYWORDS, KEYWORDS_WEIGHT)] if _told(columns.get(KEYWORDS)) else []
    return sentences + keywords


def _told(value: object) -> bool:
    """Whether a value is not empty: a caption, or something that must be reported as a fault."""
    if isinstance(value, list):
        return any(map(_told, value))
    if isinstance(value, float):
        return not math.isnan(value)  # NaN is an empty cell of a table
    return bool(clean(value)) if isinstance(value, str) else value is not None


def _wrong_length(text: str, column: str, shortest: int, longest: int) -> str | None:
    """What is wrong with the length of a caption, if anything."""
    if len(text) > longest:
        return f"its `{column}` has {len(text):,} characters; --max-caption takes {longest:,}."
    if len(text) < shortest:
        return f"its `{column}` has {len(text):,} characters; --min-caption asks for {shortest:,}."
    return None


def _check_unicode(text: str, column: str) -> None:
    """Refuse half a character (a lone surrogate): JSON can hold it, but no file can be written."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _refused(f"its `{column}` is not valid Unicode (at {error.start}).") from error


def _nothing(columns: Mapping[str, object], asked: Sequence[tuple[str, float]]) -> str:
    names = [name for name, _ in asked] or [*USUAL_COLUMNS, KEYWORDS]
    there = [name for name in names if name in columns]
    if not columns:
        return (
            "has no caption; write one into its row of the metadata, or without metadata into a "
            "file beside it, of the same name but for .txt."
        )
    if there:
        return f"has no caption; its {_listed(there)} {'is' if len(there) == 1 else 'are'} empty."
    return f"has no caption; there is no {_listed(names, 'or')}."


def _listed(names: Sequence[str], word: str = "and") -> str:
    quoted = [f"`{name}`" for name in names]
    return f" {word} ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))


def _refused(sentence: str) -> Refused:
    return Refused(sentence, "caption")


def _shown(value: object) -> str:
    """A value, shortened to a few characters."""
    return json.dumps(value, default=lambda other: type(other).__name__)[:60]
