"""What the memory of one device holds at the peak of a step.

    weights, gradients, optimiser, average      float32, sharded as the mesh says
    copies       of the weights in the precision of the blocks, kept for the backward pass
    activations  all else kept for the backward pass, for each picture of a pass
    pictures     image, noise, their mixture, the guess
    teachers     frozen networks
    workspace    temporary tensors

The peak is at one of two moments. When the backward pass begins, the activations are complete, and
gradients exist if an earlier pass of the step has left them; the workspace is the gradients of one
block's activations. During the backward pass activations are freed and gradients grow. In the
optimisers' step, gradients are complete and nothing is left of the pass; the workspace is what
Muon needs to make matrices orthogonal.

A compiled block keeps the inputs and outputs of its matrix products and computes the rest again:
`compiled`. For an eager block, autograd itself is asked what it keeps: `eager`.

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
    """How devices hold the weights: `replicate` copies, each sharded over `shard` devices."""

    replicate: int
    shard: int

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.replicate * self.shard


class Saved(NamedTuple):
    """Bytes kept for the backward pass: for each picture of a pass, and once for all of them."""

    each: float
    once: float

    def __add__(self, other: object) -> "Saved":
        """Add both fields."""
        assert isinstance(other, Saved)
        return Saved(self.each + other.each, self.once + other.once)

    def times(self, count: int) -> "Saved":
        """Multiply both fields."""
        return Saved(count * self.each, count * self.once)


def mesh_for(count: int) -> Mesh:
    """Shard weights over the devices of a node and replicate them across nodes."""
    shard = count if count <= PER_NODE else math.gcd(count, PER_NODE)
    return Mesh(count // shard, shard)


def parts(
    recipe: Recipe, stage: Stage, mesh: Mesh, pictures: int, dtype: torch.dtype, kind: str
) -> dict[str, float]:
    """Bytes by part, for passes of `pictures` pictures on a device of `kind` cpu or cuda.

    They are those of the moment (of the two above) that needs more.
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
    several = stage.batch // mesh.devices > pictures  # passes a step: gradients wait, not sharded
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
    """What Muon's step needs besides its state.

    Matrices are handled shape by shape: their directions, these normalised, the result of a round,
    and two or three of their products with themselves. Several devices exchange the matrices of all
    shapes at once: as sent, as received, and as returned.
    """
    sizes, work = [0], [0]
    for shape, count in Counter(matrices).items():
        squares = (3 if pairing(shape)[0] else 2) * count * min(shape) ** 2
        sizes.append(count * shape.numel())
        work.append(2 * sizes[-1] + squares)
    held = max(map(add, sizes, work)) if mesh.shard == 1 else 3 * sum(sizes) + max(work)
    return dtype.itemsize * held / mesh.shard


def frozen(recipe: Recipe) -> float:
    """Weights of the frozen networks; they stay loaded in stages that do not use them."""
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
    """What the forward pass of denoiser, text encoder and losses keeps for the backward pass."""
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
            if recipe.parallel.recompute:  # the inputs of all, and everything of the current one
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
    # The backward pass has freed the terms when it reaches a block that is computed again.
    return total + max(terms, at_work, key=lambda part: part.each)


def outside(size: dit.Config, n: int, l: int, context: int, c: int) -> float:  # noqa: E741
    """What the denoiser keeps before its first block and after its last.

    Inputs of products, and the last tokens in float32: as they are, normalised, and modulated.
    """
    patches = n * (CHANNELS * size.patch**2 + size.bottleneck)
    return c * (patches + l * context) + 3 * FULL * n * size.width


def perceived(depths: Iterable[tuple[int, int]], side: int, c: int, compiled: bool) -> float:
    """What LPIPS keeps of a guess: each activation, and the indices of each pooling.

    For the last activation of each depth also, if `compiled`, the one it is compared with and both
    norms at each position; else the distance and, if computed in less than float32, a float32 copy.
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
    """What a frozen teacher keeps of a guess; its products, with frozen weights, keep no inputs.

    Per patch and layer: the inputs of two norms, query, key, value, the attention's output, and the
    input of the MLP's nonlinearity.
    """
    network, patches = view
    width = 2 * network.width + 2 * network.queries + 2 * network.keys + network.mlp
    pixels = CHANNELS * patches * network.patch**2
    return network.layers * (patches + network.extra) * c * width + (c + FULL) * pixels


def compiled(size: dit.Config, n: int, l: int, dtype: torch.dtype, kind: str) -> Saved:  # noqa: E741
    """What one compiled block keeps. Copies of weights in its precision are made again.

    Per image token: the MLP's gate and value (m each); query, key and value as projected, the
    rotated query, the attention result, input and output of the attention layer, and the block's
    input (8 h). Keys of all tokens, rotated and concatenated (h); per word also the input and
    output of its projection (3 h). Fused attention keeps the concatenated values and a number per
    query; attention written out keeps scores and softmax. Each row of a norm keeps four numbers.
    """
    h, m, c = size.width, size.mlp_width, dtype.itemsize
    written_out = kind == "cpu" and n <= dit.SHORT and c < FULL
    attention = 2 * c * size.heads * n * (n + l) if written_out else c * h * (n + l)
    rows = 4 * FULL * n * (1 + size.heads)
    return Saved(c * (n * (2 * m + 8 * h) + h * (n + l) + 3 * h * l) + attention + rows, 0)


@lru_cache
def eager(size: dit.Config, n: int, l: int, dtype: torch.dtype) -> Saved:  # noqa: E741
    """Ask autograd what one block keeps when it is not compiled, on the CPU.

    It is given tensors without contents, for one and two pictures and one and two blocks; the
    differences tell what is kept. Nothing is computed.
    """
    kept = {
        (depth, pictures): _kept(size.model_copy(update={"depth": depth}), n, l, dtype, pictures)
        for depth in (1, 2)
        for pictures in (1, 2)
    }
    one, two = (kept[2, pictures] - kept[1, pictures] for pictures in (1, 2))
    return Saved(two - one, 2 * one - two)


def _kept(size: dit.Config, n: int, l: int, dtype: torch.dtype, pictures: int) -> int:  # noqa: E741
    """Bytes that autograd keeps from a forward pass, except the weights."""
    storages: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes(), tensor  # held, or its address would be reused
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
    """What the small LFM2 keeps, as implemented in `transformers`.

    Per word and layer: four times the MLP's width, ten times the model's, and in float32 twice the
    model's, or four times in attention layers; outside the layers twice the model's width.
    """
    c, attending = dtype.itemsize, text.layers // 2
    word = c * (4 * text.mlp + 10 * text.width) + 2 * FULL * text.width
    # Weights stay float32; a product in another precision needs a copy in that precision.
    copies = c * text.block if c < FULL else 0
    layers = Saved(l * word, copies).times(text.layers)
    return layers + Saved((2 * FULL * attending + c + FULL) * l * text.width, 0)
