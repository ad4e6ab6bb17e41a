"""Captions: what is said stays as it is said, and what is no caption is refused by name."""

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daybreak.data import captions
from daybreak.data.records import Refused

IN_A_FILE = (
    "has no caption; write one into its row of the metadata, or without metadata into a "
    "file beside it, of the same name but for .txt."
)


@pytest.mark.parametrize(
    ("written", "clean"),
    [
        ("  a red\n\t square \r\n", "a red square"),
        ("salt &amp; pepper", "salt & pepper"),
        ("&amp;lt;b&amp;gt; twice escaped", "<b> twice escaped"),
        ("a\x00b\x1b[31m\x7f c", "ab[31m c"),
        ("\ufeffan apple\u00a0pie\u2028on a\u3000plate", "an apple pie on a plate"),
        ("Neon sign: 'OPEN 24/7' #42 (closed)", "Neon sign: 'OPEN 24/7' #42 (closed)"),
        ("猫と犬 — ein Kätzchen", "猫と犬 — ein Kätzchen"),
        ("قطة \u202eحمراء\u202c", "قطة \u202eحمراء\u202c"),
        ("family 👨\u200d👩\u200d👦", "family 👨\u200d👩\u200d👦"),
    ],
)
def test_cleaning_takes_nothing_that_a_prompt_may_ask_for(written: str, clean: str) -> None:
    assert captions.clean(written) == clean


@given(st.text())
def test_cleaning_twice_is_cleaning_once_where_no_entity_is_left(text: str) -> None:
    once = captions.clean(text)
    if html.unescape(once) == once:
        assert captions.clean(once) == once
    assert "\n" not in once
    assert once == once.strip()


def test_the_usual_columns_are_the_first_of_sentences_and_the_keywords() -> None:
    row = {"prompt": "p", "caption": "c", "keywords": ["warm", " yellow ", ""], "other": "o"}
    found = captions.read(row)
    assert found.texts == ("c", "warm, yellow")
    assert found.weights == (captions.USUAL_WEIGHT, captions.KEYWORDS_WEIGHT)
    assert captions.read({"keywords": [], "text": "t"}).texts == ("t",)
    assert captions.read({"keywords": ["sun"]}).texts == ("sun",)


def test_columns_that_are_asked_for_are_taken_with_their_weights() -> None:
    row = {"text": "t", "long": "l", "short": None}
    found = captions.read(row, [("long", 0.5), ("short", 0.3), ("text", 0.2)])
    assert found == (("l", "t"), (0.5, 0.2), ())


def test_bytes_are_utf_8() -> None:
    assert captions.read({"text": "\ufeffÄpfel\n".encode()}).texts == ("Äpfel",)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, IN_A_FILE),
        ({"n": 1}, "has no caption; there is no `text`, `caption`, `prompt` or `keywords`."),
        ({"text": ""}, "has no caption; its `text` is empty."),
        ({"text": "  \n ", "keywords": []}, "has no caption; its `text` and `keywords` are empty."),
        ({"text": None}, "has no caption; its `text` is empty."),
        ({"text": "\x00\x01"}, "has no caption; its `text` is empty."),
        ({"text": 3}, "column `text` holds 3; a caption is a text or a list of texts."),
        (
            {"text": {"a": 1}},
            'column `text` holds {"a": 1}; a caption is a text or a list of texts.',
        ),
        (
            {"keywords": ["a", 1]},
            'column `keywords` holds ["a", 1]; a caption is a text or a list of texts.',
        ),
        (
            {"text": "Kätzchen".encode("latin-1")},
            "its `text` is not UTF-8 (byte 1); save it as UTF-8.",
        ),
        ({"text": "half a \ud83d face"}, "its `text` is not valid Unicode (at 7)."),
        ({"text": "x" * 100_000}, "its `text` has 100,000 characters; --max-caption takes 8,000."),
    ],
)
def test_what_is_no_caption_is_refused_with_the_reason(row: dict[str, object], reason: str) -> None:
    with pytest.raises(Refused) as caught:
        captions.read(row)
    assert str(caught.value) == reason
    assert caught.value.kind == "caption"


def test_lengths_count_after_cleaning() -> None:
    assert captions.read({"text": " ab   c "}, shortest=4, longest=4).texts == ("ab c",)
    with pytest.raises(Refused, match="has 4 characters; --min-caption asks for 5"):
        captions.read({"text": " ab   c "}, shortest=5)


def test_one_bad_caption_is_lost_and_the_picture_goes_on_with_the_other() -> None:
    found = captions.read({"text": 3, "keywords": ["sun"]})
    assert found.texts == ("sun",)
    assert found.faults == ("column `text` holds 3; a caption is a text or a list of texts.",)


@pytest.mark.parametrize("blank", [" ", "\n", [""], [], "\x00", None, float("nan")])
def test_a_blank_column_gives_way_to_the_next(blank: object) -> None:
    assert captions.read({"text": blank, "caption": "a dog"}).texts == ("a dog",)


def test_a_list_of_captions_shares_the_weight_of_its_column() -> None:
    found = captions.read({"long": ["a", "b"], "short": "c"}, [("long", 0.6), ("short", 0.4)])
    assert found == (("a", "b", "c"), (0.3, 0.3, 0.4), ())


def test_tags_are_one_caption() -> None:
    assert captions.read({"tags": ["a", "b"]}, [("tags", 1.0)]).texts == ("a, b",)
