"""Distances between an artist's pictures and true ones, in the features of one or more networks.

    distribution    the captions of a dataset, or of fresh scenes, each drawn in its picture's shape
    coco30k         a fixed list of captions against a folder of pictures, at 256 px: FID-30K

Values are named by network: `clip.cmmd`, `inception.frechet`. Features of the reference are cached
under a digest of pictures, size and network, so a later evaluation computes only the model's.

Everything that makes published numbers incomparable is fixed and recorded here: the number of
pictures, resizing (once, bicubic with antialiasing, bytes between all steps) and the captions. A
network that was used in training should not evaluate the model: its values get a remark.

Shapes  pictures (n, h, w, 3) uint8; features (n, f).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from daybreak.data import images
from daybreak.evaluate import clip_score, distances, features
from daybreak.evaluate.artist import Artist
from daybreak.evaluate.clip_score import Clip
from daybreak.evaluate.distances import Estimate
from daybreak.evaluate.examples import Examples
from daybreak.evaluate.features import Extractor, Features
from daybreak.evaluate.prompts import Prompts
from daybreak.evaluate.suite import DISTANCES, Progress, Result, mean
from daybreak.failure import BadData, BadRecipe, BadStorage

BATCH = 64
COCO_SIDE = 256  # pixels of FID-30K
SAFE = 10_000  # with fewer pictures, a Frechet distance gets a remark


def distribution(
    artist: Artist,
    examples: Examples,
    extractors: Sequence[Extractor],
    cache: Path,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Draw every caption once and compare with the pictures that the captions belong to.

    If the cache cannot be written, the result has a remark.

    Errors  BadData for too few pictures.
    """
    distances.check(examples.total, f"pictures of {examples.source} to compare with")
    places = [_place(cache, examples.digest, extractor) for extractor in extractors]
    known = [features.kept(place, examples.total) for place in places]
    drawn: list[list[Features]] = [[] for _ in extractors]
    true: list[list[Features]] = [[] for _ in extractors]
    done = 0
    for batch in examples.read():
        height, width = batch.pictures.shape[1:3]
        seeds = [seed + batch.first + number for number in range(len(batch.captions))]
        pictures = artist.draw(batch.captions, seeds, height, width)
        for extractor, reference, ours, theirs in zip(extractors, known, drawn, true, strict=True):
            ours.append(features.extract(extractor, pictures))
            if reference is None:
                theirs.append(features.extract(extractor, batch.pictures))
        done += len(seeds)
        if progress is not None:
            progress(done, examples.total)
    values: dict[str, Estimate] = {}
    remarks: list[str] = []
    for extractor, place, reference, ours, theirs in zip(
        extractors, places, known, drawn, true, strict=True
    ):
        if reference is None:
            reference = np.concatenate(theirs)
            try:
                features.keep(place, reference)
            except BadStorage as failure:
                remarks.append(str(failure))
        found, said = compare(artist, extractor, np.concatenate(ours), reference)
        values |= found
        remarks += said
    details = examples.facts | {
        "extractors": {extractor.name: extractor.digest for extractor in extractors},
        "resize": "bicubic with antialiasing, once, to the side of the network",
    }
    return Result(values, examples.total, details, remarks)


def coco30k(
    artist: Artist,
    prompts: Prompts,
    reference: Path,
    extractors: Sequence[Extractor],
    cache: Path,
    clip: Clip | None = None,
    side: int = COCO_SIDE,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Draw every caption once, scale the pictures to `side`, and compare with those of a folder.

    The result contains the sha256 of the list and, with a CLIP, the mean CLIPScore, which is
    usually plotted against the FID over guidance. True pictures smaller than `side`, of which COCO
    has some, are enlarged and counted.

    Errors  BadRecipe for a model that draws smaller pictures; BadData for too few captions or
            pictures, and as `features.reference`; all are raised before a picture is drawn.
    """
    if artist.side < side:
        raise BadRecipe(
            f"the model draws {artist.side} px and FID-30K is measured at {side} px: enlarged "
            "pictures would be judged for their blur"
        )
    files = sorted(path for path in reference.rglob("*") if path.suffix.lower() in images.SUFFIXES)
    if not files:
        raise BadData(f"{reference} holds no pictures to compare with")
    texts = prompts.texts
    distances.check(len(texts), "captions to draw")
    distances.check(len(files), f"pictures in {reference}", distances.FEWEST_TRUE)
    true = [features.reference(one, files, side, side, cache) for one in extractors]
    found: list[list[Features]] = [[] for _ in extractors]
    scores, cut = [], 0
    for first in range(0, len(texts), BATCH):
        some = texts[first : first + BATCH]
        seeds = list(range(seed + first, seed + first + len(some)))
        pictures = artist.draw(some, seeds, artist.side, artist.side)
        pictures = np.stack([features.fit(picture, side, side) for picture in pictures])
        for seen, extractor in zip(found, extractors, strict=True):
            seen.append(features.extract(extractor, pictures))
        if clip is not None:
            scored = clip_score.score(clip, pictures, some)
            scores.append(scored.values)
            cut += scored.cut
        if progress is not None:
            progress(first + len(some), len(texts))
    values: dict[str, Estimate] = {}
    remarks: list[str] = []
    if true and true[0].enlarged:
        remarks.append(
            f"{true[0].enlarged} of the {len(files)} true pictures are smaller than {side} px and "
            "were enlarged"
        )
    for seen, extractor, against in zip(found, extractors, true, strict=True):
        apart, said = compare(artist, extractor, np.concatenate(seen), against.features)
        values |= apart
        remarks += said
    if clip is not None:
        values["clip_score"] = mean(np.concatenate(scores))
    if cut:
        remarks.append(f"{cut} prompts are longer than CLIP reads")
    details = {
        "captions": prompts.digest,
        "reference": {one.name: of.digest for one, of in zip(extractors, true, strict=True)},
        "reference_pictures": len(files),
        "reference_enlarged": true[0].enlarged if true else 0,
        "extractors": {extractor.name: extractor.digest for extractor in extractors},
        "clip": None if clip is None else clip.pictures.digest,
        "side": side,
        "resize": f"bicubic with antialiasing to {side} px, bytes, then as the network demands",
    }
    return Result(values, len(texts), details, remarks)


def names(network: str) -> list[str]:
    """The names of the values that `compare` measures with this network."""
    return [f"{Path(network).name}.{name}" for name in DISTANCES]


def compare(
    artist: Artist, extractor: Extractor, drawn: Features, reference: Features
) -> tuple[dict[str, Estimate], list[str]]:
    """Return all distances of an artist's pictures, by name, and remarks about them.

    Errors  BadData for too few pictures.
    """
    n, name = len(drawn), Path(extractor.name).name
    frechet = distances.frechet(drawn, distances.moments(reference))
    values = {"frechet": frechet, "kernel": distances.kernel(drawn, reference)}
    remarks = []
    if drawn.any(1).all() and reference.any(1).all():
        values["cmmd"] = distances.cmmd(drawn, reference)
    else:
        remarks.append(
            f"{name}.cmmd is left out: at least one picture has features that are all zero"
        )
    values |= distances.manifold(drawn, reference)._asdict()
    if said := distances.warning(f"{name}.frechet", frechet, n):
        remarks.append(said)
    elif n < SAFE:
        remarks.append(
            f"{name}.frechet rests on {n} pictures: it compares only with values from as many"
        )
    if extractor.family.startswith(tuple(artist.taught)):
        remarks.append(
            f"{extractor.name} took part in the training of this model: look at its distances, and "
            "report those of another network"
        )
    return {f"{name}.{key}": value for key, value in values.items()}, remarks


def _place(cache: Path, examples: str, extractor: Extractor) -> Path:
    whole = f"{examples} {extractor.name} {extractor.digest}"
    return cache / f"{hashlib.sha256(whole.encode()).hexdigest()[:16]}.safetensors"
