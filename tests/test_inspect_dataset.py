"""What is shown of a prepared dataset: a page that stands alone, a summary, and the exit code."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from daybreak.data import census
from daybreak.failure import BadStorage
from daybreak.web import dataset
from daybreak.web import page as web
from tests import warm
from tests.pages import EVIL, Reader

Prepare = Callable[..., Path]
SQUARE, WIDE = {"bucket": "64x64"}, {"bucket": "32x128"}


def shown(folder: Path, batch: int = 2, **options: Any) -> str:
    written = census.read(folder)
    return dataset.page(written, census.count(written, batch, **options))


def rejected(number: int, reason: str = "cannot be decoded") -> dict[str, str]:
    where = f"bad/{number}.png"
    return {"source": "pictures", "where": where, "kind": "damaged", "reason": reason}


def test_the_page_stands_alone(prepared: Prepare) -> None:
    page = shown(prepared([SQUARE] * 3 + [WIDE] * 3, [rejected(1)]))
    reader = Reader(page)
    assert reader.open == []
    tags = {tag for tag, _ in reader.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "svg"}
    assert "default-src 'none'" in page
    assert all(uri.startswith("data:image/webp;base64,") for uri in reader.attributes("img", "src"))
    assert all(link.startswith("#") for link in reader.attributes("a", "href"))
    assert "url(" not in page
    assert "@import" not in page
    names = {name for _, found in reader.elements for name in found}
    assert not [name for name in names if name.startswith("on")]


def test_the_page_can_be_read_by_everybody(prepared: Prepare) -> None:
    reader = Reader(shown(prepared([SQUARE] * 3, [rejected(1)])))
    assert ("html", {"lang": "en"}) in reader.elements
    assert "width=device-width, initial-scale=1" in reader.attributes("meta", "content")
    pictures = [found for tag, found in reader.elements if tag == "img"]
    assert all(found["alt"] for found in pictures)
    places = [found["id"] for _, found in reader.elements if "id" in found]
    assert len(places) == len(set(places))
    assert {link.removeprefix("#") for link in reader.attributes("a", "href")} <= set(places)
    headings = [tag for tag, _ in reader.elements if tag in {"h1", "h2", "h3"}]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1


def test_what_strangers_wrote_is_text_and_nothing_else(prepared: Prepare) -> None:
    rows = [SQUARE | {"captions": [EVIL], "licence": EVIL}] * 2
    folder = prepared(rows, [rejected(1, EVIL) | {"kind": EVIL, "where": EVIL}])
    written = census.read(folder)
    kept = written.opened.table["id"][0].as_py()
    groups = (census.Group("near", kept, (census.Dropped(EVIL, EVIL, 1),)),)
    written = written._replace(groups=groups)
    page = dataset.page(written, census.count(written, 2))
    reader = Reader(page)
    assert reader.open == []
    assert "script" not in {tag for tag, _ in reader.elements}
    assert "x" not in reader.attributes("img", "src")
    assert reader.text.count("<script>alert(1)</script>") >= 5


def test_each_bucket_has_its_sheet_with_captions(prepared: Prepare) -> None:
    rows = [SQUARE | {"captions": [f"square {n}", "second"]} for n in range(140)]
    rows += [WIDE | {"captions": [f"wide {n}"]} for n in range(3)]
    reader = Reader(shown(prepared(rows)))
    assert "64 × 64 128 of 140" in reader.text
    assert "32 × 128 3 of 3" in reader.text
    assert all(f"wide {n}" in reader.text for n in range(3))
    assert "square 0 second" in reader.text
    assert "square 139" in reader.text  # the sample reaches from end to end
    sizes = set()
    for uri in reader.attributes("img", "src"):
        data = base64.b64decode(uri.partition(",")[2])
        with Image.open(io.BytesIO(data)) as picture:
            sizes.add(picture.size)
    assert sizes == {(192, 192), (192, 48)}


def test_a_thumbnail_shows_what_training_sees(prepared: Prepare) -> None:
    """The overhang of a stored picture is not in it."""
    folder = prepared([SQUARE | {"height": 64, "width": 96}] * 2)
    [uri, _] = Reader(shown(folder)).attributes("img", "src")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        assert picture.size == (192, 192)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(pixels - [0, 255, 128]).max() <= 8


def test_every_rejected_file_is_listed_with_its_reason(prepared: Prepare) -> None:
    rows = [rejected(n, f"reason number {n}") for n in range(200)]
    text = Reader(shown(prepared([SQUARE] * 2, rows))).text
    assert all(f"bad/{n}.png reason number {n} " in text for n in range(199))
    assert "damaged 200" in text


def test_duplicates_stand_side_by_side(prepared: Prepare, pictures: Path) -> None:
    folder = prepared([SQUARE] * 3)
    written = census.read(folder)
    (pictures.parent / "secret.png").write_bytes((pictures / "1.png").read_bytes())
    dropped = (
        census.Dropped(str(pictures), "1.png", 3),
        census.Dropped("shard.tar", "key-7.jpg", 5),
        census.Dropped(str(pictures), "../secret.png", 6),
        census.Dropped(str(pictures), "1.txt", 7),
    )
    kept = written.opened.table["id"][2].as_py()
    written = written._replace(groups=(census.Group("near", kept, dropped),))
    before = len(Reader(shown(folder)).attributes("img", "src"))
    reader = Reader(dataset.page(written, census.count(written, 2)))
    assert len(reader.attributes("img", "src")) == before + 2  # the kept one, and 1.png
    for words in ("kept 2.png", "distance 3 1.png", "in shard.tar distance 5 key-7.jpg"):
        assert words in reader.text
    assert "in pictures distance 6 ../secret.png" in reader.text
    assert "cannot be read any more distance 7" in reader.text


def test_the_page_stays_small_whatever_the_dataset(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = EVIL * 200
    rows = [SQUARE | {"captions": [long] * 4, "licence": f"{n}{long}"} for n in range(60)]
    folder = prepared(rows, [rejected(n, long) | {"where": f"{n}{long}"} for n in range(2000)])
    written = census.read(folder)
    name = written.opened.table["id"][0].as_py()
    dropped = tuple(census.Dropped(long, f"{n}{long}", n) for n in range(50))
    written = written._replace(
        groups=tuple(census.Group("near", name, dropped) for _ in range(900))
    )
    page = dataset.page(written, census.count(written, 2)).encode()
    assert len(page) < dataset.PAGE_BYTES
    text = Reader(page.decode()).text
    assert "all of them are in rejected.jsonl" in text
    assert "all of them are in duplicates.jsonl" in text

    monkeypatch.setattr(dataset, "SHEETS_BYTES", 30_000)
    assert len(dataset.page(written, census.count(written, 2)).encode()) < len(page)


def test_the_summary_fits_a_terminal(prepared: Prepare) -> None:
    folder = prepared([SQUARE | {"captions": ["a [red] dog"]}] * 5 + [WIDE], [rejected(1)])
    console = Console(file=io.StringIO(), width=80)
    console.print(dataset.summary(census.count(census.read(folder), batch=4, world=2)))
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    for words in (
        "6 pictures of 7 read, 6 captions",
        "licences CC0 6",
        "dog 5, red 5",
        "1: damaged 1",
        "64x64 5 1 1 0",
        "batches of 4 (2 on each of 2), an epoch is 1.5 steps",
        "note: 32x128 has fewer pictures (1)",
    ):
        assert words in text


def test_a_summary_takes_nothing_for_markup(prepared: Prepare) -> None:
    folder = prepared([SQUARE | {"licence": "<b>MIT</b>[/x]", "source": "pics [old]"}] * 2)
    stream = io.StringIO()
    found = census.count(census.read(folder), 2, 1, None)
    Console(file=stream, width=120).print(dataset.summary(found))
    assert "<b>MIT</b>[/x]" in stream.getvalue()
    assert "pics [old]" in stream.getvalue()


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadStorage, match="cannot write"):
        web.write("page", tmp_path / "file" / "page.html")


def daybreak(*arguments: object) -> warm.Done:
    return warm.run("-m", "daybreak", "inspect", *arguments)


def test_the_verb_shows_a_good_dataset(prepared: Prepare, tmp_path: Path) -> None:
    folder = prepared([SQUARE] * 8)
    before = sorted(folder.iterdir())
    done = daybreak(folder, "--batch", 4, "--out", tmp_path / "new" / "page.html")
    assert done.returncode == 0, done.stderr
    assert "an epoch is 2 steps" in " ".join(done.stdout.split())
    assert "Ready to train" in (tmp_path / "new" / "page.html").read_text()
    assert sorted(folder.iterdir()) == before
    done = daybreak(folder, "--batch", 4)
    assert done.stdout.splitlines()[-1] == f"page: {folder / 'inspect.html'}"
    assert census.read(folder)  # the page is no part of what the manifest names


def test_the_verb_ends_as_training_would(prepared: Prepare, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = daybreak(prepared([SQUARE] * 3), "--out", page)
    assert done.returncode == 2
    assert done.stderr.startswith("daybreak: ")
    assert "holds 3 pictures and a batch takes 64" in done.stderr
    assert "Training would stop" in page.read_text()
    done = daybreak(prepared([SQUARE | {"captions": [" "]}] * 3), "--batch", 2, "--out", page)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    done = daybreak(tmp_path / "nothing")
    assert done.returncode == 3
    assert "is not a folder: give that of a run" in done.stderr
    done = daybreak(tmp_path)
    assert done.returncode == 3
    assert "is neither a run (it has no recipe.toml) nor a prepared dataset" in done.stderr
