"""How batches get to the training step.

    workers       read the pictures and captions of a plan's slots, and stack them into batches
    a thread      receives batches (data/ahead); turns them into floats, or pins them for CUDA
    the caller    asks for the next batch; on a device other than a CPU, turns it into floats there

data/batches decides which pictures a batch holds; nothing here can change that. Workers must not
slow down the step, and ignore signals meant for the main process. Samples that cannot be read are
counted, and a worker that dies is reported.

Letters  b pictures of the batch, c channels, h height, w width.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from multiprocessing.synchronize import Semaphore
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from daybreak import host
from daybreak.data.ahead import ahead
from daybreak.data.batches import Batch, Config, Pictures
from daybreak.data.plan import Slot
from daybreak.data.prepared import Sample
from daybreak.failure import BadData, LostPeer
from daybreak.train import dice
from daybreak.train.stop import STOPS, deaf

SPARE, BUDGET = 10, 0.01  # samples that may fail to be read: this number, plus this share of all
CHECK = 1.0  # seconds without a batch after which the workers are checked
MOMENT = 0.2  # seconds until a killed process is seen to be dead
PATIENCE = 300.0  # seconds to wait for a batch before giving up on its worker
HUSH = 0.05  # seconds after an exchange until its threads are idle
START, STARTS = 60.0, 3  # seconds a worker has to start, and how often that is tried
LAST = 19  # niceness of a worker beside a step on the same processor
READY = 2  # received batches that wait for the step
FORESIGHT, UNDERWAY = 4, 2 * 2**30  # batches each worker makes ahead, and bytes of all of these
# Workers are forked where that is safe. The default of Python 3.14 is a fork server, whose children
# import everything again: that costs seconds at each new resolution.
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")

# Pictures, captions, and complaints about pictures that could not be read. The pictures are bytes
# (b, h, w, c), or the floats that `to_unit` returns.
Stacked = tuple[Tensor, list[str], list[str]] | BadData
Ready = Callable[[Tensor], Tensor]


def stream(
    source: Pictures,
    config: Config,
    seed: int,
    resolution: int,
    batch: int,
    first: int,
    count: int,
    done: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    late: Callable[[float], object] = lambda _: None,
    expect: Callable[[list[str]], object] = lambda _: None,
) -> Generator[Batch]:
    """Yield this rank's slice of `count` global batches of a stage, after the first `done` of them.

    `batch` must be a multiple of `world`.

    `first` is the global index of the stage's first sample. During a wait for a batch, `late` is
    called repeatedly with the seconds waited so far. `expect` is called, in another thread, with
    the captions of each batch as it arrives.

    On a CPU the next batches are turned into floats in advance. For CUDA they are received in
    advance as pinned bytes, and become floats on the device in the caller's thread: this only
    queues the copy, on the stream of the step that needs it, and no batch waits in GPU memory.

    Errors  BadData, also from a worker, for a sample that has no readable substitute, or if too
            many samples could not be read; LostPeer for a dead worker.
    """
    share = batch // world
    plan = source.plan(resolution, batch, first)
    kind = torch.device(device).type
    here = kind == "cpu"

    def make(begun: Semaphore) -> DataLoader[Any]:
        return DataLoader(
            _Samples(source, config, seed),
            batch_sampler=(
                plan(number)[rank * share : (rank + 1) * share]
                for number in range(done, done + count)
            ),
            collate_fn=_stack,
            num_workers=config.workers,
            multiprocessing_context=PROCESSES if config.workers else None,
            prefetch_factor=foresight(config.workers, share, resolution),
            timeout=CHECK if config.workers else 0,
            worker_init_fn=partial(_step_aside, LAST if here else 0, begun),
        )

    arriving = _told(_arriving(partial(_begun, make, config.workers)), expect)
    ready: dict[str, Ready] = {"cpu": to_unit, "cuda": lambda pixels: pixels.pin_memory()}
    if kind in ready:
        arriving = _made_ready(arriving, ready[kind])
    failed, told = 0, dict[str, None]()
    for number, stacked in enumerate(ahead(arriving, READY, late), start=done):
        if isinstance(stacked, BadData):
            raise stacked
        pixels, captions, complaints = stacked
        failed += len(complaints)
        read = (number + 1 - done) * share
        if failed > SPARE + BUDGET * read:
            raise BadData(
                f"{failed} of {read} samples could not be read, more than {BUDGET:.0%}: "
                + " ".join([*dict.fromkeys((*told, *complaints))][:SPARE])
            )
        new = dict.fromkeys(complaint for complaint in complaints if complaint not in told)
        told |= new
        yield Batch(
            pixels if here else to_unit(pixels.to(device, non_blocking=True)),
            captions,
            first + number * batch + rank * share,
            len(complaints),
            tuple(new),
        )


def foresight(workers: int, share: int, resolution: int) -> int | None:
    """How many batches each worker makes ahead: at least one, else limited by memory."""
    if not workers:
        return None
    return max(1, min(FORESIGHT, UNDERWAY // (workers * share * 3 * resolution**2)))


class _Samples(Dataset[Sample | BadData]):
    """What a loader worker runs: it reads the samples for all slots of one batch slice at once.

    A failure is returned, not raised: raised in a worker, its message would end up in a traceback.
    """

    def __init__(self, source: Pictures, config: Config, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed

    def __getitems__(self, slots: list[Slot]) -> list[Sample | BadData]:
        pairs = zip(slots, self.source.samples(slots), strict=True)
        return [one if isinstance(one, BadData) else self._diced(slot, one) for slot, one in pairs]

    def _diced(self, slot: Slot, sample: Sample) -> Sample:
        """Drop the caption or mirror the picture, as the dice decide."""
        picture, caption, complaint = sample
        if dice.fraction(self.seed, "empty", slot.sample) < self.config.empty_captions:
            caption = ""
        if dice.fraction(self.seed, "mirrored", slot.sample) < self.config.mirrored:
            picture = picture[:, ::-1]
        return Sample(picture, caption, complaint)


def _stack(samples: list[Sample | BadData]) -> Stacked:
    """Stack samples into a batch, or return the first failure among them."""
    good = [sample for sample in samples if isinstance(sample, Sample)]
    if len(good) < len(samples):
        return next(sample for sample in samples if isinstance(sample, BadData))
    pixels, captions, complaints = zip(*good, strict=True)
    return torch.from_numpy(np.stack(pixels)), list(captions), list(filter(None, complaints))


def _begun(make: Callable[[Semaphore], Iterable[Stacked]], workers: int) -> Iterator[Stacked]:
    """Start the workers; if one of them hangs at its start, start all of them again.

    A forked worker has none of the parent's other threads. It hangs if it frees an object that
    waits for its threads, such as a gloo process group (train/parallel, `leave`): so garbage that
    the main process has not collected yet is never collected in the worker. Before Python 3.12 it
    can also hang if a C++ thread (of gloo or Arrow) asks for the interpreter lock during the fork:
    so workers are forked a moment after the last exchange, and report when they have started.

    Errors  LostPeer if they hang STARTS times.
    """
    if host.processes() > 1:
        time.sleep(HUSH)
    for _ in range(STARTS):
        before, begun = multiprocessing.active_children(), PROCESSES.Semaphore(0)
        with deaf(), _unswept():  # until `_step_aside` has run: without fork, that takes seconds
            arriving = iter(make(begun))
        if all(begun.acquire(timeout=START) for _ in range(workers)):
            return arriving
        for worker in set(multiprocessing.active_children()) - set(before):
            worker.kill()  # it still ignores milder signals
        del arriving
    raise LostPeer(
        f"a loader worker did not start within {START:.0f} s, {STARTS} times in a row: the same "
        "command continues from the last checkpoint; data.workers = 0 loads without workers"
    )


def _arriving(begin: Callable[[], Iterator[Stacked]]) -> Generator[Stacked]:
    """Yield what the workers send. Errors: LostPeer, when one of them has died or hangs.

    After CHECK seconds without a batch, torch's loader checks its workers and raises a timeout; it
    can then be asked again. It is started in this thread (data/ahead), so that the signal of a
    dying worker never raises in the middle of a step. If a worker is killed while it sends, only a
    broken connection is seen at first; asked again a moment later, the loader names the worker.
    """
    arriving, asked = begin(), time.monotonic()
    broken: Exception | None = None
    while True:
        try:
            stacked = next(arriving, None)
        except (ConnectionError, EOFError) as error:
            if broken:
                raise
            broken = error
            time.sleep(MOMENT)
            continue
        except RuntimeError as error:
            said = str(error)
            if "DataLoader" not in said:
                raise
            if "timed out" in said and time.monotonic() - asked < PATIENCE:
                continue
            raise LostPeer(
                f"a loader worker died or hangs ({said.splitlines()[0]}): the same command "
                "continues from the last checkpoint"
            ) from error
        if broken:  # no worker has died, but a batch is lost
            raise LostPeer(
                f"a batch was lost on its way from a loader worker ({broken}): the same command "
                "continues from the last checkpoint"
            ) from broken
        if stacked is None:
            return
        yield stacked
        asked = time.monotonic()


@contextlib.contextmanager
def _unswept() -> Iterator[None]:
    """Within this context, forked processes never garbage-collect the objects they inherit."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _step_aside(niceness: int, begun: Semaphore, _: int) -> None:
    """Keep a worker from slowing down the step, and away from signals for the main process.

    If the step runs on the CPU, a core taken by a worker makes all other cores wait for it: so the
    worker gets only the time that nothing else needs (docs/performance.md).

    In a process group of its own, it does not receive a Ctrl-C or a kill of the main process's
    group, after which the main process still has to save; it ends when its loader does.
    """
    os.setpgrp()
    os.nice(niceness)
    for number in STOPS:  # discards signals that came meanwhile: they were not meant for it
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    begun.release()


def to_unit(pixels: Tensor) -> Float[Tensor, "b c h w"]:
    """Turn uint8 pictures (b, h, w, c) into floats in [-1, 1], channels first.

    The axes are permuted while pixels are still bytes: four times faster than afterwards. On a CPU
    NumPy is used, because it needs no OpenMP: OpenMP would give the receiving thread a thread team
    of its own, and with more threads than cores the step would sleep at every barrier.
    """
    if pixels.device.type == "cpu":
        turned = np.ascontiguousarray(pixels.numpy().transpose(0, 3, 1, 2)).astype(np.float32)
        turned /= 127.5
        turned -= 1
        return torch.from_numpy(turned)
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def _told(
    arriving: Generator[Stacked], expect: Callable[[list[str]], object]
) -> Generator[Stacked]:
    """Pass batches on, and tell `expect` their captions, in the thread that receives them."""
    for stacked in arriving:
        if not isinstance(stacked, BadData):
            expect(stacked[1])
        yield stacked


def _made_ready(arriving: Generator[Stacked], ready: Ready) -> Generator[Stacked]:
    """Turn pictures into floats, or pin their bytes for a GPU, in the thread that receives them.

    torch's loader would pin them in a thread of its own, which sets the number of threads to 1 for
    all threads that start later. The backward pass's thread is one of those: a compiled block that
    is recomputed there sees another setting, is compiled again, differently, and the step fails.
    """
    for stacked in arriving:
        yield stacked if isinstance(stacked, BadData) else (ready(stacked[0]), *stacked[1:])
