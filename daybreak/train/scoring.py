"""`daybreak evaluate`: score a run or a pipeline on one suite, and record all that matters to it.

    scenes          exact; a run on scenes, or any pipeline that draws such pictures
    validation      a run's loss on pictures, bin by bin of t
    distribution    against fresh scenes, or a prepared dataset
    prompts         a list of prompts: files, a sheet, CLIPScore
    geneval         pictures in GenEval's layout; or its results, read back
    coco30k         FID with a fixed list of captions

If weights or files are missing, this is refused before the first picture is drawn. Without a given
seed it follows from the sha256 of the weights: the questions are then fixed only by the finished
model, so that no recipe can have been tuned to them. Reference pictures, and the table of the
validation loss, use seed 0 instead: they are the same for every model.

Under torchrun the first process poses the prompts, judges and writes, like a single process, and
all of them draw: each its part of every batch of prompts (evaluate/artist).
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from daybreak import config
from daybreak.data import disk
from daybreak.data.scenes import CANVASES
from daybreak.data.scenes import Config as Scenes
from daybreak.evaluate import (
    artist,
    clip_score,
    distribution,
    examples,
    features,
    geneval,
    prompts,
    scenes_controls,
    scenes_suite,
    suite,
)
from daybreak.evaluate.artist import Artist
from daybreak.evaluate.suite import Progress, Result
from daybreak.failure import BadRecipe
from daybreak.model.text_to_image import TextToImage
from daybreak.train import accelerator, checkpoint, evaluations, parallel, runs
from daybreak.train.checkpoint import Checkpoint
from daybreak.train.parallel import World, together

SUITES = ("scenes", "validation", "distribution", "prompts", "geneval", "coco30k")
DRAW = tuple(name for name in SUITES if name != "validation")
ONLY = {  # options that only some suites use
    "per_task": ("scenes",),
    "canvas": ("scenes",),
    "controls": ("scenes",),
    "number": ("validation", "distribution"),
    "data": ("validation", "distribution"),
    "each": ("prompts", "geneval"),
    "prompts": ("prompts", "geneval", "coco30k"),
    "reference": ("coco30k",),
    "results": ("geneval",),
    "features": ("distribution", "coco30k"),
    "clip": ("prompts", "coco30k"),
    "steps": DRAW,
    "guidance": DRAW,
}
FIXED = 0  # default seed of what is the same for every model
NAMES = {"per_task": "per-task", "number": "count"}  # of options, as in the name of a result
LONGEST = 120  # most bytes of such a name
CONTROLS = "against gaming"  # key of the controls that draw pictures of their own

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # a head, and rows


class Wanted(NamedTuple):
    """The options of the command line; None if not given."""

    suite: str = "scenes"
    per_task: int = 120
    number: int = 5000
    each: int = 4
    prompts: Path | None = None
    data: Path | None = None
    reference: Path | None = None
    results: Path | None = None
    features: tuple[str, ...] = ()
    clip: str | None = None
    canvas: str | None = None
    resolution: int | None = None
    controls: bool = False
    best: bool = False
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sets: tuple[str, ...] = ()


class Model(NamedTuple):
    """What draws the pictures; for a run also its recipe and network."""

    artist: Artist
    recipe: config.Recipe | None = None
    network: TextToImage | None = None


class Scored(NamedTuple):
    """A result, the file that holds it, and tables for people."""

    path: Path
    result: Result
    tables: tuple[Table, ...]


class Asked(NamedTuple):
    """Pictures that all processes are to draw together."""

    prompts: list[str]
    seeds: list[int]
    height: int
    width: int


def score(
    folder: Path, wanted: Wanted, out: Path, progress: Callable[[str], Progress]
) -> Scored | None:
    """Evaluate a run or a folder of diffusers; the result is also written to a file in OUT.

    If there are several processes the first returns the result, the others None.

    Errors  BadRecipe, BadData, NoCheckpoint and BadStorage, before pictures are drawn if
            possible; LostPeer if a process is lost.
    """
    if wanted.suite not in SUITES:
        raise BadRecipe(f"there is no suite {wanted.suite!r}: there are {', '.join(SUITES)}")
    for key in asked_otherwise(wanted):
        if wanted.suite not in (suites := ONLY.get(key, SUITES)):
            raise BadRecipe(
                f"--{NAMES.get(key, key)} is for --suite {' or '.join(suites)}, not for "
                f"{wanted.suite}: leave it out, or change --suite"
            )
    with parallel.world(parallel.Config()) as here:
        if here.first:  # the others end with its result, or with its failure
            return together(here, lambda: _score(here, folder, wanted, out, progress))[0]
        _help(here, folder, wanted)
        return None


def _help(here: World, folder: Path, wanted: Wanted) -> None:
    """Draw what the first process asks for, until it has a result. Errors: those of the first."""
    said = _hear(here)
    if isinstance(said, Scored):  # read from a file, without a picture
        return
    draw = artist.shared(opened(folder, wanted, said).artist.draw, here)
    while isinstance(said := _hear(here), Asked):
        draw(*said)


def _hear(here: World) -> Any:
    """The first process's message: a checkpoint, if any; what to draw; or the result."""
    said: list[Any] = together(here, lambda: None)
    return said[0]


def _asking(here: World, alone: Artist) -> Artist:
    """The artist, drawing together with all other processes."""
    if here.size == 1:
        return alone
    part = artist.shared(alone.draw, here)

    def draw(
        prompts: Sequence[str], seeds: Sequence[int], height: int, width: int
    ) -> npt.NDArray[np.uint8]:
        together(here, lambda: Asked(list(prompts), list(seeds), height, width))
        return part(prompts, seeds, height, width)

    return alone._replace(draw=draw)


def _score(
    here: World, folder: Path, wanted: Wanted, out: Path, progress: Callable[[str], Progress]
) -> Scored:
    """The work of a single process, or of the first of several."""
    path = out / f"{called(wanted)}.json"
    if wanted.results is not None:
        result = geneval.read(wanted.results)
        suite.write(path, {"suite": "geneval", **suite.plain(result), **about()})
        return Scored(path, result, (_table(result),))
    asked = _asked(wanted)
    clip = None if wanted.clip is None else clip_score.load(wanted.clip, accelerator.choose())
    chosen = None if artist.is_pipeline(folder) else _chosen(folder, wanted)
    model = opened(folder, wanted, chosen)
    together(here, lambda: chosen)
    model = model._replace(artist=_asking(here, model.artist))
    seed = int(model.artist.digest[:8], 16) if wanted.seed is None else wanted.seed
    fixed = _fixed(model, wanted)
    tell = progress("drawn")
    if wanted.suite == "scenes":
        result = _scenes(model, wanted, seed, tell)
    elif wanted.suite == "validation":
        result = _validation(folder, model, wanted, fixed)
    elif wanted.suite == "distribution":
        found, cache = _examples(model, wanted, fixed), out / "reference"
        judges = _judges(model, wanted)
        result = distribution.distribution(model.artist, found, judges, cache, seed, tell)
    elif wanted.suite == "prompts":
        place = out / path.stem
        result = prompts.prompts(model.artist, asked, place, wanted.each, clip, seed, tell)
    elif wanted.suite == "geneval":
        result = geneval.write(model.artist, asked, out / path.stem, wanted.each, seed, tell)
    else:
        names = wanted.features or ("inception",)
        side = wanted.resolution or distribution.COCO_SIDE
        result = distribution.coco30k(
            model.artist,
            asked,
            wanted.reference or Path(),
            [features.load(name, accelerator.choose()) for name in names],
            out / "reference",
            clip,
            side,
            seed,
            tell,
        )
    remarks = [*trained_on(model.recipe, wanted.data)]
    remarks += chosen_by(model.recipe, wanted, seed if wanted.suite == "scenes" else fixed)
    result = result._replace(remarks=[*result.remarks, *remarks])
    suite.write(path, suite.record(wanted.suite, model.artist, result, seed, about()))
    return Scored(path, result, _tables(wanted.suite, result))


def asked_otherwise(wanted: Wanted) -> dict[str, Any]:
    """The options that differ from their defaults."""
    usual = Wanted()
    return {key: value for key, value in wanted._asdict().items() if value != getattr(usual, key)}


def called(wanted: Wanted) -> str:
    """The name of a result: SUITE and the options that differ from defaults, as scenes-steps20.

    So a sweep does not overwrite the usual score, and its results are stored side by side.
    """
    marks = [wanted.suite]
    for key, value in asked_otherwise(wanted).items():
        if key not in ("suite", "results", "sets"):
            marks.append(NAMES.get(key, key) + _plain(value))
    return disk.named("-".join([*marks, *wanted.sets]), LONGEST)


def _plain(value: object) -> str:
    """A value as a part of a name."""
    if isinstance(value, bool):
        return ""
    if isinstance(value, tuple):
        return "-" + "+".join(Path(one).name for one in value)
    if isinstance(value, (str, Path)):
        return f"-{Path(value).stem}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def trained_on(recipe: config.Recipe | None, data: Path | None) -> list[str]:
    """Warnings if the model was trained on the pictures that it is measured with."""
    this = _known(data)
    if recipe is None or this is None or this not in map(_known, recipe.paths):
        return []
    return [f"this model was trained on {data}: the score rewards what it has memorised"]


def chosen_by(recipe: config.Recipe | None, wanted: Wanted, seed: int) -> list[str]:
    """Warnings if a best checkpoint is scored on the questions that selected it.

    Scenes differ for every seed; of a dataset some pictures are the same with any seed.
    """
    asked = recipe.evaluate if recipe and wanted.best else None
    if recipe is None or asked is None or asked.best is None or wanted.suite not in suite.METRICS:
        return []
    on_scenes = wanted.suite == "scenes"
    if on_scenes != asked.best.startswith("scenes."):  # prompts of one, pictures of the other
        return []
    if on_scenes or (asked.data is None and wanted.data is None):
        same, remedy = seed == recipe.seed, "another --seed"
    else:
        ours = _known(Path(asked.data)) if asked.data else None
        same, remedy = ours is not None and ours == _known(wanted.data), "another --data"
    said = (
        f"this checkpoint was chosen by {asked.best} on some of the same questions, which makes "
        f"its score too good: give {remedy}, or leave --best out"
    )
    return [said] if same else []


def _known(folder: Path | None) -> str | None:
    """The identity of a prepared dataset: the sha256 of its manifest."""
    file = folder / "manifest.json" if folder else None
    return disk.sha256(file) if file and file.is_file() else None


def _chosen(folder: Path, wanted: Wanted) -> Checkpoint:
    """The requested checkpoint of a run, with all its hashes verified."""
    if wanted.best:
        return evaluations.best(folder)
    runs.recorded(folder)  # is it a run at all?
    return checkpoint.required(folder, lambda line: print(line, file=sys.stderr))


def opened(folder: Path, wanted: Wanted, chosen: Checkpoint | None) -> Model:
    """Load the averaged weights of a run's checkpoint; without one, a pipeline.

    Errors  BadRecipe for options that do not go together.
    """
    if chosen is None:
        if wanted.sets or wanted.best:
            raise BadRecipe(
                f"{folder} is a diffusers pipeline, and --set and --best are for run folders: "
                "leave them out"
            )
        device = accelerator.choose()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        side = None if wanted.suite == "coco30k" else wanted.resolution
        return Model(artist.pipeline(folder, side, wanted.steps, wanted.guidance, device, dtype))
    if wanted.resolution is not None and wanted.suite != "coco30k":  # there it is the FID's size
        raise BadRecipe(
            f"{folder} is a run, which draws at the resolution of its last stage: leave "
            "--resolution out, it is for pipelines"
        )
    recipe, found, network = runs.trained(folder, chosen=chosen)
    recipe = config.resampled(recipe, wanted.sets, wanted.steps, wanted.guidance)
    drawn_by = artist.ours(
        network,
        recipe.stage[-1].resolution,
        recipe.sample,
        recipe.flow,
        recipe.tread,
        found.weights,
        {"checkpoint": {"step": found.step, "manifest": found.digest}},
        recipe.taught,
    )
    return Model(drawn_by, recipe, network)


def about() -> dict[str, Any]:
    """The software that was used: results may differ between versions."""
    used = runs.versions("daybreak", "torch", "transformers", "diffusers")
    return {"revision": runs.revision(), "versions": used}


def _asked(wanted: Wanted) -> prompts.Prompts:
    """The prompts of the suites that take a list of prompts."""
    if wanted.suite not in ("prompts", "geneval", "coco30k"):
        return prompts.Prompts([], "", [])
    if wanted.prompts is None:
        raise BadRecipe(f"the suite {wanted.suite} needs a list of prompts: give it with --prompts")
    if wanted.suite == "coco30k" and wanted.reference is None:
        raise BadRecipe(
            "the suite coco30k needs a folder of real pictures: give it with --reference"
        )
    return prompts.read(wanted.prompts)


def _scenes(model: Model, wanted: Wanted, seed: int, tell: Progress) -> Result:
    recipe = model.recipe
    if wanted.canvas is not None:
        if wanted.canvas not in CANVASES:
            raise BadRecipe(
                f"there is no canvas {wanted.canvas!r}: there are {', '.join(CANVASES)}"
            )
        wanted_scenes = Scenes.model_validate({"canvas": wanted.canvas})
    elif recipe is None or recipe.drawn is None:
        raise BadRecipe(
            "this model was not trained on scenes, so there is no exact score: take --suite "
            "validation, distribution or prompts, or give --canvas if it draws scenes nevertheless"
        )
    else:
        wanted_scenes = recipe.drawn
    size = CANVASES[wanted_scenes.canvas].size
    if recipe is not None and size != model.artist.side:
        raise BadRecipe(
            f"scenes of canvas {wanted_scenes.canvas!r} are {size} px and this run draws "
            f"{model.artist.side} px: leave --canvas out, or choose one of that size"
        )
    if recipe is None and wanted.controls:
        raise BadRecipe(
            "--controls compares with training pictures, so it is for run folders: leave it out"
        )
    result = suite.scenes(model.artist, wanted_scenes, seed, wanted.per_task, tell)
    if recipe is None or not wanted.controls:
        return result
    found = scenes_controls.evaluate(artist.square(model.artist), wanted_scenes, seed, recipe.seed)
    return result._replace(details={**result.details, CONTROLS: found})


def _validation(folder: Path, model: Model, wanted: Wanted, seed: int) -> Result:
    if model.recipe is None or model.network is None:
        raise BadRecipe(
            f"{folder} is a diffusers pipeline, and the suite validation measures the loss of a "
            "run: give a run folder, or another --suite"
        )
    found = _examples(model, wanted, seed)
    return suite.validate(model.network, found, model.recipe.flow.noise_scale, seed)


def _fixed(model: Model, wanted: Wanted) -> int:
    """The seed of the reference pictures: another one if these selected the checkpoint."""
    if wanted.seed is not None:
        return wanted.seed
    chose = wanted.best and model.recipe is not None and model.recipe.seed == FIXED
    return FIXED + 1 if chose and wanted.data is None else FIXED


def _examples(model: Model, wanted: Wanted, seed: int) -> examples.Examples:
    recipe = model.recipe
    if wanted.data is not None:
        side, unit = model.artist.side, model.artist.unit
        return examples.of_dataset(wanted.data, side, unit, seed, wanted.number)
    if recipe is not None and recipe.drawn is not None:
        return examples.of_scenes(recipe.drawn, seed, wanted.number)
    raise BadRecipe(
        f"the suite {wanted.suite} needs pictures to compare with: give a prepared dataset, "
        "ideally one that it was not trained on, with --data"
    )


def _judges(model: Model, wanted: Wanted) -> list[features.Extractor]:
    """The requested networks, or else the first that took no part in training."""
    names = [Path(name).name for name in wanted.features]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise BadRecipe(
            f"--features: two networks are called {double!r}, and their values would be too: "
            "rename one folder"
        )
    usual = "clip" if "dino" in model.artist.taught else "dinov2"
    if wanted.data is None:
        usual = "scenes"
    return [features.load(name, accelerator.choose()) for name in wanted.features or (usual,)]


def _tables(name: str, result: Result) -> tuple[Table, ...]:
    if name != "scenes":
        return (_table(result),)
    head = ("", "exact", "95 % interval", "pictures")
    exact: list[tuple[str, ...]] = [*scenes_suite.table(dict(result.details))]
    if CONTROLS not in result.details:
        return ((head, exact),)
    rows: list[tuple[str, ...]] = [*scenes_controls.table(result.details[CONTROLS])]
    return (head, exact), (("", "is", "to be held against"), rows)


def _table(result: Result) -> Table:
    return ("", "value", "95 % interval", "pictures"), [*suite.table(result)]
