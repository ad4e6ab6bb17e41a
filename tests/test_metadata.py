"""Every row of a folder's table is read or named, from whichever row one begins."""

import csv
import json
from pathlib import Path

import pytest

from daybreak.data.metadata import Place, Row, rows_of, stretch
from daybreak.data.records import Fault
from daybreak.failure import BadData

NAMED = [{"file_name": f"{name}.png", "text": f"two\nlines, of {name}"} for name in "abcd"]


def table(path: Path, mark: str = ",", quoted: bool = False) -> Path:
    """The rows of NAMED, with empty lines among them where those mean nothing."""
    if path.suffix == ".jsonl":
        path.write_text("\ufeff" + "\n\n".join(map(json.dumps, NAMED)) + "\n", encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            dialect = csv.unix_dialect if quoted else csv.excel
            rows = csv.DictWriter(file, ["file_name", "text"], dialect=dialect, delimiter=mark)
            rows.writeheader()
            rows.writerows(NAMED)
    return path


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_from_the_place_after_each_row_the_others_follow(tmp_path: Path, name: str) -> None:
    file = table(tmp_path / name)
    whole = list(rows_of(file))
    assert [row.values for row, _ in whole if isinstance(row, Row)] == NAMED
    for number, (_, after) in enumerate(whole, start=1):
        assert list(rows_of(file, after)) == whole[number:]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("quoted", [True, False])
def test_cells_may_stand_apart_as_spreadsheets_put_them(
    tmp_path: Path, mark: str, quoted: bool
) -> None:
    file = table(tmp_path / "metadata.csv", mark, quoted)
    whole = list(rows_of(file))
    assert [row.values for row, _ in whole if isinstance(row, Row)] == NAMED
    assert list(rows_of(file, whole[1][1])) == whole[2:]


def test_a_header_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text('"name"|"text"\na|b\n')
    with pytest.raises(BadData, match="its header is not CSV"):
        list(rows_of(tmp_path / "metadata.csv"))


def test_rows_that_follow_one_another_and_name_one_picture_are_one(tmp_path: Path) -> None:
    rows = [("a", "x"), ("a", "y"), ("b", "x"), ("a", "z")]
    lines = [json.dumps({"file_name": name, "text": text, "by": "me"}) for name, text in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert list(stretch(tmp_path / "metadata.jsonl", Place(), 3)) == [
        Row(1, {"file_name": "a", "text": ["x", "y"], "by": "me"}),
        Row(3, {"file_name": "b", "text": "x", "by": "me"}),
    ]


def test_every_bad_line_of_csv_is_named(tmp_path: Path) -> None:
    lines = [
        b"file_name,text",
        b"a.png,one,two",
        b'a.png,"quoted" badly',
        b"a.png," + b"x" * 200_000,
        b"a.png,K\xe4tzchen",
        b"",
        b"a.png",
        b"b.png,fine",
    ]
    (tmp_path / "metadata.csv").write_bytes(b"\r\n".join(lines) + b"\r\n")
    found = [row for row, _ in rows_of(tmp_path / "metadata.csv")]
    faults, good = found[:4], found[4:]
    assert [(one.where, one.kind) for one in faults if isinstance(one, Fault)] == [
        ("metadata.csv:2", "metadata"),
        ("metadata.csv:3", "metadata"),
        ("metadata.csv:4", "metadata"),
        ("metadata.csv", "metadata"),
    ]
    assert good == [
        Row(7, {"file_name": "a.png"}),
        Row(8, {"file_name": "b.png", "text": "fine"}),
    ]
