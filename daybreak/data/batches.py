"""Which pictures make which batch, and how they get there.

The plan is a sequence of global sample indices 0, 1, 2, ...; batch k of a stage is the next slice
of it. What stands at an index is a function of (seed, index) alone: for `scenes` the index is the
scene, for a folder it is place `index mod n` in the shuffle of epoch `index div n`. Worker count,
restarts and the cut into micro-batches cannot change it, and resuming costs nothing.

Caption choice and caption dropout are dice of the same (seed, index).

Letters  b pictures of the batch, c channels.
"""

import itertools
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from daybreak.data import images, scenes, sources
from daybreak.failure import BadData
from daybreak.train import dice

Picture = npt.NDArray[np.uint8]
CACHE_BYTES = 256 * 2**20  # decoded pictures that one worker keeps


class Config(BaseModel):
    """Where the pictures come from.

    `source` is "scenes" or a folder; `caption_columns` weighs the columns of its metadata;
    `empty_captions` is the share of samples trained with the empty prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    caption_columns: tuple[tuple[str, float], ...] = ()
    empty_captions: float = Field(default=0.1, ge=0, le=1)
    workers: int = Field(default=1, ge=0)


class Batch(NamedTuple):
    """Pictures in [-1, 1], their captions, and the global index of the first."""

    image: Float[Tensor, "b c h w"]
    captions: list[str]
    first: int


class Pictures(Protocol):
    """An endless sequence of captioned pictures."""

    def sample(self, index: int, resolution: int) -> tuple[Picture, str]:
        """Return picture (resolution, resolution, 3) and caption at a global index."""

    def captions(self) -> Iterator[str]:
        """Yield the captions a tokenizer should learn from."""


class Scenes:
    """The endless procedural dataset."""

    def __init__(self, config: scenes.Config, seed: int) -> None:
        self.config, self.seed = config, seed

    def sample(self, index: int, resolution: int) -> tuple[Picture, str]:  # noqa: ARG002
        """Draw scene number `index`; its canvas is the resolution."""
        drawn = scenes.sample(self.config, self.seed, index)
        return drawn.image, drawn.caption

    def captions(self) -> Iterator[str]:
        """Yield the captions of the first 20,000 scenes."""
        for index in range(20_000):
            yield scenes.caption(self.config, scenes.scene(self.config, self.seed, index))


class Folder:
    """A folder of captioned pictures, shuffled anew every epoch."""

    def __init__(self, config: Config, seed: int) -> None:
        self.pictures = sources.folder(Path(config.source), config.caption_columns)
        sources.check(self.pictures)
        self.seed = seed
        self.kept: dict[tuple[int, int], Picture] = {}
        self.bytes = 0

    def sample(self, index: int, resolution: int) -> tuple[Picture, str]:
        """Return the picture at this place of the epoch, with one of its captions by dice."""
        epoch, place = divmod(index, len(self.pictures))
        number = int(order(self.seed, epoch, len(self.pictures))[place])
        captioned = self.pictures[number]
        die = dice.fraction(self.seed, "caption", index) * sum(captioned.weights)
        bounds = itertools.accumulate(captioned.weights)
        choice = next((i for i, bound in enumerate(bounds) if die < bound), -1)
        return self._picture(number, resolution), captioned.captions[choice]

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


def pictures(config: Config, scene: scenes.Config | None, seed: int) -> Pictures:
    """Open the source that a recipe names. Errors: BadData, in one sentence."""
    return (
        Scenes(scene or scenes.Config(), seed)
        if config.source == "scenes"
        else Folder(config, seed)
    )


class _Samples(Dataset[tuple[Picture, str]]):
    """What a loader worker runs: global index to picture and caption."""

    def __init__(self, source: Pictures, config: Config, seed: int, resolution: int) -> None:
        self.source, self.config, self.seed, self.resolution = source, config, seed, resolution

    def __getitem__(self, index: int) -> tuple[Picture, str]:
        picture, caption = self.source.sample(index, self.resolution)
        if dice.fraction(self.seed, "empty", index) < self.config.empty_captions:
            caption = ""
        return picture, caption


def _stack(samples: list[tuple[Picture, str]]) -> tuple[Tensor, list[str]]:
    pixels, captions = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(pixels)), list(captions)


def _step_aside(_: int) -> None:
    """Keep a worker out of the way of the step, and of signals meant for the main process.

    In a process group of its own it does not hear a Ctrl-C or a kill of the whole group, after
    which the main process still wants to save; it ends when its loader does.
    """
    import os

    os.setpgrp()
    torch.set_num_threads(1)


def to_unit(pixels: Tensor) -> Float[Tensor, "b c h w"]:
    """Turn uint8 pictures (b, h, w, c) into floats in [-1, 1], channels first."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def stream(
    source: Pictures,
    config: Config,
    seed: int,
    resolution: int,
    batch: int,
    first: int,
    count: int,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Yield `count` batches, the first of which begins at global sample `first`.

    Errors: BadData from a worker is raised here as BadData.
    """
    plan = [
        list(range(start, start + batch)) for start in range(first, first + count * batch, batch)
    ]
    loader = DataLoader(
        _Samples(source, config, seed, resolution),
        batch_sampler=plan,
        collate_fn=_stack,
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        worker_init_fn=_step_aside,
        pin_memory=torch.device(device).type == "cuda",
    )
    for indices, (pixels, captions) in zip(plan, loader, strict=True):
        yield Batch(to_unit(pixels.to(device, non_blocking=True)), captions, indices[0])
