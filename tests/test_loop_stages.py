"""Stages: pictures grow, and weights, average, routes and teachers go on with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from daybreak import config, doctor
from daybreak.data import batches
from daybreak.failure import BadRecipe
from daybreak.train import building, checkpoint, loop, runs

STAGES = """
[tread]
start = 0
stop = 1

[repa]
teacher = "{dinov3}"
blocks = [0, 1]

[lpips]
vgg = "{vgg}"
heads = "{heads}"

[dino]
teacher = "{dinov2}"

[[stage]]
resolution = 64
samples = 15
batch = 4
lr = 1e-3
shift = 2.0
"""
WEIGHTS = {"flow": 1.0, "repa": 0.5, "lpips": 0.1, "dino": 0.01}


@pytest.fixture
def growing(tiny: Path, toys: dict[str, Path]) -> Path:
    """Four steps at 32 px, then four at 64 px, of the same scenes, with every term."""
    torch.set_num_threads(1)
    recipe = tiny.read_text().replace("steps = 10", "steps = 4")
    recipe = recipe.replace("every = 10\nsteps = 4", "every = 10\nsteps = 1")
    recipe = recipe.replace('canvas = "32"', 'canvas = "64-large"').replace("cooldown = 0.4\n", "")
    tiny.write_text(recipe + STAGES.format(**toys))
    return tiny


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state(run: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoint-{step}" / f"{name}.safetensors")


def trained(recipe: config.Recipe) -> Path:
    assert loop.train(recipe, lambda line: None) == (recipe.steps, 0)
    return Path(recipe.out)


def test_when_pictures_grow_weights_and_average_are_kept(growing: Path) -> None:
    """A second stage that learns nothing shows what the switch itself does: nothing."""
    recipe = config.load(growing, ("save_every=4", "stage.1.lr=1e-30", "ema.decay=0.7"))
    run = trained(recipe)
    before, after = (state(run, step, "model") for step in (4, 8))
    torch.testing.assert_close(after, before, atol=1e-12, rtol=0)
    far, near = (state(run, step, "ema") for step in (4, 8))
    left = 1.0
    for step in range(5, 9):
        left *= min(0.7, (1 + step) / (10 + step))
    for name, weight in before.items():  # it goes on towards them at its own pace
        torch.testing.assert_close(
            near[name] - weight, left * (far[name] - weight), rtol=1e-3, atol=1e-6
        )
    assert any(not torch.equal(near[name], weight) for name, weight in before.items())


def test_the_first_stage_knows_nothing_of_the_second(growing: Path, tmp_path: Path) -> None:
    both = trained(config.load(growing, ("save_every=4",)))
    one = config.load(growing)
    alone = trained(
        one.model_copy(update={"stage": one.stage[:1], "out": (tmp_path / "one").as_posix()})
    )
    assert [line["loss"] for line in log(both)][:4] == [line["loss"] for line in log(alone)]
    for name in ("model", "ema"):
        kept, other = state(both, 4, name), state(alone, 4, name)
        assert all(torch.equal(kept[key], other[key]) for key in kept)


def test_the_log_adds_up_on_both_sides_of_the_switch(growing: Path) -> None:
    recipe = config.load(growing)
    run = trained(recipe)
    lines = log(run)
    assert [line["step"] for line in lines] == [*range(1, 9)]
    for line in lines:
        total = sum(weight * line[name] for name, weight in WEIGHTS.items())
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert runs.pictures_seen(recipe, 8) == 4 * 8 + 4 * 4  # fifteen were asked for
    from PIL import Image

    with Image.open(run / "samples" / "step-0000008" / "00.png") as picture:
        assert picture.size == (64, 64)


def test_a_run_continues_bit_for_bit_on_either_side_of_the_switch(growing: Path) -> None:
    recipe = config.load(growing, ("save_every=3", "keep=4", "sample.every=100"))
    run = trained(recipe)
    losses = [line["loss"] for line in log(run)]
    weights = state(run, 8, "model")
    for step in (6, 3):
        for later in (found for found in checkpoint.found(run) if found.step > step):
            shutil.rmtree(later.folder)
        trained(recipe)
        assert [line["loss"] for line in log(run)] == losses
        again = state(run, 8, "model")
        assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_a_stages_shift_changes_the_noise_of_that_stage_alone(
    growing: Path, tmp_path: Path
) -> None:
    shifted = trained(config.load(growing))
    out = f"out={(tmp_path / 'plain').as_posix()}"
    plain = trained(config.load(growing, (out, "stage.1.shift=1.0")))
    by_recipe = [[line["flow"] for line in log(run)] for run in (shifted, plain)]
    assert by_recipe[0][:4] == by_recipe[1][:4]
    assert by_recipe[0][4] != by_recipe[1][4]


@pytest.fixture
def chosen(tiny: Path, prepared: Callable[..., Path]) -> Path:
    """Four steps on twelve red pictures, then four on eight blue ones with longer captions."""
    torch.set_num_threads(1)
    red, blue = (
        prepared([{"captions": [f"{number} {words}"]} for number in range(count)], called=name)
        for name, count, words in (("red", 12, "red"), ("blue", 8, "blue " * 12))
    )
    recipe = tiny.read_text().replace("steps = 10", "steps = 4").replace("[scenes]", "")
    recipe = recipe.replace('canvas = "32"', "")
    recipe = recipe.replace('"scenes"', f'"{red.as_posix()}"\nempty_captions = 0')
    stage = recipe[recipe.index("[[stage]]") :] + f'source = "{blue.as_posix()}"\n'
    tiny.write_text(recipe + stage)
    return tiny


def test_a_stage_learns_from_pictures_of_its_own(chosen: Path) -> None:
    run = trained(config.load(chosen))
    words = [line["words"] for line in log(run)]
    assert max(words[:4]) < min(words[4:])
    rates = [line["lr"] for line in log(run)]
    assert rates[4:] == rates[:4], "each stage warms up and cools down"
    facts = json.loads((run / "run.json").read_text())
    assert {Path(name).parent.name for name in facts["data"]} == {"red", "blue"}
    tokenizer = (run / "latest" / "tokenizer" / "tokenizer.json").read_text()
    assert "red" in tokenizer
    assert "blue" in tokenizer


def test_stages_that_share_their_pictures_open_them_once(chosen: Path) -> None:
    recipe = config.load(chosen)
    first, last = building.sources(recipe)
    assert first is not last
    again = recipe.model_copy(update={"stage": (*recipe.stage, recipe.stage[0])})
    one, _, other = building.sources(again)
    assert one is other


def test_a_run_goes_on_bit_for_bit_where_its_pictures_change(chosen: Path) -> None:
    recipe = config.load(chosen, ("save_every=3", "keep=4", "sample.every=100"))
    run = trained(recipe)
    losses, weights = [line["loss"] for line in log(run)], state(run, 8, "model")
    for step in (6, 3):
        for later in (found for found in checkpoint.found(run) if found.step > step):
            shutil.rmtree(later.folder)
        trained(recipe)
        assert [line["loss"] for line in log(run)] == losses
        assert all(torch.equal(state(run, 8, "model")[name], one) for name, one in weights.items())


def test_a_finished_run_goes_on_with_a_stage_of_other_pictures(chosen: Path) -> None:
    both = config.load(chosen)
    trained(both.model_copy(update={"stage": both.stage[:1]}))
    with pytest.raises(BadRecipe, match=r"stage\.1\.batch: absent -> 8"):
        loop.train(both)
    told: list[str] = []
    assert loop.train(both, told.append, changed=True) == (8, 0)
    assert any("data: " in line and "blue/data-" in line for line in told)
    assert len(log(Path(both.out))) == 8


def test_two_folders_of_one_name_are_told_apart(
    chosen: Path, pictures: Path, tmp_path: Path
) -> None:
    other = tmp_path / "others" / pictures.name
    shutil.copytree(pictures, other)
    (other / "3.txt").write_text("another colour")
    recipe = config.load(chosen, (f"data.source={pictures}", f"stage.1.source={other}"))
    sources = building.sources(recipe)
    assert list(batches.files(sources)) == ["pictures", "pictures of stage 1"]
    same = config.load(chosen, (f"data.source={pictures}", f"stage.1.source={pictures}"))
    assert list(batches.files(building.sources(same))) == ["pictures"]


@pytest.mark.slow
@pytest.mark.skipif(doctor.compiler() is None, reason="no C++ compiler")
def test_compiled_blocks_take_the_same_steps_through_a_change_of_resolution(
    tiny: Path, tmp_path: Path
) -> None:
    """What was compiled for one resolution is forgotten with it, and who watches hears on."""
    stage = "\n[[stage]]\nresolution = 32\nsteps = 2\nbatch = 8\nlr = 1e-3\n"
    tiny.write_text(tiny.read_text() + stage)
    torch.set_num_threads(1)
    for name in ("false", "true"):
        out = tmp_path / name
        sets = (
            f"compile={name}",
            f"out={out.as_posix()}",
            "stage.0.steps=2",
            "stage.0.resolution=16",
        )
        assert loop.train(config.load(tiny, sets), lambda line: None).code == 0
    plain, compiled = (
        [line["loss"] for line in log(tmp_path / name)] for name in ("false", "true")
    )
    assert len(plain) == 4
    assert compiled == pytest.approx(plain, rel=1e-3)
