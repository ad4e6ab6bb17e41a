"""Comparisons: the clock, what follows from results, and whether the instrument can be trusted."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from daybreak import cli, config
from daybreak.config import Recipe
from daybreak.evaluate import statistics
from daybreak.evaluate.interim import Config as Evaluate
from daybreak.failure import BadRecipe, BadStorage
from daybreak.train import arms, compare, evaluations, record
from daybreak.train.arms import Arm, Run
from daybreak.train.compare import Comparison, Outcome, Question

QUESTION = Question("scenes.exact")


@pytest.fixture
def recipe(tiny: Path) -> Recipe:
    return config.load(tiny)


def outcomes(
    recipe: Recipe, values: Sequence[Sequence[float]], question: Question = QUESTION
) -> Comparison:
    """A comparison of arms that ended with these values, one list for each arm."""
    made = [Arm(f"arm {place}", recipe, 0, False) for place in range(len(values))]
    found = [
        Outcome(Run(place, number, recipe), value, [(1.0, 0.0), (2.0, value)], 2.0, 3.0, {})
        for place, arm in enumerate(values)
        for number, value in enumerate(arm)
    ]
    return compare.compare(made, found, question)


# The clock


def lines(took: Sequence[float], waited: float = 0.0) -> list[dict[str, float]]:
    return [{"waited": waited, "worked": seconds} for seconds in took]


def test_the_clock_counts_waiting_and_working(recipe: Recipe) -> None:
    assert compare.clock(recipe, lines([1.0] * 10, waited=0.5))[-1] == 15.0


def test_steps_that_compile_count_as_usual_ones(recipe: Recipe) -> None:
    assert compare.clock(recipe, lines([40.0, 1.0, 9.0, *[1.0] * 7]))[-1] == 10.0
    assert compare.clock(recipe, lines([2.5, *[1.0] * 9]))[-1] == 11.5, "this is no compilation"


def test_a_slow_step_after_the_warm_up_counts_in_full(tiny: Path) -> None:
    long = config.load(tiny, ("stage.0.steps=100",))
    took = [1.0] * 100
    took[20] = took[70] = 50.0
    assert compare.clock(long, lines(took))[-1] == 99 + 50


def test_a_run_that_goes_on_may_compile_again(tiny: Path) -> None:
    long = config.load(tiny, ("stage.0.steps=200",))
    took = [1.0] * 200
    took[100] = took[140] = took[160] = 50.0
    steps = lines(took)
    assert compare.clock(long, steps)[-1] == 197 + 150
    steps[100]["resumed"] = 1
    assert compare.clock(long, steps)[-1] == 199 + 50


def test_every_stage_has_a_warm_up_of_its_own(tiny: Path) -> None:
    tiny.write_text(
        tiny.read_text() + "\n[[stage]]\nresolution = 32\nsteps = 5\nbatch = 8\nlr = 1\n"
    )
    took = [9.0, *[1.0] * 9, 90.0, *[2.0] * 4]
    assert compare.clock(config.load(tiny), lines(took)) == [*range(1, 11), *range(12, 21, 2)]


# What follows


def test_a_clear_difference_is_called_by_its_name(recipe: Recipe) -> None:
    base = [0.50, 0.52, 0.48, 0.51, 0.49]
    up, down = ([value + by for value in base] for by in (0.06, -0.06))
    found = outcomes(recipe, [base, up, down])
    assert [one.verdict.word for one in found.versus] == ["not resolved"] * 2, "five are too few"
    assert statistics.seeds_for(2) == 6
    six = [[*arm, arm[0]] for arm in (base, up, down)]
    words = [one.verdict.word for one in outcomes(recipe, six).versus]
    assert words == ["better", "worse"]


def test_where_lower_is_better_less_is_a_gain(recipe: Recipe) -> None:
    question = Question("validation.loss")
    found = outcomes(recipe, [[1.0, 1.1, 0.9, 1.0, 1.05], [0.8, 0.9, 0.7, 0.8, 0.85]], question)
    assert found.versus[0].verdict.word == "better"
    assert found.versus[0].paired is not None
    assert found.versus[0].paired.gain == pytest.approx(0.2)


def test_a_difference_below_the_margin_is_not_worth_having(recipe: Recipe) -> None:
    values = [[0.5, 0.6, 0.4, 0.5, 0.55], [0.51, 0.61, 0.41, 0.51, 0.56]]
    assert outcomes(recipe, values).versus[0].verdict.word == "better"
    found = outcomes(recipe, values, Question("scenes.exact", margin=0.02))
    assert found.versus[0].verdict.word == "not resolved"


def test_several_arms_are_corrected_together(recipe: Recipe) -> None:
    rng = np.random.default_rng(0)
    values = [rng.normal(0.5, 0.02, 7).tolist() for _ in range(4)]
    found = outcomes(recipe, values)
    for one in found.versus:
        assert one.paired is not None
        assert one.p is not None
        assert one.p >= one.paired.p


@pytest.mark.parametrize(
    ("comparisons", "seeds"), [(0, 5), (1, 5), (2, 6), (3, 6), (4, 7), (12, 8)]
)
def test_the_fewest_seeds_that_can_tell(comparisons: int, seeds: int) -> None:
    assert statistics.seeds_for(comparisons) == seeds
    assert max(1, comparisons) * 2.0**-seeds <= 0.05


def test_a_run_that_diverged_is_not_dropped(recipe: Recipe) -> None:
    good, bad = [0.5, 0.6, 0.4, 0.5, 0.55], [0.9, 0.9, math.nan, 0.9, 0.9]
    found = outcomes(recipe, [good, bad, good])
    assert math.isnan(found.rows[1].mean)
    assert found.versus[0].verdict.word == "worse"
    assert "diverged" in found.versus[0].verdict.sentence
    assert found.versus[1].paired is not None
    found = outcomes(recipe, [bad, good])
    assert found.versus[0].verdict.word == "not resolved"


def test_a_target_that_was_missed_is_censored(recipe: Recipe) -> None:
    question = Question("scenes.exact", "pictures", target=0.5)
    found = outcomes(recipe, [[0.4, 0.6, 0.6], [0.8, 0.8, 0.4]], question)
    base, other = found.rows
    assert [(one.cost, one.met) for one in base.reached] == [(2, False), (2, True), (2, True)]
    assert [one.met for one in other.reached] == [True, True, False]
    race = found.versus[0].race
    assert race is not None
    assert (race.met, race.horizon) == ((2, 2), 2.0)
    assert base.meets is not None
    assert base.meets > 0.05


def test_a_target_that_is_met_at_once_or_never_makes_no_race(recipe: Recipe) -> None:
    values = [[0.4, 0.5, 0.4, 0.5, 0.4], [0.8, 0.8, 0.7, 0.9, 0.8]]
    for target, said in (
        (0.95, "no run of arm 1 or arm 0 reached 0.95: nothing to compare"),
        (0.0, "10 of 10 runs reached 0 by their first evaluation, so when is not known"),
    ):
        found = outcomes(recipe, values, Question("scenes.exact", "pictures", target=target))
        assert record._against(found.versus[0], "arm 0", found)[-1].startswith(said)


def test_one_arm_alone_is_held_against_the_target(recipe: Recipe) -> None:
    question = Question("scenes.exact", "seconds", target=0.5)
    found = outcomes(recipe, [[0.60, 0.61, 0.62, 0.60, 0.61]], question)
    assert found.versus == []
    assert found.rows[0].meets is not None
    assert found.rows[0].meets < 0.01


def test_questions_are_compared_one_by_one_where_they_are_the_same(recipe: Recipe) -> None:
    def arm(place: int, passed: dict[str, bool]) -> Outcome:
        return Outcome(Run(place, 0, recipe), 0.5, [(1.0, 0.5)], 1.0, 1.0, passed)

    made = [Arm(name, recipe, 0, False) for name in "ab"]
    base = {f"question {n}": n < 5 for n in range(10)}
    other = {f"question {n}": n < 8 for n in range(10)}
    test = compare.compare(made, [arm(0, base), arm(1, other)], QUESTION).versus[0].mcnemar
    assert [(one.gained, one.lost) for one in test] == [(3, 0)]
    elsewhere = {"another question": True}
    pair = [arm(0, base), arm(1, elsewhere)]
    assert list(compare.compare(made, pair, QUESTION).versus[0].mcnemar) == []


# Whether it can be trusted


def verdicts(recipe: Recipe, gain: float, noise: float, seeds: int, times: int) -> list[str]:
    """Verdicts on comparisons of results around 1; the better ones are better by `gain`."""
    rng = np.random.default_rng(1)
    found: list[str] = []
    for _ in range(times):
        shared = rng.normal(0, noise, seeds)  # what a seed does to both arms
        base, other = (1 + shared + rng.normal(0, noise, seeds) for _ in range(2))
        made = outcomes(recipe, [base.tolist(), (other + gain).tolist()])
        found.append(made.versus[0].verdict.word)
    return found


def test_of_equal_recipes_few_are_called_different(recipe: Recipe) -> None:
    words = verdicts(recipe, 0.0, 0.02, 5, 200)
    assert words.count("better") <= 0.08 * len(words)
    assert words.count("worse") <= 0.08 * len(words)


def test_p_values_of_equal_recipes_are_uniform(recipe: Recipe) -> None:
    """Of 2^9 equally likely values, so nearly continuous."""
    rng = np.random.default_rng(3)
    ps = []
    for _ in range(150):
        found = outcomes(recipe, rng.normal(0.5, 0.02, (2, 9)).tolist()).versus[0].paired
        assert found is not None
        ps.append(found.p_better)
    assert stats.kstest(ps, "uniform").pvalue > 0.01


def test_an_improvement_of_a_tenth_is_found_with_five_seeds(recipe: Recipe) -> None:
    words = verdicts(recipe, 0.10, 0.02, 5, 60)
    assert words.count("better") >= 0.95 * len(words)


def test_an_improvement_of_half_a_percent_is_reported_as_not_resolved(recipe: Recipe) -> None:
    words = verdicts(recipe, 0.005, 0.02, 5, 60)
    assert words.count("not resolved") >= 0.85 * len(words)


# Real runs


@pytest.fixture
def quick(tiny: Path, pictures: Path, prepared: Callable[..., Path]) -> tuple[Path, Evaluate]:
    """A recipe of half a second, and pictures to measure it with."""
    text = tiny.read_text().replace('[scenes]\ncanvas = "32"\n', "")
    tiny.write_text(text.replace('"scenes"', json.dumps(pictures.as_posix())))
    held = prepared([{"captions": [f"colour number {n}"]} for n in range(32)])
    return tiny, Evaluate(every=1, suites=("validation",), pictures=32, data=str(held))


def done(
    recipes: Sequence[tuple[str, Recipe]], asked: Evaluate, seeds: int, out: Path, target: float
) -> Comparison:
    made = arms.arms(recipes, None, asked, 3, out)
    runs = list(arms.runs(made, seeds, out))
    assert compare.run(runs, made, lambda line: None) == 0
    question = Question("validation.loss", "pictures", target)
    return compare.compare(made, [compare.read(one, question) for one in runs], question)


def test_real_runs_are_compared_and_used_again(
    quick: tuple[Path, Evaluate], tmp_path: Path
) -> None:
    path, asked = quick
    slow = ("slow", config.load(path, ("stage.0.lr=1e-6",)))
    recipes = [("tiny", config.load(path)), slow, ("wild", config.load(path, ("stage.0.lr=1e30",)))]
    found = done(recipes, asked, 2, tmp_path / "out", 1e9)
    base, slow_row, wild = found.rows
    assert slow_row.mean > base.mean
    assert math.isnan(wild.mean)
    assert "diverged" in found.versus[1].verdict.sentence
    assert "fewer than 5 seeds" in found.versus[0].verdict.sentence
    assert [cost for cost, _ in base.outcomes[0].curve] == [32, 64, 80]
    assert all(outcome.seconds < outcome.wall for outcome in base.outcomes)
    assert base.reached[0][:2] == (32, True)

    def stamps() -> list[int]:
        return [path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("checkpoint-10/*")]

    before = stamps()
    again = done(recipes[:2], asked, 2, tmp_path / "out", 1e9)
    assert again.rows == [base, slow_row]
    assert stamps() == before

    wild_runs = [outcome.run for outcome in wild.outcomes]
    ended = [(run.folder / "status.json").stat().st_mtime_ns for run in wild_runs]
    said = list[str]()
    assert compare.run(wild_runs, [row.arm for row in found.rows], said.append) == 0
    assert [(run.folder / "status.json").stat().st_mtime_ns for run in wild_runs] == ended
    assert sum("diverged before" in line for line in said) == 2, "it would diverge again"


def test_what_is_only_asked_otherwise_is_not_trained_again(
    quick: tuple[Path, Evaluate], tmp_path: Path
) -> None:
    path, asked = quick
    recipe, out = config.load(path), tmp_path / "out"
    wild = config.load(path, ("stage.0.lr=1e30",))
    wild_before = done([("wild", wild)], asked, 1, out, 1e9)
    before = done([("tiny", recipe)], asked, 1, out, 1e9).rows[0].outcomes[0]
    other = recipe.model_copy(update={"sample": recipe.sample.model_copy(update={"steps": 3})})
    fewer = asked.model_copy(update={"suites": ("distribution",), "features": "scenes"})

    def planned(name: str, recipe: Recipe, asked: Evaluate) -> Run:
        return next(arms.runs(arms.arms([(name, recipe)], None, asked, 3, out), 1, out))

    run = planned("tiny", other, asked)
    assert arms.reuse([run], out, whole=True) == [], "the way to a target cannot be asked again"
    assert arms.reuse([run], out, whole=False) == [run]
    assert evaluations.lines(run.folder) == [], "they were asked with other settings"
    said = list[str]()
    assert compare.run([run], [Arm("tiny", other, 3, False)], said.append) == 0
    assert not any("from random weights" in line for line in said)
    again = compare.read(run, Question("validation.loss"))
    assert (again.value, again.seconds) == (before.value, before.seconds)
    assert [cost for cost, _ in again.curve] == [80]
    assert arms.reuse([run], out, whole=False) == []
    with pytest.raises(BadRecipe, match="after its last step only, and --target needs"):
        arms.reuse([run], out, whole=True)

    renamed = planned("renamed", recipe, asked)
    assert arms.reuse([renamed], out, whole=True) == [renamed]
    assert compare.read(renamed, Question("validation.loss")).curve == before.curve
    assert arms.reuse([planned("tiny", recipe, fewer)], out, whole=False)
    assert not arms.reuse([planned("new", config.load(path, ("clip=0.5",)), asked)], out, False)
    gone = planned("gone", wild, asked.model_copy(update={"per_task": 30}))
    assert arms.reuse([gone], out, whole=False) == [gone]
    assert math.isnan(compare.read(gone, Question("validation.loss")).value)
    assert math.isnan(wild_before.rows[0].mean)


def test_a_run_whose_last_evaluation_is_missing_is_not_called_diverged(
    quick: tuple[Path, Evaluate], tmp_path: Path
) -> None:
    path, asked = quick
    made = arms.arms([("tiny", config.load(path, ("stage.0.steps=2",)))], None, asked, 1, tmp_path)
    run = next(arms.runs(made, 1, tmp_path))
    assert compare.run([run], made, lambda line: None) == 0
    question = Question("validation.loss")
    assert math.isfinite(compare.read(run, question).value)
    file = run.folder / evaluations.FILE
    kept = file.read_text()
    file.write_text("")
    with pytest.raises(BadStorage, match="has no evaluation after its last step"):
        compare.read(run, question)
    assert compare.run([run], made, lambda line: None) == 0
    assert evaluations.lines(run.folder)[0]["values"] == json.loads(kept)["values"]


def test_a_run_without_one_finite_step_has_diverged(recipe: Recipe) -> None:
    run = Run(0, 0, recipe)
    run.folder.mkdir()
    (run.folder / "status.json").write_text('{"state": "failed", "code": 5}')
    for unit in ("pictures", "flops", "seconds"):
        found = compare.read(run, Question("scenes.exact", unit))
        assert math.isnan(found.value)
        assert (found.curve, found.seconds, found.wall) == ([], 0.0, 0.0)


def test_the_way_to_a_value_is_that_at_the_last_resolution(tiny: Path) -> None:
    tiny.write_text(
        tiny.read_text() + "\n[[stage]]\nresolution = 32\nsteps = 10\nbatch = 8\nlr = 1\n"
    )
    run = Run(0, 0, config.load(tiny))
    (run.folder / "evaluation").mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text("")
    rows: list[dict[str, Any]] = [{"step": 10, "resolution": 16}, {"step": 20, "resolution": 32}]
    values = {"sides": {}, "values": {"validation.loss": {"value": 0.5}}}
    text = "".join(json.dumps(row | values) + "\n" for row in rows)
    (run.folder / evaluations.FILE).write_text(text)
    assert compare.read(run, Question("validation.loss")).curve == [(160.0, 0.5)]


def test_a_value_that_was_not_measured_is_refused_with_those_that_were(
    tiny: Path, tmp_path: Path
) -> None:
    recipe = config.load(tiny, ("stage.0.steps=1",))
    asked = Evaluate(every=1, suites=("scenes",), per_task=5)
    made = arms.arms([("a", recipe)], None, asked, 1, tmp_path)
    run = next(arms.runs(made, 1, tmp_path))
    assert compare.run([run], made, lambda line: None) == 0
    with pytest.raises(
        BadRecipe, match=r"scenes\.three was not measured: name one of scenes\.exact"
    ):
        compare.read(run, Question("scenes.three"))
    passed = compare.read(run, QUESTION).passed
    assert len(passed) == 30, "six tasks of five prompts; what is held out is another metric"
    assert len(compare.read(run, Question("scenes.position")).passed) == 5
    assert len(compare.read(run, Question("scenes.H1")).passed) == 5


# The verb


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{tiny}",), "there is nothing to compare with"),
        (("{tiny}", "{tiny}", "--metric", "scenes.accuracy"), "there are exact, single"),
        (("{tiny}", "{tiny}", "--metric", "scenes.three"), "name one of scenes.exact"),
        (
            ("{tiny}", "{tiny}", "--metric", "distribution.frechet"),
            "name one of distribution.scenes.frechet",
        ),
        (("{tiny}", "{tiny}", "--budget", "5usd"), "give --budget in min, flop or images"),
        (("{tiny}", "{tiny}", "--budget", "3images"), "pays for no step of stage.0: give at least"),
        (("{tiny}", "{tiny}", "--without", "muon"), "make arms from one recipe"),
        (("{tiny}", "{pictures}"), "pictures is not trained on scenes: give a --metric"),
        (("{tiny}", "--without", "moun"), "did you mean muon"),
        (("{tiny}", "{tiny}", "--target", "nan"), "--target and --margin must be finite"),
        (("{tiny}", "{tiny}", "--margin", "inf"), "--target and --margin must be finite"),
        (("{tiny}", "{tiny}", "--data", "{folder}"), "--data is for validation and distribution"),
        (("{tiny}", "{tiny}", "--features", "clip"), "--features is for distribution"),
        (("{tiny}", "{tiny}", "--record", "{folder}"), "exists already"),
        (("{tiny}", "nowhere.toml"), "there is no recipe 'nowhere.toml'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_first_run(
    tiny: Path, tmp_path: Path, arguments: Sequence[str], words: str
) -> None:
    other = tmp_path / "pictures.toml"
    text = tiny.read_text().replace('[scenes]\ncanvas = "32"\n', "")
    other.write_text(text.replace('"scenes"', '"somewhere"'))
    filled = [one.format(tiny=tiny, folder=tmp_path, pictures=other) for one in arguments]
    out = tmp_path / "out"
    done = CliRunner().invoke(cli.app, ["compare", *filled, "--out", str(out)])
    assert isinstance(done.exception, BadRecipe)
    assert words in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not out.exists()


def test_several_processes_are_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(cli.app, ["compare", str(tiny), str(tiny)])
    assert isinstance(done.exception, BadRecipe)
    assert "start it without torchrun" in str(done.exception)


def test_a_share_above_one_is_refused_before_anything_is_trained(
    tiny: Path, tmp_path: Path
) -> None:
    arguments = ["compare", str(tiny), str(tiny), "--target", "2", "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(cli.app, arguments)
    assert isinstance(done.exception, BadRecipe)
    assert "--target 2: scenes.exact is a share between 0 and 1" in str(done.exception)
    assert not (tmp_path / "o").exists()


def test_one_command_trains_compares_and_records(
    quick: tuple[Path, Evaluate], tmp_path: Path
) -> None:
    path, asked = quick
    arguments = ["compare", path, "--set", "stage.0.lr=1e-5", "--seeds", 2, "--budget", "48images"]
    arguments += ["--metric", "validation.loss", "--pictures", 32, "--data", asked.data]
    arguments += ["--target", "1e9", "--out", tmp_path / "o", "--record", tmp_path / "r"]
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert "2 seeds resolve no difference between 2 arms: give --seeds 5" in done.stdout
    assert "stage.0.lr=1e-5 against tiny: not resolved" in done.stdout
    for folder in (tmp_path / "o", tmp_path / "r"):
        kept = json.loads((folder / "comparison.json").read_text())
        assert [arm["pictures"] for arm in kept["arms"]] == [48, 48]
        assert kept["question"]["budget"] == "48images"
        assert (folder / "chart.png").is_file()
        with (folder / "runs.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(row["seed"], row["step"]) for row in rows] == [("3", "6"), ("4", "6")] * 2
        assert all(float(row["validation.loss"]) > 0 for row in rows)
    assert len(list((tmp_path / "r" / "logs").iterdir())) == 8


@pytest.mark.slow
def test_real_runs_of_one_recipe_are_not_told_apart(
    quick: tuple[Path, Evaluate], tmp_path: Path
) -> None:
    """Twenty comparisons of a recipe with itself, seven seeds each."""
    path, asked = quick
    ps, words = [], []
    for number in range(20):
        recipe = config.load(path, (f"seed={10_000 * number}", "stage.0.steps=4"))
        found = done([("a", recipe), ("b", recipe)], asked, 7, tmp_path / str(number), 0.0)
        assert found.rows[1].arm.twin
        assert found.versus[0].paired is not None
        ps.append(found.versus[0].paired.p_better)
        words.append(found.versus[0].verdict.word)
    assert stats.kstest(ps, "uniform").pvalue > 0.01
    assert words.count("not resolved") >= 16


@pytest.mark.slow
def test_a_real_improvement_is_found_with_five_seeds(tiny: Path, tmp_path: Path) -> None:
    recipes = [
        ("timid", config.load(tiny, ("stage.0.steps=40", "stage.0.lr=3e-4"))),
        ("usual", config.load(tiny, ("stage.0.steps=40",))),
    ]
    asked = Evaluate(every=1, suites=("validation",), pictures=64)
    found = done(recipes, asked, 5, tmp_path / "out", 0.0)
    assert found.versus[0].verdict.word == "better"
    assert found.versus[0].p == 1 / 32
