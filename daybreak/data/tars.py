"""Tars of pictures, as WebDataset reads them and img2dataset writes them.

    00000.tar    000000017.jpg, 000000017.txt, 000000017.json, 000000018.jpg, ...

Consecutive files whose names agree up to the first dot are one sample: a picture, its caption, a
row of further columns. A tar is streamed and never unpacked, and members that are not needed are
not read.

Python's tarfile treats a tar that was cut between two members, or has a damaged header, as if it
ended there normally. Here a tar is whole only if it has its end mark and nothing after it.

Source  the layout: github.com/webdataset/webdataset; tar: POSIX.1-1988, ustar.
"""

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from daybreak.data import images, records
from daybreak.data.folders import FOREIGN
from daybreak.data.records import CONTAINER, Fault, Record, Refused, printable

PICTURES = frozenset(ending.removeprefix(".") for ending in images.SUFFIXES | FOREIGN)
NEEDED = PICTURES | {"txt", "json"}
BLOCK = 512
DAMAGE = (tarfile.TarError, EOFError, OSError)


class Tar(NamedTuple):
    """A part of a source: one tar."""

    path: Path
    name: str
    bytes: int

    def read(self) -> Iterator[Record | Fault]:
        """Read the samples in the order of the tar."""
        try:
            with self.path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                yield from _samples(self.name, tar)
                complaint = _complaint(file, tar.offset)
        except DAMAGE as error:
            complaint = f"cannot be read to its end ({error})"
        if complaint:
            yield Fault(self.name, CONTAINER, f"{complaint}; fetch it again.")


def parts(paths: Sequence[Path], root: Path, name: str) -> records.Source:
    """One part for each tar, in the order given; their names are relative to `root`."""
    tars = tuple(
        Tar(path, printable(path.relative_to(root).as_posix()), path.stat().st_size)
        for path in paths
    )
    # The time is included: tars are padded, so a changed caption need not change their size.
    listed = "".join(f"{tar.name}\0{tar.bytes}\0{tar.path.stat().st_mtime_ns}\n" for tar in tars)
    return records.Source(name, "webdataset", hashlib.sha256(listed.encode()).hexdigest(), tars)


def _samples(name: str, tar: tarfile.TarFile) -> Iterator[Record | Fault]:
    """Gather the members of each sample, and yield it when the next sample begins."""
    key, again, files, seen = "", False, dict[str, bytes](), set[str]()
    broken: Exception | None = None
    try:
        for member in _members(tar):
            try:
                _check(member)
                stem, ending = _split(member.name)
                if stem != key:
                    if files:
                        yield _sample(f"{name}/{key}", files)
                    key, again, files = stem, stem in seen, {}
                    seen.add(stem)
                if again or ending in files:
                    raise Refused("has a name that occurred before; rename one.", "twice")
                if ending in NEEDED:
                    files[ending] = _read(tar, member)
                elif ending.rpartition(".")[2] in PICTURES:
                    files[ending] = b""  # 1.depth.png: not read, only for the message
            except Refused as fault:
                yield Fault(printable(f"{name}/{member.name}"), fault.kind, str(fault))
    except DAMAGE as error:
        broken = error
    if files:  # the last sample, also if damage follows it
        yield _sample(f"{name}/{key}", files)
    if broken:
        raise broken


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers of files, one by one. `tarfile` would keep all of them, a kilobyte each."""
    while (member := tar.next()) is not None:
        if not member.isdir():
            yield member
        tar.members = []  # type: ignore[attr-defined]


def _check(member: tarfile.TarInfo) -> None:
    """Errors: Refused for an unsafe name, a member that is not a plain file, or too large a one."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise Refused("has a name that leads out of the folder; rename it.", "unsafe")
    if not member.isreg() or member.issparse():
        raise Refused("is a link, a device or a sparse file; store plain files.", "unsafe")
    if member.size > records.LARGEST:
        raise Refused(records.too_large(member.size), "bomb")


def _split(name: str) -> tuple[str, str]:
    """Folder and name up to the first dot, and what follows it."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "only of regular files is the content asked for"
    return file.read()


def _sample(where: str, files: dict[str, bytes]) -> Record | Fault:
    where = printable(where)
    pictures = sorted(files.keys() & PICTURES)
    if not pictures:
        dotted = any("." in ending for ending in files)
        remedy = "; a name ends at its first dot: take other dots out of it" if dotted else ""
        only = " and ".join(sorted(files))
        return Fault(where, "missing", f"has no picture, only {only}{remedy}.")
    if len(pictures) > 1:
        return Fault(where, "twice", f"has several pictures ({', '.join(pictures)}); keep one.")
    try:
        columns = records.columns(files.get("txt"), files.get("json"))
    except Refused as fault:
        return Fault(where, fault.kind, str(fault))
    return Record(f"{where}.{pictures[0]}", files[pictures[0]], columns)


def _complaint(file: IO[bytes], offset: int) -> str | None:
    """What is wrong with the end of a tar; `offset` is where `tarfile` stopped."""
    file.seek(offset)
    block = file.read(BLOCK)
    if not block:
        return f"ends at byte {offset:,} without an end mark, as if it had been cut off"
    if len(block) < BLOCK:
        return f"is cut off in the header at byte {offset:,}"
    if any(block):
        return f"has a damaged header at byte {offset:,}, so what follows cannot be found"
    while rest := file.read(2**20):
        if any(rest):
            return f"goes on after its end mark at byte {offset:,}, as if tars had been joined"
    return None
