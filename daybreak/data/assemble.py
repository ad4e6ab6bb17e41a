"""From finished shards to a dataset: duplicates are left out and the final files are written.

A shard is copied only if it loses a row, or if there are too many shards for one file each; any
other becomes the same file under another name. Everything depends only on the shards, so it can be
repeated after a kill.
"""

import contextlib
import itertools
import json
import math
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from daybreak.data import disk, duplicates, images, ingest, shards
from daybreak.data.duplicates import Group
from daybreak.data.records import Source
from daybreak.failure import BadData

NAMED_WHEN_EMPTY = 3
MOST_FILES = 32_768  # of a dataset: Linux lets a process map 65,530, and a run may have several


class Stored:
    """The rows of all shards, numbered consecutively."""

    def __init__(self, staging: Path, count: int) -> None:
        self.staging = staging
        self.shards = [shards.report(staging, number) for number in range(count)]
        self.starts = [0, *itertools.accumulate(shard.kept for shard in self.shards)]
        self.opened = lru_cache(maxsize=16)(self.table)

    def table(self, number: int) -> Any:
        """A shard, mapped into memory."""
        return _mapped(shards.shard_path(self.staging, number))

    def rows(self, number: int) -> range:
        """The rows of a shard."""
        return range(self.starts[number], self.starts[number + 1])

    def cells(self, row: int, *names: str) -> dict[str, Any]:
        """Some cells of a row."""
        number = bisect_right(self.starts, row) - 1
        table = self.opened(number)
        return {name: table[name][row - self.starts[number]].as_py() for name in names}


def assemble(
    out: Path, staging: Path, plan: dict[str, Any], found: Sequence[Source], near: int
) -> dict[str, Any]:
    """Make the dataset and return its manifest, which is written last.

    Errors  BadData if no picture is left.
    """
    stored = Stored(staging, sum(len(source.parts) for source in found))
    groups = find_duplicates(stored, near)
    explained = {row: (group, far) for group in groups for row, far in group.dropped}
    lost = [[row for row in stored.rows(n) if row in explained] for n in range(len(stored.shards))]

    final = staging / "final"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    files = _place_shards(final, stored, lost)
    rejected = _write_rejected(final / "rejected.jsonl", stored, lost, explained)
    if not files:
        raise BadData(_nothing_left(rejected, stored, found))
    _write_groups(final / "duplicates.jsonl", stored, groups)
    _write_for_datasets(final, files)
    for name in ("dataset_info.json", "duplicates.jsonl", "rejected.jsonl", "state.json"):
        files[name] = disk.sealed(final / name)

    manifest = plan | {
        "sources": _by_source(plan["sources"], found, stored, lost),
        "counts": {
            "read": stored.starts[-1] + sum(len(shard.rejected) for shard in stored.shards),
            "kept": stored.starts[-1] - len(explained),
            "rejected": _ordered(rejected),
            "duplicates": len(explained),
            "captions_lost": sum(shard.captions_lost for shard in stored.shards),
        },
        **tallied(final, files),
        "versions": {name: version(name) for name in ("pillow", "pyarrow", "datasets")},
        "files": files,
    }
    disk.write_json(final / "manifest.json", manifest)
    for name in files:
        (final / name).replace(out / name)
    disk.sync(out)
    (final / "manifest.json").replace(out / "manifest.json")
    disk.sync(out)
    return manifest


def find_duplicates(stored: Stored, near: int) -> list[Group]:
    """Find the duplicates among all rows."""
    ids, hashes, worth = [], [], []
    for number in range(len(stored.shards)):
        table = stored.table(number)
        ids.append(np.array([int(one, 16) for one in table["id"].to_pylist()], np.uint64))
        hashes.append(table["hash"].to_numpy().astype(np.uint64))  # a view would keep it mapped
        said = pc.list_parent_indices(table["captions"]).to_numpy()
        length = pc.utf8_length(pc.list_flatten(table["captions"])).to_numpy()
        characters = np.bincount(said, length, len(table))
        pixels = table["height"].to_numpy().astype(np.int64) * table["width"].to_numpy()
        worth.append(np.stack([-pixels, -characters]))
    best = np.lexsort(np.concatenate(worth, axis=1))

    def look(row: int) -> npt.NDArray[np.int16]:
        data = stored.cells(row, "image")["image"]["bytes"]
        return duplicates.thumbnail(images.decode(data, f"row {row}"))

    return duplicates.find(np.concatenate(ids), np.concatenate(hashes), best, near, look)


def _place_shards(
    final: Path, stored: Stored, lost: Sequence[Sequence[int]]
) -> dict[str, dict[str, Any]]:
    """Give every shard that has a row left its final name; return size and sha256 of each file.

    Several shards go into one file if there would otherwise be more files than can be mapped.
    """
    filled = [n for n, shard in enumerate(stored.shards) if shard.kept > len(lost[n])]
    each = max(1, math.ceil(len(filled) / MOST_FILES))
    groups = [filled[first : first + each] for first in range(0, len(filled), each)]
    files = {}
    for place, numbers in enumerate(groups):
        target = final / f"data-{place:05d}-of-{len(groups):05d}.arrow"
        shard = stored.shards[numbers[0]]
        if len(numbers) > 1 or lost[numbers[0]]:
            _copy(stored, numbers, lost, target)
            files[target.name] = disk.sealed(target)
        else:
            _link(shards.shard_path(stored.staging, numbers[0]), target)
            files[target.name] = {"bytes": shard.bytes, "sha256": shard.sha256}
    return files


def _link(path: Path, target: Path) -> None:
    try:
        target.hardlink_to(path)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, target)


def _copy(
    stored: Stored, numbers: Sequence[int], lost: Sequence[Sequence[int]], target: Path
) -> None:
    """Copy the kept rows of some shards, a batch at a time."""
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(pa.OSFile(str(target), "wb"))
        writer = None
        for number in numbers:
            path, first = shards.shard_path(stored.staging, number), stored.starts[number]
            keep = np.ones(stored.shards[number].kept, bool)
            keep[np.array(lost[number], np.int64) - first] = False
            with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
                writer = writer or opened.enter_context(pa.ipc.new_stream(file, reader.schema))
                place = 0
                for batch in reader:
                    writer.write_batch(batch.filter(pa.array(keep[place : place + len(batch)])))
                    place += len(batch)


def _write_rejected(
    path: Path,
    stored: Stored,
    lost: Sequence[Sequence[int]],
    explained: dict[int, tuple[Group, int]],
) -> Counter[str]:
    """Write one line for each rejected input; return their number by kind."""
    kinds = Counter[str]()
    with path.open("w", encoding="utf-8") as lines:
        for number, shard in enumerate(stored.shards):
            twice = (_duplicate(stored, row, *explained[row]) for row in lost[number])
            for line in itertools.chain(shard.rejected, twice):
                kinds[line["kind"]] += 1
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    return kinds


def _duplicate(stored: Stored, row: int, group: Group, far: int) -> dict[str, str]:
    kept, own = stored.cells(group.kept, "source", "where"), stored.cells(row, "source", "where")
    same = "is the same file as" if group.kind == "exact" else "looks like"
    source = f" of {kept['source']}" if kept["source"] != own["source"] else ""
    bits = f" (hashes {far} bits apart)" if far else ""
    reason = (
        "comes twice; rows that name one picture give it all their captions if they follow one "
        "another."
        if kept == own
        else f"{same} {kept['where']}{source}{bits}."
    )
    return own | {"kind": "duplicate", "reason": reason}


def _write_groups(path: Path, stored: Stored, groups: Sequence[Group]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for group in groups:
            dropped = [
                stored.cells(row, "where", "source") | {"distance": far}
                for row, far in group.dropped
            ]
            kept = stored.cells(group.kept, "id")["id"]
            line = {"kind": group.kind, "kept": kept, "dropped": dropped}
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def _write_for_datasets(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write the files that `datasets.load_from_disk` needs beside the shards."""
    from datasets import DatasetInfo

    DatasetInfo(features=ingest.features()).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": sha256(
            "".join(file["sha256"] for file in files.values()).encode()
        ).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    disk.write_json(folder / "state.json", state)


def _by_source(
    listed: Sequence[dict[str, Any]],
    found: Sequence[Source],
    stored: Stored,
    lost: Sequence[Sequence[int]],
) -> list[dict[str, Any]]:
    """The numbers of inputs read and kept from each source."""
    numbers = iter(range(len(stored.shards)))
    rows = []
    for line, source in zip(listed, found, strict=True):
        own = [next(numbers) for _ in source.parts]
        here = [stored.shards[number] for number in own]
        read = sum(shard.kept + len(shard.rejected) for shard in here)
        kept = sum(shard.kept for shard in here) - sum(len(lost[number]) for number in own)
        rows.append(line | {"read": read, "kept": kept})
    return rows


def tallied(folder: Path, files: Iterable[str]) -> dict[str, dict[str, int]]:
    """The number of pictures with each licence and in each bucket."""
    tallies = {"licence": Counter[str](), "bucket": Counter[str]()}
    for name in files:
        if name.endswith(".arrow"):
            table = _mapped(folder / name)
            for column, tally in tallies.items():
                for row in pc.value_counts(table[column]).to_pylist():
                    tally[row["values"]] += row["counts"]
    return {f"{column}s": _ordered(tally) for column, tally in tallies.items()}


def _nothing_left(rejected: Counter[str], stored: Stored, found: Sequence[Source]) -> str:
    if not rejected:
        return f"no picture was found in {', '.join(source.name for source in found)}"
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in rejected.most_common())
    lines = itertools.chain.from_iterable(shard.rejected for shard in stored.shards)
    some = " ".join(
        f"{line['where']}: {line['reason']}" for line in itertools.islice(lines, NAMED_WHEN_EMPTY)
    )
    return f"all {rejected.total():,} inputs were left out ({kinds}). {some}"


def _mapped(path: Path) -> Any:
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _ordered(counts: Counter[str]) -> dict[str, int]:
    """Sorted by descending number, then by name."""
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
