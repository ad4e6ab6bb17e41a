"""How a checkpoint comes to the disk: whole, or not at all.

Files are written and synced in a hidden folder beside the target, the manifest last; then the
folder is renamed, then `latest` moves, then old ones go. A kill at any moment leaves the previous
checkpoint as it was. Every rank writes and hashes its own part; what goes wrong on one of them
cancels the save on all.

In the background the same happens in a thread, with a copy of the tensors: training waits for the
copy, and for the save before, if that is not done yet.

What cannot be written is tried again; a save that fails all the same is told of, and training goes
on. The third in a row ends it.
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

PAUSES = (0.5, 2.0)  # seconds before what failed is tried again
FAILURES = 3  # saves in a row
PIECE = 2**28  # bytes of a file of a rank's rows: each is put together in memory, at one go
GOODBYE = 20.0  # seconds that a run which has failed gives to a save under way
HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
LINKLESS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}  # of a disk without symbolic links

Files = dict[str, dict[str, Any]]  # bytes and sha256 by name
Tensors = dict[str, dict[str, Tensor]]  # by file and name in it


class Hopeless(BadStorage):
    """What the next second will not mend: a full disk, a folder that may not be written."""


class Saver:
    """Writes the checkpoints of a run, on all its ranks alike.

        with Saver(recipe, folder, here, model, tell) as saver:
            saver.save(step, state, guard)
            saver.finish()

    `newest` is the step of the last one that is known to be on the disk.
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
        self.failed: list[BadStorage] = []  # saves in a row
        self.took = 0.0  # seconds that the last one was written for, in the background too

    def __enter__(self) -> Self:
        """Be ready."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let a save under way come to its end, if that is soon."""
        if self.pending is not None:
            with contextlib.suppress(BaseException):
                self.pending.result(GOODBYE)

    def save(self, step: int, state: State, guard: Mapping[str, Any]) -> None:
        """Write checkpoint-STEP, move `latest` to it, and let old ones go.

        Errors  those of `settle`, for the save before this one or for this one.
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
        """Wait for the save under way, and hear how it went.

        Errors  NotFinite if what was to be saved is spoilt; BadStorage for the third failure in a
                row, of which the first two are told.
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
        if self.here.device.type == "cuda":  # in a thread, else it is the first one
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
        """Stage, seal and rename; each phase on all ranks or, if one fails, on none."""
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
        """Look for what is not finite; write what one rank can write for all."""
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
        """Write this rank's tensors; return what it has written."""
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
        """Write the manifest that makes the folder a checkpoint, and give it its name."""
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
            if target.exists():  # a step is written anew only if what stands there was refused
                checkpoint.remove(target)
            staged.rename(target)
            disk.sync(self.run)
            _point(self.run / "latest", target.name)

    def _prune(self, step: int) -> None:
        """Let old checkpoints go: of those that are good the newest `keep` stay.

        A damaged one is no reason to remove a good one, and all ranks share the hashing. Milestones
        stay for ever, and the one that a spike would return to until there is another.
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
        """Turn what a disk can do into BadStorage, with what was needed and what is free."""
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
    """Return what copies tensors to memory of its own, which it uses again for the next copy."""
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

    Errors  OSError, on all ranks if on one; MemoryError on the rank that has none left.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save

    flat = dict(sorted(checkpoint.flat(tensors).items()))  # equal states are equal files
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
            raise cause from error  # its own end; the others hear of it
        number, reason = _reason(cause)
        raise OSError(number, f"rank {rank}: {reason}") from error


@contextmanager
def _memory() -> Iterator[None]:
    """Turn a panic of safetensors, which is how it meets the end of memory, into MemoryError.

    A panic is no Exception, and cannot be sent to another rank.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise MemoryError(f"safetensors: {error}") from None
        raise


def _pieces(flat: Mapping[str, Tensor], replicas: int) -> dict[str, int]:
    """Return the number of the file that each tensor's rows go to, from 1; replicas share them."""
    number, held, numbers = 1, 0.0, dict[str, int]()
    for name, value in flat.items():
        more = local(value).nbytes / replicas
        if held and held + more > PIECE:
            number, held = number + 1, 0.0
        numbers[name], held = number, held + more
    return numbers


def _tokenizer(model: TextToImage) -> dict[str, bytes]:
    """The files of the model's tokenizer, by name: nobody else uses it while they are written."""
    with tempfile.TemporaryDirectory() as folder:
        model.text.tokenizer.save_pretrained(Path(folder) / "tokenizer")
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*")
            if path.is_file()
        }


def _reason(error: BaseException) -> tuple[int, str]:
    """Return the system's number for an error, and its words; safetensors has it in its words."""
    if isinstance(error, OSError) and error.errno:
        return error.errno, error.strerror or str(error)
    said = re.search(r"os error (\d+)", str(error))
    number = int(said[1]) if said else 0
    return number, os.strerror(number) if number else str(error)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _point(link: Path, name: str) -> None:
    """Move a symbolic link in one step; no program reads it, so a disk may do without links."""
    fresh = link.with_name(f".{link.name}-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    try:
        fresh.symlink_to(name)
    except OSError as error:
        if error.errno not in LINKLESS:
            raise
    else:
        fresh.replace(link)
