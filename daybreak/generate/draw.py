"""Prompts and seeds to pictures.

Each picture's noise comes from its own seed, so a picture does not depend on the rest of its batch.
Pictures are rounded to uint8, and the same bytes are shown and scored.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from daybreak.generate import sampler
from daybreak.generate.guidance import guided
from daybreak.model import flow, tread
from daybreak.model.text import Text
from daybreak.model.text_to_image import TextToImage
from daybreak.train.dice import Dice

Picture = npt.NDArray[np.uint8]


def to_bytes(image: Float[Tensor, "b c h w"]) -> Picture:
    """Convert pictures in [-1, 1] to uint8 (b, h, w, c), rounded; values outside are clipped."""
    pixels = image.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    array: Picture = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return array


def draw(
    model: TextToImage,
    prompts: Sequence[str],
    seeds: Sequence[int],
    height: int,
    width: int,
    how: sampler.Config,
    flow_config: flow.Config,
    routed: tread.Config | None = None,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Picture:
    """Return one picture per prompt, uint8 (n, height, width, 3).

    `batch` pictures go through the network at once, or half as many when it predicts both with and
    without prompt. `routed` is the recipe's [tread], which self-guidance needs. `progress` is
    called after each batch with its number of pictures.

    Errors  ValueError for self-guidance without a route, or if prompts and seeds differ in number.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds: each picture has its own")
    by_route = how.guide == "self"
    if by_route and routed is None:
        raise ValueError("self-guidance sets the network against itself on a route; none is given")
    device = next(model.dit.parameters()).device
    shift = sampler.shift(how, flow_config)
    shape = (model.dit.channels, height, width)
    twice = how.guidance > 1 and not by_route
    batch = max(1, batch // 2) if twice else batch
    parts = []
    with torch.no_grad():
        for first in range(0, len(prompts), batch):
            some = slice(first, first + batch)
            dice = [Dice(seed, 0, 0, 1) for seed in seeds[some]]
            words = model.text([*prompts[some], *[""] * (len(dice) * twice)])
            anew = partial(sampler.noise, dice, shape, flow_config.noise_scale, device)
            start, route = sampler.begin(
                dice,
                shape,
                flow_config.noise_scale,
                routed if by_route else None,
                model.dit.config.patch,
                device,
            )
            strong = sampler.denoiser(model.dit, Text(*(each[: len(dice)] for each in words)))
            other = sampler.denoiser(model.dit, words, route)
            both = sampler.in_one(other) if twice else sampler.in_turn(strong, other)
            denoise = guided(strong, both, how.guidance, how.interval, how.apg)
            image = sampler.euler(
                denoise, start, how.steps, shift, anew if how.stochastic else None
            )
            parts.append(to_bytes(image))
            if progress is not None:
                progress(len(start))
    return np.concatenate(parts)
