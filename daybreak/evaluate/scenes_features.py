"""A small network trained on scenes, whose features are used for distances between scenes.

Networks for photographs are large, and a random network, the usual substitute, does not notice when
one of five shapes is never drawn. This one has 33 thousand weights. It was trained on randomly
degraded renders to predict how many things there are of each shape and colour, where they are, and
the amounts of blur, noise, brightness shift and admixture of another picture. A linear head makes
these predictions from its features: the last layer summed over the picture, unweighted and weighted
by x and by y, so that two things count twice and the size of the canvas does not matter.

    python -m daybreak.evaluate.scenes_features     trains it again, minutes on one core

Its weights are part of the package. Retrained weights give another metric: results are comparable
only if the digest of the weights is the same.

Letters  b pictures, f = 96 features.
Units    pixels [-1, 1]; features of true scenes have a standard deviation of about 1.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from daybreak.data import scenes
from daybreak.data.scenes import CANVASES, Config, Scene
from daybreak.data.scenes_captions import COLOURS, SHAPES

WEIGHTS = Path(__file__).with_suffix(".safetensors")
CHANNELS = (3, 16, 32, 32, 32, 32)
STRIDES = (1, 2, 1, 2, 1)
LARGEST = 64  # side to which larger pictures, whose things are larger too, are reduced

BATCH, STEPS, RATE = 48, 6_000, 6e-3
SEED = 5_306  # of the training scenes
TAUGHT = ("32", "64-large", "32", "64")  # canvases of the training batches, in turn
BLUR, NOISE, SHIFT, MIX = 1.2, 0.16, 0.2, 0.5  # largest amount of each degradation


class Network(nn.Module):
    """Five convolutions, then three weighted sums over the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride)
            for (before, after), stride in zip(pairwise(CHANNELS), STRIDES, strict=True)
        )

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b f"]:
        x = F.avg_pool2d(x, max(1, x.shape[-1] // LARGEST))
        for convolution in self.convolutions:
            x = F.relu(convolution(F.pad(x, (1, 1, 1, 1), mode="replicate")))
        down = torch.linspace(-1, 1, x.shape[-2], device=x.device)[:, None]
        across = torch.linspace(-1, 1, x.shape[-1], device=x.device)
        sums = [(x * weight).sum((-2, -1)) for weight in (torch.ones_like(down), across, down)]
        return torch.cat(sums, 1)


def load() -> Network:
    """Load the trained network."""
    network = Network()
    network.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return network.eval().requires_grad_(False)


def teach(steps: int = STEPS) -> Network:
    """Train the network from scratch; the constants above determine the result, up to rounding."""
    dice = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = Network()
        head = nn.Linear(3 * CHANNELS[-1], len(_answers(_draw("32", 0)[0]).T) + 4)
    many = [scene for step in range(40) for scene in _draw(TAUGHT[step % 4], step)[0]]
    spread = torch.cat((_answers(many).std(0), torch.full((4,), 0.3)))  # scales of the errors
    weights = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for step in range(steps):
        drawn, pictures = _draw(TAUGHT[step % len(TAUGHT)], step)
        image = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        spoiled, how = _spoil(image, dice)
        right = torch.cat((_answers(drawn), how), 1)
        wrong = (head(network(spoiled) / 16) - right) / spread
        counts, spoils = wrong.split((right.shape[1] - 4, 4), 1)
        (counts.square().mean() + spoils.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return network


def _draw(canvas: str, step: int) -> tuple[list[Scene], npt.NDArray[np.uint8]]:
    config = Config.model_validate({"canvas": canvas, "held_out": ()})
    drawn = [scenes.scene(config, SEED, step * BATCH + row) for row in range(BATCH)]
    return drawn, scenes.renders(drawn)


def _answers(drawn: list[Scene]) -> Float[Tensor, "b a"]:
    """For each shape, colour and (shape, colour): the number of things, and sums of x and of y."""
    pairs = np.zeros((len(drawn), 3, len(SHAPES), len(COLOURS)), dtype=np.float32)
    for row, scene in zip(pairs, drawn, strict=True):
        side = CANVASES[scene.canvas].size - 1
        for thing in scene.things:
            place = (1, 2 * thing.x / side - 1, 2 * thing.y / side - 1)
            row[:, SHAPES.index(thing.shape), COLOURS.index(thing.colour)] += place
    parts = (pairs, pairs.sum(2), pairs.sum(3))
    return torch.cat([torch.from_numpy(part).flatten(1) for part in parts], 1)


def _spoil(
    image: Float[Tensor, "b 3 h w"], dice: torch.Generator
) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 4"]]:
    """Blur, mix, add noise and shift brightness; also return the amounts, in [0, 1] or [-1, 1].

    Each degradation is applied to two pictures in five.
    """
    b, channels, height, width = image.shape
    how = torch.rand(b, 4, generator=dice) * (torch.rand(b, 4, generator=dice) < 0.4)
    how[:, 3] *= torch.rand(b, generator=dice).sub(0.5).sign()
    blur, mix, noise, shift = (amount.view(b, 1, 1, 1) for amount in how.unbind(1))

    bell = torch.exp(-0.5 * (torch.arange(-4.0, 5.0) / (BLUR * blur).clamp(min=1e-3)) ** 2)
    kernel = (bell.transpose(2, 3) * bell / bell.sum(-1, keepdim=True) ** 2).expand(-1, 3, -1, -1)
    framed = F.pad(image, (4, 4, 4, 4), mode="replicate").flatten(0, 1)
    soft = F.conv2d(framed, kernel.reshape(-1, 1, 9, 9), groups=b * channels)
    image = soft.view(b, channels, height, width)
    image = torch.lerp(image, image.roll(1, 0), MIX * mix)
    image = image + NOISE * noise * torch.randn(image.shape, generator=dice) + SHIFT * shift
    return image.clamp(-1, 1), how


if __name__ == "__main__":
    half = {name: value.half() for name, value in teach().state_dict().items()}
    save_file(half, WEIGHTS)
