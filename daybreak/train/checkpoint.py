"""Checkpoints: a step of a run, whole or not there.

    RUN/checkpoint-1000/    model, ema, optimizer .safetensors; tokenizer/; recipe.toml;
                            trainer.json; objective.safetensors if a term learns something;
                            manifest.json (bytes and sha256 of every other file)
    RUN/latest -> checkpoint-1000

Files are written and synced in a hidden folder beside the target, the manifest last; then the
folder is renamed, then `latest` moves, then old ones go. A kill at any moment leaves the previous
checkpoint as it was. Loading verifies every hash before the model is touched, newest first.
There is no random state to save: there is none (train/dice). No pickle is written or read.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from daybreak.data import disk
from daybreak.failure import BadStorage, NoCheckpoint
from daybreak.model.text_to_image import TextToImage

SCHEMA = 1


class Checkpoint(NamedTuple):
    """A verified checkpoint folder and the step it holds."""

    folder: Path
    step: int

    @property
    def digest(self) -> str:
        """The sha256 of its manifest, which names every byte of it."""
        return _sha256(self.folder / "manifest.json")


def save(
    run: Path,
    step: int,
    model: TextToImage,
    average: TextToImage,
    optimizers: dict[str, tuple[Optimizer, float]],
    keep: int,
    learned: nn.Module | None = None,
) -> Path:
    """Write checkpoint-STEP, move `latest` to it, and keep the newest `keep`.

    Errors: BadStorage if the disk refuses; what was there before is still there.
    """
    target = run / f"checkpoint-{step}"
    staged: Path | None = None
    try:
        staged = Path(tempfile.mkdtemp(prefix=f".tmp-checkpoint-{step}-", dir=run))
        save_file(_plain(model.weights()), staged / "model.safetensors")
        save_file(_plain(average.weights()), staged / "ema.safetensors")
        save_file(_plain(_state(optimizers)), staged / "optimizer.safetensors")
        if learned is not None and (terms := learned.state_dict()):
            save_file(_plain(terms), staged / "objective.safetensors")
        if model.text.trained:
            model.text.tokenizer.save_pretrained(staged / "tokenizer")
        shutil.copy(run / "recipe.toml", staged / "recipe.toml")
        _write_json(staged / "trainer.json", {"schema": SCHEMA, "step": step})
        _seal(staged, step)
        if target.exists():  # a step is written anew only if what stands there was refused
            _remove(target)
        staged.rename(target)
        staged = None
        disk.sync(run)
        _point(run / "latest", target.name)
    except (OSError, SafetensorError) as error:
        raise BadStorage(
            f"cannot write {target}: {getattr(error, 'strerror', None) or error}{_free(run)}"
        ) from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
    for old in found(run)[keep:]:
        _remove(old.folder)
    return target


def found(run: Path) -> list[Checkpoint]:
    """List the checkpoint folders that have a manifest, newest first, unverified."""
    steps = [
        Checkpoint(folder, int(folder.name.removeprefix("checkpoint-")))
        for folder in run.glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdigit()
        and (folder / "manifest.json").is_file()
    ]
    return sorted(steps, key=lambda checkpoint: -checkpoint.step)


def newest(run: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint whose every hash is right; `tell` hears of each refused one."""
    for checkpoint in found(run):
        wrong = verify(checkpoint.folder)
        if wrong is None:
            return checkpoint
        tell(f"{checkpoint.folder.name} is damaged and passed over: {wrong}")
    return None


def required(run: Path, tell: Callable[[str], None]) -> Checkpoint:
    """Return the newest good checkpoint. Errors: NoCheckpoint if there is none."""
    if not run.is_dir():
        raise NoCheckpoint(
            f"there is no run folder {run}: give one that daybreak train has written"
        )
    checkpoint = newest(run, tell)
    if checkpoint is None:
        raise NoCheckpoint(f"{run} holds no complete checkpoint: let its training go on first")
    return checkpoint


def verify(folder: Path) -> str | None:
    """Compare every file with the manifest; return what is wrong, or None."""
    try:
        listed = json.loads((folder / "manifest.json").read_text())["files"]
        for name, expected in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            actual = _sha256(path)
            if actual != expected["sha256"]:
                return f"{name} has sha256 {actual[:12]}, not {expected['sha256'][:12]}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read ({error})"
    return None


def load(
    checkpoint: Checkpoint,
    model: TextToImage,
    average: TextToImage,
    optimizers: dict[str, tuple[Optimizer, float]],
    learned: nn.Module | None = None,
) -> None:
    """Put model, average, optimisers and what the terms learn back as after that step."""
    model.load(load_file(checkpoint.folder / "model.safetensors"))
    average.load(load_file(checkpoint.folder / "ema.safetensors"))
    _restore(optimizers, load_file(checkpoint.folder / "optimizer.safetensors"))
    if learned is not None and learned.state_dict():
        learned.load_state_dict(load_file(checkpoint.folder / "objective.safetensors"))


def load_average(checkpoint: Checkpoint, model: TextToImage) -> None:
    """Load the averaged weights, the ones to sample from."""
    model.load(load_file(checkpoint.folder / "ema.safetensors"))


def size(model: TextToImage) -> int:
    """Estimate the bytes of one checkpoint: weights, average and two moments in float32."""
    return 4 * 4 * sum(weight.numel() for weight in model.weights().values())


def clear_unfinished(run: Path) -> None:
    """Remove the hidden folders that a killed run has left."""
    for folder in (*run.glob(".tmp-checkpoint-*"), *run.glob(".old-checkpoint-*")):
        shutil.rmtree(folder, ignore_errors=True)


def _free(folder: Path) -> str:
    """Say how much room there is, where that can be found out."""
    with contextlib.suppress(OSError):
        return f"; {shutil.disk_usage(folder).free / 2**20:.0f} MiB are free there"
    return ""


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _state(optimizers: dict[str, tuple[Optimizer, float]]) -> dict[str, Tensor]:
    """Name every tensor of the optimisers: `muon.3.momentum_buffer`."""
    return {
        f"{name}.{index}.{key}": value
        for name, (optimizer, _) in optimizers.items()
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }


def _restore(optimizers: dict[str, tuple[Optimizer, float]], tensors: dict[str, Tensor]) -> None:
    """Give the optimisers their tensors back; their settings come from the recipe."""
    for name, (optimizer, _) in optimizers.items():
        state: dict[int, dict[str, Any]] = {}
        for full, tensor in tensors.items():
            owner, index, key = full.split(".", 2)
            if owner == name:
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )


def _seal(folder: Path, step: int) -> None:
    """Sync every file, then write the manifest that makes the folder a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "schema": SCHEMA,
        "step": step,
        "torch": torch.__version__,
        "files": {path.relative_to(folder).as_posix(): disk.sealed(path) for path in files},
    }
    _write_json(folder / "manifest.json", manifest)
    disk.sync(folder / "manifest.json")
    for inner in {path.parent for path in files} | {folder}:
        disk.sync(inner)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _point(link: Path, name: str) -> None:
    """Move a symbolic link in one step."""
    fresh = link.with_name(f".{link.name}-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(name)
    fresh.replace(link)


def _remove(folder: Path) -> None:
    """Take a checkpoint away: first its name, then its files."""
    hidden = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    with contextlib.suppress(OSError):
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
