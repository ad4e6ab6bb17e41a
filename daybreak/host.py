"""What a process runs on: processor and memory it may have and asks for, packages it finds."""

import ctypes
import os
import sys
from pathlib import Path

SPINS = "10000"  # that a thread of OpenMP waits for the others before it sleeps
TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
KEPT = 2**31 - 1  # bytes of freed memory from which on the C library gives some back
CGROUP = Path("/sys/fs/cgroup")
LARGE = 32 * 2**20  # bytes from which on a tensor has pages of its own; more is not allowed


def settle() -> None:
    """Let threads sleep soon, and keep the pages of tensors from step to step.

    Spinning longer is faster by a few per cent on an idle machine, and beside one busy process
    makes a step five times as slow. Memory given back is asked for again by the next step, and
    each page of it costs a fault: a seventh of the quickstart's time (docs/performance.md).

    OpenMP reads its number when torch is imported, so this comes first. What the environment says
    already, and C libraries other than glibc, are left alone.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    told = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt and not told:
        mallopt(MMAP, LARGE)
        mallopt(TRIM, KEPT)


def usable() -> float:
    """Cores that this process may keep busy, which in a container are fewer than there are."""
    there = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(float(there), cpu_quota(CGROUP) or there)


def cores() -> int:
    """How many processes pay that compute all the time."""
    return max(1, int(usable()))


def processes() -> int:
    """How many processes torchrun has started, or who sets what it sets."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_there(process: int) -> bool:
    """Whether a process of this machine lives."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def cpu_quota(cgroup: Path) -> float | None:
    """Cores a container may keep busy, by version 2 or 1 of Linux' control groups."""
    second = _words(cgroup / "cpu.max")
    if len(second) == 2 and second[0] != "max":
        return int(second[0]) / int(second[1])
    quota = _words(cgroup / "cpu" / "cpu.cfs_quota_us")
    period = _words(cgroup / "cpu" / "cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        return int(quota[0]) / int(period[0])
    return None


def memory_limit(cgroup: Path) -> int | None:
    """Bytes a container may hold, by version 2 or 1 of Linux' control groups."""
    for file in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
        words = _words(file)
        # Version 1 says "no limit" with a number near 2^63.
        if words and words[0] != "max" and int(words[0]) < 2**60:
            return int(words[0])
    return None


def version_of(package: str) -> str:
    """The version of an installed package: daybreak need not be, it runs from its source too."""
    from importlib import metadata  # a command that asks for none starts sooner without

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
