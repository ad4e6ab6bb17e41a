"""What the benchmarks share: arms that take turns, and the machine they ran on."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from daybreak.train import runs


def machine() -> dict[str, Any]:
    """Describe this machine, and how busy it is with other things."""
    return {
        "machine": platform.machine(),
        "processor": runs.processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
    }


def now() -> float:
    """Seconds by a clock that never goes back, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(
    arms: Mapping[str, Callable[[], object]], rounds: int, warm: int = 2
) -> dict[str, list[float]]:
    """Run every arm in each round, so that a machine that changes its speed does so for all.

    Every other round goes backwards, lest one arm always come after another that leaves it a core
    slowed down or warm. Returns the seconds of each arm, round by round; those of the first `warm`
    rounds, in which things are compiled, do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warm + rounds):
        for name, arm in list(arms.items())[:: -1 if turn % 2 else 1]:
            began = now()
            arm()
            if turn >= warm:
                seconds[name].append(now() - began)
    return seconds


def write(file: Path | None, facts: Mapping[str, Any]) -> None:
    """Write what was measured, and on which machine, if a file is wanted."""
    if file is not None:
        file.write_text(json.dumps({**machine(), **facts}, indent=1) + "\n", encoding="utf-8")
