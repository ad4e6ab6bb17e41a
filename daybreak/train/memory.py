"""What lies in the memory of one device when a step is at its fullest.

    weights, gradients, optimiser, average      float32, cut into as many parts as the mesh says
    copies       of the weights in the precision of the blocks; the backward pass wants them again
    activations  what else it wants again, for each picture of a pass
    pictures     image, noise, their mixture, the guess
    teachers     networks that are frozen
    workspace    of what is under way

That is one of two moments. Where the backward pass begins, activations are complete, and there are
gradients if an earlier pass of the step has left them; the workspace is the gradients of one
block's activations. As it goes back the first become fewer and the second more. Then, in the
optimisers' step, gradients are complete and nothing is left of the pass; the workspace is what
makes matrices orthogonal.

A compiled block keeps what goes into a product and what comes out of one, and computes the rest
again: `compiled`. What an eager one keeps is asked of autograd itself: `eager`.

Letters  n image tokens, l words, h width, m width of the MLP, a heads, c bytes of a number.
Units    bytes, on one device.
"""

import math
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from daybreak.config import Recipe, Stage
from daybreak.model import dit
from daybreak.model.text import Text
from daybreak.objective import lpips
from daybreak.optim.polar_express import pairing
from daybreak.train import flops, parallel
from daybreak.train.hardware import PER_NODE
from daybreak.train.networks import CHANNELS, Network

FULL = 4  # bytes of a float32
PICTURES = 4  # of a picture: itself, its noise, their mixture, the guess


class Mesh(NamedTuple):
    """How devices share weights: `shard` of them hold a weight together, `replicate` times over."""

    replicate: int
    shard: int

    @property
    def devices(self) -> int:
        """How many they are."""
        return self.replicate * self.shard


class Saved(NamedTuple):
    """What the backward pass wants again: for each picture of a pass, and once for all of them."""

    each: float
    once: float

    def __add__(self, other: object) -> "Saved":
        """Both together."""
        assert isinstance(other, Saved)
        return Saved(self.each + other.each, self.once + other.once)

    def times(self, count: int) -> "Saved":
        """So many of them."""
        return Saved(count * self.each, count * self.once)


def mesh_for(count: int) -> Mesh:
    """Cut weights among the devices of a node and copy them across nodes."""
    shard = count if count <= PER_NODE else math.gcd(count, PER_NODE)
    return Mesh(count // shard, shard)


def parts(
    recipe: Recipe, stage: Stage, mesh: Mesh, pictures: int, dtype: torch.dtype, kind: str
) -> dict[str, float]:
    """Bytes by part, for passes of so many pictures on a `cpu` or a `cuda` device.

    Of the two moments it is the one at which they are more.
    """
    learned = flops.learned(recipe)
    weights = FULL * sum(shape.numel() for shape, _ in learned)
    matrices = [shape for shape, learner in learned if learner == "muon"]
    state = 2 * weights - FULL * sum(shape.numel() for shape in matrices)
    saved = activations(recipe, stage, dtype, kind)
    n, words = flops.tokens(recipe, stage), recipe.text.max_tokens
    gathered = dtype.itemsize / FULL * weights
    if recipe.parallel.reshard_after_forward:
        gathered = min(gathered, parallel.TOGETHER * gathered / recipe.dit.depth)
    several = stage.batch // mesh.devices > pictures  # passes of a step: the gradients wait whole
    always = {
        "weights": weights / mesh.shard,
        "optimiser": state / mesh.shard,
        "average": weights / mesh.shard,
        "teachers": dtype.itemsize * frozen(recipe),
    }
    back = {
        "gradients": weights if several else 0.0,
        "copies": max(saved.once, gathered if mesh.shard > 1 else 0),
        "activations": pictures * saved.each,
        "pictures": pictures * PICTURES * FULL * CHANNELS * stage.resolution**2,
        "workspace": pictures * compiled(recipe.dit, n, words, dtype, kind).each,
    }
    step = dict.fromkeys(back, 0.0) | {
        "gradients": weights / mesh.shard,
        "workspace": orthogonalising(matrices, mesh, dtype),
    }
    return always | max(back, step, key=lambda moment: sum(moment.values()))


def orthogonalising(matrices: Iterable[torch.Size], mesh: Mesh, dtype: torch.dtype) -> float:
    """What Muon's step needs beside its state.

    One device takes the matrices of one shape after those of another: where they point, brought to
    length one, what a round makes of them, and two or three of their products with themselves.
    Several have all of them on their way at once: as they go, as they come, and come home.
    """
    sizes, work = [0], [0]
    for shape, count in Counter(matrices).items():
        squares = (3 if pairing(shape)[0] else 2) * count * min(shape) ** 2
        sizes.append(count * shape.numel())
        work.append(2 * sizes[-1] + squares)
    held = max(map(add, sizes, work)) if mesh.shard == 1 else 3 * sum(sizes) + max(work)
    return dtype.itemsize * held / mesh.shard


def frozen(recipe: Recipe) -> float:
    """Weights of the frozen networks; they stay through stages that do not ask them."""
    views = [view for stage in recipe.stage for view in flops.teachers(recipe, stage).values()]
    total = sum(network.weights for network in {view.network for view in views})
    if recipe.text.encoder is not None:
        total += flops.text_encoder(recipe).weights
    if recipe.lpips:
        inputs = CHANNELS
        for channels, convolutions in flops.vgg_depths(recipe.lpips):
            total += 9 * channels * (inputs + (convolutions - 1) * channels)
            inputs = channels
    return total


def activations(recipe: Recipe, stage: Stage, dtype: torch.dtype, kind: str) -> Saved:
    """What a pass through denoiser, text encoder and losses keeps for the way back."""
    size, l, c = recipe.dit, recipe.text.max_tokens, dtype.itemsize  # noqa: E741
    route, n = flops.route(recipe, stage), flops.tokens(recipe, stage)
    text = flops.text_encoder(recipe)
    routed = route.stop - route.start if route else 0
    total = Saved(outside(size, n, l, text.width, c) + FULL * CHANNELS * stage.resolution**2, 0)
    at_work = Saved(0, 0)
    for tokens, count in ((n, size.depth - routed), (flops.visible(route, n), routed)):
        if count:
            if recipe.compile:
                whole = compiled(size, tokens, l, dtype, kind)
            else:
                whole = eager(size, tokens, l, dtype)
            if recipe.parallel.recompute:  # what goes into each, and all of the one at work
                total += Saved(c * tokens * size.width, 0).times(count)
                at_work = max(at_work, whole, key=lambda block: block.each)
            else:
                total += whole.times(count)
    if route:
        total += Saved(c * n * size.width, 0)  # the tokens, put back together
    if recipe.text.encoder is None:
        total += scratch_encoder(text, l, dtype)
    terms = Saved(0, 0)
    if recipe.repa and flops.active(recipe, stage, "repa"):
        compared = sum(flops.walking(recipe, stage, block) for block in recipe.repa.blocks)
        terms += Saved(compared * flops.target(recipe) * (5 * c + 2 * FULL), 0)
    if recipe.lpips and flops.active(recipe, stage, "lpips"):
        side = max(lpips.SMALLEST, round(stage.resolution * recipe.lpips.resize))
        fused = recipe.compile and kind == "cuda"
        kept = perceived(flops.vgg_depths(recipe.lpips), side, c, fused)
        terms += Saved(recipe.lpips.fraction * kept, 0)
    if recipe.dino and flops.active(recipe, stage, "dino"):
        view = flops.teachers(recipe, stage)["dino"]
        terms += Saved(recipe.dino.fraction * looked(view, c), 0)
    # The way back has left the terms behind when it comes to a block that is computed again.
    return total + max(terms, at_work, key=lambda part: part.each)


def outside(size: dit.Config, n: int, l: int, context: int, c: int) -> float:  # noqa: E741
    """What the denoiser keeps before its first block and after its last.

    Inputs of products, and the last tokens in float32: as they come, normalised, and modulated.
    """
    patches = n * (CHANNELS * size.patch**2 + size.bottleneck)
    return c * (patches + l * context) + 3 * FULL * n * size.width


def perceived(depths: Iterable[tuple[int, int]], side: int, c: int, compiled: bool) -> float:
    """What LPIPS keeps of a guess: each activation, and what a pooling chose.

    Of the last of each depth also what it is compared with and both lengths of each place, or, not
    `compiled`, the distance and, where the network computes in less than float32, a copy in that.
    """
    total = float(c * CHANNELS * side**2)
    pooled = 0
    for channels, convolutions in depths:
        places = channels * side**2
        total += c * (convolutions * places + pooled) + 8 * pooled
        copies = (2 if c < FULL else 1) * FULL * places
        total += c * places + 2 * FULL * side**2 if compiled else copies
        side //= 2
        pooled = channels * side**2
    return total


def looked(view: flops.View, c: int) -> float:
    """What a frozen teacher keeps of a guess. Its weights learn nothing, so products keep nothing.

    Of each patch, in each layer: the inputs of two norms, query, key, value, answer, and what the
    MLP bends.
    """
    network, patches = view
    width = 2 * network.width + 2 * network.queries + 2 * network.keys + network.mlp
    pixels = CHANNELS * patches * network.patch**2
    return network.layers * (patches + network.extra) * c * width + (c + FULL) * pixels


def compiled(size: dit.Config, n: int, l: int, dtype: torch.dtype, kind: str) -> Saved:  # noqa: E741
    """What one compiled block keeps. Copies of weights in its precision are made anew.

    Of each image token: its gate and its value (m each); query, key and value as they come out of
    their product, the queries once turned, the answers, input and output of attention, and the
    block's input (8 h). Keys of all tokens, turned and joined; of words also as they come and go
    (3 h). Fused attention keeps the joined values and a number for each query, or, written out, its
    scores and their shares. Four numbers for each row of a norm.
    """
    h, m, c = size.width, size.mlp_width, dtype.itemsize
    written_out = kind == "cpu" and n <= dit.SHORT and c < FULL
    attention = 2 * c * size.heads * n * (n + l) if written_out else c * h * (n + l)
    rows = 4 * FULL * n * (1 + size.heads)
    return Saved(c * (n * (2 * m + 8 * h) + h * (n + l) + 3 * h * l) + attention + rows, 0)


@lru_cache
def eager(size: dit.Config, n: int, l: int, dtype: torch.dtype) -> Saved:  # noqa: E741
    """Ask autograd what one block keeps when it is not compiled, on the CPU.

    It gets tensors that have shapes and no contents: one picture, then two, with one block more and
    one less. Nothing is computed.
    """
    kept = {
        (depth, pictures): _kept(size.model_copy(update={"depth": depth}), n, l, dtype, pictures)
        for depth in (1, 2)
        for pictures in (1, 2)
    }
    one, two = (kept[2, pictures] - kept[1, pictures] for pictures in (1, 2))
    return Saved(two - one, 2 * one - two)


def _kept(size: dit.Config, n: int, l: int, dtype: torch.dtype, pictures: int) -> int:  # noqa: E741
    """Bytes that autograd keeps of a forward pass, but for the weights."""
    storages: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes(), tensor  # held: a freed one's number comes back
        return tensor

    with FakeTensorMode(), saved_tensors_hooks(note, lambda tensor: tensor):
        model = dit.DiT(size, size.width, compute=dtype)
        x_t = torch.empty(pictures, CHANNELS, n * size.patch, size.patch)
        words = torch.empty(pictures, l, size.width)
        text = Text(words, torch.ones(pictures, l, dtype=torch.bool))
        guess = model(x_t, torch.empty(pictures), text)  # noqa: F841 - holds what is kept
        own = {weight.untyped_storage()._cdata for weight in model.parameters()}
        return sum(nbytes for at, (nbytes, _) in storages.items() if at not in own)


def scratch_encoder(text: Network, l: int, dtype: torch.dtype) -> Saved:  # noqa: E741
    """What the small LFM2 keeps, as `transformers` writes it.

    Of each word, in each layer: four times the MLP's width, ten times its own, and in float32 twice
    its own, or four times where words attend; outside the layers twice its width.
    """
    c, attending = dtype.itemsize, text.layers // 2
    word = c * (4 * text.mlp + 10 * text.width) + 2 * FULL * text.width
    # Weights stay float32; a product in another precision needs them in that one.
    copies = c * text.block if c < FULL else 0
    layers = Saved(l * word, copies).times(text.layers)
    return layers + Saved((2 * FULL * attending + c + FULL) * l * text.width, 0)
