"""Guidance: two denoisers are combined into one that follows its prompt more closely.

    x_hat = weak + scale (strong - weak)

Strong is the whole network with the prompt. Weak is the same network, either with the empty prompt
(classifier-free guidance: one pass for both, since only the text differs) or with the prompt but
with a part of the tokens skipping blocks, on the route it was trained with (self-guidance).

With `apg` (adaptive projected guidance) momentum over earlier steps is added to the difference, its
norm is bounded, and its part along the strong guess, which oversaturates colours, is removed; then
it is scaled. The momentum m is stored before its norm is bounded.

    m     <- (strong - weak) + momentum m,     d = m min(1, norm / rms(m))
    x_hat  = strong + (scale - 1) (d - (1 - eta) <d, strong> strong / |strong|^2)

Source  classifier-free guidance: arXiv 2207.12598; an interval: arXiv 2404.07724; self-guidance by
        routed tokens: arXiv 2601.01608; APG: arXiv 2410.02416, algorithm 1.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from daybreak.generate.sampler import Apg, Denoiser, Pair


def guided(
    strong: Denoiser,
    both: Pair,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    apg: Apg | None = None,
) -> Denoiser:
    """Return a denoiser that extrapolates from the weak guess through the strong one.

    `both` returns the two guesses. Outside the interval of t, and everywhere if scale is 1, only
    `strong` is called, at half the cost. With momentum the denoiser has state: make a new one for
    each trajectory.
    """
    if scale == 1.0:
        return strong
    memory: list[Tensor] = []

    def denoise(x_t: Float[Tensor, "b c h w"], t: float) -> Float[Tensor, "b c h w"]:
        if not interval[0] <= t <= interval[1]:
            return strong(x_t, t)
        guess, weak = both(x_t, t)
        if apg is None:
            return torch.lerp(weak, guess, scale)
        difference = guess - weak
        if memory:
            difference = difference + apg.momentum * memory.pop()
        memory.append(difference)
        return guess + (scale - 1) * projected(difference, guess, apg)

    return denoise


def projected(
    difference: Float[Tensor, "b c h w"], guess: Float[Tensor, "b c h w"], apg: Apg
) -> Float[Tensor, "b c h w"]:
    """Bound each difference's RMS by `norm` and remove (1 - eta) of its part along the guess."""
    d, along = difference.flatten(1), guess.flatten(1)
    if apg.norm is not None:
        rms = d.square().mean(1, keepdim=True).sqrt()
        d = d * (apg.norm / rms).clamp(max=1)
    length = along.square().sum(1, keepdim=True).clamp(min=1e-12)  # an untrained guess is zero
    share = (d * along).sum(1, keepdim=True) / length
    return (d - (1 - apg.eta) * share * along).view_as(difference)
