"""What a process asks of the processor and the memory that it runs on, before it computes."""

import ctypes
import os

SPINS = "10000"  # that a thread of OpenMP waits for the others before it sleeps
TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
KEPT = 2**31 - 1  # bytes of freed memory from which on the C library gives some back
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
