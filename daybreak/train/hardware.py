"""The peak performance of a machine, and what an hour of it costs.

    32xH200, 8xL40S, RTX 4090, cpu

Peaks are for dense bfloat16 products that accumulate in float32: datasheets print twice as much,
for matrices that are half zeros. Peaks in float32 are for products in TF32. `here` is this machine;
a CPU's peak is measured, as no datasheet gives it.

Units   FLOP/s, bytes (a datasheet's GB are 10^9), bytes/s in one direction, dollars an hour, watts.
Source  peaks, memory, power and links: NVIDIA's datasheets of the SXM boards (A100, H100, H200,
        HGX B200), the L40S, L4 and A10; the RTX boards' architecture papers, appendix A.
        prices: RunPod's Community Cloud, deploybase.ai/articles/runpod-gpu-pricing, March 2026.
        Prices swing by a factor of two between providers and years: `--price` is the one to trust.
"""

import difflib
import math
import os
import re
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from daybreak import host
from daybreak.failure import BadRecipe
from daybreak.model.product import product

GB = 10**9
NETWORK = 50 * GB  # between nodes, per GPU: 400 Gb/s, usual in clusters of these boards
PER_NODE = 8  # devices that share a fast link
MOST = 1_000_000  # devices: above any real number
OTHERS = {"pcie", "nvl", "laptop", "max", "mig", "d"}  # words in the names of slower boards


class Device(NamedTuple):
    """One GPU, or the CPU of one machine."""

    name: str
    flops: float
    memory: float
    link: float
    power: float | None
    price: float | None

    def at(self, dtype: torch.dtype) -> "Device":
        """The device with its peak in this precision: a GPU's TF32 is half as fast as bfloat16."""
        if self.name == "cpu" or dtype != torch.float32:
            return self
        return self._replace(flops=self.flops / 2)


class Cluster(NamedTuple):
    """Equal devices, eight to a node."""

    number: int
    device: Device

    def __str__(self) -> str:
        return f"{self.number} x {self.device.name}"


DEVICES = {
    device.name: device
    for device in (
        # 312 TFLOP/s; NVLink 3: 600 GB/s both ways
        Device("A100", 312e12, 80 * GB, 300 * GB, 400, 1.39),
        # 1,979 TFLOP/s with sparsity; NVLink 4: 900 GB/s both ways
        Device("H100", 989.5e12, 80 * GB, 450 * GB, 700, 2.69),
        Device("H200", 989.5e12, 141 * GB, 450 * GB, 700, 3.59),
        # HGX B200, per GPU: 4,500 TFLOP/s with sparsity; NVLink 5: 1.8 TB/s both ways
        Device("B200", 2250e12, 180 * GB, 900 * GB, 1000, 5.98),
        # 242 TFLOP/s with sparsity; PCIe 4.0 x16
        Device("L4", 121e12, 24 * GB, 32 * GB, 72, None),
        # 125 TFLOP/s; PCIe 4.0 x16
        Device("A10", 125e12, 24 * GB, 32 * GB, 150, None),
        # 362.05 TFLOP/s; PCIe 4.0 x16
        Device("L40S", 362e12, 48 * GB, 32 * GB, 350, 0.79),
        # 71 TFLOP/s with sums in float32; PCIe 4.0 x16
        Device("RTX 3090", 71e12, 24 * GB, 32 * GB, 350, None),
        # 97.5 TFLOP/s with sums in float32; PCIe 4.0 x16
        Device("RTX 4080", 97.5e12, 16 * GB, 32 * GB, 320, None),
        # 165.2 TFLOP/s; PCIe 4.0 x16
        Device("RTX 4090", 165.2e12, 24 * GB, 32 * GB, 450, 0.34),
        # 209.5 TFLOP/s; PCIe 5.0 x16
        Device("RTX 5090", 209.5e12, 32 * GB, 64 * GB, 575, 0.69),
    )
}


def parse(text: str, dtype: torch.dtype) -> Cluster:
    """Read `32xH200`, `H200` or `cpu`. Errors: BadRecipe, naming the nearest known GPU."""
    number, name = re.fullmatch(
        r"(?:(-?\d{1,18})\s*[xX*]\s*)?(.*)", text.strip(), re.DOTALL
    ).groups()  # type: ignore[union-attr]
    count = int(number or 1)
    if not 0 < count < MOST or not name:
        raise BadRecipe(f"--gpus {text}: write how many and which, for example 32xH200")
    if name.lower() == "cpu":
        return Cluster(count, processor(dtype))
    names = {_plain(device.name): device for device in DEVICES.values()}
    wanted = _plain(name)
    device = names.get(wanted) or names.get(f"rtx{wanted}")
    if device is None:
        close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.4)
        hint = f"; did you mean {names[close[0]].name}?" if close else ""
        raise BadRecipe(
            f"--gpus {text}: no figures are known for {name!r}{hint} "
            f"(there are {', '.join(DEVICES)} and cpu); on a machine that has another, leave "
            "--gpus out and give --measure"
        )
    return Cluster(count, device)


def here(dtype: torch.dtype) -> Cluster:
    """Return the GPUs of this machine, or its CPU if it has none."""
    if not torch.cuda.is_available():
        return Cluster(1, processor(dtype))
    title = torch.cuda.get_device_name(0)
    memory = float(torch.cuda.get_device_properties(0).total_memory)
    found = known(title)
    if found is None:
        found = Device(title, speed(torch.bfloat16, "cuda"), memory, 32 * GB, None, None)
    return Cluster(torch.cuda.device_count(), found.at(dtype)._replace(memory=memory))


def known(title: str) -> Device | None:
    """Return the table's entry for a GPU, by the name that its driver gives it, or None.

    Slower boards with a similar name do not match: H100 PCIe, RTX 4090 Laptop GPU.
    """
    words = re.split(r"[\s_-]", title.lower())
    if OTHERS & set(words):
        return None
    return next((d for d in DEVICES.values() if _within(d.name.lower().split(), words)), None)


def processor(dtype: torch.dtype) -> Device:
    """Measure the CPU of this machine, with as many threads as torch would use."""
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    allowed = host.memory_limit(host.CGROUP)
    memory = min(memory, allowed) if allowed else memory
    return Device("cpu", speed(dtype, "cpu"), memory, 10 * GB, None, None)


@cache
def speed(dtype: torch.dtype, kind: str) -> float:
    """Measure the FLOP/s of one large product: the fastest within 0.2 seconds.

    It is measured once per process and then remembered.
    """
    side = 1024 if kind == "cpu" else 8192
    left = torch.ones(side, side, dtype=dtype, device=kind)

    def multiply() -> None:
        product(left, left)
        if kind == "cuda":
            torch.cuda.synchronize()

    multiply()  # the first call selects a kernel
    return 2 * side**3 / fastest(multiply, 0.2)


def fastest(deed: Callable[[], object], seconds: float) -> float:
    """Repeat `deed` for that many seconds; return the seconds of the fastest repetition."""
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until or best == math.inf:
        began = time.perf_counter()
        deed()
        best = min(best, time.perf_counter() - began)
    return best


def _within(some: list[str], words: list[str]) -> bool:
    """Whether `some` occurs in `words` as a run of consecutive words."""
    return any(words[first : first + len(some)] == some for first in range(len(words)))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
