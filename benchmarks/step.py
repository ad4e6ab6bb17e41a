"""How fast is a training step? Ours against diffusers' own class, on this machine, in one run.

    python benchmarks/step.py [--batch 64] [--rounds 5] [--json FILE]

The same architecture (patch 4, width 256, depth 6: 9 M weights), the same pictures, forward and
backward, on 64 image tokens and 16 words. Arms alternate, so that a machine that changes its speed
changes it for all of them; the table gives medians and the ratio to the first arm.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from diffusers import PRXTransformer2DModel
from torch import Tensor

from daybreak.model import dit, flow
from daybreak.model.text import Text

SIZE = dit.Config(patch=4, bottleneck=0, width=256, depth=6, heads=4)
SIDE, WORDS, TEXT_WIDTH = 32, 16, 256


def loss(guess: Tensor, noisy: flow.Noisy) -> Tensor:
    """The loss of training, for either network."""
    wrong = flow.velocity(noisy.x_t, guess, noisy.t) - flow.velocity(noisy.x_t, noisy.x, noisy.t)
    return wrong.square().mean()


def theirs(autocast: bool) -> Callable[[flow.Noisy, Text], Tensor]:
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

    return run


def ours(compute: torch.dtype, compiled: bool) -> Callable[[flow.Noisy, Text], Tensor]:
    """Our denoiser, eager or with compiled blocks."""
    model = dit.DiT(SIZE, TEXT_WIDTH, compute=compute)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    return lambda noisy, text: loss(model(noisy.x_t, noisy.t, text).x, noisy)


def main() -> None:
    """Time every arm in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    image = torch.rand(arguments.batch, 3, SIDE, SIDE) * 2 - 1
    noisy = flow.corrupt(image, torch.rand(arguments.batch), torch.randn_like(image))
    mask = torch.arange(WORDS)[None] < torch.randint(5, WORDS, (arguments.batch, 1))
    text = Text(torch.randn(arguments.batch, WORDS, TEXT_WIDTH), mask)
    arms = {
        "diffusers, float32": theirs(autocast=False),
        "diffusers, bfloat16 autocast": theirs(autocast=True),
        "daybreak, float32": ours(torch.float32, compiled=False),
        "daybreak, bfloat16": ours(torch.bfloat16, compiled=False),
        "daybreak, bfloat16, compiled": ours(torch.bfloat16, compiled=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(arguments.rounds + 2):
        for name, arm in arms.items():
            began = time.perf_counter()
            arm(noisy, text).backward()
            if turn >= 2:  # the first two compile and warm up
                seconds[name].append(time.perf_counter() - began)

    first = statistics.median(next(iter(seconds.values())))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, batch {arguments.batch}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:32} {arguments.batch / median:7.1f} img/s   x {first / median:.2f}")
    if arguments.json:
        facts = {
            "machine": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "batch": arguments.batch,
            "seconds": seconds,
        }
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
