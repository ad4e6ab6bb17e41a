"""Routes: during training, some tokens skip most of the blocks.

    before block start    kept tokens go on with their rotary positions, the others are set aside
    after block stop - 1  kept tokens return to their places

The kept tokens are drawn once per step and picture, outside the network, and passed in as plain
data: a recomputed block sees the same tokens. Without a `Route` every token passes every block.
Self-guidance amplifies the difference between passes with and without one (generate/guidance).

Three kinds differ in what happens to the skipped tokens:

    tread      they return unchanged, as they were before block start
    sprint     every token becomes W [skipped, processed], where one learned vector stands for the
               processed half of a skipped token; W is part of the network and is applied without a
               route too, so diffusers' class has no place for it
    deferred   they never return (stop is the depth), and the loss leaves out their pixels

Letters  b pictures, n tokens, k kept tokens, d width of whatever a token carries.
Source   TREAD, arXiv 2501.04765; SPRINT, arXiv 2510.21986; deferred masking, arXiv 2407.15811.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from daybreak.train.dice import Dice


class Config(BaseModel):
    """A share `carried` of a picture's tokens skips the blocks start, ..., stop - 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["tread", "sprint", "deferred"] = "tread"
    start: int = Field(default=1, ge=0)
    stop: int = Field(gt=0)
    carried: float = Field(default=0.5, ge=0, lt=1)

    @model_validator(mode="after")
    def _is_a_stretch(self) -> "Config":
        if self.start >= self.stop:
            raise ValueError(f"start = {self.start} is not before stop = {self.stop}")
        return self


class Route(NamedTuple):
    """The indices, in raster order, of the tokens that pass the blocks start, ..., stop - 1."""

    start: int
    stop: int
    kept: Int[Tensor, "b k"]

    def take(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b k d"]:
        """Pick the kept tokens."""
        return tokens.gather(1, self._places(tokens))

    def put(
        self, tokens: Float[Tensor, "b k d"], into: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b n d"]:
        """Return a copy of `into` in which `tokens` replace the kept tokens."""
        return into.scatter(1, self._places(tokens), tokens)

    def _places(self, like: Tensor) -> Int[Tensor, "b k d"]:
        return self.kept[..., None].expand(-1, -1, like.shape[-1])


def draw(config: Config, image: Float[Tensor, "b c h w"], patch: int, dice: Dice) -> Route:
    """Choose the tokens to keep, for each picture of the batch.

    Shapes  kept (b, k), k = n - round(n carried) but at least 1, n = (h / patch)(w / patch).
    """
    n = (image.shape[-2] // patch) * (image.shape[-1] // patch)
    k = max(1, n - round(n * config.carried))
    kept = dice.uniform(n).argsort(dim=1)[:, :k].sort(dim=1).values
    return Route(config.start, config.stop, kept)


def walked(route: Route, image: Float[Tensor, "b c h w"], patch: int) -> Bool[Tensor, "b 1 h w"]:
    """Tell which pixels belong to kept tokens; `deferred` does not predict the others."""
    b, rows, columns = len(image), image.shape[-2] // patch, image.shape[-1] // patch
    tokens = torch.zeros(b, rows * columns, dtype=torch.bool, device=image.device)
    seen = tokens.scatter(1, route.kept, True).view(b, 1, rows, columns)
    return seen.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


class Fusion(nn.Module):
    """SPRINT's end of a route: x = W [skipped, processed] + bias.

    The processed half of a skipped token is `mask`, which starts at zero. W starts by averaging the
    two halves, so at first a skipped token is halved, and the next normalisation removes the
    factor.
    """

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.start, self.stop = config.start, config.stop
        self.mask = nn.Parameter(torch.zeros(width))
        self.join = nn.Linear(2 * width, width)
        with torch.no_grad():
            self.join.weight.copy_(torch.eye(width).repeat(1, 2) / 2)
            self.join.bias.zero_()

    def whole(self, tokens: Float[Tensor, "b n d"]) -> Route:
        """Return the route that keeps every token."""
        everyone = torch.arange(tokens.shape[1], device=tokens.device)
        return Route(self.start, self.stop, everyone.expand(len(tokens), -1))

    def forward(
        self, route: Route, walked: Float[Tensor, "b k d"], waited: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b n d"]:
        deep = route.put(walked, into=self.mask.to(walked.dtype).expand_as(waited))
        both = torch.cat((waited, deep), dim=-1)
        joined: Tensor = nn.functional.linear(
            both, self.join.weight.to(both.dtype), self.join.bias.to(both.dtype)
        )
        return joined
