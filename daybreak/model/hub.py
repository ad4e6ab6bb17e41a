"""Pretrained networks, by hub id or local folder: what stands in the way of one, in a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from daybreak.failure import BadRecipe, told

Unpickling = torch.serialization.pickle.UnpicklingError  # type: ignore[attr-defined]


def described(source: str) -> Path | None:
    """Return the `config.json` of a local folder, or of a hub id in the cache; nothing else."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if (path := Path(source) / "config.json").is_file():
        return path
    try:
        cached = try_to_load_from_cache(source, "config.json")
    except HFValidationError:  # a path
        cached = None
    return Path(cached) if isinstance(cached, str) else None


@contextmanager
def without_bars() -> Iterator[None]:
    """Draw no bar of `transformers` for what takes a moment: writing a network of our own."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


@contextmanager
def loading(key: str, source: str, remedy: str) -> Iterator[None]:
    """Load what a recipe's `key` names; `remedy` says what else could stand there.

    Errors  BadRecipe if it is not there, gated or damaged.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError, EOFError, RuntimeError, Unpickling) as error:
        from huggingface_hub.errors import GatedRepoError

        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # of a device, not of what was loaded

        if isinstance(error.__cause__, GatedRepoError):
            raise BadRecipe(
                f"{key} = {source!r} is gated: accept its licence at https://hf.co/{source} and "
                f"log in with hf auth login, or {remedy}"
            ) from error
        raise BadRecipe(
            f"{key} = {source!r} is neither a local folder nor a model that can be loaded from the "
            f"hub ({told(error)}): {remedy}"
        ) from error
