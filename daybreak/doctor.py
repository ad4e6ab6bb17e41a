"""What this machine can do, and what makes it slow.

`daybreak doctor` prints `report`. The training loop too uses `fast_bfloat16` and `compiler`, to
decide whether to compute in bfloat16 and whether blocks can be compiled.

Nothing here fails: what cannot be found out is reported as unknown.
"""

import functools
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from daybreak import host

EXTRAS = {  # of pyproject.toml, and a module that shows that the extra is installed
    "eval": "torch_fidelity",
    "fast": "simplejpeg",
    "perceptual": "lpips",
    "dev": "pytest",
}
PACKAGES = ("torch", "diffusers", "transformers")
VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "neon", "asimd", "bf16")
GIB = 2**30
LITTLE_MEMORY, LITTLE_DISK, LITTLE_SHARED = 4 * GIB, 5 * GIB, GIB

# What inductor's kernels need: a compiler, OpenMP, and the headers of this Python.
PROBE = "#include <Python.h>\n#include <omp.h>\nint cores() { return omp_get_max_threads(); }\n"
PYTHON = "#include <Python.h>\nint version(void) { return PY_VERSION_HEX; }\n"  # what Triton's need


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    value: str
    remark: str = ""  # why it is slow or missing, and what to do
    mark: Literal["ok", "slow", "-"] = "ok"  # -: absent, but not needed


def report(folder: Path = Path()) -> list[Finding]:
    """Everything worth knowing before a run whose results go to `folder`."""
    return [
        *versions(),
        cores(),
        memory(),
        disk(folder),
        *shared_memory(),
        vectors(),
        bfloat16(),
        compilation(),
        accelerator(),
        *extras(),
    ]


def fast_bfloat16() -> bool:
    """Whether bfloat16 arithmetic is faster than float32 here, and not emulated."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool({"avx512_bf16", "amx_bf16"} & _cpu_flags())


@functools.cache
def compiler(device: str = "cpu") -> str | None:
    """The compiler that `torch.compile` would use for device `cpu` or `cuda`; None if none works.

    On a CPU that is the C++ compiler named by CXX, or else g++ (clang++ on macOS); for a GPU the C
    compiler with which Triton builds the launchers of its kernels, named by CC, or else gcc or
    clang. It is not enough that it exists: without Python.h or OpenMP the first compiled step fails
    with a page of errors. So a few lines are compiled as a test, once per process.
    """
    cuda = device == "cuda"
    path = shutil.which(_compiler_name(device))
    headers = sysconfig.get_paths()["include"]
    if path is None or not Path(headers, "Python.h").is_file():
        return None
    openmp = ["-Xclang", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
    name, lines, more = ("probe.c", PYTHON, []) if cuda else ("probe.cpp", PROBE, openmp)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, name)
        source.write_text(lines)
        command = [path, "-shared", "-fPIC", *more, f"-I{headers}", name, "-o", "probe.so"]
        if sys.platform == "darwin":  # OpenMP is torch's own, header and library
            command[1:2] = ["-c"]
            command.append(f"-I{Path(torch.__file__).parent / 'include'}")
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=False)
        except (OSError, subprocess.SubprocessError):
            return None
    return path if done.returncode == 0 else None


def versions() -> list[Finding]:
    """The versions of the programs that affect the results of a run."""
    python = Finding("python", platform.python_version())
    return [_version("daybreak"), python, *map(_version, PACKAGES)]


def cores() -> Finding:
    """Processor cores that this process may use; in a container perhaps fewer than there are."""
    there = os.cpu_count() or 1
    usable, busy = host.usable(), host.cores()
    threads = torch.get_num_threads()
    value = f"{usable:g} of {there}, {threads} {'thread' if threads == 1 else 'threads'} in torch"
    if threads > busy:
        remark = f"more threads than cores get in each other's way: set OMP_NUM_THREADS={busy}"
    elif threads <= usable / 2 and "OMP_NUM_THREADS" in os.environ:
        remark = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} leaves cores idle: unset it"
    else:
        return Finding("cores", value)
    return Finding("cores", value, remark, "slow")


def memory() -> Finding:
    """Memory that is free for this process."""
    limit = host.memory_limit(host.CGROUP)
    known = [amount for amount in (_available_memory(), limit) if amount is not None]
    if not known:
        return Finding("memory", "unknown")
    usable = min(known)
    value = f"{usable / GIB:.1f} GiB {'allowed' if usable == limit else 'free'}"
    if usable < LITTLE_MEMORY:
        return Finding(
            "memory", value, "little: use a smaller `micro` or end other programs", "slow"
        )
    return Finding("memory", value)


def disk(folder: Path) -> Finding:
    """Free disk space for checkpoints, where runs are written."""
    there = standing(folder)
    free = shutil.disk_usage(there).free
    value = f"{free / GIB:.1f} GiB free at {there}"
    if free < LITTLE_DISK:
        return Finding("disk", value, "little: lower `keep`, or choose another `out`", "slow")
    return Finding("disk", value)


def standing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists: it is on the disk that will be used."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return there


def shared_memory(where: Path = Path("/dev/shm")) -> list[Finding]:  # noqa: S108
    """Shared memory for batches from loader workers; containers often have little of it."""
    if not where.is_dir():  # this system has no such folder
        return []
    free = shutil.disk_usage(where).free
    value = f"{free / GIB:.1f} GiB free at {where}"
    if free < LITTLE_SHARED:
        remark = (
            "little: loader workers pass pictures through it, up to 2 GiB for each process of a "
            "run, and die when it is full; in Docker: docker run --shm-size=16g"
        )
        return [Finding("shared memory", value, remark, "slow")]
    return [Finding("shared memory", value)]


def vectors() -> Finding:
    """The instruction set by which torch chooses its kernels."""
    known = torch.backends.cpu.get_cpu_capability()
    flags = _cpu_flags()
    listed = ", ".join(flag for flag in VECTORS if flag in flags)
    value = f"{platform.machine()}, torch uses {known}" + (f" ({listed})" if listed else "")
    if known in {"DEFAULT", "NO AVX"} and not _is_arm():  # on ARM, DEFAULT includes vectors
        remark = "torch has no vector kernels for this processor: every step will be slow"
        return Finding("instructions", value, remark, "slow")
    return Finding("instructions", value)


def bfloat16() -> Finding:
    """Whether computing in bfloat16 pays."""
    if fast_bfloat16():
        return Finding("bfloat16", "fast")
    remark = (
        "blocks compute in float32: bfloat16 on ARM has not been measured yet; to try it, --set "
        "precision=bfloat16"
        if _is_arm()
        else "no AVX512_BF16, AMX or recent GPU, so bfloat16 would be emulated: blocks compute in "
        "float32, which takes about four times as long"
    )
    remark += (
        "; a recipe that fits the time you have: "
        "daybreak plan quickstart --measure --budget 8min --fit mine.toml"
    )
    return Finding("bfloat16", "slow", remark, "slow")


def _is_arm() -> bool:
    return platform.machine().lower() in {"arm64", "aarch64"}


def compilation() -> Finding:
    """Whether `torch.compile` can work on this machine; if not, what is missing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = compiler(device)
    if found:
        return Finding("compiler", found)
    name = _compiler_name(device)
    if shutil.which(name) is None:
        package = "gcc" if device == "cuda" else "g++"
        remark = f"{name} not found, so blocks are not compiled and steps take longer: " + (
            "xcode-select --install" if sys.platform == "darwin" else f"apt install {package}"
        )
    elif not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        major, minor = sys.version_info[:2]
        remark = (
            "Python.h not found, so blocks are not compiled and steps take longer: "
            f"apt install python{major}.{minor}-dev"
        )
    else:
        what, variable = (
            ("a library", "CC") if device == "cuda" else ("a library with OpenMP", "CXX")
        )
        remark = f"{name} cannot build {what}: install a complete compiler or set {variable}"
    return Finding("compiler", "none", remark, "slow")


def accelerator() -> Finding:
    """The GPUs torch can use."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        names = sorted({torch.cuda.get_device_name(i) for i in range(count)})
        total = torch.cuda.get_device_properties(0).total_memory
        value = f"{count} x {', '.join(names)}, {total / GIB:.0f} GiB"
        made_for = [
            arch[3:].rstrip("af") for arch in torch.cuda.get_arch_list() if arch[:3] == "sm_"
        ]
        major, minor = torch.cuda.get_device_capability(0)
        if 10 * major + minor < min(map(int, made_for), default=0):
            remark = (
                f"too old for this torch ({torch.__version__}), which has no kernels for it: "
                "put CUDA_VISIBLE_DEVICES= in front of a command to use the CPU"
            )
            return Finding("gpu", value, remark, "slow")
        return Finding("gpu", value)
    if sys.platform == "darwin":
        return Finding("gpu", "none", "Apple's GPU is not used: runs compute on the CPU")
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
        built = torch.version.cuda or "no CUDA"
        remark = (
            f"there is an NVIDIA driver, but this torch ({torch.__version__}, built for {built}) "
            "cannot use it: install the build that matches, see pytorch.org/get-started"
        )
        return Finding("gpu", "not usable", remark, "slow")
    return Finding("gpu", "none", "the small recipes run on the CPU; the large ones do not")


def extras() -> list[Finding]:
    """Which optional parts are installed."""
    findings = []
    for extra, module in EXTRAS.items():
        if importlib.util.find_spec(module):
            findings.append(Finding(f"extra {extra}", "usable"))
        else:
            remark = f'pip install "daybreak[{extra}]"'
            findings.append(Finding(f"extra {extra}", "absent", remark, "-"))
    return findings


def _compiler_name(device: str) -> str:
    if device == "cuda":
        return os.environ.get("CC") or ("gcc" if shutil.which("gcc") else "clang")
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def _version(package: str) -> Finding:
    try:
        return Finding(package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec(package):
            return Finding(package, "run from its source folder, not installed")
        return Finding(package, "missing", f"pip install {package}", "slow")


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """Names of instruction sets, as Linux lists them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = (line for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(flags, "").partition(":")[2].split())


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
