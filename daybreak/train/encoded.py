"""Captions of prepared datasets, encoded before the runs that train on them.

What is stored, and why it cannot be out of date: daybreak/model/text_cache.py. This module writes
and reads the cache: `daybreak prepare --cache-text` fills that of a dataset, and a run with the
same frozen encoder, in the same precision, reads from it what it would otherwise compute.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from daybreak import config
from daybreak.data import prepared
from daybreak.failure import BadRecipe
from daybreak.model import text, text_cache
from daybreak.train import accelerator, runs


def asked(encoder: str, max_tokens: int | None, precision: str) -> tuple[text.Config, str]:
    """Return how captions are to be encoded, and in what precision; `encoder` may be a recipe.

    Errors  BadRecipe if that trains an encoder of its own, or if `max_tokens` is not possible.
    """
    if encoder.endswith(".toml"):
        recipe = config.load(encoder)
        if recipe.text.encoder is None:
            raise BadRecipe(
                f"--cache-text {encoder}: this recipe trains its own text encoder, so no "
                "caption can be encoded beforehand"
            )
        return recipe.text, recipe.precision
    if not max_tokens:
        return text.Config(encoder=encoder), precision
    if max_tokens % text.LENGTH_STEP:
        raise BadRecipe(f"--max-tokens {max_tokens} is not a multiple of {text.LENGTH_STEP}")
    return text.Config(encoder=encoder, max_tokens=max_tokens), precision


def fill(
    dataset: Path,
    encoder: text.Config,
    precision: str,
    progress: Callable[[int, int], None],
    part: text_cache.Part,
) -> Path:
    """Encode a dataset's captions, unless done already; returns the folder of the embeddings.

    Errors  BadRecipe if there is no such encoder, BadData if there is no such dataset, BadStorage.
    """
    table = prepared.open_dataset(dataset).table
    chunks = table["captions"].chunks
    captions = (caption for chunk in chunks for caption in chunk.flatten().to_pylist())
    of = sum(len(chunk.flatten()) for chunk in chunks) // part.of
    model = text.pretrained(encoder, runs.dtype(precision)).to(accelerator.choose())
    return text_cache.write(dataset, model, captions, lambda done: progress(done, of), part)


def known(
    recipe: config.Recipe, dtype: torch.dtype, tell: Callable[[str], None]
) -> text_cache.Reader | None:
    """The captions already encoded for a run; None if there are none for its encoder."""
    if recipe.text.encoder is None:
        return None
    folders = recipe.paths
    reader = text_cache.reader(folders, recipe.text, dtype)
    if reader is not None:
        tell(f"{len(reader.digests):,} captions are already encoded")
        for folder in reader.partial:
            tell(
                f"some captions of {folder} are not, and every batch with such a caption is "
                f"encoded during training; to avoid that: daybreak prepare {folder} --cache-text "
                f"{recipe.out}/recipe.toml"
            )
        return reader
    for folder in folders:
        if (folder / "text").is_dir():
            tell(
                f"{folder / 'text'} was made with another text.encoder, text.max_tokens, template "
                f"or precision than this run has ({str(dtype).removeprefix('torch.')}): captions "
                "are encoded during training"
            )
    return None
