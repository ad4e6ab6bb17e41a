"""An exponential moving average of the weights: the model that is sampled, scored and exported.

    w <- w + (1 - d_k) (theta - w),    d_k = min(decay, (1 + k) / (10 + k))

k counts updates. With the ramp the average forgets its random initial weights quickly, so that the
same settings serve a run of minutes and one of days. Without `ramp` the first update copies the
weights and later ones use the full decay.

Source  ramp: the `num_updates` rule of TensorFlow's ExponentialMovingAverage.
"""

from typing import Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class Config(BaseModel):
    """`decay` per update, with or without `ramp`, and how many steps lie between two updates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decay: float = Field(default=0.999, ge=0, lt=1)
    every: int = Field(default=1, gt=0)
    ramp: bool = True


class Ema(Generic[Model]):
    """A copy of the model whose weights are the average of the model's."""

    def __init__(self, twin: Model, config: Config) -> None:
        self.model: Model = twin.eval().requires_grad_(False)
        self.config = config
        self._followed: tuple[nn.Module, list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average if `step` (counted from 1) is a multiple of `every`."""
        if step % self.config.every:
            return
        count = step // self.config.every
        decay = self.config.decay
        if self.config.ramp:
            decay = min(decay, (1 + count) / (10 + count))
        elif count == 1:
            decay = 0.0
        mine, theirs = self._pairs(model)
        torch._foreach_lerp_(mine, theirs, 1 - decay)

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Return the averaged weights and the model's, in the same order.

        The lists are kept: going through all modules takes longer than the update itself.
        """
        if self._followed is None or self._followed[0] is not model:
            both = zip(self.model.parameters(), model.parameters(), strict=True)
            pairs = [pair for pair in both if pair[1].requires_grad]  # the rest is the same in both
            self._followed = model, [mine for mine, _ in pairs], [theirs for _, theirs in pairs]
        return self._followed[1:]
