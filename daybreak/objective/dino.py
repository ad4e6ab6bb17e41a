"""P-DINO: the distance between two pictures as a frozen vision transformer perceives it.

    d(x, y) = mean over patches of  1 - cos(f(x), f(y))

LPIPS judges texture; this judges what is where. The teacher looks at the whole picture, on the
denoiser's own grid of tokens, made coarser where that would be finer than about `patches`: a
picture of any proportions keeps them, to a few per cent, and up to `patches` tokens REPA has the
same view and shares its work.

Letters  b pictures, n patches, d width of a feature.
Source   PixelGen, arXiv 2602.02493 (gate: its t > 0.3 is t < 0.7 here); PRX part 3 (no gate).
         Both use one square of 224 px whatever the shape.
"""

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class Config(BaseModel):
    """Features of the guessed picture against those of the true one.

    `pooled` compares the mean over all patches instead of patch with patch. Pictures with t >=
    `below` count as zero. `fraction` of the pictures are looked at, each counting so much more.
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
    """Return the rows and columns of patches for a picture of so many tokens."""
    scale = min(1.0, (config.patches / (rows * columns)) ** 0.5)
    return max(1, round(rows * scale)), max(1, round(columns * scale))
