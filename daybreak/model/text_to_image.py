"""The whole model: a text encoder and a denoiser.

The optimiser, the average and the checkpoints refer to its trained weights by name. A frozen
encoder is not among them: the recipe names it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from daybreak.model import dit, text, tread


class TextToImage(nn.Module):
    """Text encoder and denoiser, side by side."""

    def __init__(self, encoder: text.TextEncoder, denoiser: dit.DiT) -> None:
        super().__init__()
        self.text, self.dit = encoder, denoiser

    def weights(self) -> dict[str, Tensor]:
        """Return the trained weights by name; the tensors are the parameters' own, not copies."""
        frozen = () if self.text.trained else ("text.",)
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if not name.startswith(frozen)
        }


def build(
    dit_config: dit.Config,
    text_config: text.Config,
    tokenizer: Any = None,
    seed: int = 0,
    compute: torch.dtype = torch.float32,
    route: tread.Config | None = None,
    known: text.Known | None = None,
    frozen: text.TextEncoder | None = None,
) -> TextToImage:
    """Build the model with random weights that depend on the seed alone.

    `tokenizer` is for an encoder that is trained; a frozen encoder has its own, and `known` returns
    captions that are encoded already. `frozen` is a loaded encoder to share. The denoiser needs the
    `route` because SPRINT has weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = (
            text.scratch(text_config, tokenizer, compute)
            if text_config.encoder is None
            else frozen or text.pretrained(text_config, compute, known)
        )
        torch.manual_seed(seed)
        denoiser = dit.DiT(dit_config, encoder.width, compute=compute, route=route)
        return TextToImage(encoder, denoiser)
