"""The command line: one verb, one deed. A verb imports what it needs: `--help` is instant."""

import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from daybreak import host, terminal
from daybreak.failure import BadData, BadRecipe, BadStorage

app = typer.Typer(
    help="Train a text-to-image model from scratch, in pixel space, within a budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    """Show the version and exit, if asked to."""
    if asked:
        print(f"daybreak {host.version_of('daybreak')}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


Recipe = Annotated[str, typer.Argument(help="Path of a recipe, or name of a built-in one.")]
Data = Annotated[
    str | None,
    typer.Option(help="Dataset or folder of captioned pictures, instead of the recipe's."),
]
PerTask = Annotated[int, typer.Option(min=5, help="Prompts per task of the scenes suite.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps. \\[default: the recipe's]")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a sampling setting: --set sample.guide=self"
    ),
]
Best = Annotated[
    bool, typer.Option("--best", help="Use the best checkpoint that was kept, not the newest.")
]
Guidance = Annotated[
    float | None,
    typer.Option(min=1, help="Guidance scale; 1 turns guidance off. \\[default: the recipe's]"),
]


@app.command()
def prepare(
    source: Annotated[
        list[str] | None,
        typer.Argument(help="Folders, .tar or .parquet files, scenes:N, or Hugging Face datasets."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the dataset.")] = None,
    resolution: Annotated[
        list[int] | None,
        typer.Option(
            help="Side of the square bucket in pixels; if repeated, the largest counts. "
            "\\[default: the largest of 32 to 512 that the pictures allow]"
        ),
    ] = None,
    unit: Annotated[
        int | None,
        typer.Option(
            help="Bucket sides are multiples of this: the patch size, or a multiple of it. "
            "\\[default: 4, 8, 16 or 32, by resolution]"
        ),
    ] = None,
    max_aspect: Annotated[
        float | None,
        typer.Option(
            help="Long side / short side of the longest bucket; 1: squares only. \\[default: 2]"
        ),
    ] = None,
    max_crop: Annotated[
        float | None,
        typer.Option(help="Share of a picture that may be cropped away. \\[default: 0.15]"),
    ] = None,
    max_upscale: Annotated[
        float | None,
        typer.Option(help="Factor by which a picture may be enlarged. \\[default: 1.33]"),
    ] = None,
    min_side: Annotated[
        int | None, typer.Option(help="Fewest pixels on the shorter side. \\[default: 0]")
    ] = None,
    caption_column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:WEIGHT",
            help="A caption column and its weight; repeatable. "
            "\\[default: text, caption or prompt; and keywords]",
        ),
    ] = None,
    min_caption: Annotated[
        int | None, typer.Option(help="Fewest characters in a caption. \\[default: 1]")
    ] = None,
    max_caption: Annotated[
        int | None, typer.Option(help="Most characters in a caption. \\[default: 8000]")
    ] = None,
    image_column: Annotated[
        str | None,
        typer.Option(help="The picture column of tables. \\[default: the first that holds bytes]"),
    ] = None,
    licence_column: Annotated[
        str | None, typer.Option(help="The licence column. \\[default: licence or license]")
    ] = None,
    licence: Annotated[
        list[str] | None,
        typer.Option(help="Keep only pictures with this licence; repeatable. \\[default: all]"),
    ] = None,
    skip: Annotated[
        Path | None,
        typer.Option(help="File that lists pictures to leave out: one name or sha256 per line."),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="jpeg, webp, png, or auto: JPEG stays JPEG, others become PNG unless far larger. "
            "\\[default: auto]",
        ),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(help="Colour behind transparent pixels: name or #rrggbb. \\[default: white]"),
    ] = None,
    near: Annotated[
        int | None,
        typer.Option(
            help="Bits of 64 by which hashes of near duplicates may differ; 0: remove exact copies "
            "only. \\[default: 4]"
        ),
    ] = None,
    shard: Annotated[
        int | None, typer.Option(help="Pictures per file of the dataset. \\[default: 1024]")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read from the hub without storing the download.")
    ] = False,
    salvage: Annotated[
        bool, typer.Option("--salvage", help="Keep the readable part of damaged tars and tables.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Worker processes. \\[default: one per core]")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every byte of an existing dataset.")
    ] = False,
    cache_text: Annotated[
        str | None,
        typer.Option(
            metavar="ENCODER",
            help="Encode the captions once, for all runs: a text encoder, or a recipe with one.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="With --cache-text: text.max_tokens of the runs. \\[default: 32]"),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="With --cache-text: encode only share I of N, as one of N devices.",
        ),
    ] = None,
    precision: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="With --cache-text: precision of the runs."),
    ] = "auto",
) -> None:
    """Make a dataset of captioned pictures; the same command again continues where it stopped."""
    from daybreak.data import prepare as work

    if not (source or out) or not (verify or cache_text or (source and out)):
        raise BadRecipe(
            "give one or several sources and --out DATASET; or an existing DATASET and --verify or "
            "--cache-text ENCODER"
        )
    if (part or max_tokens) and not cache_text:
        raise BadRecipe(
            "--part and --max-tokens are options of --cache-text: give it too, or leave them out"
        )
    if source and out:
        given = {
            "resolution": max(resolution) if resolution else None,
            "unit": unit,
            "max_aspect": max_aspect,
            "max_crop": max_crop,
            "max_upscale": max_upscale,
            "min_side": min_side,
            "caption_columns": caption_column,
            "min_caption": min_caption,
            "max_caption": max_caption,
            "image_column": image_column,
            "licence_column": licence_column,
            "licences": licence,
            "skip": work.skip_list(skip) if skip else None,
            "format": form,
            "background": background,
            "near": near,
            "shard": shard,
            "stream": stream,
        }
        settings, cores = work.settings(given), processes or host.cores()
        if (out / "manifest.json").is_file():
            print(f"{out} exists already: comparing it with these sources and settings")
        try:
            manifest = work.prepare(source, out, settings, cores, salvage, terminal.remaining())
        except KeyboardInterrupt:
            print("\nstopped; the same command continues from here", file=sys.stderr)
            raise typer.Exit(130) from None
        terminal.clear()
        print(*work.summary(out, manifest), f"next: daybreak inspect {out}", sep="\n")
    datasets = [out] if out else [Path(name) for name in source or ()]
    if cache_text:
        _cache_text(datasets, cache_text, max_tokens, precision, part)
    for dataset in datasets if verify else ():
        count = work.verify(dataset, terminal.counter("bytes checked"))
        if (dataset / "text").is_dir():
            from daybreak.model import text_cache

            text_cache.verify(dataset)
        print(f"{dataset}: {count:,} pictures, every byte matches the manifest")


def _cache_text(
    datasets: list[Path],
    encoder: str,
    max_tokens: int | None,
    precision: str,
    share: str | None,
) -> None:
    """Encode the captions of datasets, and print where they are."""
    from daybreak.model import text_cache
    from daybreak.train import encoded

    part = text_cache.Part.parse(share) if share else text_cache.ALL
    settings, precision = encoded.asked(encoder, max_tokens, precision)
    for dataset in datasets:
        made = encoded.fill(dataset, settings, precision, terminal.counter("captions"), part)
        print(f"text: {made}")


@app.command()
def train(
    recipe: Recipe,
    out: Annotated[Path | None, typer.Option(help="Run folder, instead of the recipe's.")] = None,
    data: Data = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a value of the recipe: --set stage.0.steps=500",
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without", metavar="SECTION", help="Leave out a section of the recipe: --without muon"
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Stop within this, restarts included: 90s, 24h, 1500usd or 4e20flop."),
    ] = None,
    changed: Annotated[
        bool,
        typer.Option("--changed", help="Continue even if the recipe or the data have changed."),
    ] = False,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="STEP:COUNT",
            help="Profile COUNT steps from STEP on, into RUN/trace-STEP.json.gz.",
        ),
    ] = None,
) -> None:
    """Train a recipe; the same command again continues where it stopped."""
    from daybreak import config
    from daybreak.train import ledger, loop
    from daybreak.train import trace as tracing

    wanted = tracing.parse(trace) if trace else None
    sets = config.assigned({"out": out, "data.source": data})
    if budget is not None:
        from daybreak.train import budget as paper

        sets.append(paper.assigned(budget))
    loaded = config.load(recipe, (*(set_ or ()), *sets), tuple(without or ()))
    outcome = loop.train(loaded, changed=changed, gone=ledger.age(), trace=wanted)
    if outcome.code == 0 and os.environ.get("RANK", "0") == "0":
        print(f'next: daybreak sample "a prompt" --run {loaded.out}')
    raise typer.Exit(outcome.code)


@app.command()
def sample(
    prompt: Annotated[list[str], typer.Argument(help="One prompt or several.")],
    run: Annotated[Path, typer.Option(help="Folder of the run whose model draws.")],
    count: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 4,
    best: Best = False,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture of each prompt.")] = 0,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="Size in pixels. \\[default: that of the last stage's grids]",
        ),
    ] = None,
    set_: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures. \\[default: RUN/samples/...]")
    ] = None,
) -> None:
    """Draw pictures for prompts, with the averaged weights of a run."""
    from daybreak.train import sampling

    wanted = sampling.Wanted(
        prompts=tuple(prompt),
        each=count,
        best=best,
        steps=steps,
        guidance=guidance,
        seed=seed,
        size=None if size is None else sampling.size(size),
        sets=tuple(set_ or ()),
        out=out,
    )
    for path in sampling.sample(run, wanted, partial(print, file=sys.stderr)):
        print(path)


@app.command()
def evaluate(
    folder: Annotated[
        Path, typer.Argument(help="A run folder, or any diffusers text-to-image pipeline.")
    ],
    suite: Annotated[
        str, typer.Option(help="scenes, validation, distribution, prompts, geneval or coco30k.")
    ] = "scenes",
    per_task: PerTask = 120,
    count: Annotated[
        int, typer.Option(min=20, help="Number of pictures for validation and distribution.")
    ] = 5000,
    each: Annotated[
        int, typer.Option(min=1, help="Pictures per prompt, for prompts and geneval.")
    ] = 4,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts, .txt or .jsonl; for geneval its evaluation_metadata.jsonl."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A prepared dataset, for validation and distribution.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Folder of real pictures to compare with, for coco30k.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Results file of GenEval: read its score and draw nothing.")
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            help="Feature network: scenes, dinov2, clip, inception or a folder; repeatable."
        ),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Also compute CLIPScore with this model: clip, or a folder.")
    ] = None,
    canvas: Annotated[
        str | None,
        typer.Option(help="Canvas of the scenes, for a pipeline: 32, 64, 64-large or 128."),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            min=8, help="Side in pixels of a pipeline's pictures, or at which coco30k compares."
        ),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls", help="With scenes: also test diversity, memorisation and empty prompts."
        ),
    ] = False,
    best: Best = False,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Evaluation seed. \\[default: from the weights; 0 for pictures to compare with]",
        ),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    set_: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results. \\[default: FOLDER/evaluation]")
    ] = None,
) -> None:
    """Score a run or a diffusers pipeline: a table, and FOLDER/evaluation/SUITE.json.

    Options other than the defaults are added to the file name: scenes-best-steps20-guidance3.json.
    """
    from daybreak.train import scoring

    wanted = scoring.Wanted(
        suite=suite,
        per_task=per_task,
        number=count,
        each=each,
        prompts=prompts,
        data=data,
        reference=reference,
        results=results,
        features=tuple(features or ()),
        clip=clip,
        canvas=canvas,
        resolution=resolution,
        controls=controls,
        best=best,
        seed=seed,
        steps=steps,
        guidance=guidance,
        sets=tuple(set_ or ()),
    )
    scored = scoring.score(folder, wanted, out or folder / "evaluation", terminal.counter)
    if scored is None:  # of several processes one speaks
        return
    terminal.tables(table for table in scored.tables if table[1])
    for remark in scored.result.remarks:
        print(f"note: {remark}")
    if "folder" in scored.result.details:
        print(f"pictures: {scored.result.details['folder']}")
    print(f"{'score' if scored.result.values else 'record'}: {scored.path}")


@app.command()
def compare(
    recipe: Annotated[
        list[str],
        typer.Argument(help="Recipes, the baseline first; the same one twice is an A/A test."),
    ],
    metric: Annotated[
        str,
        typer.Option(help="SUITE.VALUE, for example validation.loss or distribution.clip.cmmd."),
    ] = "scenes.exact",
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=40,
            help="Runs per arm. \\[default: the fewest that can resolve a difference]",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Budget of each run: 10min, 1e15flop or 200k-images. "
            "\\[default: the recipe's steps]"
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(help="Also compare the cost of reaching this value of the metric."),
    ] = None,
    margin: Annotated[float, typer.Option(min=0, help="Smallest difference that matters.")] = 0.0,
    evaluations: Annotated[
        int, typer.Option(min=1, help="Evaluations per run, including the last step's.")
    ] = 8,
    per_task: PerTask = 60,
    pictures: Annotated[
        int, typer.Option(min=20, help="Number of pictures for validation and distribution.")
    ] = 512,
    data: Annotated[
        Path | None, typer.Option(help="A prepared dataset, for validation and distribution.")
    ] = None,
    features: Annotated[str | None, typer.Option(help="Feature network for distribution.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Add an arm with this change: --set dit.depth=8"
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without", metavar="SECTION", help="Add an arm without this section: --without tread"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs; finished ones are reused.")] = Path(
        "runs/compare"
    ),
    record: Annotated[
        Path | None, typer.Option(help="New folder for a record: recipes, logs and every number.")
    ] = None,
) -> None:
    """Train recipes with equal seeds and budgets; say which is better, and how certain that is."""
    from daybreak.evaluate import interim, statistics, suite
    from daybreak.train import arms as plan
    from daybreak.train import budget as paper
    from daybreak.train import compare as work
    from daybreak.train import record as view

    if host.processes() > 1:
        raise BadRecipe(
            "daybreak compare trains all recipes in one process, one after the other: start it "
            "without torchrun"
        )
    asked = suite.suite_of(metric)
    if target is not None and target > 1 and asked == "scenes":
        raise BadRecipe(
            f"--target {target:g}: {metric} is a share between 0 and 1, so give a target like 0.8"
        )
    if not math.isfinite(margin) or not math.isfinite(target or 0.0):
        raise BadRecipe("--target and --margin must be finite numbers")
    if data is not None and asked == "scenes":
        raise BadRecipe(
            f"--data is for validation and distribution, and {metric} uses no dataset: leave it out"
        )
    if features is not None and asked != "distribution":
        raise BadRecipe(
            f"--features is for distribution, and {metric} uses no feature network: leave it out"
        )
    loaded = plan.named(recipe, tuple(set_ or ()), tuple(without or ()))
    if len(loaded) < 2 and target is None:
        raise BadRecipe(
            "there is nothing to compare with: give a second recipe, --set or --without; or "
            "--target, to measure how soon one recipe reaches it"
        )
    evaluation = interim.Config(
        every=1,
        suites=(asked,),
        per_task=per_task,
        pictures=pictures,
        data=None if data is None else str(data),
        features=features,
    )
    given = paper.parse(budget) if budget else None
    arms = plan.arms(loaded, given, evaluation, evaluations, out, metric)
    enough = statistics.seeds_for(len(arms) - 1)
    runs = list(plan.runs(arms, seeds or enough, out))
    if seeds and seeds < enough and len(arms) > 1:
        print(
            f"{seeds} seeds resolve no difference between {len(arms)} arms: give --seeds {enough}"
        )
    if record is not None:
        view.check(record)
    if taken := plan.reuse(runs, out, target is not None):
        print(f"reusing {len(taken)} of {len(runs)} runs, trained for another comparison")
    if code := work.run(runs, arms, print):
        raise typer.Exit(code)
    question = work.Question(metric, plan.unit(given, target), target, margin)
    found = work.compare(arms, [work.read(one, question) for one in runs], question)
    measured = given is not None and given.kind == "seconds"
    terminal.tables(view.tables(found))
    print(*view.sentences(found, measured), sep="\n")
    if kept := view.write(found, budget, measured, out):
        print(f"page of the previous comparison, moved: {kept}")
    print(f"comparison: {out / 'README.md'}")
    if record is not None:
        view.record(found, budget, measured, record)
        print(*view.objections(found), sep="\n")
        print(f"record: {record / 'README.md'}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder that `daybreak train` has written.")],
    best: Best = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write. \\[default: RUN/pipeline]")
    ] = None,
) -> None:
    """Export a run as a folder that Hugging Face diffusers loads."""
    import torch

    from daybreak import config
    from daybreak.generate import pipeline
    from daybreak.train import evaluations, runs

    chosen = evaluations.best(run) if best else None
    recipe, found, model = runs.trained(run, torch.float32, chosen)
    facts = (
        ("recipe", config.digest(recipe)),
        ("steps", f"{found.step} of {recipe.steps}"),
        ("pictures seen", f"{runs.pictures_seen(recipe, found.step):,}"),
        ("weights", f"exponential moving average, {runs.millions(model):.1f} M"),
        ("checkpoint", f"sha256 of its manifest: {found.digest[:16]}"),
    )
    prompts = recipe.sample.prompts or ("",)
    data = ", ".join(path.as_posix() for path in recipe.paths)
    taught = tuple(sorted(recipe.taught))
    card = pipeline.Card(run.name, prompts[0], data, facts, config.dump(recipe), taught)
    side = recipe.stage[-1].resolution
    place = out or run / "pipeline"
    folder = pipeline.export(model, place, side, recipe.sample, recipe.flow, card, recipe.tread)
    print(f"pipeline: {folder}\nhow to load it: {folder / 'README.md'}")


@app.command()
def inspect(
    folder: Annotated[
        Path, typer.Argument(help="A run, or a dataset that `daybreak prepare` has written.")
    ],
    batch: Annotated[
        int | None, typer.Option(min=1, help="Datasets only: batch size. \\[default: 64]")
    ] = None,
    world: Annotated[
        int | None,
        typer.Option(min=1, help="Datasets only: processes that share a batch. \\[default: 1]"),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            min=1, help="Datasets only: resolution of the stage. \\[default: the dataset's]"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="HTML page to write. \\[default: FOLDER/inspect.html]")
    ] = None,
) -> None:
    """Show a run; or what a dataset holds, and what would keep a run from training on it.

    Prints a summary and writes one page with pictures. The page of a run has its samples, curves,
    scores and cost, also while the run is still training.
    """
    from rich.console import Console

    from daybreak.data import census, prepared
    from daybreak.web import dataset, page
    from daybreak.web import run as of_run

    path = out or folder / "inspect.html"
    if (folder / "recipe.toml").is_file() and (folder / "manifest.json").is_file():
        raise BadRecipe(f"{folder} is a checkpoint: give its run folder, {folder.resolve().parent}")
    if not folder.is_dir():
        raise BadData(f"{folder} is not a folder: give that of a run or of a prepared dataset")
    if (folder / "recipe.toml").is_file():
        if batch or world or resolution:
            raise BadRecipe(
                f"{folder} is a run, and --batch, --world and --resolution are for datasets: leave "
                "them out"
            )
        story = of_run.read(folder)
        Console().print(of_run.summary(story))
        print(f"page: {page.write(of_run.page(story), path)}")
        return
    if not prepared.is_prepared(folder):
        raise BadData(
            f"{folder} is neither a run (it has no recipe.toml) nor a prepared dataset (it has no "
            "manifest.json): give the folder of one itself"
        )
    opened = census.read(folder, terminal.counter("bytes checked"))
    found = census.count(opened, batch or 64, world or 1, resolution)
    Console().print(dataset.summary(found))
    print(f"page: {page.write(dataset.page(opened, found), path)}")
    if found.problems:
        raise found.problems[0]


@app.command()
def plan(
    recipe: Recipe,
    gpus: Annotated[
        str | None,
        typer.Option(help="Devices: 32xH200, RTX4090 or cpu. \\[default: this machine's]"),
    ] = None,
    data: Data = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Say what this buys: 1500usd, 24h, 4e20flop or 200k-images. "
            "\\[default: the recipe's own budget]"
        ),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars per device and hour.")] = None,
    share: Annotated[
        float | None,
        typer.Option(min=0.001, max=1, help="Share of peak FLOP/s that is reached (MFU)."),
    ] = None,
    cached_text: Annotated[
        bool, typer.Option("--cached-text", help="Assume that captions are already encoded.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time 20 real steps of each stage on this machine.")
    ] = False,
    fit: Annotated[
        Path | None,
        typer.Option(
            help="Write the recipe, fitted to these devices, to this file: mesh, largest micro, "
            "parallel.recompute if needed, and the steps that the budget buys."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a value of the recipe: --set micro=8"
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without", metavar="SECTION", help="Leave out a section of the recipe: --without repa"
        ),
    ] = None,
) -> None:
    """Estimate the hours, dollars and memory of a run before its first step."""
    from json import dumps

    from rich.console import Console

    from daybreak import config
    from daybreak.train import budget as paper
    from daybreak.train import fitting
    from daybreak.train import plan as view

    if host.processes() > 1:
        raise BadRecipe(
            "daybreak plan computes for all devices in one process: start it without torchrun"
        )
    if share is not None and measure:
        raise BadRecipe("--measure measures what --share assumes: leave one of them out")
    if fit and fit.exists():
        raise BadRecipe(f"--fit {fit} exists already: name another file, or remove it")
    if fit and not fit.absolute().parent.is_dir():
        raise BadStorage(
            f"cannot write {fit}: there is no folder {fit.parent}; make it, or name another file"
        )
    sets = (*(set_ or ()), *config.assigned({"data.source": data}))
    wanted = config.load(recipe, sets, tuple(without or ()))
    given = paper.granted(wanted) if budget is None else (paper.parse(budget),)
    cluster = paper.cluster(wanted, gpus)
    wanted = fitting.fitted(wanted, cluster) if fit else wanted
    if measure:  # not before it is known to fit
        fitting.check_memory(wanted, paper.plan(wanted, cluster, price, cached=cached_text))
    made = paper.plan(wanted, cluster, price, share, measure, cached_text)
    times = min((paper.bought(made, one) for one in given), default=None)
    if json:
        print(dumps(view.facts(wanted, made, times), indent=1))
    else:
        for table in view.tables(wanted, made, times):
            Console().print(table)
    fitting.check_memory(wanted, made)
    fitting.check_data(wanted)
    if fit:
        wanted = wanted if times is None else paper.times_as_long(wanted, times)
        try:
            fit.write_text(config.dump(wanted), encoding="utf-8")
        except OSError as error:
            raise BadStorage(f"cannot write {fit}: {error.strerror}") from error


@app.command()
def doctor(
    make_toy_teachers: Annotated[
        Path | None,
        typer.Option(
            help="Only write tiny random teacher networks to this folder, to try recipes with."
        ),
    ] = None,
) -> None:
    """Check this machine: what it has, what is slow, and why."""
    if make_toy_teachers:
        from daybreak.model import toy_teachers

        made = toy_teachers.make(make_toy_teachers)
        keys = {"repa.teacher": "dinov3", "dino.teacher": "dinov2_with_registers"}
        keys |= {"lpips.vgg": "vgg", "lpips.heads": "heads"}
        print(*(f"--set {key}={made[kind]}" for key, kind in keys.items()))
        return

    from daybreak import doctor as examination

    terminal.findings(examination.report())


def main() -> None:
    """Run the command line. Exit codes: daybreak/failure.py, 75 preempted, 130 interrupted."""
    host.settle()
    with terminal.plain_failures():
        app()
