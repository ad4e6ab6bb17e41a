"""Evaluations during a run: the recipe's [evaluate].

The averaged weights are evaluated, on prompts and pictures that are the same at all steps and for
all runs with the same seed, so that steps and runs can be compared. For a final score use
`daybreak evaluate`, whose prompts are derived from the finished weights.

No random generator of training is used, so a run with evaluations takes the same steps as one
without, bit for bit.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from daybreak.data import scenes as scenes_data
from daybreak.failure import BadRecipe

if TYPE_CHECKING:
    from daybreak.evaluate.artist import Artist
    from daybreak.evaluate.examples import Examples
    from daybreak.evaluate.suite import Result
    from daybreak.model.text_to_image import TextToImage


class Config(BaseModel):
    """Which suites run, and every how many steps; they also run after the last step.

    `best` names the metric by which the best checkpoint is kept. `per_task` is the number of
    prompts for each task of scenes, `pictures` that of pictures for each of the other suites. Those
    come from the prepared dataset `data`, which runs on scenes do not need. `features` is the
    network of the suite distribution.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(gt=0)
    suites: tuple[Literal["validation", "scenes", "distribution"], ...] = Field(
        default=("validation",), min_length=1
    )
    best: str | None = None
    per_task: int = Field(default=20, ge=5)
    pictures: int = Field(default=512, ge=20)  # the fewest that evaluate/distances accepts
    data: str | None = None
    features: str | None = None

    @model_validator(mode="after")
    def _measures_what_it_keeps(self) -> "Config":
        if self.best is not None:
            from daybreak.evaluate import suite

            if suite.suite_of(self.best) not in self.suites:
                raise ValueError(
                    f"best = {self.best!r} is not of a suite that is measured: add its suite, or "
                    f"name a value of {', '.join(self.suites)}"
                )
        return self

    def check(self, on_scenes: bool) -> None:
        """Check against the data of the run: scenes or pictures.

        Errors  ValueError if something that the suites need is missing.
        """
        if on_scenes:
            return
        if "scenes" in self.suites:
            raise ValueError('evaluate.suites names scenes, but data.source is not "scenes"')
        if self.data is None:
            raise ValueError(
                f"evaluate.suites names {self.suites[0]}, which needs pictures that are not "
                "trained on: name a prepared dataset with evaluate.data"
            )
        if "distribution" in self.suites and self.features is None:
            raise ValueError(
                "evaluate.suites names distribution, which needs a feature network: name it with "
                "evaluate.features"
            )


def side(config: Config, suite: str, scenes: scenes_data.Config | None, resolution: int) -> int:
    """Return the side of a suite's pictures in a stage of this resolution.

    Scenes always have the size of their canvas, which the checker requires; pictures of a dataset
    have the resolution of the stage.
    """
    if scenes is not None and (suite == "scenes" or config.data is None):
        return scenes_data.CANVASES[scenes.canvas].size
    return resolution


def names(config: Config, scenes: scenes_data.Config | None) -> list[str]:
    """Return all metrics that the suites of a run measure; some canvases lack some tasks."""
    from daybreak.evaluate import distribution, scenes_questions, suite

    found: list[str] = []
    for name in config.suites:
        if name == "scenes":
            assert scenes is not None
            values = scenes_questions.names(scenes)
        elif name == "distribution":
            values = distribution.names(config.features or "scenes")
        else:
            values = list(suite.METRICS[name])
        found += [f"{name}.{value}" for value in values]
    return found


def check(
    config: Config,
    scenes: scenes_data.Config | None,
    resolutions: Sequence[int],
    unit: int,
    metric: str | None,
) -> None:
    """Check, before the first step, everything that an evaluation will need.

    `resolutions` are those of the stages that are evaluated; `unit` is the model's patch.

    Errors  BadRecipe for a `metric` that the suites do not measure, or a network whose weights are
            missing; BadData for a dataset that is missing or has too few or too small pictures.
    """
    from daybreak.evaluate import examples

    if metric is not None and metric not in (there := names(config, scenes)):
        raise BadRecipe(f"{metric} would not be measured: name one of {', '.join(there)}")
    if config.data is not None and set(config.suites) != {"scenes"}:
        for resolution in sorted(set(resolutions)):
            examples.of_dataset(Path(config.data), resolution, unit, 0, config.pictures)
    if "distribution" in config.suites:
        _load_once(config.features or "scenes")


@cache
def _load_once(network: str) -> None:
    """Check that the network of the suite distribution loads: once, for all runs of a comparison.

    Errors  BadRecipe if it does not.
    """
    from daybreak.evaluate import features

    features.load(network)


def measure(
    config: Config,
    model: "TextToImage",
    artist: "Artist",
    scenes: scenes_data.Config | None,
    noise_scale: float,
    seed: int,
    cache: Path,
) -> Mapping[str, "Result"]:
    """Run the suites; `seed` is the run's own, so runs with the same seed get the same prompts.

    The artist's side is the resolution of the stage; `side` gives that of each suite.

    Errors  those of the suites.
    """
    from daybreak.evaluate import distribution, features, suite

    found: dict[str, Result] = {}
    for name in config.suites:
        asked = artist._replace(side=side(config, name, scenes, artist.side))
        if name == "scenes":
            assert scenes is not None
            found[name] = suite.scenes(asked, scenes, seed, config.per_task)
            continue
        examples = _examples(config, asked, scenes, seed)
        if name == "validation":
            found[name] = suite.validate(model, examples, noise_scale, seed)
        else:
            device = next(model.dit.parameters()).device
            extractor = features.load(config.features or "scenes", device)
            found[name] = distribution.distribution(asked, examples, [extractor], cache, seed)
    return found


def _examples(
    config: Config, artist: "Artist", scenes: scenes_data.Config | None, seed: int
) -> "Examples":
    from daybreak.evaluate import examples

    if config.data is not None:
        folder = Path(config.data)
        return examples.of_dataset(folder, artist.side, artist.unit, 0, config.pictures)
    assert scenes is not None
    return examples.of_scenes(scenes, seed, config.pictures)
