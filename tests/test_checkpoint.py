"""Checkpoints: whole or not there, verified before they are believed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from daybreak import config
from daybreak.failure import BadStorage, NoCheckpoint
from daybreak.model import text
from daybreak.model.text_to_image import TextToImage, build
from daybreak.optim import groups
from daybreak.train import checkpoint


class Parts:
    """A model, its average and its optimisers, after one real step."""

    def __init__(self, recipe: config.Recipe, seed: int = 0) -> None:
        tokenizer = text.learn_tokenizer(["a red circle"] * 20, recipe.text)
        self.model: TextToImage = build(recipe.dit, recipe.text, tokenizer, seed)
        self.average: TextToImage = build(recipe.dit, recipe.text, tokenizer, seed + 1)
        self.optimizers = groups.optimizers(self.model, recipe.muon, recipe.adamw)
        groups.set_rate(self.optimizers, 1e-3)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer, _ in self.optimizers.values():
            optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            **{f"model.{name}": value for name, value in self.model.weights().items()},
            **{f"average.{name}": value for name, value in self.average.weights().items()},
            **checkpoint._state(self.optimizers),
        }

    def save(self, run: Path, step: int, keep: int = 2) -> Path:
        return checkpoint.save(run, step, self.model, self.average, self.optimizers, keep)


@pytest.fixture
def recipe(tiny: Path) -> config.Recipe:
    return config.load(tiny)


@pytest.fixture
def run(tmp_path: Path, recipe: config.Recipe) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text(config.dump(recipe))
    return folder


def test_what_is_saved_is_what_is_loaded(run: Path, recipe: config.Recipe) -> None:
    saved = Parts(recipe)
    saved.save(run, 7)
    loaded = Parts(recipe, seed=5)
    found = checkpoint.required(run, print)
    checkpoint.load(found, loaded.model, loaded.average, loaded.optimizers)
    assert found.step == 7
    expected, actual = saved.tensors(), loaded.tensors()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    assert (run / "latest").resolve() == found.folder.resolve()


def test_the_newest_are_kept(run: Path, recipe: config.Recipe) -> None:
    parts = Parts(recipe)
    for step in (5, 10, 15):
        parts.save(run, step)
    assert [found.step for found in checkpoint.found(run)] == [15, 10]
    assert not list(run.glob(".*-checkpoint-*"))


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(
    run: Path, recipe: config.Recipe, file: str, damage: object
) -> None:
    parts = Parts(recipe)
    parts.save(run, 5)
    damage(parts.save(run, 10) / file)  # type: ignore[operator]
    told: list[str] = []
    assert checkpoint.required(run, told.append).step == 5
    if file != "manifest.json":
        assert len(told) == 1
        assert "checkpoint-10" in told[0]
        assert file in told[0]


def test_without_a_good_one_it_says_so(run: Path, recipe: config.Recipe) -> None:
    with pytest.raises(NoCheckpoint, match="no complete checkpoint"):
        checkpoint.required(run, print)
    damage_flip(Parts(recipe).save(run, 5) / "ema.safetensors")
    with pytest.raises(NoCheckpoint, match="no complete checkpoint"):
        checkpoint.required(run, print)
    with pytest.raises(NoCheckpoint, match="there is no run folder"):
        checkpoint.required(run / "nowhere", print)


def test_a_refused_step_can_be_written_again(run: Path, recipe: config.Recipe) -> None:
    parts = Parts(recipe)
    damage_flip(parts.save(run, 5) / "model.safetensors")
    parts.save(run, 5)
    assert checkpoint.required(run, print).step == 5


def test_leftovers_of_a_killed_save_are_cleared_and_never_loaded(
    run: Path, recipe: config.Recipe
) -> None:
    parts = Parts(recipe)
    parts.save(run, 5)
    (run / ".tmp-checkpoint-10-abc").mkdir()
    (run / ".tmp-checkpoint-10-abc" / "model.safetensors").write_bytes(b"half")
    assert checkpoint.required(run, print).step == 5
    checkpoint.clear_unfinished(run)
    assert not (run / ".tmp-checkpoint-10-abc").exists()


def test_weights_of_another_shape_are_not_loaded(run: Path, recipe: config.Recipe) -> None:
    Parts(recipe).save(run, 5)
    other = Parts(recipe.model_copy(update={"dit": recipe.dit.model_copy(update={"depth": 3})}))
    with pytest.raises(ValueError, match="weights differ"):
        checkpoint.load_average(checkpoint.required(run, print), other.model)


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint import Parts
from daybreak import config
from daybreak.failure import BadStorage
run = Path({run!r})
parts = Parts(config.load(run / "recipe.toml"))
parts.save(run, 5)
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    parts.save(run, 10)
except BadStorage as error:
    print(error)
    sys.exit(7)
"""


def test_a_full_disk_costs_the_new_checkpoint_only(run: Path, recipe: config.Recipe) -> None:
    script = FULL_DISK.format(tests=str(Path(__file__).parent), run=str(run))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 7, done.stderr
    assert "checkpoint-10" in done.stdout
    assert "MiB are free" in done.stdout
    assert checkpoint.required(run, print).step == 5
    assert not list(run.glob(".tmp-*"))


def test_a_folder_that_cannot_be_written_is_a_storage_failure(
    run: Path, recipe: config.Recipe
) -> None:
    parts = Parts(recipe)
    with pytest.raises(BadStorage, match="cannot write"):
        parts.save(run / "gone", 5)
