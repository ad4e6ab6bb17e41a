"""`daybreak compare`: train every arm with every seed, and say what follows from the results.

    value       the metric after the last step, on questions that arms of one seed share
    gain        value minus the baseline's for the same seed, signed so that more is better
    verdict     by the exact p of the gains and their interval, corrected for several arms; an arm
                called better must be so in three quarters of the seeds
    reached     the cost at which a run first met the target; censored if it never did

Every run counts. A run whose loss stops being finite has no value: its arm is called diverged, and
gets no statistics.

Time is that of training only: waiting for data and computing, step by step. Evaluations, grids and
checkpoints are between the steps and do not count. Among the first WARM steps of a stage, or after
a pause, steps longer than SLOW times the stage's median are taken to be compiling, and count as the
median. Wall-clock time is recorded too.

Source  evaluate/statistics, where the tests are named; timing rules: docs/speedrun.md.
"""

import json
import math
import statistics as averages
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from daybreak.config import Recipe
from daybreak.data import disk
from daybreak.evaluate import statistics, suite
from daybreak.evaluate.scenes_questions import SCORED
from daybreak.evaluate.statistics import McNemar, Paired, Race, Reached, Verdict
from daybreak.failure import BadStorage, NotFinite
from daybreak.train import arms as plan
from daybreak.train import evaluations, loop
from daybreak.train.arms import Arm, Run, Unit

WARM, SLOW = 50, 3.0  # steps that may compile, and how much longer than usual they then take


class Question(NamedTuple):
    """The question of a comparison, fixed before the runs."""

    metric: str
    unit: Unit = "pictures"  # in which costs are counted
    target: float | None = None
    margin: float = 0.0

    @property
    def lower(self) -> bool:
        """Whether a smaller value is the better one."""
        return suite.lower_is_better(self.metric)


class Outcome(NamedTuple):
    """One run: its value, its curve of (cost, value), and its seconds.

    The curve has only evaluations at the last resolution: others are not comparable. `wall` is the
    time from when the first step could begin to the end of the last one. It includes compilation
    and what happens between steps, but not start-up, pauses between sessions and what follows the
    last step. `passed` holds each question of scenes with its answer, for McNemar's test; `step` is
    the last step, and `values` holds every metric after it. A run that diverged has the value NaN,
    and no others.
    """

    run: Run
    value: float
    curve: list[tuple[float, float]]
    seconds: float  # of training
    wall: float
    passed: dict[str, bool]
    step: int = 0
    values: Mapping[str, float] = {}


class Row(NamedTuple):
    """One arm: the mean of its values with the interval that other seeds would give."""

    arm: Arm
    outcomes: list[Outcome]
    mean: float
    low: float
    high: float
    reached: list[Reached]
    meets: float | None  # p that the mean value does not meet the target


class Versus(NamedTuple):
    """An arm against the baseline. Without statistics if a run of either diverged."""

    row: Row
    verdict: Verdict
    paired: Paired | None = None
    p: float | None = None  # corrected for all comparisons
    mcnemar: Sequence[McNemar] = ()  # by seed
    race: Race | None = None


class Comparison(NamedTuple):
    """All arms, the baseline first, and what follows."""

    question: Question
    rows: list[Row]
    versus: list[Versus]


# Running


def run(runs: Sequence[Run], arms: Sequence[Arm], tell: Callable[[str], None]) -> int:
    """Train what is not trained yet; returns the exit code of a run that was stopped, else 0.

    Errors  those of training, except NotFinite, which is an outcome.
    """
    for number, one in enumerate(runs, start=1):
        name = arms[one.arm].name
        tell(f"[{number}/{len(runs)}] {name}, seed {one.recipe.seed}")
        if _has_diverged(one.folder):
            tell(f"skipped, as it diverged before: remove {one.folder} to train it again")
            continue
        torch._dynamo.reset()  # else the variants of all runs together reach the limit
        try:
            outcome = loop.train(one.recipe, tell)
        except NotFinite as failure:
            tell(f"diverged: {failure}")
            continue
        if outcome.code:
            return outcome.code
    return 0


# Reading


def read(run: Run, question: Question) -> Outcome:
    """Read what a run has left in its folder.

    Errors  BadRecipe for a metric that its evaluations do not have; BadStorage if the last one is
            missing although the run did not diverge.
    """
    taken, metric = evaluations.lines(run.folder), question.metric
    steps = disk.read_lines(run.folder / "metrics.jsonl")  # none if no step was finite
    seconds = clock(run.recipe, steps)
    unit, last = question.unit, run.recipe.stage[-1].resolution
    costs = seconds if unit == "seconds" else plan.costs(run.recipe, unit)
    curve = [
        (costs[line["step"] - 1], evaluations.value(line, metric))
        for line in taken
        if evaluations.side(line, metric) == last
    ]
    done = bool(taken) and taken[-1]["step"] == run.recipe.steps
    if not done and not _has_diverged(run.folder):
        raise BadStorage(
            f"{run.folder} has no evaluation after its last step, perhaps because the disk was "
            "full: make room, and give the same command again"
        )
    return Outcome(
        run,
        curve[-1][1] if done else math.nan,
        curve,
        seconds[-1] if seconds else 0.0,
        float(steps[-1]["seconds"]) if steps else 0.0,
        _passed(run, metric) if done else {},
        len(steps),
        {name: evaluations.value(taken[-1], name) for name in taken[-1]["values"]} if done else {},
    )


def _has_diverged(folder: Path) -> bool:
    """Whether a run's status says that it ended because its loss was not finite."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except FileNotFoundError:  # the disk was full
        return False
    return bool(status["code"] == NotFinite.code)


def clock(recipe: Recipe, steps: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds of training up to each step, compilation left out."""
    took = [float(line["waited"]) + float(line["worked"]) for line in steps]
    total, found, first = 0.0, [], 0
    for stage in recipe.stage:
        inside = took[first : first + stage.count]
        usual = averages.median(inside) if inside else 0.0
        began = 0  # where compiled code was last discarded
        for place, seconds in enumerate(inside):
            if "resumed" in steps[first + place]:
                began = place
            total += usual if place - began < WARM and seconds > SLOW * usual else seconds
            found.append(total)
        first += stage.count
    return found


def _passed(run: Run, metric: str) -> dict[str, bool]:
    """The answers behind a metric of scenes, by question.

    Empty for another metric, or if those of the last step could not be written.
    """
    name, _, value = metric.partition(".")
    file = run.folder / "evaluation/interim/scenes.json"
    if name != "scenes" or not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["step"] != run.recipe.steps:
        return {}

    def counts(item: dict[str, Any]) -> bool:
        if item["split"] is not None:
            return bool(item["split"] == value)
        return item["task"] == value or (value == "exact" and item["task"] in SCORED)

    return {
        f"{item['task']} {item['split']} {item['seed']} {item['prompt']}": bool(item["passed"])
        for item in found["items"]
        if counts(item)
    }


# What follows


def compare(arms: Sequence[Arm], outcomes: Sequence[Outcome], question: Question) -> Comparison:
    """Draw the conclusions. `outcomes` holds the same number of runs for each arm."""
    rows = [
        _row(arm, [o for o in outcomes if o.run.arm == place], question)
        for place, arm in enumerate(arms)
    ]
    baseline, *candidates = rows
    whole = [row for row in candidates if not _diverged(baseline) and not _diverged(row)]
    pairs = {
        row.arm.name: statistics.paired(
            _values(row), _values(baseline), question.lower, question.margin
        )
        for row in whole
    }
    adjusted = dict(zip(pairs, statistics.holm([p.p for p in pairs.values()]), strict=True))
    versus = []
    for row in candidates:
        name = row.arm.name
        if name not in pairs:
            versus.append(Versus(row, _no_verdict(row, baseline)))
            continue
        verdict = statistics.verdict(pairs[name], adjusted[name], len(pairs))
        tests = [_mcnemar(*pair) for pair in zip(row.outcomes, baseline.outcomes, strict=True)]
        race = None
        if question.target is not None:
            race = statistics.race(_crossed(row, question), _crossed(baseline, question))
        found = [test for test in tests if test is not None]
        versus.append(Versus(row, verdict, pairs[name], adjusted[name], found, race))
    return Comparison(question, rows, versus)


def _row(arm: Arm, outcomes: list[Outcome], question: Question) -> Row:
    values = [outcome.value for outcome in outcomes]
    mean, (low, high) = averages.fmean(values), (math.nan, math.nan)
    if math.isfinite(mean):
        low, high = statistics.mean_interval(values)
    if question.target is None:
        return Row(arm, outcomes, mean, low, high, [], None)
    reached = [_reached(outcome, question) for outcome in outcomes]
    sure = math.isfinite(mean) and len(values) > 1
    p = statistics.meets(values, question.target, question.lower) if sure else None
    return Row(arm, outcomes, mean, low, high, reached, p)


def _crossed(row: Row, question: Question) -> list[Reached]:
    """Costs of reaching the target, interpolated between two evaluations, for comparing arms."""
    return [_reached(outcome, question, interpolate=True) for outcome in row.outcomes]


def _reached(outcome: Outcome, question: Question, interpolate: bool = False) -> Reached:
    """The cost at which a run met the target; its whole cost if it never did."""
    assert question.target is not None
    if not outcome.curve:  # it diverged before it was ever evaluated
        return Reached(0.0, met=False)
    costs, values = [cost for cost, _ in outcome.curve], [value for _, value in outcome.curve]
    return statistics.to_target(costs, values, question.target, question.lower, interpolate)


def _mcnemar(candidate: Outcome, baseline: Outcome) -> McNemar | None:
    """McNemar's test of two runs' answers; None if their questions differ."""
    asked = list(baseline.passed)
    if not asked or candidate.passed.keys() != baseline.passed.keys():
        return None
    ours, theirs = candidate.passed, baseline.passed
    return statistics.mcnemar([ours[key] for key in asked], [theirs[key] for key in asked])


def _values(row: Row) -> list[float]:
    return [outcome.value for outcome in row.outcomes]


def _diverged(row: Row) -> list[int]:
    """Seeds whose loss stopped being finite."""
    return [o.run.recipe.seed for o in row.outcomes if not math.isfinite(o.value)]


def _no_verdict(row: Row, baseline: Row) -> Verdict:
    ours, theirs = _diverged(row), _diverged(baseline)
    seeds = ", ".join(map(str, ours or theirs))
    if ours and not theirs:
        return Verdict("worse", f"worse: it diverged with seed {seeds}, and the baseline never did")
    who = "both arms" if ours else "the baseline"
    return Verdict("not resolved", f"not resolved: {who} diverged (seed {seeds})")
