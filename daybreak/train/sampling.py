"""`daybreak sample`: pictures for prompts, as files that say how to make them again.

    RUN/samples/a-red-circle/    a-red-circle-seed0.png, ...; grid.png

Settings that change the pictures are part of the name: a-red-circle-seed0-steps20.png.
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from daybreak import config
from daybreak.data import disk
from daybreak.failure import BadRecipe, BadStorage
from daybreak.generate import draw, grid, sampler
from daybreak.train import evaluations, runs

LONGEST = 80  # most bytes of a prompt in a file's name, and of the settings after it
ALIKE = 4 / 3  # largest ratio of a picture's side, were it square, to that of a stage of "its" size


class Size(NamedTuple):
    """Size of a picture, in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        """Written as on the command line: 96x64."""
        return f"{self.width}x{self.height}"


class Wanted(NamedTuple):
    """The options of the command line; None if not given."""

    prompts: tuple[str, ...]
    each: int = 4  # pictures of a prompt
    best: bool = False
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0  # of each prompt's first picture
    size: Size | None = None  # as in the last stage's grids
    sets: tuple[str, ...] = ()
    out: Path | None = None


def sample(run: Path, wanted: Wanted, tell: Callable[[str], None]) -> Iterator[Path]:
    """Draw with the averaged weights of a run; yields each file once it is written.

    `tell` is called for prompts of which the model reads only the beginning, and for a size at
    which it has not been trained.

    Errors  NoCheckpoint, BadRecipe, BadStorage.
    """
    chosen = evaluations.best(run) if wanted.best else None
    recipe, found, model = runs.trained(run, chosen=chosen)
    prompts = [words for words in wanted.prompts for _ in range(wanted.each)]
    seeds = [wanted.seed + number for _ in wanted.prompts for number in range(wanted.each)]
    digest = config.digest(recipe)
    recipe = config.resampled(recipe, wanted.sets, wanted.steps, wanted.guidance)
    how, size = recipe.sample, _checked(wanted.size, recipe, tell)
    folder, apart = wanted.out or run / "samples" / _folder_name(wanted.prompts), _apart(wanted)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadStorage(f"cannot write {folder}: {error.strerror}") from error
    for words in wanted.prompts:
        if (length := model.text.length(words)) > recipe.text.max_tokens:
            tell(
                f"{_file_name(words)}: only {recipe.text.max_tokens} of {length} tokens are read "
                "(text.max_tokens)"
            )
    pictures = draw.draw(
        model, prompts, seeds, size.height, size.width, how, recipe.flow, recipe.tread
    )

    drawn = how.model_dump_json(exclude={"prompts", "every", "seed"})
    facts = {"recipe": digest, "step": str(found.step), "guide": how.guide, "sample": drawn}
    facts |= {"steps": str(how.steps), "guidance": str(how.guidance)}
    for words, seed, picture in zip(prompts, seeds, pictures, strict=True):
        path = folder / f"{_file_name(words)}-seed{seed}{apart}.png"
        grid.save(Image.fromarray(picture), path, facts | {"prompt": words, "seed": str(seed)})
        yield path
    columns = min(wanted.each, 8) if len(wanted.prompts) > 1 else None
    grid.save(grid.grid(pictures, prompts, columns), folder / f"grid{apart}.png", facts)
    yield folder / f"grid{apart}.png"


def size(text: str) -> Size:
    """Read WIDTHxHEIGHT. Errors: BadRecipe."""
    sides = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text.strip().lower())
    if sides is None:
        raise BadRecipe(f"--size {text}: write it as WIDTHxHEIGHT in pixels, for example 96x64")
    return Size(int(sides[1]), int(sides[2]))


def _checked(size: Size | None, recipe: config.Recipe, tell: Callable[[str], None]) -> Size:
    """The size to draw. Errors: BadRecipe if it is not a whole number of patches."""
    sides, patch = [stage.resolution for stage in recipe.stage], recipe.dit.patch
    if size is None:
        height, width = sampler.size(recipe.sample, sides[-1], patch)
        return Size(width, height)
    if any(side % patch for side in size):
        near = Size(*(max(1, round(side / patch)) * patch for side in size))
        raise BadRecipe(
            f"--size {size}: this model has patches of {patch} px, so both sides must be multiples "
            f"of that: take {near}"
        )
    side, square = math.sqrt(size.width * size.height), size.width == size.height
    alike = any(one / ALIKE <= side <= one * ALIKE for one in sides)
    if not alike or (recipe.drawn and not square):  # scenes are squares
        other = "shape" if alike else "size"
        was = " and ".join(f"{one}x{one}" for one in dict.fromkeys(sides))
        tell(f"{size} px is another {other} than in training ({was}): expect worse pictures")
    return size


def _folder_name(prompts: tuple[str, ...]) -> str:
    """The first prompt, and how many others there are."""
    others = len(prompts) - 1
    return _file_name(prompts[0]) + (f"-and-{others}-more" if others else "")


def _file_name(prompt: str) -> str:
    """Turn a prompt into a file's name."""
    return disk.named(prompt, LONGEST, hyphen=" ")


def _apart(wanted: Wanted) -> str:
    """The part of a file's name for settings that differ from the recipe's."""
    given = {"steps": wanted.steps, "guidance": wanted.guidance}
    marks = ["best"] if wanted.best else []
    marks += [str(wanted.size)] if wanted.size else []
    marks += [f"{key}{value:g}" for key, value in given.items() if value is not None]
    said = "-".join((*marks, *wanted.sets))
    return said and f"-{disk.named(said, LONGEST)}"
