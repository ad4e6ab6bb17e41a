"""Pretrained networks, by hub id or local folder: what stands in the way of one, in a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError

from daybreak.failure import BadRecipe


@contextmanager
def loading(key: str, source: str, remedy: str) -> Iterator[None]:
    """Load what a recipe's `key` names; `remedy` says what else could stand there.

    Errors  BadRecipe if it is not there, gated or damaged.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error.__cause__, GatedRepoError):
            raise BadRecipe(
                f"{key} = {source!r} is gated: accept its licence at https://hf.co/{source} and "
                f"log in with hf auth login, or {remedy}"
            ) from error
        raise BadRecipe(
            f"{key} = {source!r} is neither a local folder nor a model that can be loaded from the "
            f"hub ({str(error).splitlines()[0]}): {remedy}"
        ) from error
