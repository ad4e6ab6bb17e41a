"""Guidance: two denoisers make one that follows its prompt more closely.

    x_hat = weak + scale (strong - weak)

Strong knows the prompt; weak is the same network with the empty prompt (classifier-free guidance).

Source  classifier-free guidance: arXiv 2207.12598; guidance in an interval: arXiv 2404.07724.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from daybreak.generate.sampler import Denoiser


def guided(
    strong: Denoiser, weak: Denoiser, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Denoiser:
    """Extrapolate from `weak` through `strong`; outside the interval of t use `strong` alone.

    A scale of 1 is `strong` alone everywhere, and costs one pass instead of two.
    """
    if scale == 1.0:
        return strong

    def denoise(x_t: Float[Tensor, "b c h w"], t: float) -> Float[Tensor, "b c h w"]:
        guess = strong(x_t, t)
        if interval[0] <= t <= interval[1]:
            return torch.lerp(weak(x_t, t), guess, scale)
        return guess

    return denoise
