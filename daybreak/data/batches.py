"""Which pictures make which batch, and how they get there.

Global sample indices 0, 1, 2, ... count the samples of a run; batch k of a stage holds the next b
of them. What stands at an index is a function of the seed: for `scenes` the index is the scene, for
a folder it is place `index mod n` in the shuffle of epoch `index div n`, for a prepared dataset
daybreak/data/plan.py decides. Worker count, restarts, the number of processes and the cut into
micro-batches cannot change it, and resuming costs nothing.

Caption choice, caption dropout, crop and mirroring are dice of the same (seed, index).

Letters  b pictures of the batch, c channels.
"""

import contextlib
import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from daybreak.data import images, scenes, sources
from daybreak.data.ahead import ahead
from daybreak.data.plan import Slot
from daybreak.data.prepared import Picture, Prepared, Sample, chosen, is_prepared, one_by_one
from daybreak.failure import BadData, BadRecipe, LostPeer
from daybreak.train import dice

CACHE_BYTES = 256 * 2**20  # decoded pictures that one worker keeps
SPARE, BUDGET = 10, 0.01  # samples that may fail to be read: so many, and this share of all
CHECK = 1.0  # seconds of silence after which the workers are looked after
MOMENT = 0.2  # seconds until a process that was killed is known to be dead
PATIENCE = 300.0  # seconds to wait for a batch before its worker is given up
HUSH = 0.05  # seconds after which threads of an exchange that is over rest
LAST = 19  # niceness of a worker beside a step on the same processor
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # what train/stop hears
READY = 2  # batches that lie received when a step asks for one
FORESIGHT, UNDERWAY = 4, 2 * 2**30  # a worker's batches ahead, and the bytes of all workers' ones


class Config(BaseModel):
    """Where the pictures come from.

    `source` is "scenes", a folder of pictures or a prepared dataset; or several prepared datasets
    with weights, [["a", 0.7], ["b", 0.3]], that share the samples in this ratio. `caption_columns`
    weighs the columns of a folder's metadata; `empty_captions` is the share of samples trained with
    the empty prompt, `mirrored` that of pictures turned left to right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str | tuple[tuple[str, float], ...]
    caption_columns: tuple[tuple[str, float], ...] = ()
    empty_captions: float = Field(default=0.1, ge=0, le=1)
    mirrored: float = Field(default=0.0, ge=0, le=1)
    workers: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _can_be_had(self) -> "Config":
        if not self.folders:
            raise ValueError("source is an empty list; name a prepared dataset")
        for folder, weight in self.folders:
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"source {folder!r} has weight {weight}; it must be positive")
        if self.source == "scenes" and self.mirrored:
            raise ValueError(
                "mirrored is not for scenes, whose captions tell left from right; set it to 0"
            )
        return self

    @property
    def folders(self) -> tuple[tuple[str, float], ...]:
        """The sources with their weights, also where there is only one."""
        return ((self.source, 1.0),) if isinstance(self.source, str) else self.source

    @property
    def paths(self) -> list[Path]:
        """The folders alone."""
        return [Path(folder) for folder, _ in self.folders]


class Batch(NamedTuple):
    """Pictures in [-1, 1], their captions, and the global index of the first.

    `complaints` names pictures that could not be read, each once; `substituted` counts the samples
    of this batch that stand in for one.
    """

    image: Float[Tensor, "b c h w"]
    captions: list[str]
    first: int
    substituted: int = 0
    complaints: tuple[str, ...] = ()


Slots = Callable[[int], list[Slot]]  # the global batch of a number


class Pictures(Protocol):
    """An endless sequence of captioned pictures."""

    @property
    def files(self) -> Mapping[str, str]:
        """The sha256 of the files they come from, where a manifest knows it."""

    def plan(self, resolution: int, batch: int, first: int) -> Slots:
        """Say what stands where in each batch of a stage whose first sample is `first`.

        Errors  BadRecipe for a stage that cannot be had.
        """

    def samples(self, slots: Sequence[Slot]) -> list[Sample | BadData]:
        """Return picture (height, width, 3) and caption of each slot, or what is wrong with it."""

    def captions(self) -> Iterator[str]:
        """Yield the captions a tokenizer should learn from."""


class Scenes:
    """The endless procedural dataset."""

    files: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: scenes.Config, seed: int) -> None:
        self.config, self.seed = config, seed

    def plan(self, resolution: int, batch: int, first: int) -> Slots:
        """One scene after the other, on its canvas or scaled down from it."""
        return _in_order(lambda index: index, resolution, batch, first)

    def samples(self, slots: Sequence[Slot]) -> list[Sample | BadData]:
        """Draw scenes: all at once, then all that have to be scaled, and so on, for speed."""
        drawn = [scenes.scene(self.config, self.seed, slot.row) for slot in slots]
        fitted = [
            images.fit(picture, slot.height, slot.width)
            for picture, slot in zip(scenes.renders(drawn), slots, strict=True)
        ]
        return [
            Sample(picture, scenes.caption(self.config, scene, slot.row))
            for picture, scene, slot in zip(fitted, drawn, slots, strict=True)
        ]

    def captions(self) -> Iterator[str]:
        """Yield the captions of the first 20,000 scenes."""
        for index in range(20_000):
            drawn = scenes.scene(self.config, self.seed, index)
            yield scenes.caption(self.config, drawn, index)


class Folder:
    """A folder of captioned pictures, shuffled anew every epoch, cut to squares.

    What is known of its files is one sha256: of their names and sizes, captions and their shares.
    """

    def __init__(
        self, folder: Path, seed: int, caption_columns: Sequence[tuple[str, float]] = ()
    ) -> None:
        self.pictures = sources.folder(folder, caption_columns)
        sources.check(self.pictures)
        said = [
            [
                *(one.path.relative_to(folder).as_posix(), one.path.stat().st_size, one.captions),
                [weight / math.fsum(one.weights) for weight in one.weights],
            ]
            for one in self.pictures
        ]
        self.files = {folder.name: hashlib.sha256(json.dumps(said).encode()).hexdigest()}
        self.seed = seed
        self.kept: dict[tuple[int, int], Picture] = {}
        self.bytes = 0

    def plan(self, resolution: int, batch: int, first: int) -> Slots:
        """Epoch after epoch, each a shuffle of the folder."""
        count = len(self.pictures)

        def row(index: int) -> int:
            epoch, place = divmod(index, count)
            return int(order(self.seed, epoch, count)[place])

        return _in_order(row, resolution, batch, first)

    def samples(self, slots: Sequence[Slot]) -> list[Sample | BadData]:
        """Read the pictures of slots, or say what is wrong with them."""
        return one_by_one(self.sample, slots)

    def sample(self, slot: Slot) -> Sample:
        """Return the picture of a slot, with one of its captions by dice."""
        captioned = self.pictures[slot.row]
        die = dice.fraction(self.seed, "caption", slot.sample)
        caption = chosen(captioned.captions, captioned.weights, die)
        return Sample(self._picture(slot.row, slot.height), caption)

    def _picture(self, number: int, resolution: int) -> Picture:
        """Decode a picture, or take it from those this worker has kept."""
        if (number, resolution) in self.kept:
            return self.kept[number, resolution]
        path = self.pictures[number].path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadData(f"cannot read {path}: {error.strerror}") from error
        picture = images.fit(images.decode(data, str(path)), resolution, resolution)
        if self.bytes + picture.nbytes <= CACHE_BYTES:
            self.kept[number, resolution] = picture
            self.bytes += picture.nbytes
        return picture

    def captions(self) -> Iterator[str]:
        """Yield every caption once."""
        for captioned in self.pictures:
            yield from captioned.captions


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Return the shuffle of an epoch, a permutation of 0 .. count - 1."""
    generator = np.random.Generator(np.random.Philox(dice.key(seed, "order", epoch)))
    return generator.permutation(count)


def _in_order(row: Callable[[int], int], resolution: int, batch: int, first: int) -> Slots:
    """Squares that follow one another, `row` saying which picture stands at an index."""

    def slots(number: int) -> list[Slot]:
        start = first + number * batch
        return [
            Slot(index, row(index), resolution, resolution) for index in range(start, start + batch)
        ]

    return slots


def pictures(config: Config, scene: scenes.Config | None, seed: int, patch: int) -> Pictures:
    """Open the source that a recipe names; `patch` divides the sides of every batch.

    Errors  BadData and BadRecipe, in one sentence.
    """
    if config.source == "scenes":
        return Scenes(scene or scenes.Config(), seed)
    raw = [folder for folder, _ in config.folders if not is_prepared(Path(folder))]
    if not raw:
        if config.caption_columns:
            raise BadRecipe(
                "data.caption_columns is for pictures that are not prepared; "
                "`daybreak prepare` has stored captions with their weights: remove it"
            )
        return Prepared(config.folders, seed, patch)
    if len(config.folders) > 1:
        raise BadRecipe(
            f"data.source mixes several datasets, and {raw[0]} is not prepared: run "
            "`daybreak prepare` on it"
        )
    return Folder(Path(raw[0]), seed, config.caption_columns)


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


# Pictures, captions, and complaints about those that could not be read. The pictures are bytes
# (b, h, w, c), or what `to_unit` makes of them.
Stacked = tuple[Tensor, list[str], list[str]] | BadData


def _stack(samples: list[Sample | BadData]) -> Stacked:
    """Make one batch of samples, or say the first thing that is wrong with them."""
    good = [sample for sample in samples if isinstance(sample, Sample)]
    if len(good) < len(samples):
        return next(sample for sample in samples if isinstance(sample, BadData))
    pixels, captions, complaints = zip(*good, strict=True)
    return torch.from_numpy(np.stack(pixels)), list(captions), list(filter(None, complaints))


def _arriving(loader: Iterable[Stacked]) -> Generator[Stacked]:
    """Yield what the workers send. Errors: LostPeer, when one of them has died or hangs.

    The loader looks after its workers whenever it has waited for CHECK seconds, and gives up; it
    can be asked again. It begins in this thread (data/ahead), so that no signal of a dying worker
    is raised in the middle of a step. Of a worker that is killed while it sends, only the broken
    connection is seen at first; asked again a moment later, the loader names it.

    Before Python 3.12 a forked worker can hang at its start if a thread of C++, as one of gloo's
    that lets go of a tensor, asks for the interpreter's lock at that moment. So workers are forked
    a while after the last exchange.
    """
    if dist.is_initialized():
        time.sleep(HUSH)
    with _deaf():
        arriving, asked = iter(loader), time.monotonic()
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
                f"a loader worker has died or hangs ({said.splitlines()[0]}): the same command "
                "continues from the last checkpoint"
            ) from error
        if broken:  # nobody has died, and a batch is lost
            raise LostPeer(
                f"a batch has not arrived from its loader ({broken}): the same command continues "
                "from the last checkpoint"
            ) from broken
        if stacked is None:
            return
        yield stacked
        asked = time.monotonic()


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Keep signals to stop away from workers that are started here, until they have stepped aside.

    One that is not forked takes seconds to come so far, and is in the terminal's group till then.
    """
    resource_tracker.ensure_running()  # before Python 3.13 its start ends by letting them through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _step_aside(niceness: int, _: int) -> None:
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


def _as_floats(arriving: Generator[Stacked]) -> Generator[Stacked]:
    """Turn pictures into floats in the thread that receives them."""
    for stacked in arriving:
        yield stacked if isinstance(stacked, BadData) else (to_unit(stacked[0]), *stacked[1:])


def foresight(workers: int, share: int, resolution: int) -> int | None:
    """How many batches each worker makes ahead: one at least, and few enough for the memory."""
    if not workers:
        return None
    return max(1, min(FORESIGHT, UNDERWAY // (workers * share * 3 * resolution**2)))


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
    here = torch.device(device).type == "cpu"
    loader = DataLoader(
        _Samples(source, config, seed),
        batch_sampler=(
            plan(number)[rank * share : (rank + 1) * share] for number in range(done, done + count)
        ),
        collate_fn=_stack,
        num_workers=config.workers,
        prefetch_factor=foresight(config.workers, share, resolution),
        timeout=CHECK if config.workers else 0,
        worker_init_fn=partial(_step_aside, LAST if here else 0),
        pin_memory=torch.device(device).type == "cuda",
    )
    arriving = _told(_arriving(loader), expect)
    arriving = _as_floats(arriving) if here else arriving
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
