"""Randomness as a pure function of (seed, step, global sample index).

Every number a training step draws for a picture comes from a generator that belongs to that
picture at that step. A run therefore resumes bit for bit without saving any generator, and the
same pictures get the same noise on one process or on many, in one micro-batch or in ten.

    Dice(seed, step, first, count)      tensors for a slice of the global batch, on its device
    fraction(seed, "crop", epoch, 7)    one number in [0, 1), for choices made by loader workers

Letters: b samples of the slice.
"""

import hashlib
import math

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """Hash the parts to 64 bits, the same on every machine and in every process.

    torch's CPU generator uses only 32 of them, so among a hundred thousand samples about one pair
    shares its noise.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def fraction(*parts: int | str) -> float:
    """Return a number in [0, 1) that depends only on the parts."""
    return (key(*parts) >> 11) / 2**53


class Dice:
    """One generator per sample; each draw stacks one row from each of them.

    The rows of a slice do not depend on how the global batch was cut: the dice of samples 0-7 are
    those of 0-3 followed by those of 4-7. The order of the draws does matter, as with any dice.
    """

    def __init__(
        self, seed: int, step: int, first: int, count: int, device: torch.device | str = "cpu"
    ) -> None:
        self.device, self.first = torch.device(device), first
        self.generators = [
            torch.Generator(self.device).manual_seed(key(seed, step, first + row))
            for row in range(count)
        ]

    def normal(self, *shape: int) -> Tensor:
        """Draw unit Gaussians (b, *shape), float32."""
        rows = torch.empty(len(self.generators), *shape, device=self.device)
        for row, generator in zip(rows, self.generators, strict=True):
            row.normal_(generator=generator)
        return rows

    def uniform(self, *shape: int) -> Tensor:
        """Draw numbers in [0, 1) (b, *shape), float32."""
        rows = torch.empty(len(self.generators), *shape, device=self.device)
        for row, generator in zip(rows, self.generators, strict=True):
            row.uniform_(generator=generator)
        return rows

    def share(self, fraction: float) -> Tensor | slice:
        """Choose rows (k,) so that this share of all samples is chosen, however they are divided.

        If all are chosen the result is a slice, because indexing by numbers would copy, both in the
        forward and in the backward pass.

        Sample g is chosen if an integer lies between g fraction and (g + 1) fraction. No random
        number is drawn, because pictures are in random order already.
        """
        if fraction == 1:
            return slice(None)
        count = len(self.generators)
        passed = [math.floor((self.first + row) * fraction) for row in range(count + 1)]
        rows = [row for row in range(count) if passed[row] < passed[row + 1]]
        chosen = torch.tensor(rows, dtype=torch.long, pin_memory=self.device.type == "cuda")
        return chosen.to(self.device, non_blocking=True)
