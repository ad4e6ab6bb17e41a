"""Checkpoints: the state of a run after a step, either complete or absent.

    RUN/checkpoint-1000/    model, ema, optimizer .safetensors (objective, if a term learns
                            something), or state/shard-....safetensors: each rank's rows, in pieces
                            tokenizer/; recipe.toml; trainer.json
                            manifest.json (bytes and sha256 of each other file; its own sha256)
    RUN/latest -> checkpoint-1000

One process writes whole tensors under their own names, for any program that reads safetensors.
Several processes each write the rows they hold (torch.distributed.checkpoint), as none has room for
more. Any number of processes can read either form. How checkpoints are written: train/saving.

Before a checkpoint is loaded all its hashes are verified; the newest is tried first. No random
state is saved, because there is none (train/dice). No file is written or read as a pickle.
"""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from daybreak.data import disk
from daybreak.failure import BadRecipe, NoCheckpoint
from daybreak.model.text_to_image import TextToImage
from daybreak.train.parallel import World, together

SCHEMA = 2
WEIGHTS = {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}  # by one process
PARTS = WEIGHTS | {"objective.safetensors", "state", "tokenizer", "recipe.toml", "trainer.json"}
HEADER = 16 * 2**20  # largest header of one safetensors file, in bytes


class Checkpoint(NamedTuple):
    """A checkpoint folder and the step it holds."""

    folder: Path
    step: int

    @property
    def digest(self) -> str:
        """The sha256 of its manifest, which in turn holds the sha256 of every other file."""
        return disk.sha256(self.folder / "manifest.json")

    @property
    def weights(self) -> str:
        """A digest that identifies its averaged weights: the sha256 of `ema.safetensors`.

        For shards, the sha256 of their entries in the manifest, optimiser state included.
        """
        listed = json.loads((self.folder / "manifest.json").read_text())["files"]
        if not self.sharded:
            return str(listed["ema.safetensors"]["sha256"])
        return digest({name: listed[name] for name in listed if name.startswith("state/")})

    @property
    def sharded(self) -> bool:
        """Whether several ranks wrote it, each its own rows."""
        return (self.folder / "state").is_dir()

    @property
    def facts(self) -> dict[str, Any]:
        """What it holds besides tensors."""
        read: dict[str, Any] = json.loads((self.folder / "trainer.json").read_text())
        return read

    @property
    def ranks(self) -> int:
        """How many processes wrote it."""
        return int(json.loads((self.folder / "manifest.json").read_text())["ranks"])


class State(NamedTuple):
    """What training changes: model, average, optimisers, and what the loss terms learn."""

    model: TextToImage
    average: TextToImage
    optimizers: dict[str, tuple[Optimizer, float]]
    learned: nn.Module

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The live tensors, by file and then name: `optimizer`, `muon.3.momentum_buffer`."""
        moments = {
            f"{name}.{index}.{key}": value
            for name, (optimizer, _) in self.optimizers.items()
            for index, entries in optimizer.state_dict()["state"].items()
            for key, value in entries.items()
        }
        files = {
            "model": self.model.weights(),
            "ema": self.average.weights(),
            "optimizer": moments,
            "objective": self.learned.state_dict(),
        }
        return {file: tensors for file, tensors in files.items() if tensors}


def found(run: Path) -> list[Checkpoint]:
    """List the checkpoint folders, newest first, unverified."""
    steps = [
        Checkpoint(folder, int(number))
        for folder in run.glob("checkpoint-*")
        if (number := folder.name.removeprefix("checkpoint-")).isdecimal() and folder.is_dir()
    ]
    return sorted(steps, key=lambda checkpoint: -checkpoint.step)


def newest(run: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint whose hashes are all right; `tell` reports each refused one."""
    for checkpoint in found(run):
        wrong = verify(checkpoint.folder)
        if wrong is None:
            return checkpoint
        tell(f"{checkpoint.folder.name} is damaged and skipped: {wrong}")
    return None


def required(run: Path, tell: Callable[[str], None]) -> Checkpoint:
    """Return the newest good checkpoint. Errors: NoCheckpoint if there is none."""
    if not run.is_dir():
        raise NoCheckpoint(
            f"there is no run folder {run}: give one that daybreak train has written"
        )
    checkpoint = newest(run, tell)
    if checkpoint is None:
        raise NoCheckpoint(f"{run} holds no complete checkpoint: continue its training first")
    return checkpoint


def to_continue(
    run: Path, here: World, tell: Callable[[str], None], every: int = 1
) -> Checkpoint | None:
    """Return the newest good checkpoint, the same on all ranks; they divide the hashing.

    Only steps that are multiples of `every` count. Newer, damaged ones are renamed to
    checkpoint-N.rejected, so that their steps can be written again. None if none was saved yet.

    Errors  NoCheckpoint if all of them are damaged: the run would silently start from scratch.
    """
    refused: list[Checkpoint] = []
    for checkpoint in agreed(run, here):
        if checkpoint.step % every:
            continue
        wrong = complaint(checkpoint, here)
        if wrong is None:
            if here.first:
                for bad in refused:
                    reject(bad)
            return checkpoint
        tell(f"{checkpoint.folder} is damaged and skipped: {wrong}")
        refused.append(checkpoint)
    if refused:
        raise NoCheckpoint(
            f"all checkpoints in {run} are damaged: restore one, or remove "
            f"{', '.join(bad.folder.name for bad in refused)} to start from the beginning"
        )
    return None


def agreed(run: Path, here: World) -> list[Checkpoint]:
    """List the checkpoints that the first rank finds, on all ranks: machines' disks may differ."""
    return together(here, lambda: found(run) if here.first else [])[0]


def complaint(checkpoint: Checkpoint, here: World) -> str | None:
    """Say what is wrong with a checkpoint, or None; the same on all ranks, which divide hashing."""
    said = together(here, partial(verify, checkpoint.folder, here.rank, here.size))
    return next((wrong for wrong in said if wrong), None)


def verify(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Compare every file with the manifest; return what is wrong, or None.

    Each of several ranks hashes its share of the files.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        listed, own = manifest["files"], manifest.pop("sha256")
        actual = digest(manifest)
        if own != actual:
            return f"manifest.json has sha256 {actual[:12]}, not {own[:12]}"
        if manifest["schema"] != SCHEMA:
            return f"it is of schema {manifest['schema']}, and this daybreak reads {SCHEMA}"
        there = {
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if not path.is_dir() and not path.name.startswith(".")
        }
        if unknown := sorted(there - listed.keys() - {"manifest.json"}):
            return f"{unknown[0]} is not in its manifest"
        whole = any(name.startswith("state/") for name in listed)
        if absent := [] if whole else sorted(WEIGHTS - listed.keys()):
            return f"{absent[0]} is missing"
        for number, (name, expected) in enumerate(sorted(listed.items())):
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                return f"{name} lies outside of it"
            if name.partition("/")[0] not in PARTS:
                return f"{name} is no part of a checkpoint"
            mine = number % ranks == rank
            if wrong := disk.complaint(folder, name, expected, hashed=mine):
                return wrong
            if mine and path.suffix == ".safetensors" and (header := _header(path)) > HEADER:
                return f"{name} has a header of {header} bytes, more than {HEADER}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read ({error})"
    return None


def digest(manifest: Mapping[str, Any]) -> str:
    """The sha256 of a manifest's content, which is then entered in the manifest itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def load(checkpoint: Checkpoint, state: State, alone: bool = True) -> None:
    """Restore everything as it was after that step, on any number of ranks.

    Unless the process is `alone`, every rank must call this, and loads its own rows.

    Errors  BadRecipe, before any weight changes, if a different model was saved.
    """
    stored = _stored(checkpoint)
    _prime(state.optimizers, stored)
    _fill(checkpoint, stored, flat(state.tensors), alone)


def load_average(checkpoint: Checkpoint, model: TextToImage) -> None:
    """Load the whole averaged weights, the ones to sample from, in this process alone.

    Errors  BadRecipe if they do not fit.
    """
    stored = {name: shape for name, shape in _stored(checkpoint).items() if name.startswith("ema.")}
    _fill(checkpoint, stored, flat({"ema": model.weights()}), alone=True)


def size(model: TextToImage) -> int:
    """Estimate the bytes of one checkpoint: weights, average and two moments in float32."""
    return 4 * 4 * sum(weight.numel() for weight in model.weights().values())


def clear_unfinished(run: Path) -> None:
    """Remove the hidden folders that a killed run has left."""
    for folder in (*run.glob(".tmp-checkpoint-*"), *run.glob(".old-checkpoint-*")):
        shutil.rmtree(folder, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint: first rename it, then delete its files."""
    hidden = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    with contextlib.suppress(OSError):
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def reject(checkpoint: Checkpoint) -> None:
    """Rename a damaged checkpoint to checkpoint-N.rejected, and keep it for inspection."""
    aside = checkpoint.folder.with_name(f"{checkpoint.folder.name}.rejected")
    remove(aside)
    with contextlib.suppress(OSError):
        checkpoint.folder.rename(aside)


def flat(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name tensors as shards do: `model.dit.blocks.0.attention.img_qkv_proj.weight`."""
    return {f"{file}.{name}": value for file, some in files.items() for name, value in some.items()}


def _stored(checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """List what a checkpoint holds, by flat name."""
    if checkpoint.sharded:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        listed = HuggingFaceStorageReader(str(checkpoint.folder / "state")).read_metadata()
        return {
            name: entry.size
            for name, entry in listed.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    shapes = {}
    for path in sorted(checkpoint.folder.glob("[!.]*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                shapes[f"{path.stem}.{name}"] = torch.Size(file.get_slice(name).get_shape())
    return shapes


def _prime(
    optimizers: dict[str, tuple[Optimizer, float]], stored: Mapping[str, torch.Size]
) -> None:
    """Give the optimisers a zero tensor for each saved one; `_fill` then fills them.

    State that was not saved is dropped. Learning rates and all other settings come from the recipe.
    """
    for name, (optimizer, _) in optimizers.items():
        optimizer.state.clear()
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for key, shape in stored.items():  # optimizer.muon.3.momentum_buffer
            file, owner, *rest = key.split(".")
            if (file, owner) != ("optimizer", name) or int(rest[0]) >= len(weights):
                continue
            weight = weights[int(rest[0])]
            optimizer.state[weight][rest[1]] = (
                torch.zeros_like(weight, requires_grad=False)
                if shape == weight.shape
                else torch.zeros(shape, device=weight.device)
            )


@torch.no_grad()
def _fill(
    checkpoint: Checkpoint,
    stored: Mapping[str, torch.Size],
    wanted: dict[str, Tensor],
    alone: bool,
) -> None:
    """Copy the stored tensors into the live ones; each rank fills its own rows."""
    wrong = stored.keys() ^ wanted.keys() or {
        name for name, value in wanted.items() if value.shape != stored[name]
    }
    if wrong:
        raise BadRecipe(
            f"{checkpoint.folder} holds another model than this recipe describes: {min(wrong)} "
            f"{'has another shape' if stored.keys() == wanted.keys() else 'is in one of them only'}"
        )
    if checkpoint.sharded:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load as load_shards

        with warnings.catch_warnings():  # torch warns if there is only one process
            warnings.simplefilter("ignore", UserWarning)
            reader = HuggingFaceStorageReader(str(checkpoint.folder / "state"))
            load_shards(wanted, storage_reader=reader, no_dist=alone)
        return
    for path in sorted(checkpoint.folder.glob("[!.]*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if (key := f"{path.stem}.{name}") in wanted:
                    _copy(file.get_tensor(name), wanted[key])


def _copy(whole: Tensor, mine: Tensor) -> None:
    """Copy a whole tensor into one that may hold only some of its rows."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(mine, DTensor):
        whole = whole.to(mine.device)
        whole = distribute_tensor(whole, mine.device_mesh, mine.placements, src_data_rank=None)
    mine.copy_(whole)


def _header(path: Path) -> int:
    """Size in bytes of a safetensors file's header, as its first eight bytes say."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")
