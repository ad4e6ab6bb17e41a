"""Prompts of a user: what a list may hold, and what becomes of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from daybreak.evaluate import prompts
from daybreak.evaluate.artist import Artist, Pictures
from daybreak.evaluate.clip_score import Clip
from daybreak.evaluate.features import Extractor
from daybreak.failure import BadData, BadStorage

NAMES = ["red", "green", "blue"]


def draw(asked: object, seeds: object, height: int, width: int) -> Pictures:
    """A picture of the colour whose name stands first in its prompt; else of none."""
    pictures = np.zeros((len(list(asked)), height, width, 3), dtype=np.uint8)  # type: ignore[call-overload]
    for picture, prompt in zip(pictures, asked, strict=True):  # type: ignore[call-overload]
        if prompt.split()[0] in NAMES:
            picture[..., NAMES.index(prompt.split()[0])] = 255
    return pictures


PAINTER = Artist(draw, 8, 8, "f00d" * 16, {"weights": "ema"})
COLOURS = Clip(  # a CLIP that sees colours and reads their names
    Extractor("colours", "0", None, lambda x: x.float().mean((2, 3)) + 1),
    lambda words: np.stack([[float(name in w) + 0.01 for name in NAMES] for w in words]).astype(
        np.float32
    ),
    lambda prompt: len(prompt.split()),
    5,
)


def listed(folder: Path, text: str | bytes, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def written(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def test_a_list_is_read_in_its_order(tmp_path: Path) -> None:
    found = prompts.read(listed(tmp_path, "\ufeffa red fox\r\nein süßes Haus\n"))
    assert found.texts == ["a red fox", "ein süßes Haus"]
    assert len(found.digest) == 64
    rows = '{"prompt": "a fox", "tag": "single_object"}\n{"prompt": "two foxes", "tag": "counting"}'
    found = prompts.read(listed(tmp_path, rows, "prompts.jsonl"))
    assert found.texts == ["a fox", "two foxes"]
    assert found.rows[1] == {"prompt": "two foxes", "tag": "counting"}


def test_only_a_newline_ends_a_prompt(tmp_path: Path) -> None:
    odd = [f"a fox{sign}in the snow" for sign in "\u2028\u2029\x85\x0b\x0c\x1c"]
    assert prompts.read(listed(tmp_path, "\r\n".join(odd))).texts == odd
    rows = "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in odd)
    for name in ("prompts.jsonl", "PROMPTS.JSONL"):
        assert prompts.read(listed(tmp_path, rows, name)).texts == odd


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("a fox\n\na house\n", "p.txt", r"p\.txt, line 2 is empty"),
        ("a fox\n   \n", "p.txt", r"line 2 is empty"),
        ("", "p.txt", "holds no prompts"),
        (b"a fox\nein s\xfc\xdfes Haus\n", "p.txt", r"p\.txt, line 2: byte 0xfc is not UTF-8"),
        (b"\xff\xfea\x00", "p.txt", r"line 1: byte 0xff is not UTF-8"),
        ('{"text": "a fox"}', "p.jsonl", r"line 1 has no prompt"),
        ('{"prompt": "a fox"}\n["a fox"]', "p.jsonl", r"line 2 has no prompt"),
        ("a fox", "p.jsonl", r"line 1 is not JSON"),
        ("a fox\n\n", "p.txt", r"line 2 is empty"),
        ('["a fox", "a house"]', "p.json", r"p\.json is no list of prompts.*\.jsonl"),
        ('[\n"a fox"\n]', "P.JSON", r"is no list of prompts"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_with_its_line(
    tmp_path: Path, text: str | bytes, name: str, words: str
) -> None:
    with pytest.raises(BadData, match=words):
        prompts.read(listed(tmp_path, text, name))


def test_a_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="cannot read the prompts"):
        prompts.read(tmp_path / "nowhere.txt")


def test_every_picture_is_a_file_that_says_how_to_make_it_again(tmp_path: Path) -> None:
    asked = prompts.read(listed(tmp_path, "red fox\nblue house\n"))
    result = prompts.prompts(PAINTER, asked, tmp_path / "out", each=3, seed=10)
    assert result.pictures == 6
    assert "nothing to score" in result.remarks[0]
    lines = written(tmp_path / "out")
    assert [line["file_name"] for line in lines] == [
        f"{p:04}-{k}.png" for p in (0, 1) for k in range(3)
    ]
    assert [line["seed"] for line in lines] == [10, 11, 12, 13, 14, 15]
    with Image.open(tmp_path / "out/0001-2.png") as picture:
        assert picture.info["prompt"] == "blue house"
        assert picture.info["seed"] == "15"
        assert picture.info["weights"] == "f00d" * 4
        assert np.asarray(picture)[0, 0].tolist() == [0, 0, 255]
    assert (tmp_path / "out/grid-0.png").is_file()


def test_a_clip_scores_every_picture_with_its_own_prompt(tmp_path: Path) -> None:
    asked = prompts.read(listed(tmp_path, "red fox\na red fox that nobody has ever painted\n"))
    result = prompts.prompts(PAINTER, asked, tmp_path / "out", each=2, clip=COLOURS)
    lines = [line["clip_score"] for line in written(tmp_path / "out")]
    assert lines[0] == lines[1] > 95
    assert lines[2] == lines[3] < 70
    value = result.values["clip_score"]
    assert value.value == pytest.approx(np.mean(lines))
    assert value.low == pytest.approx(lines[2])  # two prompts: other ones would be either
    assert value.high == pytest.approx(lines[0])
    assert result.remarks == ["2 pictures have a prompt longer than CLIP reads"]


def test_many_pictures_take_several_sheets(tmp_path: Path) -> None:
    asked = prompts.read(listed(tmp_path, "red fox\n" * 40))
    prompts.prompts(PAINTER, asked, tmp_path / "out", each=2)
    assert sorted(p.name for p in (tmp_path / "out").glob("grid-*")) == ["grid-0.png", "grid-1.png"]


@pytest.mark.parametrize(("each", "ends"), [(3, [63, 66]), (65, [65, 130])])
def test_all_pictures_of_a_prompt_are_on_one_sheet(
    tmp_path: Path, each: int, ends: list[int]
) -> None:
    asked = prompts.read(listed(tmp_path, "red fox\n" * (ends[-1] // each)))
    drawn = list[int]()
    prompts.prompts(
        PAINTER, asked, tmp_path / "out", each, progress=lambda done, of: drawn.append(done)
    )
    assert drawn == ends
    assert len(list((tmp_path / "out").glob("grid-*"))) == len(ends)


def test_a_place_that_cannot_be_written_is_a_storage_failure(tmp_path: Path) -> None:
    asked = prompts.read(listed(tmp_path, "red fox\n"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadStorage, match="cannot write"):
        prompts.prompts(PAINTER, asked, tmp_path / "file" / "out")
    (tmp_path / "out" / "grid-0.png").mkdir(parents=True)
    with pytest.raises(BadStorage, match=r"cannot write .*grid-0\.png"):
        prompts.prompts(PAINTER, asked, tmp_path / "out")


def test_the_clip_of_these_tests_sees_what_it_is_shown() -> None:
    seen = COLOURS.pictures.network(
        torch.from_numpy(draw(["green x"], [0], 4, 4)).permute(0, 3, 1, 2)
    )
    assert seen.argmax(1).tolist() == [1]
