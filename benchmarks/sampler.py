"""How many pictures a second? Our sampler against diffusers' pipeline, with the same weights.

    python benchmarks/sampler.py [--steps 10 28] [--guidance 1 3] [--set KEY=VALUE] [--json FILE]

A network of a recipe's size with random weights is exported and loaded by `PRXPixelPipeline`, which
takes one prompt at a time (with guidance it mixes up the times of several). Ours takes one too, or
several, in float32 as theirs, or in the precision a run here would have. Arms take turns.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daybreak import host

host.settle()

import torch
from diffusers import PRXPixelPipeline
from turns import in_turn, write

from daybreak import config
from daybreak.generate import pipeline, sampler
from daybreak.generate.draw import draw
from daybreak.model import text, text_to_image
from daybreak.model.text_to_image import TextToImage
from daybreak.train import accelerator, runs

PROMPT = "a red circle above a blue square"


def network(recipe: config.Recipe, dtype: torch.dtype) -> TextToImage:
    """Build the network of a recipe, its tokenizer learned from one prompt."""
    tokenizer = text.learn_tokenizer([PROMPT], recipe.text)
    model = text_to_image.build(recipe.dit, recipe.text, tokenizer, recipe.seed, dtype)
    return model.to(accelerator.choose()).eval().requires_grad_(False)


def loaded(recipe: config.Recipe, folder: Path, side: int) -> Any:
    """Export the network and load it as a pipeline of diffusers."""
    card = pipeline.Card("benchmark", PROMPT, "none", (), "")
    plain = network(recipe, torch.float32)
    pipeline.export(plain, folder, side, recipe.sample, recipe.flow, card)
    theirs = PRXPixelPipeline.from_pretrained(folder).to(accelerator.choose())
    theirs.set_progress_bar_config(disable=True)
    return theirs


def arms(
    recipe: config.Recipe, theirs: Any, side: int, how: sampler.Config, several: int
) -> dict[str, tuple[Callable[[], object], int]]:
    """Ways to draw, by name, each with how many pictures it draws."""
    shift = recipe.flow.shift if how.shift is None else how.shift
    times = [1000 * t for t in sampler.times(how.steps, shift)[:-1]]

    def pipe() -> object:
        return theirs(
            PROMPT,
            height=side,
            width=side,
            timesteps=times,
            guidance_scale=how.guidance,
            use_resolution_binning=False,
        )

    def ours(model: TextToImage, count: int) -> Callable[[], object]:
        prompts = [PROMPT] * count
        return lambda: draw(model, prompts, range(count), side, side, how, recipe.flow)

    plain, shipped = network(recipe, torch.float32), network(recipe, runs.precision(recipe))
    return {
        "diffusers, float32": (pipe, 1),
        "daybreak, float32": (ours(plain, 1), 1),
        f"daybreak, float32, {several} at once": (ours(plain, several), several),
        f"daybreak, as shipped, {several} at once": (ours(shipped, several), several),
    }


def main() -> None:
    """Time every arm for all steps and scales of guidance, print the table, write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 28])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    recipe = config.load(arguments.recipe, tuple(arguments.set))
    side = recipe.stage[-1].resolution
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        theirs = loaded(recipe, Path(folder) / "pipeline", side)
        print(f"pictures a second at {side} px, {torch.get_num_threads()} threads")
        for steps in arguments.steps:
            for guidance in arguments.guidance:
                how = recipe.sample.model_copy(update={"steps": steps, "guidance": guidance})
                ways = arms(recipe, theirs, side, how, arguments.batch)
                taken = in_turn({n: way for n, (way, _) in ways.items()}, arguments.rounds, warm=1)
                speeds = {
                    name: ways[name][1] / statistics.median(seconds)
                    for name, seconds in taken.items()
                }
                rows.append({"steps": steps, "guidance": guidance, "speeds": speeds})
                first = next(iter(speeds.values()))
                for name, speed in speeds.items():
                    print(
                        f"{steps:4} steps, guidance {guidance:<4g} {name:36} {speed:8.2f}"
                        f"   x {speed / first:.2f}"
                    )
    write(arguments.json, {"recipe": arguments.recipe, "side": side, "rows": rows})


if __name__ == "__main__":
    main()
