"""Who draws: a model of ours, or any text-to-image pipeline of diffusers, as one function.

    artist.draw(prompts, seeds, height, width) -> pictures (n, height, width, 3) uint8

Each picture's noise comes from its own seed. A pipeline gets one prompt a call: what it draws for a
seed then depends on nothing that is drawn beside it, and some classes mix up several prompts. Where
the work is `shared` each process draws its part and every process has all of them, the same ones
on any number of processes.

A folder of diffusers is data: code that lies in it is not run, and weights are read from
safetensors alone. One that `daybreak export` has written is drawn with the class that knows its
time grid, so it is scored as the run it comes from.

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
    """What draws, and what a result must say of it."""

    draw: Draw
    side: int  # of the square it draws if nothing else is asked for
    unit: int  # the sides it can draw are multiples of it
    digest: str  # sha256 that names every byte of its weights
    facts: Mapping[str, Any]  # sampler, weights and where they are from, for JSON
    taught: frozenset[str] = frozenset()  # families of networks that took part in its training


def square(artist: Artist) -> Callable[[Sequence[str], Sequence[int]], Pictures]:
    """What the artist draws where only prompts and seeds are given."""
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
    """A model of ours, with the settings of its recipe."""

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
    """The same pictures, each process drawing its part of them.

    All draw equally many, because weights that are spread over processes are gathered by all at
    once; what is one too many is drawn twice and left out.
    """

    def part(prompts: Sequence[str], seeds: Sequence[int], height: int, width: int) -> Pictures:
        n, share = len(prompts), math.ceil(len(prompts) / here.size)
        mine = [min(here.rank * share + place, n - 1) for place in range(share)]
        drawn = draw([prompts[i] for i in mine], [seeds[i] for i in mine], height, width)
        whole: Pictures = gather(here, torch.from_numpy(drawn)).flatten(0, 1)[:n].numpy()
        return whole

    return draw if here.size == 1 else part


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is one of diffusers."""
    return (folder / INDEX).is_file()


def pipeline(
    folder: Path,
    side: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Artist:
    """A pipeline of diffusers; what is left out is as the pipeline has it.

    The first picture it draws says how large they are.

    Errors  BadRecipe if the folder cannot be loaded without running code of its own, if the
            pipeline does not draw from a prompt, or not as it is asked to; so does its `draw`.
    """
    loaded = _load(folder, dtype).to(device)
    loaded.set_progress_bar_config(disable=True)
    name, known = type(loaded).__name__, inspect.signature(loaded.__call__).parameters
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    settings = {key: value for key, value in given.items() if value is not None}
    for key in ("prompt", "generator", *settings):
        if key not in known:
            raise BadRecipe(f"{folder}: {name} takes no {key}, so it cannot be scored like this")
    if "use_resolution_binning" in known:  # it would draw another size and scale that
        settings["use_resolution_binning"] = False
    sized = {"height", "width"} <= known.keys()  # whether a size can be asked for

    def one(prompt: str, seed: int, size: Mapping[str, int]) -> Image.Image:
        generator = torch.Generator().manual_seed(dice.key(seed, 0, 0))  # as a run's own noise
        asked = {**size, **settings}
        try:
            drawn = loaded(prompt=prompt, generator=generator, return_dict=False, **asked)
        except ValueError as error:  # what it was asked for is not what it can do
            said = str(error).partition("\n")[0]
            raise BadRecipe(f"{folder}: {name} cannot draw what is asked ({said})") from error
        picture = drawn[0][0]
        if not isinstance(picture, Image.Image):
            raise BadRecipe(f"{folder}: {name} draws no single pictures")
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
            f"{folder} cannot be loaded as a pipeline of diffusers ({told(error)})"
        ) from error


def _unit(loaded: Any, side: int) -> int:
    """What the sides of its pictures are multiples of, known from one that it has drawn.

    A transformer on pixels fills them with patches, as ours does; one on latents with patches as
    large as the VAE makes them, and some classes pair those.
    """
    network = getattr(loaded, "transformer", None)
    patch = None if network is None else network.config.get("patch_size")
    if not isinstance(patch, int):  # a U-Net, or patches of a film
        return math.gcd(side, UNIT)
    if getattr(loaded, "vae", None) is None:
        return patch
    return math.gcd(side, math.lcm(UNIT, int(getattr(loaded, "vae_scale_factor", 1)) * patch))


def _scheduler(folder: Path) -> dict[str, Any]:
    """What a folder says of its scheduler; `daybreak export` adds how to sample, and who taught."""
    try:
        said: dict[str, Any] = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    except (OSError, ValueError):
        return {}
    return said


def _digest(folder: Path) -> str:
    """The sha256 of names and sha256 of the folder's weights, whoever wrote what else is there."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        if not name.startswith("evaluation/"):
            whole.update(f"{name} {disk.sha256(path)}\n".encode())
    return whole.hexdigest()
