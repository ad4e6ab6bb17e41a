"""Pretrained networks, by hub id or local folder: why one cannot be loaded, in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from daybreak.failure import BadRecipe, told

Unpickling = torch.serialization.pickle.UnpicklingError  # type: ignore[attr-defined]


def described(source: str) -> Path | None:
    """Return the `config.json` of a local folder or of a cached hub id, else None; no download."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if (path := Path(source) / "config.json").is_file():
        return path
    try:
        cached = try_to_load_from_cache(source, "config.json")
    except HFValidationError:  # a path, not a hub id
        cached = None
    return Path(cached) if isinstance(cached, str) else None


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars of `transformers` while we write a small network."""
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
    """Turn errors of loading what a recipe's `key` names into BadRecipe; `remedy` says what to do.

    Errors  BadRecipe if the network is absent, gated or damaged.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError, EOFError, RuntimeError, Unpickling) as error:
        from huggingface_hub.errors import GatedRepoError

        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # a subclass, such as OutOfMemoryError: the device failed, not the file

        if isinstance(error.__cause__, GatedRepoError):
            raise BadRecipe(
                f"{key} = {source!r} is gated: accept its licence at https://hf.co/{source} and "
                f"log in with hf auth login, or {remedy}"
            ) from error
        raise BadRecipe(
            f"{key} = {source!r} is neither a local folder nor a model that can be loaded from the "
            f"hub ({told(error)}): {remedy}"
        ) from error
