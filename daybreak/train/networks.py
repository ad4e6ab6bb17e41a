"""Sizes of the frozen networks (text encoders, teachers) that a recipe names.

Text encoders and teachers are named by hub id or local folder. Their sizes come from the
`config.json` of the folder, from the table below, or from the `config.json` in the hub's cache, so
that a run can be planned on a machine that holds none of their weights. Nothing is downloaded.

Letters  n tokens, d width.
Source   the `config.json` of each repository.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from daybreak.failure import BadRecipe
from daybreak.model import hub

CHANNELS = 3


class Network(NamedTuple):
    """A transformer, as far as its cost is concerned: matrices, attention, and its input layer."""

    layers: int
    width: int
    queries: int  # width of all heads together
    keys: int  # the same for keys and values, which heads may share
    mlp: int
    gated: bool
    patch: int = 0  # a picture's; 0 for text
    extra: int = 0  # class and register tokens
    vocabulary: int = 0

    @property
    def block(self) -> int:
        """Weights in the matrices of one layer."""
        attention = self.width * (2 * self.queries + 2 * self.keys)
        return attention + (3 if self.gated else 2) * self.width * self.mlp

    @property
    def weights(self) -> int:
        """All weights, except vectors."""
        inputs = CHANNELS * self.patch**2 + self.vocabulary
        return self.layers * self.block + inputs * self.width

    def forward(self, n: int) -> float:
        """FLOPs for n words or patches."""
        return self._products(n) + self._attention(n)

    def back(self, n: int) -> float:
        """FLOPs to propagate a gradient back to the input, through weights that do not learn."""
        return self._products(n) + 2 * self._attention(n)

    def _products(self, n: int) -> float:
        """FLOPs of all products with weights."""
        inputs = n * CHANNELS * self.patch**2 * self.width
        return 2 * (inputs + (n + self.extra) * self.layers * self.block)

    def _attention(self, n: int) -> float:
        return 4 * self.layers * (n + self.extra) ** 2 * self.queries


def _vit(layers: int, width: int, patch: int, registers: int) -> Network:
    return Network(layers, width, width, width, 4 * width, False, patch, 1 + registers)


def _t5(layers: int, width: int, queries: int, mlp: int) -> Network:
    return Network(layers, width, queries, queries, mlp, True, vocabulary=32128)


NETWORKS = {
    "google/t5gemma-2b-2b-ul2": Network(26, 2304, 2048, 1024, 9216, True, vocabulary=256_000),
    "Qwen/Qwen3-VL-Embedding-2B": Network(28, 2048, 2048, 1024, 6144, True, vocabulary=151_936),
    "Qwen/Qwen3-1.7B": Network(28, 2048, 2048, 1024, 6144, True, vocabulary=151_936),
    "Qwen/Qwen3-0.6B": Network(28, 1024, 2048, 1024, 3072, True, vocabulary=151_936),
    "google/flan-t5-small": _t5(8, 512, 384, 1024),
    "google/flan-t5-base": _t5(12, 768, 768, 2048),
    "google/flan-t5-large": _t5(24, 1024, 1024, 2816),
    "google/flan-t5-xl": _t5(24, 2048, 2048, 5120),
    "facebook/dinov2-small": _vit(12, 384, 14, 0),
    "facebook/dinov2-base": _vit(12, 768, 14, 0),
    "facebook/dinov2-large": _vit(24, 1024, 14, 0),
    "facebook/dinov2-with-registers-small": _vit(12, 384, 14, 4),
    "facebook/dinov2-with-registers-base": _vit(12, 768, 14, 4),
    "facebook/dinov2-with-registers-large": _vit(24, 1024, 14, 4),
    "facebook/dinov3-vits16-pretrain-lvd1689m": _vit(12, 384, 16, 4),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": _vit(12, 768, 16, 4),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": _vit(24, 1024, 16, 4),
}


def named(source: str, key: str) -> Network:
    """Look a network up by local folder or hub id; `key` is the recipe's name for it.

    Errors  BadRecipe if its size cannot be found, or if it reads text where `key` needs a network
            for pictures, or the other way round.
    """
    reads = key == "text.encoder"
    known = [name for name, one in NETWORKS.items() if bool(one.patch) != reads]
    network = _sized(source, key, known)
    if bool(network.patch) == reads:
        raise BadRecipe(
            f"{key} = {source!r} is {'an image' if reads else 'a text'} encoder: name "
            f"{'a text' if reads else 'an image'} encoder"
        )
    return network


def _sized(source: str, key: str, known: Sequence[str]) -> Network:
    """Its size, from the folder that it names, the table, or the cache of the hub."""
    if source in NETWORKS and not Path(source).exists():
        return NETWORKS[source]
    path = hub.described(source)
    if path is None:
        raise BadRecipe(
            f"{key} = {source!r} is neither on this machine nor among the networks whose size is "
            f"known ({', '.join(known)}): name one of them, or a folder that holds it"
        )
    try:
        return described(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRecipe(f"{key} = {source!r}: {path} does not say how large it is") from error


def described(config: dict[str, Any]) -> Network:
    """Read the size out of the `config.json` of a T5, a decoder such as Qwen3, or a DINO.

    Errors  KeyError for a size that is not given.
    """
    config = config.get("text_config") or config.get("encoder") or config
    config = config.get("text_config") or config
    vocabulary = int(config.get("vocab_size", 0))
    if "d_model" in config:
        return Network(
            layers=config["num_layers"],
            width=config["d_model"],
            queries=config["num_heads"] * config["d_kv"],
            keys=config["num_heads"] * config["d_kv"],
            mlp=config["d_ff"],
            gated=str(config.get("feed_forward_proj", "relu")).startswith("gated"),
            vocabulary=vocabulary,
        )
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    patch = int(config.get("patch_size", 0))
    gated = bool(config.get("use_gated_mlp") or config.get("use_swiglu_ffn") or not patch)
    mlp = config.get("intermediate_size") or int(width * config["mlp_ratio"])
    if config.get("use_swiglu_ffn"):  # DINOv2 keeps the number of weights, in multiples of 8
        mlp = (mlp * 2 // 3 + 7) // 8 * 8
    return Network(
        layers=config["num_hidden_layers"],
        width=width,
        queries=heads * head,
        keys=(config.get("num_key_value_heads") or heads) * head,
        mlp=mlp,
        gated=gated,
        patch=patch,
        extra=(1 + int(config.get("num_register_tokens", 0))) if patch else 0,
        vocabulary=0 if patch else vocabulary,
    )
