"""How fast prepared pictures arrive on this machine, and how long training waits for them.

    python benchmarks/loader.py [--sides 64 256 512 1024] [--recipes emoji] [--json FILE]

Photo-like pictures in three shapes are made and prepared. The first table reads them on one core,
at the side they are stored at and at half of it: pictures per second, read, decoded and cropped,
with the decoder that is installed and with Pillow alone; then as batches of floats. Seconds are
those of the processor, for others may be using it too, and the ways to read take turns. Then
recipes are trained on such pictures (those of scenes on scenes), which says for how much of the
time the loop stood waiting.
"""

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from daybreak import host

host.settle()

import numpy as np
import torch
from PIL import Image

from daybreak import config
from daybreak.data import batches, images, ingest, loader, prepare
from daybreak.data.plan import Slot
from daybreak.data.prepared import Prepared, crop
from daybreak.train import loop

SHAPES = ((1.0, 1.0), (0.8, 1.25), (1.25, 0.8))  # height and width, in sides
LARGER = 1.2  # a source picture, against what is stored of it
FALL = 1.4  # of amplitude with frequency: then a JPEG takes 3 bits a pixel, as of photographs
SETTLED = 10  # steps before the waiting is counted: compilation, and the first batch
ENOUGH = 0.02  # of a step is the most that may be spent waiting


def unit(side: int) -> int:
    """What divides the sides of the buckets: 32 px, or less where that is coarse."""
    return min(max(side // 16, 4), 32)


def photo(height: int, width: int, seed: int) -> Image.Image:
    """Noise that is large where it is coarse, as in photographs."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    y, x = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    fall = np.maximum(np.hypot(y, x), 1 / max(height, width)) ** -FALL
    shaped = np.fft.ifft2(np.fft.fft2(noise, axes=(0, 1)) * fall[..., None], axes=(0, 1)).real
    shaped = shaped.mean(-1, keepdims=True) + 0.3 * shaped  # channels go together
    return Image.fromarray(np.clip(128 + 48 * shaped / shaped.std(), 0, 255).astype(np.uint8))


def prepared(folder: Path, side: int, patch: int, count: int) -> Path:
    """A prepared dataset of so many pictures."""
    source = folder / f"photos-{side}"
    source.mkdir()
    for number in range(count):
        high, wide = (round(side * LARGER * share) for share in SHAPES[number % len(SHAPES)])
        file = io.BytesIO()
        photo(high, wide, number).save(file, "JPEG", quality=95, subsampling=0)
        (source / f"{number}.jpg").write_bytes(file.getvalue())
        (source / f"{number}.txt").write_text(f"photograph number {number}")
    out = folder / f"prepared-{side}"
    settings = ingest.Config(resolution=side, unit=patch, max_aspect=2.0, format="jpeg", near=0)
    manifest = prepare.prepare([str(source)], out, settings)
    assert manifest["counts"]["kept"] == count, manifest["counts"]
    return out


def reading(source: Prepared, side: int, seconds: float, read: Callable[[Slot], object]) -> float:
    """Pictures per second that a function reads."""
    slots = source.plan(side, 8, first=0)
    done, began = 0, time.process_time()
    while time.process_time() - began < seconds:
        for slot in slots(done // 8):
            read(slot)
        done += 8
    return done / (time.process_time() - began)


def batching(source: Prepared, side: int, seconds: float) -> float:
    """Pictures per second that the loop would get, as floats, from the main process alone."""
    data = batches.Config(source="prepared", workers=0)
    stream = loader.stream(source, data, 0, side, 8, first=0, count=10**6)
    next(stream)
    done, began = 0, time.process_time()
    for batch in stream:
        done += len(batch.image)
        if time.process_time() - began > seconds:
            break
    return done / (time.process_time() - began)


def speeds(folder: Path, side: int, stage: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Median pictures per second of every way to read them, at the resolution of a stage."""
    source = Prepared([(str(folder), 1.0)], seed=0, patch=unit(side))
    column = source.datasets[0].columns["image"]

    def pillow(slot: Slot) -> object:
        picture = images.decode(column[slot.row]["bytes"].as_py(), "", shrink=side // stage)
        return crop(picture, slot.height, slot.width, across=0.5)

    ways: dict[str, Callable[[], float]] = {
        "read": lambda: reading(source, stage, seconds, source.sample),
        "Pillow": lambda: reading(source, stage, seconds, pillow),
        "batches": lambda: batching(source, stage, seconds),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
    stored = sum(path.stat().st_size for path in folder.glob("*.arrow")) / source.starts[-1]
    facts = {"stored": side, "read": stage, "bytes": round(stored)}
    return facts | {name: round(statistics.median(times), 1) for name, times in found.items()}


def waiting(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """Train a recipe for some steps; how much of them was spent waiting for data."""
    recipe, run = config.load(name), folder / f"run-{name}"
    stage = recipe.stage[0].model_copy(update={"steps": steps, "warmup": 0})
    sample = {"every": 10**6, "steps": 1, "prompts": ("a photograph",)}
    data = {}
    if recipe.data.source != "scenes":
        made = prepared(folder, stage.resolution, recipe.dit.patch, count=600)
        data = {"source": str(made), "caption_columns": ()}
    short = {
        "out": str(run),
        "stage": (stage,),
        "save_every": 10**6,
        "evaluate": None,
        "sample": recipe.sample.model_copy(update=sample),
        "data": recipe.data.model_copy(update=data),
    }
    with redirect_stdout(sys.stderr):  # its progress is not part of the tables
        loop.train(recipe.model_copy(update=short), tell=lambda _: None)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    taken = [now["seconds"] - before["seconds"] for before, now in _pairs(lines)]
    waited = [now["waited"] for _, now in _pairs(lines)]
    shares = [wait / step for wait, step in zip(waited, taken, strict=True)]
    return {
        "recipe": name,
        "steps": len(shares),
        "step": statistics.median(taken),
        "waited": sum(waited) / sum(taken),
        "within": sum(share < ENOUGH for share in shares) / len(shares),
    }


def _pairs(lines: list[dict[str, float]]) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
    """Each step with the one before it, once the run has settled."""
    return zip(lines[SETTLED - 1 :], lines[SETTLED:], strict=False)


def main() -> None:
    """Measure, print both tables, write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="*", default=[64, 256, 512, 1024])
    parser.add_argument("--recipes", nargs="*", default=["quickstart", "emoji"])
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "pillow": version("pillow"),
        "simplejpeg": version("simplejpeg") if find_spec("simplejpeg") else None,
        "speeds": [],
        "waiting": [],
    }
    print(f"{facts['machine']}, {facts['cores']} cores, load {facts['load'][0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        decoder = "simplejpeg" if facts["simplejpeg"] else "Pillow"
        print(f"pictures/s on one core, decoded with {decoder}")
        print("stored  used      bytes      read   with Pillow   as batches")
        torch.set_num_threads(1)
        for side in arguments.sides:
            data = prepared(folder, side, unit(side), arguments.pictures)
            for stage in (side, side // 2):
                row = speeds(data, side, stage, arguments.seconds, arguments.rounds)
                facts["speeds"].append(row)
                print(
                    f"{side:6}{stage:6}{row['bytes']:11,}{row['read']:10,.0f}"
                    f"{row['Pillow']:14,.0f}{row['batches']:13,.0f}"
                )
        torch.set_num_threads(facts["threads"])
        for recipe in arguments.recipes:
            row = waiting(recipe, folder, arguments.steps)
            facts["waiting"].append(row)
            print(
                f"{recipe}: step {row['step']:.3f} s, {row['waited']:.2%} of the time waiting, "
                f"{row['within']:.1%} of {row['steps']} steps under {ENOUGH:.0%}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
