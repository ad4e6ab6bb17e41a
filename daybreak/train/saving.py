"""How a checkpoint is written to disk: completely, or not at all.

Files are written and synced in a hidden folder beside the target, the manifest last; then the
folder is renamed, then `latest` is moved, then old checkpoints are removed. A kill at any moment
leaves the previous checkpoint intact. Every rank writes and hashes its own part; an error on one
rank cancels the save on all.

With `save_async` the same happens in a thread, from a copy of the tensors: training waits only for
the copy, and for the previous save if that is not done yet.

A failed write is tried again. If the save still fails this is reported and training continues; the
third failed save in a row ends the run.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from daybreak import config
from daybreak.data import disk
from daybreak.failure import BadStorage, NotFinite
from daybreak.model.text_to_image import TextToImage
from daybreak.train import checkpoint, runs
from daybreak.train.checkpoint import SCHEMA, State
from daybreak.train.parallel import World, local, together
from daybreak.train.rendezvous import fulfil

PAUSES = (0.5, 2.0)  # seconds before each retry
FAILURES = 3  # failed saves in a row that end a run
PIECE = 2**28  # bytes of one shard file: each is assembled in memory as a whole
GOODBYE = 20.0  # seconds that a failed run waits for a save under way
HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
LINKLESS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}  # of a disk without symbolic links

Files = dict[str, dict[str, Any]]  # bytes and sha256 by name
Tensors = dict[str, dict[str, Tensor]]  # by file and name in it


class Hopeless(BadStorage):
    """An error that a retry will not solve: a full disk, a folder without write permission."""


class Saver:
    """Writes the checkpoints of a run; all ranks call it alike.

        with Saver(recipe, folder, here, model, tell) as saver:
            saver.save(step, state, guard)
            saver.finish()

    `newest` is the step of the last checkpoint known to be on the disk.
    """

    def __init__(
        self,
        recipe: config.Recipe,
        run: Path,
        here: World,
        model: TextToImage,
        tell: Callable[[str], None] = print,
        newest: int | None = None,
    ) -> None:
        self.recipe, self.run, self.here, self.tell, self.newest = recipe, run, here, tell, newest
        self.tokenizer = _tokenizer(model) if here.first and model.text.trained else {}
        self.facts = runs.provenance(recipe) | {"changed": runs.changed(run)} if here.first else {}
        self.stage = (
            _stager(here.device) if recipe.save_async or here.device.type != "cpu" else None
        )
        self.pending: Future[None] | None = None
        self.step = 0  # of the save under way
        self.failed: list[BadStorage] = []  # failures of saves in a row
        self.took = 0.0  # seconds that writing the last one took, even if in the background

    def __enter__(self) -> Self:
        """Be ready."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait up to GOODBYE seconds for a save under way."""
        if self.pending is not None:
            with contextlib.suppress(BaseException):
                self.pending.result(GOODBYE)

    def save(self, step: int, state: State, guard: Mapping[str, Any]) -> None:
        """Write checkpoint-STEP, point `latest` to it, and remove old checkpoints.

        Errors  those of `settle`, for the previous save or for this one.
        """
        self.settle()
        tensors = state.tensors
        if self.stage is not None:
            tensors = self.stage(tensors)
        self.pending, self.step = Future(), step
        work = partial(fulfil, self.pending, partial(self._write, step, tensors, dict(guard)))
        if self.recipe.save_async:
            threading.Thread(target=work, name="save", daemon=True).start()
        else:
            work()
            self.settle()

    def settle(self) -> None:
        """Wait for the save under way, and handle its result.

        Errors  NotFinite if a tensor to save was not finite; BadStorage for the third failure in a
                row (the first two are only reported).
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except BadStorage as failure:
            self.failed.append(failure)
            if len(self.failed) == FAILURES:
                raise BadStorage(f"{failure}; {FAILURES} saves in a row have failed") from failure
            self.tell(f"{failure}; training goes on, the next save will try again")
        else:
            self.newest, self.failed = self.step, []

    def finish(self) -> None:
        """Wait for the last save. Errors: as `settle`, and BadStorage if it has failed."""
        self.settle()
        if self.failed:
            raise self.failed[-1]

    def _write(self, step: int, tensors: Tensors, guard: dict[str, Any]) -> None:
        if self.here.device.type == "cuda":  # a new thread would use the first GPU
            torch.cuda.set_device(self.here.device)
        began = time.monotonic()
        for pause in (*PAUSES, None):
            try:
                self._commit(step, tensors, guard)
            except BadStorage as failure:
                if pause is None or isinstance(failure, Hopeless):
                    raise
                time.sleep(pause)
            else:
                self.took = time.monotonic() - began
                return

    def _commit(self, step: int, tensors: Tensors, guard: dict[str, Any]) -> None:
        """Write, seal and rename; if a phase fails on one rank, no rank starts the next."""
        target, staged = self.run / f"checkpoint-{step}", self.run / f".tmp-checkpoint-{step}"
        try:
            together(self.here, lambda: self._begin(target, staged, tensors, step, guard))
            parts = together(self.here, lambda: self._part(target, staged, tensors))
            files = {name: entry for part in parts for name, entry in part.items()}
            together(self.here, lambda: self._seal(target, staged, step, files))
            self._prune(step)
        finally:
            if self.here.first:
                shutil.rmtree(staged, ignore_errors=True)

    def _begin(
        self, target: Path, staged: Path, tensors: Tensors, step: int, guard: dict[str, Any]
    ) -> None:
        """Refuse numbers that are not finite; the first rank writes the small common files."""
        for file, some in tensors.items():
            for name, value in some.items():
                if not bool(torch.isfinite(local(value)).all()):
                    raise NotFinite(
                        f"{file}.{name} holds numbers that are not finite, so {target} is not "
                        "saved: the same command continues from the last checkpoint"
                    )
        if not self.here.first:
            return
        with self._writing(target, tensors):
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            for name, data in self.tokenizer.items():
                (staged / name).parent.mkdir(exist_ok=True)
                (staged / name).write_bytes(data)
            shutil.copy(self.run / "recipe.toml", staged / "recipe.toml")
            facts = {"schema": SCHEMA, "step": step, "guard": guard}
            _write_json(staged / "trainer.json", facts)

    def _part(self, target: Path, staged: Path, tensors: Tensors) -> Files:
        """Write this rank's tensors; return size and hash of its files."""
        with self._writing(target, tensors):
            if self.here.group is not None:
                _write_shards(self.here, staged / "state", tensors)
                mine = list(staged.glob(f"state/shard-{self.here.rank + 1:05d}-*"))
            else:
                for file, some in tensors.items():
                    plain = {name: value.detach().contiguous() for name, value in some.items()}
                    with _memory():
                        save_file(plain, staged / f"{file}.safetensors")
                mine = list(staged.glob("*.safetensors"))
            if self.here.first:
                mine += [path for path in staged.rglob("*") if path.suffix != ".safetensors"]
            return {
                path.relative_to(staged).as_posix(): disk.sealed(path)
                for path in sorted(mine)
                if path.is_file()
            }

    def _seal(self, target: Path, staged: Path, step: int, files: Files) -> None:
        """Write the manifest that makes the folder a checkpoint, then rename the folder."""
        if not self.here.first:
            return
        with self._writing(target, {}):
            for name, entry in files.items():
                if wrong := disk.complaint(staged, name, entry, hashed=False):
                    raise OSError(errno.ESTALE, f"as the first rank sees it, {wrong}")
            manifest = {"schema": SCHEMA, "step": step, "ranks": self.here.size, **self.facts}
            manifest |= {"files": files}
            manifest |= {"sha256": checkpoint.digest(manifest)}
            _write_json(staged / "manifest.json", manifest)
            disk.sync(staged / "manifest.json")
            for folder in {(staged / name).parent for name in files} | {staged}:
                disk.sync(folder)
            if target.exists():  # a step is written again only if its old checkpoint was refused
                checkpoint.remove(target)
            staged.rename(target)
            disk.sync(self.run)
            _point(self.run / "latest", target.name)

    def _prune(self, step: int) -> None:
        """Remove old checkpoints; the newest `keep` good ones stay.

        Damaged ones do not count towards `keep`; all ranks divide the hashing. Each `keep_every`-th
        stays for ever, and the one to return to after a spike stays until there is a newer one.
        """
        every, good = self.recipe.keep_every, 0
        saved = self.recipe.save_every if self.recipe.health.spike == "rollback" else 0
        there = checkpoint.agreed(self.run, self.here)
        target = next((old for old in there if saved and old.step % saved == 0), None)
        others = [old for old in there if not every or old.step % every]
        if len(others) <= self.recipe.keep:
            return
        for old in others:
            if good >= self.recipe.keep:
                if self.here.first and old != target:
                    checkpoint.remove(old.folder)
                continue
            wrong = checkpoint.complaint(old, self.here) if old.step != step else None
            if wrong is None:
                good += 1
            elif self.here.first:
                self.tell(f"{old.folder} is damaged and not counted: {wrong}")
                checkpoint.reject(old)

    @contextmanager
    def _writing(self, target: Path, tensors: Tensors) -> Iterator[None]:
        """Turn disk errors into BadStorage, with the space needed and the space free."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            number, reason = _reason(error)
            kind = Hopeless if number in HOPELESS else BadStorage
            room = ""
            with contextlib.suppress(OSError):
                needed = sum(t.nbytes for some in tensors.values() for t in some.values()) / 2**20
                free = shutil.disk_usage(self.run).free / 2**20
                room = f"; it needs {needed:.1f} MiB, {free:.1f} MiB are free there"
            raise kind(f"cannot write {target}: {reason}{room}") from error


def _stager(device: torch.device) -> Callable[[Tensors], Tensors]:
    """Return a function that copies tensors into a buffer, which it reuses for the next copy."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    fast = device.type == "cuda"
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=fast,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=fast,
        )
    )
    return stager.stage  # type: ignore[return-value]  # a future only where staging is not blocking


def _write_shards(here: World, folder: Path, tensors: Tensors) -> None:
    """Write the rows that this rank holds.

    Errors  OSError on all ranks if one has it; MemoryError on the rank that is out of memory.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save

    flat = dict(sorted(checkpoint.flat(tensors).items()))  # equal states give equal files
    pieces = _pieces(flat, here.replicas)

    class Writer(HuggingFaceStorageWriter):
        def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:  # a future of torch's
            with _memory():
                return super().write_data(plan, planner)

    writer = Writer(str(folder), pieces, save_distributed=True)
    try:
        save(flat, storage_writer=writer, process_group=here.group)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(sorted(error.failures.items())))
        if isinstance(cause, MemoryError) and rank == here.rank:
            raise cause from error  # ends this rank; the others raise the OSError below
        number, reason = _reason(cause)
        raise OSError(number, f"rank {rank}: {reason}") from error


@contextmanager
def _memory() -> Iterator[None]:
    """Turn a panic of safetensors, which it raises when memory runs out, into MemoryError.

    A panic is not an Exception, and cannot be sent to another rank.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise MemoryError(f"safetensors: {error}") from None
        raise


def _pieces(flat: Mapping[str, Tensor], replicas: int) -> dict[str, int]:
    """Return which file (from 1) each tensor's rows go to; replicas divide the writing."""
    number, held, numbers = 1, 0.0, dict[str, int]()
    for name, value in flat.items():
        more = local(value).nbytes / replicas
        if held and held + more > PIECE:
            number, held = number + 1, 0.0
        numbers[name], held = number, held + more
    return numbers


def _tokenizer(model: TextToImage) -> dict[str, bytes]:
    """The files of the model's tokenizer, by name; read early, while no other thread uses it."""
    with tempfile.TemporaryDirectory() as folder:
        model.text.tokenizer.save_pretrained(Path(folder) / "tokenizer")
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*")
            if path.is_file()
        }


def _reason(error: BaseException) -> tuple[int, str]:
    """Return errno and text of an error; safetensors names its errno only in the message."""
    if isinstance(error, OSError) and error.errno:
        return error.errno, error.strerror or str(error)
    said = re.search(r"os error (\d+)", str(error))
    number = int(said[1]) if said else 0
    return number, os.strerror(number) if number else str(error)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _point(link: Path, name: str) -> None:
    """Replace a symbolic link atomically; nothing here reads it, so the disk may lack links."""
    fresh = link.with_name(f".{link.name}-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    try:
        fresh.symlink_to(name)
    except OSError as error:
        if error.errno not in LINKLESS:
            raise
    else:
        fresh.replace(link)
