"""What a process runs on: the cores and memory it may use, and the installed packages."""

import ctypes
import os
import sys
from pathlib import Path

SPINS = "10000"  # iterations for which an OpenMP thread waits actively before it sleeps
TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
KEPT = 2**31 - 1  # bytes of freed memory above which the C library returns some
CGROUP = Path("/sys/fs/cgroup")
LARGE = 32 * 2**20  # bytes above which an allocation gets its own mapping; glibc allows no more


def settle() -> None:
    """Let waiting threads sleep soon, and keep the memory of tensors from step to step.

    Longer spinning is a few per cent faster on an idle machine, but makes a step five times as slow
    if one other process is busy. Memory returned to the system is requested again by the next step,
    and each page costs a fault: a seventh of the quickstart's time (docs/performance.md).

    OpenMP reads its setting when torch is imported, so call this first. Settings that are already
    in the environment, and C libraries other than glibc, are left alone.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    told = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt and not told:
        mallopt(MMAP, LARGE)
        mallopt(TRIM, KEPT)


def usable() -> float:
    """Cores that this process may keep busy: in a container perhaps fewer than there are."""
    there = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(float(there), cpu_quota(CGROUP) or there)


def cores() -> int:
    """How many processes that compute all the time are worthwhile."""
    return max(1, int(usable()))


def processes() -> int:
    """Processes of this run, from the launcher's (torchrun's) WORLD_SIZE; else 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_there(process: int) -> bool:
    """Whether a process with this id is alive on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        return True
    return True


def cpu_quota(cgroup: Path) -> float | None:
    """Cores a container may keep busy, from Linux control groups (version 2 or 1)."""
    second = _words(cgroup / "cpu.max")
    if len(second) == 2 and second[0] != "max":
        return int(second[0]) / int(second[1])
    quota = _words(cgroup / "cpu" / "cpu.cfs_quota_us")
    period = _words(cgroup / "cpu" / "cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        return int(quota[0]) / int(period[0])
    return None


def memory_limit(cgroup: Path) -> int | None:
    """Bytes a container may hold, from Linux control groups (version 2 or 1)."""
    for file in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
        words = _words(file)
        # Version 1 says "no limit" with a number near 2^63.
        if words and words[0] != "max" and int(words[0]) < 2**60:
            return int(words[0])
    return None


def version_of(package: str) -> str:
    """The version of an installed package. Even daybreak may not be: it runs from source too."""
    from importlib import metadata  # here, so that commands that need no version start sooner

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
