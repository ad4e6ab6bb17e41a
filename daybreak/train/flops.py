"""How much arithmetic a step takes: counted from shapes, as a profiler would count products.

    a block, forward    2 n (4 h^2 + 3 h m) + 4 l h^2 + 4 h n (n + l) + 12 h^2
                        image tokens, words, attention, modulation
    training            3 times that: each forward product has two in the backward pass

Only products count; all else is memory traffic. A layer whose input needs no gradient costs one
product less, and so does one that does not learn. Captions are assumed to be as long as the recipe
allows, and pictures as large as the stage's square: real ones are a little smaller.

Letters  n image tokens, l words, h width, m width of the MLP.
Units    FLOP; a multiplication and its addition are two.
"""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from daybreak.config import Recipe, Stage
from daybreak.model import dit, tread
from daybreak.objective import dino, lpips, repa
from daybreak.optim import groups, polar_express
from daybreak.train import networks
from daybreak.train.networks import CHANNELS, Network

VGG = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions of each depth


class Work(NamedTuple):
    """FLOPs by part: for each picture of a stage, and for each step, whatever its batch."""

    picture: dict[str, float]
    step: dict[str, float]


def work(recipe: Recipe, stage: Stage, cached: bool = False) -> Work:
    """Count the FLOPs of a stage; with `cached` words a frozen encoder does not run.

    Errors  BadRecipe for a network of unknown size.
    """
    n, words = tokens(recipe, stage), recipe.text.max_tokens
    encoder, learns = text_encoder(recipe), recipe.text.encoder is None
    again = recipe.parallel.recompute
    walk = route(recipe, stage)
    picture = {
        "denoiser": denoiser(recipe.dit, n, words, encoder.width, walk, learns, again),
        "text encoder": encoder.forward(words) * (3 if learns else 0 if cached else 1),
        **terms(recipe, stage),
    }
    matrices = [weight for weight, learner in learned(recipe) if learner == "muon"]
    muon = orthogonalisation(matrices, recipe.muon) if recipe.muon else 0.0
    return Work(picture, {"muon": muon} if muon else {})


def of_step(recipe: Recipe, stage: Stage, cached: bool = False, replicas: int = 1) -> float:
    """Count a whole step: all pictures of its batch, and the optimiser once for each replica.

    Errors  as `work`.
    """
    counted = work(recipe, stage, cached)
    return stage.batch * sum(counted.picture.values()) + replicas * sum(counted.step.values())


def as_read(recipe: Recipe, words: int) -> Recipe:
    """The recipe with captions of `words` words, as in a batch, instead of the longest allowed."""
    return recipe.model_copy(update={"text": recipe.text.model_copy(update={"max_tokens": words})})


def denoiser(
    size: dit.Config,
    n: int,
    l: int,  # noqa: E741
    context: int,
    route: tread.Config | None = None,
    words_learn: bool = False,
    recompute: bool = False,
) -> float:
    """FLOPs of the denoiser for one picture, forward (with `recompute` twice) and backward."""
    h, pixels, b = size.width, CHANNELS * size.patch**2, size.bottleneck
    routed = route.stop - route.start if route else 0
    walking = routed * block(size, visible(route, n), l)
    blocks = (size.depth - routed) * block(size, n, l) + walking
    patches = linear(n, pixels, b, back=1) + linear(n, b, h) if b else linear(n, pixels, h, back=1)
    time = linear(1, dit.FEATURES, h, back=1) + linear(1, h, h)
    words = linear(l, context, h, back=2 if words_learn else 1)
    last = linear(n, h, pixels) + linear(1, h, 2 * h)
    fusion = linear(n, 2 * h, h) if route and route.kind == "sprint" else 0
    return (4 if recompute else 3) * blocks + patches + time + words + last + fusion


def block(size: dit.Config, n: int, l: int) -> float:  # noqa: E741
    """FLOPs of one block for one picture, forward."""
    h, m = size.width, size.mlp_width
    return 2 * n * (4 * h**2 + 3 * h * m) + 4 * l * h**2 + 4 * h * n * (n + l) + 12 * h**2


def linear(rows: int, inputs: int, outputs: int, back: int = 2) -> float:
    """FLOPs of a linear map, forward, and of `back` of its two gradients."""
    return 2 * rows * inputs * outputs * (1 + back)


def terms(recipe: Recipe, stage: Stage) -> dict[str, float]:
    """FLOPs of the loss terms other than the flow, for one picture, forward and backward."""
    n = tokens(recipe, stage)
    views, share = teachers(recipe, stage), 0.0
    found = {}
    if recipe.repa and active(recipe, stage, "repa"):
        teacher = views["repa"].network.forward(n) if "repa" in views else elder(recipe, n)
        share = before(recipe, stage, recipe.repa.until)
        found["repa"] = share * (projectors(recipe, stage) + teacher)
    if recipe.lpips and active(recipe, stage, "lpips"):
        side = max(lpips.SMALLEST, round(stage.resolution * recipe.lpips.resize))
        # The true picture forward, the guess forward and backward.
        found["lpips"] = recipe.lpips.fraction * 3 * vgg(recipe.lpips, side)
    if "dino" in views:
        assert recipe.dino
        network, patches = views["dino"]
        # While REPA is active, both terms share one forward pass of the true picture.
        shared = share if views["dino"] == views.get("repa") else 0
        truth = (1 - shared) * network.forward(patches)
        guess = network.forward(patches) + network.back(patches)
        found["dino"] = recipe.dino.fraction * (truth + guess)
    return found


class View(NamedTuple):
    """A teacher, and how many patches of a picture it sees."""

    network: Network
    patches: int


def teachers(recipe: Recipe, stage: Stage) -> dict[str, View]:
    """The frozen transformers of a stage, by the section that uses them."""
    side = stage.resolution // recipe.dit.patch
    found = {}
    if recipe.repa and recipe.repa.network and active(recipe, stage, "repa"):
        found["repa"] = View(networks.named(recipe.repa.network, "repa.teacher"), side**2)
    if recipe.dino and active(recipe, stage, "dino"):
        rows, columns = dino.grid(recipe.dino, side, side)
        found["dino"] = View(networks.named(recipe.dino.teacher, "dino.teacher"), rows * columns)
    return found


def projectors(recipe: Recipe, stage: Stage) -> float:
    """FLOPs of REPA's projectors: each sees the tokens that its block saw."""
    assert recipe.repa
    h, d, total = recipe.dit.width, target(recipe), 0.0
    for number in recipe.repa.blocks:
        k = walking(recipe, stage, number)
        if recipe.repa.projector == "conv":
            total += linear(k, 9 * h, d)
        else:
            total += linear(k, h, d) + 2 * linear(k, d, d)
    return total


def target(recipe: Recipe) -> int:
    """Width of the features that REPA's projectors aim at."""
    assert recipe.repa
    if recipe.repa.network is None:
        return recipe.dit.width
    return networks.named(recipe.repa.network, "repa.teacher").width


def elder(recipe: Recipe, n: int) -> float:
    """FLOPs of the averaged model as a teacher: forward, with every token, words included."""
    words, encoder = recipe.text.max_tokens, text_encoder(recipe)
    learns = recipe.text.encoder is None
    whole = denoiser(recipe.dit, n, words, encoder.width, words_learn=True) / 3
    return whole + (encoder.forward(words) if learns else 0)


def vgg(config: lpips.Config, side: int) -> float:
    """FLOPs of VGG-16's convolutions for one square picture, forward."""
    total, inputs = 0.0, CHANNELS
    for channels, convolutions in vgg_depths(config):
        for _ in range(convolutions):
            total += 2 * 9 * inputs * channels * side**2
            inputs = channels
        side //= 2
    return total


@lru_cache
def vgg_depths(config: lpips.Config) -> tuple[tuple[int, int], ...]:
    """Channels and convolutions of each depth: VGG-16's, or those of the files in [lpips]."""
    if not all(file and Path(file).is_file() for file in (config.vgg, config.heads)):
        return VGG
    return tuple((len(depth[0][0]), len(depth)) for depth in lpips.load(config).depths)


def orthogonalisation(matrices: Iterable[torch.Size], muon: groups.MuonConfig) -> float:
    """FLOPs to make matrices orthogonal once.

    A round takes 4 r^2 c + 2 r^3, where r is the shorter side and c the longer; two rounds done at
    once take 4 r^2 c + 10 r^3 together.
    """
    total, rounds = 0, len(polar_express.NAMED[muon.rounds])
    for shape in matrices:
        r, c = sorted(shape)
        pairs, single = polar_express.pairing(shape, rounds)
        total += pairs * (4 * r * r * c + 10 * r**3) + single * (4 * r * r * c + 2 * r**3)
    return float(total)


@lru_cache
def learned(recipe: Recipe) -> list[tuple[torch.Size, str]]:
    """Shape of every weight that learns, and whether `muon` or `adamw` updates it."""
    encoder = text_encoder(recipe)
    with torch.device("meta"):
        model = dit.DiT(recipe.dit, encoder.width, route=recipe.tread)
    shapes = []
    for name, weight in model.named_parameters():
        mine = groups.is_muon(f"dit.{name}", weight, recipe.muon)
        shapes.append((weight.shape, "muon" if mine else "adamw"))
    if recipe.text.encoder is None:
        owner = "muon" if recipe.muon else "adamw"
        matrices = [shape for n in range(encoder.layers) for shape in _layer(encoder, n)]
        shapes += [(shape, owner) for shape in matrices]
        rest = encoder.weights - sum(shape.numel() for shape in matrices)
        shapes.append((torch.Size([rest]), "adamw"))
    if recipe.repa:
        with torch.device("meta"):
            head = repa.Repa(recipe.repa, recipe.dit.width, target(recipe))
        shapes += [(weight.shape, "adamw") for weight in head.parameters()]
    return shapes


def _layer(encoder: Network, number: int) -> list[torch.Size]:
    """Matrices in a layer of the small LFM2: convolution or attention, then the MLP."""
    width, mlp = encoder.width, encoder.mlp
    mixing = [(width, width)] * 4 if number % 2 else [(3 * width, width), (width, width)]
    return [torch.Size(shape) for shape in [*mixing, (mlp, width), (mlp, width), (width, mlp)]]


def text_encoder(recipe: Recipe) -> Network:
    """The encoder that the recipe names, or the small LFM2 that is trained from scratch."""
    if recipe.text.encoder is not None:
        whole = networks.named(recipe.text.encoder, "text.encoder")
        return whole._replace(layers=whole.layers - recipe.text.skip)
    width = recipe.text.width
    return Network(
        recipe.text.depth, width, width, width, 2 * width, True, vocabulary=recipe.text.vocabulary
    )


def tokens(recipe: Recipe, stage: Stage) -> int:
    """Image tokens of a square picture."""
    return (stage.resolution // recipe.dit.patch) ** 2


def route(recipe: Recipe, stage: Stage) -> tread.Config | None:
    """The route of a stage, if there is one."""
    return recipe.tread if active(recipe, stage, "tread") else None


def active(recipe: Recipe, stage: Stage, section: str) -> bool:
    """Whether the recipe has this section and the stage does not leave it out."""
    return getattr(recipe, section) is not None and section not in stage.without


def before(recipe: Recipe, stage: Stage, until: int | None) -> float:
    """Share of a stage's steps that come before a step of the run."""
    if until is None:
        return 1.0
    starts = zip(recipe.stage, recipe.starts, strict=True)
    start = next(start for row, start in starts if row is stage)
    return min(1.0, max(0.0, (until - start) / stage.count))


def walking(recipe: Recipe, stage: Stage, block: int) -> int:
    """Image tokens that a block processes."""
    walk = route(recipe, stage)
    inside = walk is not None and walk.start <= block < walk.stop
    return visible(walk if inside else None, tokens(recipe, stage))


def visible(route: tread.Config | None, n: int) -> int:
    """Image tokens that the blocks of a route process; without a route, all of them."""
    return max(1, n - round(n * route.carried)) if route else n
