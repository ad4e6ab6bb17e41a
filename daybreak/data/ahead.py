"""The next things are there before they are asked for.

A thread takes them from where they come and keeps a few ready, so that whoever needs them waits for
none of what it costs to receive one.
"""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from queue import Empty, Queue
from typing import TypeVar

LOOK = 0.5  # seconds after which `late` is told, again and again
LEAVE = 5.0  # seconds that who leaves early gives the thread to finish what it has begun
Thing = TypeVar("Thing")


class _End:
    """What stands behind the last thing: nothing, or the failure that came in its place."""

    def __init__(self, failure: BaseException | None = None) -> None:
        self.failure = failure


def ahead(
    things: Generator[Thing], ready: int, late: Callable[[float], object] = lambda _: None
) -> Generator[Thing]:
    """Pass things on in their order, while the next `ready` of them are fetched; one more is held.

    All of `things` runs in a thread, its end too: what it has opened is closed there, also when the
    receiver leaves early. `late` hears, from the receiver's thread, for how many seconds the next
    thing has been waited for.

    Errors  whatever `things` raises, after all that came before it.
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
    """Wait for a thing, and say so in between."""
    began = time.monotonic()
    while True:
        try:
            return fetched.get(timeout=LOOK)
        except Empty:
            late(time.monotonic() - began)
