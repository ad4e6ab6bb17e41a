"""P-DINO: the distance between two pictures in the features of a frozen vision transformer.

    d(x, y) = mean over patches of  1 - cos(f(x), f(y))

LPIPS judges texture, P-DINO content and layout. The teacher sees the whole picture on the
denoiser's grid of tokens, or on a coarser one if that has more than `patches`. A coarser grid keeps
the aspect ratio to a few per cent; up to `patches` tokens the view is that of REPA, and both terms
share one pass of the teacher over the true pictures.

Letters  b pictures, n patches, d width of a feature.
Source   PixelGen, arXiv 2602.02493 (gate: its t > 0.3 is t < 0.7 here); PRX part 3 (no gate).
         Both use one square of 224 px whatever the shape.
"""

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class Config(BaseModel):
    """P-DINO of the predicted picture to the true one.

    `pooled` compares the means over all patches instead of patch with patch. Pictures with t >=
    `below` count as zero. The term is computed for a share `fraction` of the pictures and divided
    by that share.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(default=0.01, gt=0)
    teacher: str = "facebook/dinov2-with-registers-base"
    patches: int = Field(default=256, gt=0)
    pooled: bool = False
    below: float = Field(default=1.0, gt=0, le=1)
    fraction: float = Field(default=1.0, gt=0, le=1)


def distance(
    guess: Float[Tensor, "b n d"], truth: Float[Tensor, "b n d"], pooled: bool = False
) -> Float[Tensor, " b"]:
    """Return one number for each pair of pictures, in [0, 2]."""
    if pooled:
        guess, truth = guess.mean(1, keepdim=True), truth.mean(1, keepdim=True)
    return 1 - F.cosine_similarity(guess, truth, dim=-1).mean(1)


def grid(config: Config, rows: int, columns: int) -> tuple[int, int]:
    """Return the teacher's rows and columns of patches for a picture of rows x columns tokens."""
    scale = min(1.0, (config.patches / (rows * columns)) ** 0.5)
    return max(1, round(rows * scale)), max(1, round(columns * scale))
