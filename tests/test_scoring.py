"""`daybreak evaluate`: runs and pipelines through every suite, and what it says when it cannot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from daybreak import config
from daybreak.evaluate import geneval, scenes_questions
from daybreak.failure import BadData, BadRecipe, Failure, NoCheckpoint
from daybreak.train import loop, scoring
from daybreak.train.scoring import Scored, Wanted
from tests import warm


def score(folder: Path, out: Path, **given: Any) -> Scored:
    scored = scoring.score(folder, Wanted(**given), out, lambda verb: lambda done, of: None)
    assert scored is not None
    return scored


def kept(scored: Scored) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(scored.path.read_text())
    return found


@pytest.fixture
def run(tiny: Path) -> Path:
    """A run of a few steps on scenes that has kept a best checkpoint."""
    sets = ("stage.0.steps=4", "evaluate={every=2, pictures=32, best='validation.loss'}")
    recipe = config.load(tiny, sets)
    loop.train(recipe, lambda line: None)
    return Path(recipe.out)


def listed(folder: Path, *prompts: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return path


def test_a_run_goes_through_every_suite(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exact = score(run, out, per_task=5, steps=2)
    assert exact.path == out / "scenes-per-task5-steps2.json"
    first = kept(exact)
    assert first["checkpoint"]["step"] == 4
    assert first["seed"] == int(first["weights_sha256"][:8], 16), "questions follow from weights"
    assert (first["sampler"]["steps"], first["weights"]) == (2, "ema")
    assert first["revision"] == scoring.about()["revision"]
    assert exact.tables[0][0][1] == "exact"
    assert kept(score(run, out, per_task=5, steps=2, seed=9))["items"] != first["items"]

    loss = score(run, out, suite="validation", number=32).result.values["loss"]
    best = score(run, out, suite="validation", number=32, best=True).result.values["loss"]
    assert best.value <= loss.value
    usual = kept(score(run, out, suite="validation", number=32))
    assert (usual["seed"], usual["examples_seed"]) == (0, 0), "one table for every model"
    other = kept(score(run, out, suite="validation", number=32, seed=9))
    assert (other["seed"], other["examples_seed"]) == (9, 9)
    assert other["examples"] != usual["examples"]
    assert other["values"]["loss"] != usual["values"]["loss"]

    apart = kept(score(run, out, suite="distribution", number=32, steps=2))
    assert "scenes.kernel" in apart["values"]
    assert apart["source"] == "scenes"
    assert any("32 pictures" in said for said in apart["remarks"])

    asked = listed(tmp_path, "a red circle", "a blue square")
    drawn = score(run, out, suite="prompts", prompts=asked, each=2, steps=2)
    assert drawn.result.pictures == len(list(drawn.path.with_suffix("").glob("0*.png"))) == 4


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "scenes"),
        ({"best": True, "steps": 50, "guidance": 3.0}, "scenes-best-steps50-guidance3"),
        (
            {"guidance": 2.5, "per_task": 5, "seed": 1234567},
            "scenes-per-task5-seed1234567-guidance2.5",
        ),
        ({"suite": "validation", "number": 64, "data": Path("a/b")}, "validation-count64-data-b"),
        ({"suite": "geneval", "prompts": Path("p.jsonl"), "each": 1}, "geneval-each1-prompts-p"),
        ({"suite": "geneval", "results": Path("results.jsonl")}, "geneval"),
        ({"suite": "distribution", "features": ("clip", "/n/x")}, "distribution-features-clip+x"),
        ({"canvas": "64", "controls": True}, "scenes-canvas-64-controls"),
        ({"sets": ("sample.guide=self",)}, "scenes-sample.guide=self"),
    ],
)
def test_what_is_asked_otherwise_has_a_name_of_its_own(given: dict[str, Any], name: str) -> None:
    assert scoring.called(Wanted(**given)) == name


def test_names_of_results_are_short_and_never_the_same() -> None:
    asked = [
        ("a=[1,2]",),
        ("a=[1-2]",),
        *[("sample.prompts=" + sign * 300,) for sign in ("x", "y", "猫")],
        ("sample.prompts=" + "x" * 301,),
    ]
    names = [scoring.called(Wanted(sets=sets)) for sets in asked]
    assert len(set(names)) == len(names)
    assert max(len(name.encode()) for name in names) <= 120


def test_a_pipeline_that_nobody_here_has_written_goes_through_them_too(
    foreign: Path, tmp_path: Path, prepared: Callable[..., Path]
) -> None:
    exact = score(foreign, tmp_path, per_task=5, steps=1, canvas="32", resolution=32)
    found = kept(exact)
    assert found["pipeline"] == "StableDiffusionPipeline"
    assert found["sampler"]["num_inference_steps"] == 1
    assert found["overall"]["exact"] == 0
    assert found["controls"]["ground_truth"]["exact"] == 1

    data = prepared([{"bucket": b} for b in ("64x64", "32x128") for _ in range(16)])
    given = {"number": 32, "data": data, "resolution": 64, "steps": 1, "features": ("scenes",)}
    assert score(foreign, tmp_path, suite="distribution", **given).result.pictures == 32

    asked = listed(tmp_path, "a bench", "a cup")
    given = {"prompts": asked, "each": 1, "steps": 1}
    drawn = score(foreign, tmp_path, suite="prompts", **given)
    with Image.open(drawn.path.with_suffix("") / "0001-0.png") as picture:
        assert picture.size == (16, 16)

    rows = [{"tag": task, "prompt": f"a {task}"} for task in geneval.TASKS]
    metadata = tmp_path / "evaluation_metadata.jsonl"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = score(foreign, tmp_path, suite="geneval", prompts=metadata, each=1, steps=1)
    assert drawn.result.pictures == 6
    assert (drawn.path.with_suffix("") / "00005" / "samples" / "0000.png").is_file()

    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        (tmp_path / "true").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "true" / f"{number}.png")
    asked = listed(tmp_path, *(f"caption {number}" for number in range(24)))
    given = {"prompts": asked, "reference": tmp_path / "true", "features": ("scenes",), "steps": 1}
    fid = kept(score(foreign, tmp_path, suite="coco30k", resolution=16, **given))
    assert (fid["pictures"], fid["side"]) == (24, 16)
    assert fid["values"]["scenes.frechet"]["bias"] != 0


def test_the_results_of_geneval_are_read_without_a_model(tmp_path: Path) -> None:
    rows = [{"tag": task, "prompt": task, "correct": True} for task in geneval.TASKS]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"suite": "geneval", "results": tmp_path / "results.jsonl"}
    scored = score(tmp_path / "nowhere", tmp_path, **given)
    assert kept(scored)["values"]["score"]["value"] == 1


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"suite": "fid"}, BadRecipe, "there are scenes, validation"),
        ({}, BadRecipe, "give --canvas"),
        ({"canvas": "33"}, BadRecipe, "there are 32, 64, 64-large, 128"),
        ({"canvas": "64"}, BadRecipe, "are 64 px and the model draws 16 px"),
        ({"canvas": "32", "resolution": 32, "controls": True}, BadRecipe, "is for run folders"),
        ({"suite": "validation", "steps": None}, BadRecipe, "measures the loss of a run"),
        ({"suite": "distribution"}, BadRecipe, "with --data"),
        ({"suite": "distribution", "data": Path("no")}, BadData, "is not a prepared dataset"),
        ({"suite": "prompts"}, BadRecipe, "with --prompts"),
        ({"suite": "prompts", "prompts": Path("no.txt")}, BadData, "cannot read the prompts"),
        ({"suite": "prompts", "prompts": "one", "clip": "no/clip"}, BadRecipe, "no/clip"),
        ({"suite": "prompts", "prompts": "one", "resolution": 100}, BadRecipe, "divisible by 8"),
        ({"suite": "geneval", "prompts": "one"}, BadData, r"evaluation_metadata\.jsonl"),
        ({"suite": "geneval", "results": Path("no")}, BadData, "cannot read GenEval's results"),
        ({"suite": "validation", "steps": 4}, BadRecipe, "--steps is for --suite scenes or dist"),
        ({"suite": "validation", "steps": None, "guidance": 1.0}, BadRecipe, "--guidance is for"),
        ({"suite": "validation", "steps": None, "controls": True}, BadRecipe, "--controls is for"),
        ({"suite": "prompts", "prompts": "one", "per_task": 5}, BadRecipe, "--per-task is for"),
        ({"suite": "prompts", "prompts": "one", "number": 32}, BadRecipe, "--count is for"),
        ({"prompts": "one"}, BadRecipe, "--prompts is for --suite prompts or geneval or coco30k"),
        ({"data": Path("no")}, BadRecipe, "--data is for --suite validation or distribution, not"),
        ({"suite": "coco30k", "prompts": "one"}, BadRecipe, "give it with --reference"),
        (
            {
                "suite": "coco30k",
                "prompts": "one",
                "reference": Path("no"),
                "features": ("scenes",),
            },
            BadRecipe,
            "draws 16 px and FID-30K is measured at 256 px",
        ),
        ({"sets": ("sample.steps=2",)}, BadRecipe, "--set and --best are for run folders"),
        ({"best": True}, BadRecipe, "--set and --best are for run folders"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(
    foreign: Path, tmp_path: Path, given: dict[str, Any], kind: type[Failure], words: str
) -> None:
    given = {"steps": 1, **given}
    if given.get("prompts") == "one":
        given["prompts"] = listed(tmp_path, "a bench")
    with pytest.raises(kind, match=words) as caught:
        score(foreign, tmp_path / "out", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_there_are_named_before_a_picture_is_drawn(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Callable[..., Path]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    data = prepared([{}] * 32)
    given: dict[str, Any] = {"suite": "distribution", "data": data, "number": 32}
    for name, words in (("dinov2", "1.2 GB"), ("clip", "1.7 GB"), ("no/such", "no/such")):
        with pytest.raises(BadRecipe, match=words):
            score(foreign, tmp_path, features=(name,), steps=1, **given)


def test_pictures_of_the_training_are_remarked_upon(
    tiny: Path, prepared: Callable[..., Path]
) -> None:
    mine, other = (prepared([{"captions": [word]}] * 3, called=word) for word in ("red", "blue"))
    recipe = config.load(tiny, (f"data.source='{mine.as_posix()}'",), ("scenes",))
    (said,) = scoring.trained_on(recipe, mine)
    assert "this model was trained on" in said
    assert scoring.trained_on(recipe, other) == scoring.trained_on(recipe, None) == []
    assert scoring.trained_on(config.load(tiny), mine) == []
    last = recipe.stage[0].model_copy(update={"source": other.as_posix()})
    both = recipe.model_copy(update={"stage": (*recipe.stage, last)})
    assert scoring.trained_on(both, mine)
    assert scoring.trained_on(both, other)


def test_a_best_checkpoint_is_asked_other_than_what_chose_it_or_it_is_said(
    tiny: Path, tmp_path: Path, prepared: Callable[..., Path]
) -> None:
    sets = ("seed=0", "stage.0.steps=2", "evaluate={every=1, pictures=32, best='validation.loss'}")
    recipe = config.load(tiny, sets)
    loop.train(recipe, lambda line: None)
    run = Path(recipe.out)
    other = score(run, tmp_path / "a", suite="validation", number=32, best=True)
    assert kept(other)["examples_seed"] == 1, "those of seed 0 have chosen it"
    assert kept(other)["remarks"] == []
    assert kept(score(run, tmp_path / "a", suite="validation", number=32))["examples_seed"] == 0
    same = score(run, tmp_path / "b", suite="validation", number=32, best=True, seed=0)
    (said,) = kept(same)["remarks"]
    assert "was chosen by validation.loss on some of the same" in said
    assert "give another --seed" in said

    held, other_data = (prepared([{"captions": [w]}] * 32, called=w) for w in ("red", "blue"))
    on_data = config.parse(
        recipe.model_dump()
        | {"evaluate": {"every": 1, "best": "validation.loss", "data": str(held)}},
        "here",
    )
    wanted = Wanted(suite="distribution", best=True, data=held)
    assert "give another --data" in scoring.chosen_by(on_data, wanted, 0)[0]
    assert scoring.chosen_by(on_data, wanted._replace(data=other_data), 0) == []
    assert scoring.chosen_by(on_data, wanted._replace(best=False), 0) == []


def test_scenes_that_chose_a_checkpoint_are_not_those_that_score_it(tiny: Path) -> None:
    recipe = config.load(tiny, ("evaluate={every=5, suites=['scenes'], best='scenes.exact'}",))
    wanted = Wanted(best=True)
    assert scoring.chosen_by(recipe, wanted, 12345) == []
    assert len(scoring.chosen_by(recipe, wanted, recipe.seed)) == 1, "asked for with --seed"
    assert recipe.drawn is not None
    chose, scores = (
        [(item.seed, item.scene) for item in scenes_questions.tasks(recipe.drawn, seed, 20)]
        for seed in (recipe.seed, 12345)
    )
    assert not any(one in chose for one in scores)


def test_encoders_of_the_training_do_not_judge(tiny: Path) -> None:
    assert config.load(tiny).taught == frozenset()
    assert config.load(tiny, ("repa={blocks=[0]}",)).taught == {"dino"}
    own = "repa={teacher='self', target=1, blocks=[0]}"
    assert config.load(tiny, (own,)).taught == frozenset()


def test_a_run_draws_its_own_resolution(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="leave --resolution out, it is for pipelines"):
        score(run, tmp_path, resolution=64)
    with pytest.raises(BadRecipe, match="are 64 px and this run draws 32 px: leave --canvas out"):
        score(run, tmp_path, canvas="64")


def test_a_folder_without_a_run_or_a_checkpoint_is_refused(tiny: Path, tmp_path: Path) -> None:
    for best in (False, True):
        with pytest.raises(NoCheckpoint, match="is not a run folder"):
            score(tmp_path, tmp_path, best=best)
    recipe = config.load(tiny)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(config.dump(recipe))
    with pytest.raises(NoCheckpoint, match="holds no complete checkpoint"):
        score(tmp_path / "run", tmp_path)


def evaluate(*arguments: object) -> warm.Done:
    return warm.run("-m", "daybreak", "evaluate", *arguments)


def test_the_verb_says_where_the_result_is_or_what_was_wrong(foreign: Path, tmp_path: Path) -> None:
    asked = listed(tmp_path, "a bench", "a cup")
    given = (foreign, "--suite", "prompts", "--prompts", asked, "--out", tmp_path / "out")
    done = evaluate(*given, "--each", 1, "--steps", 1)
    assert done.returncode == 0, done.stderr
    name = "prompts-each1-prompts-prompts-steps1"
    assert done.stdout.splitlines() == [
        "note: no --clip was given: there is nothing to score",
        f"pictures: {tmp_path / 'out' / name}",
        f"record: {tmp_path / 'out' / name}.json",
    ]
    listed(tmp_path, "a bench", "")
    done = evaluate(*given)
    assert done.returncode == 3
    assert done.stderr.startswith("daybreak: ")
    assert done.stderr.count("\n") == 1
