"""Flow matching with a network that predicts the clean image.

    x_t = (1 - t) x + t eps                 t = 0 is the image, t = 1 is noise
    v   = (x_t - x) / t = eps - x           the velocity that carries x_t away from x

Loss and sampler both take the velocity from `velocity`, the only function that uses T_MIN: for
t < T_MIN it divides by T_MIN instead of t, so there v is no longer eps - x.

Shapes  image (b, c, h, w); t (b,).     Units  pixels [-1, 1]; t in [0, 1].
Source  x-prediction with a velocity loss: arXiv 2511.13720; the shift: arXiv 2403.03206, sec. 5.3.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from daybreak.train.dice import Dice

T_MIN = 0.05  # bounds 1/t by 20; at a smaller t the noise is invisible
T_FIRST = 1e-3  # the smallest t that is ever drawn


class Config(BaseModel):
    """The distribution of noise levels in training.

    logit(t) ~ N(mean + ln shift, spread^2), but a share `uniform` of the samples draws t from
    U(0, 1), so that no level is too rare. `shift` is also the default of the sampler's time grid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shift: float = Field(default=3.0, gt=0)
    mean: float = 0.0
    spread: float = Field(default=1.0, gt=0)
    uniform: float = Field(default=0.1, ge=0, le=1)
    noise_scale: float = Field(default=1.0, gt=0)


class Noisy(NamedTuple):
    """A noisy image x_t, the network's input, and what it was mixed from."""

    x: Float[Tensor, "b c h w"]
    eps: Float[Tensor, "b c h w"]
    t: Float[Tensor, " b"]
    x_t: Float[Tensor, "b c h w"]


def shifted(t: Tensor, shift: float) -> Tensor:
    """Shift times: t -> s t / (1 + (s - 1) t), which adds ln s to logit(t) (s > 1: more noise).

    1 + (s - 1) t is computed as s t + (1 - t), so that t = 1 gives exactly 1.
    """
    return shift * t / (shift * t + (1 - t))


def draw_time(config: Config, dice: Dice, shift: float | None = None) -> Float[Tensor, " b"]:
    """Draw a noise level per sample, in [T_FIRST, 1 - T_FIRST]; `shift` overrides the config's."""
    gauss, choice, flat = dice.normal(1)[:, 0], *dice.uniform(2).unbind(1)
    shift = config.shift if shift is None else shift
    t = torch.sigmoid(config.mean + math.log(shift) + config.spread * gauss)
    t = torch.where(choice < config.uniform, flat, t)
    return t.clamp(T_FIRST, 1 - T_FIRST)


def draw_noise(config: Config, image: Float[Tensor, "b c h w"], dice: Dice) -> Tensor:
    """Draw eps, with standard deviation `noise_scale` and the shape of the images."""
    return config.noise_scale * dice.normal(*image.shape[1:])


def corrupt(
    x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], eps: Float[Tensor, "b c h w"]
) -> Noisy:
    """Mix image and noise: x_t = (1 - t) x + t eps."""
    level = t.view(-1, 1, 1, 1)
    return Noisy(x, eps, t, (1 - level) * x + level * eps)


def velocity(
    x_t: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """Return the velocity at x_t on the straight path from x: (x_t - x) / max(t, T_MIN).

    Always in float32, whatever the inputs: rounding errors of x are divided by as little as 0.05.
    """
    return (x_t.float() - x.float()) / t.clamp(min=T_MIN).view(-1, 1, 1, 1)
