"""Fetch the next things before they are asked for.

A thread takes them from a generator and keeps a few ready, so that the receiver does not have to
wait while one is fetched.
"""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from queue import Empty, Queue
from typing import TypeVar

LOOK = 0.5  # seconds between calls of `late`
LEAVE = 5.0  # seconds to wait at the end for the thread to finish what it has begun
Thing = TypeVar("Thing")


class _End:
    """Marks the end of the queue, with the failure that ended it, if any."""

    def __init__(self, failure: BaseException | None = None) -> None:
        self.failure = failure


def ahead(
    things: Generator[Thing], ready: int, late: Callable[[float], object] = lambda _: None
) -> Generator[Thing]:
    """Yield things in order, with the next `ready` of them queued and one more held by the thread.

    The generator `things` runs entirely in that thread: what it has opened is closed there too,
    also when the receiver leaves early. While the receiver waits, its thread calls `late` with the
    seconds waited so far.

    Errors  whatever `things` raises, after everything that came before it.
    """
    fetched: Queue[Thing | _End] = Queue(ready)
    left = threading.Event()

    def fetch() -> None:
        end = _End()
        try:
            with closing(things):
                for thing in things:
                    fetched.put(thing)
                    if left.is_set():
                        return
        except BaseException as failure:  # noqa: BLE001 - raised again where it can be caught
            end = _End(failure)
        fetched.put(end)

    thread = threading.Thread(target=fetch, name="ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(thing := _next(fetched, late), _End):
            yield thing
        if thing.failure:
            raise thing.failure
    finally:
        left.set()
        while not fetched.empty():  # a full queue would hold the thread up
            fetched.get()
        thread.join(LEAVE)


def _next(fetched: Queue[Thing], late: Callable[[float], object]) -> Thing:
    """Wait for the next thing; tell `late` every LOOK seconds."""
    began = time.monotonic()
    while True:
        try:
            return fetched.get(timeout=LOOK)
        except Empty:
            late(time.monotonic() - began)
