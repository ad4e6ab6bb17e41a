"""The recipes that come along do what their first lines say."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from safetensors.torch import load_file

from daybreak import cli, config
from daybreak.model import dit
from daybreak.train import budget, checkpoint, flops, loop, networks
from daybreak.train.hardware import parse

RECIPES = Path(__file__).parents[1] / "recipes"


def head(name: str) -> str:
    """The remarks at the top of a recipe."""
    return (RECIPES / f"{name}.toml").read_text().partition("\nout = ")[0]


@pytest.mark.parametrize("name", ["prx_24h", "prx_1gpu", "cpu_full"])
def test_a_recipe_says_where_it_runs_what_it_costs_and_what_was_measured(name: str) -> None:
    for word in ("Hardware", "Computed", "Measured"):
        assert re.search(rf"^# {word} +\w", head(name), flags=re.MULTILINE), word


def keys(model: type[BaseModel], before: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that a recipe may have, by its whole name."""
    for name, field in model.model_fields.items():
        kinds: list[Any] = [field.annotation]
        while kinds and not (isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel)):
            kinds = [*get_args(kinds[0]), *kinds[1:]]
        if kinds:
            yield from keys(kinds[0], f"{before}{name}.")
        else:
            yield f"{before}{name}", field


def test_the_docs_have_every_key_and_its_default() -> None:
    text = (RECIPES.parent / "docs" / "recipe.md").read_text()
    last = text.partition("## All other keys")[2]
    table = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|", last, flags=re.MULTILINE))
    known = dict(keys(config.Recipe))
    shown = {"None": "none", "True": "true", "False": "false", "()": "[]"}
    for name, said in table.items():
        if name in {"scenes.objects", "scenes.held_out", "evaluate.suites"}:
            continue  # longer than a word
        default = "-" if known[name].is_required() else str(known[name].default)
        assert said == shown.get(default, default), name
    for name in known.keys() - table.keys():
        section, _, key = name.rpartition(".")
        rows = [line for line in text.splitlines() if re.search(rf"`\[*{section}\b", line)]
        assert f"`{name}`" in text or any(re.search(rf"\b{key}\b", row) for row in rows), name


@pytest.mark.parametrize("name", ["prx_24h", "prx_1gpu"])
def test_the_computed_hours_are_those_of_a_plan(name: str) -> None:
    recipe = config.load(name)
    said = re.findall(r"^#[ \w]* (\S+): ([\d.]+) h(?:, (.*))?$", head(name), flags=re.MULTILINE)
    assert said
    for devices, hours, how in said:
        made = budget.plan(recipe, parse(devices, torch.bfloat16), cached="on the way" not in how)
        assert made.seconds / 3600 == pytest.approx(float(hours), rel=0.05), devices
        assert sum(made.fullest.values()) < made.room
        assert f"{100 * made.share:.0f} % of the peak" in " ".join(head(name).split())


def test_the_published_run_has_its_published_size() -> None:
    recipe = config.load("prx_24h")
    with torch.device("meta"):
        width = networks.named(str(recipe.text.encoder), "text.encoder").width
        model = dit.DiT(recipe.dit, width, route=recipe.tread)
    assert sum(weight.numel() for weight in model.parameters()) == 1_177_215_744
    assert [(s.resolution, s.count, s.batch, s.lr) for s in recipe.stage] == [
        (512, 100_000, 1024, 1e-4),
        (1024, 20_000, 512, 1e-4),
    ]
    assert sum(s.count * s.batch for s in recipe.stage) == 112_640_000
    assert recipe.resting(recipe.stage[1], 100_001) == {"repa"}
    assert recipe.tread is not None
    assert (recipe.tread.start, recipe.tread.stop - 1) == (1, 14)  # 2nd to penultimate of 16
    assert flops.walking(recipe, recipe.stage[0], 7) == 128  # half of 16 x 16
    learners = [learner for _, learner in flops.learned(recipe)]
    assert learners.count("muon") == 112


@pytest.fixture
def short(tmp_path: Path, toys: dict[str, Path]) -> config.Recipe:
    """The recipe with every ingredient, a few steps of each of its stages."""
    torch.set_num_threads(1)
    sets = {
        "out": (tmp_path / "run").as_posix(),
        "compile": "false",
        "precision": "float32",
        "save_every": "2",
        "keep": "4",
        "data.workers": "0",
        "micro": "2",
        "sample.every": "100",
        "sample.steps": "1",
        "sample.prompts": '["a red circle"]',
        "repa.teacher": toys["dinov3"].as_posix(),
        "dino.teacher": toys["dinov2_with_registers"].as_posix(),
        "lpips.vgg": toys["vgg"].as_posix(),
        "lpips.heads": toys["heads"].as_posix(),
        "stage.0.steps": "2",
        "stage.0.batch": "4",
        "stage.1.samples": "7",
        "stage.1.batch": "4",
    }
    return config.load("cpu_full", tuple(f"{key}={value}" for key, value in sets.items()))


def test_the_recipe_with_every_ingredient_trains_resumes_and_is_exported(
    short: config.Recipe,
) -> None:
    run = Path(short.out)
    assert loop.train(short, lambda line: None) == (4, 0)
    weights = load_file(run / "checkpoint-4" / "ema.safetensors")
    assert "dit.resolution_embedder.mlp.in_layer.weight" in weights

    shutil.rmtree(run / "checkpoint-4")
    assert checkpoint.required(run, print).step == 2
    assert loop.train(short, lambda line: None) == (4, 0)
    again = load_file(run / "checkpoint-4" / "ema.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())

    from diffusers import PRXPixelPipeline

    cli.export(run)
    pipeline = PRXPixelPipeline.from_pretrained(run / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red circle", num_inference_steps=1, use_resolution_binning=False).images[
        0
    ]
    assert picture.size == (64, 64)


def test_the_recipe_with_every_ingredient_has_every_section() -> None:
    recipe = config.load("cpu_full")
    for name in ("tread", "repa", "lpips", "dino", "contrastive", "muon"):
        assert getattr(recipe, name) is not None, name
    assert recipe.dit.resolution
    assert recipe.sample.guide == "self"
    assert len({stage.resolution for stage in recipe.stage}) == 2
