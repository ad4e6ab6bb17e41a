"""A run to look at: its state, samples, losses, scores and cost.

Everything is read from the run's folder, so it works for a run in progress, one that was killed,
and one that was copied from another machine; the same command updates the page. The pictures are
samples of the recipe's prompts: a row for each prompt, and a column for each of some steps.
"""

import json
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from daybreak.config import Recipe
from daybreak.data import disk
from daybreak.train import evaluations, facts, runs, status
from daybreak.web import page as web
from daybreak.web.curve import FRAME, Curve, curve

SIDE = 256  # largest side of a picture in the page, in pixels
COLUMNS, ROWS = 6, 24  # at most, of steps and prompts shown
LISTED, SAID = 50, 3  # incidents on the page; values of a score in a terminal
LATE = 100  # last steps, whose mean is reported as the loss
QUIET = 300.0  # seconds without output after which a run is no longer assumed to be alive
COUNTED = {  # in metrics.jsonl, but not parts of the loss
    *("step", "images", "seconds", "norm", "lr", "waited", "worked", "waiting", "words", "resumed"),
    *("images_per_second", "flops_per_second", "share_of_peak", "memory_mib"),
    *("skipped", "substituted"),
    *("dollars", "dollars_to_go"),
}
LINES = {  # quantities that are drawn beside the loss
    "norm": "norm of the gradient",
    "lr": "learning rate",
    "images_per_second": "pictures a second",
    "share_of_peak": "of the peak, %",
    "waiting": "waits for pictures, % of the time",
}
FALLING = {"loss", "norm"}


class Shown(NamedTuple):
    """A prompt, and its picture at each of the steps, as text for the page; empty if none."""

    prompt: str
    pictures: list[str]


class Score(NamedTuple):
    """A result of `daybreak evaluate`: its name, and a value and its interval for each row."""

    name: str
    rows: list[tuple[str, str, str]]


class Story(NamedTuple):
    """What a run's folder says about the run."""

    folder: Path
    recipe: Recipe
    status: Mapping[str, Any]
    known: Mapping[str, Any]  # run.json
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    incidents: list[dict[str, Any]]
    heard: float  # seconds since it last wrote something
    alive: bool | None  # whether its process exists; None if that cannot be known

    @property
    def done(self) -> int:
        """The newest step."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def state(self) -> str:
        """The state it has written: running, finished, stopped or failed.

        Instead of running, it is killed if its process no longer exists; and silent if its process
        cannot be checked and it has written nothing for QUIET seconds.
        """
        state = str(self.status.get("state", "unknown"))
        if state == "running" and self.alive is False:
            return "killed"
        return "silent" if state == "running" and not self.alive and self.heard > QUIET else state

    @property
    def sentence(self) -> str:
        """The state of the run, as a sentence."""
        reason, code = self.status.get("reason"), self.status.get("code")
        of = f"step {self.done:,} of {self.recipe.steps:,}"
        said = {
            "running": f"It is running: {of}; last written {_clock(self.heard)} ago.",
            "finished": f"It is finished after {of}: {reason}.",
            "stopped": f"It was stopped at {of}: {reason}. The same command continues.",
            "failed": f"It failed at {of}: {reason} (code {code})",
            "unknown": f"Its state is not known: {of}.",
            "killed": f"It was killed after {of}. The same command continues.",
            "silent": f"It has written nothing for {_clock(self.heard)}: {of}. If it was killed, "
            "the same command continues.",
        }
        return said.get(self.state, f"Its state is {self.state}: {of}.")


def read(folder: Path) -> Story:
    """Read a run's folder.

    Errors  NoCheckpoint if it is not a run; BadRecipe and BadStorage if files cannot be read.
    """
    recipe = runs.recorded(folder)
    files = [folder / name for name in ("recipe.toml", "metrics.jsonl", "status.json")]
    written = [file.stat().st_mtime for file in files if file.exists()]
    return Story(
        folder,
        recipe,
        _object(folder / "status.json"),
        facts.read(folder),
        disk.read_lines(folder / "metrics.jsonl"),
        evaluations.lines(folder),
        disk.read_lines(folder / "incidents.jsonl"),
        max(0.0, time.time() - max(written)),
        status.alive(folder),
    )


def page(story: Story) -> str:
    """The page of a run, as text."""
    drawn = _drawn(story.folder)
    return web.render(
        "run.html",
        name=story.folder.resolve().name,
        story=story,
        facts=told(story),
        drawn=[step for step, _ in drawn],
        shown=list(_shown(drawn)),
        frame=FRAME,
        curves=list(_curves(story)),
        measured=list(_measured(story)),
        scores=list(_scores(story)),
        incidents=list(_incidents(story)),
        first=min(story.recipe.sample.every, story.recipe.steps),
        recipe=(story.folder / "recipe.toml").read_text(encoding="utf-8"),
        machine=_machine(story.known),
    )


def summary(story: Story) -> RenderableType:
    """The run at a glance, for a terminal."""
    colour = {"failed": "red", "silent": "yellow", "killed": "yellow"}.get(story.state, "")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    for name, said in told(story).items():
        table.add_row(name, Text(said))
    for score in _scores(story):
        values = ", ".join(f"{name} {value}" for name, value, _ in score.rows[:SAID])
        table.add_row(score.name, Text(values + ", ..." * (len(score.rows) > SAID)))
    command = _machine(story.known).get("command")
    if command and story.state not in ("running", "finished"):
        table.add_row("the command", Text(command))
    return Group(Text(story.sentence, style=colour), table)


def told(story: Story) -> dict[str, str]:
    """The most important facts, in words."""
    if not story.steps:
        return {"steps": f"none of {story.recipe.steps:,}"}
    last, recipe = story.steps[-1], story.recipe
    late = [line["loss"] for line in story.steps[-LATE:] if line.get("loss") is not None]
    stage = recipe.stage_at(story.done)
    found = {
        "steps": f"{story.done:,} of {recipe.steps:,}",
        "pictures": f"{last['images']:,}",
        "stage": f"{stage + 1} of {len(recipe.stage)}, {recipe.stage[stage].resolution} px",
        f"loss, last {len(late)} steps": _loss(late),
        "pictures a second": f"{last['images_per_second']:,.1f}",
        "trained for": _clock(float(last["seconds"])),
        "memory": web.size(2**20 * last["memory_mib"]),
    }
    if "share_of_peak" in last:
        found["share of the peak"] = f"{100 * last['share_of_peak']:.0f} %"
    if "dollars" in last:
        found["paid"] = f"${last['dollars']:,.2f}"
        found["still to pay"] = f"${last['dollars_to_go']:,.2f}"
    if story.incidents:
        newest = story.incidents[-1]["step"]
        found["incidents"] = f"{len(story.incidents):,}, last at {newest:,}"
    if (checkpoint := story.status.get("checkpoint")) is not None:
        found["newest checkpoint"] = f"{checkpoint:,}"
    if (best := _object(story.folder / "best" / "manifest.json").get("step")) is not None:
        found["best checkpoint"] = f"{best:,}"
    return found


def _loss(late: Sequence[float]) -> str:
    mean = math.fsum(late) / len(late) if late else math.nan
    return "not finite" if math.isnan(mean) else f"{mean:.4f}" if mean < 1000 else f"{mean:.3g}"


def _curves(story: Story) -> Iterator[Curve]:
    """The loss, its parts if it has several, and the quantities in LINES."""
    seen = {name for line in story.steps for name in line}
    parts = sorted(seen - COUNTED - {"loss"})
    names = {"loss": "loss"} | ({name: name for name in parts} if len(parts) > 1 else {})
    for name, title in (names | LINES).items():
        points = [
            (line["step"], float(line[name]) * (100 if "%" in title else 1))
            for line in story.steps
            if line.get(name) is not None
        ]
        falls = name in FALLING or name in parts
        if (drawn := curve(title, points, story.recipe.starts[1:], falls)) is not None:
            yield drawn


def _measured(story: Story) -> Iterator[Curve]:
    """Each value of the evaluations during training, over steps."""
    names = dict.fromkeys(name for line in story.evaluations for name in line["values"])
    for name in names:
        points = [
            (line["step"], value)
            for line in story.evaluations
            if (value := line["values"].get(name, {}).get("value")) is not None
        ]
        falls = name.endswith("loss")
        if (drawn := curve(name, points, story.recipe.starts[1:], falls)) is not None:
            yield drawn


def _scores(story: Story) -> Iterator[Score]:
    """The newest evaluation during training, and results of `daybreak evaluate` in the folder."""
    files = sorted((story.folder / "evaluation").glob("*.json"))
    found = [(f"during training, step {line['step']:,}", line) for line in story.evaluations[-1:]]
    for name, line in [*found, *((file.stem, _object(file)) for file in files)]:
        values = line.get("values")
        if isinstance(values, dict) and values:
            yield Score(name, [(key, *_written(v)) for key, v in values.items() if _is_value(v)])


def _incidents(story: Story) -> Iterator[tuple[str, ...]]:
    """Step, losses and norms by process, what was usual, samples: the newest LISTED."""
    for one in story.incidents[-LISTED:]:
        losses, norms = (", ".join(map(_number, one[name])) for name in ("loss", "norm"))
        samples = f"{one['samples'][0]} to {one['samples'][-1]}"
        yield f"{one['step']:,}", losses, norms, _number(one["usual"]), samples


def _drawn(folder: Path) -> list[tuple[int, Path]]:
    """Some of the steps with samples: the first, the newest, and others in between."""
    found = sorted(
        (int(number), place)
        for place in (folder / "samples").glob("step-*")
        if (number := place.name.removeprefix("step-")).isdecimal()
        and (place / "prompts.json").is_file()
    )
    if not found:
        return []
    spread = np.linspace(0, len(found) - 1, min(len(found), COLUMNS)).astype(int)
    return [found[place] for place in spread.tolist()]


def _shown(drawn: Sequence[tuple[int, Path]]) -> Iterator[Shown]:
    """The newest prompts, each with its earlier pictures from the same noise."""
    asked = [_prompts(place) for _, place in drawn]
    for key in list(asked[-1])[:ROWS] if asked else []:
        pictures = [
            _picture(place / f"{known[key]:02d}.png") if key in known else ""
            for (_, place), known in zip(drawn, asked, strict=True)
        ]
        yield Shown(key[0] or "empty prompt", pictures)


def _prompts(place: Path) -> dict[tuple[str, int], int]:
    """The number of the picture in a folder for each prompt and seed; empty if not recorded."""
    try:
        rows = json.loads((place / "prompts.json").read_bytes())
        return {(row["prompt"], row["seed"]): number for number, row in enumerate(rows)}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _picture(file: Path) -> str:
    try:
        with Image.open(file) as picture:
            small = picture.convert("RGB")
    except OSError:  # it is being written, or was removed
        return ""
    if max(small.size) > SIDE:
        small.thumbnail((SIDE, SIDE))
    return web.uri(np.asarray(small))


def _machine(known: Mapping[str, Any]) -> dict[str, str]:
    """The machine, the code and the command."""
    found = {**known.get("machine", {}), "precision": known.get("precision")}
    found |= {**known.get("versions", {}), "code": known.get("revision")}
    arguments = known.get("arguments")
    found["command"] = shlex.join(["daybreak", *arguments]) if arguments else None
    found["changed"] = "; ".join(known.get("changed", ()))
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def _object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file, or it holds something else."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _written(one: Mapping[str, Any]) -> tuple[str, str]:
    """A value and its interval as text; a dash for a value that is not finite."""
    value, low, high = one.get("value"), one.get("low"), one.get("high")
    between = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
    return "-" if value is None else f"{value:.4g}", between


def _is_value(one: object) -> bool:
    """Whether an entry is a value with its interval, as `daybreak evaluate` writes it."""
    return isinstance(one, dict) and isinstance(one.get("value"), (int, float, type(None)))


def _number(number: object) -> str:
    return f"{number:.4g}" if isinstance(number, float) else str(number)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
