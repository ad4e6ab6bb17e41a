"""The command line: one verb, one deed. A verb imports what it needs: `--help` is instant."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daybreak.failure import BadRecipe, BadStorage, Failure

if TYPE_CHECKING:
    from daybreak.generate import sampler

app = typer.Typer(
    help="Train a text-to-image model from nothing, in pixels, within a budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Run = Annotated[Path, typer.Argument(help="A run folder that `daybreak train` has written.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps; the recipe's if left out.")]
Guidance = Annotated[
    float | None, typer.Option(min=1, help="Guidance scale; 1 is none. The recipe's if left out.")
]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's path, or the name of a built-in one.")],
    out: Annotated[Path | None, typer.Option(help="Run folder, instead of the recipe's.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder of captioned pictures, instead of the recipe's.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value: --set stage.0.steps=500")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option("--without", help="Leave a section out: --without muon")
    ] = None,
) -> None:
    """Train a recipe; the same command again continues where it stopped."""
    from daybreak import config
    from daybreak.train import loop

    given = {"out": out, "data.source": data}
    sets = [f"{key}={config.quoted(str(value))}" for key, value in given.items() if value]
    outcome = loop.train(config.load(recipe, (*(set_ or ()), *sets), tuple(without or ())))
    raise typer.Exit(outcome.code)


@app.command()
def sample(
    prompt: Annotated[list[str], typer.Argument(help="One prompt or several.")],
    run: Annotated[Path, typer.Option(help="The run folder whose model draws.")],
    count: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 4,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; RUN/samples/... if left out.")
    ] = None,
) -> None:
    """Draw pictures of a prompt with the averaged weights of a run."""
    from PIL import Image

    from daybreak import config
    from daybreak.generate import draw, grid
    from daybreak.train import runs

    recipe, found, model = runs.trained(run)
    prompts = [words for words in prompt for _ in range(count)]
    seeds = list(range(seed, seed + len(prompts)))
    how = _changed(recipe.sample, steps, guidance)
    side = recipe.stage[-1].resolution
    pictures = draw.draw(model, prompts, seeds, side, side, how, recipe.flow)

    folder = out or run / "samples" / _file_name(prompt[0])
    facts = {"recipe": config.digest(recipe), "step": str(found.step)}
    facts |= {"steps": str(how.steps), "guidance": str(how.guidance)}
    for words, number, picture in zip(prompts, seeds, pictures, strict=True):
        path = folder / f"{_file_name(words)}-seed{number}.png"
        grid.save(Image.fromarray(picture), path, facts | {"prompt": words, "seed": str(number)})
        print(path)
    sheet = grid.grid(pictures, prompts, min(count, 8) if len(prompt) > 1 else None)
    grid.save(sheet, folder / "grid.png", facts)
    print(folder / "grid.png")


@app.command()
def evaluate(
    run: Run,
    suite: Annotated[str, typer.Option(help="What to measure; `scenes` is exact.")] = "scenes",
    per_task: Annotated[int, typer.Option(min=5, help="Prompts per task.")] = 120,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Score a run; the result is a table and RUN/evaluation/SUITE.json."""
    import json

    from rich.console import Console
    from rich.table import Table

    from daybreak.evaluate import scenes_suite
    from daybreak.generate import draw
    from daybreak.train import runs

    if suite != "scenes":
        raise BadRecipe(f"there is no suite {suite!r}: the only one is scenes")
    recipe, found, model = runs.trained(run)
    if recipe.scenes is None:
        raise BadRecipe(f"{run} was not trained on scenes, so its prompts have no exact answer")
    how, side = _changed(recipe.sample, steps, guidance), recipe.stage[-1].resolution
    # The questions follow from the finished weights, so no recipe can be tuned to them.
    seed = int(found.digest[:8], 16)
    result = scenes_suite.evaluate(
        lambda prompts, seeds: draw.draw(model, prompts, seeds, side, side, how, recipe.flow),
        recipe.scenes,
        seed,
        per_task,
        progress=_counter("drawn"),
    )
    result |= {
        "checkpoint": {"step": found.step, "manifest": found.digest},
        "sampler": {"steps": how.steps, "guidance": how.guidance, "interval": how.interval},
        "weights": "ema",
        "seed": seed,
    }
    path = run / "evaluation" / f"{suite}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    rows = Table("", "exact", "95 % interval", "pictures", box=None)
    for row in scenes_suite.table(result):
        rows.add_row(*row)
    Console().print(rows)
    print(f"score: {path}")


@app.command()
def export(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="Folder; RUN/pipeline if left out.")] = None,
) -> None:
    """Write a folder that Hugging Face diffusers loads as it is."""
    import torch

    from daybreak import config
    from daybreak.generate import pipeline
    from daybreak.train import runs

    recipe, found, model = runs.trained(run, torch.float32)
    facts = (
        ("recipe", config.digest(recipe)),
        ("steps", f"{found.step} of {recipe.steps}"),
        ("pictures seen", f"{runs.pictures_seen(recipe, found.step):,}"),
        ("weights", f"exponential moving average, {runs.millions(model):.1f} M"),
        ("checkpoint", f"sha256 of its manifest: {found.digest[:16]}"),
    )
    prompts = recipe.sample.prompts or ("",)
    card = pipeline.Card(run.name, prompts[0], recipe.data.source, facts, config.dump(recipe))
    side = recipe.stage[-1].resolution
    folder = pipeline.export(model, out or run / "pipeline", side, recipe.sample, recipe.flow, card)
    print(f"pipeline: {folder}\nhow to load it: {folder / 'README.md'}")


@app.command()
def doctor() -> None:
    """Say what this machine has, what is slow, and why."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from daybreak import doctor as examination

    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in examination.report():
        mark = "[green]ok[/]" if finding.ok else "[yellow]slow[/]"
        table.add_row(mark, *map(escape, (finding.name, finding.value, finding.remark)))
    Console().print(table)


def _changed(how: "sampler.Config", steps: int | None, guidance: float | None) -> "sampler.Config":
    """Put the settings of the command line in the place of the recipe's."""
    given = {"steps": steps, "guidance": guidance}
    return how.model_copy(update={key: value for key, value in given.items() if value is not None})


def _file_name(prompt: str) -> str:
    """Turn a prompt into a short file name."""
    words = "".join(sign if sign.isalnum() else "-" for sign in prompt.lower())[:60].strip("-")
    return words or "empty"


def _counter(verb: str) -> Callable[[int, int], None]:
    """Count on one line of a terminal; say nothing anywhere else."""

    def show(done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{of} {verb} ", end="\n" if done == of else "", file=sys.stderr)

    return show


@contextmanager
def _plain_failures() -> Iterator[None]:
    """Print a failure as one sentence and leave with its code."""
    try:
        yield
    except Failure as failure:
        print(f"daybreak: {failure}", file=sys.stderr)
        raise SystemExit(failure.code) from None
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
            raise
        print(f"daybreak: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        raise SystemExit(BadStorage.code) from None


def main() -> None:
    """Run the command line. Exit codes: daybreak/failure.py, 75 preempted, 130 interrupted."""
    # Threads that wait for one another spin only briefly before they sleep. The default is faster
    # by a few per cent on an idle machine, but beside one busy process it makes a step five times
    # as slow (docs/performance.md). OpenMP reads it when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with _plain_failures():
        app()
