"""Random networks of the true size, in place of those that a recipe names and this machine lacks.

How long a step takes does not depend on what its networks have learned. So a recipe can be measured
(train/measure) before they are downloaded and their licences accepted.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from daybreak.config import Recipe
from daybreak.model import hub, text, toy_teachers
from daybreak.objective import lpips
from daybreak.train import flops
from daybreak.train.networks import NETWORKS, Network

DEVIATION = 0.02
BLOCK = 1 << 20  # random numbers, repeated to fill every weight


def replaced(recipe: Recipe, folder: Path, tell: Callable[[str], None]) -> Recipe:
    """The recipe with stand-ins, written to `folder`, for networks that are not on this machine.

    Only if `daybreak plan` knows their size; training refuses anything else that is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    changes: dict[str, Any] = {}
    for key, source in named(recipe):
        if source in NETWORKS and hub.described(source) is None:
            tell(
                f"{key} = {source!r} is not on this machine: random weights of its "
                "size are used instead"
            )
            place = folder / source.replace("/", "--")
            if not place.exists():
                write(source, place)
            section, field = key.split(".")
            changes[section] = getattr(recipe, section).model_copy(update={field: str(place)})
    if recipe.lpips is not None and not all(map(_is_file, lpips.files(recipe.lpips))):
        tell("lpips: VGG-16 or its heads are not on this machine: random weights are used instead")
        vgg, heads = toy_teachers.perceptual(folder, flops.VGG)
        files = {"vgg": str(vgg), "heads": str(heads)}
        changes["lpips"] = recipe.lpips.model_copy(update=files)
    return recipe.model_copy(update=changes)


def named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield key and name of the transformers that a recipe uses."""
    if recipe.text.encoder is not None:
        yield "text.encoder", recipe.text.encoder
    if recipe.repa is not None and recipe.repa.network is not None:
        yield "repa.teacher", recipe.repa.network
    if recipe.dino is not None:
        yield "dino.teacher", recipe.dino.teacher


def write(name: str, folder: Path) -> None:
    """Write a random network of the size of a known one, as `transformers` reads it."""
    with torch.device("meta"):
        network = build(name)
    network = network.to(torch.bfloat16).to_empty(device="cpu")
    numbers = DEVIATION * torch.randn(BLOCK, dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in network.parameters():
            for piece in weight.view(-1).split(BLOCK):
                piece.copy_(numbers[: len(piece)])
    network.save_pretrained(folder)
    if NETWORKS[name].vocabulary:
        words = text.Config(vocabulary=300)
        text.learn_tokenizer(["a word"], words).save_pretrained(folder)


def build(name: str) -> Any:
    """Build a network of the size of a known one: a DINO, a T5's encoder, a Qwen3, a T5Gemma's."""
    import transformers

    size = NETWORKS[name]
    if size.patch:
        usual: dict[str, Any] = {
            "hidden_size": size.width,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.width // 64,
            "patch_size": size.patch,
        }
        if size.patch == 16:
            return transformers.DINOv3ViTModel(
                transformers.DINOv3ViTConfig(
                    **usual, intermediate_size=size.mlp, num_register_tokens=size.extra - 1
                )
            )
        if size.extra == 1:
            return transformers.Dinov2Model(transformers.Dinov2Config(**usual, image_size=518))
        return transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(
                **usual, image_size=518, num_register_tokens=size.extra - 1
            )
        )
    return _reader(name, size)


def _reader(name: str, size: Network) -> nn.Module:
    """Build a text encoder."""
    import transformers

    if "flan-t5" in name:
        return transformers.T5EncoderModel(
            transformers.T5Config(
                d_model=size.width,
                d_kv=64,
                d_ff=size.mlp,
                num_layers=size.layers,
                num_heads=size.queries // 64,
                vocab_size=size.vocabulary,
                feed_forward_proj="gated-gelu",
            )
        )
    head = 256 if "t5gemma" in name else 128
    usual: dict[str, Any] = {
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.queries // head,
        "num_key_value_heads": size.keys // head,
        "head_dim": head,
        "intermediate_size": size.mlp,
        "vocab_size": size.vocabulary,
    }
    if "t5gemma" in name:
        return transformers.T5GemmaEncoderModel(
            transformers.T5GemmaConfig(encoder=usual, decoder=usual, is_encoder_decoder=False)
        )
    return transformers.Qwen3Model(transformers.Qwen3Config(**usual))


def _is_file(path: Path | None) -> bool:
    return path is not None and path.is_file()
