"""The run folder: the description of a run, before its first step and after its last.

    recipe.toml     every value of the recipe, so that the run can be repeated from it
    run.json        versions, precision, machine, arguments, code revision, sha256 of prepared data
    status.json     state of the run;  lock: which process trains it (train/status)
    metrics.jsonl   one line per step;  samples/, checkpoint-N/, latest, evaluation/, pipeline/

The same command in the same folder continues the run; a different recipe is refused there.
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from daybreak import config, doctor, host
from daybreak.data import disk
from daybreak.failure import BadRecipe, BadStorage, NoCheckpoint
from daybreak.model import text, text_to_image
from daybreak.train import accelerator, checkpoint, facts

# Files of a start that was broken off before its first step; and one that macOS adds to folders.
OURS = {"lock", "status.json", "run.json", ".DS_Store"}
# Keys that no step depends on; and keys that change a step only by rounding, for example `micro`,
# which one lowers after running out of memory.
FREE = ("budget.", "sample.", "save_every:", "save_async:", "keep:", "keep_every:")
ROUNDED = ("micro:", "compile:", "data.workers:")


def precision(recipe: config.Recipe) -> torch.dtype:
    """Return the precision of the blocks: the recipe's, or one in which this machine is fast."""
    return dtype(recipe.precision)


def dtype(precision: str) -> torch.dtype:
    """Return the type that a recipe's `precision` names on this machine."""
    if precision == "auto":
        return torch.bfloat16 if doctor.fast_bfloat16() else torch.float32
    return getattr(torch, precision)


def enter(recipe: config.Recipe) -> Path:
    """Return the run folder of a recipe, new or existing, without changing it.

    Errors  BadRecipe if the folder is used for something else.
    """
    run = Path(recipe.out)
    try:
        if run.exists() and not run.is_dir():
            raise BadRecipe(f"out = {recipe.out!r} is a file: choose a folder for the run")
    except OSError as error:  # a name too long, a folder that may not be entered
        raise BadStorage(f"cannot use the run folder {run}: {error.strerror}") from error
    begun = (run / "recipe.toml").is_file()
    others = [] if begun or not run.is_dir() else [path.name for path in run.iterdir()]
    if any(name not in OURS and not name.startswith(".tmp-") for name in others):
        raise BadRecipe(f"{run} is not empty and is not a run: choose another folder with --out")
    return run


def changes(
    run: Path, recipe: config.Recipe, files: Mapping[str, str], allowed: bool = False
) -> list[str]:
    """List what has changed since a run began: keys of its recipe, files of its data.

    [parallel] may change from one start to the next, and so may the path of the run folder. `files`
    are the sha256 of the data, by name. Keys that affect no step, or only by rounding (FREE,
    ROUNDED), may change too, and are listed.

    Errors  BadRecipe that lists the changes, unless they are `allowed`.
    """
    if not (run / "recipe.toml").is_file():
        return []
    before = config.load(run / "recipe.toml")
    same = {"parallel": before.parallel, "out": before.out}
    keys = config.differences(before, recipe.model_copy(update=same))
    if any(not key.startswith(FREE + ROUNDED) for key in keys) and not allowed:
        raise BadRecipe(
            f"{run} holds a run of another recipe ({'; '.join(keys)}): choose another folder with "
            "--out, give the same values to continue, or continue anyway with --changed"
        )
    had = facts.read(run).get("data") or files  # nothing is known where run.json was removed
    data = [name for name in sorted(had.keys() | files.keys()) if had.get(name) != files.get(name)]
    if data and not allowed:
        raise BadRecipe(
            f"{run} was started with other data: {_few(data)} differ from their sha256 in "
            "run.json; restore the data, choose another folder with --out, or continue anyway with "
            "--changed"
        )
    return keys + ([f"data: {_few(data)}"] if data else [])


def _few(names: Sequence[str]) -> str:
    """Name three, and count the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def begin(
    run: Path,
    recipe: config.Recipe,
    dtype: torch.dtype,
    files: Mapping[str, str],
    changed: Sequence[str] = (),
) -> None:
    """Create the folder of a new run, with recipe.toml and run.json; or record there what changed.

    Errors  BadStorage.
    """
    before = facts.read(run)
    ours: dict[str, Any] = provenance(recipe) | {
        "precision": str(dtype).removeprefix("torch."),
        "arguments": sys.argv[1:],
        "machine": machine(),
        "data": dict(files),
        "changed": [*before.get("changed", ()), *changed],
    }
    if "ledger" in before:
        ours["ledger"] = before["ledger"]
    dump = config.dump(recipe)
    try:
        run.mkdir(parents=True, exist_ok=True)
        # The recipe is last: its presence makes the folder a run.
        for name, said in (("run.json", json.dumps(ours, indent=1) + "\n"), ("recipe.toml", dump)):
            with disk.fresh(run / name) as staged:
                staged.write_text(said, encoding="utf-8")
    except OSError as error:
        raise BadStorage(f"cannot write the run folder {run}: {error.strerror}") from error


def changed(run: Path) -> list[str]:
    """List the changes with which a run was continued."""
    return list(facts.read(run).get("changed", ()))


def provenance(recipe: config.Recipe) -> dict[str, Any]:
    """Return what a run was made with: recipe, code and libraries."""
    used = versions("daybreak", "torch", "transformers")
    return {"recipe": config.digest(recipe), "revision": revision(), "versions": used}


def versions(*packages: str) -> dict[str, str]:
    """Return the version of each package, and that of Python."""
    found = {name: host.version_of(name) for name in packages}
    return found | {"python": platform.python_version()}


def check_pairs(recipe: config.Recipe, devices: int) -> None:
    """Refuse shares of a batch that would split pairs of pictures. Errors: BadRecipe."""
    for number, stage in enumerate(recipe.stage):
        if recipe.contrastive is not None and stage.batch % (2 * devices):
            raise BadRecipe(
                f"[contrastive] compares pictures in pairs, and {devices} devices cannot each have "
                f"an even share of stage.{number}.batch = {stage.batch}: use another number of "
                f"devices, or set a batch that {2 * devices} divides"
            )


def check_space(run: Path, bytes_per_checkpoint: int, keep: int) -> None:
    """Refuse to start a run whose checkpoints the disk cannot hold. Errors: BadStorage.

    Room is needed for those kept and the one being written; some may be there already.
    """
    more = max(1, keep + 1 - len(checkpoint.found(run)))
    needed = int(1.1 * more * bytes_per_checkpoint)
    free = shutil.disk_usage(doctor.standing(run)).free
    if free < needed:
        raise BadStorage(
            f"{run} has {free / 2**20:.0f} MiB free, and {more} checkpoints of "
            f"{bytes_per_checkpoint / 2**20:.0f} MiB (keep = {keep}, and the one being written) "
            f"need {needed / 2**20:.0f} MiB: free some space or choose another folder with --out"
        )


def recorded(run: Path) -> config.Recipe:
    """Load the recipe of a run. Errors: NoCheckpoint if the folder is not a run."""
    if not (run / "recipe.toml").is_file():
        raise NoCheckpoint(f"{run} is not a run folder: give one that daybreak train has written")
    return config.load(run / "recipe.toml")


def trained(
    run: Path, dtype: torch.dtype | None = None, chosen: checkpoint.Checkpoint | None = None
) -> tuple[config.Recipe, checkpoint.Checkpoint, text_to_image.TextToImage]:
    """Load the averaged weights of a run's newest good checkpoint, ready to sample from.

    `chosen`, already verified, is used instead if given. Errors: NoCheckpoint if there is none, or
    it is gone: a run in progress removes its old ones.
    """
    recipe = recorded(run)
    found = chosen or checkpoint.required(run, lambda line: print(line, file=sys.stderr))
    try:
        tokenizer = None if recipe.text.encoder else text.load_tokenizer(found.folder / "tokenizer")
        model = text_to_image.build(
            recipe.dit,
            recipe.text,
            tokenizer,
            compute=dtype or precision(recipe),
            route=recipe.tread,
        )
        checkpoint.load_average(found, model)
    except Exception as error:
        if found.folder.is_dir():
            raise
        raise NoCheckpoint(
            f"{found.folder} was removed while it was being read, because its run is still "
            "training: give the same command again"
        ) from error
    return recipe, found, model.to(accelerator.choose()).eval().requires_grad_(False)


def pictures_seen(recipe: config.Recipe, step: int) -> int:
    """Count the pictures of all steps up to this one."""
    return sum(
        min(stage.count, max(0, step - before)) * stage.batch
        for stage, before in zip(recipe.stage, recipe.starts, strict=True)
    )


def millions(model: text_to_image.TextToImage) -> float:
    """Count the trained weights, in millions."""
    return sum(weight.numel() for weight in model.weights().values()) / 1e6


def machine() -> dict[str, Any]:
    """The machine that a run uses, as far as its speed depends on it."""
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": host.cores(),
        "threads": torch.get_num_threads(),
        "device": str(accelerator.choose()),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    if (processes := host.processes()) > 1:
        found["processes"] = processes
    return found


def processor() -> str:
    """Return the name of this machine's CPU, as far as the system knows it."""
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def revision() -> str | None:
    """Return the git revision of the code, if it runs from a checkout."""
    here = Path(__file__).parent
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.strip() or None
