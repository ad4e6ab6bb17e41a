"""How fast is a training step? Ours against diffusers' own class, or routed against dense.

    python benchmarks/step.py [--case classes | routes] [--batch N] [--rounds 5] [--json FILE]

classes  The same architecture (patch 4, width 256, depth 6: 9 M weights), 64 image tokens.
routes   Every token through every block, or half of them through all blocks but the first and the
         last (patch 4, width 384, depth 8: 27 M weights), 256 image tokens.

Each arm runs forward and backward on the same pictures and 16 words. Arms alternate, so that a
machine that changes its speed changes it for all of them; the table gives medians, the ratio to the
first arm, and what the forward pass keeps for the backward pass.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from diffusers import PRXTransformer2DModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from daybreak.model import dit, flow, tread
from daybreak.model.text import Text
from daybreak.train.dice import Dice

SIZE = dit.Config(patch=4, bottleneck=0, width=256, depth=6, heads=4)
LARGER = dit.Config(patch=4, bottleneck=0, width=384, depth=8, heads=6)
WORDS, TEXT_WIDTH = 16, 256


class Arm(NamedTuple):
    """A network and its loss."""

    model: nn.Module
    loss: Callable[[flow.Noisy, Text], Tensor]


class Case(NamedTuple):
    """Arms by name, the first of which the others are compared with, and what they are fed."""

    arms: Callable[[], dict[str, Arm]]
    side: int
    batch: int


def loss(guess: Tensor, noisy: flow.Noisy) -> Tensor:
    """The loss of training, for any network."""
    wrong = flow.velocity(noisy.x_t, guess, noisy.t) - flow.velocity(noisy.x_t, noisy.x, noisy.t)
    return wrong.square().mean()


def theirs(autocast: bool) -> Arm:
    """diffusers' class, in float32 or under bfloat16 autocast."""
    model = PRXTransformer2DModel(
        in_channels=3,
        patch_size=SIZE.patch,
        context_in_dim=TEXT_WIDTH,
        hidden_size=SIZE.width,
        mlp_ratio=SIZE.mlp,
        num_heads=SIZE.heads,
        depth=SIZE.depth,
        axes_dim=[SIZE.head_width // 2] * 2,
        bottleneck_size=None,
    )

    def run(noisy: flow.Noisy, text: Text) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            guess = model(noisy.x_t, noisy.t, text.tokens, attention_mask=text.mask)
        return loss(guess.sample, noisy)

    return Arm(model, run)


def ours(
    size: dit.Config, compute: torch.dtype, compiled: bool, route: tread.Config | None = None
) -> Arm:
    """Our denoiser, eager or with compiled blocks; a route is drawn anew for each step."""
    model = dit.DiT(size, TEXT_WIDTH, compute=compute)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    steps = count()

    def run(noisy: flow.Noisy, text: Text) -> Tensor:
        way = None
        if route is not None:
            dice = Dice(0, next(steps), 0, len(noisy.x))
            way = tread.draw(route, noisy.x, size.patch, dice)
        return loss(model(noisy.x_t, noisy.t, text, way).x, noisy)

    return Arm(model, run)


def classes() -> dict[str, Arm]:
    """The same network, of two makers."""
    return {
        "diffusers, float32": theirs(autocast=False),
        "diffusers, bfloat16 autocast": theirs(autocast=True),
        "daybreak, float32": ours(SIZE, torch.float32, compiled=False),
        "daybreak, bfloat16": ours(SIZE, torch.bfloat16, compiled=False),
        "daybreak, bfloat16, compiled": ours(SIZE, torch.bfloat16, compiled=True),
    }


def routes() -> dict[str, Arm]:
    """The same network, with all tokens or with half of them in most blocks."""
    half = tread.Config(start=1, stop=LARGER.depth - 1, carried=0.5)
    return {
        "dense, float32": ours(LARGER, torch.float32, compiled=False),
        "routed, float32": ours(LARGER, torch.float32, compiled=False, route=half),
        "dense, bfloat16, compiled": ours(LARGER, torch.bfloat16, compiled=True),
        "routed, bfloat16, compiled": ours(LARGER, torch.bfloat16, compiled=True, route=half),
    }


CASES = {"classes": Case(classes, side=32, batch=64), "routes": Case(routes, side=64, batch=8)}


def saved(arm: Arm, noisy: flow.Noisy, text: Text) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, but for the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in arm.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        arm.loss(noisy, text)
    return sum(kept.values())


def main() -> None:
    """Time every arm in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="classes")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    case = CASES[arguments.case]
    batch = arguments.batch or case.batch

    torch.manual_seed(0)
    image = torch.rand(batch, 3, case.side, case.side) * 2 - 1
    noisy = flow.corrupt(image, torch.rand(batch), torch.randn_like(image))
    mask = torch.arange(WORDS)[None] < torch.randint(5, WORDS, (batch, 1))
    text = Text(torch.randn(batch, WORDS, TEXT_WIDTH), mask)
    arms = case.arms()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(arguments.rounds + 2):
        for name, arm in arms.items():
            began = time.perf_counter()
            arm.loss(noisy, text).backward()
            if turn >= 2:  # the first two compile and warm up
                seconds[name].append(time.perf_counter() - began)
    activations = {name: saved(arm, noisy, text) for name, arm in arms.items()}

    reference = next(iter(arms))
    first, most = statistics.median(seconds[reference]), activations[reference]
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, batch {batch}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:32} {batch / median:7.1f} img/s   x {first / median:.2f}"
            f"   {activations[name] / 2**20:7.1f} MiB kept   x {activations[name] / most:.2f}"
        )
    if arguments.json:
        facts = {
            "case": arguments.case,
            "machine": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "batch": batch,
            "seconds": seconds,
            "saved": activations,
        }
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
