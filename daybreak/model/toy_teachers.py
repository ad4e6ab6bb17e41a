"""Tiny teachers with random weights, in the file layouts of the real ones.

They teach little, but with them a recipe with every ingredient can be tried in minutes, offline and
without accepting a licence: `daybreak doctor --make-toy-teachers DIR`. Features of a random network
still differ between pictures, so the gradient of a term with one points towards the true picture.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from daybreak.failure import BadRecipe, BadStorage
from daybreak.model import hub

WIDTH, DEPTH, HEADS = 32, 2, 2
CHANNELS = ((8, 2), (16, 2), (32, 3), (32, 3), (32, 3))  # (channels, convolutions); VGG: 64 to 512


def make(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Write all toy teachers to a folder; returns the paths to set in a recipe, by kind.

    `dinov2`, `dinov2_with_registers` and `dinov3` are folders for `repa.teacher` and
    `dino.teacher`; `vgg` and `heads` are the files of `[lpips]`.

    Errors  BadStorage if the folder cannot be made, BadRecipe if it is not empty.
    """
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        DINOv3ViTConfig,
        DINOv3ViTModel,
    )

    size: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
    }
    transformers: dict[str, Callable[[], Any]] = {
        "dinov2": lambda: Dinov2Model(Dinov2Config(**size, image_size=224, patch_size=14)),
        "dinov2_with_registers": lambda: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**size, image_size=224, patch_size=14, num_register_tokens=4)
        ),
        "dinov3": lambda: DINOv3ViTModel(
            DINOv3ViTConfig(
                **size, patch_size=16, intermediate_size=2 * WIDTH, num_register_tokens=4
            )
        ),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadStorage(f"cannot make the folder {folder}: {error.strerror}") from error
    if any(folder.iterdir()):
        raise BadRecipe(f"{folder} is not empty: name a new folder for the toy teachers")
    made = {name: folder / name for name in transformers}
    with torch.random.fork_rng(devices=[]), hub.without_bars():
        for name, build in transformers.items():
            torch.manual_seed(seed)
            build().save_pretrained(made[name])
        torch.manual_seed(seed)
        vgg, heads = perceptual(folder)
    return made | {"vgg": vgg, "heads": heads}


def perceptual(folder: Path, depths: Sequence[tuple[int, int]] = CHANNELS) -> tuple[Path, Path]:
    """Write the two files of `[lpips]`; `depths` holds (channels, convolutions) for each depth."""
    vgg, heads = folder / "vgg16.pth", folder / "lpips_vgg.pth"
    torch.save(_vgg(depths), vgg)
    torch.save(
        {
            f"lin{depth}.model.1.weight": torch.rand(1, channels, 1, 1) / channels
            for depth, (channels, _) in enumerate(depths)
        },
        heads,
    )
    return vgg, heads


def _vgg(depths: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Return random weights, numbered as in torchvision, where ReLUs and poolings count too."""
    weights: dict[str, torch.Tensor] = {}
    width, number = 3, 0
    for channels, convolutions in depths:
        for _ in range(convolutions):
            layer = nn.Conv2d(width, channels, 3)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            weights |= {f"features.{number}.{k}": v for k, v in layer.state_dict().items()}
            width, number = channels, number + 2
        number += 1
    return weights
