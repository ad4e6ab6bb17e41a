"""Prepare: from sources of any layout to one dataset that training and `datasets` open.

    OUT/data-00000-of-00007.arrow ...    the pictures, as `datasets.save_to_disk` writes them
        dataset_info.json, state.json
        rejected.jsonl                   every input that was left out, with its reason
        duplicates.jsonl                 which pictures are alike, and which of them was kept
        manifest.json                    settings, sources, counts, and the sha256 of every file

The sources are cut into parts, and each part becomes one shard of pictures (data/ingest) under
OUT/.staging, several at a time in parallel processes; a shard is finished when there is a report
beside it. Then duplicates are searched for across all shards, the final files are written, and the
manifest is written last: a folder without it is not a dataset.

After a kill at any moment, the same command continues with the parts that have no report. The
output depends only on the sources and the settings, so the manifest is the same, byte for byte, as
without the kill. Memory holds a few pictures for each process, and some numbers and names for each
picture.
"""

import contextlib
import itertools
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from daybreak import host
from daybreak.data import assemble, buckets, disk, images, records, shards, sources
from daybreak.data.captions import KEYWORDS, USUAL_COLUMNS
from daybreak.data.ingest import Config
from daybreak.data.records import Columns, Record, Refused, Source
from daybreak.data.shards import Progress
from daybreak.failure import BadData, BadRecipe, BadStorage

SCHEMA = 1
STAGING = ".staging"
PEEKED = 256  # first pictures of a source, looked at before the work begins
SIDES = (32, 64, 128, 256, 512)  # resolutions to choose from
UNITS = {32: 512, 16: 256, 8: 64}  # unit: the lowest resolution for which it is chosen
ENOUGH = 0.9  # share of the pictures that must be large enough for a resolution
NAMED_AT_MOST = 5
SHOWN = 6  # buckets


def prepare(
    names: Sequence[str],
    out: Path,
    config: Config,
    processes: int = 1,
    salvage: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Prepare a dataset, or continue with an unfinished one; return its manifest.

    `salvage` keeps what can be read of damaged tars and tables, and leaves the rest out.

    Errors  BadData for a source that cannot be used, a damaged tar or table, or if no picture is
            left; BadRecipe if the settings contradict one another or OUT holds something else;
            BadStorage if OUT cannot be written; LostPeer if a process is killed.
    """
    wanted = Columns(
        tuple(name for name, _ in config.caption_columns),
        config.image_column,
        config.licence_column,
    )
    names = [str(Path(name)) if Path(name).exists() else name for name in names]  # no final slash
    for name in names:
        if out.resolve().is_relative_to(Path(name).resolve()):
            raise BadRecipe(f"--out {out} lies in the source {name}: choose a folder beside it")
    found = [sources.find(name, wanted, config.shard, config.stream) for name in names]
    _refuse_unasked(config, {one.layout for one in found})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of pictures refused later
        config = settled(config, found)
    plan = {
        "schema": SCHEMA,
        "daybreak": host.version_of("daybreak"),
        "settings": config.model_dump(mode="json"),
        "sources": [
            {"source": one.name, "layout": one.layout, "fingerprint": one.fingerprint}
            for one in found
        ],
    }
    finished = _enter(out, plan)
    if finished is not None:
        return finished
    with _claimed(out) as staging:
        _same_plan(staging / "plan.json", plan, out)
        shards.store_all(found, config, staging, processes, progress)
        if not salvage:
            _refuse_damaged(staging, found)
        try:
            manifest = assemble.assemble(out, staging, plan, found, config.near)
        except BadData:  # no picture is left, and other settings cannot use the shards
            shutil.rmtree(staging, ignore_errors=True)
            raise
        except OSError as error:
            raise BadStorage(
                f"cannot write {out}: {error.strerror or error}; fix that, and the same command "
                "continues"
            ) from error
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def _refuse_unasked(config: Config, layouts: set[str]) -> None:
    """Refuse options that apply to none of the sources. Errors: BadRecipe."""
    if config.image_column and layouts.isdisjoint(("parquet", "datasets", "streamed")):
        raise BadRecipe(
            f"--image-column {config.image_column}: is for tables, and no source is one; leave it "
            "out"
        )
    if config.stream and "streamed" not in layouts:
        raise BadRecipe(
            "--stream: is for datasets of the Hugging Face hub, and no source is one; leave it out"
        )


def settings(given: dict[str, Any]) -> Config:
    """Make a Config from values by name; those that are None keep their default.

    Errors  BadRecipe for the first invalid value.
    """
    try:
        return Config(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        flag = {"caption-columns": "caption-column", "licences": "licence"}.get(flag, flag)
        message = first["msg"].removeprefix("Value error, ")
        value = "" if first["type"] == "value_error" else f" {first['input']}"
        raise BadRecipe(f"--{flag}{value}: {message[0].lower()}{message[1:]}") from None


def skip_list(path: Path) -> frozenset[str]:
    """The lines of a file: names within a source, or sha256 of pictures (all or first 16 digits).

    Errors  BadRecipe if it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecipe(f"--skip {path} cannot be read ({error})") from error
    return frozenset(line.strip() for line in lines) - {""}


def summary(out: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """A few lines that say what was made and what was left out."""
    counts, chosen = manifest["counts"], manifest["settings"]
    names = [name for name in manifest["files"] if name.endswith(".arrow")]
    size = sum(file["bytes"] for file in manifest["files"].values()) / 1e6
    yield f"{out}: {counts['kept']:,} pictures of {counts['read']:,}, {size:,.1f} MB"
    shapes = [f"{name} {number:,}" for name, number in manifest["buckets"].items()]
    more = f" and {len(shapes) - SHOWN} more" if len(shapes) > SHOWN else ""
    yield (
        f"  {chosen['resolution']} px, sides in steps of {chosen['unit']}; "
        f"buckets {', '.join(shapes[:SHOWN])}{more}; {len(names)} file{'s' * (len(names) > 1)}"
    )
    if counts["captions_lost"]:
        yield f"  {counts['captions_lost']:,} further captions could not be used"
    examples = dict[str, str]()
    for row in _lines(out / "rejected.jsonl"):
        examples.setdefault(row["kind"], f"{row['where']}: {row['reason']}")
        if len(examples) == len(counts["rejected"]):
            break
    for kind, number in counts["rejected"].items():
        yield f"  left out: {number:,} {kind}, such as {examples[kind]}"
    alike = sum(
        len(group["dropped"])
        for group in _lines(out / "duplicates.jsonl")
        if group["kind"] != "exact"
    )
    if alike:
        yield (
            f"  {alike:,} of them are near duplicates, within {chosen['near']} bits; --near 0 "
            "keeps them"
        )
    if examples:
        yield f"  all of them, with reasons: {out / 'rejected.jsonl'}"


def settled(config: Config, found: Sequence[Source]) -> Config:
    """The settings, with those that were not given chosen from the pictures.

    The default resolution is the largest of 32, 64, 128, 256 and 512 for which nine in ten of the
    first pictures of all sources together are large enough. The default unit is resolution / 16,
    rounded down to a power of two and limited to 8 .. 32: 32 at 512 px, like PRX's patches. Below
    64 px it is 4, because with four units of 8 to a side no bucket is near 4:3. Scenes are stored
    as PNG: their checker relies on the exact colours.

    Errors  BadData for a source whose first pictures have none of the requested captions, or if no
            source has a requested column; BadRecipe for settings that contradict one another.
    """
    seen, large_enough, there = 0, Counter[int](), dict[str, None]()
    for height, width in itertools.chain.from_iterable(_sizes(one, config, there) for one in found):
        seen += 1
        large_enough.update(side for side in SIDES if _fills(height, width, side, config))
    for name, _ in config.caption_columns:
        if name not in there:
            raise BadData(
                f"--caption-column {name}: none of the first pictures has it; they have "
                f"{', '.join(f'`{one}`' for one in there) or 'no column'}"
            )
    if config.licence_column and config.licence_column not in there:
        listed = ", ".join(f"`{name}`" for name in there) or "no column"
        raise BadData(
            f"--licence-column {config.licence_column}: none of the first pictures has it; they "
            f"have {listed}: name the one that holds licences, or leave the option out"
        )
    fitting = [side for side in SIDES if large_enough[side] >= ENOUGH * seen]
    resolution = config.resolution or max(fitting, default=SIDES[0])
    unit = config.unit or _unit(resolution)
    if resolution % unit:
        raise BadRecipe(
            f"--resolution {resolution} is not a multiple of the unit {unit}: choose another, or "
            "a --unit that divides it"
        )
    form = config.format
    if any(source.layout == "scenes" for source in found):
        if form not in ("auto", "png"):
            raise BadRecipe(f"--format {form}: scenes are stored as png, for their exact colours")
        form = "png"
    settings = {"resolution": resolution, "unit": unit, "format": form}
    return config.model_copy(update=settings)


def _sizes(source: Source, config: Config, columns: dict[str, None]) -> Iterator[tuple[int, int]]:
    """Heights and widths of the first pictures of a source; adds their columns to `columns`.

    Errors  BadData if none of them has one of the requested caption columns.
    """
    read = itertools.chain.from_iterable(part.read() for part in source.parts)
    pictures = (item for item in read if isinstance(item, Record))
    there, seen = dict[str, None](), 0
    for record in itertools.islice(pictures, PEEKED):
        there |= dict.fromkeys(record.columns)
        columns.update(there)
        seen += 1
        with contextlib.suppress(Refused):
            yield images.size(record.data, record.where)
    asked = [name for name, _ in config.caption_columns] or [*USUAL_COLUMNS, KEYWORDS]
    bare = source.layout == "sidecars" and not there  # later pictures may have captions
    if seen and not bare and there.keys().isdisjoint(asked):
        if source.layout == "webdataset" and not there:
            raise BadData(
                f"{source.name}: none of its first {seen} pictures has a .txt or .json next to it "
                "in the tar; pack the files in the order of their names (tar --sort=name)"
            )
        listed = ", ".join(f"`{name}`" for name in there) or "none"
        raise BadData(
            f"{source.name}: none of its first {seen} pictures has a caption in "
            f"{' or '.join(f'`{name}`' for name in asked)}; it has {listed}: name one of its own "
            "with --caption-column"
        )


def _unit(resolution: int) -> int:
    return next((unit for unit, least in UNITS.items() if least <= resolution), 4)


def _fills(height: int, width: int, side: int, config: Config) -> bool:
    """Whether a picture is large enough for a resolution."""
    unit = config.unit or _unit(side)
    if side % unit:
        return False
    bucket = buckets.nearest(buckets.buckets(side, unit, config.max_aspect), height, width)
    return max(bucket.height / height, bucket.width / width) <= config.max_upscale


# The folder


def _enter(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Check the output folder; return its manifest if this dataset is already finished.

    Errors  BadRecipe if it holds something else; BadData if the dataset is damaged.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise BadRecipe(f"--out {out} is a file: choose a folder for the dataset")
    if (out / "manifest.json").is_file():
        manifest = disk.read_json(out / "manifest.json")
        _refuse_other(plan, manifest, f"{out} holds a dataset")
        for name, listed in _listed(out, manifest).items():
            if wrong := disk.complaint(out, name, listed, hashed=False):
                raise BadData(
                    f"{out} is damaged: {wrong}; remove it and give the same command again"
                )
        shutil.rmtree(out / STAGING, ignore_errors=True)
        return manifest
    if any(path.name != ".DS_Store" for path in out.iterdir()) and not (out / STAGING).is_dir():
        raise BadRecipe(
            f"{out} is not empty and is not a dataset: choose another folder with --out"
        )
    return None


def _listed(out: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of a manifest. Errors: BadData if it is not the manifest of a dataset."""
    parts = {"counts", "files", "buckets", "licences", "settings"}
    if parts - manifest.keys():
        raise BadData(f"{out}/manifest.json is damaged: remove {out} and prepare it again")
    files: dict[str, dict[str, Any]] = manifest["files"]
    return files


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[Path]:
    """The staging folder, locked for this process alone; the lock ends even if it is killed."""
    staging = out / STAGING
    busy = f"another command is preparing {out}: wait for it, or choose another --out"
    with contextlib.ExitStack() as mine:
        try:
            staging.mkdir(parents=True, exist_ok=True)
            mine.enter_context(disk.claimed(staging, busy))
        except OSError as error:
            raise BadStorage(f"cannot write {staging}: {error.strerror}") from error
        yield staging


def _same_plan(path: Path, plan: dict[str, Any], out: Path) -> None:
    """Write the plan, or check that an unfinished dataset was begun with the same plan."""
    if path.is_file():
        _refuse_other(plan, disk.read_json(path), f"{out} holds the beginning of a dataset")
    else:
        disk.write_json(path, plan)


def _refuse_other(plan: dict[str, Any], there: dict[str, Any], holds: str) -> None:
    changed = list(_differences(there, plan))
    if changed:
        raise BadRecipe(
            f"{holds} prepared from other settings or sources ({'; '.join(changed)}): choose "
            "another folder with --out, or remove this one to prepare it again"
        )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    before = {"daybreak": old.get("daybreak"), **old.get("settings", {})}
    after = {"daybreak": new["daybreak"], **new["settings"]}
    for key, value in after.items():
        if before.get(key) != value:
            yield f"{key}: {before.get(key)} -> {value}"
    had = {one["source"]: one["fingerprint"] for one in old.get("sources", [])}
    has = {one["source"]: one["fingerprint"] for one in new["sources"]}
    if list(had) != list(has):
        yield f"sources: {', '.join(had)} -> {', '.join(has)}"
    else:
        yield from (f"{name} has changed since" for name in has if had[name] != has[name])


def _refuse_damaged(staging: Path, found: Sequence[Source]) -> None:
    """Errors: BadData if a tar or table could not be read to its end."""
    damaged = [
        f"{records.place(row['source'], row['where'])} {row['reason']}"
        for number in range(sum(len(source.parts) for source in found))
        for row in shards.report(staging, number).rejected
        if row["kind"] == records.CONTAINER
    ]
    if damaged:
        more = f" and {len(damaged) - NAMED_AT_MOST} more." if len(damaged) > NAMED_AT_MOST else ""
        raise BadData(
            f"{' '.join(damaged[:NAMED_AT_MOST])}{more} Or repeat the command with --salvage, "
            "which keeps what could be read and reads nothing again."
        )


def verify(folder: Path, progress: Callable[[int, int], None] | None = None) -> int:
    """Check every byte of a dataset, and its lists against its manifest; count its pictures.

    `progress` is called with the bytes checked so far and the bytes in all.

    Errors  BadData, with a message of one sentence, for the first thing that is wrong.
    """
    if not (folder / "manifest.json").is_file():
        raise BadData(f"{folder} is not a prepared dataset: it has no manifest.json")
    manifest = disk.read_json(folder / "manifest.json")
    files = _listed(folder, manifest)
    counts = manifest["counts"]
    disk.compare(folder, files, progress)
    if stray := sorted({path.name for path in folder.glob("[!.]*.arrow")} - files.keys()):
        raise BadData(
            f"{folder} holds {', '.join(stray[:NAMED_AT_MOST])}, which its manifest does not list: "
            "remove the files that do not belong to this dataset"
        )
    there = assemble.tallied(folder, files)
    rejected = Counter(row["kind"] for row in _lines(folder / "rejected.jsonl"))
    groups = _lines(folder / "duplicates.jsonl")
    pictures = sum(there["buckets"].values())
    compared = {
        "inputs": (pictures + rejected.total(), counts["read"]),
        "pictures": (pictures, counts["kept"]),
        "rejected inputs": (rejected, counts["rejected"]),
        "duplicates": (sum(len(group["dropped"]) for group in groups), counts["duplicates"]),
        "buckets": (there["buckets"], manifest["buckets"]),
        "licences": (there["licences"], manifest["licences"]),
    }
    for what, (found, listed) in compared.items():
        if found != listed:
            raise BadData(
                f"{folder} does not hold the {what} that its manifest lists ({found}, not "
                f"{listed}): prepare it again"
            )
    return pictures


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
