"""From noise to picture: Euler steps along the velocity of the guessed clean image.

    t_i = s u / (1 + (s - 1) u),  u = 1 - i / n
    x   <- x - (t_i - t_{i+1}) (x - x_hat) / max(t_i, 0.05)

`Denoiser` is any function (x_t, t) -> x_hat; guidance makes one out of two.

Letters  b pictures, c channels.
Source   Euler on the flow's ODE: arXiv 2403.03206; the grid is that of training, not diffusers'.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from daybreak.model import flow
from daybreak.model.dit import DiT
from daybreak.model.text import TextEncoder
from daybreak.train.dice import Dice

Denoiser = Callable[[Tensor, float], Tensor]


class Config(BaseModel):
    """How pictures are made: for the grids during training, and by default afterwards.

    `every` counts training steps between two grids. Guidance acts for t in `interval`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: tuple[str, ...] = ()
    every: int = Field(default=500, gt=0)
    steps: int = Field(default=28, gt=0)
    guidance: float = Field(default=3.0, ge=1)
    interval: tuple[float, float] = (0.0, 1.0)
    shift: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)


def times(steps: int, shift: float) -> list[float]:
    """Return the grid of times 1 = t_0 > t_1 > ... > t_n = 0."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    grid: list[float] = flow.shifted(even, shift).tolist()
    return grid


def denoiser(model: DiT, text: TextEncoder, captions: Sequence[str]) -> Denoiser:
    """Fix the words: the network as a function of picture and time."""
    words = text(captions)

    def denoise(x_t: Float[Tensor, "b c h w"], t: float) -> Float[Tensor, "b c h w"]:
        guess: Tensor = model(x_t, x_t.new_full((len(x_t),), t), words).x
        return guess

    return denoise


def noise(
    seeds: Sequence[int], channels: int, height: int, width: int, scale: float
) -> Float[Tensor, "b c h w"]:
    """Draw the starting noise of each picture from its own seed, equal on every device."""
    return scale * torch.cat(
        [Dice(seed, 0, 0, 1).normal(channels, height, width) for seed in seeds]
    )


@torch.no_grad()
def euler(
    denoise: Denoiser, start: Float[Tensor, "b c h w"], steps: int, shift: float
) -> Float[Tensor, "b c h w"]:
    """Walk from noise (t = 1) to a picture (t = 0); the result is not clamped."""
    x = start
    grid = times(steps, shift)
    for now, then in pairwise(grid):
        t = x.new_full((len(x),), now)
        x = x - (now - then) * flow.velocity(x, denoise(x, now), t)
    return x
