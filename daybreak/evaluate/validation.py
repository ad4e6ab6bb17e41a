"""Validation loss: the network's error on pictures it was not trained on, by noise level.

    x_t = (1 - t) x + t eps,    x_hat = DiT(x_t, t, text)
    image error     mean (x_hat - x)^2
    velocity error  mean (v(x_hat) - v(x))^2,    v(y) = (x_t - y) / max(t, 0.05)

Every picture is evaluated once in each bin of t; t and noise depend only on seed, bin and the
picture's number. Two networks, or one network at two steps, therefore get the same inputs; no
random generator of a run is used; and the pictures can be divided among processes in any way.

Drawing t as in training would be inefficient: under a shifted logit-normal one sample in a hundred
has t < 0.1, and those carry half of the loss. Here each bin is covered evenly, and the total
velocity error is the integral over t.

Letters  n pictures, k bins, c channels.
Units    pixels [-1, 1].
Source   a validation loss at evenly spaced t as the target of a benchmark: MLPerf's FLUX.1.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from daybreak.model import flow
from daybreak.model.text_to_image import TextToImage
from daybreak.train.dice import Dice

EDGES = (0.0, 0.3, 0.6, 1.0)  # edges of the bins of t
BINS = tuple(f"{low:.1f}-{high:.1f}" for low, high in pairwise(EDGES))
NAMES = ("loss", *(f"{error} {at}" for error in ("velocity", "image") for at in BINS))
GOLDEN = (math.sqrt(5) - 1) / 2  # any number of its multiples modulo 1 covers [0, 1) evenly
SEED_RULE = "level and noise of picture i in a bin of t are those of seed, bin and i"

Floats = npt.NDArray[np.float64]


class Errors(NamedTuple):
    """Mean squared errors of each picture in each bin of t, (n, k)."""

    image: Floats
    velocity: Floats


def errors(
    model: TextToImage,
    image: Float[Tensor, "n c h w"],
    captions: Sequence[str],
    noise_scale: float = 1.0,
    seed: int = 0,
    first: int = 0,
) -> Errors:
    """The errors of a batch of pictures, numbered from `first` on.

    Rows of several batches can be concatenated in any order. `noise_scale` is that with which the
    network was trained.

    Errors  ValueError unless there are as many captions as pictures.
    """
    if len(image) != len(captions):
        raise ValueError(f"{len(image)} pictures and {len(captions)} captions")
    device = next(model.dit.parameters()).device
    x = image.to(device, torch.float32)
    found = Errors(*(np.zeros((len(x), len(EDGES) - 1)) for _ in range(2)))
    with torch.no_grad():
        words = model.text(captions)
        for number in range(len(EDGES) - 1):
            t = level(number, first, len(x), seed).to(device)
            # Training steps are positive, so this noise is never one of training.
            dice = Dice(seed, -1 - number, first, len(x))
            eps = (noise_scale * dice.normal(*x.shape[1:])).to(device)
            noisy = flow.corrupt(x, t, eps)
            guess = model.dit(noisy.x_t, noisy.t, words).x.float()
            miss = flow.velocity(noisy.x_t, guess, noisy.t)
            miss = miss - flow.velocity(noisy.x_t, x, noisy.t)
            found.image[:, number] = (guess - x).square().mean((1, 2, 3)).cpu()
            found.velocity[:, number] = miss.square().mean((1, 2, 3)).cpu()
    return found


def level(number: int, first: int, count: int, seed: int = 0) -> Float[Tensor, " b"]:
    """The noise levels of bin `number` for `count` pictures from `first` on, at least T_FIRST."""
    low, high = EDGES[number], EDGES[number + 1]
    start = float(Dice(seed, -1 - number, -1, 1).uniform(1))
    turns = torch.arange(first, first + count, dtype=torch.float64) * GOLDEN + start
    return (low + (high - low) * (turns % 1)).clamp(min=flow.T_FIRST).float()


def by_name(errors: Errors) -> dict[str, Floats]:
    """The contribution of each picture to each value, (n,); a value is the mean over pictures.

    `loss` is the velocity error over all t in [0, 1]: each bin is weighted by its width.
    """
    columns = (errors.velocity @ np.diff(EDGES), *errors.velocity.T, *errors.image.T)
    return dict(zip(NAMES, columns, strict=True))
