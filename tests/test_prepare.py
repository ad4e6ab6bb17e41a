"""From any heap of files to a dataset: every input is in it or is named, whatever happens."""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk
from PIL import Image

from daybreak.data import assemble, buckets, census, ingest, prepare, records, sources
from daybreak.data.ingest import Config
from daybreak.failure import BadData, BadRecipe, BadStorage
from daybreak.web import dataset

Picture = npt.NDArray[np.uint8]
SMALL = Config(resolution=32, unit=8, shard=8)


def drawing(number: int, height: int = 32, width: int = 32) -> Picture:
    """A picture of its own for each number."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(picture: npt.NDArray[Any], form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, form, **options)
    return file.getvalue()


def folder(path: Path, count: int, first: int = 0) -> Path:
    """A folder of captioned drawings."""
    path.mkdir(parents=True)
    for number in range(first, first + count):
        (path / f"{number:05d}.png").write_bytes(encoded(drawing(number)))
        (path / f"{number:05d}.txt").write_text(f"drawing number {number}")
    return path


def run(out: Path, *names: Path | str, config: Config = SMALL, **options: Any) -> dict[str, Any]:
    return prepare.prepare([str(one) for one in names], out, config, 0, **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def bomb(width: int, height: int) -> bytes:
    """A PNG of zeros: a few kilobytes that ask for gigabytes."""
    packer = zlib.compressobj(9)
    body = packer.compress(bytes(200_000)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def torture(path: Path) -> dict[str, str]:
    """A folder with every fault there is; what each of its files should be called."""
    path.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    huge_jpeg = bytearray(encoded(noise, "JPEG"))
    place = huge_jpeg.index(b"\xff\xc0") + 5
    huge_jpeg[place : place + 4] = struct.pack(">HH", 65500, 65500)
    pictures = {
        "empty.png": (b"", "damaged"),
        "html.jpg": (b"<html><body>404 not found</body></html>", "format"),
        "garbage.jpg": (b"\xff\xd8\xff" + bytes(range(256)), "damaged"),
        "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "format"),
        "camera.heic": (b"\0\0\0\x18ftypheic", "format"),
        "cut.png": (encoded(noise)[:6000], "damaged"),
        "cut.jpg": (encoded(noise, "JPEG")[:2000], "damaged"),
        "cut.webp": (encoded(noise, "WEBP")[:2000], "damaged"),
        "cut.gif": (encoded(noise, "GIF")[:2000], "damaged"),
        "flipped.png": (encoded(noise).replace(b"IDAT", b"IDAX", 1), "damaged"),
        "bomb-900M.png": (bomb(30_000, 30_000), "bomb"),
        "bomb-144M.png": (bomb(12_000, 12_000), "bomb"),
        "bomb.jpg": (bytes(huge_jpeg), "bomb"),
        "float.tif": (float_tiff(), "pixels"),
        "tiny.png": (encoded(drawing(1, 1, 1)), "small"),
        "small.png": (encoded(drawing(2, 20, 20)), "small"),
        "long.png": (encoded(drawing(3, 40, 2000)), "aspect"),
        "tall.png": (encoded(drawing(4, 2000, 40)), "aspect"),
        "again.png": (encoded(drawing(100)), "duplicate"),
        "resaved.jpg": (encoded(drawing(100), "JPEG", quality=90), "duplicate"),
    }
    for name, (data, _) in pictures.items():
        (path / name).write_bytes(data)
        (path / name).with_suffix(".txt").write_text("dot")
    captions = {
        "none": None,
        "blank": b" \n\t ",
        "nul": b"\0\0",
        "latin": "Kätzchen".encode("latin-1"),
        "long-text": b"x" * 100_000,
    }
    for number, (name, caption) in enumerate(captions.items()):
        (path / f"{name}.png").write_bytes(encoded(drawing(10 + number)))
        if caption is not None:
            (path / f"{name}.txt").write_bytes(caption)
    (path / "lonely.txt").write_text("no picture")
    os.mkfifo(path / "pipe.png")
    (path / "link.png").symlink_to("/etc/hostname")
    for number, text in enumerate(["plain", "قطة حمراء", "👨‍👩‍👦 🎈", "two\nlines &amp; more"]):
        (path / f"fine-{number}.png").write_bytes(encoded(drawing(100 + number)))
        (path / f"fine-{number}.txt").write_text(text)
    return (
        {name: kind for name, (_, kind) in pictures.items()}
        | {f"{name}.png": "caption" for name in captions}
        | {"lonely.txt": "missing", "pipe.png": "missing", "link.png": "unsafe"}
    )


def float_tiff() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ones((40, 40), np.float32)).save(file, "TIFF")
    return file.getvalue()


def hostile_tar(path: Path) -> dict[str, str]:
    """A tar that would like to write elsewhere; what its members should be called."""
    faults = {}
    with tarfile.open(path, "w") as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))

        for name in ("../escaped.png", "/tmp/escaped.png", "a/../../escaped.png"):
            add(name, encoded(drawing(0)))
            faults[name] = "unsafe"
        for name, kind in (("s.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE)):
            add(name, kind=kind)
            faults[name] = "unsafe"
        add("dev.png", kind=tarfile.CHRTYPE)
        faults["dev.png"] = "unsafe"
        add("lonely.txt", b"no picture")
        faults["lonely"] = "missing"
        for number in (200, 201):
            add(f"{number}.png", encoded(drawing(number)))
            add(f"{number}.json", json.dumps({"caption": f"tar {number}"}).encode())
        add("202.png", encoded(drawing(202)))
        add("202.json", b"{")
        faults["202"] = "metadata"
        add("200.png", encoded(drawing(203)))
        faults["200.png"] = "twice"
    return {f"{path.name}/{name}": kind for name, kind in faults.items()}


@contextlib.contextmanager
def nothing_written_but(out: Path, root: Path) -> Iterator[None]:
    def seen() -> dict[str, tuple[int, int]]:
        return {
            str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
            for place in (root, Path.cwd())
            for path in place.rglob("*")
            if not path.is_relative_to(out) and "__pycache__" not in path.parts
            if not any(part.startswith(".") for part in path.parts)
        }

    before = seen()
    yield
    after = seen()
    assert after == before


@pytest.mark.filterwarnings("ignore")
def test_every_fault_of_a_torture_folder_is_named_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = torture(tmp_path / "torture")
    faults |= hostile_tar(tmp_path / "hostile.tar")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = tmp_path / "out"
    with nothing_written_but(out, tmp_path):
        manifest = run(out, tmp_path / "torture", tmp_path / "hostile.tar")
    rejected = lines(out / "rejected.jsonl")
    assert {row["where"]: row["kind"] for row in rejected} == faults
    assert len(rejected) == len(faults)
    for row in rejected:
        assert list(row) == ["source", "where", "kind", "reason"]
        assert row["reason"].endswith(".")
        assert "\n" not in row["reason"]
        assert str(tmp_path) not in row["reason"].replace(row["source"], "")
    assert manifest["counts"]["read"] == len(faults) + 6
    assert manifest["counts"]["kept"] == 6
    assert sum(manifest["counts"]["rejected"].values()) == len(faults)
    kept = load_from_disk(str(out))
    assert [row["captions"] for row in kept] == [
        ["plain"],
        ["قطة حمراء"],
        ["👨‍👩‍👦 🎈"],
        ["two lines & more"],
        ["tar 200"],
        ["tar 201"],
    ]
    prepare.verify(out)


def test_datasets_opens_the_result_and_the_manifest_describes_it(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 20)
    manifest = run(tmp_path / "out", source)
    rows = load_from_disk(str(tmp_path / "out"))
    assert rows.column_names == [
        "id", "image", "height", "width", "bucket", "captions", "caption_weights", "source",
        "where", "licence", "hash",
    ]  # fmt: skip
    for number in (0, 7, 19):
        row = rows[number]
        assert np.array_equal(np.array(row["image"]), drawing(number))
        assert row["captions"] == [f"drawing number {number}"]
        assert (row["source"], row["where"]) == (str(source), f"{number:05d}.png")
        assert (row["height"], row["width"], row["bucket"]) == (32, 32, "32x32")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {*manifest["files"], "manifest.json"}
    assert [name for name in sorted(files) if name.endswith(".arrow")] == [
        f"data-{number:05d}-of-00003.arrow" for number in range(3)
    ]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert manifest["settings"] == json.loads(SMALL.model_dump_json())
    assert manifest["sources"][0] | {"fingerprint": ""} == {
        "source": str(source),
        "layout": "sidecars",
        "fingerprint": "",
        "read": 20,
        "kept": 20,
    }
    assert manifest["counts"] == {
        "read": 20,
        "kept": 20,
        "rejected": {},
        "duplicates": 0,
        "captions_lost": 0,
    }
    assert manifest["buckets"] == {"32x32": 20}
    assert manifest["licences"] == {"": 20}


def test_a_licence_column_that_nobody_has_is_refused_and_one_that_some_have_is_not(
    tmp_path: Path,
) -> None:
    bare, stated = folder(tmp_path / "bare", 2), tmp_path / "stated"
    stated.mkdir()
    for number in (5, 6):
        (stated / f"{number}.png").write_bytes(encoded(drawing(number)))
    rows = [{"file_name": f"{n}.png", "text": f"number {n}", "rights": "CC0"} for n in (5, 6)]
    (stated / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources, out = [str(bare), str(stated)], tmp_path / "out"
    wrong = SMALL.model_copy(update={"licence_column": "rihgts"})
    with pytest.raises(BadData, match=r"--licence-column rihgts: none of .* they have .*`text`"):
        prepare.prepare(sources, out, wrong)
    assert not out.exists()
    right = SMALL.model_copy(update={"licence_column": "rights"})
    assert prepare.prepare(sources, out, right)["licences"] == {"": 2, "CC0": 2}


def test_all_layouts_give_the_same_pictures(tmp_path: Path) -> None:
    pictures = [encoded(drawing(number)) for number in range(10)]
    captions = [f"drawing number {number}" for number in range(10)]
    sidecars = folder(tmp_path / "sidecars", 10)
    metadata = tmp_path / "metadata"
    metadata.mkdir()
    tar, table = tmp_path / "tars" / "00000.tar", tmp_path / "tables" / "00000.parquet"
    for path in (tar, table):
        path.parent.mkdir()
    with tarfile.open(tar, "w") as opened, (metadata / "metadata.jsonl").open("w") as rows:
        for number, (data, text) in enumerate(zip(pictures, captions, strict=True)):
            (metadata / f"{number}.png").write_bytes(data)
            rows.write(json.dumps({"file_name": f"{number}.png", "text": text}) + "\n")
            for name, content in ((f"{number}.png", data), (f"{number}.txt", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                opened.addfile(info, io.BytesIO(content))
    pq.write_table(pa.table({"image": pictures, "text": captions}), table, row_group_size=3)

    def stored(source: Path) -> list[tuple[str, Picture, list[str]]]:
        out = tmp_path / f"out-{source.name}"
        manifest = run(out, source)
        assert manifest["counts"]["kept"] == 10, source
        return [(row["id"], np.array(row["image"]), row["captions"]) for row in load_from_disk(out)]

    first = stored(sidecars)
    for source in (metadata, tar.parent, tar, table.parent, table):
        for one, other in zip(first, stored(source), strict=True):
            assert (one[0], one[2]) == (other[0], other[2])
            assert np.array_equal(one[1], other[1])


def test_scenes_are_a_source_stored_without_loss(tmp_path: Path) -> None:
    from daybreak.data import scenes

    manifest = run(tmp_path / "out", "scenes:20", config=Config(near=0, shard=8))
    assert manifest["settings"]["resolution"] == 64
    assert manifest["settings"]["format"] == "png"
    rows = load_from_disk(tmp_path / "out")
    assert len(rows) == 20
    for index, row in enumerate(rows):
        sample = scenes.sample(scenes.Config(), 0, index)
        assert np.array_equal(np.array(row["image"]), sample.image)
        assert row["captions"] == [sample.caption]
    large = run(tmp_path / "large", "scenes:4:128", config=Config(near=0))
    assert large["buckets"] == {"128x128": 4}
    for name, said in (("scenes:4:99", "there is no canvas '99'"), ("scenes:0", "no scenes")):
        with pytest.raises(BadRecipe, match=said):
            run(tmp_path / "none", name)
    with pytest.raises(BadRecipe, match="scenes are stored as png"):
        run(tmp_path / "none", "scenes:4", config=Config(format="jpeg"))


def test_a_duplicate_in_any_source_leaves_the_one_with_the_richest_caption(tmp_path: Path) -> None:
    for name, caption in (("a", "a dog"), ("b", "a dog on a red carpet"), ("c", "dog")):
        folder(tmp_path / name, 3, first=10 * ord(name))
        (tmp_path / name / "dog.png").write_bytes(encoded(drawing(0)))
        (tmp_path / name / "dog.txt").write_text(caption)
    resaved = tmp_path / "c" / "resaved.jpg"
    resaved.write_bytes(encoded(drawing(0), "JPEG", quality=95))
    resaved.with_suffix(".txt").write_text("the longest caption of them all, by far")
    out = tmp_path / "out"
    manifest = run(out, *(tmp_path / name for name in "abc"))
    assert manifest["counts"]["duplicates"] == 3
    assert manifest["counts"]["rejected"] == {"duplicate": 3}
    assert [source["kept"] for source in manifest["sources"]] == [3, 3, 4]
    (near,) = lines(out / "duplicates.jsonl")
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert near["kind"] == "near"
    assert [(one["where"], one["source"]) for one in near["dropped"]] == [
        ("dog.png", a),
        ("dog.png", b),
        ("dog.png", c),
    ]
    ids = {row["id"]: row for row in load_from_disk(out)}
    assert ids[near["kept"]]["where"] == "resaved.jpg"
    reasons = {
        (row["source"], row["where"]): row["reason"] for row in lines(out / "rejected.jsonl")
    }
    assert reasons[a, "dog.png"].startswith(f"looks like resaved.jpg of {c}")
    assert reasons[b, "dog.png"] == reasons[a, "dog.png"]
    prepare.verify(out)
    written = census.read(out)
    assert "resaved.jpg" in dataset.page(written, census.count(written, batch=2))


def test_the_result_does_not_depend_on_the_folder_or_the_processes(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 40)
    run(tmp_path / "one", source)
    prepare.prepare([str(source)], tmp_path / "deep" / "two", SMALL, processes=3)
    one, two = tmp_path / "one", tmp_path / "deep" / "two"
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {
        p.name: p.read_bytes() for p in two.iterdir()
    }


def test_the_same_command_again_finds_its_work_done(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 10)
    manifest = run(tmp_path / "out", source)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(tmp_path / "out", source) == manifest
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_other_settings_sources_or_folders_are_refused(tmp_path: Path) -> None:
    source, out = folder(tmp_path / "in", 10), tmp_path / "out"
    run(out, source)
    with pytest.raises(
        BadRecipe, match=r"prepared from other settings or sources \(near: 4 -> 0\)"
    ):
        run(out, source, config=SMALL.model_copy(update={"near": 0}))
    with pytest.raises(BadRecipe, match=r"sources: .*/in -> .*/in, scenes:3"):
        run(out, source, "scenes:3", config=SMALL.model_copy(update={"format": "png"}))
    (source / "00003.txt").write_text("another caption")
    with pytest.raises(BadRecipe, match=r"in has changed since"):
        run(out, source)
    with pytest.raises(BadRecipe, match="is not a dataset"):
        run(source, folder(tmp_path / "other", 1))
    with pytest.raises(BadRecipe, match="lies in the source"):
        run(source / "prepared", source)
    with pytest.raises(BadRecipe, match="is a file"):
        run(source / "00003.txt", tmp_path / "other")


def test_two_commands_do_not_share_a_folder(tmp_path: Path) -> None:
    import fcntl

    source, staging = folder(tmp_path / "in", 3), tmp_path / "out" / prepare.STAGING
    staging.mkdir(parents=True)
    with (staging / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BadRecipe, match="another command is preparing"):
            run(tmp_path / "out", source)
    run(tmp_path / "out", source)


@pytest.mark.parametrize(
    ("sizes", "resolution", "unit"),
    [
        ([(128, 128)] * 10, 128, 8),
        ([(600, 800)] * 9 + [(40, 40)], 512, 32),
        ([(600, 800)] * 8 + [(40, 40)] * 2, 32, 4),
        ([(64, 64)], 64, 8),
        ([(2000, 2000)], 512, 32),
        ([(192, 260)], 256, 16),
        ([(5, 5)], 32, 4),
    ],
)
def test_the_resolution_follows_from_the_pictures(
    tmp_path: Path, sizes: list[tuple[int, int]], resolution: int, unit: int
) -> None:
    for number, (height, width) in enumerate(sizes):
        path = tmp_path / f"{number}.png"
        Image.new("L", (width, height)).save(path)
        path.with_suffix(".txt").write_text("x")
    found = sources.find(str(tmp_path), records.Columns(), 4)
    config = prepare.settled(Config(), [found])
    assert (config.resolution, config.unit) == (resolution, unit)
    assert prepare.settled(Config(resolution=96, unit=24), [found]).unit == 24
    with pytest.raises(BadRecipe, match="--resolution 100 is not a multiple of the unit 8"):
        prepare.settled(Config(resolution=100), [found])


@pytest.mark.parametrize("side", [32, 48, 64, 128, 256, 512])
def test_photographs_fit_a_bucket_of_every_resolution(side: int) -> None:
    config = prepare.settled(Config(resolution=side), [])
    for height, width in ((600, 800), (800, 600), (600, 900), (720, 1280)):
        bucket, _ = ingest.fitted(height, width, config)
        assert buckets.cropped(bucket, height, width) < config.max_crop


def test_the_buckets_of_the_published_record_are_those_it_was_made_with() -> None:
    config = prepare.settled(Config(resolution=64), [])
    names = [one.name for one in buckets.buckets(64, config.unit, config.max_aspect)]
    assert names == ["40x88", "48x80", "56x72", "64x64", "72x56", "80x48", "88x40"]


def test_a_source_without_the_captions_asked_for_is_refused_at_once(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 3)
    config = Config(caption_columns=(("txt", 1.0),))
    said = "none of its first 3 pictures has a caption in `txt`; it has `text`: name one"
    with pytest.raises(BadData, match=said):
        run(tmp_path / "out", source, config=config)
    assert not (tmp_path / "out").exists()


def test_sources_without_a_picture_are_named(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        tarfile.open(tmp_path / name, "w").close()
    with pytest.raises(BadData, match=r"^no picture was found in .*a\.tar, .*b\.tar$"):
        run(tmp_path / "out", tmp_path / "a.tar", tmp_path / "b.tar")


def test_more_shards_than_can_be_mapped_are_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "source", 9)
    (tmp_path / "source" / "00004.png").write_bytes((tmp_path / "source/00000.png").read_bytes())
    config = Config(shard=1)
    apart, joined = tmp_path / "apart", tmp_path / "joined"
    many = run(apart, tmp_path / "source", config=config)
    monkeypatch.setattr(assemble, "MOST_FILES", 3)
    few = run(joined, tmp_path / "source", config=config)
    assert len(list(apart.glob("*.arrow"))) == 8
    assert len(list(joined.glob("*.arrow"))) == 3
    assert few["counts"] == many["counts"]
    assert few["buckets"] == many["buckets"]
    assert list(load_from_disk(joined)["id"]) == list(load_from_disk(apart)["id"])
    assert prepare.verify(joined) == 8


def test_nothing_left_says_why_and_leaves_nothing_behind(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 5)
    with pytest.raises(
        BadData, match=r"all 5 inputs were left out \(5 small\)\. 00000\.png: is 32 x 32"
    ):
        run(tmp_path / "out", source, config=Config(resolution=512))
    assert run(tmp_path / "out", source)["counts"]["kept"] == 5


def test_a_damaged_tar_is_refused_unless_it_is_to_be_salvaged(tmp_path: Path) -> None:
    tar, out = tmp_path / "a.tar", tmp_path / "out"
    hostile_tar(tar)
    tar.write_bytes(tar.read_bytes()[:-12_000])
    with pytest.raises(
        BadData, match=r"a\.tar (ends|is cut off|cannot).* with --salvage"
    ) as caught:
        run(out, tar)
    assert str(caught.value).count("a.tar") == 1
    assert not (out / "manifest.json").exists()
    manifest = run(out, tar, salvage=True)
    assert manifest["counts"]["rejected"]["container"] == 1
    assert manifest["counts"]["kept"] >= 1


def test_what_the_disk_refuses_is_said_and_the_rest_goes_on_later(tmp_path: Path) -> None:
    source, out = folder(tmp_path / "in", 24), tmp_path / "out"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_192, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            run(out, source)
        except BadStorage as failure:
            os._exit(70 if "finished parts are kept" in str(failure) else 71)

    child = multiprocessing.get_context("fork").Process(target=limited)
    child.start()
    child.join()
    assert child.exitcode == 70
    assert not list((out / prepare.STAGING).glob(".tmp-*"))
    assert run(out, source)["counts"]["kept"] == 24


# Kills


def reports(out: Path) -> int:
    return len(list((out / prepare.STAGING).glob("0*.json")))


def killed(out: Path, source: Path, config: Config, after: int) -> bool:
    """Begin the work in another process and kill it once there are so many more reports."""
    enough = reports(out) + after
    child = multiprocessing.get_context("fork").Process(
        target=prepare.prepare, args=([str(source)], out, config, 0)
    )
    child.start()
    while child.is_alive() and reports(out) < enough and not (out / "manifest.json").is_file():
        time.sleep(0.001)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_ten_times_it_ends_with_the_same_manifest(tmp_path: Path) -> None:
    source, config = folder(tmp_path / "in", 320), SMALL
    run(tmp_path / "unbroken", source)
    out = tmp_path / "killed"
    for number in range(10):
        assert killed(out, source, config, after=1 + number % 4), number
    finished = list((out / ".staging").glob("0*.json"))
    assert 10 <= len(finished) < 40
    stamps = {int(path.stem): path.with_suffix(".arrow").stat().st_mtime_ns for path in finished}
    run(out, source)
    for number, stamp in stamps.items():  # what was finished has not been written again
        assert (out / f"data-{number:05d}-of-00040.arrow").stat().st_mtime_ns == stamp
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "unbroken").iterdir()
    }


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_while_the_files_are_put_in_place_it_still_ends_well(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 100)
    for number in range(20):
        (source / f"copy-{number}.png").write_bytes((source / f"{number:05d}.png").read_bytes())
        (source / f"copy-{number}.txt").write_text("x")
    run(tmp_path / "unbroken", source)
    for number in range(5):
        out = tmp_path / f"killed-{number}"
        child = multiprocessing.get_context("fork").Process(target=run, args=(out, source))
        child.start()
        while not (out / ".staging" / "final").is_dir() and child.is_alive():
            time.sleep(0.0005)
        time.sleep(0.005 * number)
        child.kill()
        child.join()
        run(out, source)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == {
            p.name: p.read_bytes() for p in (tmp_path / "unbroken").iterdir()
        }, number


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, above = path.read_text().rsplit(")", 1)[1].split()[:2]
            if int(above) == parent and state != "Z":
                found.append(int(path.parent.name))
    return found


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_command_leaves_no_process_and_a_killed_process_ends_the_command(
    tmp_path: Path,
) -> None:
    source, out = folder(tmp_path / "in", 1200), tmp_path / "out"
    command = [sys.executable, "-m", "daybreak", "prepare", str(source), "--out", str(out)]
    command += ["--shard", "30", "--processes", "2", "--resolution", "32", "--near", "0"]

    was = reports(out)
    with subprocess.Popen(command) as process:
        wait_for(lambda: reports(out) > was)
        workers = children(process.pid)
        process.kill()
    assert len(workers) >= 2
    wait_for(lambda: not any(Path(f"/proc/{one}").exists() for one in workers), 5)

    was = reports(out)
    with subprocess.Popen(command, text=True, stderr=subprocess.PIPE) as process:
        wait_for(lambda: reports(out) > was)
        for worker in children(process.pid):
            if "spawn_main" in Path(f"/proc/{worker}/cmdline").read_text():
                os.kill(worker, signal.SIGKILL)
                break
        said = process.communicate(timeout=20)[1]
        assert process.returncode == 6
    assert "give the same command again" in said

    finished = subprocess.run(command, check=True, text=True, capture_output=True)
    assert f"{out}: 1,200 pictures of 1,200" in finished.stdout
    assert prepare.verify(out) == 1200


def resident(process: int) -> int:
    """Bytes of memory a process has now; 0 if it has ended."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_hundred_thousand_pictures_fit_in_little_memory_and_survive_ten_kills(
    tmp_path: Path,
) -> None:
    count, source = 100_000, tmp_path / "in"
    source.mkdir()
    with (source / "metadata.jsonl").open("w") as rows:
        for number in range(count):
            (source / f"{number:06d}.png").write_bytes(encoded(drawing(number, 24, 24)))
            row = {"file_name": f"{number:06d}.png", "text": f"drawing number {number}"}
            rows.write(json.dumps(row) + "\n")

    def command(out: Path) -> list[str]:
        start = [sys.executable, "-m", "daybreak", "prepare", str(source), "--out", str(out)]
        return [*start, "--processes", "2", "--resolution", "24", "--unit", "8"]

    begun, samples = time.monotonic(), list[tuple[int, int, int]]()  # reports, parent, workers
    with subprocess.Popen(command(tmp_path / "unbroken")) as process:
        while process.poll() is None:
            workers = [resident(one) for one in children(process.pid)]
            samples.append(
                (reports(tmp_path / "unbroken"), resident(process.pid), max(workers, default=0))
            )
            time.sleep(0.2)
    seconds = time.monotonic() - begun
    assert process.returncode == 0
    print(
        f"{count:,} pictures in {seconds:.0f} s; peak of the command "
        f"{max(one[1] for one in samples) / 2**20:.0f} MiB, of a process "
        f"{max(one[2] for one in samples) / 2**20:.0f} MiB"
    )
    early = max(one[2] for one in samples if one[0] <= 25)
    late = max(one[2] for one in samples if one[0] >= 75)
    assert late < early + 30 * 2**20
    assert max(one[1] for one in samples) < 600 * 2**20

    out, kills = tmp_path / "killed", 0
    while kills < 10:
        was = reports(out)
        with subprocess.Popen(command(out)) as process:
            wait_for(lambda was=was: reports(out) > was + 4)
            process.kill()
        kills += 1
    subprocess.run(command(out), check=True)
    assert (out / "manifest.json").read_bytes() == (
        tmp_path / "unbroken" / "manifest.json"
    ).read_bytes()
    assert prepare.verify(out) + len(lines(out / "rejected.jsonl")) == count


# What `--verify` finds


@pytest.mark.parametrize("fault", ["bit", "cut", "missing", "stray", "list", "count", "bucket"])
def test_verify_finds_what_has_changed(tmp_path: Path, fault: str) -> None:
    out = tmp_path / "out"
    manifest = run(out, folder(tmp_path / "in", 20))
    assert prepare.verify(out) == 20
    shard = out / "data-00001-of-00003.arrow"
    data = shard.read_bytes()
    match fault:
        case "bit":
            middle = len(data) // 2
            shard.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])
        case "cut":
            shard.write_bytes(data[:-8])
        case "missing":
            shard.unlink()
        case "stray":
            (out / "data-00003-of-00003.arrow").write_bytes(data)
        case "list":
            (out / "rejected.jsonl").write_text("{}\n")
        case "count":
            manifest["counts"]["read"] += 1
        case "bucket":
            manifest["buckets"] = {"32x32": 19, "24x40": 1}
    (out / "manifest.json").write_text(json.dumps(manifest))
    named = {"list": "rejected.jsonl", "count": "inputs", "bucket": "buckets"}
    named["stray"] = "holds data-00003-of-00003.arrow, which"
    with pytest.raises(BadData, match=named.get(fault, "data-00001-of-00003.arrow")):
        prepare.verify(out)


# The settings as they are typed


def test_settings_are_read_as_they_are_typed() -> None:
    given = {
        "caption_columns": ["prompt:0.5", "a:b:0.25", "plain"],
        "background": "#ff8000",
        "near": None,
    }
    config = prepare.settings(given)
    assert config.caption_columns == (("prompt", 0.5), ("a:b", 0.25), ("plain", 1.0))
    assert config.background == (255, 128, 0)
    assert config.near == Config().near


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"max_crop": 2.0}, "--max-crop 2.0: input should be less than 1"),
        ({"max_upscale": 0.5}, "--max-upscale 0.5: input should be greater than or equal to 1"),
        ({"format": "gif"}, "--format gif: input should be 'auto', 'jpeg', 'webp' or 'png'"),
        ({"background": "blu"}, "--background: unknown color specifier: 'blu'"),
        ({"caption_columns": ["a:b"]}, "--caption-column: 'a:b' is no column with a weight"),
        ({"caption_columns": ["a:0"]}, "--caption-column: 'a:0' needs a name, and a weight above"),
        ({"caption_columns": [":1"]}, "--caption-column: ':1' needs a name"),
        ({"caption_columns": ["a:nan"]}, "--caption-column: 'a:nan' needs a name, and a weight"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadRecipe) as caught:
        prepare.settings(given)
    assert str(caught.value).startswith(sentence)


def test_a_skip_list_is_one_name_a_line(tmp_path: Path) -> None:
    (tmp_path / "skip.txt").write_text("b.png\n\n  a.png \nb.png\n")
    assert prepare.skip_list(tmp_path / "skip.txt") == {"a.png", "b.png"}
    config = prepare.settings({"skip": frozenset({"b.png", "a.png"})})
    assert config.model_dump(mode="json")["skip"] == ["a.png", "b.png"]
    with pytest.raises(BadRecipe, match="cannot be read"):
        prepare.skip_list(tmp_path / "none.txt")


def test_the_summary_says_what_was_made_and_left_out(tmp_path: Path) -> None:
    source, out = folder(tmp_path / "in", 9), tmp_path / "out"
    (source / "00002.png").write_bytes(b"")
    (source / "00004.txt").unlink()
    (source / "00005.txt").unlink()
    text = "\n".join(prepare.summary(out, run(out, source)))
    assert f"{out}: 6 pictures of 9" in text
    assert "32 px, sides in steps of 8; buckets 32x32 6; 2 files" in text
    assert "left out: 2 caption, such as 00004.png: has no caption" in text
    assert "left out: 1 damaged, such as 00002.png: is empty; replace it." in text
    assert str(out / "rejected.jsonl") in text


def test_a_folder_of_two_kinds_is_refused_and_not_half_read(tmp_path: Path) -> None:
    mixed = folder(tmp_path / "mixed", 3)
    (mixed / "old").mkdir()
    for name in ("backup.tar", "table.parquet"):
        (mixed / "old" / name).touch()
        with pytest.raises(BadData, match=rf"holds both pictures .* and .*{name}"):
            run(tmp_path / "out", mixed)
        (mixed / "old" / name).unlink()


def test_a_link_to_a_folder_is_named(tmp_path: Path) -> None:
    inside, out = folder(tmp_path / "inside", 3), tmp_path / "out"
    (inside / "more").symlink_to(folder(tmp_path / "side", 2, first=10))
    assert run(out, inside)["counts"]["rejected"] == {"unsafe": 1}
    assert lines(out / "rejected.jsonl")[0]["where"] == "more"


def test_a_caption_of_the_same_length_is_another_dataset(tmp_path: Path) -> None:
    inside, out = folder(tmp_path / "inside", 3), tmp_path / "out"
    run(out, f"{inside}/")
    run(out, inside)  # the same, however its name ends
    (inside / "00001.txt").write_text("drawing number 7")
    with pytest.raises(BadRecipe, match="has changed since"):
        run(out, inside)


def captioned(out: Path) -> dict[str, tuple[list[str], list[float]]]:
    rows = load_from_disk(str(out)).remove_columns("image")
    return {row["where"]: (row["captions"], row["caption_weights"]) for row in rows}


def test_a_picture_has_the_captions_of_all_its_rows_whatever_the_cut(tmp_path: Path) -> None:
    inside = folder(tmp_path / "inside", 4)
    said = [[f"{word} {number}" for word in ("one", "two", "three")] for number in range(4)]
    rows = ["file_name,text"]
    rows += [f"{number:05d}.png,{text}" for number in range(4) for text in said[number]]
    (inside / "metadata.csv").write_text("\n".join(rows))
    for shard in (1, 4, 100):
        out = tmp_path / f"out{shard}"
        run(out, inside, config=SMALL.model_copy(update={"shard": shard}))
        found = captioned(out)
        assert {name: texts for name, (texts, _) in found.items()} == {
            f"{number:05d}.png": said[number] for number in range(4)
        }
        assert found["00000.png"][1] == pytest.approx([0.3, 0.3, 0.3])


def test_rows_of_one_picture_that_stand_apart_are_told_to_follow_one_another(
    tmp_path: Path,
) -> None:
    inside = folder(tmp_path / "inside", 2)
    rows = "file_name,text\n00000.png,one\n00001.png,two\n00000.png,another"
    (inside / "metadata.csv").write_text(rows)
    run(tmp_path / "out", inside)
    assert captioned(tmp_path / "out")["00000.png"][0] == ["another"]
    (left,) = lines(tmp_path / "out/rejected.jsonl")
    assert left["reason"].startswith("comes twice; rows that name one picture give it all")


def test_a_list_of_texts_is_as_many_captions_and_one_of_keywords_is_one(tmp_path: Path) -> None:
    inside = folder(tmp_path / "inside", 1)
    row = {
        "file_name": "00000.png",
        "text": ["a dog, running", "a dog"],
        "keywords": ["dog", "run"],
    }
    (inside / "metadata.jsonl").write_text(json.dumps(row))
    run(tmp_path / "out", inside)
    texts, weights = captioned(tmp_path / "out")["00000.png"]
    assert texts == ["a dog, running", "a dog", "dog, run"]
    assert weights == pytest.approx([0.45, 0.45, 0.1])
    (one,) = sources.folder(inside)
    assert list(one.captions) == texts
    assert one.weights == pytest.approx(weights)


def test_what_is_no_longer_whole_is_not_called_done(tmp_path: Path) -> None:
    inside, out = folder(tmp_path / "inside", 3), tmp_path / "out"
    run(out, inside)
    data = next(out.glob("*.arrow"))
    data.rename(tmp_path / data.name)
    with pytest.raises(BadData, match=f"damaged: {data.name} .*; remove it and give"):
        run(out, inside)
    (out / "manifest.json").write_text("{}")
    with pytest.raises(BadData, match="is damaged: remove"):
        prepare.verify(out)


def test_a_caption_column_that_nobody_has_is_named(tmp_path: Path) -> None:
    asked = SMALL.model_copy(update={"caption_columns": (("text", 0.5), ("keyword", 0.5))})
    inside = folder(tmp_path / "inside", 3)
    with pytest.raises(BadData, match=r"--caption-column keyword: none of .* they have `text`"):
        run(tmp_path / "out", inside, config=asked)


def test_pictures_without_captions_are_counted_unless_none_has_one(tmp_path: Path) -> None:
    inside = folder(tmp_path / "inside", 260)
    for number in range(257):
        (inside / f"{number:05d}.txt").unlink()
    (inside / "00258.txt").rename(inside / "00258.TXT")
    counts = run(tmp_path / "out", inside)["counts"]
    assert counts["kept"] == 3
    assert counts["rejected"] == {"caption": 257}
    for text in (*inside.glob("*.txt"), *inside.glob("*.TXT")):
        text.unlink()
    with pytest.raises(BadData, match=r"no picture has a caption; put picture\.txt beside"):
        run(tmp_path / "other", inside)


def test_the_summary_says_how_to_keep_what_only_looks_alike(tmp_path: Path) -> None:
    inside, out = folder(tmp_path / "inside", 3), tmp_path / "out"
    nearly = drawing(0)
    nearly[0, 0] ^= 1
    (inside / "nearly.png").write_bytes(encoded(nearly))
    (inside / "nearly.txt").write_text("x")
    said = "\n".join(prepare.summary(out, run(out, inside)))
    assert "1 of them are near duplicates, within 4 bits; --near 0 keeps them" in said


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (SMALL.model_copy(update={"image_column": "picture"}), "--image-column picture: is for"),
        (SMALL.model_copy(update={"stream": True}), "--stream: is for datasets of the Hugging"),
    ],
)
def test_what_is_asked_of_another_kind_of_source_is_refused(
    tmp_path: Path, config: Config, said: str
) -> None:
    with pytest.raises(BadRecipe, match=said):
        run(tmp_path / "out", folder(tmp_path / "in", 3), config=config)
    assert not (tmp_path / "out").exists()
