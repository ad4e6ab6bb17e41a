"""Frozen teachers: pretrained vision networks that are not trained further.

A DINOv2 or DINOv3 of any size, by hub id or local folder, gives one vector for each patch of a
picture. The picture is resized so that the teacher sees the grid of patches that the caller asks
for: token i of a denoiser and patch i of its teacher cover the same region, whatever their sizes.

A `Teacher` is not an `nn.Module`, so its weights are not among the parameters of its owner, and no
optimiser, average or checkpoint includes them. Gradients with respect to the picture are available.

Letters  b pictures, n patches in raster order, d width of a feature.
Units    pictures [-1, 1]. Only this module uses ImageNet's mean and deviation.
Source   DINOv2: arXiv 2304.07193; registers: arXiv 2309.16588; DINOv3: arXiv 2508.10104.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from daybreak.failure import BadRecipe
from daybreak.model import hub

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit")  # all of them: patch tokens last


def resize(image: Float[Tensor, "b c h w"], height: int, width: int) -> Float[Tensor, "b c y x"]:
    """Scale pictures with antialiasing, so that every pixel contributes and gets a gradient.

    Equals `interpolate` with `antialias`, whose gradient on a GPU is summed in no fixed order, so
    that runs would not be reproducible. Two matrix products are.
    """
    rows, columns = image.shape[-2:]
    if (rows, columns) == (height, width):
        return image
    image = image if rows == height else _filter(rows, height, image.dtype, image.device) @ image
    if columns == width:
        return image
    return image @ _filter(columns, width, image.dtype, image.device).mT


@cache
def _filter(
    before: int, after: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "after before"]:
    """Weights of old pixels in each new one: a triangle of half-width max(1, before / after)."""
    stride = before / after
    pixels = torch.arange(before, dtype=torch.float64) + 0.5
    centres = stride * (torch.arange(after, dtype=torch.float64) + 0.5)
    shares = (1 - (pixels - centres[:, None]).abs() / max(stride, 1.0)).clamp(min=0)
    return (shares / shares.sum(1, keepdim=True)).to(device, dtype)


def standardise(image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Normalise pictures in [-1, 1] by ImageNet's mean and deviation, as pretrained networks do."""
    mean, deviation = _statistics(image.device, image.dtype)
    return ((image + 1) / 2 - mean) / deviation


@cache
def _statistics(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and deviation, copied to a device only once: a copy would delay each step."""
    mean, deviation = torch.tensor((MEAN, DEVIATION), device=device, dtype=dtype)[..., None, None]
    return mean, deviation


class Teacher:
    """A frozen vision transformer; `patch` is the side of its patches, `width` that of a feature.

    Shapes  image (b, 3, h, w) -> features (b, rows * columns, d), float32, after the last norm;
            class and register tokens are left out.
    Units   image [-1, 1]; values outside are clamped, as they are when a picture is saved.
    """

    def __init__(self, network: Any) -> None:
        self.network = network.eval().requires_grad_(False)
        self.patch, self.width = int(network.config.patch_size), int(network.config.hidden_size)

    def __call__(
        self, image: Float[Tensor, "b 3 h w"], rows: int, columns: int
    ) -> Float[Tensor, "b n d"]:
        """Return the features of a batch, which may be empty, on a grid of rows x columns."""
        if not len(image):
            return image.new_zeros(0, rows * columns, self.width)
        pixels = resize(image.float(), rows * self.patch, columns * self.patch).clamp(-1, 1)
        seen = self.network(pixel_values=standardise(pixels).to(self.network.dtype))
        patches: Tensor = seen.last_hidden_state[:, -rows * columns :]
        return patches.float()

    def compile(self) -> None:
        """Compile its layers: all share one compiled version, for any number of patches."""
        stacks = [m for m in self.network.modules() if isinstance(m, torch.nn.ModuleList)]
        for layer in max(stacks, key=len):
            layer.compile(dynamic=True, fullgraph=True)


def load(
    source: str,
    key: str,
    compute: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Teacher:
    """Load a teacher by hub id or local folder; `key` is the recipe's key that names it.

    Errors  BadRecipe if the network is absent, gated, damaged, or not a DINO.
    """
    from transformers import AutoConfig, AutoModel

    section = key.partition(".")[0]
    remedy = f"give {key} a local folder that holds it, or leave it out with --without {section}"
    with hub.loading(key, source, remedy):
        kind = AutoConfig.from_pretrained(source).model_type
        if kind not in KINDS:
            raise BadRecipe(f"{key} = {source!r} is a {kind}, not one of {', '.join(KINDS)}")
        network, report = AutoModel.from_pretrained(source, dtype=compute, output_loading_info=True)
    absent = [name for name in report["missing_keys"] if not name.endswith("mask_token")]
    if absent:
        raise BadRecipe(f"{key} = {source!r} lacks weights ({absent[0]}, ...): download it anew")
    return Teacher(network.to(device))
