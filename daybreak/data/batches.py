"""Which pictures make which batch.

The samples of a run have global indices 0, 1, 2, ...; each batch of a stage takes the next b of
them. The picture at an index depends only on the seed: for `scenes` the index is the number of the
scene; for a folder it is place `index mod n` in the shuffle of epoch `index div n`; for a prepared
dataset daybreak/data/plan.py decides. Worker count, restarts, the number of processes and the
micro-batch size cannot change it, and resuming costs nothing.

Caption choice, caption dropout, crop and mirroring are dice keyed by the same (seed, index). How
batches get to the training step: daybreak/data/loader.py.

Letters  b pictures of the batch, n pictures of the folder, c channels.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple, Protocol

from jaxtyping import Float
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from torch import Tensor

from daybreak.data import images, scenes, sources
from daybreak.data.plan import Rows, Slot, shuffle
from daybreak.data.prepared import Picture, Prepared, Sample, chosen, is_prepared, one_by_one
from daybreak.failure import BadData, BadRecipe
from daybreak.train import dice

CACHE_BYTES = 256 * 2**20  # decoded pictures that one worker keeps


def _named(source: object, validate: ValidatorFunctionWrapHandler) -> object:
    """Refuse anything but a name or a list of names with weights, with one message for both."""
    try:
        return validate(source)
    except ValidationError as error:
        raise ValueError(
            f"{source!r} names no source; write one as 'a', or several with their weights as "
            "[['a', 0.7], ['b', 0.3]]"
        ) from error


def _weighed(source: str | tuple[tuple[str, float], ...]) -> str | tuple[tuple[str, float], ...]:
    """Refuse an empty source, and weights that are not positive and finite."""
    if not source:
        raise ValueError("no source is named; name a prepared dataset or a folder of pictures")
    for folder, weight in () if isinstance(source, str) else source:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"{folder!r} has weight {weight}; it must be positive")
    return source


Source = Annotated[
    str | tuple[tuple[str, float], ...], WrapValidator(_named), AfterValidator(_weighed)
]


class Config(BaseModel):
    """Where the pictures come from.

    `source` is "scenes", a folder of pictures or a prepared dataset; or several prepared datasets
    with weights, [["a", 0.7], ["b", 0.3]], from which samples are drawn in this ratio.
    `caption_columns` gives weights to the columns of a folder's metadata; `empty_captions` is the
    share of samples trained with the empty prompt, `mirrored` the share mirrored left to right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Source
    caption_columns: tuple[tuple[str, float], ...] = ()
    empty_captions: float = Field(default=0.1, ge=0, le=1)
    mirrored: float = Field(default=0.0, ge=0, le=1)
    workers: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _tells_left_from_right(self) -> "Config":
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

    `complaints` names the pictures that could not be read, each only once in a stage; `substituted`
    counts the samples of this batch that replace such a picture.
    """

    image: Float[Tensor, "b c h w"]
    captions: list[str]
    first: int
    substituted: int = 0
    complaints: tuple[str, ...] = ()


Slots = Callable[[int], list[Slot]]  # from the number of a global batch to its slots


class Pictures(Protocol):
    """An endless sequence of captioned pictures."""

    @property
    def files(self) -> Mapping[str, str]:
        """The sha256 of each file they come from, if known."""

    def plan(self, resolution: int, batch: int, first: int) -> Slots:
        """Return the function that lists the slots of each batch of a stage.

        `first` is the global index of the stage's first sample.

        Errors  BadRecipe for a stage that these pictures do not allow.
        """

    def samples(self, slots: Sequence[Slot]) -> list[Sample | BadData]:
        """Return the picture (height, width, 3) and caption of each slot, or its failure."""

    def captions(self) -> Iterator[str]:
        """Yield the captions a tokenizer should learn from."""


class Scenes:
    """The endless procedural dataset."""

    files: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: scenes.Config, seed: int) -> None:
        self.config, self.seed = config, seed

    def plan(self, resolution: int, batch: int, first: int) -> Slots:
        """Scenes in order of their numbers, scaled from the canvas to the resolution."""
        return _in_order(lambda index: index, resolution, batch, first)

    def samples(self, slots: Sequence[Slot]) -> list[Sample | BadData]:
        """Draw the scenes of slots, all of them in one call for speed, and scale them."""
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
        yield from said(self.config, self.seed)


@lru_cache(maxsize=2)
def said(config: scenes.Config, seed: int) -> tuple[str, ...]:
    """Return the captions of the first 20,000 scenes; cached, for comparisons of recipes."""
    return tuple(
        scenes.caption(config, scenes.scene(config, seed, index), index) for index in range(20_000)
    )


class Folder:
    """A folder of captioned pictures, shuffled again every epoch, cropped to squares.

    Its files are identified by one sha256, of their names, sizes, captions and caption weights.
    """

    def __init__(
        self, folder: Path, seed: int, caption_columns: Sequence[tuple[str, float]] = ()
    ) -> None:
        self.pictures = sources.folder(folder, caption_columns)
        sources.check(self.pictures)
        facts = [
            (
                one.path.relative_to(folder).as_posix(),
                one.path.stat().st_size,
                one.captions,
                [weight / math.fsum(one.weights) for weight in one.weights],
            )
            for one in self.pictures
        ]
        self.files = {folder.name: hashlib.sha256(json.dumps(facts).encode()).hexdigest()}
        self.seed = seed
        self.kept: dict[tuple[int, int], Picture] = {}
        self.bytes = 0

    def plan(self, resolution: int, batch: int, first: int) -> Slots:
        """Epoch after epoch, each with its own shuffle of the folder."""
        count = len(self.pictures)

        def row(index: int) -> int:
            epoch, place = divmod(index, count)
            return int(order(self.seed, epoch, count)[place])

        return _in_order(row, resolution, batch, first)

    def samples(self, slots: Sequence[Slot]) -> list[Sample | BadData]:
        """Read the sample of each slot; a failure takes the place of its sample."""
        return one_by_one(self.sample, slots)

    def sample(self, slot: Slot) -> Sample:
        """Return the picture of a slot, with one of its captions chosen by dice."""
        captioned = self.pictures[slot.row]
        die = dice.fraction(self.seed, "caption", slot.sample)
        caption = chosen(captioned.captions, captioned.weights, die)
        return Sample(self._picture(slot.row, slot.height), caption)

    def _picture(self, number: int, resolution: int) -> Picture:
        """Decode a picture, or take it from this worker's cache."""
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
def order(seed: int, epoch: int, count: int) -> Rows:
    """Return the shuffle of an epoch, a permutation of 0 .. count - 1."""
    return shuffle(count, seed, "order", epoch)


def files(sources: Sequence[Pictures]) -> dict[str, str]:
    """The sha256 of the files that the pictures of all stages come from.

    If two stages have different files of the same name, as from two folders of the same name, the
    later one gets the number of its stage added to its name.
    """
    found: dict[str, str] = {}
    for number, source in enumerate(sources):
        for name, digest in source.files.items():
            taken = found.get(name, digest) != digest
            found[f"{name} of stage {number}" if taken else name] = digest
    return found


def _in_order(row: Callable[[int], int], resolution: int, batch: int, first: int) -> Slots:
    """Slots of squares in order of their indices; `row` gives the picture for an index."""

    def slots(number: int) -> list[Slot]:
        start = first + number * batch
        return [
            Slot(index, row(index), resolution, resolution) for index in range(start, start + batch)
        ]

    return slots


def pictures(config: Config, scene: scenes.Config | None, seed: int, patch: int) -> Pictures:
    """Open the source that a recipe names; the sides of every batch are multiples of `patch`.

    Errors  BadData and BadRecipe, with a message of one sentence.
    """
    if config.source == "scenes":
        return Scenes(scene or scenes.Config(), seed)
    raw = [folder for folder, _ in config.folders if not is_prepared(Path(folder))]
    if not raw:
        if config.caption_columns:
            raise BadRecipe(
                "data.caption_columns is for pictures that are not prepared, and a prepared "
                "dataset holds its captions and their weights: remove data.caption_columns"
            )
        return Prepared(config.folders, seed, patch)
    if len(config.folders) > 1:
        raise BadRecipe(
            f"data.source mixes several datasets, and {raw[0]} is not prepared: run "
            "`daybreak prepare` on it"
        )
    return Folder(Path(raw[0]), seed, config.caption_columns)
