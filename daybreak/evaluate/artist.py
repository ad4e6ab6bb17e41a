"""What is evaluated: a daybreak model or any text-to-image pipeline of diffusers, as a function.

    artist.draw(prompts, seeds, height, width) -> pictures (n, height, width, 3) uint8

Each picture's noise comes from its own seed. A pipeline gets one prompt per call, so that a picture
does not depend on the others, and because some classes mix up several prompts. With `shared` each
process draws a part of the pictures and all processes return all of them; they do not depend on the
number of processes.

A diffusers folder is treated as data: code in it is not run, and weights are read only from
safetensors. A folder that `daybreak export` has written is drawn by the class that uses its time
grid, so it gets the score of its run.

Shapes  pictures (n, height, width, 3) uint8.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError

from daybreak.data import disk
from daybreak.failure import BadRecipe, told
from daybreak.generate import draw as sampling
from daybreak.generate import sampler
from daybreak.model import flow, tread
from daybreak.model.text_to_image import TextToImage
from daybreak.train import dice
from daybreak.train.parallel import World, gather

Pictures = npt.NDArray[np.uint8]
Draw = Callable[[Sequence[str], Sequence[int], int, int], Pictures]

UNIT = 16  # pixels; a pipeline with a VAE draws sides that are multiples of it
INDEX = "model_index.json"


class Artist(NamedTuple):
    """A function that draws, and the facts about it that every result records."""

    draw: Draw
    side: int  # side of the square that it draws by default
    unit: int  # the sides that it can draw are multiples of this
    digest: str  # sha256 of its weights
    facts: Mapping[str, Any]  # sampler, weights and their origin, for JSON
    taught: frozenset[str] = frozenset()  # families of networks that were used in its training


def square(artist: Artist) -> Callable[[Sequence[str], Sequence[int]], Pictures]:
    """Return a function of prompts and seeds that draws at the artist's default size."""
    return lambda prompts, seeds: artist.draw(prompts, seeds, artist.side, artist.side)


def ours(
    model: TextToImage,
    side: int,
    how: sampler.Config,
    flow_config: flow.Config,
    route: tread.Config | None = None,
    digest: str = "",
    facts: Mapping[str, Any] | None = None,
    taught: frozenset[str] = frozenset(),
) -> Artist:
    """Return an artist of a daybreak model, with the settings of its recipe."""

    def draw(prompts: Sequence[str], seeds: Sequence[int], height: int, width: int) -> Pictures:
        return sampling.draw(model, prompts, seeds, height, width, how, flow_config, route)

    settings = how.model_dump(mode="json", exclude={"prompts", "every", "seed"})
    return Artist(
        draw=draw,
        side=side,
        unit=model.dit.config.patch,
        digest=digest,
        facts={**(facts or {}), "sampler": settings, "weights": "ema"},
        taught=taught,
    )


def shared(draw: Draw, here: World) -> Draw:
    """Return a function that draws the same pictures, divided among the processes.

    All processes draw equally many, because sharded weights are gathered by all of them at once;
    surplus pictures are drawn twice and dropped.
    """

    def part(prompts: Sequence[str], seeds: Sequence[int], height: int, width: int) -> Pictures:
        n, share = len(prompts), math.ceil(len(prompts) / here.size)
        mine = [min(here.rank * share + place, n - 1) for place in range(share)]
        drawn = draw([prompts[i] for i in mine], [seeds[i] for i in mine], height, width)
        whole: Pictures = gather(here, torch.from_numpy(drawn)).flatten(0, 1)[:n].numpy()
        return whole

    return draw if here.size == 1 else part


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is a diffusers pipeline."""
    return (folder / INDEX).is_file()


def pipeline(
    folder: Path,
    side: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Artist:
    """Return an artist of a diffusers pipeline; settings that are None keep its defaults.

    A first picture is drawn to find the default size.

    Errors  BadRecipe if the folder cannot be loaded without running its own code, or if the
            pipeline does not accept a prompt or these settings; `draw` raises it too.
    """
    loaded = _load(folder, dtype).to(device)
    loaded.set_progress_bar_config(disable=True)
    name, known = type(loaded).__name__, inspect.signature(loaded.__call__).parameters
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    settings = {key: value for key, value in given.items() if value is not None}
    for key in ("prompt", "generator", *settings):
        if key not in known:
            raise BadRecipe(
                f"{folder}: {name} takes no {key}, so it cannot be scored with these options"
            )
    if "use_resolution_binning" in known:  # would draw another size and rescale it
        settings["use_resolution_binning"] = False
    sized = {"height", "width"} <= known.keys()  # whether it accepts a size

    def one(prompt: str, seed: int, size: Mapping[str, int]) -> Image.Image:
        generator = torch.Generator().manual_seed(dice.key(seed, 0, 0))  # a run's own noise
        asked = {**size, **settings}
        try:
            drawn = loaded(prompt=prompt, generator=generator, return_dict=False, **asked)
        except ValueError as error:  # it does not support the request
            said = str(error).partition("\n")[0]
            raise BadRecipe(f"{folder}: {name} cannot draw what is asked ({said})") from error
        picture = drawn[0][0]
        if not isinstance(picture, Image.Image):
            raise BadRecipe(
                f"{folder}: {name} does not return pictures: give a text-to-image pipeline"
            )
        return picture.convert("RGB")

    def draw(prompts: Sequence[str], seeds: Sequence[int], height: int, width: int) -> Pictures:
        size = {"height": height, "width": width}
        if (height, width) == default or not sized:
            size = {}
        drawn = [one(*asked, size) for asked in zip(prompts, seeds, strict=True)]
        for picture in drawn:
            if picture.size != (width, height):
                raise BadRecipe(
                    f"{folder}: {name} draws {picture.width} x {picture.height} pixels where "
                    f"{width} x {height} were asked for"
                )
        return np.stack([np.asarray(picture) for picture in drawn])

    if side is not None and not sized:
        raise BadRecipe(f"{folder}: {name} draws one size only; leave --resolution out")
    first = one("a picture", 0, {} if side is None else {"height": side, "width": side})
    if first.width != first.height or (side is not None and first.width != side):
        raise BadRecipe(
            f"{folder}: {name} draws {first.width} x {first.height} pixels: give the side of a "
            "square that it can draw with --resolution"
        )
    default = (first.height, first.width) if side is None else None
    facts = {
        "pipeline": name,
        "sampler": given | {"class": type(loaded.scheduler).__name__},
        "precision": str(dtype).removeprefix("torch."),
    }
    taught = frozenset(_scheduler(folder).get("_taught", ()))
    return Artist(draw, first.width, _unit(loaded, first.width), _digest(folder), facts, taught)


def _load(folder: Path, dtype: torch.dtype) -> Any:
    import diffusers

    from daybreak.generate.custom_pipeline import GuidedPixelPipeline

    options: dict[str, Any] = {} if dtype == torch.float32 else {"torch_dtype": dtype}
    kind = GuidedPixelPipeline if "_sampling" in _scheduler(folder) else diffusers.DiffusionPipeline
    try:
        return kind.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            **options,
        )
    except (OSError, ValueError, AttributeError, ImportError, SafetensorError) as error:
        raise BadRecipe(
            f"{folder} cannot be loaded as a diffusers pipeline ({told(error)})"
        ) from error


def _unit(loaded: Any, side: int) -> int:
    """Return the number of which its pictures' sides are multiples; `side` is one that it drew.

    For a transformer on pixels it is the patch; for one on latents the patch times the factor of
    the VAE, and some classes need a multiple of that.
    """
    network = getattr(loaded, "transformer", None)
    patch = None if network is None else network.config.get("patch_size")
    if not isinstance(patch, int):  # a U-Net, or the patches of a video model
        return math.gcd(side, UNIT)
    if getattr(loaded, "vae", None) is None:
        return patch
    return math.gcd(side, math.lcm(UNIT, int(getattr(loaded, "vae_scale_factor", 1)) * patch))


def _scheduler(folder: Path) -> dict[str, Any]:
    """Return the scheduler's configuration; an export has sampling settings and teachers in it."""
    try:
        said: dict[str, Any] = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    except (OSError, ValueError):
        return {}
    return said


def _digest(folder: Path) -> str:
    """The sha256 of the names and hashes of the folder's weights; other files do not count."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        if not name.startswith("evaluation/"):
            whole.update(f"{name} {disk.sha256(path)}\n".encode())
    return whole.hexdigest()
