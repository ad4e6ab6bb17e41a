"""GenEval's layout, and its own results read back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from daybreak.evaluate import geneval, prompts
from daybreak.evaluate.artist import Artist, Pictures
from daybreak.failure import BadData, BadRecipe


def draw(asked: Any, seeds: Any, height: int, width: int) -> Pictures:
    return np.stack([np.full((height, width, 3), seed, dtype=np.uint8) for seed in seeds])


PAINTER = Artist(draw, 8, 8, "f00d" * 16, {})


def metadata(folder: Path) -> prompts.Prompts:
    rows = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
        {"tag": "counting", "include": [{"class": "cup", "count": 3}], "prompt": "three cups"},
    ]
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prompts.read(path)


def test_pictures_lie_where_its_judge_looks_for_them(tmp_path: Path) -> None:
    asked = metadata(tmp_path)
    result = geneval.write(PAINTER, asked, tmp_path / "out", seed=5)
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.rglob("out/**/*.*"))
    samples = [f"{n:05}/samples/{k:04}.png" for n in (0, 1) for k in range(4)]
    assert found == sorted([*samples, "00000/metadata.jsonl", "00001/metadata.jsonl"])
    for number, row in enumerate(asked.rows):
        with (tmp_path / f"out/{number:05}/metadata.jsonl").open() as file:
            assert json.load(file) == row  # as evaluate_images.py reads it
    with Image.open(tmp_path / "out/00001/samples/0002.png") as picture:
        assert picture.info["prompt"] == "three cups"
        assert np.asarray(picture)[0, 0, 0] == 5 + 4 + 2
    assert (result.pictures, result.values) == (8, {})
    assert "--results" in result.remarks[0]


def test_pictures_of_an_earlier_call_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    asked = metadata(tmp_path)
    geneval.write(PAINTER, asked, tmp_path / "out")
    with pytest.raises(BadRecipe, match="holds pictures of an earlier call"):
        geneval.write(PAINTER, asked, tmp_path / "out")


def test_prompts_without_its_tags_are_refused_before_the_first_picture(tmp_path: Path) -> None:
    plain = tmp_path / "prompts.txt"
    plain.write_text("a bench\n")
    with pytest.raises(BadData, match=r"evaluation_metadata\.jsonl"):
        geneval.write(PAINTER, prompts.read(plain), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def results(folder: Path, shares: dict[str, list[int]], each: int = 4) -> Path:
    """What GenEval writes: for each task the pictures that pass, prompt by prompt."""
    rows = [
        {
            "filename": f"{task}/{number}/{turn}.png",
            "tag": task,
            "prompt": f"{task} {number}",
            "correct": turn < passed,
            "reason": "",
            "metadata": "{}",
            "details": "{}",
        }
        for task, prompts in shares.items()
        for number, passed in enumerate(prompts)
        for turn in range(each)
    ]
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_score_is_the_mean_of_the_tasks_shares(tmp_path: Path) -> None:
    shares = {task: [4] * 10 for task in geneval.TASKS}
    shares["position"], shares["counting"] = [0] * 30, [4, 0] * 10
    found = geneval.read(results(tmp_path, shares))
    assert found.values["score"].value == pytest.approx((4 + 0 + 0.5) / 6)
    assert found.values["position"].value == 0
    assert found.values["counting"].value == 0.5
    assert found.pictures == 4 * (40 + 30 + 20)
    assert found.remarks == []


def test_pictures_of_one_prompt_are_not_independent(tmp_path: Path) -> None:
    together = {task: [4, 0] * 10 for task in geneval.TASKS}
    spread = {task: [2, 2] * 10 for task in geneval.TASKS}
    one = geneval.read(results(tmp_path, together)).values["single_object"]
    other = geneval.read(results(tmp_path, spread)).values["single_object"]
    assert one.value == other.value == 0.5
    assert one.high - one.low > 0.3
    assert other.high - other.low < 0.01


def test_nothing_right_at_all_is_told_to_be_suspicious(tmp_path: Path) -> None:
    found = geneval.read(results(tmp_path, {task: [0] for task in geneval.TASKS}))
    assert "known-good pictures" in found.remarks[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"tag": "counting", "prompt": "x", "correct": true}', "has no pictures of single_object"),
        ('{"tag": "counting", "prompt": "x"}', "line 1 lacks tag, prompt or correct"),
        ("rubbish", "is not the JSON lines"),
        ("[1]", "is not the JSON lines"),
    ],
)
def test_results_that_are_not_its_own_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(BadData, match=words):
        geneval.read(tmp_path / "results.jsonl")


def test_results_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="cannot read GenEval's results"):
        geneval.read(tmp_path / "results.jsonl")
