"""Shards: the parts of all sources, each stored in its own file, by several processes.

    .staging/000012.arrow     the pictures of part 12
             000012.json      its report; written last, so that a shard without one does not count

A process that is killed leaves a file with a temporary name, which the next start removes. The
processes end with their parent, even if the parent is killed.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from daybreak.data import disk, ingest
from daybreak.data.ingest import Config, Shard
from daybreak.data.records import Part, Source
from daybreak.failure import BadStorage, LostPeer

TOLD_EVERY = 0.2  # seconds

_counts: list[Any] = []  # the counters that a process shares with its parent


class Progress(NamedTuple):
    """How far the work is, since this command began."""

    read: int
    rejected: int
    bytes: int
    of: int  # bytes still to read at the start; 0 if not known


def store_all(
    found: Sequence[Source],
    config: Config,
    staging: Path,
    processes: int,
    progress: Callable[[Progress], None],
) -> None:
    """Store every part that has no report yet; with `processes` 0, in this process.

    Errors  LostPeer if a process is killed; BadStorage if the disk cannot be written.
    """
    disk.sweep(staging)
    parts = [(source.name, part) for source in found for part in source.parts]
    pending = [n for n in range(len(parts)) if not report_path(staging, n).is_file()]
    of = sum(parts[number][1].bytes for number in pending)
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 3)

    def tell() -> None:
        read, rejected, done = counts[:]
        progress(Progress(read, rejected, done, of))

    schema = ingest.features().arrow_schema
    jobs = [(number, *parts[number], config, schema, staging) for number in pending]
    if not processes:
        _counts[:] = [counts]
        for job in jobs:
            _store(*job)
            tell()
    elif jobs:
        with _pool(min(processes, len(jobs)), context, counts) as pool:
            waiting: set[Future[None]] = {pool.submit(_store, *job) for job in jobs}
            while waiting:
                done, waiting = wait(waiting, TOLD_EVERY, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                tell()


def shard_path(staging: Path, number: int) -> Path:
    """The file with the pictures of a part."""
    return staging / f"{number:06d}.arrow"


def report_path(staging: Path, number: int) -> Path:
    """The report of a part: if the file exists, the part is finished."""
    return staging / f"{number:06d}.json"


def report(staging: Path, number: int) -> Shard:
    """The result of a finished part."""
    return Shard(**disk.read_json(report_path(staging, number)))


@contextlib.contextmanager
def _pool(processes: int, context: Any, counts: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that end at once if one of them fails."""
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(counts,))
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()
        if isinstance(error, BrokenProcessPool):
            raise LostPeer(
                "a worker process was killed, perhaps because memory ran out: repeat the command "
                "with fewer --processes; finished parts are kept"
            ) from error
        raise
    pool.shutdown()


def _begin(counts: Any) -> None:
    """Set up a process: no warnings, ignores Ctrl-C, and ends when its parent ends."""
    _counts[:] = [counts]
    warnings.simplefilter("ignore")  # Pillow warns of pictures that are refused later
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _store(
    number: int, source: str, part: Part, config: Config, schema: pa.Schema, staging: Path
) -> None:
    """Write one shard, and then its report."""
    (counts,) = _counts

    def tick(*more: int) -> None:
        with counts.get_lock():
            for place, count in enumerate(more):
                counts[place] += count

    try:
        with disk.fresh(shard_path(staging, number)) as staged:
            shard = ingest.store(part, source, config, schema, staged, tick)
            disk.sync(staged)
        disk.write_json(report_path(staging, number), shard._asdict())
    except OSError as error:  # not from a source: those that cannot be read are faults
        raise BadStorage(
            f"cannot write {staging} ({error.strerror or error}): fix that and repeat the "
            "command; finished parts are kept"
        ) from error
