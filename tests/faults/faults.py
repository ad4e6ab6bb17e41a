"""Faults: what befalls a process of a run. Each is called before the run begins, in that process.

Some work from outside: Python reports each file that is opened, renamed or removed to an audit
hook, and the hook can kill. Others stand before a function of daybreak and let it pass, late or
spoilt or not at all.
"""

import errno
import importlib
import json
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Fault = Callable[[], object]


CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree"}


class Touch:
    """Calls `act` when the files of a checkpoint are touched for the `count`-th time.

    Opening a file to write it counts, and so does making, renaming and removing one. Only what
    happens while a checkpoint of a step from `since` on is being written counts, and the removal
    of old ones after it.
    """

    def __init__(self, since: int, count: int, act: Callable[[str, str], None]) -> None:
        self.since, self.count, self.act, self.seen = since, count, act, 0
        self.begun = False

    def __call__(self) -> None:
        """Begin to listen."""
        sys.addaudithook(self._hear)

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            flags = given[2] if isinstance(given[2], int) else 0
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in CHANGES:
            return
        name = str(given[0])
        if f".tmp-checkpoint-{self.since}" in name:
            self.begun = True
        if not self.begun or not ("checkpoint" in name or "latest" in name):
            return
        self.seen += 1
        if self.count and self.seen < self.count:
            return
        self.act(event, name)


def die(*_: str) -> None:
    """Be killed, here and now."""
    os.kill(os.getpid(), signal.SIGKILL)


class Note:
    """Appends what it hears to a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, event: str, name: str) -> None:
        output = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(output, f"{event} {name}\n".encode())
        os.close(output)


class Least:
    """Counts the good checkpoints of a run, and appends the number to a file."""

    def __init__(self, run: Path, file: Path) -> None:
        self.run, self.file, self.busy = run, file, False

    def __call__(self, event: str, name: str) -> None:
        from daybreak.train import checkpoint

        if self.busy:
            return
        self.busy = True  # counting must not count
        good = sum(checkpoint.verify(one.folder) is None for one in checkpoint.found(self.run))
        output = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(output, f"{good}\n".encode())
        os.close(output)
        self.busy = False


def leave(*_: str) -> None:
    """Leave without a word, with code 17."""
    os._exit(17)


class Refuse:
    """Fails with an error of the disk, so many times; 0 is for ever.

    Not where a folder's removal is announced: there the disk is not asked yet.
    """

    def __init__(self, times: int, number: int = errno.EIO) -> None:
        self.left, self.number = times or 10**9, number

    def __call__(self, event: str, name: str) -> None:
        if self.left and event != "shutil.rmtree":
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number), name)


class At:
    """Lets something happen when the average is about to be moved after a step."""

    def __init__(self, step: int, act: Fault) -> None:
        self.step, self.act = step, act

    def __call__(self) -> None:
        """Stand in the way."""
        owner: Any = importlib.import_module("daybreak.optim.ema").Ema
        update = owner.update

        def watched(average: Any, model: Any, step: int) -> None:
            if step == self.step:
                self.act()
            update(average, model, step)

        owner.update = watched


class Calling:
    """Lets something happen when a function is called, by the name it is found under."""

    def __init__(self, module: str, name: str, act: Fault) -> None:
        self.module, self.name, self.act = module, name, act

    def __call__(self) -> None:
        """Stand in the way."""
        owner: Any = importlib.import_module(self.module)
        *path, name = self.name.split(".")
        for part in path:
            owner = getattr(owner, part)
        real = getattr(owner, name)

        def watched(*given: Any, **named: Any) -> Any:
            self.act()
            return real(*given, **named)

        setattr(owner, name, watched)


class Seen:
    """Notes what each step learns from: the global index of its first sample, and the captions."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self) -> None:
        """Stand in the way."""
        owner: Any = importlib.import_module("daybreak.objective.objective").Objective
        real = owner.__call__

        def watched(
            me: Any, model: Any, average: Any, image: Any, captions: Any, dice: Any, *rest: Any
        ) -> Any:
            line = json.dumps([dice.first, list(captions), float(image.sum()).hex()])
            with self.file.open("a") as file:
                file.write(line + "\n")
            return real(me, model, average, image, captions, dice, *rest)

        owner.__call__ = watched


class Limit:
    """Limits what the process may use: resource.RLIMIT_*."""

    def __init__(self, kind: int, amount: int) -> None:
        self.kind, self.amount = kind, amount

    def __call__(self, *_: str) -> None:
        """Take it away from here on."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(self.kind, (self.amount, self.amount))


def flip(path: Path, dice: random.Random) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


class Spoil:
    """Spoils the `call`-th loss that a rank computes, and those after it up to `count`.

    `how` is "input", "loss", "gradient" (one number of it, the rest stays right) or "spike" (a
    thousand times the loss).
    """

    def __init__(self, how: str, call: int, count: int = 1) -> None:
        self.how, self.calls, self.number = how, range(call, call + count), 0

    def __call__(self) -> None:
        """Stand in the way."""
        owner: Any = importlib.import_module("daybreak.objective.objective").Objective
        real = owner.__call__

        def spoilt(me: Any, model: Any, average: Any, image: Any, *rest: Any) -> Any:
            self.number += 1
            if self.number not in self.calls:
                return real(me, model, average, image, *rest)
            if self.how == "input":
                image = image.clone()
                image[0, 0, 0, 0] = float("nan")
            loss, parts = real(me, model, average, image, *rest)
            if self.how == "loss":
                loss = loss * float("inf")
            if self.how == "spike":
                loss = loss * 1000
            if self.how == "gradient":
                loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss, parts

        owner.__call__ = spoilt


class Flip:
    """Flips the highest bit of an exponent in what this rank holds, when a step's average moves.

    `part` is "model", "average" or "momentum"; `nan` puts no number there instead.
    """

    def __init__(self, step: int, part: str, nan: bool = False) -> None:
        self.step, self.part, self.nan = step, part, nan

    def __call__(self) -> None:
        """Stand in the way."""
        import torch
        from torch.distributed.tensor import DTensor

        ema: Any = importlib.import_module("daybreak.optim.ema").Ema
        muon: Any = importlib.import_module("daybreak.optim.muon").Muon
        update, take, spoilt = ema.update, muon.step, self
        owners: list[Any] = []

        def watched(average: Any, model: Any, step: int) -> None:
            update(average, model, step)
            if step != spoilt.step:
                return
            if spoilt.part == "momentum":
                tensor = next(iter(owners[0].state.values()))["momentum_buffer"]
            else:
                owner = model if spoilt.part == "model" else average.model
                tensor = next(iter(owner.dit.parameters())).data
            mine = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if spoilt.nan:
                mine.view(-1)[0] = float("nan")
            else:
                mine.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 29)

        def noted(optimizer: Any, *rest: Any) -> Any:
            owners[:] = [optimizer]
            return take(optimizer, *rest)

        ema.update = watched
        muon.step = noted


class Sleep:
    """Sleeps, so many seconds, the `count`-th time it is asked; 0 is for ever."""

    def __init__(self, count: int, seconds: float) -> None:
        self.left, self.seconds = count, seconds

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            time.sleep(self.seconds or 10**6)


class Late:
    """Takes some seconds each time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self) -> None:
        time.sleep(self.seconds)


def spin() -> None:
    """Do nothing, for ever, and busily."""
    while True:
        sum(range(1000))


def out_of_memory() -> None:
    """Fail as a device does that is full."""
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Clock:
    """Sets the wall clock back or forward, `at` seconds after the start."""

    def __init__(self, at: float, by: float) -> None:
        self.at, self.by = at, by

    def __call__(self) -> None:
        """Stand in the way."""
        real, began = time.time, time.monotonic()
        time.time = lambda: real() + (self.by if time.monotonic() - began > self.at else 0.0)


class Older:
    """Has a clock by which the run has taken so many seconds more, once it has taken a step."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self) -> None:
        """Stand in the way."""
        owner: Any = importlib.import_module("daybreak.train.ledger").Ledger
        real = owner.spent.fget
        owner.spent = property(lambda ledger: real(ledger) + self.seconds * (ledger.flops > 0))


class Alone:
    """Notes every attempt to reach another machine."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self) -> None:
        """Begin to listen."""
        sys.addaudithook(self._hear)

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(given[1], tuple):
            host = str(given[1][0])
        elif event == "socket.getaddrinfo":
            host = str(given[0])
        else:
            return
        if host not in {"127.0.0.1", "localhost", "::1", socket.gethostname()}:
            with self.file.open("a") as file:
                file.write(f"{event} {host}\n")
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))


def terminate() -> None:
    """Ask this process to stop, as a scheduler does."""
    os.kill(os.getpid(), signal.SIGTERM)


class Both:
    """One after the other: what the second does lies around what the first has done."""

    def __init__(self, first: Fault, second: Fault) -> None:
        self.faults = first, second

    def __call__(self) -> None:
        """Stand in the way."""
        for fault in self.faults:
            fault()


class Once:
    """Leaves or fails at the `count`-th call."""

    def __init__(self, count: int, act: Callable[[int], Any]) -> None:
        self.left, self.act = count, act

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            error = self.act(17)
            raise error


class Pipe:
    """Puts a pipe that nobody writes to in the place of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> None:
        self.path.unlink()
        os.mkfifo(self.path)


def fill() -> None:
    """Fill the disk that the output of this process goes to, but for a few pages."""
    ballast = Path("/proc/self/fd/1").readlink().parent / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() - 20 * 4096)


def hang_up() -> None:
    """Close the other end of what this process writes to."""
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(write)
    os.close(read)


def homeless() -> None:
    """Belong to nobody who has a home folder."""
    os.environ.pop("HOME", None)
