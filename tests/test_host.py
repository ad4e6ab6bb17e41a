"""What a process asks of its host."""

import os
import subprocess
import sys

import pytest

STEPS = """
from resource import RUSAGE_SELF, getrusage
from daybreak import host
{settle}
import torch

def step():
    return sum(one.sum() for one in [torch.ones(4 * 2**20) for _ in range(6)])  # 16 MiB each

for _ in range(10):
    step()
before = getrusage(RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""


def faults(settle: bool, **given: str) -> int:
    """Pages that three steps asked the kernel for, after ten others."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    code = STEPS.format(settle="host.settle()" if settle else "")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"OMP_NUM_THREADS": "1"} | given,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is another one")
def test_a_step_asks_for_no_page_that_the_step_before_it_had() -> None:
    tensor = 16 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert faults(settle=True) < 2 * tensor, "one may have moved"
    assert faults(settle=False) > 12 * tensor, "else there is nothing to settle"


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is another one")
def test_what_the_environment_says_of_memory_stands() -> None:
    assert faults(settle=True, MALLOC_TRIM_THRESHOLD_="131072") > 10_000
