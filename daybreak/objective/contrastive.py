"""Contrastive flow matching: the guessed velocity keeps away from another picture's.

    - mean |v_hat - v'|^2                   v' is the true velocity of the neighbour

Pictures are neighbours in pairs, 2i with 2i + 1 of the global batch, so that a pair stays together
however the batch is cut (the paper rolls the batch by one, which no cut leaves alone). A picture
without a caption keeps away from nothing: it is to learn what all pictures have in common.

Letters  b pictures, an even number.
Source   arXiv 2506.05350.
"""

from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class Config(BaseModel):
    """How strongly a guess is repelled. From 1 on the loss would have no lower bound."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(default=0.05, gt=0, lt=1)


def term(
    guess: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"], captioned: Bool[Tensor, " b"]
) -> Float[Tensor, ""]:
    """Return minus the mean squared distance of guessed velocities to their neighbours' true ones.

    Errors  RuntimeError for an odd number of pictures.
    """
    neighbour = truth.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    apart = (guess - neighbour).square().mean((1, 2, 3))
    return -(apart * captioned).mean()
