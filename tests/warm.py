"""Processes that have the libraries in memory already.

They are forked from a server that has imported them, which saves seconds each, and are otherwise
like any other: they can be killed, stopped and starved. Where a test is about how a process begins
(its environment, its launcher, what it imports), it starts a real one.
"""

import ctypes
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "daybreak.cli",
        "daybreak.train.loop",
        "pytest",
        "tests.preloaded",
        "torch._dynamo",
        "torch.distributed.checkpoint.hf_storage",
        "torch.distributed.checkpoint.state_dict_loader",
        "torch.distributed.checkpoint.state_dict_saver",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "transformers.models.lfm2.modeling_lfm2",
        "transformers.tokenization_utils_tokenizers",
    ]
)


def settle(environment: Mapping[str, str], out: Path, err: Path) -> None:
    """Be alone in the world, as what a shell starts, and say everything into two files."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive the tests
    os.environ.update(environment)
    for file, number in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


class Started:
    """`python ARGUMENTS`, as `subprocess.Popen` has it.

    Arguments  `-m`, a module and what it is given; or a script and what it is given.
    """

    def __init__(self, *arguments: object, environment: Mapping[str, str] | None = None) -> None:
        self.arguments, self.folder = list(map(str, arguments)), Path(tempfile.mkdtemp())
        self._process = CONTEXT.Process(
            target=_be, args=(self.arguments, dict(environment or {}), *self._said)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process.pid
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it has ended, less than zero by a signal; None while it is there."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once, if it is still there."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for its end; returns what it has said, and where it complained."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        out, err = (path.read_text() if path.exists() else "" for path in self._said)
        shutil.rmtree(self.folder, ignore_errors=True)
        return out, err

    @property
    def _said(self) -> tuple[Path, Path]:
        return self.folder / "out", self.folder / "err"


Done = subprocess.CompletedProcess[str]


def run(*arguments: object) -> Done:
    """Run `python ARGUMENTS` to its end."""
    started = Started(*arguments)
    out, err = started.communicate()
    assert started.returncode is not None
    return Done(started.arguments, started.returncode, out, err)


def meeting(ranks: int) -> dict[str, str]:
    """What torchrun tells the ranks of one machine."""
    number = str(ranks)
    return {
        "WORLD_SIZE": number,
        "LOCAL_WORLD_SIZE": number,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ranks(size: int, *arguments: object) -> list[Started]:
    """Start `python ARGUMENTS` on so many ranks, as torchrun would on one machine."""
    given = meeting(size)
    return [
        Started(*arguments, environment=given | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]


def _be(arguments: list[str], environment: Mapping[str, str], out: Path, err: Path) -> None:
    settle(environment, out, err)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
