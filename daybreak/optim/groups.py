"""Which optimiser trains which weight, and at which learning rate.

    matrices of the blocks, except the modulation, and of the encoder's layers      Muon
    everything else                                                                 AdamW

Muon's step is scaled to the size of an AdamW step (RMS 0.2 times the learning rate), so one rate
serves both; `rate` in `[muon]` or `[adamw]` multiplies it for that group. Modulation matrices are
trained by AdamW unless the recipe says otherwise: they start at zero, where a step of Muon is as
large as anywhere else.

Source  kellerjordan.github.io/posts/muon; scale 0.2 sqrt(max(rows, columns)): arXiv 2502.16982.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from daybreak.optim import polar_express

LAYERS = ("dit.blocks.", "text.encoder.layers.")  # of the denoiser and of the text encoder


class MuonConfig(BaseModel):
    """Orthogonalised momentum, for matrices of blocks; `modulation` includes the modulation's.

    `rounds` names the orthogonalisation: four rounds of Polar Express, or five of Newton-Schulz.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    rounds: Literal["polar-express", "newton-schulz"] = "polar-express"
    modulation: bool = False
    weight_decay: float = Field(default=0.0, ge=0)


class AdamWConfig(BaseModel):
    """AdamW for vectors, embeddings, modulation, first and last layers, and projectors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: float = Field(default=1.0, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


def is_muon(name: str, parameter: nn.Parameter, muon: MuonConfig | None) -> bool:
    """Tell whether a weight of this name and shape belongs to Muon."""
    if muon is None or parameter.ndim != 2 or not any(place in name for place in LAYERS):
        return False
    return muon.modulation or "modulation" not in name


def optimizers(
    model: nn.Module,
    muon: MuonConfig | None,
    adamw: AdamWConfig,
    learned: nn.Module | None = None,
    precision: torch.dtype = torch.bfloat16,
) -> dict[str, tuple[Optimizer, float]]:
    """Assign the trained weights to optimisers; without `muon`, AdamW trains them all.

    `learned` holds the trained weights of the loss (REPA's projectors); they follow the model's in
    AdamW. `precision` is that of Muon's orthogonalisation.

    Returns, by name, each optimiser and the factor that multiplies the stage's learning rate.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if is_muon(name, p, muon)]
    taken = {id(p) for p in matrices}
    rest = [p for _, p in trained if id(p) not in taken]
    rest += list(learned.parameters()) if learned is not None else []
    shared: dict[str, tuple[Optimizer, float]] = {}
    if muon and matrices:  # Muon first: a GPU works on it while the host queues AdamW's kernels
        # The import takes a third of a second (DTensor), which reading a recipe should not.
        from daybreak.optim.muon import Muon

        shared["muon"] = (
            Muon(
                matrices,
                lr=0.0,
                momentum=muon.momentum,
                weight_decay=muon.weight_decay,
                precision=precision,
                rounds=polar_express.NAMED[muon.rounds],
            ),
            muon.rate,
        )
    shared["adamw"] = (
        AdamW(
            rest,
            lr=0.0,
            betas=adamw.betas,
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
            fused=True,
        ),
        adamw.rate,
    )
    return shared


def set_rate(shared: dict[str, tuple[Optimizer, float]], rate: float) -> None:
    """Set the learning rate of this step in every optimiser."""
    for optimizer, factor in shared.values():
        for group in optimizer.param_groups:
            group["lr"] = rate * factor


def step(shared: dict[str, tuple[Optimizer, float]], refused: Float[Tensor, ""]) -> None:
    """Take the step of every optimiser, unless `refused` is 1: then nothing changes.

    On a CPU the value is read first. On other devices the optimisers' kernels read it: a host that
    read it would wait until the backward pass is done, with no further work queued.
    """
    if refused.device.type == "cpu":
        if refused:
            return
    else:
        for optimizer, _ in shared.values():
            optimizer.found_inf = refused  # type: ignore[attr-defined]  # torch's name for that
    for optimizer, _ in shared.values():
        optimizer.step()


def schedule(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Return the factor on a stage's learning rate at `step` (counted from 1).

    Linear rise over `warmup` steps, constant, then linear fall towards zero over the last share
    `cooldown` of the steps.
    Source: warm-up, stable, decay (WSD), arXiv 2404.06395.
    """
    rise = min(1.0, step / max(1, warmup))
    fall = min(1.0, (steps + 1 - step) / (cooldown * steps)) if cooldown else 1.0
    return min(rise, fall)
