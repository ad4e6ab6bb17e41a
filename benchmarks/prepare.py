"""How fast a dataset is prepared, in how much memory, and whether being killed changes anything.

    python benchmarks/prepare.py [--source scenes:100000] [--kills 10] [--json FILE]

`daybreak prepare` reads the source twice: once unbroken, once killed again and again (SIGKILL to
all its processes, at moments drawn at random) and begun anew each time. Both must leave the same
manifest. Memory is the peak of the largest process; a tenth of the pictures says what of it grows.
"""

import argparse
import hashlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import turns


def prepare(source: str, out: Path, within: float | None = None) -> float | None:
    """Seconds it took, or None if it was killed after `within` seconds.

    Errors  RuntimeError with the last words of a command that fails by itself.
    """
    command = [sys.executable, "-m", "daybreak", "prepare", source, "--out", str(out)]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        try:
            process.wait(within)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{said.read()[-2000:]}")
    return time.monotonic() - began


def digest(out: Path) -> str:
    """The sha256 of a dataset's manifest, which holds that of every other file."""
    return hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()


def tenth(source: str) -> str:
    """A source of a tenth as many scenes."""
    match = re.fullmatch(r"scenes:(\d+)", source)
    if match is None:
        raise SystemExit(f"--source {source}: give scenes:N, which can be made smaller")
    return f"scenes:{max(1, int(match[1]) // 10)}"


def peak() -> float:
    """MiB of the largest process that has ended so far, of this one's children and theirs."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    """Prepare a tenth, then all, then all with interruptions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="scenes:100000")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    moments = random.Random(asked.seed)

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        prepare(tenth(asked.source), out / "tenth")
        small = peak()
        whole = prepare(asked.source, out / "unbroken")
        assert whole is not None
        large = peak()
        killed = 0
        for _ in range(asked.kills):
            share = whole / max(asked.kills, 1)
            killed += (
                prepare(asked.source, out / "broken", moments.uniform(0.3, 0.9) * share) is None
            )
        rest = prepare(asked.source, out / "broken")
        same = digest(out / "unbroken") == digest(out / "broken")

    pictures = int(asked.source.partition(":")[2])
    print(f"{'pictures':<34}{pictures:>10,}")
    print(f"{'seconds, unbroken':<34}{whole:>10.1f}   {pictures / whole:,.0f} pictures a second")
    print(f"{'largest process, a tenth, MiB':<34}{small:>10.0f}")
    print(f"{'largest process, all, MiB':<34}{large:>10.0f}")
    print(f"{'killed':<34}{killed:>10}   then {rest:.1f} s to the end")
    print(f"{'same manifest':<34}{'yes' if same else 'NO':>10}")
    turns.write(
        asked.json,
        {
            "pictures": pictures,
            "seconds": whole,
            "peak_mib": {"tenth": small, "all": large},
            "killed": killed,
            "same manifest": same,
        },
    )


if __name__ == "__main__":
    main()
