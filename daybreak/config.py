"""A recipe: one TOML file is one whole run.

A section is named after its ingredient's file; without it, the ingredient is not used. Nothing is
inherited or interpolated. `--set stage.0.steps=500` changes one value (TOML on the right) and
`--without muon` removes a section. An unknown key is an error that names the nearest known one.
"""

import difflib
import hashlib
import math
import tomllib
from bisect import bisect_left
from collections.abc import Mapping
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from daybreak.data.batches import Config as Data
from daybreak.data.batches import Source
from daybreak.data.scenes import CANVASES
from daybreak.data.scenes import Config as Scenes
from daybreak.evaluate.interim import Config as Evaluate
from daybreak.failure import BadRecipe, told
from daybreak.generate.sampler import Config as Sample
from daybreak.model.dit import Config as DiT
from daybreak.model.flow import Config as Flow
from daybreak.model.text import Config as Text
from daybreak.model.tread import Config as Tread
from daybreak.objective.contrastive import Config as Contrastive
from daybreak.objective.dino import Config as Dino
from daybreak.objective.lpips import Config as Lpips
from daybreak.objective.repa import Config as Repa
from daybreak.optim.ema import Config as Ema
from daybreak.optim.groups import AdamWConfig as AdamW
from daybreak.optim.groups import MuonConfig as Muon
from daybreak.train.health import Config as Health
from daybreak.train.ledger import Config as Budget
from daybreak.train.parallel import Config as Parallel

FOREIGN = {  # names of options in other trainers
    "output_dir": "out",
    "train_batch_size": "micro",
    "batch_size": "stage.0.batch",
    "learning_rate": "stage.0.lr",
    "max_train_steps": "stage.0.steps",
    "max_grad_norm": "clip",
    "checkpointing_steps": "save_every",
    "checkpoints_total_limit": "keep",
    "dataset_name": "data.source",
    "train_data_dir": "data.source",
    "hidden_size": "width",
    "patch_size": "patch",
    "num_heads": "heads",
    "mlp_ratio": "mlp",
    "bottleneck_size": "bottleneck",
    "resolution_embeds": "resolution",
    "lr_warmup_steps": "warmup",
    "max_train_samples": "stage.0.samples",
    "global_batch_size": "batch",
    "timestep_shift": "shift",
    "proportion_empty_prompts": "empty_captions",
    "caption_column": "caption_columns",
    "random_flip": "mirrored",
}


LENGTHS = {"steps": "samples", "samples": "steps"}  # of a stage: one or the other


class Stage(BaseModel):
    """One stretch of training at one resolution; `batch` is the global batch, `lr` the peak rate.

    Its length is given in `steps` or in `samples`. The rate rises over `warmup` steps and falls to
    zero over the last part of the stage, a share `cooldown` of its steps. `shift` replaces that of
    [flow] when noise levels are drawn: double it when the side doubles, because the same noise then
    hides half as much. `source` replaces that of [data], for example for a last stage on a few
    selected pictures. `without` names the sections not used in this stage: loss terms, or tread.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resolution: int = Field(gt=0)
    steps: int | None = Field(default=None, gt=0, lt=10**12)
    samples: int | None = Field(default=None, gt=0, lt=10**15)
    batch: int = Field(gt=0, lt=10**9)
    lr: float = Field(gt=0)
    warmup: int = Field(default=0, ge=0)
    cooldown: float = Field(default=0.0, ge=0, le=1)
    shift: float | None = Field(default=None, gt=0)
    source: Source | None = None
    without: tuple[Literal["tread", "repa", "lpips", "dino", "contrastive"], ...] = ()

    @model_validator(mode="after")
    def _has_one_length(self) -> "Stage":
        if (self.steps is None) == (self.samples is None):
            raise ValueError(
                "a stage needs either steps or samples, which set its length: give one of them"
            )
        return self

    @property
    def count(self) -> int:
        """Steps of the stage; the last one may see more than `samples`."""
        return self.steps or math.ceil((self.samples or 0) / self.batch)


class Recipe(BaseModel):
    """A whole run. `micro` is the most pictures in one pass (0: the whole batch at once).

    The newest `keep` checkpoints are kept, and those of every `keep_every`-th step. With
    `save_async` they are written while training continues, which needs memory for a copy of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: str
    seed: int = Field(default=0, ge=0, lt=2**64)
    micro: int = Field(default=0, ge=0)
    clip: float = Field(default=0.2, gt=0)
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    compile: bool = True
    save_every: int = Field(default=1000, gt=0)
    keep: int = Field(default=2, ge=2)
    keep_every: int | None = Field(default=None, gt=0)
    save_async: bool = False

    data: Data
    scenes: Scenes | None = None
    text: Text
    dit: DiT
    flow: Flow = Flow()
    tread: Tread | None = None
    repa: Repa | None = None
    lpips: Lpips | None = None
    dino: Dino | None = None
    contrastive: Contrastive | None = None
    muon: Muon | None = None
    adamw: AdamW = AdamW()
    ema: Ema = Ema()
    sample: Sample = Sample()
    budget: Budget | None = None
    evaluate: Evaluate | None = None
    parallel: Parallel = Parallel()
    health: Health = Health()
    stage: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        for number, stage in enumerate(self.stage):
            if stage.resolution % self.dit.patch:
                raise ValueError(
                    f"stage.{number}.resolution = {stage.resolution} is not divisible by "
                    f"dit.patch = {self.dit.patch}"
                )
            if self.micro and stage.batch > self.micro and stage.batch % self.micro:
                raise ValueError(
                    f"stage.{number}.batch = {stage.batch} is not divisible by micro = {self.micro}"
                )
        if self.drawn is not None:
            canvas = self.drawn.canvas
            size, last = CANVASES[canvas].size, len(self.stage) - 1
            for number, stage in enumerate(self.stage):
                if size % stage.resolution or (number == last and stage.resolution != size):
                    raise ValueError(
                        f"stage.{number}.resolution = {stage.resolution}, but scenes.canvas = "
                        f"{canvas!r} draws {size} px: set the last stage to {size}, and each "
                        f"earlier one to {size} or a divisor of it"
                    )
        elif self.scenes is not None:
            raise ValueError(
                '[scenes] is for data.source = "scenes"; remove it with --without scenes'
            )
        return self

    @model_validator(mode="after")
    def _sources_fit(self) -> "Recipe":
        for number, stage in enumerate(self.stage):
            if stage.source is not None and "scenes" in (stage.source, self.data.source):
                raise ValueError(
                    f"stage.{number}.source = {stage.source!r} but data.source = "
                    f"{self.data.source!r}: all stages draw scenes or none does; to mix them with "
                    "pictures, make a dataset of scenes with `daybreak prepare scenes:10000`"
                )
        return self

    @model_validator(mode="after")
    def _route_fits(self) -> "Recipe":
        depth, route = self.dit.depth, self.tread
        if route is not None and route.stop > depth:
            raise ValueError(f"tread.stop = {route.stop} is beyond dit.depth = {depth}")
        if route is not None and route.kind == "deferred" and route.stop != depth:
            raise ValueError(
                f'tread.stop = {route.stop}, but with tread.kind = "deferred" skipped tokens never '
                f"return: set it to dit.depth = {depth}"
            )
        if self.sample.guide == "self" and (route is None or route.kind == "deferred"):
            raise ValueError(
                'sample.guide = "self" guides with the same network on its token route, so it '
                'needs a section [tread] of kind "tread" or "sprint"'
            )
        return self

    @model_validator(mode="after")
    def _terms_fit(self) -> "Recipe":
        route = self.tread
        if self.repa is not None:
            self.repa.check(self.dit.depth, range(route.start, route.stop) if route else range(0))
        for number, stage in enumerate(self.stage):
            for name in stage.without:
                if getattr(self, name) is None:
                    raise ValueError(
                        f"stage.{number}.without names {name}, but there is no section [{name}]"
                    )
            if self.contrastive is not None and (stage.batch % 2 or self.micro % 2):
                raise ValueError(
                    f"[contrastive] compares pictures in pairs, so stage.{number}.batch = "
                    f"{stage.batch} and micro = {self.micro} must both be even"
                )
        return self

    @model_validator(mode="after")
    def _evaluation_fits(self) -> "Recipe":
        if self.evaluate is not None:
            self.evaluate.check(self.drawn is not None)
        return self

    def resting(self, stage: Stage, step: int) -> set[str]:
        """Name the sections that are not used in a step, counted from 1 over the whole run."""
        over = self.repa is not None and self.repa.until is not None and step > self.repa.until
        return {*stage.without, *(("repa",) if over else ())}

    def stage_at(self, step: int) -> int:
        """Index (from 0) of the stage of a step (from 1, over the run); after the end, the last."""
        return max(0, bisect_left(self.starts, step) - 1)

    def data_of(self, stage: Stage) -> Data:
        """[data] for a stage; with a source of its own it does not inherit `caption_columns`."""
        if stage.source is None:
            return self.data
        return self.data.model_copy(update={"source": stage.source, "caption_columns": ()})

    @property
    def paths(self) -> list[Path]:
        """The folders of the pictures of all stages, each once."""
        return list(dict.fromkeys(path for s in self.stage for path in self.data_of(s).paths))

    @property
    def drawn(self) -> Scenes | None:
        """The scenes that a run trains on, or None if it trains on other data."""
        return (self.scenes or Scenes()) if self.data.source == "scenes" else None

    @property
    def taught(self) -> frozenset[str]:
        """Families of networks that a run learns from, which must therefore not score it."""
        aligned = self.repa is not None and self.repa.network is not None
        return frozenset({"dino"} if aligned or self.dino is not None else ())

    @property
    def starts(self) -> list[int]:
        """How many steps of the run precede each stage."""
        return [0, *accumulate(stage.count for stage in self.stage[:-1])]

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.count for stage in self.stage)


def load(source: str | Path, sets: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe by path, or by the name of one that comes with daybreak.

    Errors  BadRecipe, one sentence that names the file, the key and a remedy.
    """
    path = find(source)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadRecipe(f"{path} is not valid TOML: {told(error)}") from error
    except OSError as error:
        raise BadRecipe(f"cannot read the recipe {path}: {error.strerror}") from error
    sections = [key for key, value in table.items() if isinstance(value, dict)]
    for name in without:
        if name not in sections:
            raise BadRecipe(
                f"--without {name}: {path} has no section of that name{_nearest(name, sections)}"
            )
        del table[name]
        for row in table.get("stage", ()):
            if isinstance(row, dict) and isinstance(row.get("without"), list):
                row["without"] = [other for other in row["without"] if other != name]
    for assignment in sets:
        _assign(table, assignment)
    return parse(table, str(path))


def parse(table: dict[str, Any], where: str) -> Recipe:
    """Check a table. Errors: BadRecipe for the first thing that is wrong with it."""
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        raise BadRecipe(f"{where}: {_first(error)}") from None
    taken = _flat(recipe.model_dump(mode="json"))
    for name, value in _flat(table).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRecipe(f"{where}: {name} = {value}: give a number that is finite")
        if (wanted := _otherwise(value, taken.get(name))) is not None:
            raise BadRecipe(f"{where}: {name} = {value!r}: give {wanted}")
    return recipe


def _otherwise(given: Any, taken: Any) -> str | None:
    """Say what to give if a value had to be converted: "1" to 1, or 1 to true; else None."""
    if isinstance(taken, bool):
        return None if isinstance(given, bool) else "true or false"
    if isinstance(taken, int | float) and isinstance(given, bool | str):
        return "a number, without quotes"
    return None


def find(source: str | Path) -> Path:
    """Return a recipe's file, given its path or the name of one that comes with daybreak."""
    path = Path(source)
    if path.is_file():
        return path
    shelves = (
        Path(str(resources.files("daybreak"))) / "recipes",
        Path(__file__).parent.parent / "recipes",
    )
    there = {one.stem: one for shelf in reversed(shelves) for one in shelf.glob("*.toml")}
    if path.parent == Path() and path.stem in there:
        return there[path.stem]
    raise BadRecipe(
        f"there is no recipe {str(source)!r}: give the path of a TOML file, or one of "
        f"{', '.join(sorted(there))}"
    )


def dump(recipe: Recipe) -> str:
    """Write a recipe with every value in it, as TOML that `load` reads back as an equal recipe.

    Stages come last and as tables, so that another can be appended.
    """
    table = _without_none(recipe.model_dump(mode="json"))
    stages = [f"\n[[stage]]\n{tomli_w.dumps(row)}" for row in table.pop("stage")]
    return tomli_w.dumps(table) + "".join(stages)


def assigned(given: Mapping[str, str | Path | None]) -> list[str]:
    """Write texts as `--set` takes them, `data.source="pictures"`; None is left out."""
    written = {
        key: tomli_w.dumps({"value": str(text)}) for key, text in given.items() if text is not None
    }
    return [f"{key}={text.removeprefix('value = ').strip()}" for key, text in written.items()]


def digest(recipe: Recipe) -> str:
    """Return the first 12 hex digits of the sha256 of the resolved recipe."""
    return hashlib.sha256(dump(recipe).encode()).hexdigest()[:12]


def differences(old: Recipe, new: Recipe) -> list[str]:
    """List every key whose value differs, as `key: old -> new`."""
    before, after = (_flat(recipe.model_dump(mode="json"), whole=True) for recipe in (old, new))
    return [
        f"{key}: {_shown(before.get(key, 'absent'))} -> {_shown(after.get(key, 'absent'))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "absent") != after.get(key, "absent")
    ]


def _shown(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) and len(value) > 3 else str(value)


def assignments(old: Recipe, new: Recipe) -> list[str]:
    """List the `key=value` that `--set` needs to turn recipe `old` into `new`."""
    before, after = (_flat(recipe.model_dump(mode="json"), whole=True) for recipe in (old, new))
    return [f"{key}={value}" for key, value in after.items() if before.get(key) != value]


def resampled(
    recipe: Recipe, sets: tuple[str, ...], steps: int | None = None, guidance: float | None = None
) -> Recipe:
    """Change how a finished run is sampled, and nothing else of its recipe.

    Errors  BadRecipe for a key outside `sample` and `tread`.
    """
    table = _without_none(recipe.model_dump(mode="json"))
    given = {"sample.steps": steps, "sample.guidance": guidance}
    named = (f"{key}={value}" for key, value in given.items() if value is not None)
    for assignment in (*sets, *named):
        if assignment.split(".")[0].strip() not in ("sample", "tread"):
            raise BadRecipe(
                f"--set {assignment}: this run is already trained, so only keys of [sample] and "
                "[tread] can be set"
            )
        _assign(table, assignment)
    return parse(table, "--set")


def _assign(table: dict[str, Any], assignment: str) -> None:
    """Carry out one `--set a.b=value`."""
    name, equals, text = assignment.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise BadRecipe(f"--set {assignment}: write it as key=value, for example stage.0.steps=500")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if any(sign in text for sign in "\"'[{") or not text.strip():
            raise BadRecipe(f"--set {assignment}: {text!r} is not a TOML value") from None
        value = text.strip()  # a bare word is a string: the shell has eaten its quotes
    place: Any = table
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            if not key.isdecimal() or int(key) >= len(place):
                raise BadRecipe(
                    f"--set {assignment}: {'.'.join(keys[:depth])} has rows 0 to {len(place) - 1}, "
                    f"not {key!r}"
                )
            position: Any = int(key)
        elif isinstance(place, dict):
            position = key
            if not last:
                place.setdefault(key, {})
        else:
            raise BadRecipe(
                f"--set {assignment}: {'.'.join(keys[:depth])} is a value, not a section"
            )
        if last:
            place[position] = value
            if keys[0] == "stage" and position in LENGTHS:
                place.pop(LENGTHS[position], None)
        else:
            place = place[position]


def _first(error: ValidationError) -> str:
    """Describe the first error in one sentence."""
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if kind == "extra_forbidden":
        key = str(problem["loc"][-1])
        known = _keys(problem["loc"][:-1])
        if key in FOREIGN:
            return f"{path} is called {FOREIGN[key]} here{more}"
        return f"unknown key {path}{_nearest(key, known)}{more}"
    if kind == "missing":
        return f"{path} is missing{more}"
    if kind == "tuple_type":
        return f"{path} = {problem['input']!r}: a list is wanted, as in {path}=['...', '...']{more}"
    if kind == "value_error":
        return f"{path}: {message}{more}" if path else f"{message}{more}"
    return f"{path} = {problem['input']!r}: {message[0].lower()}{message[1:]}{more}"


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """List the keys that a place in a recipe may have."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            kinds = [model.model_fields[part].annotation]
            while kinds and not (isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel)):
                kinds = [*get_args(kinds[0]), *kinds[1:]]
            model = kinds[0] if kinds else model
    return list(model.model_fields)


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"


def _without_none(value: Any) -> Any:
    """Leave out what is None: TOML cannot express it, and an absent key means the same."""
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_none(entry) for entry in value]
    return value


def _flat(value: Any, prefix: str = "", whole: bool = False) -> dict[str, Any]:
    """Turn nested tables and lists into dotted keys; with `whole`, plain lists stay one value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    flat: dict[str, Any] = {}
    for key, entry in pairs:
        name = f"{prefix}{key}"
        rows = isinstance(entry, list) and bool(entry)
        if isinstance(entry, dict) or (rows and (isinstance(entry[0], dict) or not whole)):
            flat |= _flat(entry, f"{name}.", whole)
        elif entry is not None:
            flat[name] = entry
    return flat
