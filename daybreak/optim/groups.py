"""Which weight learns with which optimiser, and how fast.

    matrices of the blocks, except the modulation, and of the encoder's layers      Muon
    everything else                                                                 AdamW

Muon's step is scaled to the size of an AdamW step (RMS 0.2 times the rate), so one learning rate
serves both; `rate` in `[muon]` or `[adamw]` multiplies it for that group. Modulation matrices stay
with AdamW unless the recipe says otherwise: they begin at zero, where an orthogonal step is as long
as anywhere else.

Source  kellerjordan.github.io/posts/muon; scale 0.2 sqrt(max(rows, columns)): arXiv 2502.16982.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from daybreak.optim import polar_express

LAYERS = ("dit.blocks.", "text.encoder.layers.")  # of the denoiser, and of the words


class MuonConfig(BaseModel):
    """Momentum, made orthogonal; for matrices of blocks, with those of `modulation` or not.

    `rounds` names the products that do it: four of Polar Express, or the first Muon's five.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    rounds: Literal["polar-express", "newton-schulz"] = "polar-express"
    modulation: bool = False
    weight_decay: float = Field(default=0.0, ge=0)


class AdamWConfig(BaseModel):
    """For vectors, embeddings, modulation, the first and last layers, projectors."""

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
    """Share the trained weights out; without `muon` AdamW has them all.

    `learned` is what terms of the loss train beside the model; it goes to AdamW, after the rest.
    `precision` is the one in which Muon makes its matrices orthogonal.

    Returns, by name, each optimiser and the factor that multiplies the stage's learning rate.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if is_muon(name, p, muon)]
    taken = {id(p) for p in matrices}
    rest = [p for _, p in trained if id(p) not in taken]
    rest += list(learned.parameters()) if learned is not None else []
    shared: dict[str, tuple[Optimizer, float]] = {}
    if muon and matrices:  # first: a GPU is busy with it while AdamW's small tensors are queued
        # Sharded tensors take a third of a second to import; reading a recipe needs none.
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
    """Give every optimiser the learning rate of this step."""
    for optimizer, factor in shared.values():
        for group in optimizer.param_groups:
            group["lr"] = rate * factor


def step(shared: dict[str, tuple[Optimizer, float]], refused: Float[Tensor, ""]) -> None:
    """Let every optimiser take its step, unless it is `refused` (1): then nothing changes.

    A processor looks first. Any other device is told, and decides when it gets there: a host that
    looked would stand still until the backward pass is done, with nothing queued behind it.
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

    Linear over `warmup` steps, constant, then linear towards zero over the last `cooldown` share.
    Source: warm-up, stable, decay (WSD), arXiv 2404.06395.
    """
    rise = min(1.0, step / max(1, warmup))
    fall = min(1.0, (steps + 1 - step) / (cooldown * steps)) if cooldown else 1.0
    return min(rise, fall)
