"""Training as a whole: it learns, it stops, it goes on, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from daybreak import config, doctor
from daybreak.failure import BadData, BadRecipe, BadStorage, NoCheckpoint, NotFinite
from daybreak.generate.draw import draw
from daybreak.train import checkpoint, loop, runs
from tests import warm

GOLDEN = Path(__file__).parent / "golden" / "tiny.json"


def lines(recipe: config.Recipe) -> list[dict[str, Any]]:
    return [*map(json.loads, Path(recipe.out, "metrics.jsonl").read_text().splitlines())]


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(run: Path) -> dict[str, str]:
    """The sha256 of every file of the newest checkpoint."""
    found = checkpoint.required(run, print)
    files = json.loads((found.folder / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith("safetensors")}


def start(recipe: Path, *arguments: str) -> warm.Started:
    return warm.Started("-m", "daybreak", "train", recipe, *arguments)


def wait_for_step(run: Path, step: int) -> None:
    path = run / "metrics.jsonl"
    for _ in range(1200):
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within a minute")


def test_a_run_leaves_everything_it_promises(tiny: Path) -> None:
    recipe = config.load(  # one update of the average, which copies
        tiny, ("ema.every=10", "ema.ramp=false", "sample.aspect=2")
    )
    assert loop.train(recipe, lambda line: None) == (10, 0)
    run = Path(recipe.out)
    assert config.load(run / "recipe.toml") == recipe
    assert json.loads((run / "run.json").read_text())["recipe"] == config.digest(recipe)
    assert len(losses(run)) == 10
    assert (run / "latest").resolve().name == "checkpoint-10"
    moved, average = (load_file(run / "latest" / f"{of}.safetensors") for of in ("model", "ema"))
    assert all(map(torch.equal, average.values(), moved.values())), "it follows what was moved"
    with Image.open(run / "samples" / "step-0000010" / "00.png") as picture:
        assert picture.size == (48, 24)
        assert picture.info["prompt"] == "a red circle"
        assert picture.info["recipe"] == config.digest(recipe)
    assert (run / "samples" / "step-0000010" / "grid.png").is_file()


def test_the_first_losses_are_the_recorded_ones(tiny: Path) -> None:
    torch.set_num_threads(1)
    recipe = config.load(tiny, ("stage.0.steps=20",))
    loop.train(recipe, lambda line: None)
    np.testing.assert_allclose(losses(Path(recipe.out)), json.loads(GOLDEN.read_text()), rtol=2e-4)


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(
    tiny: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = (tmp_path / name).as_posix()
        loop.train(config.load(tiny, (f"seed={seed}", f"out={out}")), lambda line: None)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


@pytest.mark.parametrize("at", [2, 13])
def test_a_run_killed_at_any_step_continues_bit_for_bit(
    tiny: Path, tmp_path: Path, at: int
) -> None:
    more = ("--set", "stage.0.steps=24", "--set", "data.workers=1", "--set", "sample.every=12")
    whole = tmp_path / "whole"
    unbroken = start(tiny, *more, "--out", str(whole))
    killed = start(tiny, *more)
    wait_for_step(tmp_path / "run", at)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    output = "".join(unbroken.communicate())
    assert unbroken.returncode == 0, output

    resumed = start(tiny, *more)
    output = "".join(resumed.communicate())
    assert resumed.returncode == 0, output
    assert losses(tmp_path / "run") == losses(whole)
    assert weights(tmp_path / "run") == weights(whole)


def test_accumulated_micro_batches_take_the_same_steps(tiny: Path, tmp_path: Path) -> None:
    recipe = config.load(tiny)
    loop.train(recipe, lambda line: None)
    parts = config.load(tiny, ("micro=2", f"out={(tmp_path / 'micro').as_posix()}"))
    loop.train(parts, lambda line: None)
    for name in ("loss", "flow", "norm"):
        here, there = ([line[name] for line in lines(run)] for run in (parts, recipe))
        np.testing.assert_allclose(here, there, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_a_signal_saves_and_leaves(tiny: Path, tmp_path: Path, number: int, code: int) -> None:
    process = start(tiny, "--set", "stage.0.steps=100000", "--set", "data.workers=1")
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(number)
    output = "".join(process.communicate(timeout=60))
    assert process.returncode == code, output
    assert "the same command continues" in output
    assert checkpoint.required(tmp_path / "run", print).step == len(losses(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.skipif(doctor.compiler() is None, reason="no C++ compiler")
def test_a_run_that_is_stopped_or_killed_while_it_compiles_goes_on(
    tiny: Path, tmp_path: Path
) -> None:
    """The compiler is in the same process group, so Ctrl-C and kills meet it too."""
    compiler = tmp_path / "g++"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$*" in *.main.*) mkdir "$0.once" && kill -INT $PPID; exit 1;; esac\n'
        f'exec {doctor.compiler()} "$@"\n'
    )
    compiler.chmod(0o755)
    cache = tmp_path / "kernels"
    empty = cache / "ab" / "cab.main.so"
    empty.parent.mkdir(parents=True)
    empty.touch()
    os.utime(empty, (1, 1))
    command = [sys.executable, "-m", "daybreak", "train", str(tiny), "--set", "compile=true"]
    here = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    ended = subprocess.run(
        command, env=here | {"CXX": str(compiler)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 130, ended.stdout + ended.stderr
    assert "stopped before step 1 had compiled" in ended.stdout
    assert "Traceback" not in ended.stderr
    assert not empty.exists()


def test_a_finished_run_says_so_and_changes_nothing(tiny: Path) -> None:
    recipe = config.load(tiny)
    loop.train(recipe, lambda line: None)
    before = weights(Path(recipe.out))
    told: list[str] = []
    assert loop.train(recipe, told.append).code == 0
    assert "is finished" in told[-1]
    assert weights(Path(recipe.out)) == before


def test_another_recipe_in_the_same_folder_is_refused_with_every_key(tiny: Path) -> None:
    loop.train(config.load(tiny), lambda line: None)
    with pytest.raises(BadRecipe, match=r"seed: 3 -> 4.*stage\.0\.lr: 0\.003 -> 1\.0"):
        loop.train(config.load(tiny, ("seed=4", "stage.0.lr=1.0")), lambda line: None)


def test_what_no_step_depends_on_but_by_rounding_may_change_and_is_listed(tiny: Path) -> None:
    recipe = config.load(tiny)
    loop.train(recipe, lambda line: None)
    other = config.load(tiny, ("micro=4", "data.workers=3", "compile=true", "keep=5"))
    listed = runs.changes(Path(recipe.out), other, {})
    assert sorted(key.partition(":")[0] for key in listed) == [
        *("compile", "data.workers", "keep", "micro")
    ]
    assert loop.train(other, lambda line: None) == (10, 0), "it is finished, and stays so"


def test_a_changed_recipe_goes_on_when_told_to_and_the_checkpoint_says_so(tiny: Path) -> None:
    recipe = config.load(tiny)
    loop.train(recipe, lambda line: None)
    longer = config.load(tiny, ("stage.0.steps=12", "clip=0.5"))
    told: list[str] = []
    assert loop.train(longer, told.append, changed=True) == (12, 0)
    assert "continues with a change: clip: 1.0 -> 0.5" in told
    manifest = json.loads((Path(recipe.out) / "checkpoint-12" / "manifest.json").read_text())
    assert manifest["changed"] == ["clip: 1.0 -> 0.5", "stage.0.steps: 10 -> 12"]
    assert config.load(Path(recipe.out) / "recipe.toml") == longer


def test_what_a_kill_left_of_the_first_file_is_no_other_thing(tiny: Path, tmp_path: Path) -> None:
    recipe = config.load(tiny)
    Path(recipe.out).mkdir()
    left = Path(recipe.out) / ".tmp-01234567-run.json"
    left.write_text("{")
    assert loop.train(recipe, lambda line: None, trial=True).code == 0
    assert not left.exists()


def test_a_folder_with_other_things_in_it_is_not_touched(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadRecipe, match="is not empty and is not a run"):
        loop.train(config.load(tiny), lambda line: None)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_data_is_refused_before_the_run_folder_exists(tiny: Path, tmp_path: Path) -> None:
    recipe = config.load(tiny, (f"data.source={tmp_path / 'nowhere'}",), ("scenes",))
    with pytest.raises(BadData, match="nowhere"):
        loop.train(recipe, lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_disk_too_small_for_checkpoints_is_told_before_the_first_step(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "size", lambda model: 2**60)
    with pytest.raises(BadStorage, match=r"MiB free, and 3 checkpoints of .* need .* MiB: free"):
        loop.train(config.load(tiny), lambda line: None)
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_are_there_already_need_no_more_room(tmp_path: Path) -> None:
    third = shutil.disk_usage(tmp_path).free // 3
    with pytest.raises(BadStorage, match=r"3 checkpoints of .* need"):
        runs.check_space(tmp_path, third, keep=2)
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    runs.check_space(tmp_path, third, keep=2)


def test_a_place_that_cannot_hold_a_folder_is_a_storage_failure(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadStorage, match="cannot write the run folder"):
        loop.train(config.load(tiny, (f"out={tmp_path / 'file' / 'run'}",)), lambda line: None)


def test_a_loss_that_is_not_finite_ends_the_run(tiny: Path) -> None:
    with pytest.raises(NotFinite, match=r"step \d+: loss .*samples \d+ to \d+"):
        loop.train(config.load(tiny, ("stage.0.lr=1e30", "stage.0.warmup=0")), lambda line: None)


def test_stages_follow_one_another_in_one_run(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    text = tiny.read_text().replace('[scenes]\ncanvas = "32"\n', "")
    text = text.replace('"scenes"', json.dumps(pictures.as_posix()))
    text += "\n[[stage]]\nresolution = 64\nsteps = 4\nbatch = 4\nlr = 1e-3\n"
    tiny.write_text(text)
    whole = config.load(tiny, (f"out={(tmp_path / 'whole').as_posix()}",))
    loop.train(whole, lambda line: None)
    assert len(losses(tmp_path / "whole")) == 14
    with Image.open(tmp_path / "whole" / "samples" / "step-0000014" / "00.png") as picture:
        assert picture.size == (64, 64)


def test_it_trains_on_a_prepared_dataset_of_several_shapes(
    tiny: Path, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [
        {"bucket": name} for name in ("64x64", "32x128", "128x32") for _ in range(8)
    ]
    rows[3]["image"] = {"bytes": b"", "path": None}
    folder = prepared(rows)
    text = tiny.read_text().replace('[scenes]\ncanvas = "32"\n', "")
    text = text.replace('"scenes"', json.dumps(folder.as_posix()))
    tiny.write_text(text + "\n[[stage]]\nresolution = 64\nsteps = 3\nbatch = 4\nlr = 1e-3\n")
    recipe = config.load(tiny)
    told: list[str] = []
    loop.train(recipe, told.append)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in metrics.splitlines()]
    assert len(lines) == 13
    assert all(0 <= line["waited"] < line["seconds"] for line in lines)
    assert sum(line.get("substituted", 0) for line in lines) >= 3  # in three epochs and a bit


def test_a_run_is_not_continued_with_other_data(
    tiny: Path, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    folder = prepared([{}] * 8, shards=2)
    text = tiny.read_text().replace('[scenes]\ncanvas = "32"\n', "")
    tiny.write_text(text.replace('"scenes"', json.dumps(folder.as_posix())))
    recipe = config.load(tiny, ("stage.0.steps=2",))
    loop.train(recipe, lambda line: None)
    shutil.rmtree(folder)
    prepared([{}] * 7 + [{"captions": ["edited"]}], shards=2)
    with pytest.raises(BadRecipe, match=r"started with other data: .*data-00001-of-00002\.arrow"):
        loop.train(recipe, lambda line: None)


def test_a_run_is_not_continued_with_other_captions(tiny: Path, pictures: Path) -> None:
    recipe = config.load(
        tiny, ("stage.0.steps=2", f"data.source='{pictures.as_posix()}'"), ("scenes",)
    )
    loop.train(recipe, lambda line: None)
    (pictures / "3.txt").write_text("colour number 4")
    with pytest.raises(BadRecipe, match="started with other data: pictures differ"):
        loop.train(recipe, lambda line: None)


def test_it_learns_eight_pictures_and_draws_them_when_asked(tiny: Path, pictures: Path) -> None:
    text = tiny.read_text().replace('[scenes]\ncanvas = "32"\n', "")
    tiny.write_text(text.replace('"scenes"', json.dumps(pictures.as_posix())))
    recipe = config.load(
        tiny,
        (
            "stage.0.steps=400",
            "stage.0.batch=16",
            "sample.every=1000",
            "save_every=1000",
            "data.empty_captions=0.1",
            "dit.width=64",
        ),
    )
    loop.train(recipe, lambda line: None)
    assert np.mean(losses(Path(recipe.out))[-20:]) < 0.1 * losses(Path(recipe.out))[0]
    _, _, model = runs.trained(Path(recipe.out))
    for guidance in (1.0, 2.0):
        how = recipe.sample.model_copy(update={"guidance": guidance, "steps": 12})
        prompts = [f"colour number {number}" for number in range(8)]
        drawn = draw(model, prompts, list(range(8)), 32, 32, how, recipe.flow)
        wanted = np.array([[30 * number, 255 - 30 * number, 17 * number] for number in range(8)])
        off = np.abs(drawn.mean((1, 2)) - wanted).max(1)
        assert off.mean() < 30, (off, guidance)  # 7 to 19 with other seeds


def test_a_run_goes_on_where_its_folder_has_gone(tiny: Path, tmp_path: Path) -> None:
    loop.train(config.load(tiny, ("stage.0.steps=3",)), lambda line: None)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = config.load(tiny, ("stage.0.steps=3", f"out={(tmp_path / 'moved').as_posix()}"))
    assert loop.train(moved, lambda line: None) == (3, 0)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_a_run_removes_while_it_is_read_is_told_as_that(tiny: Path) -> None:
    recipe = config.load(tiny, ("stage.0.steps=2",))
    loop.train(recipe, lambda line: None)
    run = Path(recipe.out)
    chosen = checkpoint.required(run, print)
    checkpoint.remove(chosen.folder)
    with pytest.raises(NoCheckpoint, match="checkpoint-2 was removed while it was being read"):
        runs.trained(run, chosen=chosen)


def test_a_run_whose_facts_were_removed_goes_on_and_writes_them_anew(tiny: Path) -> None:
    loop.train(config.load(tiny, ("stage.0.steps=4",)), lambda line: None)
    recipe = config.load(tiny, ("stage.0.steps=6",))
    file = Path(recipe.out, "run.json")
    for damaged in ("{", "[]"):
        file.write_text(damaged)
        with pytest.raises(BadStorage, match="restore it, or remove it"):
            loop.train(recipe, lambda line: None, changed=True)
    file.unlink()
    assert loop.train(recipe, lambda line: None, changed=True) == (6, 0)
    assert json.loads(file.read_text())["ledger"]["sessions"] == 1
    file.unlink()
    assert loop.train(recipe, lambda line: None) == (6, 0), "nothing is left to do"
