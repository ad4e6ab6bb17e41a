"""A folder becomes the list its owner means, or one sentence that says what to mend."""

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from daybreak.data import captions, images, ingest, prepare, prepared, sources
from daybreak.data.records import Columns
from daybreak.data.sources import Captioned
from daybreak.failure import BadData, BadRecipe

EMOJI = Path(__file__).parents[2] / "shared" / "data" / "emoji"


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return path


def jsonl(folder: Path, *rows: object) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_metadata_gives_each_picture_its_caption(tmp_path: Path) -> None:
    one, two = picture(tmp_path / "one.png"), picture(tmp_path / "deep" / "two.png")
    jsonl(
        tmp_path,
        {"file_name": "one.png", "text": " a red\n square "},
        {"file_name": "deep/two.png", "text": "another"},
    )
    assert sources.folder(tmp_path) == [
        Captioned(two, ("another",), (0.9,)),
        Captioned(one, ("a red square",), (0.9,)),
    ]


def test_pictures_lie_beside_their_captions(tmp_path: Path) -> None:
    for name in ["b.png", "a.JPG", "deep/er/c.webp"]:
        file = picture(tmp_path / name)
        file.with_suffix(".txt").write_text(f"caption of\n{file.stem}\n")
    (tmp_path / "README.md").write_text("not a picture")
    picture(tmp_path / ".thumbnails" / "b.png")
    found = sources.folder(tmp_path)
    assert [one.path.relative_to(tmp_path).as_posix() for one in found] == [
        "a.JPG",
        "b.png",
        "deep/er/c.webp",
    ]
    assert found[0] == Captioned(tmp_path / "a.JPG", ("caption of a",), (1.0,))


def test_csv_is_read_like_jsonl(tmp_path: Path) -> None:
    picture(tmp_path / "one.png")
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file)
        rows.writerows([["file_name", "caption", "note"], ["one.png", 'a "square", red', ""]])
    assert sources.folder(tmp_path)[0].captions == ('a "square", red',)
    assert sources.folder(tmp_path, [("caption", 1), ("note", 1)])[0].weights == (1,)


def test_the_first_usual_column_is_taken(tmp_path: Path) -> None:
    picture(tmp_path / "one.png")
    jsonl(tmp_path, {"file_name": "one.png", "prompt": "p", "caption": "c", "other": "o"})
    assert sources.folder(tmp_path)[0].captions == ("c",)


def test_without_a_choice_each_picture_has_the_captions_that_prepare_gives_it(
    tmp_path: Path,
) -> None:
    rows: list[dict[str, object]] = [
        {"text": " ", "caption": "a sun", "keywords": ["warm", "yellow"]},
        {"text": "a moon", "caption": "another", "keywords": []},
        {"text": None, "prompt": ["a star", "a sun"]},
        {"keywords": ["night"]},
    ]
    for number, row in enumerate(rows):
        row["file_name"] = picture(tmp_path / f"{number}.png").name
    jsonl(tmp_path, *rows)
    found = sources.folder(tmp_path)
    assert [one.captions[0] for one in found] == ["a sun", "a moon", "a star", "night"]
    for one, row in zip(found, rows, strict=True):
        prepared = captions.read(row)
        assert (one.captions, one.weights) == (prepared.texts, prepared.weights)


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "a", "keywords": ["k"]}, {"text": "b"}],
        [{"text": "a"}, {"caption": "b"}],
        [{"text": "a"}, {"text": "a"}, {"text": "b"}],
        [{"text": ["a", "b"]}, {"text": "c"}],
        [{"text": ""}, {"text": "b"}],
        [{"text": "a", "keywords": float("nan")}],
    ],
)
def test_rows_of_one_picture_are_joined_as_prepare_joins_them(
    rows: list[dict[str, object]], tmp_path: Path
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "prepared"
    raw.mkdir()
    Image.new("RGB", (64, 64), "red").save(raw / "one.png")
    jsonl(raw, *({"file_name": "one.png", **row} for row in rows))
    (one,) = sources.folder(raw)
    prepare.prepare([str(raw)], out, ingest.Config(resolution=64, unit=16), 0)
    stored = prepared.open_dataset(out).table
    assert list(one.captions) == stored["captions"][0].as_py()
    weights = stored["caption_weights"][0].as_py()
    shares = [weight / sum(weights) for weight in weights]
    assert [weight / sum(one.weights) for weight in one.weights] == pytest.approx(shares)


def test_several_columns_give_alternatives_with_weights(tmp_path: Path) -> None:
    for name in ["a", "b", "c", "d"]:
        picture(tmp_path / f"{name}.png")
    jsonl(
        tmp_path,
        {"file_name": "a.png", "text": "a sun", "keywords": ["warm", " yellow ", ""]},
        {"file_name": "b.png", "text": "a moon", "keywords": []},
        {"file_name": "c.png", "text": "a star"},
        {"file_name": "d.png", "text": None, "keywords": ["night"]},
    )
    found = sources.folder(tmp_path, [("text", 0.75), ("keywords", 0.25)])
    assert [one.captions for one in found] == [
        ("a sun", "warm, yellow"),
        ("a moon",),
        ("a star",),
        ("night",),
    ]
    assert [one.weights for one in found] == [(0.75, 0.25), (0.75,), (0.75,), (0.25,)]


def test_the_order_is_that_of_the_names_and_not_of_the_rows(tmp_path: Path) -> None:
    names = ["b.png", "a.png", "B.png", "a/z.png", "10.png", "9.png"]
    for name in names:
        picture(tmp_path / name)
    jsonl(tmp_path, *[{"file_name": name, "text": name} for name in names])
    assert [one.captions[0] for one in sources.folder(tmp_path)] == sorted(names)


def test_unicode_captions_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    picture(tmp_path / "猫.png")
    row = json.dumps({"file_name": "猫.png", "text": "ein Kätzchen\u2028猫"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + row + "\n\n", encoding="utf-8")
    assert sources.folder(tmp_path)[0].captions == ("ein Kätzchen 猫",)


def test_pictures_the_metadata_leaves_out_are_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "in.png")
    picture(tmp_path / "out.png")
    jsonl(tmp_path, {"file_name": "in.png", "text": "in"})
    assert len(sources.folder(tmp_path)) == 1


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="nowhere: there is no such folder"):
        sources.folder(tmp_path / "nowhere")
    with pytest.raises(BadData, match="is a file; `daybreak prepare"):
        sources.folder(picture(tmp_path / "file.png"))


@pytest.mark.parametrize(
    ("table", "remedy"),
    [("metadata.parquet", "into a metadata.jsonl there"), ("0.parquet", "folders of their own")],
)
def test_a_table_beside_pictures_is_refused(tmp_path: Path, table: str, remedy: str) -> None:
    picture(tmp_path / "0.png")
    (tmp_path / table).touch()
    with pytest.raises(BadData, match=rf"holds both pictures .* and \S+{table}; .*{remedy}"):
        sources.find(str(tmp_path), Columns(), 4)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.tar").touch()
    with pytest.raises(BadData, match=r"holds 0\.tar and no loose picture; `daybreak prepare"):
        sources.folder(tmp_path)
    (tmp_path / "0.tar").unlink()
    with pytest.raises(BadData, match="holds no pictures"):
        sources.folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(BadData, match="names no pictures"):
        sources.folder(tmp_path)


def test_a_row_that_names_no_file_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "one.png")
    jsonl(tmp_path, {"file_name": "one.png", "text": "x"}, {"file_name": "two.png", "text": "y"})
    with pytest.raises(BadData, match=r"metadata\.jsonl:2: names 'two\.png', which does not exist"):
        sources.folder(tmp_path)
    jsonl(tmp_path, {"file_name": "x" * 5000, "text": "x"})
    with pytest.raises(BadData, match="which does not exist"):
        sources.folder(tmp_path)


@pytest.mark.parametrize("row", [{"text": "x"}, {"file_name": 3, "text": "x"}, {"file_name": ""}])
def test_a_row_without_a_file_name_is_refused(tmp_path: Path, row: dict[str, object]) -> None:
    jsonl(tmp_path, row)
    with pytest.raises(BadData, match=r"metadata\.jsonl:1: has no `file_name`|has no column"):
        sources.folder(tmp_path)


@pytest.mark.parametrize("line", ["{", "[" * 100_000, '{"text": "x"', "nonsense"])
def test_a_line_that_is_not_json_is_numbered(tmp_path: Path, line: str) -> None:
    picture(tmp_path / "one.png")
    jsonl(tmp_path, {"file_name": "one.png", "text": "x"}, "", line)
    with pytest.raises(BadData, match=r"metadata\.jsonl:3: is not JSON"):
        sources.folder(tmp_path)


@pytest.mark.parametrize("line", ["3", '"text"', "[1]", "null"])
def test_a_line_that_is_no_object_is_numbered(tmp_path: Path, line: str) -> None:
    jsonl(tmp_path, line)
    with pytest.raises(BadData, match=r"metadata\.jsonl:1: is not a JSON object"):
        sources.folder(tmp_path)


def test_a_csv_line_with_too_many_cells_is_numbered(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\none.png,a red, big square\n")
    with pytest.raises(BadData, match=r"metadata\.csv:2: has more cells than the header"):
        sources.folder(tmp_path)


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_bytes("{'text': 'Kätzchen'}".encode("latin-1"))
    with pytest.raises(BadData, match=r"metadata\.jsonl: is not UTF-8 \(byte 11\)"):
        sources.folder(tmp_path)


def test_an_unknown_column_names_those_there_are(tmp_path: Path) -> None:
    picture(tmp_path / "one.png")
    jsonl(tmp_path, {"file_name": "one.png", "title": "x", "tags": ["y"]})
    with pytest.raises(BadData, match="has no column `txt`; it has `title`, `tags`"):
        sources.folder(tmp_path, [("title", 1.0), ("txt", 1.0)])
    with pytest.raises(BadData, match=r"name one of its own \(`title`, `tags`\)"):
        sources.folder(tmp_path)


def test_columns_without_metadata_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "one.png").with_suffix(".txt").write_text("one")
    with pytest.raises(BadData, match=r"there is no metadata\.jsonl"):
        sources.folder(tmp_path, [("text", 1.0)])


def test_two_kinds_of_metadata_are_refused(tmp_path: Path) -> None:
    jsonl(tmp_path, {})
    (tmp_path / "metadata.csv").touch()
    with pytest.raises(BadData, match="has both"):
        sources.folder(tmp_path)


@pytest.mark.parametrize("value", [3, {"a": "b"}, ["a", 3], True])
def test_a_caption_that_is_no_text_is_refused(tmp_path: Path, value: object) -> None:
    picture(tmp_path / "one.png")
    jsonl(tmp_path, {"file_name": "one.png", "text": value})
    with pytest.raises(BadData, match=r"metadata\.jsonl:1: column `text` holds"):
        sources.folder(tmp_path)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused(tmp_path: Path, weight: float) -> None:
    with pytest.raises(BadRecipe, match="must be positive"):
        sources.folder(tmp_path, [("text", weight)])


def test_pictures_without_a_caption_are_named_and_counted(tmp_path: Path) -> None:
    for name in ["a", "b", "c"]:
        picture(tmp_path / f"{name}.png")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.txt").write_text("  \n")
    with pytest.raises(BadData, match=r"a\.png \(and 1 more\): has no caption"):
        sources.folder(tmp_path)
    rows = [{"file_name": f"{name}.png", "text": name.strip("b")} for name in "abc"]
    jsonl(tmp_path, *rows)
    with pytest.raises(BadData, match=r"b\.png: has no caption"):
        sources.folder(tmp_path)


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    secret = picture(tmp_path / "secret.png")
    picture(inside / "deep" / "fine.png")
    (inside / "link.png").symlink_to(secret)
    (inside / "up").symlink_to(tmp_path)
    names = ["../secret.png", str(secret), "link.png", "up/secret.png", "deep/../../secret.png"]
    for name in names:
        jsonl(inside, {"file_name": name, "text": "x"})
        with pytest.raises(BadData, match=r"metadata\.jsonl:1: .* out"):
            sources.folder(inside)


def test_links_out_of_the_folder_are_refused_beside_captions_too(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.png").symlink_to(picture(tmp_path / "secret.png"))
    with pytest.raises(BadData, match=r"link\.png: is a link that leads out"):
        sources.folder(inside)
    (inside / "link.png").unlink()
    picture(inside / "own.png")
    (tmp_path / "secret.txt").write_text("secret")
    (inside / "own.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(BadData, match=r"own\.txt: is a link that leads out"):
        sources.folder(inside)


def test_links_within_the_folder_are_fine(tmp_path: Path) -> None:
    picture(tmp_path / "one.png")
    (tmp_path / "two.png").symlink_to("one.png")
    jsonl(tmp_path, {"file_name": "two.png", "text": "x"})
    assert sources.folder(tmp_path)[0].path == tmp_path / "two.png"


def test_a_link_to_the_folder_may_be_given(tmp_path: Path) -> None:
    picture(tmp_path / "real" / "one.png").with_suffix(".txt").write_text("one")
    (tmp_path / "link").symlink_to("real")
    assert sources.folder(tmp_path / "link")[0].path == tmp_path / "link" / "one.png"


def test_keywords_alone_are_a_caption(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    jsonl(tmp_path, {"file_name": "a.png", "keywords": ["cat", "hat"]})
    assert [one.captions for one in sources.folder(tmp_path)] == [("cat, hat",)]


def test_check_passes_over_good_pictures(tmp_path: Path) -> None:
    sources.check([Captioned(picture(tmp_path / "one.png"), ("x",), (1.0,))])
    sources.check([])


def test_check_names_five_bad_pictures_and_counts_all(tmp_path: Path) -> None:
    captioned = []
    for i in range(9):
        file = picture(tmp_path / f"{i}.png")
        if i >= 2:
            file.write_bytes(file.read_bytes()[:50] if i % 2 else b"no picture")
        captioned.append(Captioned(file, ("x",), (1.0,)))
    captioned[2].path.unlink()
    with pytest.raises(BadData) as caught:
        sources.check(captioned)
    message = str(caught.value)
    assert message.startswith("7 of 9 pictures cannot be read: ")
    assert all(f"{i}.png: " in message for i in range(2, 7))
    assert not any(f"{i}.png: " in message for i in [0, 1, 7, 8])
    assert "No such file" in message
    assert message.endswith(" ...")
    with pytest.raises(BadData, match=r"5 of 7 pictures cannot be read: .*[^.]\.$"):
        sources.check(captioned[:7])


@pytest.mark.skipif(not EMOJI.is_dir(), reason="the emoji pictures are not beside this checkout")
def test_the_emoji_load_with_both_columns() -> None:
    found = sources.folder(EMOJI, [("text", 0.5), ("keywords", 0.5)])
    assert len(found) == 1661
    assert sum(len(one.captions) == 1 for one in found) == 20
    sources.check(found)
    pixels = images.decode(found[0].path.read_bytes(), found[0].path.name)
    assert pixels.shape == (128, 128, 3)
    assert (pixels[0, 0] == 255).all()
    assert not np.array_equal(pixels, np.full_like(pixels, 255))


def test_a_source_is_known_by_what_lies_there(tmp_path: Path) -> None:
    def layout(name: str) -> str:
        return sources.find(name, Columns(), 4).layout

    picture(tmp_path / "beside" / "a.png").with_suffix(".txt").write_text("x")
    picture(tmp_path / "named" / "a.png")
    jsonl(tmp_path / "named", {"file_name": "a.png", "text": "x"})
    (tmp_path / "named" / "b.tar").touch()
    (tmp_path / "tars" / "deep").mkdir(parents=True)
    tarfile.open(tmp_path / "tars" / "deep" / "a.tar", "w").close()
    (tmp_path / "tars" / "a.parquet").write_bytes(b"img2dataset puts tables beside its tars")
    assert layout(str(tmp_path / "beside")) == "sidecars"
    assert layout(str(tmp_path / "named")) == "imagefolder"
    assert layout(str(tmp_path / "tars")) == "webdataset"
    assert layout(str(tmp_path / "tars" / "deep" / "a.tar")) == "webdataset"
    assert layout(str(tmp_path / "tars" / "a.parquet")) == "parquet"
    assert layout("scenes:3") == "scenes"
    assert [part.bytes for part in sources.find("scenes:9", Columns(), 4).parts] == [
        4096,
        4096,
        1024,
    ]


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_a_link_to_a_folder_beside_archives_is_named(tmp_path: Path, ending: str) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    for place in ("far", "near"):
        (tmp_path / place / f"0.{ending}").write_bytes(b"none")
    (tmp_path / "near" / "more").symlink_to(tmp_path / "far")
    *_, last = sources.find(str(tmp_path / "near"), Columns(), 8).parts
    assert [fault[:2] for fault in last.read()] == [("more", "unsafe")]


def test_what_is_no_source_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text("{}")
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped" / "many.ZIP").touch()
    for name, said in [
        (str(tmp_path / "absent"), "there is no such file or folder"),
        ("absent", "there is no such file or folder"),
        ("scenes:many", "there is no such file or folder"),
        (str(picture(tmp_path / "one.png")), "is neither .tar nor .parquet"),
        (str(tmp_path / "splits"), "holds several splits"),
        (str(tmp_path / "zipped"), "holds many.ZIP and no loose picture; unpack it"),
        (str(tmp_path / "zipped" / "many.ZIP"), "is a compressed archive; unpack it"),
    ]:
        with pytest.raises(BadData, match=said):
            sources.find(name, Columns(), 4)


def test_a_name_under_a_folder_that_is_there_is_no_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(BadData, match="data/emojy: there is no such file or folder"):
        sources.find("data/emojy", Columns(), 4)
