"""Contrastive flow matching: the predicted velocity is pushed away from another picture's.

    - mean |v_hat - v'|^2                   v' is the true velocity of the neighbour

Neighbours are the pairs 2i and 2i + 1 of the global batch, which stay together however the batch is
split into ranks and micro-batches. (The paper rolls the batch by one, whose result depends on the
split.) A picture without a caption is not pushed: it should learn what all pictures have in common.

Letters  b pictures, an even number.
Source   arXiv 2506.05350.
"""

from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class Config(BaseModel):
    """Weight of the term. With 1 or more the loss would have no lower bound."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(default=0.05, gt=0, lt=1)


def term(
    guess: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"], captioned: Bool[Tensor, " b"]
) -> Float[Tensor, ""]:
    """Return minus the mean squared distance of predictions to their neighbours' true velocities.

    Errors  RuntimeError for an odd number of pictures.
    """
    neighbour = truth.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    apart = (guess - neighbour).square().mean((1, 2, 3))
    return -(apart * captioned).mean()
