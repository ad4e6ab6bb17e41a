"""Recipes: strict, complete, and clear about what is wrong."""

import tomllib
from pathlib import Path

import pytest

from daybreak import config
from daybreak.failure import BadRecipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_resolved_recipe_reads_back_equal(path: Path, tmp_path: Path) -> None:
    recipe = config.load(path)
    copy = tmp_path / "recipe.toml"
    copy.write_text(config.dump(recipe))
    assert config.load(copy) == recipe
    assert config.digest(config.load(copy)) == config.digest(recipe)


def test_a_stage_can_be_written_behind_a_resolved_recipe(tiny: Path) -> None:
    recipe = config.load(tiny, ("stage.0.steps=9",))  # a short row
    more = "[[stage]]\nresolution = 32\nsteps = 9\nbatch = 8\nlr = 1e-3\n"
    longer = config.parse(tomllib.loads(config.dump(recipe) + more), "more.toml")
    assert longer.stage[:-1] == recipe.stage
    assert longer.stage[-1].steps == 9


def test_data_that_is_named_by_nothing_is_refused(tiny: Path) -> None:
    sets = config.assigned({"out": None, "data.source": ""})  # --data "$UNSET"
    with pytest.raises(BadRecipe, match=r"data\.source: no source is named"):
        config.load(tiny, tuple(sets), ("scenes",))


def test_a_built_in_recipe_is_found_by_name() -> None:
    assert config.load("quickstart") == config.load(RECIPES[0].parent / "quickstart.toml")


def test_set_changes_a_value_and_without_removes_a_section(tiny: Path) -> None:
    recipe = config.load(
        tiny,
        ("stage.0.steps=7_000", "stage.0.lr=3e-4", "out=some where", 'sample.prompts=["x"]'),
        ("muon",),
    )
    assert recipe.stage[0].steps == 7000
    assert recipe.stage[0].lr == 3e-4
    assert recipe.out == "some where"
    assert recipe.sample.prompts == ("x",)
    assert recipe.muon is None


WRONG = [
    ("dit.wdith=8", r"unknown key dit\.wdith; did you mean width\?"),
    ("stage.0.stpes=8", r"unknown key stage\.0\.stpes; did you mean steps\?"),
    ("hidden_size=8", r"hidden_size is called width here"),
    ("learning_rate=1e-4", r"learning_rate is called stage\.0\.lr here"),
    ("dit.depth=many", r"dit\.depth = 'many'.*integer"),
    ("dit.depth=0", r"dit\.depth = 0.*greater than 0"),
    ("stage.0.lr=nan", r"stage\.0\.lr = nan"),
    ("stage.0.lr=inf", r"stage\.0\.lr = inf: give a number that is finite"),
    ("stage.0.resolution=36", r"resolution = 36 is not divisible by dit\.patch = 8"),
    ("dit.heads=5", r"heads = 5 does not divide width = 32"),
    ("micro=3", r"batch = 8 is not divisible by micro = 3"),
    ("stage.0.resolution=64", r"scenes\.canvas = '32' draws 32 px"),
    ("stage.0.resolution=16", r"set the last stage to 32"),
    ("stage.0={ resolution = 32, batch = 8, lr = 1e-3 }", r"either steps or samples.*give one"),
    ("stage.0={ resolution = 32, batch = 8, lr = 1e-3, steps = 1, samples = 8 }", r"give one"),
    ("stage.0.samples=0", r"stage\.0\.samples = 0.*greater than 0"),
    ("stage.0.shift=0", r"stage\.0\.shift = 0.*greater than 0"),
    ("max_train_samples=8", r"max_train_samples is called stage\.0\.samples here"),
    ("stage.3.steps=1", r"stage has rows 0 to 0, not '3'"),
    ("stage.\u00b2.steps=1", r"stage has rows 0 to 0, not '\u00b2'"),  # a digit, and no number
    ("stage.0.steps", r"write it as key=value"),
    ("seed.x=1", r"seed is a value, not a section"),
    ('precision="int8"', r"precision = 'int8'"),
    ("data.source=pictures", r"\[scenes\] is for data\.source"),
    (
        "stage.0.source=pictures",
        r"stage\.0\.source = 'pictures' but .*all stages draw scenes or none",
    ),
    ("stage.0.source=[['a', 1.0], ['b', 0]]", r"stage\.0\.source: 'b' has weight 0"),
    ("tread.stop=3", r"tread\.stop = 3 is beyond dit\.depth = 2"),
    ("tread={ start = 2, stop = 2 }", r"tread: start = 2 is not before stop = 2"),
    (
        'tread={ kind = "deferred", start = 0, stop = 1 }',
        r"skipped tokens never return: .* dit\.depth = 2",
    ),
    ("sample.guide=self", r"needs a section \[tread\]"),
    ("sample.interval=[0.9, 0.1]", r"sample: interval begins at 0\.9 and ends at 0\.1"),
    ("sample.apg.etta=1", r"unknown key sample\.apg\.etta; did you mean eta\?"),
]


@pytest.mark.parametrize(("assignment", "message"), WRONG, ids=[wrong for wrong, _ in WRONG])
def test_what_is_wrong_is_said_in_one_sentence(tiny: Path, assignment: str, message: str) -> None:
    with pytest.raises(BadRecipe, match=message) as caught:
        config.load(tiny, (assignment,))
    assert "\n" not in str(caught.value)


def test_a_finished_run_may_be_sampled_otherwise_and_stays_what_it_is(tiny: Path) -> None:
    recipe = config.load(tiny)
    changed = config.resampled(
        recipe, ("tread.stop=2", "sample.guide=self", "sample.interval=[0.1, 0.9]")
    )
    assert changed.sample.guide == "self"
    assert changed.sample.interval == (0.1, 0.9)
    assert config.resampled(recipe, ()) == recipe
    for assignment in ("dit.depth=3", "sampl.steps=3", "samples"):
        with pytest.raises(BadRecipe, match=r"only keys of \[sample\] and \[tread\]"):
            config.resampled(recipe, (assignment,))
    with pytest.raises(BadRecipe, match="needs a section"):
        config.resampled(recipe, ("sample.guide=self",))


def test_a_stage_is_as_long_as_its_steps_or_its_samples(tiny: Path) -> None:
    by_steps = config.load(tiny)
    by_samples = config.load(tiny, ("stage.0.samples=81",))
    assert by_steps.stage[0].count == 10
    assert by_samples.stage[0].count == 11  # eight at a time, the last step sees one that is wanted
    assert by_samples.stage[0].steps is None  # one stands for the other
    assert config.load(tiny, ("stage.0.samples=81", "stage.0.steps=10")) == by_steps
    assert config.parse(tomllib.loads(config.dump(by_samples)), "again") == by_samples


def test_a_step_is_one_of_the_stage_that_has_begun_and_not_ended(tiny: Path) -> None:
    row = "resolution=32,batch=8,lr=1e-3"
    rows = ",".join(f"{{{row},steps={steps}}}" for steps in (4, 1, 3))
    recipe = config.load(tiny, (f"stage=[{rows}]",))
    assert recipe.starts == [0, 4, 5]
    assert [recipe.stage_at(step) for step in range(10)] == [0, 0, 0, 0, 0, 1, 2, 2, 2, 2]


def test_files_that_are_no_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"there is no recipe 'nowhere'.*quickstart"):
        config.load("nowhere")
    broken = tmp_path / "broken.toml"
    broken.write_text("seed = = 3")
    with pytest.raises(BadRecipe, match=r"broken\.toml is not valid TOML.*line 1"):
        config.load(broken)
    broken.write_text("seed = 3")
    with pytest.raises(BadRecipe, match=r"is missing \(and \d+ more\)"):
        config.load(broken)


def test_without_names_the_sections_there_are(tiny: Path) -> None:
    with pytest.raises(BadRecipe, match=r"no section of that name; did you mean muon\?"):
        config.load(tiny, without=("moun",))


def test_differences_name_each_key_with_both_values(tiny: Path) -> None:
    changed = config.load(tiny, ("stage.0.lr=1.0", "seed=4"), ("muon",))
    told = config.differences(config.load(tiny), changed)
    assert "seed: 3 -> 4" in told
    assert "stage.0.lr: 0.003 -> 1.0" in told
    assert any(line.startswith("muon.momentum: 0.95 -> absent") for line in told)


@pytest.mark.parametrize(
    ("assignment", "wanted"),
    [
        ("micro=true", "a number"),
        ("clip=true", "a number"),
        ("dit.width='192'", "a number"),
        ("compile=yes", "true or false"),
        ("save_async=1", "true or false"),
    ],
)
def test_what_was_only_taken_for_a_value_is_refused(
    tiny: Path, assignment: str, wanted: str
) -> None:
    name, _, _ = assignment.partition("=")
    with pytest.raises(BadRecipe, match=f"{name} = .*: give {wanted}"):
        config.load(tiny, (assignment,))


def test_a_recipe_with_a_byte_order_mark_is_read(tiny: Path) -> None:
    before = config.load(tiny)
    tiny.write_bytes(b"\xef\xbb\xbf" + tiny.read_bytes())
    assert config.load(tiny) == before


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, "x = " + "9" * 5000])
def test_what_no_reader_of_toml_can_hold_is_one_sentence(tiny: Path, text: str) -> None:
    tiny.write_text(text)
    with pytest.raises(BadRecipe, match="is not valid TOML") as refused:
        config.load(tiny)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_a_name_that_is_none_is_no_recipe(name: str) -> None:
    with pytest.raises(BadRecipe, match="there is no recipe"):
        config.load(name)


def test_a_change_of_a_list_is_one_line() -> None:
    before = config.load("quickstart")
    after = config.load("quickstart", ('sample.prompts=["a","b"]', "adamw.betas=[0.9, 0.99]"))
    assert config.differences(before, after) == [
        "adamw.betas: [0.9, 0.95] -> [0.9, 0.99]",
        "sample.prompts: a list of 12 -> ['a', 'b']",
    ]


def test_a_word_where_a_list_is_wanted_is_told_how_to_write_one() -> None:
    with pytest.raises(BadRecipe, match=r"a list is wanted, as in sample\.prompts=\['\.\.\.'"):
        config.load("quickstart", ("sample.prompts=a cherry",))


def test_a_pass_may_be_larger_than_the_batch_of_a_stage_but_not_end_unevenly() -> None:
    assert config.load("quickstart", ("micro=96",)).micro == 96
    with pytest.raises(BadRecipe, match=r"is not divisible by micro = 28"):
        config.load("quickstart", ("micro=28",))
