"""The command line, as a newcomer meets it: what works, and what is said when it does not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from daybreak.failure import BadRecipe, BadStorage
from tests import warm

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def daybreak(*arguments: object) -> warm.Done:
    return warm.run("-m", "daybreak", *arguments)


def test_train_sample_evaluate_export(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = daybreak("train", tiny)
    assert trained.returncode == 0, trained.stderr
    assert str(run / "latest") in trained.stdout

    drawn = daybreak(
        *("sample", "a red circle above a blue square", "--run", run, "--count", 2),
        *("--steps", 3, "--guidance", 3, "--seed", 7),
    )
    assert drawn.returncode == 0, drawn.stderr
    paths = [Path(line) for line in drawn.stdout.split("\n") if line]
    assert [path.name[-4:] for path in paths] == [".png"] * 3
    with Image.open(paths[0]) as picture:
        assert picture.info["prompt"] == "a red circle above a blue square"
        assert picture.info["seed"] == "7"
        assert picture.info["recipe"]
        first = np.array(picture)
    again = daybreak(
        *("sample", "a red circle above a blue square", "--run", run, "--count", 1),
        *("--steps", 3, "--guidance", 3, "--seed", 7, "--out", tmp_path / "again"),
    )
    with Image.open(Path(again.stdout.split("\n")[0])) as picture:
        assert np.abs(np.array(picture).astype(int) - first.astype(int)).max() <= 1

    both = daybreak("sample", "red", "blue", "--run", run, "--count", 2, "--steps", 1)
    told = [Path(line) for line in both.stdout.split("\n") if line]
    assert [path.name for path in told] == [
        *("red-seed0-steps1.png", "red-seed1-steps1.png"),
        *("blue-seed0-steps1.png", "blue-seed1-steps1.png", "grid-steps1.png"),
    ], "prompts are drawn from the same noise, and other settings are other files"

    wide = daybreak(
        *("sample", "red", "--run", run, "--count", 2, "--steps", 1),
        *("--size", "48x24", "--out", tmp_path / "wide"),
    )
    assert wide.returncode == 0, wide.stderr
    paths = sorted((tmp_path / "wide").iterdir())
    assert [path.name for path in paths] == [
        *("grid-48x24-steps1.png", "red-seed0-48x24-steps1.png", "red-seed1-48x24-steps1.png"),
    ]
    with Image.open(paths[1]) as picture:
        assert picture.size == (48, 24)
    assert "48x24 px is another shape than in training (32x32)" in wide.stderr
    tall = daybreak(*("sample", "red", "--run", run, "--count", 1), "--set", "sample.aspect=0.5")
    with Image.open(Path(tall.stdout.split("\n")[0])) as picture:
        assert picture.size == (24, 48)
    few = ("sample", "red", "--run", run, "--count", 1, "--steps", 1, "--size")
    large = daybreak(*few, "64x64")
    assert "64x64 px is another size than in training (32x32)" in large.stderr
    for size, said in (("30x49", "take 32x48"), ("big", "--size big: write it as WIDTHxHEIGHT")):
        refused = daybreak(*few, size)
        assert refused.returncode == BadRecipe.code
        assert said in refused.stderr

    alike = daybreak(
        *("sample", "a " * 50 + "cat", "a " * 50 + "dog", "dog?", "\u72ac" * 90, ".."),
        *("--run", run, "--count", 1, "--steps", 1),
    )
    assert alike.returncode == 0, alike.stderr
    files = {Path(line) for line in alike.stdout.split("\n") if line}
    assert len(files) == 6, "no prompt's picture is written over another's"
    assert {path.parent.parent for path in files} == {run / "samples"}

    (tmp_path / "file").touch()
    long = ("sample", "red " * 60, "--run", run, "--count", 1, "--steps", 1)
    refused = daybreak(*long, "--out", tmp_path / "file")
    assert refused.returncode == BadStorage.code
    assert refused.stderr.startswith("daybreak: cannot write")
    cut = daybreak(*long, "--set", "sample.stochastic=true")
    assert "only 24 of 61 tokens are read (text.max_tokens)" in cut.stderr
    assert "-seed0-steps1-sample.stochastic=true.png" in cut.stdout
    with Image.open(Path(cut.stdout.split("\n")[0])) as picture:
        assert json.loads(picture.info["sample"])["stochastic"] is True

    scored = daybreak(
        *("evaluate", run, "--suite", "scenes", "--per-task", 5, "--steps", 2),
        *("--set", "sample.guide=self", "--set", "tread.stop=2"),
    )
    assert scored.returncode == 0, scored.stderr
    assert "overall" in scored.stdout
    (score,) = (run / "evaluation").glob("*.json")
    assert score.name == "scenes-per-task5-steps2-sample.guide=self-tread.stop=2.json"
    how = json.loads(score.read_text())["sampler"]
    assert (how["guide"], how["steps"]) == ("self", 2)

    exported = daybreak("export", run)
    assert exported.returncode == 0, exported.stderr
    assert exported.stderr == "", "no bars of other libraries"
    assert (run / "pipeline" / "model_index.json").is_file()


def broken_picture(pictures: Path) -> None:
    (pictures / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"rubbish" * 20)


def missing_caption(pictures: Path) -> None:
    (pictures / "3.txt").unlink()


def nothing_left(pictures: Path) -> None:
    for path in pictures.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [(broken_picture, "3.png"), (missing_caption, "3.png"), (nothing_left, "pictures")],
)
def test_bad_data_is_one_sentence_and_code_3(
    tiny: Path, pictures: Path, tmp_path: Path, harm: object, words: str
) -> None:
    harm(pictures)  # type: ignore[operator]
    done = daybreak("train", tiny, "--data", pictures, "--without", "scenes")
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("daybreak: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "nowhere"), "there is no recipe 'nowhere'"),
        (("train", "{tiny}", "--set", "dit.wdith=3"), "did you mean width?"),
        (("train", "{tiny}", "--set", "dit.depth=x"), "dit.depth = 'x'"),
        (("train", "{tiny}", "--set", "stage.0.resolution=33"), "not divisible"),
        (("train", "{tiny}", "--set", "dit.heads=7"), "does not divide"),
    ],
)
def test_a_bad_recipe_is_one_sentence_and_code_2(
    tiny: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = daybreak(*(argument.format(tiny=tiny) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_is_one_sentence_and_code_4(tmp_path: Path) -> None:
    for verb in (("export", tmp_path), ("sample", "x", "--run", tmp_path), ("evaluate", tmp_path)):
        done = daybreak(*verb)
        assert done.returncode == 4, done.stderr
        assert "is not a run folder" in done.stderr


@pytest.mark.parametrize("best", [False, True])
def test_a_path_that_does_not_exist_is_called_no_run_with_and_without_best(
    tmp_path: Path, best: bool
) -> None:
    from daybreak import cli
    from daybreak.failure import NoCheckpoint

    verbs: list[Callable[[], None]] = [
        lambda: cli.sample(["a circle"], tmp_path / "no", best=best),
        lambda: cli.export(tmp_path / "no", best=best),
        lambda: cli.evaluate(tmp_path / "no", best=best),
    ]
    for verb in verbs:
        with pytest.raises(NoCheckpoint, match="no is not a run folder"):
            verb()
    assert not (tmp_path / "no").exists()


def test_doctor_looks_at_this_machine() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "daybreak", "doctor"],
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for word in ("torch", "cores", "memory", "disk", "compiler", "extra eval"):
        assert word in done.stdout
    assert "usable" in done.stdout or "daybreak[dev]" in done.stdout


def test_it_says_its_version() -> None:
    done = warm.run("-m", "daybreak", "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("daybreak ")
