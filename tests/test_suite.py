"""Suites: what an artist is asked, what a result holds, and how values are named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from daybreak.data import scenes as drawn_scenes
from daybreak.evaluate import examples, scenes_questions, suite, validation
from daybreak.evaluate.artist import Artist, Pictures, ours
from daybreak.evaluate.distances import Estimate
from daybreak.evaluate.suite import Result
from daybreak.failure import BadRecipe, BadStorage
from daybreak.generate import sampler
from daybreak.model import dit, flow, text
from daybreak.model.text_to_image import TextToImage, build

CONFIG = drawn_scenes.Config(canvas="32")


def perfect(seed: int, per_task: int) -> Artist:
    """Draws for every prompt of a list the scene it was made from."""
    asked = [
        *scenes_questions.tasks(CONFIG, seed, per_task),
        *scenes_questions.held_out(CONFIG, seed, per_task),
    ]
    by_seed = {item.seed: item.scene for item in asked}

    def draw(prompts: Any, seeds: Any, height: int, width: int) -> Pictures:
        return drawn_scenes.renders([by_seed[number] for number in seeds])

    return Artist(draw, 32, 8, "f00d" * 16, {"weights": "ema"})


@pytest.fixture(scope="module")
def model() -> TextToImage:
    settings = text.Config(width=32, depth=1, heads=2, vocabulary=300, max_tokens=24)
    tokenizer = text.learn_tokenizer(["a red circle"], settings)
    return build(dit.Config(patch=8, bottleneck=0, width=32, depth=2, heads=2), settings, tokenizer)


def test_an_artist_that_draws_what_is_asked_has_every_point() -> None:
    result = suite.scenes(perfect(7, 5), CONFIG, 7, 5)
    value, low, high = result.values["exact"][:3]
    assert (value, high) == pytest.approx((1, 1))
    assert 0.8 < low < 1, "thirty pictures are no certainty either"
    assert {"single", "position", "H1", "H4", "shuffled", "ground_truth"} <= result.values.keys()
    assert not {"three", "size", "H5"} & result.values.keys(), "nothing of them was asked"
    assert {*scenes_questions.names(CONFIG), "shuffled", "ground_truth"} == result.values.keys()
    assert result.values["single"].low < 0.6, "five pictures are no certainty"
    assert result.pictures == len(result.details["items"])
    assert all(item["passed"] for item in result.details["items"])


def test_pictures_of_another_size_are_refused_with_a_remedy() -> None:
    with pytest.raises(BadRecipe, match=r"are 64 px and the model draws 32 px.*--resolution 64"):
        suite.scenes(perfect(7, 5), drawn_scenes.Config(canvas="64"), 7, 5)


def test_the_validation_loss_is_the_same_however_its_pictures_come(model: TextToImage) -> None:
    whole = suite.validate(model, examples.of_scenes(CONFIG, 1, 70), seed=2)
    again = suite.validate(model, examples.of_scenes(CONFIG, 1, 70), seed=2)
    assert whole == again
    assert suite.validate(model, examples.of_scenes(CONFIG, 1, 70), seed=3) != whole
    assert list(whole.values)[:2] == ["loss", "velocity 0.0-0.3"]
    loss = whole.values["loss"]
    assert loss.low < loss.value < loss.high
    # A fresh network guesses nothing: what remains is the picture's own spread.
    assert 0.02 < whole.values["image 0.6-1.0"].value < 1


def test_other_pictures_would_give_values_within_the_interval(model: TextToImage) -> None:
    """Of twenty sets of pictures most have the long-run loss inside: 19 on average."""
    runs = [
        suite.validate(model, examples.of_scenes(CONFIG, seed, 40), seed=seed).values["loss"]
        for seed in range(20)
    ]
    centre = float(np.mean([run.value for run in runs]))
    assert sum(run.low <= centre <= run.high for run in runs) >= 16


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("scenes.exact", False),
        ("scenes.H1", False),
        ("validation.loss", True),
        ("validation.velocity 0.0-0.3", True),
        ("validation.image 0.6-1.0", True),
        ("distribution.clip.cmmd", True),
        ("distribution.scenes.kernel", True),
        ("distribution.a.b.frechet", True),
        ("distribution.dinov2.recall", False),
    ],
)
def test_a_metric_knows_its_suite_and_which_way_is_up(metric: str, lower: bool) -> None:
    assert suite.suite_of(metric) == metric.partition(".")[0]
    assert suite.lower_is_better(metric) is lower


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("exact", "name a suite"),
        ("prompts.clip_score", "name a suite"),
        ("scenes.accuracy", "there are exact, single"),
        ("validation", "name a suite"),
        ("distribution.fid", "as in distribution.clip.cmmd"),
    ],
)
def test_a_metric_that_does_not_exist_is_refused_with_those_that_do(
    metric: str, words: str
) -> None:
    with pytest.raises(BadRecipe, match=words):
        suite.suite_of(metric)


def test_every_value_that_a_run_can_measure_has_a_name(model: TextToImage) -> None:
    found = {
        "scenes": suite.scenes(perfect(7, 5), CONFIG, 7, 5),
        "validation": suite.validate(model, examples.of_scenes(CONFIG, 1, 10)),
    }
    controls = {"shuffled", "ground_truth"}
    for name, result in found.items():
        for value in result.values.keys() - controls:
            suite.suite_of(f"{name}.{value}")


def test_a_record_says_all_that_decided_the_result(model: TextToImage, tmp_path: Path) -> None:
    how = sampler.Config(steps=7, guidance=2.0)
    by = ours(model, 32, how, flow.Config(), digest="f00d" * 16, facts={"checkpoint": {"step": 3}})
    values = {"kernel": Estimate(0.5, 0.4, np.inf), "frechet": Estimate(9.0, 8.0, 10.0, 0.25)}
    result = Result(values, 10, {"examples": "abc"}, ["mind the gap"])
    found = suite.record("distribution", by, result, 4, {"revision": "1234"})
    suite.write(tmp_path / "deep" / "distribution.json", found)
    kept = json.loads((tmp_path / "deep" / "distribution.json").read_text())
    assert kept["values"]["kernel"] == {"value": 0.5, "low": 0.4, "high": None}
    assert kept["values"]["frechet"]["bias"] == 0.25
    assert kept["sampler"]["steps"] == 7
    assert kept["checkpoint"] == {"step": 3}
    for key in ("suite", "examples", "pictures", "remarks", "seed", "seed_rule", "weights_sha256"):
        assert key in kept
    assert (kept["revision"], kept["weights"]) == ("1234", "ema")
    assert (kept["seed"], kept["seed_rule"]) == (4, suite.SEED_RULE)


def test_a_record_holds_the_seed_and_the_rule_that_its_suite_has_used(model: TextToImage) -> None:
    by = perfect(7, 5)
    loss = suite.validate(model, examples.of_scenes(CONFIG, 1, 10), seed=2)
    kept = suite.record("validation", by, loss, 9, {})
    assert (kept["seed"], kept["seed_rule"]) == (2, validation.SEED_RULE)
    assert kept["examples_seed"] == 1

    kept = suite.record("scenes", by, suite.scenes(by, CONFIG, 7, 5), 7, {})
    assert kept["seed_rule"] == scenes_questions.SEED_RULE
    start = int(np.random.Philox(key=kept["seed"]).random_raw() >> 2)
    assert kept["items"][0]["seed"] == start, "the first item has index 0"


def test_a_place_that_cannot_be_written_is_a_storage_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadStorage, match="--out"):
        suite.write(tmp_path / "file" / "scenes.json", {})


def test_a_table_has_one_row_for_each_value() -> None:
    rows = suite.table(Result({"loss": Estimate(0.123456, 0.1, 0.15)}, 512))
    assert rows == [("loss", "0.1235", "0.1 - 0.15", "512")]


def test_a_mean_of_one_picture_has_no_interval() -> None:
    assert suite.mean(np.array([2.0])) == Estimate(2.0, -np.inf, np.inf)
    low, high = suite.mean(np.array([1.0, 3.0] * 50))[1:3]
    assert (low, high) == pytest.approx((2 - 0.197, 2 + 0.197), abs=1e-3)


def test_torch_is_not_disturbed(model: TextToImage) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    suite.validate(model, examples.of_scenes(CONFIG, 1, 10))
    assert torch.equal(torch.rand(3), expected)
