"""How ranks find one another, notice that one is gone, and say why they leave.

    store = meet(rank, size, seconds)       at MASTER_ADDR:MASTER_PORT; an error names the missing
    leave_note(store, rank, error)          the first note is the cause, and all ranks report it
    miss(store, neighbours)                 writes the note for a rank that was killed
    farewell(store, rank, size)             waits, so that no rank loses the store too early

Notes are kept in a key-value store, apart from the collectives: while a rank waits in a collective
for ever, another of its threads can still read and write them.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # public, though not declared so
    PrefixStore,
    Store,
    TCPStore,
)

from daybreak.failure import LostPeer, told
from daybreak.host import is_there

GOODBYE = timedelta(seconds=20)
ROLL_CALL = 3.0  # seconds in which ranks that are still there must answer
Found = TypeVar("Found")


class Note(NamedTuple):
    """The note of a rank that failed: which one it is, and why."""

    rank: int
    why: str


def meet(rank: int, size: int, seconds: float) -> Store:
    """Find the other ranks at MASTER_ADDR:MASTER_PORT; torchrun may have opened that port.

    Errors  LostPeer, after `seconds` at most, naming the ranks that have not arrived.
    """
    host, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "0"))
    until = time.monotonic() + seconds
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):  # one machine: loopback is enough
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    names = [f"rank {number}" for number in range(size)]
    store: Store | None = None
    try:
        if not opens:
            _knock(host, port, until)
        base = _connected(host, port, size, opens, until)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"daybreak/{attempt}", base)
        store.set(names[rank], str(os.getpid()))
        store.wait(names, timedelta(seconds=max(0.1, until - time.monotonic())))
    except (OSError, dist.DistError) as error:
        missing = _missing(store, names) if store else []
        raise LostPeer(
            f"{', '.join(missing)} of {size} did not connect within {seconds:.0f} s: see why in "
            "their logs, and start all processes again"
            if missing
            else f"{names[rank]} cannot connect to the others at {host}:{port} "
            f"({told(error)}): check MASTER_ADDR and MASTER_PORT"
        ) from error
    return store


def _knock(host: str, port: int, until: float) -> None:
    """Wait until a process listens on that port. Errors: OSError when it is too late."""
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _connected(host: str, port: int, size: int, opens: bool, until: float) -> Store:
    """Open the store there, or connect to it. Errors: OSError or DistError.

    In a thread, because torch waits for ever if what listens there is not a store.
    """
    found: Future[Store] = Future()
    left = max(0.1, until - time.monotonic())
    wait = timedelta(seconds=left)

    def connect() -> Store:
        return TCPStore(host, port, size, opens, wait, wait_for_workers=False)

    threading.Thread(target=fulfil, args=(found, connect), name="meet", daemon=True).start()
    try:
        return found.result(left)
    except TimeoutError as error:
        raise TimeoutError("something listens there, but does not answer") from error


def _missing(store: Store, names: Sequence[str]) -> list[str]:
    with suppress(dist.DistError):
        return [name for name in names if not store.check([name])]
    return []


def farewell(store: Store, rank: int, size: int) -> None:
    """Wait until all ranks are done, so that none closes a connection another still uses."""
    with suppress(dist.DistError):
        store.set(f"rank {rank} is done", "")
        store.wait([f"rank {number} is done" for number in range(size)], GOODBYE)


def is_broken(error: Exception) -> bool:
    """Whether this rank's device failed (ECC, Xid, NVLink), not code, lack of memory or its age."""
    others = ("device-side assert triggered", "out of memory", "no kernel image")
    return isinstance(error, torch.AcceleratorError) and not any(
        other in str(error) for other in others
    )


def broken(device: torch.device, rank: int, error: Exception) -> LostPeer:
    """The error about this rank's device, which it also leaves as its note."""
    return LostPeer(
        f"{device} on {socket.gethostname()} failed ({told(error)}): the same "
        "command continues from the last checkpoint; if it fails again, leave that device out",
        rank,
    )


def is_loss(error: Exception) -> bool:
    """Whether another rank is to blame. gloo has no error class; its messages name its files."""
    signs = ("gloo/transport", "caused pair closure", "NCCL")
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and any(sign in str(error) for sign in signs)
    )


def leave_note(store: Store, rank: int, error: Exception) -> None:
    """Tell the others why this rank ends; the first note is the cause."""
    with suppress(dist.DistError):
        store.compare_set("note", "", f"rank {rank}: {error}"[:500])


def answer(store: Store, rank: int) -> None:
    """If asked, answer that this rank is there; call it in a thread that runs no collectives."""
    with suppress(dist.DistError):
        if store.check(["who is there?"]):
            store.set(f"rank {rank} is there", "")


def neighbours(store: Store, rank: int, size: int) -> dict[int, int]:
    """Return the process ids of the other ranks that the same torchrun has started, by rank.

    A rank in a container of its own cannot be seen from here, so it is left out.
    """
    first = rank - int(os.environ.get("LOCAL_RANK", "0"))
    beyond = min(size, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    found = {n: int(store.get(f"rank {n}")) for n in range(first, beyond) if n != rank}
    return {n: process for n, process in found.items() if is_there(process)}


def miss(store: Store, neighbours: Mapping[int, int]) -> None:
    """Leave a note for a neighbour that was killed: it could not, and with NCCL all would wait."""
    for rank, process in neighbours.items():
        with suppress(dist.DistError):
            if not is_there(process) and not store.check([f"rank {rank} is done"]):
                leave_note(store, rank, LostPeer("its process ended without a message"))


def note(store: Store) -> Note | None:
    """Return the note of the first rank that failed; None without one, or without the store."""
    with suppress(dist.DistError):
        if store.check(["note"]):
            rank, _, why = store.get("note").decode().removeprefix("rank ").partition(": ")
            return Note(int(rank), why)
    return None


def lost(rank: int, note: Note | None, otherwise: str = "", blamed: int | None = None) -> LostPeer:
    """The error of a rank that cannot go on alone: it quotes the note, or else `otherwise`."""
    again = "the same command continues from the last checkpoint"
    why, first = (f"rank {note.rank}: {note.why}", note.rank) if note else (otherwise, blamed)
    return LostPeer(f"rank {rank} lost the others ({why}): {again}", first)


def absent(store: Store, rank: int, size: int) -> list[int]:
    """Ask all ranks whether they are there, and return those that do not answer."""
    with suppress(dist.DistError):
        store.set("who is there?", "")
    return silent(store, rank, size, "is there", ROLL_CALL)


def silent(store: Store, rank: int, size: int, says: str, seconds: float) -> list[int]:
    """Post `says` for this rank; return the ranks that do not post it within `seconds`.

    The list is empty if the store is gone: rank 0 keeps it, and leaves after reading all notes.
    """
    until = time.monotonic() + seconds
    with suppress(dist.DistError):
        store.set(f"rank {rank} {says}", "")
        while quiet := [n for n in range(size) if not store.check([f"rank {n} {says}"])]:
            if time.monotonic() > until:
                return quiet
            time.sleep(0.1)
    return []


def fulfil(pending: Future[Found], work: Callable[[], Found]) -> None:
    """Do some work, and put its result or error (any BaseException) into `pending`."""
    try:
        found = work()
    except BaseException as error:  # noqa: BLE001 - raised again where the result is read
        pending.set_exception(error)
    else:
        pending.set_result(found)
