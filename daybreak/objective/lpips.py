"""LPIPS: the distance between two pictures in the features of VGG-16.

    d(x, y) = sum over five depths of  mean over positions of  w . (f(x) - f(y))^2

f are the activations after the last ReLU before each pooling, scaled to length one at each
position; w are weights, one for each channel, fitted to human judgements. Both networks are read
from the files that torchvision and the `lpips` package publish; neither package is imported. Their
tensors are not parameters: they are not trained, and no checkpoint holds them.

Letters  b pictures, c channels of a depth.
Source   LPIPS: arXiv 1801.03924, version 0.1; on a predicted picture: PixelGen, arXiv 2602.02493.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from daybreak.failure import BadRecipe, told
from daybreak.model import hub, vision

# Indices of the convolutions in torchvision's `vgg16().features`, by depth; a pooling in between.
CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
LAYOUT = torch.channels_last  # the layout in which convolutions are fastest
SMALLEST = 2 ** (len(CONVOLUTIONS) - 1)  # smallest side of a picture that can be pooled four times
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


class Config(BaseModel):
    """LPIPS of the predicted picture to the true one, both scaled by `resize`.

    `vgg` and `heads` are files; by default those of torchvision's cache and the package `lpips`.
    Pictures with t >= `below` count as zero. The term is computed for a share `fraction` of the
    pictures and divided by that share.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(default=0.1, gt=0)
    resize: float = Field(default=0.5, gt=0, le=1)
    below: float = Field(default=1.0, gt=0, le=1)
    fraction: float = Field(default=1.0, gt=0, le=1)
    vgg: str | None = None
    heads: str | None = None


def apart(
    head: Float[Tensor, " c"], guess: Float[Tensor, "b p c"], truth: Float[Tensor, "b p c"]
) -> Float[Tensor, " b"]:
    """One depth's term: w . (f(x) - f(y))^2, averaged over positions, in float32."""
    # Where all channels are zero, the gradient of sqrt(sum of squares) would be NaN; this one's: 0.
    u, v = (
        f / (torch.linalg.vector_norm(f, dim=-1, keepdim=True) + 1e-10)
        for f in (guess.float(), truth.float())
    )
    return (head * (u - v).square()).sum(-1).mean(1)


class Vgg(NamedTuple):
    """The network's tensors: for each depth, (kernel, bias) of its convolutions and the head's w.

    `apart` is the function of that name, or its compiled version (see `compiled`).
    """

    depths: tuple[tuple[tuple[Tensor, Tensor], ...], ...]
    heads: tuple[Float[Tensor, " c"], ...]
    apart: Callable[[Tensor, Tensor, Tensor], Tensor] = apart


def compiled(vgg: Vgg) -> Vgg:
    """Compile `apart` into one kernel forward and one backward, which store only the activations.

    Uncompiled it takes longer than the convolutions, because memory bandwidth bounds each of its
    operations. One compiled version serves any number of positions and channels.
    """
    return vgg._replace(apart=torch.compile(apart, dynamic=True, fullgraph=True))


def distance(
    vgg: Vgg, guess: Float[Tensor, "b 3 h w"], truth: Float[Tensor, "b 3 h w"], scale: float = 1.0
) -> Float[Tensor, " b"]:
    """Return the distance of each pair of pictures, in [-1, 1]; only the guess gets a gradient."""
    height, width = (max(SMALLEST, round(side * scale)) for side in guess.shape[-2:])
    guess, truth = (vision.resize(image.float(), height, width) for image in (guess, truth))
    with torch.no_grad():
        wanted = list(activations(vgg, truth))
    seen = zip(vgg.heads, activations(vgg, guess), wanted, strict=True)
    return torch.stack([vgg.apart(*depth) for depth in seen]).sum(0)


def activations(vgg: Vgg, image: Float[Tensor, "b 3 h w"]) -> Iterator[Float[Tensor, "b p c"]]:
    """Yield the activations of each depth, at all positions."""
    x = vision.standardise(image).to(vgg.depths[0][0][0].dtype, memory_format=LAYOUT)
    for number, convolutions in enumerate(vgg.depths):
        x = F.max_pool2d(x, 2) if number else x
        for kernel, bias in convolutions:
            x = F.relu(F.conv2d(x, kernel, bias, padding=1))
        yield x.permute(0, 2, 3, 1).flatten(1, 2)  # no copy: this is the order of LAYOUT


def load(
    config: Config, compute: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Vgg:
    """Read the two files. Errors: BadRecipe, which says what is missing and where to get it."""
    network, heads = files(config)
    if not network.is_file():
        raise BadRecipe(
            f"lpips.vgg: {network} does not exist: put {VGG_URL} (528 MiB) there, or name another "
            "place with --set lpips.vgg=FILE"
        )
    if heads is None or not heads.is_file():
        raise BadRecipe(
            f"lpips.heads: {heads or 'the package lpips'} does not exist: pip install --no-deps "
            "lpips brings it (weights/v0.1/vgg.pth, 7 KiB), or name another place of that file "
            "with --set lpips.heads=FILE"
        )
    found, learned = _read(network, "lpips.vgg"), _read(heads, "lpips.heads")
    try:
        vgg = Vgg(
            tuple(
                tuple(
                    (found[f"features.{layer}.weight"], found[f"features.{layer}.bias"])
                    for layer in convolutions
                )
                for convolutions in CONVOLUTIONS
            ),
            tuple(
                learned[f"lin{depth}.model.1.weight"].flatten()
                for depth in range(len(CONVOLUTIONS))
            ),
        )
    except KeyError as error:
        raise BadRecipe(
            f"{network} and {heads} are not torchvision's VGG-16 and its LPIPS heads: {error} is "
            "missing; download them again"
        ) from error
    widths = [len(convolutions[-1][0]) for convolutions in vgg.depths]
    if [len(head) for head in vgg.heads] != widths:
        raise BadRecipe(
            f"{heads} does not fit {network}, whose layers have {widths} channels: download both "
            "again"
        )
    return Vgg(
        tuple(
            tuple(
                (kernel.to(device, compute, memory_format=LAYOUT), bias.to(device, compute))
                for kernel, bias in convolutions
            )
            for convolutions in vgg.depths
        ),
        tuple(head.to(device, torch.float32) for head in vgg.heads),
    )


def files(config: Config) -> tuple[Path, Path | None]:
    """Return the paths of the network and of its heads; None without the package `lpips`."""
    cache = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser()
    network = Path(config.vgg or cache / "hub" / "checkpoints" / Path(VGG_URL).name)
    return network, Path(config.heads) if config.heads else _packaged()


def _packaged() -> Path | None:
    """Find the heads in the package `lpips` without importing it, which needs torchvision."""
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth"


def _read(path: Path, key: str) -> dict[str, Tensor]:
    """Read a file of named tensors."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        named: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return named
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError, hub.Unpickling) as error:
        raise BadRecipe(
            f"{key}: {path} cannot be read as weights ({told(error)}): download it anew"
        ) from error
