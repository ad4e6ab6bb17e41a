"""What is compared: arms, seeds, and budgets that are met to the last step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daybreak import config
from daybreak.config import Recipe
from daybreak.evaluate.interim import Config as Evaluate
from daybreak.failure import BadRecipe
from daybreak.train import arms, budget, flops
from daybreak.train.arms import Arm

WATCHED = Evaluate(every=1, suites=("validation",), pictures=32)


def two_stages(tiny: Path) -> Recipe:
    text = tiny.read_text() + "\n[[stage]]\nresolution = 32\nsamples = 100\nbatch = 16\nlr = 1e-3\n"
    tiny.write_text(text)
    return config.load(tiny)


def made(loaded: list[tuple[str, Recipe]], out: Path, paid: str | None = None) -> list[Arm]:
    return arms.arms(loaded, budget.parse(paid) if paid else None, WATCHED, 4, out)


def test_the_first_recipe_is_the_baseline_and_every_change_is_an_arm(tiny: Path) -> None:
    loaded = arms.named([str(tiny)], ("dit.width=64", "dit.depth=1"), ("muon",))
    assert [name for name, _ in loaded] == ["tiny", "without muon", "dit.width=64", "dit.depth=1"]
    baseline = config.load(tiny)
    changes = [config.differences(baseline, recipe) for _, recipe in loaded]
    assert changes[0] == []
    assert changes[2] == ["dit.width: 32 -> 64"]
    assert changes[3] == ["dit.depth: 2 -> 1"]
    assert all(change.startswith("muon") for change in changes[1])


def test_changes_of_several_recipes_are_refused(tiny: Path) -> None:
    with pytest.raises(BadRecipe, match="make arms from one recipe"):
        arms.named([str(tiny), str(tiny)], ("dit.width=64",), ())


def test_a_network_that_is_not_there_is_named_before_anything_is_trained(
    tiny: Path, tmp_path: Path
) -> None:
    lost = config.load(tiny, ('text.encoder="/nowhere/encoder"',))
    with pytest.raises(BadRecipe, match=r"b: text\.encoder = '/nowhere/encoder' does not exist"):
        arms.arms([("a", config.load(tiny)), ("b", lost)], None, WATCHED, 1, tmp_path)


def test_a_recipe_against_itself_gets_other_seeds(tiny: Path, tmp_path: Path) -> None:
    loaded = arms.named([str(tiny)] * 3, (), ())
    assert [name for name, _ in loaded] == ["tiny", "tiny 2", "tiny 3"]
    found = made(loaded, tmp_path)
    assert [(arm.first_seed, arm.twin) for arm in found] == [(3, False), (1003, True), (2003, True)]
    runs = list(arms.runs(found, 2, tmp_path))
    assert [run.recipe.seed for run in runs] == [3, 1003, 2003, 4, 1004, 2004]
    assert len({run.folder for run in runs}) == 6


def test_the_folder_of_a_run_says_its_arm_as_other_files_say_what_they_hold(
    tiny: Path, tmp_path: Path
) -> None:
    changes = ("dit.width=64", "sample.prompts=[" + ", ".join(["'\u732b'"] * 40) + "]")
    found = made(arms.named([str(tiny)], changes, ("muon",)), tmp_path)
    names = [run.folder.parent.name for run in arms.runs(found, 1, tmp_path)]
    for name, said in zip(names, ("tiny", "without-muon", "dit.width=64"), strict=False):
        assert name.rpartition("-")[0] == said
    assert len(names[3].encode()) <= arms.LONGEST + len("-01234567")


def test_runs_of_a_seed_follow_one_another_and_share_it(tiny: Path, tmp_path: Path) -> None:
    found = made(arms.named([str(tiny)], ("dit.width=64",), ()), tmp_path)
    runs = list(arms.runs(found, 3, tmp_path))
    assert [(run.arm, run.number) for run in runs] == [(a, n) for n in range(3) for a in (0, 1)]
    assert [run.recipe.seed for run in runs] == [3, 3, 4, 4, 5, 5]
    assert [run.recipe.dit.width for run in runs] == [32, 64] * 3


def test_a_folder_belongs_to_one_recipe_and_budget(tiny: Path, tmp_path: Path) -> None:
    def place(*sets: str, paid: str | None = None) -> Path:
        found = made([("tiny", config.load(tiny, sets))], tmp_path, paid)
        return next(arms.runs(found, 1, tmp_path)).folder

    assert place() == place("out='elsewhere'")
    different = (place(), place("dit.width=64"), place(paid="400images"), place(paid="800images"))
    assert len(set(different)) == 4


def test_evaluations_are_the_same_for_all_and_the_last_step_is_one(
    tiny: Path, tmp_path: Path
) -> None:
    found = made([("tiny", config.load(tiny, ("stage.0.steps=10",)))], tmp_path)
    recipe = found[0].recipe
    assert recipe.evaluate is not None
    assert (recipe.evaluate.every, recipe.evaluate.suites) == (3, ("validation",))
    assert recipe.sample.every == recipe.steps


# Budgets


@pytest.mark.parametrize("pictures", [40, 180, 181, 333, 1000, 12_345])
def test_a_budget_of_pictures_is_met_to_less_than_a_batch(tiny: Path, pictures: int) -> None:
    recipe = two_stages(tiny)  # 80 pictures, then 112 in batches of 16
    given = budget.parse(f"{pictures}images")
    fitting = arms.fit(recipe, given, arms.pace(recipe, given, Path()))
    seen = arms.costs(fitting, "pictures")[-1]
    assert pictures - 16 < seen <= pictures
    first, last = fitting.stage
    assert first.count == int(pictures / 192 * 10)
    assert (last.steps, last.lr) == (None, 1e-3), "what was counted in samples still is"


@pytest.mark.parametrize("times", [0.5, 1.0, 3.7])
def test_a_budget_of_flops_is_met_to_less_than_a_step(tiny: Path, times: float) -> None:
    recipe = two_stages(tiny)
    whole = arms.costs(recipe, "flops")[-1]
    given = budget.parse(f"{times * whole:.6e}flop")
    fitting = arms.fit(recipe, given, arms.pace(recipe, given, Path()))
    spent = arms.costs(fitting, "flops")[-1]
    step = flops.of_step(recipe, recipe.stage[1], cached=False)
    assert given.amount - step < spent <= given.amount * (1 + 1e-9)


def test_costs_rise_step_by_step(tiny: Path) -> None:
    found = arms.costs(two_stages(tiny), "pictures")
    assert found == [*range(8, 81, 8), *range(96, 193, 16)]


def test_a_short_budget_shortens_the_warm_up_and_a_long_one_leaves_it(tiny: Path) -> None:
    recipe = config.load(tiny, ("stage.0.steps=100", "stage.0.warmup=20"))
    short, long = (arms.fit(recipe, budget.parse(f"{n}images"), [8.0]) for n in (400, 8000))
    assert (short.stage[0].count, short.stage[0].warmup) == (50, 10)
    assert (long.stage[0].count, long.stage[0].warmup) == (1000, 20)


def test_the_last_step_of_repa_moves_with_the_budget(tiny: Path) -> None:
    sets = ("repa={teacher='self', target=1, blocks=[0], until=8}",)
    recipe = config.load(tiny, sets)
    short = arms.fit(recipe, budget.parse("40images"), [8.0])
    assert short.repa is not None
    assert (short.steps, short.repa.until) == (5, 4)
    first = config.load(tiny, ("repa={teacher='self', target=1, blocks=[0], until=1}",))
    short = arms.fit(first, budget.parse("16images"), [8.0])
    assert short.repa is not None
    assert (short.steps, short.repa.until) == (2, 1), "of nought it would know nothing"


@pytest.mark.parametrize(
    ("complete", "moved"), [(40, 80), (80, 160), (136, 272), (192, 384), (1000, 1192)]
)
def test_complete_captions_end_where_they_did_between_stages(
    tiny: Path, complete: int, moved: int
) -> None:
    recipe = two_stages(tiny)  # 80 pictures, then 112
    recipe = config.parse(
        recipe.model_dump() | {"scenes": {"canvas": "32", "complete": complete}}, "here"
    )
    long = arms.fit(recipe, budget.parse("384images"), [8.0, 16.0])
    assert [stage.count for stage in long.stage] == [20, 14]
    assert long.scenes is not None
    assert long.scenes.complete == moved


def test_a_budget_without_a_step_for_every_stage_is_refused(tiny: Path) -> None:
    recipe = two_stages(tiny)
    with pytest.raises(BadRecipe, match=r"pays for no step of stage\.0: give at least"):
        arms.fit(recipe, budget.parse("17images"), [8.0, 16.0])


def test_a_recipe_with_a_budget_of_its_own_needs_one_for_all(tiny: Path, tmp_path: Path) -> None:
    loaded = arms.named([str(tiny)], ("budget.seconds=60", "dit.depth=1"), ())
    with pytest.raises(BadRecipe, match=r"budget\.seconds=60 has a \[budget\]"):
        made(loaded, tmp_path)
    assert [arm.recipe.budget for arm in made(loaded, tmp_path, "400images")] == [None] * 3


def test_dollars_are_no_budget_of_a_comparison(tiny: Path) -> None:
    with pytest.raises(BadRecipe, match="give --budget in min, flop or images"):
        arms.pace(config.load(tiny), budget.parse("5usd"), Path())


def test_a_budget_of_time_is_measured_once_and_gives_each_arm_its_own_steps(
    tiny: Path, tmp_path: Path
) -> None:
    loaded = arms.named([str(tiny)], ("stage.0.batch=64",), ())
    first = made(loaded, tmp_path, "20s")
    small, large = (arm.recipe.steps for arm in first)
    assert small > large > 10
    speeds = (tmp_path / "speeds.json").read_text()
    assert made(loaded, tmp_path, "20s") == first
    assert (tmp_path / "speeds.json").read_text() == speeds
    twice = made(loaded, tmp_path, "40s")
    assert abs(twice[0].recipe.steps - 2 * small) <= 1


def test_speeds_of_another_machine_are_measured_anew_and_both_are_kept(
    tiny: Path, tmp_path: Path
) -> None:
    file, second = tmp_path / "speeds.json", budget.parse("1s")
    recipe = config.load(tiny)
    mine = arms.pace(recipe, second, tmp_path)
    kept = json.loads(file.read_text())
    kept["speeds"][0] |= {"machine": {"processor": "another"}, "seconds": [1e9]}
    file.write_text(json.dumps(kept))
    assert 0 < arms.pace(recipe, second, tmp_path)[0] < 100 * mine[0]
    assert [one["seconds"][0] == 1e9 for one in json.loads(file.read_text())["speeds"]] == [1, 0]
    otherwise = config.load(tiny, ("sample.steps=9", "out='elsewhere'"))
    before = file.read_text()
    arms.pace(otherwise.model_copy(update={"out": recipe.out}), second, tmp_path)
    assert file.read_text() == before, "no step depends on how pictures are drawn"


def test_costs_are_counted_as_the_budget_is() -> None:
    assert arms.unit(budget.parse("1e15flop"), None) == "flops"
    assert arms.unit(budget.parse("10min"), 0.8) == "seconds"
    assert arms.unit(None, 0.8) == "seconds"
    assert arms.unit(None, None) == "pictures"


def test_scores_of_other_scenes_are_not_compared(tiny: Path, tmp_path: Path) -> None:
    one, other = config.load(tiny), config.load(tiny, ("scenes.objects=[1, 1]",))
    asked = Evaluate(every=1, suites=("scenes",))
    with pytest.raises(BadRecipe, match=r"evaluated differently, because scenes\.objects differs"):
        arms.arms([("one", one), ("other", other)], None, asked, 4, tmp_path)


@pytest.mark.parametrize(
    ("change", "suites", "words"),
    [
        ("scenes.held_out=['H1']", ("validation",), r"scenes\.held_out differs"),
        ("scenes.under_specified=0.5", ("validation",), "--metric scenes.exact"),
        ("scenes.under_specified=0.5", ("distribution",), "--metric scenes.exact"),
        ("flow.noise_scale=2.0", ("validation",), r"flow\.noise_scale differs"),
    ],
)
def test_values_of_other_pictures_or_noise_are_not_compared(
    tiny: Path, tmp_path: Path, change: str, suites: tuple[Any, ...], words: str
) -> None:
    recipes = [("one", config.load(tiny)), ("other", config.load(tiny, (change,)))]
    asked = Evaluate(every=1, suites=suites, pictures=32)
    with pytest.raises(BadRecipe, match=f"other and one would be evaluated differently, .*{words}"):
        arms.arms(recipes, None, asked, 4, tmp_path)


@pytest.mark.parametrize(
    ("change", "suite"),
    [("scenes.complete=40", "validation"), ("scenes.under_specified=0.5", "scenes")],
)
def test_what_only_training_sees_may_differ(
    tiny: Path, tmp_path: Path, change: str, suite: Any
) -> None:
    recipes = [("one", config.load(tiny)), ("other", config.load(tiny, (change,)))]
    asked = Evaluate(every=1, suites=(suite,), pictures=32)
    assert len(arms.arms(recipes, None, asked, 4, tmp_path)) == 2


def test_recipes_that_end_at_other_resolutions_are_not_compared_on_a_dataset(
    tiny: Path, tmp_path: Path, prepared: Callable[..., Path]
) -> None:
    held = prepared([{}] * 32)
    on_pictures = (f"data.source={json.dumps(held.as_posix())}",)
    one, fine, large = (
        config.load(tiny, (*on_pictures, *change), ("scenes",))
        for change in ((), ("dit.patch=16",), ("stage.0.resolution=64",))
    )
    asked = Evaluate(every=1, suites=("validation",), pictures=32, data=str(held))
    assert len(arms.arms([("one", one), ("fine", fine)], None, asked, 4, tmp_path)) == 2
    with pytest.raises(BadRecipe, match="the last stage's resolution differs"):
        arms.arms([("one", one), ("large", large)], None, asked, 4, tmp_path)


def test_a_metric_that_an_arm_cannot_have_is_refused(tiny: Path, tmp_path: Path) -> None:
    recipe = config.load(tiny, ("data.source='somewhere'",), ("scenes",))
    with pytest.raises(BadRecipe, match=r"tiny is not trained on scenes: .* with --data"):
        made([("tiny", recipe)], tmp_path)
    asked = Evaluate(every=1, suites=("distribution",), data="held")
    with pytest.raises(BadRecipe, match="--features"):
        arms.arms([("tiny", recipe)], None, asked, 4, tmp_path)
