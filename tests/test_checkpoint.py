"""Checkpoints: whole or not there, verified before they are believed."""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from daybreak import config
from daybreak.data import disk
from daybreak.failure import BadRecipe, BadStorage, NoCheckpoint, NotFinite
from daybreak.model import text
from daybreak.model.text_to_image import TextToImage, build
from daybreak.optim import groups
from daybreak.train import checkpoint, parallel, saving
from tests import warm


class Parts:
    """A model, its average and its optimisers, after one real step."""

    def __init__(self, recipe: config.Recipe, seed: int = 0) -> None:
        self.recipe = recipe
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

    @property
    def state(self) -> checkpoint.State:
        return checkpoint.State(self.model, self.average, self.optimizers, nn.Module())

    def tensors(self) -> dict[str, torch.Tensor]:
        return checkpoint.flat(self.state.tensors)

    def saver(self, run: Path, **changes: object) -> saving.Saver:
        recipe = self.recipe.model_copy(update=changes)
        with parallel.world(parallel.Config()) as here:
            return saving.Saver(recipe, run, here, self.model)

    def save(self, run: Path, step: int, **changes: object) -> Path:
        saver = self.saver(run, **changes)
        saver.save(step, self.state, {})
        saver.finish()
        return run / f"checkpoint-{step}"


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
    checkpoint.load(found, loaded.state)
    assert found.step == 7
    expected, actual = saved.tensors(), loaded.tensors()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    assert (run / "latest").resolve() == found.folder.resolve()


def test_a_folder_whose_name_has_no_number_is_no_checkpoint(run: Path) -> None:
    for name in ("best", "5.rejected", "\u00b2"):  # a digit, and no number
        (run / f"checkpoint-{name}").mkdir()
    assert checkpoint.found(run) == []


def test_the_newest_are_kept(run: Path, recipe: config.Recipe) -> None:
    parts = Parts(recipe)
    for step in (5, 10, 15):
        parts.save(run, step)
    assert [found.step for found in checkpoint.found(run)] == [15, 10]
    assert not list(run.glob(".*-checkpoint-*"))


def test_a_rank_writes_its_rows_in_pieces(
    run: Path, recipe: config.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "PIECE", 20_000)
    saved, loaded = Parts(recipe), Parts(recipe, seed=5)
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        here = parallel.World(0, 1, torch.device("cpu"), None, store, dist.group.WORLD)
        with saving.Saver(recipe, run, here, saved.model) as saver:
            saver.save(7, saved.state, {})
            saver.finish()
        files = sorted((run / "checkpoint-7" / "state").iterdir())
        assert len(files) > 5
        assert files[0].name.startswith("shard-00001-model-00001-of-")
        largest = max(value.nbytes for value in saved.tensors().values())
        headers = 2_000
        assert max(file.stat().st_size for file in files) < max(20_000, largest) + headers
        checkpoint.load(checkpoint.required(run, pytest.fail), loaded.state)
    finally:
        dist.destroy_process_group()
    actual = loaded.tensors()
    assert all(torch.equal(value, actual[name]) for name, value in saved.tensors().items())
    checkpoint.load(checkpoint.required(run, pytest.fail), Parts(recipe, seed=5).state)  # alone
    damage_flip(files[3])
    assert files[3].name in str(checkpoint.verify(run / "checkpoint-7"))


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
    with pytest.raises(BadRecipe, match=r"checkpoint-5 holds another model .*dit\.blocks\.2"):
        checkpoint.load_average(checkpoint.required(run, print), other.model)


FULL_DISK = """
import resource, sys
from pathlib import Path
from daybreak import config
from daybreak.failure import BadStorage
from tests.test_checkpoint import Parts
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
    script = run.with_name("full.py")
    script.write_text(FULL_DISK.format(run=str(run)))
    done = warm.run(script)
    assert done.returncode == 7, done.stderr
    assert "checkpoint-10" in done.stdout
    assert "it needs 1.2 MiB" in done.stdout
    assert "MiB are free" in done.stdout
    assert checkpoint.required(run, print).step == 5
    assert not list(run.glob(".tmp-*"))


def test_a_folder_that_cannot_be_written_is_a_storage_failure(
    run: Path, recipe: config.Recipe
) -> None:
    parts = Parts(recipe)
    with pytest.raises(BadStorage, match="cannot write"):
        parts.save(run / "gone", 5)


def alone() -> parallel.World:
    with parallel.world(parallel.Config()) as here:
        return here


def test_a_run_goes_on_from_the_newest_good_one_and_sets_bad_ones_aside(
    run: Path, recipe: config.Recipe
) -> None:
    parts = Parts(recipe)
    parts.save(run, 5)
    damage_flip(parts.save(run, 10) / "ema.safetensors")
    told: list[str] = []
    found = checkpoint.to_continue(run, alone(), told.append)
    assert found is not None
    assert found.step == 5
    assert "ema.safetensors has sha256" in told[0]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-10.rejected",
        "checkpoint-5",
    ]


def test_a_run_whose_checkpoints_are_all_bad_does_not_begin_anew(
    run: Path, recipe: config.Recipe
) -> None:
    assert checkpoint.to_continue(run, alone(), print) is None
    damage_flip(Parts(recipe).save(run, 5) / "ema.safetensors")
    for _ in range(2):
        with pytest.raises(
            NoCheckpoint, match="or remove checkpoint-5 to start from the beginning"
        ):
            checkpoint.to_continue(run, alone(), lambda line: None)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    path.write_text(json.dumps(manifest | {"sha256": checkpoint.digest(manifest)}))


def test_weights_are_known_by_their_bytes_and_not_by_who_wrote_them(
    run: Path, recipe: config.Recipe
) -> None:
    folder = Parts(recipe).save(run, 5)
    found = checkpoint.required(run, print)
    of_weights, of_all = found.weights, found.digest
    assert of_weights == hashlib.sha256((folder / "ema.safetensors").read_bytes()).hexdigest()
    rewrite(folder, lambda manifest: manifest.update(revision="of another day"))
    assert checkpoint.verify(folder) is None
    assert (found.weights, found.digest != of_all) == (of_weights, True)


def test_what_a_manifest_does_not_list_or_may_not_list_is_refused(
    run: Path, recipe: config.Recipe
) -> None:
    folder = Parts(recipe).save(run, 5)
    assert checkpoint.verify(folder) is None
    (folder / "extra.pt").write_bytes(b"pickle")
    assert checkpoint.verify(folder) == "extra.pt is not in its manifest"
    (folder / "extra.pt").unlink()

    rewrite(folder, lambda manifest: manifest["files"].update({"../recipe.toml": {"bytes": 1}}))
    assert checkpoint.verify(folder) == "../recipe.toml lies outside of it"
    rewrite(folder, lambda manifest: manifest["files"].pop("../recipe.toml"))

    (folder / "ema.safetensors").write_bytes((2**30).to_bytes(8, "little") + b"{}")
    rewrite(
        folder,
        lambda manifest: manifest["files"].update(
            {"ema.safetensors": disk.sealed(folder / "ema.safetensors")}
        ),
    )
    wrong = checkpoint.verify(folder)
    assert wrong is not None
    assert wrong.startswith("ema.safetensors has a header of 1073741824 bytes")
    rewrite(folder, lambda manifest: manifest.update(schema=99))
    assert "schema 99, and this daybreak reads 2" in str(checkpoint.verify(folder))


@pytest.mark.parametrize("file", ["ema", "optimizer"])
def test_what_is_not_finite_is_never_saved(run: Path, recipe: config.Recipe, file: str) -> None:
    parts = Parts(recipe)
    parts.save(run, 5)
    next(iter(parts.state.tensors[file].values())).view(-1)[0] = float("nan")
    with pytest.raises(NotFinite, match=rf"{file}\..* not finite, so .*checkpoint-10 is not saved"):
        parts.save(run, 10)
    assert (run / "latest").resolve().name == "checkpoint-5"
    assert not list(run.glob(".tmp-*"))


def test_damaged_ones_do_not_count_and_milestones_stay(run: Path, recipe: config.Recipe) -> None:
    parts = Parts(recipe)
    for step in (4, 5, 6, 7):
        parts.save(run, step, keep_every=4)
    assert [found.step for found in checkpoint.found(run)] == [7, 6, 4]
    damage_flip(run / "checkpoint-7" / "ema.safetensors")
    parts.save(run, 9, keep_every=4)
    assert [found.step for found in checkpoint.found(run)] == [9, 6, 4]
    assert (run / "checkpoint-7.rejected").is_dir()


def failing(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> None:
    """Let the disk fail, a few times, when a file is to be synced."""
    left = [times]
    real = disk.sealed

    def sealed(path: Path) -> dict[str, Any]:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(disk, "sealed", sealed)
    monkeypatch.setattr(saving, "PAUSES", (0.0, 0.0))


def test_a_passing_error_is_tried_again(
    run: Path, recipe: config.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, errno.EIO, 2)
    Parts(recipe).save(run, 5)
    assert checkpoint.required(run, print).step == 5


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_the_third_save_in_a_row_that_fails_ends_the_run(
    run: Path, recipe: config.Recipe, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    parts = Parts(recipe)
    parts.save(run, 5)
    failing(monkeypatch, number, 100)
    told: list[str] = []
    saver = parts.saver(run)
    saver.tell = told.append
    saver.save(6, parts.state, {})
    saver.save(7, parts.state, {})
    assert [line.partition(": ")[0].rpartition("/")[2] for line in told] == [
        "checkpoint-6",
        "checkpoint-7",
    ]
    assert all("training goes on" in line for line in told)
    with pytest.raises(BadStorage, match="3 saves in a row"):
        saver.save(8, parts.state, {})
    assert checkpoint.required(run, print).step == 5
    assert not list(run.glob(".tmp-*"))


def test_in_the_background_the_weights_of_that_step_are_saved(
    run: Path, recipe: config.Recipe
) -> None:
    parts, loaded = Parts(recipe), Parts(recipe, seed=5)
    wanted = {name: value.clone() for name, value in parts.tensors().items()}
    saver = parts.saver(run, save_async=True)
    saver.save(5, parts.state, {})
    for value in parts.tensors().values():  # the next step does not wait
        value.add_(1.0)
    saver.save(6, parts.state, {})
    saver.finish()
    assert saver.newest == 6
    assert saver.took > 0
    checkpoint.load(checkpoint.Checkpoint(run / "checkpoint-5", 5), loaded.state)
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.tensors().items())
    assert checkpoint.verify(run / "checkpoint-5") is None
    assert checkpoint.verify(run / "checkpoint-6") is None


def test_an_error_in_the_background_is_heard_with_the_next_save(
    run: Path, recipe: config.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Parts(recipe)
    saver = parts.saver(run, save_async=True)
    failing(monkeypatch, errno.ENOSPC, 100)
    saver.save(5, parts.state, {})
    with pytest.raises(BadStorage, match=r"cannot write .*checkpoint-5: No space left"):
        saver.finish()
    assert saver.newest is None
    assert not (run / "latest").exists()


@pytest.mark.slow
def test_in_the_background_training_waits_for_a_copy_only(run: Path, tiny: Path) -> None:
    parts = Parts(config.load(tiny, ("dit.width=448", "dit.depth=4", "dit.heads=8")))
    assert sum(value.nbytes for value in parts.tensors().values()) > 100e6
    took: dict[bool, list[float]] = {False: [], True: []}
    step = 0
    for behind, seconds in took.items():
        saver = parts.saver(run, save_async=behind)
        for _ in range(4):
            step += 1
            began = time.monotonic()
            saver.save(step, parts.state, {})
            seconds.append(time.monotonic() - began)
            saver.finish()
    assert min(took[True][1:]) < 0.1 * min(took[False][1:]), took


def test_failures_that_are_not_in_a_row_are_forgiven(
    run: Path, recipe: config.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Parts(recipe)
    saver = parts.saver(run)
    saver.tell = lambda line: None
    for step in (5, 8):
        failing(monkeypatch, errno.ENOSPC, 2)
        saver.save(step, parts.state, {})
        saver.save(step + 1, parts.state, {})
        saver.save(step + 2, parts.state, {})
        saver.finish()
        assert saver.newest == step + 2


def test_an_error_of_safetensors_is_known_by_the_number_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError) as caught:
        save_file({"a": torch.zeros(1)}, tmp_path / "gone" / "a")
    assert saving._reason(caught.value) == (errno.ENOENT, os.strerror(errno.ENOENT))
    assert saving._reason(SafetensorError("a word")) == (0, "a word")


@pytest.mark.parametrize(
    "number",
    [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG],
    ids=errno.errorcode.__getitem__,
)
def test_what_the_next_second_will_not_mend_is_not_tried_again(
    run: Path, recipe: config.Recipe, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    parts = Parts(recipe)
    saver = parts.saver(run)
    told: list[str] = []
    saver.tell = told.append
    failing(monkeypatch, number, 1)  # a second try would succeed
    saver.save(5, parts.state, {})
    assert saver.newest is None
    assert len(told) == 1
    assert os.strerror(number) in told[0]
    assert not checkpoint.found(run)


def test_the_disk_holds_all_of_a_checkpoint_before_it_has_its_name_and_then_the_name(
    run: Path, recipe: config.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged, target = run / ".tmp-checkpoint-5", run / "checkpoint-5"
    before, after = set[Path](), set[Path]()
    real = disk.sync

    def sync(path: Path) -> None:
        (after if target.exists() else before).add(path)
        real(path)

    monkeypatch.setattr(disk, "sync", sync)
    Parts(recipe).save(run, 5)
    whole = {path.relative_to(target) for path in target.rglob("*")} | {Path()}
    assert {staged / path for path in whole} <= before
    assert run in after
