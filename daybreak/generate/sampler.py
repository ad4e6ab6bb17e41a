"""From noise to picture: Euler steps along the velocity of the guessed clean image.

    t_i = s u / (1 + (s - 1) u),  u = 1 - i / n
    v   = (x - x_hat) / max(t_i, 0.05)
    x   <- x - (t_i - t_{i+1}) v                        Euler
    x   <- (1 - t_{i+1}) (x - t_i v) + t_{i+1} eps      stochastic: eps is drawn anew

Errors of an Euler step stay in x. A stochastic step keeps only the guess and adds new noise to it,
so the next step can correct the errors.

`Denoiser` is any function (x_t, t) -> x_hat. Guidance turns a `Pair`, (x_t, t) -> (strong x_hat,
weak x_hat), into a `Denoiser`.

Letters  b pictures, c channels.
Source   Euler on the flow's ODE: arXiv 2403.03206; the grid uses training's shift, not diffusers'.
         Stochastic steps: arXiv 2303.01469, algorithm 1; `stochastic_sampling` of diffusers'
         FlowMatchEulerDiscreteScheduler.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from daybreak.model import flow, tread
from daybreak.model.dit import DiT
from daybreak.model.text import Text, sent
from daybreak.model.tread import Route
from daybreak.train.dice import Dice

Denoiser = Callable[[Tensor, float], Tensor]
Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]


class Apg(BaseModel):
    """Adaptive projected guidance: see generate/guidance for the equation.

    `norm` bounds the RMS of the difference, in pixel units (the paper's bound divided by the square
    root of the number of values in a picture).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    eta: float = 0.0
    momentum: float = Field(default=-0.5, gt=-1, le=0)
    norm: float | None = Field(default=None, gt=0)


class Config(BaseModel):
    """How pictures are drawn: the sample grids during training, and by default all later ones.

    `every` is the number of training steps between two grids. Their pictures are `aspect` times as
    wide as high and have the area of a square of the stage's resolution. `stochastic` steps draw
    new noise. `guide` selects the weak guess: that without prompt ("classifier-free") or that with
    part of the tokens skipping blocks as in [tread] ("self"). Guidance is used for t in `interval`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: tuple[str, ...] = ()
    every: int = Field(default=500, gt=0)
    aspect: float = Field(default=1.0, ge=0.25, le=4)
    steps: int = Field(default=28, gt=0)
    stochastic: bool = False
    guide: Literal["classifier-free", "self"] = "classifier-free"
    guidance: float = Field(default=3.0, ge=1)
    interval: tuple[float, float] = (0.0, 1.0)
    apg: Apg | None = None
    shift: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _guides_from_low_to_high(self) -> "Config":
        low, high = self.interval
        if not low <= high:
            raise ValueError(
                f"interval begins at {low} and ends at {high}: write the lower t first"
            )
        return self


def size(how: Config, resolution: int, patch: int) -> tuple[int, int]:
    """Height and width of a picture of about resolution^2 pixels, both multiples of the patch."""
    root = math.sqrt(how.aspect)
    height, width = (
        max(1, round(side / patch)) * patch for side in (resolution / root, resolution * root)
    )
    return height, width


def shift(how: Config, flow_config: flow.Config) -> float:
    """The shift of the time grid: the sampler's, if set, else that of training."""
    return flow_config.shift if how.shift is None else how.shift


def times(steps: int, shift: float) -> list[float]:
    """Return the time grid 1 = t_0 > t_1 > ... > t_n = 0."""
    even = [(steps - i) / steps for i in range(steps + 1)]  # 2 / 10 equals an interval's 0.2
    grid: list[float] = flow.shifted(torch.tensor(even, dtype=torch.float64), shift).tolist()
    return grid


def denoiser(model: DiT, words: Text, route: Route | None = None) -> Denoiser:
    """Return the network as a function of x_t and t, with fixed text and, if given, fixed route."""

    def denoise(x_t: Float[Tensor, "b c h w"], t: float) -> Float[Tensor, "b c h w"]:
        guess: Tensor = model(x_t, x_t.new_full((len(x_t),), t), words, route).x
        return guess

    return denoise


def in_one(denoise: Denoiser) -> Pair:
    """Make a `Pair` that runs as one doubled batch; `denoise` holds the text of both halves."""

    def both(
        x_t: Float[Tensor, "b c h w"], t: float
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        strong, weak = denoise(torch.cat((x_t, x_t)), t).chunk(2)
        return strong, weak

    return both


def in_turn(strong: Denoiser, weak: Denoiser) -> Pair:
    """Make a `Pair` of two denoisers, called one after the other."""
    return lambda x_t, t: (strong(x_t, t), weak(x_t, t))


def noise(
    dice: Sequence[Dice], shape: tuple[int, int, int], scale: float, device: torch.device
) -> Float[Tensor, "b c h w"]:
    """Draw noise (b, *shape) of standard deviation `scale`, the same for every device.

    It is drawn on the CPU while a GPU still works on the previous step, so neither waits.
    """
    return sent(torch.cat([scale * die.normal(*shape) for die in dice]), device)


def begin(
    dice: Sequence[Dice],
    shape: tuple[int, int, int],
    scale: float,
    routed: tread.Config | None,
    patch: int,
    device: torch.device,
) -> tuple[Float[Tensor, "b c h w"], Route | None]:
    """Draw the initial noise, then the route of the weak guess, if any.

    Each picture has its own random stream. The same route is used at all steps.
    """
    start, route = noise(dice, shape, scale, device), None
    if routed is not None:
        kept = [
            tread.draw(routed, one[None], patch, die).kept
            for one, die in zip(start, dice, strict=True)
        ]
        route = Route(routed.start, routed.stop, sent(torch.cat(kept), device))
    return start, route


@torch.no_grad()
def euler(
    denoise: Denoiser,
    start: Float[Tensor, "b c h w"],
    steps: int,
    shift: float,
    anew: Callable[[], Float[Tensor, "b c h w"]] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Integrate from noise (t = 1) to a picture (t = 0); the result is not clamped.

    With `anew`, which draws new noise with the distribution of `start`, the steps are stochastic.
    """
    x = start
    for now, then in pairwise(times(steps, shift)):
        v = flow.velocity(x, denoise(x, now), x.new_full((len(x),), now))
        if anew is None or then == 0:
            x = x - (now - then) * v
        else:
            x = (1 - then) * (x - now * v) + then * anew()
    return x
