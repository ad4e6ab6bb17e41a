"""The recipe's prompts, drawn at intervals during a run.

    RUN/samples/step-0001000/    00.png, 01.png, ...; grid.png; prompts.json

The noise comes from fixed seeds, so the same pictures become clearer from grid to grid.
"""

import json
from pathlib import Path

from PIL import Image

from daybreak import config
from daybreak.data import disk
from daybreak.generate import draw as sampling
from daybreak.generate import grid, sampler
from daybreak.model.text_to_image import TextToImage


def draw(model: TextToImage, recipe: config.Recipe, side: int) -> sampling.Picture:
    """Draw every prompt with its seed, at the resolution of a stage."""
    prompts, seeds = _asked(recipe)
    how = recipe.sample
    height, width = sampler.size(how, side, recipe.dit.patch)
    return sampling.draw(model, prompts, seeds, height, width, how, recipe.flow, recipe.tread)


def write(run: Path, pictures: sampling.Picture, recipe: config.Recipe, step: int) -> Path:
    """Write each picture with its prompt and seed, and all on one sheet; returns its path.

    Errors  BadStorage and OSError.
    """
    prompts, seeds = _asked(recipe)
    place = run / "samples" / f"step-{step:07d}"
    place.mkdir(parents=True, exist_ok=True)
    facts = {"step": str(step), "recipe": config.digest(recipe)}
    for number, (prompt, seed, picture) in enumerate(zip(prompts, seeds, pictures, strict=True)):
        grid.save(
            Image.fromarray(picture),
            place / f"{number:02d}.png",
            facts | {"prompt": prompt, "seed": str(seed)},
        )
    asked = [{"prompt": p, "seed": s} for p, s in zip(prompts, seeds, strict=True)]
    with disk.fresh(place / "prompts.json") as staged:
        staged.write_text(json.dumps(asked, indent=1))
    sheet = grid.grid(pictures, list(prompts), None, f"step {step}")
    grid.save(sheet, place / "grid.png", facts)
    return place / "grid.png"


def _asked(recipe: config.Recipe) -> tuple[tuple[str, ...], list[int]]:
    """The prompts and their seeds."""
    prompts = recipe.sample.prompts or ("",) * 4
    return prompts, [recipe.sample.seed + number for number in range(len(prompts))]
