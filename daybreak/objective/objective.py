"""What training minimises.

    x_t = (1 - t) x + t eps,    x_hat = DiT(x_t, t, text)
    L   = mean |v(x_hat) - v(x)|^2,    v(y) = (x_t - y) / max(t, 0.05)

The whole loss of a run stands in `Objective.__call__`; an ingredient adds a line to it.

Letters  b pictures of the micro-batch, c channels.
Source   arXiv 2511.13720, eq. 6 (x-prediction, v-loss).
"""

from jaxtyping import Float
from torch import Tensor

from daybreak.model import flow
from daybreak.model.dit import DiT
from daybreak.model.text import Text
from daybreak.train.dice import Dice


class Objective:
    """The loss of a run, and its parts by name."""

    def __init__(self, flow_config: flow.Config) -> None:
        self.flow = flow_config

    def __call__(
        self, model: DiT, image: Float[Tensor, "b c h w"], text: Text, dice: Dice
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return the loss to minimise and its detached parts; image in [-1, 1], one die a picture.

        The order of the draws (time, then noise) is part of a run's identity.
        """
        t = flow.draw_time(self.flow, dice)
        eps = flow.draw_noise(self.flow, image, dice)
        noisy = flow.corrupt(image, t, eps)

        guess = model(noisy.x_t, t, text)

        miss = flow.velocity(noisy.x_t, guess.x, t) - flow.velocity(noisy.x_t, noisy.x, t)
        loss = miss.square().mean()
        return loss, {"flow": loss.detach()}
