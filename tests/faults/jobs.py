"""Runs that are started, hurt and started again; what the rows of the fault matrix have in common.

A job is `daybreak train` in processes of its own: one, or several ranks with the environment that
torchrun gives them (tests/warm). `torchrun` itself is started where the row is about it.

A fault (faults.py) is a function that a process calls before it begins.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import warm
from tests.faults.faults import Fault

RECIPE = """
out = "{out}"
seed = 3
clip = 1.0
precision = "float32"
compile = false
save_every = 5

[data]
source = "scenes"
workers = 0

[scenes]
canvas = "32"

[text]
width = 32
depth = 1
heads = 2
vocabulary = 400
max_tokens = 24

[dit]
patch = 8
bottleneck = 0
width = 32
depth = 2
heads = 2

[flow]
shift = 1.0

[muon]

[ema]
decay = 0.9

[sample]
every = 1000
steps = 2
prompts = ["a red circle"]

[[stage]]
resolution = 32
steps = 40
batch = 24
lr = 3e-3
warmup = 2
cooldown = 0.4
"""


class Ended(NamedTuple):
    """How a job ended: the exit code of each rank, and what all of them have said."""

    codes: list[int]
    said: str
    seconds: float

    @property
    def code(self) -> int:
        """The code of the first rank."""
        return self.codes[0]


class Job:
    """The processes of one start of a run."""

    def __init__(self, ranks: list[Any], log: Path) -> None:
        self.ranks, self.log, self.began = ranks, log, time.monotonic()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send all ranks a signal."""
        for rank in self.ranks:
            os.kill(rank.pid, number)

    def end(self, timeout: float = 300) -> Ended:
        """Wait until all ranks have ended; those that have not by then are killed."""
        until = time.monotonic() + timeout
        for rank in self.ranks:
            rank.join(max(0.1, until - time.monotonic()))
        late = [rank for rank in self.ranks if rank.exitcode is None]
        for rank in late:
            os.kill(rank.pid, signal.SIGKILL)
            rank.join()
        seconds = time.monotonic() - self.began
        said = self.log.read_text(errors="replace") if self.log.exists() else ""
        assert not late, f"still there after {timeout} s:\n{said}"
        return Ended([rank.exitcode for rank in self.ranks], said, seconds)


class Place:
    """A folder with a recipe in it, and the run folder beside that."""

    def __init__(self, folder: Path, recipe: str = RECIPE) -> None:
        self.folder, self.run, self.starts = folder, folder / "run", itertools.count()
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(recipe.format(out=self.run.as_posix()), encoding="utf-8")

    def of(self, source: Path) -> None:
        """Train on a folder of pictures, or a prepared dataset."""
        text = self.recipe.read_text().replace('[scenes]\ncanvas = "32"\n', "")
        self.recipe.write_text(text.replace('"scenes"', json.dumps(source.as_posix())))

    def change(self, old: str, new: str) -> None:
        """Write something else in the recipe, and in what the run has recorded of it."""
        for path in (self.recipe, self.run / "recipe.toml"):
            text = path.read_text()
            if old not in text and path == self.recipe:
                text = new + "\n" + text  # a default
            path.write_text(text.replace(old, new))

    def add(self, text: str) -> None:
        """Write something at the end of the recipe."""
        self.recipe.write_text(self.recipe.read_text() + text)

    def begin(
        self,
        *sets: str,
        ranks: int = 1,
        fault: Fault | None = None,
        faulty: int | None = None,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> Job:
        """Start the run, or start it again. `fault` befalls all ranks, or only one."""
        given = ["train", str(self.recipe), *arguments]
        for one in sets:
            given += ["--set", one]
        return self._start(given, ranks, fault, faulty, environment or {})

    def verb(
        self,
        *arguments: str,
        ranks: int = 1,
        fault: Fault | None = None,
        faulty: int | None = None,
    ) -> Ended:
        """Carry out another verb of `daybreak`."""
        return self._start(list(arguments), ranks, fault, faulty, {}).end()

    def _start(
        self,
        given: list[str],
        ranks: int,
        fault: Fault | None,
        faulty: int | None,
        environment: Mapping[str, str],
    ) -> Job:
        shared = (warm.meeting(ranks) if ranks > 1 else {}) | dict(environment)
        log = self.folder / f"log-{next(self.starts)}"
        started = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            hurt = fault if faulty in (None, rank) else None
            started.append(_started(given, shared | own, log, hurt))
        return Job(started, log)

    def finish(self, *sets: str, ranks: int = 1, **options: Any) -> Ended:
        """Start the run and wait for its end, which must be a good one."""
        ended = self.begin(*sets, ranks=ranks, **options).end()
        assert ended.codes == [0] * ranks, ended.said
        return ended

    def copy(self, folder: Path) -> "Place":
        """The same with its run folder, elsewhere."""
        other = Place(folder)
        other.recipe.write_text(
            self.recipe.read_text().replace(self.run.as_posix(), other.run.as_posix())
        )
        shutil.copytree(self.run, other.run, symlinks=True)
        recorded = other.run / "recipe.toml"
        recorded.write_text(recorded.read_text().replace(self.run.as_posix(), other.run.as_posix()))
        return other

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one for each step."""
        try:
            text = (self.run / "metrics.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    @property
    def step(self) -> int:
        """The last step that was logged."""
        lines = self.lines()
        return int(lines[-1]["step"]) if lines else 0

    def wait(self, job: Job, step: int, timeout: float = 300) -> None:
        """Wait until a step is done."""
        until = time.monotonic() + timeout
        while self.step < step:
            alive = any(rank.exitcode is None for rank in job.ranks)
            assert alive, f"ended before step {step}:\n{job.end().said}"
            assert time.monotonic() < until, f"no step {step} within {timeout:.0f} s"
            time.sleep(0.005)

    def status(self) -> dict[str, Any]:
        """What status.json says."""
        return json.loads((self.run / "status.json").read_text())

    def checkpoints(self) -> list[int]:
        """The steps of the folders called checkpoint-N, the newest first."""
        names = [path.name.removeprefix("checkpoint-") for path in self.run.glob("checkpoint-*")]
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def bits(self) -> dict[str, Any]:
        """Everything that must be equal to the last bit: each loss, and the last checkpoint."""
        losses = {line["step"]: line["loss"] and line["loss"].hex() for line in self.lines()}
        return {"losses": losses, "state": state(self.run / "latest")}


def state(checkpoint: Path) -> dict[str, str]:
    """The sha256 of each tensor of a checkpoint, by file and name: a file's header has no order."""
    from safetensors.torch import load_file

    return {
        f"{path.stem}/{name}": hashlib.sha256(value.numpy().tobytes()).hexdigest()
        for path in tensors(checkpoint)
        for name, value in load_file(path).items()
    }


def tensors(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint that hold tensors."""
    return sorted(checkpoint.rglob("*.safetensors"))


def torchrun(place: Place, ranks: int, *sets: str, options: Sequence[str] = ()) -> "Launched":
    """Start the run as a user does."""
    given = [word for one in sets for word in ("--set", one)]
    log = place.folder / f"log-{next(place.starts)}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nproc-per-node={ranks}",
                "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0",
                *options,
                "-m",
                "daybreak",
                "train",
                str(place.recipe),
                *given,
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Launched(process, log)


class Launched(NamedTuple):
    """A launcher and the file that it and its ranks write to."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def ranks(self) -> list[int]:
        """The processes of the ranks, as far as they are there."""
        return children(self.process.pid)

    def end(self, timeout: float = 300) -> tuple[int, str]:
        """Wait for it; returns its code and what was said."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            for process in (*self.ranks(), self.process.pid):
                os.kill(process, signal.SIGKILL)
            raise
        return code, self.log.read_text(errors="replace")


def children(parent: int) -> list[int]:
    """The processes that a process has started and that have not ended, the oldest first."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append((int(fields[19]), int(folder.name)))
    return [process for _, process in sorted(found)]


def _started(given: list[str], environment: dict[str, str], log: Path, fault: Fault | None) -> Any:
    process = warm.CONTEXT.Process(target=_be, args=(given, environment, log, fault))
    process.start()
    return process


def _be(arguments: list[str], environment: dict[str, str], log: Path, fault: Fault | None) -> None:
    """Be a rank: what a shell does, then what `daybreak` does."""
    warm.settle(environment, log, log)
    from daybreak import cli

    if fault:
        fault()
    sys.argv = ["daybreak", *arguments]
    cli.main()


def few(values: Sequence[Any], smoke: int) -> list[Any]:
    """Give all cases but the first ones the mark `fault`."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=pytest.mark.fault if number >= smoke else (),
        )
        for number, value in enumerate(values)
    ]


def begun(said: str) -> int:
    """The step that a run says it goes on from."""
    found = re.search(r"from step (\d+)", said)
    return int(found[1]) if found else 0


def ranks_of_the_matrix() -> int:
    """How many ranks the rows are about."""
    return int(os.environ.get("FAULT_RANKS", "2"))
