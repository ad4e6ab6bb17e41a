"""How batches get to the step that learns from them.

    workers       make pictures and captions of the slots of a plan, and stack them
    a thread      receives what they send (data/ahead), makes floats of it or pins it for a GPU
    the caller    asks for the next batch, and makes floats of it on any other device

Which pictures they are is settled before (data/batches), and nothing here can change it. Workers
are kept out of the way of the step, and of signals that are meant for the main process. What cannot
be read is counted, and a worker that dies is named.

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

SPARE, BUDGET = 10, 0.01  # samples that may fail to be read: so many, and this share of all
CHECK = 1.0  # seconds of silence after which the workers are looked after
MOMENT = 0.2  # seconds until a process that was killed is known to be dead
PATIENCE = 300.0  # seconds to wait for a batch before its worker is given up
HUSH = 0.05  # seconds after which threads of an exchange that is over rest
START, STARTS = 60.0, 3  # seconds until a worker has begun, and how often it is tried
LAST = 19  # niceness of a worker beside a step on the same processor
READY = 2  # batches that lie received when a step asks for one
FORESIGHT, UNDERWAY = 4, 2 * 2**30  # a worker's batches ahead, and the bytes of all workers' ones
# Forked where that is safe. Python 3.14 would have a server do it, whose children import everything
# anew: seconds at each new resolution.
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")

# Pictures, captions, and complaints about those that could not be read. The pictures are bytes
# (b, h, w, c), or what `to_unit` makes of them.
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
    """Yield this rank's slice of `count` global batches of a stage, of which `done` were had.

    `world` divides `batch`.

    `first` is the global index of the stage's first sample; `late` hears now and then how many
    seconds a batch has been waited for, and `expect`, in a thread of its own, the captions of those
    that come next.

    On a CPU the next batches are floats before they are asked for. Elsewhere they are received
    ahead as pinned bytes, and become floats on the device in the caller's thread: that only queues
    the copy, on the stream of the step that needs it, and no batch waits in the device's memory.

    Errors  BadData, also from a worker, for a picture that cannot be read, or for too many of them;
            LostPeer for a dead worker.
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
    """How many batches each worker makes ahead: one at least, and few enough for the memory."""
    if not workers:
        return None
    return max(1, min(FORESIGHT, UNDERWAY // (workers * share * 3 * resolution**2)))


class _Samples(Dataset[Sample | BadData]):
    """What a loader worker runs: slots to pictures and captions, the slice of a batch at once.

    A failure travels as a value: raised in a worker, its sentence would arrive inside a traceback.
    """

    def __init__(self, source: Pictures, config: Config, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed

    def __getitems__(self, slots: list[Slot]) -> list[Sample | BadData]:
        pairs = zip(slots, self.source.samples(slots), strict=True)
        return [one if isinstance(one, BadData) else self._diced(slot, one) for slot, one in pairs]

    def _diced(self, slot: Slot, sample: Sample) -> Sample:
        """Leave the caption out, or turn the picture left to right, as the dice say."""
        picture, caption, complaint = sample
        if dice.fraction(self.seed, "empty", slot.sample) < self.config.empty_captions:
            caption = ""
        if dice.fraction(self.seed, "mirrored", slot.sample) < self.config.mirrored:
            picture = picture[:, ::-1]
        return Sample(picture, caption, complaint)


def _stack(samples: list[Sample | BadData]) -> Stacked:
    """Make one batch of samples, or say the first thing that is wrong with them."""
    good = [sample for sample in samples if isinstance(sample, Sample)]
    if len(good) < len(samples):
        return next(sample for sample in samples if isinstance(sample, BadData))
    pixels, captions, complaints = zip(*good, strict=True)
    return torch.from_numpy(np.stack(pixels)), list(captions), list(filter(None, complaints))


def _begun(make: Callable[[Semaphore], Iterable[Stacked]], workers: int) -> Iterator[Stacked]:
    """Start the workers; where one hangs at its start, all of them once more.

    A forked one has no other thread, and hangs if it lets go of what waits for its threads, as a
    group of gloo does (train/parallel, `leave`): so what the main process has not swept up yet is
    not swept up there. Before Python 3.12 it can hang, too, if a thread of C++, as one of gloo's or
    Arrow's, asks for the interpreter's lock at that moment: so it is forked a while after the last
    exchange, and says when it has begun.

    Errors  LostPeer if they hang again and again.
    """
    if host.processes() > 1:
        time.sleep(HUSH)
    for _ in range(STARTS):
        before, begun = multiprocessing.active_children(), PROCESSES.Semaphore(0)
        with deaf(), _unswept():  # until they have stepped aside: unforked, that takes seconds
            arriving = iter(make(begun))
        if all(begun.acquire(timeout=START) for _ in range(workers)):
            return arriving
        for worker in set(multiprocessing.active_children()) - set(before):
            worker.kill()  # it is still deaf to what is kinder
        del arriving
    raise LostPeer(
        f"a loader worker did not start within {START:.0f} s, {STARTS} times in a row: the same "
        "command continues from the last checkpoint; data.workers = 0 loads without workers"
    )


def _arriving(begin: Callable[[], Iterator[Stacked]]) -> Generator[Stacked]:
    """Yield what the workers send. Errors: LostPeer, when one of them has died or hangs.

    The loader looks after its workers whenever it has waited for CHECK seconds, and gives up; it
    can be asked again. It begins in this thread (data/ahead), so that no signal of a dying worker
    is raised in the middle of a step. Of a worker that is killed while it sends, only the broken
    connection is seen at first; asked again a moment later, the loader names it.
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
        if broken:  # nobody has died, and a batch is lost
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
    """Let a process that is forked here never sweep up what it inherits."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _step_aside(niceness: int, begun: Semaphore, _: int) -> None:
    """Keep a worker out of the way of the step, and of signals meant for the main process.

    Where the step itself needs the cores, one that a worker takes makes the others wait for it: so
    it is given what nobody else wants (docs/performance.md).

    In a process group of its own it does not hear a Ctrl-C or a kill of the whole group, after
    which the main process still wants to save; it ends when its loader does.
    """
    os.setpgrp()
    os.nice(niceness)
    for number in STOPS:  # what came meanwhile was not meant for it
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    begun.release()


def to_unit(pixels: Tensor) -> Float[Tensor, "b c h w"]:
    """Turn uint8 pictures (b, h, w, c) into floats in [-1, 1], channels first.

    They are turned round while a pixel is a byte: four times faster than afterwards. On a CPU it is
    NumPy that does it, for it needs no OpenMP: that would give the thread which receives batches a
    team of its own, and with more threads than cores every barrier of the step is slept at.
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
    """Say which captions come, in the thread that receives them."""
    for stacked in arriving:
        if not isinstance(stacked, BadData):
            expect(stacked[1])
        yield stacked


def _made_ready(arriving: Generator[Stacked], ready: Ready) -> Generator[Stacked]:
    """Make floats of pictures, or bytes that a GPU fetches, in the thread that receives them.

    torch's loader would pin them in one of its own, which tells all threads that begin later to
    compute alone. One of those is the backward pass's: to a block that is recomputed there the
    world has changed, it is compiled again, into another one, and the step fails.
    """
    for stacked in arriving:
        yield stacked if isinstance(stacked, BadData) else (ready(stacked[0]), *stacked[1:])
