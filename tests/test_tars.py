"""A tar becomes its samples; whatever is wrong with it, or in it, is named."""

import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from daybreak.data import records, tars
from daybreak.data.records import Fault, Record


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


def written(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            tar.addfile(member(name, len(data)), io.BytesIO(data))
    return path


def read(path: Path) -> list[Record | Fault]:
    (part,) = tars.parts([path], path.parent, "source").parts
    return list(part.read())


def samples(count: int) -> list[tuple[str, bytes]]:
    return [
        file
        for number in range(count)
        for file in ((f"{number:03d}.png", png()), (f"{number:03d}.txt", f"c {number}".encode()))
    ]


def test_files_of_one_name_are_one_sample(tmp_path: Path) -> None:
    row = {"caption": "long", "url": "http://example.org", "license": "CC0"}
    path = written(
        tmp_path / "00000.tar",
        [
            ("0001.jpg", png("red")),
            ("0001.txt", b"short"),
            ("0001.json", json.dumps(row).encode()),
            ("deep/0002.cls", b"7"),
            ("deep/0002.JSON", b'{"caption": "two"}'),
            ("deep/0002.PNG", png("blue")),
        ],
    )
    one, two = read(path)
    assert one == Record("00000.tar/0001.jpg", png("red"), row | {"text": b"short"})
    assert two == Record("00000.tar/deep/0002.png", png("blue"), {"caption": "two"})


def test_a_part_reads_the_same_again(tmp_path: Path) -> None:
    (part,) = tars.parts([written(tmp_path / "a.tar", samples(3))], tmp_path, "a").parts
    assert list(part.read()) == list(part.read())
    assert part.bytes == (tmp_path / "a.tar").stat().st_size


def test_folders_and_metadata_headers_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member("inner", kind=tarfile.DIRTYPE))
        info = member("inner/ä" + "x" * 200 + ".png", len(png()))
        info.pax_headers = {"comment": "long names have a header of their own"}
        tar.addfile(info, io.BytesIO(png()))
    (sample,) = read(tmp_path / "a.tar")
    assert isinstance(sample, Record)
    assert sample.where.startswith("a.tar/inner/äxxx")


@pytest.mark.parametrize(
    ("name", "kind", "word"),
    [
        ("../outside.png", tarfile.REGTYPE, "leads out"),
        ("a/../../outside.png", tarfile.REGTYPE, "leads out"),
        ("/etc/outside.png", tarfile.REGTYPE, "leads out"),
        ("link.png", tarfile.SYMTYPE, "is a link"),
        ("hard.png", tarfile.LNKTYPE, "is a link"),
        ("device.png", tarfile.CHRTYPE, "device"),
        ("pipe.png", tarfile.FIFOTYPE, "device"),
        ("sparse.png", tarfile.GNUTYPE_SPARSE, "sparse"),
    ],
)
def test_hostile_members_are_refused_by_name(
    tmp_path: Path, name: str, kind: bytes, word: str
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(member("1.png", len(png())), io.BytesIO(png()))
        info = member(name, kind=kind)
        info.linkname = "/etc/passwd"
        tar.addfile(info)
        tar.addfile(member("2.png", len(png())), io.BytesIO(png()))
    found = read(tmp_path / "a.tar")
    (fault,) = (one for one in found if isinstance(one, Fault))
    assert (fault.where, fault.kind) == (f"a.tar/{name}", "unsafe")
    assert word in fault.reason
    assert [one.where for one in found if one != fault] == ["a.tar/1.png", "a.tar/2.png"]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.tar"]


def test_a_member_of_ten_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(member("1.png", len(png())), io.BytesIO(png()))
        tar.addfile(member("2.png", 10 * 2**30))
    tracemalloc.start()
    fault, one, end = read(tmp_path / "a.tar")
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()
    assert fault == Fault("a.tar/2.png", "bomb", records.too_large(10 * 2**30))
    assert isinstance(one, Record)
    assert isinstance(end, Fault)
    assert end.kind == "container"


def test_many_members_do_not_fill_the_memory(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(5_000):
            tar.addfile(member(f"{number}.txt", 1), io.BytesIO(b"x"))
            tar.members = []  # type: ignore[attr-defined]
    (part,) = tars.parts([tmp_path / "a.tar"], tmp_path, "a").parts
    tracemalloc.start()
    assert sum(1 for _ in part.read()) == 5_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000 * 400  # the name of each is remembered, its header is not


def test_a_name_that_occurs_again_is_refused(tmp_path: Path) -> None:
    files = [("1.png", png("red")), ("2.png", png()), ("1.png", png("blue")), ("1.txt", b"blue")]
    found = read(written(tmp_path / "a.tar", files))
    assert [one.where for one in found if isinstance(one, Record)] == ["a.tar/1.png", "a.tar/2.png"]
    faults = [one for one in found if isinstance(one, Fault)]
    assert [(one.where, one.kind) for one in faults] == [
        ("a.tar/1.png", "twice"),
        ("a.tar/1.txt", "twice"),
    ]
    assert Record("a.tar/1.png", png("red"), {}) in found
    fault, one = read(written(tmp_path / "b.tar", [("1.png", png()), ("1.png", png())]))
    assert isinstance(fault, Fault)
    assert (fault.where, one.where) == ("b.tar/1.png", "b.tar/1.png")


def test_a_sample_without_its_picture_or_with_two_is_named(tmp_path: Path) -> None:
    files = [("1.txt", b"one"), ("1.json", b"{}"), ("2.png", png()), ("2.jpg", png())]
    assert read(written(tmp_path / "a.tar", files)) == [
        Fault("a.tar/1", "missing", "has no picture, only json and txt."),
        Fault("a.tar/2", "twice", "has several pictures (jpg, png); keep one."),
    ]


def test_a_picture_with_a_further_dot_in_its_name_is_named(tmp_path: Path) -> None:
    files = [("photo.v2.png", png()), ("photo.v2.txt", b"one"), ("d.x/1.png", png("blue"))]
    # what others put beside a picture is no picture of its own
    files += [("d.x/1.depth.png", png()), ("d.x/1.left.cls", b"7"), ("2.seg.npy", b"8")]
    fault, one = read(written(tmp_path / "a.tar", files))
    assert fault == Fault(
        "a.tar/photo",
        "missing",
        "has no picture, only v2.png; a name ends at its first dot: take other dots out of it.",
    )
    assert one == Record("a.tar/d.x/1.png", png("blue"), {})


@pytest.mark.parametrize("text", [b"{", b"[1]", b"null", b"[" * 100_000, b"\xff"])
def test_json_that_is_none_is_named(tmp_path: Path, text: bytes) -> None:
    (fault,) = read(written(tmp_path / "a.tar", [("1.png", png()), ("1.json", text)]))
    assert isinstance(fault, Fault)
    assert (fault.where, fault.kind) == ("a.tar/1", "metadata")


def test_every_way_to_cut_a_tar_is_found(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.tar", samples(4)).read_bytes()
    end = 4 * 2 * 1024  # each member is a header and a block of data
    assert whole[end:] == bytes(len(whole) - end)
    cut = tmp_path / "cut.tar"
    for length in range(0, end + 512, 128):
        cut.write_bytes(whole[:length])
        found = read(cut)
        assert isinstance(found[-1], Fault), length
        assert (found[-1].where, found[-1].kind) == ("cut.tar", "container")
        assert len([one for one in found if isinstance(one, Record)]) <= -(-length // 2048)
    cut.write_bytes(whole)
    assert len(read(cut)) == 4


def test_the_place_of_the_damage_is_named(tmp_path: Path) -> None:
    whole = bytearray(written(tmp_path / "a.tar", samples(4)).read_bytes())
    path = tmp_path / "b.tar"
    path.write_bytes(whole[:4096])
    reason = "ends at byte 4,096 without an end mark, as if it had been cut off; fetch it again."
    assert read(path)[-1] == Fault("b.tar", "container", reason)
    path.write_bytes(whole[:4200])
    assert "is cut off in the header at byte 4,096" in str(read(path)[-1])
    path.write_bytes(bytes(whole) + bytes(whole))
    assert "goes on after its end mark at byte 8,192" in str(read(path)[-1])
    for bit in range(0, 8 * 512, 97):  # somewhere in the header of the fifth member
        flipped = bytearray(whole)
        flipped[4096 + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert "has a damaged header at byte 4,096" in str(read(path)[-1])


def test_what_is_no_tar_is_named(tmp_path: Path) -> None:
    for data in (b"", b"<html>not found</html>" * 100, bytes(100)):
        (tmp_path / "a.tar").write_bytes(data)
        (fault,) = read(tmp_path / "a.tar")
        assert isinstance(fault, Fault)
        assert fault.kind == "container"
