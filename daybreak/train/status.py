"""The state of a run, and which process trains it.

    RUN/status.json     state, reason, code, step, checkpoint (the newest good one), rank (the one
                        that failed first); replaced as a whole
    RUN/lock            held by the process that trains in the folder; names that process

state is running, finished, stopped (code 75 or 130) or failed. A process that is killed cannot
record it: the status stays "running", and the lock is free. If several ranks fail, the reason of
the first is kept, because the others only fail for lack of it. torchrun returns 1 whatever a rank
returned; the code in the file is the true one.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from daybreak import host
from daybreak.data import disk
from daybreak.failure import BadRecipe, BadStorage, Failure, LostPeer

HELD = re.compile(r"process (?P<process>[1-9][0-9]*) on (?P<host>.+)")  # what a lock says
EVERY = 5.0  # seconds between two updates of the step


def alive(run: Path) -> bool | None:
    """Whether the process that holds the lock of a run is alive.

    None if it is on another machine, or if the lock names none, as on disks without locks.
    """
    try:
        held = HELD.fullmatch((run / "lock").read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return None
    if held is None or held["host"] != socket.gethostname():
        return None
    return host.is_there(int(held["process"]))


class Status:
    """The status file and the lock of a run, as a context manager.

        with Status(run, tell) as status:
            status.begin(first)
            status.at(step, checkpoint)
            status.end(code, reason)

    Nothing is written before `begin`. An exception that leaves the block is recorded by the rank
    that raised it first.
    """

    def __init__(self, run: Path, tell: Callable[[str], None]) -> None:
        self.file, self.lock, self.tell = run / "status.json", run / "lock", tell
        self.rank = int(os.environ.get("RANK", "0"))
        self.begun = False
        self.held: TextIO | None = None
        self.step, self.written = 0, 0.0
        self.checkpoint: int | None = None

    def __enter__(self) -> Self:
        """Wait for `begin`."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Record the error, if there is one, and release the lock."""
        if self.begun and error is not None:
            self.fail(error)
        if self.held is not None:
            with contextlib.suppress(OSError):
                self.held.truncate(0)
            self.held.close()

    def take(self) -> None:
        """Take the lock of the folder, unless this process has it already.

        Errors  BadRecipe if another living process holds it; the message names that process.
        """
        if self.held is not None:
            return
        try:
            held = self.lock.open("a+", encoding="utf-8")
        except OSError as error:
            raise BadStorage(f"cannot write {self.lock}: {error.strerror}") from error
        held.seek(0)
        before = held.read().strip()
        try:
            # The lock belongs to this process: a worker of the loader, forked from it, has none.
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held.close()
            if error.errno in {errno.EACCES, errno.EAGAIN}:
                raise BadRecipe(
                    f"{self.lock.parent} is in use by {before or 'another process'}: wait for it, "
                    "stop it, or choose another folder with --out"
                ) from None
            self.tell(
                f"{self.lock} cannot be locked here ({error.strerror}): start no second "
                "run in this folder"
            )
            return
        if before:
            self.tell(f"took over the lock of {before}, which ended without releasing it")
        held.truncate(0)
        held.write(f"process {os.getpid()} on {socket.gethostname()}")
        held.flush()
        self.held = held

    def begin(self, first: bool, step: int, checkpoint: int | None) -> None:
        """Record that the run is under way; the first rank takes the lock."""
        self.begun, self.step, self.checkpoint = True, step, checkpoint
        if first:
            self.take()
            self._write("running", "", None)

    def at(self, step: int, checkpoint: int | None) -> None:
        """Note which step is done; the rank with the lock records it every few seconds."""
        news = checkpoint != self.checkpoint or time.monotonic() - self.written > EVERY
        self.step, self.checkpoint = step, checkpoint
        if self.held is not None and news:
            self._write("running", "", None)

    def end(self, code: int, reason: str) -> None:
        """Record how the run has ended, if this rank holds the lock."""
        if self.held is not None:
            self._write("stopped" if code else "finished", reason, code)

    def fail(self, error: BaseException) -> None:
        """Record why the run has failed, unless another rank has done so."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads(self.file.read_text())["state"] != "running":
                return
        rank = error.rank if isinstance(error, LostPeer) else self.rank
        reason = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
        self._write("failed", reason, error.code if isinstance(error, Failure) else 1, rank)

    def _write(self, state: str, reason: str, code: int | None, rank: int | None = None) -> None:
        """Replace the file; a full disk is ignored."""
        self.written = time.monotonic()
        facts: dict[str, Any] = {"state": state, "reason": reason, "code": code}
        facts |= {"step": self.step, "checkpoint": self.checkpoint, "rank": rank}
        with contextlib.suppress(OSError):
            disk.write_json(self.file, facts)
