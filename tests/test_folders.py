"""Every file of a folder is read or named, and nothing outside it is touched."""

import csv
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from daybreak.data import folders, records
from daybreak.data.records import Fault, Record
from daybreak.failure import BadData


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return path


def read(path: Path, shard: int = 2) -> list[Record | Fault]:
    parts = folders.parts(path, "source", shard).parts
    return [record for part in parts for record in part.read()]


def named(found: list[Record | Fault]) -> list[tuple[str, str]]:
    return [(one.where, one.kind if isinstance(one, Fault) else "record") for one in found]


def jsonl(folder: Path, *rows: object) -> None:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def test_pictures_come_with_the_texts_beside_them(tmp_path: Path) -> None:
    picture(tmp_path / "b.png").with_suffix(".txt").write_text("b")
    picture(tmp_path / "a.JPG").with_suffix(".json").write_text('{"caption": "a", "license": "PD"}')
    picture(tmp_path / "deep" / "er" / "c.webp")
    for name in (".hidden.png", ".cache/d.png", "__MACOSX/e.png"):
        picture(tmp_path / name)
    (tmp_path / "README.md").write_text("no picture")
    (tmp_path / "stats.json").write_text("{}")
    found = read(tmp_path)
    assert found == [
        Record("a.JPG", (tmp_path / "a.JPG").read_bytes(), {"caption": "a", "license": "PD"}),
        Record("b.png", (tmp_path / "b.png").read_bytes(), {"text": b"b"}),
        Record("deep/er/c.webp", (tmp_path / "deep/er/c.webp").read_bytes(), {}),
    ]
    assert len(folders.parts(tmp_path, "source", 2).parts) == 2


def test_a_name_finds_its_picture_however_its_accents_are_spelt(tmp_path: Path) -> None:
    joined, apart = "\u00f3.png", "o\u0301.png"  # the second as disks of macOS once had it
    for there, said in ((joined, apart), (apart, joined)):
        folder = picture(tmp_path / said / there).parent
        jsonl(folder, {"file_name": said, "text": "o"})
        assert named(read(folder)) == [(there, "record")]
    picture(tmp_path / apart / apart)
    assert named(read(tmp_path / apart)) == [(apart, "record"), (joined, "unnamed")]


def test_what_is_no_picture_in_a_folder_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "fine.png")
    outside = picture(tmp_path.parent / f"{tmp_path.name}-outside.png")
    (tmp_path / "lonely.txt").write_text("a text without a picture")
    (tmp_path / "drawing.svg").write_text("<svg></svg>")
    (tmp_path / "phone.HEIC").write_bytes(b"....ftypheic")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(outside)
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    picture(tmp_path / "captioned.png").with_suffix(".txt").symlink_to(outside)
    picture(tmp_path / "broken.png").with_suffix(".json").write_text("{")
    with (tmp_path / "giant.png").open("wb") as file:
        file.truncate(records.LARGEST + 1)
    assert named(read(tmp_path)) == [
        ("broken.png", "metadata"),
        ("captioned.png", "unsafe"),
        ("dangling.png", "missing"),
        ("drawing.svg", "format"),
        ("fine.png", "record"),
        ("giant.png", "bomb"),
        ("link.png", "unsafe"),
        ("lonely.txt", "missing"),
        ("phone.HEIC", "format"),
        ("pipe.png", "missing"),
    ]


def test_a_name_that_is_no_utf_8_is_written_with_escapes(tmp_path: Path) -> None:
    picture(tmp_path / os.fsdecode(b"K\xe4tz.png"))
    (tmp_path / os.fsdecode(b"K\xe4tz.txt")).write_text("x")
    (one,) = read(tmp_path)
    assert one.where == "K\\udce4tz.png"
    one.where.encode()


def test_rows_come_in_their_order_whatever_the_cut(tmp_path: Path) -> None:
    names = ["c.png", "a.png", "deep/b.png", "d.png", "e.png"]
    for name in names:
        picture(tmp_path / name)
    rows = [{"file_name": name, "text": f"of {name}", "n": 3} for name in names]
    jsonl(tmp_path, *rows[:2], b"", *rows[2:], b"  ")
    for shard in (1, 2, 5, 100):
        found = read(tmp_path, shard)
        assert [one.where for one in found] == names
        assert all(isinstance(one, Record) and one.columns["n"] == 3 for one in found)
    assert [len(folders.parts(tmp_path, "s", shard).parts) for shard in (1, 2, 5)] == [5, 3, 1]


def test_csv_with_lines_inside_cells_is_cut_between_rows(tmp_path: Path) -> None:
    names = ["a.png", "b.png", "c.png"]
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        rows.writerows([picture(tmp_path / name).name, f"two\nlines, of {name}"] for name in names)
    for shard in (1, 2):
        found = read(tmp_path, shard)
        assert [one.columns for one in found if isinstance(one, Record)] == [
            {"text": f"two\nlines, of {name}"} for name in names
        ]


def test_every_bad_row_is_named_and_the_good_ones_are_read(tmp_path: Path) -> None:
    fine = {"file_name": picture(tmp_path / "fine.png").name, "text": "x"}
    outside = picture(tmp_path.parent / f"{tmp_path.name}-outside.png")
    (tmp_path / "link.png").symlink_to(outside)
    jsonl(
        tmp_path,
        fine,
        b"{",
        b"[1]",
        b"[" * 100_000,
        b'{"file_name": "fine.png", "text": "K\xe4tzchen"}',
        {"text": "x"},
        {"file_name": 3},
        {"file_name": "\ud800.png"},
        {"file_name": "a\0.png"},
        {"file_name": "absent.png"},
        {"file_name": "x" * 5000},
        {"file_name": f"../{outside.name}"},
        {"file_name": str(outside)},
        {"file_name": "link.png"},
        fine,
    )
    assert named(read(tmp_path, 4)) == [
        ("fine.png", "record"),
        *((f"metadata.jsonl:{line}", "metadata") for line in (2, 3, 4)),
        ("metadata.jsonl", "metadata"),  # the byte is named instead of the line
        *((f"metadata.jsonl:{line}", "metadata") for line in (6, 7, 8, 9)),
        *((f"metadata.jsonl:{line}", "missing") for line in (10, 11)),
        *((f"metadata.jsonl:{line}", "unsafe") for line in (12, 13, 14)),
        ("fine.png", "record"),
    ]


def test_pictures_the_metadata_leaves_out_are_named(tmp_path: Path) -> None:
    for name in ("in.png", "out.png", "deep/out.gif"):
        picture(tmp_path / name)
    jsonl(tmp_path, {"file_name": "./in.png", "text": "x"})
    assert read(tmp_path)[1:] == [
        Fault("deep/out.gif", "unnamed", "is not named in metadata.jsonl."),
        Fault("out.png", "unnamed", "is not named in metadata.jsonl."),
    ]


def test_a_fingerprint_changes_with_names_sizes_and_rows(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return folders.parts(tmp_path, "source", 2).fingerprint

    seen = set()
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("x")
    for change in (
        lambda: None,
        lambda: (tmp_path / "a.txt").write_text("xy"),
        lambda: picture(tmp_path / "b.png"),
        lambda: jsonl(tmp_path, {"file_name": "a.png", "text": "x"}),
        lambda: jsonl(tmp_path, {"file_name": "a.png", "text": "y"}),
    ):
        change()
        assert fingerprint() == fingerprint()
        seen.add(fingerprint())
    assert len(seen) == 5


def test_a_folder_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="there is no such folder"):
        folders.parts(tmp_path / "nowhere", "s", 2)
    with pytest.raises(BadData, match="holds no pictures"):
        folders.parts(tmp_path, "s", 2)
    picture(tmp_path / "train" / "a.png")
    jsonl(tmp_path / "train", {"file_name": "a.png", "text": "x"})
    with pytest.raises(BadData, match=r"the metadata lies deeper, in .*/train; give that folder"):
        folders.parts(tmp_path, "s", 2)
    jsonl(tmp_path)
    with pytest.raises(BadData, match="names no pictures"):
        folders.parts(tmp_path, "s", 2)


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("a")
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(18):  # a longer path than any system can open
        os.mkdir("d" * 240, dir_fd=folder)
        deeper = os.open("d" * 240, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = deeper
    os.close(folder)
    with pytest.raises(BadData, match=r"d: cannot be listed \(File name too long\)"):
        folders.parts(tmp_path, "s", 2)
