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
    help="Train a text-to-image model from nothing, in pixels, within a budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    """Say which version this is, and leave, if that is asked."""
    if asked:
        print(f"daybreak {host.version_of('daybreak')}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_version, help="Say which version."),
    ] = False,
) -> None:
    pass


Recipe = Annotated[str, typer.Argument(help="A recipe's path, or the name of a built-in one.")]
Data = Annotated[
    str | None, typer.Option(help="Folder of captioned pictures, instead of the recipe's.")
]
PerTask = Annotated[int, typer.Option(min=5, help="Prompts of a task of scenes.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps; the recipe's if left out.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change how it is sampled: --set sample.guide=self"
    ),
]
Best = Annotated[
    bool, typer.Option("--best", help="The best checkpoint that was kept, not the newest.")
]
Guidance = Annotated[
    float | None, typer.Option(min=1, help="Guidance scale; 1 is none. The recipe's if left out.")
]


@app.command()
def prepare(
    source: Annotated[
        list[str] | None,
        typer.Argument(help="Folders, tars, parquet files, scenes:N, or datasets of the hub."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the dataset.")] = None,
    resolution: Annotated[
        list[int] | None,
        typer.Option(
            help="Pixels of a square; given several times, the largest. "
            "\\[default: the largest of 32 to 512 that the pictures allow]"
        ),
    ] = None,
    unit: Annotated[
        int | None,
        typer.Option(
            help="Sides of all shapes are multiples of it, as of a patch. "
            "\\[default: 8, 16 or 32, by resolution]"
        ),
    ] = None,
    max_aspect: Annotated[
        float | None,
        typer.Option(
            help="Long by short side of the longest shape; 1: squares only. \\[default: 2]"
        ),
    ] = None,
    max_crop: Annotated[
        float | None, typer.Option(help="Share of a picture that may be cut off. \\[default: 0.15]")
    ] = None,
    max_upscale: Annotated[
        float | None, typer.Option(help="Factor a picture may be enlarged by. \\[default: 1.33]")
    ] = None,
    min_side: Annotated[
        int | None, typer.Option(help="Pixels the shorter side must have. \\[default: 0]")
    ] = None,
    caption_column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:WEIGHT",
            help="A column of captions; may be given several times. "
            "\\[default: text, caption or prompt, and keywords]",
        ),
    ] = None,
    min_caption: Annotated[
        int | None, typer.Option(help="Characters a caption must have. \\[default: 1]")
    ] = None,
    max_caption: Annotated[
        int | None, typer.Option(help="Characters a caption may have. \\[default: 8000]")
    ] = None,
    image_column: Annotated[
        str | None,
        typer.Option(help="A table's column of pictures. \\[default: the first that holds bytes]"),
    ] = None,
    licence_column: Annotated[
        str | None, typer.Option(help="A column of licences. \\[default: licence or license]")
    ] = None,
    licence: Annotated[
        list[str] | None,
        typer.Option(help="A licence to allow; may be given several times. \\[default: all]"),
    ] = None,
    skip: Annotated[
        Path | None,
        typer.Option(help="A file that lists pictures to leave out: names or sha256, one a line."),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="jpeg, webp, png, or auto: png where small, else jpeg. \\[default: auto]",
        ),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(help="Colour behind clear pixels, by name or #rrggbb. \\[default: white]"),
    ] = None,
    near: Annotated[
        int | None,
        typer.Option(help="Bits near duplicates may differ in; 0 keeps them. \\[default: 4]"),
    ] = None,
    shard: Annotated[
        int | None, typer.Option(help="Pictures in each file of the dataset. \\[default: 1024]")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read from the hub without storing what it sends.")
    ] = False,
    salvage: Annotated[
        bool, typer.Option("--salvage", help="Keep what can be read of damaged tars and tables.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that work. \\[default: one for each core]")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every byte of a dataset that is there.")
    ] = False,
    cache_text: Annotated[
        str | None,
        typer.Option(
            metavar="ENCODER",
            help="Encode the captions once for all runs with this encoder, or with a recipe's.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="text.max_tokens of the runs, for --cache-text. \\[default: 32]"),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Only this share of the captions, for --cache-text on N devices."
        ),
    ] = None,
    precision: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="precision of the runs, for --cache-text."),
    ] = "auto",
) -> None:
    """Make a dataset of captioned pictures; the same command again continues where it stopped."""
    from daybreak.data import prepare as work

    if not (source or out) or not (verify or cache_text or (source and out)):
        raise BadRecipe(
            "give sources and --out DATASET; or --verify, or --cache-text ENCODER, and DATASET"
        )
    if (part or max_tokens) and not cache_text:
        raise BadRecipe("--part and --max-tokens are of captions to encode: give --cache-text too")
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
            print(f"{out} is there already: it is compared with sources and settings")
        try:
            manifest = work.prepare(source, out, settings, cores, salvage, terminal.remaining())
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on from here", file=sys.stderr)
            raise typer.Exit(130) from None
        terminal.clear()
        print(*work.summary(out, manifest), f"now: daybreak inspect {out}", sep="\n")
    datasets = [out] if out else [Path(name) for name in source or ()]
    if cache_text:
        _cache_text(datasets, cache_text, max_tokens, precision, part)
    for dataset in datasets if verify else ():
        count = work.verify(dataset, terminal.counter("bytes checked"))
        if (dataset / "text").is_dir():
            from daybreak.model import text_cache

            text_cache.verify(dataset)
        print(f"{dataset}: {count:,} pictures, every byte as its manifest says")


def _cache_text(
    datasets: list[Path],
    encoder: str,
    max_tokens: int | None,
    precision: str,
    share: str | None,
) -> None:
    """Encode the captions of datasets, and say where that is."""
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
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value: --set stage.0.steps=500"),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="SECTION", help="Leave a section out: --without muon"),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="End in time: 90s, 24h, 1500usd, 4e20flop; over restarts.")
    ] = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Continue although recipe or data have changed.")
    ] = False,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="STEP:COUNT",
            help="Write RUN/trace-STEP.json.gz: steps as a profiler sees them.",
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
        print(f'now: daybreak sample "a prompt" --run {loaded.out}')
    raise typer.Exit(outcome.code)


@app.command()
def sample(
    prompt: Annotated[list[str], typer.Argument(help="One prompt or several.")],
    run: Annotated[Path, typer.Option(help="The run folder whose model draws.")],
    count: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 4,
    best: Best = False,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of each prompt's first picture.")] = 0,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT", help="In pixels; as in the last stage's grids if left out."
        ),
    ] = None,
    set_: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; RUN/samples/... if left out.")
    ] = None,
) -> None:
    """Draw pictures of a prompt with the averaged weights of a run."""
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
        Path, typer.Argument(help="A run folder, or any text-to-image pipeline of diffusers.")
    ],
    suite: Annotated[
        str, typer.Option(help="scenes, validation, distribution, prompts, geneval or coco30k.")
    ] = "scenes",
    per_task: PerTask = 120,
    count: Annotated[
        int, typer.Option(min=20, help="Pictures of validation and distribution.")
    ] = 5000,
    each: Annotated[
        int, typer.Option(min=1, help="Pictures of a prompt, for prompts and geneval.")
    ] = 4,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Lines of text or JSON; GenEval's evaluation_metadata.jsonl."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A prepared dataset, for validation and distribution.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Folder of true pictures, for coco30k.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="What GenEval has written: reads the score, draws nothing.")
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(help="Networks that compare: scenes, dinov2, clip, inception or a folder."),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP for CLIPScore: clip, or a folder; none if left out.")
    ] = None,
    canvas: Annotated[
        str | None, typer.Option(help="Of scenes, for a pipeline: 32, 64, 64-large or 128.")
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(min=8, help="Side of a pipeline's pictures, or those of coco30k."),
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Beside scenes: diversity, memory, no prompt.")
    ] = False,
    best: Best = False,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of the questions; follows from the weights, 0 for validation."),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    set_: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; FOLDER/evaluation if left out.")
    ] = None,
) -> None:
    """Score a run or a pipeline of diffusers: a table, and FOLDER/evaluation/SUITE.json.

    What is asked otherwise than usual stands in the name: scenes-best-steps20-guidance3.json.
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
        list[str], typer.Argument(help="The baseline first; the same one twice is an A/A test.")
    ],
    metric: Annotated[
        str, typer.Option(help="As scenes.exact, validation.loss, distribution.clip.cmmd.")
    ] = "scenes.exact",
    seeds: Annotated[
        int | None, typer.Option(min=1, max=40, help="Runs of each arm; the fewest that can tell.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Of each run: 10min, 1e15flop, 200k-images; else its recipe.")
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="Also compare what it takes to get there.")
    ] = None,
    margin: Annotated[
        float, typer.Option(min=0, help="The smallest difference worth having.")
    ] = 0.0,
    evaluations: Annotated[int, typer.Option(min=1, help="Of a run, the last one included.")] = 8,
    per_task: PerTask = 60,
    pictures: Annotated[int, typer.Option(min=20, help="Of validation and distribution.")] = 512,
    data: Annotated[
        Path | None, typer.Option(help="A prepared dataset to evaluate with, unless on scenes.")
    ] = None,
    features: Annotated[str | None, typer.Option(help="Network of the distribution.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An arm: --set dit.depth=8"),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="SECTION", help="An arm: --without tread"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs; finished ones are used.")] = Path(
        "runs/compare"
    ),
    record: Annotated[
        Path | None, typer.Option(help="A new folder for recipes, logs and every number.")
    ] = None,
) -> None:
    """Train recipes with equal seeds and budget; say which is better, and how sure that is."""
    from daybreak.evaluate import interim, statistics, suite
    from daybreak.train import arms as plan
    from daybreak.train import budget as paper
    from daybreak.train import compare as work
    from daybreak.train import record as view

    if host.processes() > 1:
        raise BadRecipe(
            "daybreak compare trains with one process and takes turns between recipes: start it "
            "without torchrun"
        )
    asked = suite.suite_of(metric)
    if target is not None and target > 1 and asked == "scenes":
        raise BadRecipe(f"--target {target:g}: {metric} is a share between 0 and 1, as in 0.8")
    if not math.isfinite(margin) or not math.isfinite(target or 0.0):
        raise BadRecipe(f"--target and --margin are finite numbers, as {metric} is")
    if data is not None and asked == "scenes":
        raise BadRecipe(f"--data is for validation and distribution: {metric} asks for no pictures")
    if features is not None and asked != "distribution":
        raise BadRecipe(f"--features is for distribution: {metric} asks no network")
    loaded = plan.named(recipe, tuple(set_ or ()), tuple(without or ()))
    if len(loaded) < 2 and target is None:
        raise BadRecipe(
            "there is nothing to compare with: give a second recipe, --set or --without; or "
            "--target, to see how soon one recipe gets there"
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
        print(f"with so many arms nothing is resolved by {seeds} seeds: give --seeds {enough}")
    if record is not None:
        view.check(record)
    if taken := plan.reuse(runs, out, target is not None):
        print(f"{len(taken)} of {len(runs)} runs were trained for another comparison and are used")
    if code := work.run(runs, arms, print):
        raise typer.Exit(code)
    question = work.Question(metric, plan.unit(given, target), target, margin)
    found = work.compare(arms, [work.read(one, question) for one in runs], question)
    measured = given is not None and given.kind == "seconds"
    terminal.tables(view.tables(found))
    print(*view.sentences(found, measured), sep="\n")
    if kept := view.write(found, budget, measured, out):
        print(f"what stood there of another comparison: {kept}")
    print(f"comparison: {out / 'README.md'}")
    if record is not None:
        view.record(found, budget, measured, record)
        print(*view.objections(found), sep="\n")
        print(f"record: {record / 'README.md'}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder that `daybreak train` has written.")],
    best: Best = False,
    out: Annotated[Path | None, typer.Option(help="Folder; RUN/pipeline if left out.")] = None,
) -> None:
    """Write a folder that Hugging Face diffusers loads as it is."""
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
        int | None, typer.Option(min=1, help="Of a dataset: pictures of a batch, 64 if left out.")
    ] = None,
    world: Annotated[
        int | None, typer.Option(min=1, help="Of a dataset: processes that share a batch.")
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(min=1, help="Of a dataset: that of a stage; its own if left out."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page; FOLDER/inspect.html if left out.")
    ] = None,
) -> None:
    """Show a run, or what a dataset holds and what would stop a training on it.

    A summary here, and one page with pictures. That of a run has what it drew, its curves, scores
    and cost; it may be asked for while the run goes on.
    """
    from rich.console import Console

    from daybreak.data import census, prepared
    from daybreak.web import dataset, page
    from daybreak.web import run as of_run

    path = out or folder / "inspect.html"
    if (folder / "recipe.toml").is_file() and (folder / "manifest.json").is_file():
        raise BadRecipe(f"{folder} is a checkpoint: give its run, {folder.resolve().parent}")
    if not folder.is_dir():
        raise BadData(f"{folder} is no folder: give a run, or a dataset that is prepared")
    if (folder / "recipe.toml").is_file():
        if batch or world or resolution:
            raise BadRecipe(
                f"{folder} is a run: leave --batch, --world and --resolution out, they are for "
                "datasets"
            )
        story = of_run.read(folder)
        Console().print(of_run.summary(story))
        print(f"page: {page.write(of_run.page(story), path)}")
        return
    if not prepared.is_prepared(folder):
        raise BadData(
            f"{folder} is neither a run, without recipe.toml, nor a dataset that is prepared, "
            "without manifest.json: give the folder of one itself"
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
        str | None, typer.Option(help="32xH200, RTX4090 or cpu; this machine if left out.")
    ] = None,
    data: Data = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="What do 1500usd, 24h, 4e20flop or 200k-images buy? Else the recipe's own budget."
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Dollars for a device and hour.")
    ] = None,
    share: Annotated[
        float | None, typer.Option(min=0.001, max=1, help="Share of the peak that is reached.")
    ] = None,
    cached_text: Annotated[
        bool, typer.Option("--cached-text", help="Captions will have been encoded before.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take 20 real steps of each stage here first.")
    ] = False,
    fit: Annotated[
        Path | None,
        typer.Option(
            help="Write the recipe here, with a mesh, the largest passes that fit, blocks "
            "recomputed if none would, and the steps that a budget buys."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value: --set micro=8"),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="SECTION", help="Leave a section out: --without repa"),
    ] = None,
) -> None:
    """Say what a run takes before its first step: hours, dollars, memory."""
    from json import dumps

    from rich.console import Console

    from daybreak import config
    from daybreak.train import budget as paper
    from daybreak.train import fitting
    from daybreak.train import plan as view

    if host.processes() > 1:
        raise BadRecipe(
            "daybreak plan counts for all devices with one process: start it without torchrun"
        )
    if share is not None and measure:
        raise BadRecipe("--measure finds the share that --share gives: leave one of them out")
    if fit and fit.exists():
        raise BadRecipe(f"--fit {fit} is there already: name another file, or remove it")
    if fit and not fit.absolute().parent.is_dir():
        raise BadStorage(f"cannot write {fit}: there is no folder {fit.parent}")
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
        typer.Option(help="Only write tiny random teachers to a folder, to try recipes with."),
    ] = None,
) -> None:
    """Say what this machine has, what is slow, and why."""
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
