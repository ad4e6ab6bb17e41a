"""REPA: tokens inside the denoiser learn to predict a teacher's features of the clean picture.

    1 - mean cos(projector(a_i), y_i)       a_i: output token i of a block, y_i: feature of patch i

A small projector maps tokens to features; it is trained with the denoiser and not needed after
training. If a route leaves tokens out, only the kept ones are compared, each with its own patch.

The teacher is a frozen network that sees the clean picture (`model/vision`), or "self": block
`target` of the averaged model, for the same picture and noise at a slightly lower t, which needs no
other weights. iREPA's two changes are options: `spatial_norm` subtracts its value times the mean
over the picture's patches and divides by their standard deviation; `projector = "conv"` is a 3 x 3
convolution.

Letters  b pictures, n tokens, k of them compared, h width of the denoiser, d of the teacher.
Source   REPA: arXiv 2410.06940; iREPA: arXiv 2512.10794; self: arXiv 2505.02831 (SRA; its noise
         gap, but REPA's cosine); early stop: arXiv 2505.16792.
"""

from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from daybreak.model.dit import Linear, Tapped

SELF = "self"


class Config(BaseModel):
    """Which blocks, counted from 0, learn from which teacher, and until which step of the run.

    With `teacher = "self"`, `target` is the block of the averaged model whose tokens are the
    target, and `earlier` bounds how much lower its t is: t' = t - u, u ~ U(0, earlier).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(default=0.5, gt=0)
    teacher: str = "facebook/dinov3-vitl16-pretrain-lvd1689m"
    blocks: tuple[int, ...] = Field(default=(7,), min_length=1)
    until: int | None = Field(default=None, gt=0)
    projector: Literal["mlp", "conv"] = "mlp"
    spatial_norm: float | None = Field(default=None, ge=0, le=1)
    target: int | None = Field(default=None, ge=0)
    earlier: float = Field(default=0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _has_its_target(self) -> "Config":
        if list(self.blocks) != sorted(set(self.blocks)) or self.blocks[0] < 0:
            raise ValueError(
                f"blocks = {list(self.blocks)} must be in rising order, each named once"
            )
        if (self.teacher == SELF) != (self.target is not None):
            raise ValueError(
                'teacher = "self" and target belong together: target is the block of the averaged '
                "model that teaches"
            )
        return self

    @property
    def network(self) -> str | None:
        """The frozen network that is the teacher; None if the averaged model is."""
        return None if self.teacher == SELF else self.teacher

    def check(self, depth: int, routed: range) -> None:
        """Check against a denoiser with `depth` blocks, of which `routed` see only kept tokens.

        Errors  ValueError if a block does not exist or a convolution would lack tokens.
        """
        for name, block in (*(("blocks", block) for block in self.blocks), ("target", self.target)):
            if block is not None and block >= depth:
                raise ValueError(f"repa.{name} names block {block}, but dit.depth = {depth}")
        if self.projector == "conv" and (inside := set(self.blocks) & set(routed)):
            raise ValueError(
                f'repa.projector = "conv" needs every token, but block {min(inside)} lies on the '
                f"route of [tread] ({routed.start} to {routed.stop}, exclusive)"
            )


class Mlp(nn.Module):
    """An MLP of three layers, applied to each token."""

    def __init__(self, width: int, target: int) -> None:
        super().__init__()
        widths = (width, target, target, target)
        self.layers = nn.ModuleList(Linear(*pair) for pair in pairwise(widths))

    def forward(self, tokens: Float[Tensor, "b k h"], _: int) -> Float[Tensor, "b k d"]:
        for layer in self.layers[:-1]:
            tokens = F.silu(layer(tokens))
        return self.layers[-1](tokens)


class Conv(nn.Module):
    """A 3 x 3 convolution over the grid of tokens; it needs all of them."""

    def __init__(self, width: int, target: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Conv2d(width, target, 3).parameters()

    def forward(self, tokens: Float[Tensor, "b n h"], rows: int) -> Float[Tensor, "b n d"]:
        grid = rearrange(tokens, "b (rows columns) h -> b h rows columns", rows=rows)
        said = F.conv2d(grid, self.weight.to(grid.dtype), self.bias.to(grid.dtype), padding=1)
        return rearrange(said, "b d rows columns -> b (rows columns) d")


class Repa(nn.Module):
    """The term and its projectors, one for each tapped block.

    Shapes  tapped tokens (b, k, h); target (b, n, d), n = rows * columns; returns a scalar in
            [0, 2], the mean over pictures, tokens and blocks. The paper's loss, -cos, is one less.
    """

    def __init__(self, config: Config, width: int, target: int) -> None:
        super().__init__()
        self.config = config
        kind = Conv if config.projector == "conv" else Mlp
        self.projectors = nn.ModuleDict({str(b): kind(width, target) for b in config.blocks})

    def forward(
        self, tapped: tuple[Tapped, ...], target: Float[Tensor, "b n d"], rows: int
    ) -> Float[Tensor, ""]:
        if self.config.spatial_norm is not None:
            target = normalised(target, self.config.spatial_norm)
        apart = [
            disagreement(self.projectors[str(tap.block)](tap.tokens, rows), target, tap.kept)
            for tap in tapped
        ]
        return sum(apart[1:], start=apart[0]) / len(apart)


def disagreement(
    said: Float[Tensor, "b k d"], target: Float[Tensor, "b n d"], kept: Int[Tensor, "b k"] | None
) -> Float[Tensor, ""]:
    """Mean of 1 - cos; `kept` holds the target's indices of the tokens (None: all of them)."""
    if kept is not None:
        target = target.gather(1, kept[..., None].expand(-1, -1, target.shape[-1]))
    return 1 - F.cosine_similarity(said.float(), target.float(), dim=-1).mean()


def normalised(target: Float[Tensor, "b n d"], share: float) -> Float[Tensor, "b n d"]:
    """(target - share mean) / deviation, both over the patches of a picture."""
    mean, deviation = target.mean(1, keepdim=True), target.std(1, keepdim=True)
    return (target - share * mean) / (deviation + 1e-6)
