"""What a process asks of its host."""

import os
import subprocess
import sys

import pytest

from daybreak import host

STEPS = """
import resource
from daybreak import host
{settle}
import torch

def step():
    return sum(one.sum() for one in [torch.ones(4 * 2**20) for _ in range(6)])  # 16 MiB each

def resident():
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * resource.getpagesize()

torch.ones(8).sum()
before = resident()
for _ in range(10):
    step()
print(resident() - before)
"""


def kept(settle: bool, **given: str) -> float:
    """Tensors' worth of memory that is still the process's after ten steps have freed theirs."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    code = STEPS.format(settle="host.settle()" if settle else "")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"OMP_NUM_THREADS": "1"} | given,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout) / (16 * 2**20)


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert host.version_of("torch")[0].isdigit()
    assert host.version_of("a-package-that-nobody-has") == "not installed"


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is another one")
def test_the_memory_of_a_step_is_kept_for_the_next() -> None:
    assert kept(settle=True) > 5.5


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is another one")
def test_what_the_environment_says_of_memory_stands() -> None:
    asked = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # each tensor has pages of its own, and back
    assert kept(settle=False, **asked) < 0.5
    assert kept(settle=True, **asked) < 0.5
