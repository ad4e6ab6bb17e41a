"""Files on disk that are either complete or absent, and identified by their sha256."""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from daybreak.failure import BadData, BadRecipe, BadStorage


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: OSError) -> str:
    """Why the disk refused; of a folder that could not be copied, why its first file was not."""
    if isinstance(error, shutil.Error):
        return str(error.args[0][0][2])  # of each file: source, target, reason
    return error.strerror or str(error)


def sealed(path: Path) -> dict[str, Any]:
    """The size and sha256 of a file, after it is synced to disk."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def complaint(folder: Path, name: str, listed: dict[str, Any], hashed: bool = True) -> str | None:
    """What is wrong with a file that `sealed` described as `listed`; None if nothing is.

    Without `hashed` only its size is checked.
    """
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if (there := path.stat().st_size) != listed["bytes"]:
        return f"{name} has {there:,} bytes, not {listed['bytes']:,}"
    if hashed and (found := sha256(path)) != listed["sha256"]:
        return f"{name} has sha256 {found[:12]}, not {listed['sha256'][:12]}"
    return None


def compare(
    folder: Path, files: dict[str, dict[str, Any]], progress: Callable[[int, int], None] | None
) -> None:
    """Compare files with what `sealed` returned for them, several at a time.

    `progress` is called with the bytes compared so far and the bytes in all.

    Errors  BadData for the first that is missing or differs.
    """
    done, of = 0, sum(listed["bytes"] for listed in files.values())
    with ThreadPoolExecutor() as pool:
        said = pool.map(partial(complaint, folder), files, files.values())
        for name, wrong in zip(files, said, strict=True):
            if wrong:
                raise BadData(f"{folder} is damaged: {wrong}; copy it again or prepare it again")
            done += files[name]["bytes"]
            if progress:
                progress(done, of)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Errors: BadData if it is not JSON, BadStorage."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadStorage(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadData(f"{path} cannot be read ({error}): remove the folder it lies in") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; none if there is no such file.

    Lines that are still being written, or were cut by a kill or a full disk, are left out.

    Errors  BadStorage if the file cannot be read.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BadStorage(f"cannot read {path}: {error.strerror}") from error
    found = []
    for line in text.split(b"\n"):
        with suppress(ValueError):
            if isinstance(one := json.loads(line), dict):
                found.append(one)
    return found


def cut_lines(path: Path, step: int) -> dict[str, Any]:
    """Drop the lines of steps after `step`, and lines that a crash has left half written.

    Of two lines of the same step the later is kept. Returns the last line kept, or an empty object.

    Errors  BadStorage if the file cannot be read or written.
    """
    kept, last = dict[int, bytes](), dict[str, Any]()
    try:
        text = path.read_bytes()
        for line in text.split(b"\n"):
            with suppress(ValueError, KeyError, TypeError):
                if (values := json.loads(line))["step"] <= step:
                    kept[values["step"]], last = line, values
        wanted = b"".join(line + b"\n" for line in kept.values())
        if wanted != text:
            with fresh(path) as staged:
                staged.write_bytes(wanted)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BadStorage(f"cannot shorten {path} to step {step}: {error.strerror}") from error
    return last


def named(said: str, longest: int, hyphen: str = "-") -> str:
    """A file name of at most `longest` bytes for a text; two texts do not share one.

    It is the name from `plain` if replacing each "-" in it by `hyphen` (such as a space) gives the
    text again. If not, a digest is added.
    """
    if (name := plain(said, longest)).replace("-", hyphen) == said:
        return name
    digest = hashlib.sha256(said.encode()).hexdigest()[:8]
    return f"{plain(said, longest - len(digest) - 1)}-{digest}"


def plain(said: str, longest: int) -> str:
    """A text as a file name of at most `longest` bytes; other texts may give the same name.

    Each run of characters other than letters, digits and _ . = + - becomes one "-".
    """
    name = re.sub(r"[^\w.=+-]+", "-", said).strip("-.") or "empty"
    return name.encode()[:longest].decode(errors="ignore")


@contextmanager
def fresh(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to, so that the file under its own name is always whole."""
    staged = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        yield staged
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path, busy: str) -> Iterator[None]:
    """Lock a folder for this process; the lock ends with the block, or if the process is killed.

    The lock is on a file in the folder, because network disks cannot lock folders.

    Errors  BadRecipe with the sentence `busy` if another process has the lock; OSError.
    """
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadRecipe(busy) from error
        yield


def sweep(folder: Path) -> None:
    """Remove files that killed processes left half written, while no other process writes there."""
    for left in folder.glob(f".tmp-{'[0-9a-f]' * 8}-*"):
        left.unlink(missing_ok=True)


def swap(staged: Path, folder: Path) -> Path:
    """Move a folder to its final place; return the path to which an earlier one there was moved.

    Errors  OSError if the disk refuses; the earlier folder is then back in its place.
    """
    old = staged.with_name(staged.name.replace(".tmp-", ".old-", 1))
    if folder.exists():
        folder.rename(old)
    try:
        staged.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    return old


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file; it is synced to disk before it gets its name."""
    with fresh(path) as staged:
        staged.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        sync(staged)


def sync(path: Path) -> None:
    """Sync a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
