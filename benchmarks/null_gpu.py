"""The program on a GPU that computes nothing: what its host does, compiles, launches, allocates.

    python benchmarks/null_gpu.py -m daybreak train quickstart --out runs/null
    python benchmarks/null_gpu.py benchmarks/recipe.py prx_24h --batch 32 --cached-text
    python benchmarks/null_gpu.py --gpus 2 -m torch.distributed.run --nproc-per-node gpu ...

A CUDA build of torch, on a machine without a GPU, believes that it has an H200, or several: what it
asks of CUDA, cuBLAS, cuDNN and NCCL is answered by `null_gpu.c`. Kernels are compiled for it and
launched into nothing; memory is address space that nobody touches, and zero. So the whole path
through a GPU is walked, with its devices, types, shapes, streams and pinned memory; a step takes as
long as its host does; and torch's allocator counts what it would count, but for the libraries' own
workspaces. Losses are 0, and no figure of a GPU's speed can come from this. Ranks of one machine do
wait for one another, as NCCL's would; NULL_GPU_TELLS=1 lets it report one that is gone.

What it needs: torch as PyPI has it for Linux (constraints.txt of a machine without a GPU asks for
another build), gcc and nm. Attention takes the memory-efficient kernel and not cuDNN's.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".c")
PREFIXES = ("cuda", "__cudaLaunchKernel", "cublas", "cudnn", "nccl")
DRIVER = (  # what Triton and the inductor look up by name, and need no answer from
    *("cuInit", "cuCtxSetCurrent", "cuCtxSetLimit", "cuModuleUnload", "cuFuncSetAttribute"),
    *("cuFuncSetCacheConfig", "cuLaunchKernel", "cuLaunchKernelEx", "cuTensorMapEncodeTiled"),
)
OURS = ("cudnnGetErrorString", "cudnnGetLastErrorString")  # need no GPU


def symbols(library: Path, which: str) -> set[str]:
    """Names that a library defines, or does not."""
    asked = ["nm", "-D", f"--{which}-only", str(library)]
    lines = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def build(folder: Path) -> None:
    """Compile the runtime and the driver."""
    headers = Path(torch.__file__).parents[1] / "triton/backends/nvidia/include"  # all of CUDA's
    major, minor, patch = torch._C._cudnn.getCompileVersion()
    cudnn = f"-DCUDNN={10_000 * major + 100 * minor + patch}"
    major, minor, patch = torch.cuda.nccl.version()
    versions = [cudnn, f"-DNCCL={10_000 * major + 100 * minor + patch}"]
    gcc = ["gcc", "-shared", "-fPIC", "-O1", "-w", *versions, f"-I{headers}", str(SOURCE)]
    runtime, driver, rest = (folder / name for name in ("libnull.so", "libcuda.so.1", "rest.c"))
    silent(rest, DRIVER)
    named = ["-DDRIVER", f"-Wl,-soname,{driver.name}"]
    subprocess.run([*gcc, *named, rest, "-o", driver], check=True)
    subprocess.run([*gcc, "-o", runtime], check=True)
    wanted = {
        name
        for library in Path(torch.__file__).parent.glob("lib/lib*.so")
        for name in symbols(library, "undefined")
        if name.startswith(PREFIXES) and name not in OURS
    }
    silent(rest, sorted(wanted - symbols(runtime, "defined")))
    subprocess.run([*gcc, rest, "-o", runtime], check=True)


def silent(file: Path, names: Iterable[str]) -> None:
    """Write functions that succeed and do nothing."""
    file.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))


def main() -> int:
    """Run Python with the rest of the command line, and one GPU or several."""
    if torch.version.cuda is None:
        sys.exit("this torch was built without CUDA: take the build that PyPI has for Linux")
    several = sys.argv[1:2] == ["--gpus"]
    gpus, arguments = (sys.argv[2], sys.argv[3:]) if several else ("1", sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="daybreak-null-gpu-") as folder:
        build(Path(folder))
        null = {
            "NULL_GPU": folder,
            "NULL_GPUS": gpus,
            "LD_PRELOAD": f"{folder}/libnull.so",
            "LD_LIBRARY_PATH": folder,
            "TRITON_LIBCUDA_PATH": folder,
            "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
        }
        signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the program
        called = [sys.executable, *arguments]
        return subprocess.run(called, env=os.environ | null, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
