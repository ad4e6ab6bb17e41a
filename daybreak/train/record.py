"""The output of a comparison: a table, sentences, a chart; and a record that others can check.

    RECORD/README.md            table, verdicts, machine, code, command
    RECORD/comparison.json      every number in it
    RECORD/runs.csv             a row for each run
    RECORD/chart.png            the curves during training, and the differences
    RECORD/recipes/             each arm's recipe, ready to train
    RECORD/logs/                metrics of each run, and its evaluations; compressed

A record holds every run of every arm. Its verdicts are those of the statistical tests. It states
which rules of docs/speedrun.md an arm breaks, as far as a program can know.
"""

import csv
import gzip
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from daybreak import config
from daybreak.config import Recipe
from daybreak.data.scenes import SPLITS
from daybreak.evaluate import chart, suite
from daybreak.failure import BadRecipe, BadStorage
from daybreak.generate import grid, sampler
from daybreak.train import arms as plan
from daybreak.train import evaluations, runs
from daybreak.train.compare import Comparison, Outcome, Row, Versus

UNITS = {"pictures": "pictures seen", "flops": "FLOP", "seconds": "seconds of training"}
SHORT = {"pictures": "pictures", "flops": "FLOP", "seconds": "s"}

PAGE = ("README.md", "comparison.json", "runs.csv", "chart.png")
SEEDS, PROMPTS, CALLS, SURE = 7, 200, 50, 0.01  # rules for a record: docs/speedrun.md


class Track(NamedTuple):
    """A category of records: a machine, a canvas and a score to reach."""

    device: str
    cores: int | None  # None: any number
    target: float


TRACKS = {"32": Track("cpu", 2, 0.80), "64": Track("cuda", None, 0.90)}  # by canvas


def tables(found: Comparison) -> list[tuple[list[str], list[list[str]]]]:
    """Head and rows, the baseline first: results and costs."""
    question = found.question
    versus = {one.row.arm.name: one for one in found.versus}
    head = ["arm", f"{question.metric} (95 % interval)"]
    head += ["gain (95 % interval)", "p", "better in"] if versus else []
    results = [
        [row.arm.name, _value(row), *(_gain(versus.get(row.arm.name)) if versus else ())]
        for row in found.rows
    ]
    spent = ["arm", "seeds", "steps", "pictures", "FLOP", "seconds"]
    if question.target is not None:
        spent.append(f"{SHORT[question.unit]} to {question.target:g}")
    return [(head, results), (spent, [_spent(row) for row in found.rows])]


def _value(row: Row) -> str:
    if not math.isfinite(row.mean):
        return "diverged"
    if len(row.outcomes) == 1:
        return f"{row.mean:.3g}"
    return f"{row.mean:.3g} ({row.low:.3g} to {row.high:.3g})"


def _gain(against: Versus | None) -> list[str]:
    if against is None or against.paired is None or against.p is None:
        return ["-", "-", "-"]
    gain, low, high = against.paired[:3]
    return [
        f"{gain:+.3g}" + (f" ({low:+.3g} to {high:+.3g})" if against.paired.n > 1 else ""),
        f"{against.p:.2g}",
        f"{against.paired.wins:.0%}",
    ]


def _spent(row: Row) -> list[str]:
    recipe, n = row.arm.recipe, len(row.outcomes)
    seconds = sum(outcome.seconds for outcome in row.outcomes) / n
    pictures = runs.pictures_seen(recipe, recipe.steps)
    work = _flops(recipe)
    counted = "-" if work is None else f"{work:.3g}"
    cells = [row.arm.name, str(n), f"{recipe.steps:,}", f"{pictures:,}", counted]
    cells.append(f"{seconds:,.0f}")
    if row.reached:
        met = sum(one.met for one in row.reached)
        mean = sum(one.cost for one in row.reached) / n
        least = "" if met == n else "more than "  # a run that never met it counts in full
        cells.append(f"{least}{mean:,.4g} ({met} of {n})")
    return cells


def sentences(found: Comparison, measured: bool) -> list[str]:
    """The conclusions, arm by arm; `measured` if a budget in seconds was turned into steps."""
    question, base = found.question, found.rows[0].arm.name
    said = [sentence for one in found.versus for sentence in _against(one, base, found)]
    said += [
        f"{row.arm.name}: the mean after the last step is {row.mean:.4g}; one-sided p = "
        f"{row.meets:.2g} against no better than {question.target:g} (a record needs 0.01)"
        for row in found.rows
        if row.meets is not None
    ]
    if measured:
        spent = [o.seconds for row in found.rows for o in row.outcomes]
        said.append(
            "the budget of time was turned into steps by the speed of each arm, measured once on "
            f"this machine; training then took {min(spent):,.0f} to {max(spent):,.0f} s"
        )
    walls = [o.wall for row in found.rows for o in row.outcomes]
    said.append(
        "seconds are training time without compilation, evaluation, grids and checkpoints; with "
        f"these, a run took {min(walls):,.0f} to {max(walls):,.0f} s up to its last step"
    )
    codes = sorted({str(_born(o)["revision"]) for row in found.rows for o in row.outcomes})
    if len(codes) > 1:
        said.append(
            f"runs were made by {len(codes)} versions of the code ({', '.join(codes)}), which may "
            "explain differences: give another --out to train all of them again"
        )
    return said


def _against(one: Versus, base: str, found: Comparison) -> list[str]:
    name, target = one.row.arm.name, found.question.target
    said = [f"{name} against {base}: {one.verdict.sentence}"]
    if one.row.arm.twin:
        said.append(f"{name} is an earlier arm with other seeds: an A/A test of the method")
    if one.mcnemar:
        gained, lost = (sum(test[side] for test in one.mcnemar) for side in (0, 1))
        ps = ", ".join(f"{test.p:.2g}" for test in one.mcnemar)
        said.append(
            f"{name}: on the same prompts it passes {gained} that {base} fails, and fails {lost} "
            f"that {base} passes (McNemar seed by seed: p = {ps})"
        )
    if one.race is not None and target is not None:
        race, n = one.race, len(one.row.outcomes)
        if not any(race.met):
            return [*said, f"no run of {name} or {base} reached {target:g}: nothing to compare"]
        if race.early:
            early = (
                f"{race.early} of {2 * n} runs reached {target:g} by their first evaluation, so "
                "when is not known: set a harder target, or more --evaluations"
            )
            return [*said, early]
        horizon = ""
        if math.isfinite(race.horizon):
            horizon = f", counted up to {race.horizon:,.4g}, where a run without it ended"
        said.append(
            f"{name} needs {race.ratio:.2f} times the {UNITS[found.question.unit]} of {base} to "
            f"reach {target:g} (95 % interval {race.low:.2f} to {race.high:.2f}, p = "
            f"{race.logs.p:.2g}{horizon}); {race.met[0]} and {race.met[1]} of {n} runs reached it"
        )
    return said


def objections(found: Comparison) -> list[str]:
    """Say, for each arm, why it is not a record, as far as a program can know.

    If there are several arms the baseline is the current record.
    """
    versus = {one.row.arm.name: one for one in found.versus}
    said = []
    for row in found.rows[1:] or found.rows:
        why = [*_of_runs(found, row), *_of_recipe(found, row.arm.recipe)]
        why += _of_results(row, versus.get(row.arm.name))
        said.append(
            f"{row.arm.name} is not a record because {'; '.join(why)}"
            if why
            else f"{row.arm.name} meets the rules of a record that a program can check; the others "
            "are in docs/speedrun.md"
        )
    return said


def _of_runs(found: Comparison, row: Row) -> list[str]:
    """Rules about seeds, code and machine, which apply to the current record too."""
    outcomes = [outcome for one in found.rows for outcome in one.outcomes]
    born = [_born(outcome) for outcome in outcomes]
    seeds = sorted(outcome.run.recipe.seed for outcome in row.outcomes)
    why = []
    if len(seeds) < SEEDS:
        why.append(f"it has {len(seeds)} of the {SEEDS} seeds that a record needs")
    if seeds != list(range(seeds[0], seeds[0] + len(seeds))):
        why.append("its seeds are not consecutive")
    codes = {one["revision"] for one in born}
    if len(codes) > 1:
        why.append("its runs were made by several versions of the code")
    if any(code is None or code.endswith("-dirty") for code in codes):
        why.append("its code is not a commit: the version ends in -dirty, or is not known")
    machines = _distinct([one["machine"] for one in born])
    if len(machines) > 1:
        why.append("its runs were made on several machines, or with several numbers of threads")
    scenes = row.arm.recipe.drawn
    track = TRACKS.get(scenes.canvas) if scenes else None
    for machine in machines:
        if track and not str(machine.get("device")).startswith(track.device):
            why.append(f"it ran on {machine.get('device')} and its track is for {track.device}")
        elif track and track.cores not in (None, machine.get("cores")):
            why.append(f"it had {machine.get('cores')} cores and its track has {track.cores}")
    return why


def _of_recipe(found: Comparison, recipe: Recipe) -> list[str]:
    """Rules about task, target, sampling and prior knowledge."""
    metric, target = found.question.metric, found.question.target
    scenes, how, asked = recipe.drawn, recipe.sample, recipe.evaluate
    track = TRACKS.get(scenes.canvas) if scenes else None
    if scenes is None or metric != "scenes.exact" or track is None:
        return [
            f"no track has this task: records are of scenes.exact on canvas {' or '.join(TRACKS)}"
        ]
    why = []
    if target is None or target < track.target:
        why.append(f"its target is not {track.target:g} or more")
    if set(scenes.held_out) != set(SPLITS):
        why.append("scenes.held_out is not at its default")
    if asked is None or asked.per_task != PROMPTS:
        why.append(f"its tasks do not have {PROMPTS} prompts each (--per-task)")
    shift = sampler.shift(how, recipe.flow)
    low, high = how.interval if how.guidance > 1 else (math.inf, math.inf)
    if sum(1 + (low <= t <= high) for t in sampler.times(how.steps, shift)[:-1]) > CALLS:
        why.append(f"a picture takes more than {CALLS} evaluations of the network")
    if recipe.taught or recipe.text.encoder or recipe.lpips:
        why.append("it learns from a pretrained network")
    return why


def _of_results(row: Row, against: Versus | None) -> list[str]:
    """Rules about the results."""
    why = []
    if not all(one.met for one in row.reached):
        why.append("not every run meets the target")
    if row.meets is None or not row.meets < SURE:
        why.append(f"its mean score does not meet the target with p < {SURE:g}")
    race = against and against.race
    if against and not (race and not race.early and race.high < 1 and race.logs.p_better < SURE):
        why.append(
            f"it does not reach the target sooner than the standing record with p < {SURE:g}"
        )
    return why


def picture(found: Comparison) -> Image.Image | None:
    """The chart of a comparison; None if no run was ever evaluated."""
    curves = [outcome.curve for row in found.rows for outcome in row.outcomes]
    if not any(math.isfinite(value) for curve in curves for _, value in curve):
        return None
    versus = {one.row.arm.name: one for one in found.versus}
    base, sign = found.rows[0], -1 if found.question.lower else 1
    drawn = []
    for row in found.rows:
        curves, one = [outcome.curve for outcome in row.outcomes], versus.get(row.arm.name)
        if one is None or one.paired is None:
            drawn.append(chart.Arm(row.arm.name, curves))
            continue
        gains = [
            sign * (ours.value - theirs.value)
            for ours, theirs in zip(row.outcomes, base.outcomes, strict=True)
        ]
        interval = (one.paired.low, one.paired.gain, one.paired.high)
        drawn.append(chart.Arm(row.arm.name, curves, gains, interval))
    question = found.question
    return chart.chart(drawn, question.metric, UNITS[question.unit], question.target)


def facts(found: Comparison, budget: str | None) -> dict[str, Any]:
    """Everything, ready for JSON."""
    born = [_born(outcome) for row in found.rows for outcome in row.outcomes]
    return {
        "question": found.question._asdict() | {"budget": budget},
        "arguments": sys.argv[1:],
        "revisions": sorted({str(one["revision"]) for one in born}),
        "machines": _distinct([one["machine"] for one in born]),
        "versions": _distinct([one["versions"] for one in born]),
        "arms": [_arm(row) for row in found.rows],
        "comparisons": [
            {
                "arm": one.row.arm.name,
                "verdict": one.verdict.word,
                "sentence": one.verdict.sentence,
                "paired": one.paired and one.paired._asdict(),
                "p": one.p,
                "mcnemar": [test._asdict() for test in one.mcnemar],
                "race": one.race and {**one.race._asdict(), "logs": one.race.logs._asdict()},
            }
            for one in found.versus
        ],
    }


def _arm(row: Row) -> dict[str, Any]:
    recipe = row.arm.recipe
    return {
        "name": row.arm.name,
        "recipe": config.digest(recipe),
        "steps": recipe.steps,
        "pictures": runs.pictures_seen(recipe, recipe.steps),
        "flops": _flops(recipe),
        "seeds": [outcome.run.recipe.seed for outcome in row.outcomes],
        "values": [outcome.value for outcome in row.outcomes],
        "mean": [row.mean, row.low, row.high],
        "seconds": [round(outcome.seconds, 3) for outcome in row.outcomes],
        "wall": [round(outcome.wall, 3) for outcome in row.outcomes],
        "reached": [one._asdict() for one in row.reached],
        "meets": row.meets,
    }


def _flops(recipe: Recipe) -> float | None:
    """The cost of a run in FLOP; None if the size of a network is unknown."""
    try:
        return plan.costs(recipe, "flops")[-1]
    except BadRecipe:
        return None


def write(
    found: Comparison, budget: str | None, measured: bool, out: Path, more: Sequence[str] = ()
) -> Path | None:
    """Write comparison.json, runs.csv, chart.png and README.md, with `more` sentences in it.

    Several comparisons may share their runs, so the page of another one found there is moved to
    earlier/1, 2 and so on; the new place is returned.

    Errors  BadStorage.
    """
    everything, drawn = facts(found, budget), picture(found)
    earlier = _set_aside(out, everything)
    suite.write(out / "comparison.json", _finite(everything))
    said = [*sentences(found, measured), *more]
    page = _page(found, everything, said, charted=drawn is not None)
    try:
        (out / "README.md").write_text(page, encoding="utf-8")
        with (out / "runs.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows(found))
        if drawn is None:
            (out / "chart.png").unlink(missing_ok=True)
        else:
            grid.save(drawn, out / "chart.png", {"metric": found.question.metric})
    except OSError as error:
        raise BadStorage(f"cannot write {out}: {error.strerror}") from error
    return earlier


def rows(found: Comparison) -> list[list[Any]]:
    """A head and a row for each run: arm, seed, last step, all metrics after it, and speed.

    Values that a diverged run does not have are empty.
    """
    outcomes = [(row.arm.name, outcome) for row in found.rows for outcome in row.outcomes]
    metrics = list(dict.fromkeys(name for _, outcome in outcomes for name in outcome.values))
    made: list[list[Any]] = [["arm", "seed", "step", *metrics, "seconds", "images_per_second"]]
    for name, one in outcomes:
        values = [one.values.get(metric, math.nan) for metric in metrics]
        seen = runs.pictures_seen(one.run.recipe, one.step)
        pace = seen / one.seconds if one.seconds else math.nan
        numbers = [*values, round(one.seconds, 3), round(pace, 3)]
        finite = ["" if math.isnan(number) else number for number in numbers]
        made.append([name, one.run.recipe.seed, one.step, *finite])
    return made


def _set_aside(out: Path, new: Mapping[str, Any]) -> Path | None:
    """Move the page of another comparison aside; a page of the same comparison is replaced."""
    there = [out / name for name in PAGE if (out / name).exists()]
    if not there or _subject(_read(out / "comparison.json")) == _subject(new):
        return None
    places = (out / "earlier" / str(number) for number in itertools.count(1))
    place = next(place for place in places if not place.exists())
    try:
        place.mkdir(parents=True)
        for path in there:
            path.rename(place / path.name)
    except OSError as error:
        raise BadStorage(f"cannot write {out}: {error.strerror}") from error
    return place


def _read(file: Path) -> dict[str, Any]:
    """The numbers of a page; empty if they cannot be read."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _subject(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    """What identifies a comparison; with more seeds it is still the same one."""
    arms = [(arm["name"], arm["recipe"]) for arm in facts.get("arms", ())]
    return facts.get("question"), arms


def record(found: Comparison, budget: str | None, measured: bool, folder: Path) -> None:
    """Write a record with recipes and logs. Errors: BadStorage."""
    write(found, budget, measured, folder, objections(found))
    try:
        for name in ("recipes", "logs"):
            (folder / name).mkdir(exist_ok=True)
        for row in found.rows:
            for outcome in row.outcomes:
                arm = outcome.run.folder.parent.name
                seed = f"{arm}-seed-{outcome.run.recipe.seed}"
                _compress(outcome.run.folder / "metrics.jsonl", folder / f"logs/{seed}.jsonl.gz")
                _compress(
                    outcome.run.folder / evaluations.FILE,
                    folder / f"logs/{seed}-evaluations.jsonl.gz",
                )
                recipe = row.arm.recipe.model_copy(update={"out": f"runs/{arm}"})
                text = config.dump(recipe)
                (folder / f"recipes/{arm}.toml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadStorage(f"cannot write the record {folder}: {error.strerror}") from error


def check(folder: Path) -> None:
    """Create the folder of a record before the runs. Errors: BadRecipe; BadStorage."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadRecipe(
            f"--record {folder} exists already, and records are not overwritten: name another"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadStorage(f"cannot make the record {folder}: {error.strerror}") from error


def _page(
    found: Comparison, everything: Mapping[str, Any], sentences: Sequence[str], charted: bool
) -> str:
    shown = [
        "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
        for head, rows in tables(found)
    ]
    said = "\n".join(f"- {sentence}" for sentence in sentences)
    chart = "![What was spent and what came of it](chart.png)\n\n" if charted else ""
    machines = "\n".join(
        "- " + ", ".join(f"{key} {value}" for key, value in machine.items())
        for machine in (*everything["machines"], *everything["versions"])
    )
    base, *others = (row.arm.name for row in found.rows)
    names = f"{', '.join(others)} against {base}" if others else base
    command = " ".join(["daybreak", *everything["arguments"]])
    revisions = ", ".join(everything["revisions"])
    return f"""# {names}: {found.question.metric}

    {command}

{chart}{(chr(10) * 2).join(shown)}

{said}

Code: {revisions}. Machine and versions:

{machines}
"""


def _born(outcome: Outcome) -> dict[str, Any]:
    """What a run's folder says about machine and code."""
    text = (outcome.run.folder / "run.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _compress(source: Path, target: Path) -> None:
    """Copy a file, compressed; the bytes do not depend on the time."""
    if source.is_file():
        target.write_bytes(gzip.compress(source.read_bytes(), mtime=0))


def _distinct(values: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [value for place, value in enumerate(values) if value not in values[:place]]


def _finite(value: Any) -> Any:
    """The same value with null for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
