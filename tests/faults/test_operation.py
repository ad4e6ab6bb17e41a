"""Rows O: what is wrong is said at once; what is recorded is enough; nobody calls home."""

from collections.abc import Callable
from pathlib import Path

import pytest

from daybreak.failure import BadRecipe
from tests.faults.faults import Alone, homeless
from tests.faults.jobs import RECIPE, Place, few

Unbroken = Callable[..., Place]

# Of the base recipe: what is written, what instead, and a word that the sentence must hold.
WRONG = [
    ("seed = 3", "sede = 3", "seed"),
    ("batch = 24", "bacth = 24", "batch"),
    ("[dit]", "[dti]", "dit"),
    ("width = 32\ndepth = 2", "widht = 32\ndepth = 2", "width"),
    ("lr = 3e-3", "learning_rate = 3e-3", "lr"),
    ("save_every = 5", "checkpointing_steps = 5", "save_every"),
    ("clip = 1.0", "max_grad_norm = 1.0", "clip"),
    ("[ema]\n", "[ema]\nrate = 1\n", "rate"),
    ("patch = 8", "patch_size = 8", "patch"),
    ("resolution = 32", "", "resolution"),
    ('out = "', 'aut = "', "out"),
    ("batch = 24", "", "batch"),
    ("[text]", "[txt]", "text"),
    ("seed = 3", 'seed = "three"', "seed"),
    ("steps = 40", 'steps = "many"', "steps"),
    ("steps = 40", "steps = 4.5", "steps"),
    ("compile = false", 'compile = "perhaps"', "compile"),
    ("batch = 24", "batch = [24]", "batch"),
    ("[muon]", "muon = 1", "muon"),
    ("clip = 1.0", "clip = 0", "clip"),
    ("clip = 1.0", "clip = -1", "clip"),
    ("lr = 3e-3", "lr = nan", "lr"),
    ("lr = 3e-3", "lr = inf", "lr"),
    ("steps = 40", "steps = 0", "steps"),
    ("depth = 2\nheads", "depth = -1\nheads", "depth"),
    ("decay = 0.9", "decay = 1.5", "decay"),
    ("cooldown = 0.4", "cooldown = 2", "cooldown"),
    ("seed = 3", "seed = -1", "seed"),
    ("save_every = 5", "save_every = 0", "save_every"),
    ("resolution = 32", "resolution = 36", "patch"),
    ("resolution = 32", "resolution = 64", "canvas"),
    ('canvas = "32"', 'canvas = "33"', "canvas"),
    ("heads = 2\nvocabulary", "heads = 5\nvocabulary", "heads"),
    ("seed = 3", "seed = 3\nmicro = 7", "micro"),
    ("seed = 3", "seed = 3\nseed = 4", "TOML"),
    ("[dit]", "[dit", "TOML"),
    ('source = "scenes"', 'source = "os.system"', "scenes"),
    ("[flow]", '[flow]\n_target_ = "os.system"', "_target_"),
    ("[flow]", "[flow]\ndeep = " + "[" * 60 + "]" * 60, "deep"),
    ("[muon]", "[muon]\n[tread]\nstart = 1\nstop = 9", "tread"),
]


@pytest.mark.parametrize(("right", "wrong", "word"), few(WRONG, 3))
def test_O1_a_wrong_recipe_is_one_sentence(place: Place, right: str, wrong: str, word: str) -> None:
    text = RECIPE.format(out=place.run.as_posix())
    assert right in text
    place.recipe.write_text(text.replace(right, wrong, 1))
    ended = place.begin().end()
    assert ended.code == BadRecipe.code, ended.said
    assert ended.seconds < 5
    assert word in ended.said
    assert len(ended.said.splitlines()) == 1
    assert not place.run.exists()


def test_O1_files_that_are_no_recipes(place: Place) -> None:
    for path, data in (
        ("nowhere.toml", None),
        ("huge.toml", b"# padding\n" * 500_000 + b"x ="),
        ("binary.toml", bytes(range(256))),
    ):
        if data is not None:
            (place.folder / path).write_bytes(data)
        ended = place.verb("train", str(place.folder / path))
        assert ended.code == BadRecipe.code, ended.said
        assert ended.seconds < 5
        assert path in ended.said


@pytest.mark.fault
def test_O2_what_a_run_records_is_enough_to_repeat_it(tmp_path: Path, unbroken: Unbroken) -> None:
    whole, again = unbroken(), Place(tmp_path / "again")
    text = (whole.run / "recipe.toml").read_text()
    again.recipe.write_text(text.replace(whole.run.as_posix(), again.run.as_posix()))
    again.finish()
    assert again.bits() == whole.bits()


@pytest.mark.fault
def test_O3_no_verb_reaches_for_another_machine(place: Place, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    place.finish("stage.0.steps=5", ranks=2, fault=Alone(calls))
    run = str(place.run)
    for verb in (
        ("sample", "a red circle", "--run", run, "--count", "1"),
        ("evaluate", run, "--suite", "scenes", "--per-task", "5", "--steps", "1"),
        ("export", run),
    ):
        ended = place.verb(*verb, fault=Alone(calls))
        assert ended.code == 0, ended.said
    assert not calls.exists(), calls.read_text()
    ended = place.verb(
        "train",
        str(place.recipe),
        "--out",
        str(tmp_path / "other"),
        "--set",
        'text={ encoder = "google/t5gemma-2b-2b-ul2", max_tokens = 32 }',
        fault=Alone(calls),
    )
    assert ended.code == BadRecipe.code, ended.said
    assert "google/t5gemma-2b-2b-ul2" in ended.said


@pytest.mark.fault
@pytest.mark.parametrize("name", ["two words", "Übung-日本", "link", "home"])
def test_O4_places_with_odd_names_are_places(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    if name == "link":
        (tmp_path / "true").mkdir()
        folder.symlink_to(tmp_path / "true")
    place = Place(folder)
    place.finish("stage.0.steps=5", ranks=2, fault=homeless if name == "home" else None)
    assert place.checkpoints() == [5]
