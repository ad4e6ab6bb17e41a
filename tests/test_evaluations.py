"""Evaluations during training: they disturb nothing, miss nothing, and the best is kept."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from daybreak import config
from daybreak.evaluate import distances, features, interim
from daybreak.failure import BadData, BadRecipe, BadStorage, Failure, NoCheckpoint
from daybreak.train import checkpoint, evaluations, loop, parallel, runs

FEW = 'evaluate={every=4, suites=["validation"], pictures=32, best="validation.loss"}'


def trained(recipe: Path, *sets: str) -> Path:
    loaded = config.load(recipe, sets)
    assert loop.train(loaded, lambda line: None).code == 0
    return Path(loaded.out)


def weights(folder: Path) -> dict[str, str]:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith("safetensors")}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_takes_the_same_steps_with_and_without_evaluations(
    tiny: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    every = (
        'evaluate={every=3, suites=["validation", "scenes", "distribution"], per_task=5, '
        'pictures=32, best="scenes.exact"}'
    )
    watched = trained(tiny, every, f"out={(tmp_path / 'watched').as_posix()}")
    alone = trained(tiny)
    assert losses(watched) == losses(alone)
    assert weights(watched / "checkpoint-10") == weights(alone / "checkpoint-10")
    lines = evaluations.lines(watched)
    assert [line["step"] for line in lines] == [3, 6, 9, 10]
    assert [line["images"] for line in lines] == [24, 48, 72, 80]
    for line in lines:
        assert {"validation.loss", "scenes.exact", "distribution.scenes.kernel"} <= line[
            "values"
        ].keys()
    kept = json.loads((watched / "evaluation/interim/scenes.json").read_text())
    assert kept["step"] == 10
    assert len(kept["items"]) == kept["pictures"]


def test_runs_of_one_seed_are_asked_the_same_and_other_seeds_something_else(
    tiny: Path, tmp_path: Path
) -> None:
    def prompts(name: str, *sets: str) -> list[str]:
        asked = "evaluate={every=10, suites=['scenes'], per_task=5}"
        run = trained(tiny, asked, f"out={(tmp_path / name).as_posix()}", *sets)
        kept = json.loads((run / "evaluation/interim/scenes.json").read_text())
        return [item["prompt"] for item in kept["items"]]

    one = prompts("one", "stage.0.steps=2")
    assert prompts("other", "stage.0.steps=2", "stage.0.lr=1e-3") == one
    assert prompts("third", "stage.0.steps=2", "seed=4") != one


def test_a_stage_of_small_pictures_is_asked_for_scenes_of_the_whole_canvas(tiny: Path) -> None:
    last = "\n[[stage]]\nresolution = 32\nsteps = 2\nbatch = 8\nlr = 1e-3\n"
    tiny.write_text(tiny.read_text().replace("resolution = 32", "resolution = 16") + last)
    every = 'evaluate={every=2, suites=["scenes", "validation"], per_task=5, pictures=32}'
    run = trained(tiny, "stage.0.steps=2", every)
    first, second = evaluations.lines(run)
    assert (first["resolution"], second["resolution"]) == (16, 32)
    assert first["sides"] == second["sides"] == {"scenes": 32, "validation": 32}
    assert evaluations.side(first, "scenes.exact") == 32


def test_the_best_checkpoint_survives_those_that_come_after_it(tiny: Path) -> None:
    # The rate is far too high from the ninth step on: the loss rises again.
    text = tiny.read_text().replace("lr = 3e-3", "lr = 3e-3\n")
    tiny.write_text(text + "\n[[stage]]\nresolution = 32\nsteps = 8\nbatch = 8\nlr = 0.5\n")
    run = trained(tiny, "stage.0.steps=8", "stage.0.cooldown=0.0", "keep=2", "ema.decay=0.5", FEW)
    lines = evaluations.lines(run)
    values = [evaluations.value(line, "validation.loss") for line in lines]
    best = lines[values.index(min(values))]["step"]
    assert best < 15
    assert [found.step for found in checkpoint.found(run)] == [16, 15]
    assert evaluations.best(run).step == best
    recipe, found, _ = runs.trained(run, chosen=evaluations.best(run))
    assert (found.step, recipe.out) == (best, str(run))


def test_the_best_checkpoint_shares_its_bytes_with_the_one_it_is(tiny: Path) -> None:
    run = trained(tiny, FEW)
    step = evaluations.best(run).step
    names = ("ema.safetensors", "manifest.json")
    folder = run / f"checkpoint-{step}"
    if folder.is_dir():
        assert all((run / "best" / name).samefile(folder / name) for name in names)
    assert checkpoint.verify(run / "best") is None


def test_a_network_that_went_wrong_is_evaluated_and_said_to_be_so(tiny: Path) -> None:
    recipe = config.load(tiny, (FEW,))
    loop.train(recipe, lambda line: None)
    _, _, model = runs.trained(Path(recipe.out))
    for weight in model.parameters():
        weight.data.fill_(float("nan"))
    with parallel.world(recipe.parallel) as here:
        note, best = evaluations.take(recipe, Path(recipe.out), model, 11, here)
    assert "validation.loss not finite" in note
    assert not best


def test_a_disk_without_room_for_a_reference_does_not_end_the_run(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(tensors: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features, "save", refuse)
    every = 'evaluate={every=2, suites=["distribution"], pictures=32}'
    run = trained(tiny, "stage.0.steps=2", every)
    assert [line["step"] for line in evaluations.lines(run)] == [2]
    kept = json.loads((run / "evaluation/interim/distribution.json").read_text())
    assert any("No space left on device" in remark for remark in kept["remarks"])


def test_a_best_checkpoint_that_cannot_be_kept_can_be_later(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tiny, FEW)
    step = checkpoint.found(run)[0].step

    def refuse(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", target)

    with monkeypatch.context() as full:
        full.setattr(os, "link", refuse)
        full.setattr(shutil, "copy2", refuse)
        with pytest.raises(BadStorage, match=r"cannot write \S+best: \[Errno 28\] [\w ]+: \S+$"):
            evaluations.keep(run, step)
    evaluations.keep(run, step)
    assert evaluations.best(run).step == step


def test_a_best_checkpoint_that_is_missing_or_damaged_is_refused(
    tiny: Path, tmp_path: Path
) -> None:
    run = trained(tiny)
    with pytest.raises(NoCheckpoint, match=r"evaluate\.best"):
        evaluations.best(run)
    shutil.copytree(run / "checkpoint-10", run / "best")
    (run / "best" / "ema.safetensors").write_bytes(b"x")
    with pytest.raises(NoCheckpoint, match="is damaged"):
        evaluations.best(run)


def test_a_run_that_goes_on_evaluates_what_it_could_not_before(tiny: Path, tmp_path: Path) -> None:
    sets = (FEW.replace("validation.loss", "validation.velocity 0.6-1.0"), "save_every=4")
    whole = trained(tiny, *sets, f"out={(tmp_path / 'whole').as_posix()}")
    run = trained(tiny, *sets)
    # As if it had been stopped while step 8 was evaluated: its checkpoint is there, no line is.
    (run / "latest").unlink()
    (run / "latest").symlink_to("checkpoint-8")
    shutil.rmtree(run / "checkpoint-10")
    shutil.rmtree(run / "best")
    kept = [json.dumps(line) for line in evaluations.lines(run) if line["step"] != 8]
    (run / evaluations.FILE).write_text("\n".join(kept) + '\n{"step": 1')
    trained(tiny, *sets)
    again, before = evaluations.lines(run), evaluations.lines(whole)
    assert [line["step"] for line in again] == [4, 8, 10]
    assert [line["values"] for line in again] == [line["values"] for line in before]
    assert evaluations.best(run).step == evaluations.best(whole).step > 4


def line(step: int, value: float | None, resolution: int = 32) -> dict[str, Any]:
    values = {"scenes.exact": {"value": value}}
    return {"step": step, "resolution": resolution, "sides": {}, "values": values}


def test_the_best_is_the_first_that_beats_all_before() -> None:
    metric = "scenes.exact"
    assert evaluations.is_best([line(1, 0.2)], metric)
    assert evaluations.is_best([line(1, 0.2), line(2, 0.3)], metric)
    assert not evaluations.is_best([line(1, 0.2), line(2, 0.2)], metric)
    assert not evaluations.is_best([line(1, 0.2), line(2, None)], metric)
    assert not evaluations.is_best([line(1, None)], metric), "what is no number is never the best"
    assert evaluations.is_best([line(1, None), line(2, 0.1)], metric), "nor is it in the way"
    assert evaluations.is_best([line(1, 0.9), line(2, 0.1, resolution=64)], metric)
    alike = {"sides": {"scenes": 64}}
    assert not evaluations.is_best(
        [line(1, 0.9) | alike, line(2, 0.1, resolution=64) | alike], metric
    )


PICTURES = ('data.source="somewhere"',)


@pytest.mark.parametrize(
    ("sets", "without", "words"),
    [
        (("evaluate={every=0}",), (), r"evaluate\.every = 0"),
        (("evaluate={suites=['validation']}",), (), r"evaluate\.every is missing"),
        (("evaluate={every=5, suites=['geneval']}",), (), "geneval"),
        (("evaluate={every=5, best='scenes.exact'}",), (), "is not of a suite that is measured"),
        (("evaluate={every=5, best='loss'}",), (), "name a suite"),
        (("evaluate={every=5, best='validation.los'}",), (), "there are loss, velocity"),
        (("evaluate={every=5, bst='x'}",), (), "did you mean best"),
        ((*PICTURES, "evaluate={every=5, suites=['scenes']}"), ("scenes",), "names scenes, but"),
        ((*PICTURES, "evaluate={every=5}"), ("scenes",), r"evaluate\.data"),
        (
            (*PICTURES, "evaluate={every=5, data='val', suites=['distribution']}"),
            ("scenes",),
            "needs a feature network: name it",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_on_load(
    tiny: Path, sets: tuple[str, ...], without: tuple[str, ...], words: str
) -> None:
    with pytest.raises(BadRecipe, match=words):
        config.load(tiny, sets, without)


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        (
            "suites=['scenes'], best='scenes.three'",
            BadRecipe,
            "name one of scenes.exact, scenes.sing",
        ),
        ("suites=['scenes'], best='scenes.H5'", BadRecipe, "scenes.H5 would not be measured"),
        (
            "suites=['distribution'], best='distribution.frechet'",
            BadRecipe,
            "name one of distribution.scenes.frechet",
        ),
        (
            "suites=['distribution'], best='distribution.dinov2.cmmd'",
            BadRecipe,
            "would not be measured",
        ),
        ("suites=['distribution'], features='/nowhere/clip'", BadRecipe, "need the model /nowhere"),
        ("data='/nowhere'", BadData, "/nowhere"),
    ],
)
def test_what_an_evaluation_lacks_is_missed_before_the_first_step(
    tiny: Path, asked: str, kind: type[Failure], words: str
) -> None:
    recipe = config.load(tiny, (f"evaluate={{every=5, {asked}}}",))
    with pytest.raises(kind, match=words):
        loop.train(recipe, lambda line: None)
    assert not Path(recipe.out).exists()


def test_as_few_pictures_are_allowed_as_their_distances_need() -> None:
    interim.Config(every=1, pictures=distances.FEWEST)
    with pytest.raises(ValidationError, match="pictures"):
        interim.Config(every=1, pictures=distances.FEWEST - 1)


def test_a_dataset_that_is_too_small_is_refused_before_the_first_step(
    tiny: Path, prepared: Any
) -> None:
    held = json.dumps(prepared([{}] * 32, called="held").as_posix())
    recipe = config.load(tiny, (f"evaluate={{every=5, data={held}, pictures=33}}",))
    with pytest.raises(BadData, match="holds 32 pictures and 33 are needed"):
        loop.train(recipe, lambda line: None)
    assert not Path(recipe.out).exists()


def test_a_run_on_pictures_is_measured_on_another_dataset(
    tiny: Path, prepared: Any, tmp_path: Path
) -> None:
    rows = [{"bucket": name} for name in ("64x64", "32x128") for _ in range(16)]
    train, held = prepared(rows, called="train"), prepared(rows, called="held")
    text = tiny.read_text().replace('[scenes]\ncanvas = "32"\n', "")
    tiny.write_text(text.replace('"scenes"', json.dumps(train.as_posix())))
    asked = f"every=5, data={json.dumps(held.as_posix())}, pictures=32, features='scenes'"
    run = trained(tiny, f"evaluate={{{asked}, suites=['validation', 'distribution']}}")
    values = evaluations.lines(run)[-1]["values"]
    assert {"validation.loss", "distribution.scenes.kernel"} <= values.keys()
