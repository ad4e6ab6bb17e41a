"""Tables give the same records whether parquet, saved by `datasets`, or streamed."""

import io
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Value, disable_progress_bars
from datasets import Image as Pictures
from PIL import Image

from daybreak.data import records, tables
from daybreak.data.records import Columns, Fault, Record
from daybreak.failure import BadData

ANY = Columns()
disable_progress_bars()


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def dataset(count: int = 10) -> Dataset:
    rows = [
        {"image": {"bytes": png(n), "path": None}, "text": f"t {n}", "license": "CC0", "n": n}
        for n in range(count)
    ]
    kinds = {"image": Pictures(), "text": Value("string"), "license": Value("string")}
    return Dataset.from_list(rows, Features(kinds | {"n": Value("int64")}))


def read(source: records.Source) -> list[Record | Fault]:
    return [record for part in source.parts for record in part.read()]


def expected(count: int) -> list[tuple[bytes, dict[str, object]]]:
    return [(png(n), {"text": f"t {n}", "license": "CC0"}) for n in range(count)]


def contents(found: list[Record | Fault]) -> list[tuple[bytes, Any]]:
    return [(one.data, one.columns) for one in found if isinstance(one, Record)]


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> records.Source:
    pq.write_table(pa.table(columns), path, **options)
    return tables.parquet([path], path.parent, "source", ANY, 4)


def test_parquet_of_datasets_is_read_by_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.parquet"
    dataset().to_parquet(path, batch_size=3)
    source = tables.parquet([path], tmp_path, "source", ANY, 4)
    assert [
        (part.first, part.groups) for part in source.parts if isinstance(part, tables.Parquet)
    ] == [
        (0, (0, 1)),
        (6, (2, 3)),
    ]
    found = read(source)
    assert contents(found) == expected(10)
    assert [one.where for one in found] == [f"train-00000.parquet:{n}" for n in range(10)]
    assert contents(list(source.parts[1].read())) == expected(10)[6:]


def test_a_column_of_plain_bytes_is_pictures(tmp_path: Path) -> None:
    columns = {"url": ["u"], "jpg": [png(1)], "caption": ["c"]}
    for kind in (pa.binary(), pa.large_binary()):
        jpg = pa.array([png(1)], kind)
        source = parquet(tmp_path / "a.parquet", columns | {"jpg": jpg})
        assert contents(read(source)) == [(png(1), {"caption": "c"})]


def test_bytes_are_pictures_however_they_are_written(tmp_path: Path) -> None:
    kinds = [pa.binary(), pa.large_binary(), pa.binary_view()]
    for kind in (*kinds, pa.dictionary(pa.int32(), pa.binary())):
        plain = pa.array([png(1)], kind)
        inside = pa.StructArray.from_arrays([plain, pa.array(["1.png"])], ["bytes", "path"])
        for image in (plain, inside):
            source = parquet(tmp_path / "a.parquet", {"image": image, "text": ["t"]})
            assert contents(read(source)) == [(png(1), {"text": "t"})]


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = [pa.array([png(1)]), pa.array(["x"]), pa.array(["y"]), pa.array([1]), pa.array([2])]
    pq.write_table(pa.table(columns, ["jpg", "text", "text", "n", "n"]), path)
    with pytest.raises(BadData, match=r"a\.parquet: has 2 columns `text`; rename all but one"):
        tables.parquet([path], tmp_path, "source", ANY, 4)


def test_the_column_that_is_named_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {
        "small": [png(1)],
        "large": [png(2)],
        "a": ["x"],
        "b": [["y", "z"]],
        "rights": ["PD"],
    }
    pq.write_table(pa.table(columns), path)
    wanted = Columns(("a", "b"), "large", "rights")
    source = tables.parquet([path], tmp_path, "source", wanted, 4)
    assert contents(read(source)) == [(png(2), {"a": "x", "b": ["y", "z"], "rights": "PD"})]


def test_columns_that_are_missing_are_refused_with_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"jpg": [png(1)], "title": ["x"]}), path)
    for wanted, said in [
        (ANY, "no matching caption column; .* `jpg`, `title`"),
        (Columns(("titel",)), "no matching caption column; .* `jpg`, `title`"),
        (Columns(("title",), "title"), "no column `title` with pictures; .* `jpg`, `title`"),
        (Columns(("title",), "png"), "no column `png` with pictures"),
    ]:
        with pytest.raises(BadData, match=f"a.parquet: has {said}"):
            tables.parquet([path], tmp_path, "source", wanted, 4)
    pq.write_table(pa.table({"image": ["a.png"], "text": ["x"]}), path)
    with pytest.raises(BadData, match="no column of pictures"):
        tables.parquet([path], tmp_path, "source", ANY, 4)


def test_a_source_that_is_one_table_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "odd.parquet"
    for columns in ({"image": ["a.png"], "text": ["x"]}, {"jpg": [png(1)], "title": ["x"]}):
        pq.write_table(pa.table(columns), path)
        for name, said in ((str(path), f"{path}: has no "), (str(tmp_path), f"{tmp_path}: odd.")):
            with pytest.raises(BadData) as caught:
                tables.parquet([path], path.parent, name, ANY, 4)
            assert str(caught.value).startswith(said)
            assert str(caught.value).count("odd.parquet") == 1


def test_cells_without_a_picture_are_named(tmp_path: Path) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = [{"bytes": png(0), "path": "a"}, {"bytes": None, "path": "b.png"}, None]
    source = parquet(tmp_path / "a.parquet", {"image": pa.array(cells, kind), "text": ["x"] * 3})
    assert read(source)[1:] == [
        Fault("a.parquet:1", "missing", "has the path of a picture, and not its bytes."),
        Fault("a.parquet:2", "missing", "has no picture."),
    ]


def test_text_that_is_no_utf_8_reaches_the_captions_as_bytes(tmp_path: Path) -> None:
    bad = pa.array([b"fine", b"K\xe4tzchen"], pa.binary()).view(pa.string())
    source = parquet(tmp_path / "a.parquet", {"jpg": [png(0), png(1)], "text": bad})
    found = read(source)
    assert contents(found) == [(png(0), {"text": "fine"}), (png(1), {"text": b"K\xe4tzchen"})]


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    noise = pa.table({"jpg": [png(n) * 50 for n in range(40)], "text": ["x"] * 40})
    pq.write_table(noise, path, row_group_size=10, compression="zstd")
    whole = path.read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"x" * 1000):
        path.write_bytes(data)
        (fault,) = read(tables.parquet([path], tmp_path, "source", ANY, 100))
        assert isinstance(fault, Fault)
        assert (fault.where, fault.kind) == ("a.parquet", "container")
    start = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(2).column(0).dictionary_page_offset
    path.write_bytes(whole[:start] + bytes(200) + whole[start + 200 :])
    found = read(tables.parquet([path], tmp_path, "source", ANY, 100))
    (fault,) = (one for one in found if isinstance(one, Fault))
    assert fault.kind == "container"
    assert "cannot be read from row 20 to 29" in fault.reason
    rows = [*range(20), *range(30, 40)]
    assert [one.where for one in found if one != fault] == [f"a.parquet:{row}" for row in rows]


def test_a_saved_dataset_is_read_by_rows(tmp_path: Path) -> None:
    dataset().save_to_disk(tmp_path / "saved", num_shards=2)
    source = tables.saved(tmp_path / "saved", "source", ANY, 4)
    assert [part.rows for part in source.parts if isinstance(part, tables.Rows)] == [4, 4, 2]
    found = read(source)
    assert contents(found) == expected(10)
    assert [one.where for one in found] == [str(n) for n in range(10)]


def test_a_damaged_saved_dataset_is_refused(tmp_path: Path) -> None:
    dataset().save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(BadData, match="saved: is a damaged dataset"):
        tables.saved(tmp_path / "saved", "source", ANY, 4)


@pytest.fixture
def published(tmp_path: Path) -> str:
    """A folder as the hub serves it, which `datasets` opens in the same way."""
    folder = tmp_path / "published" / "data"
    folder.mkdir(parents=True)
    dataset(6).to_parquet(folder / "train-00000-of-00002.parquet")
    dataset(10).select(range(6, 10)).to_parquet(folder / "train-00001-of-00002.parquet")
    dataset(3).to_parquet(folder / "test-00000-of-00001.parquet")
    return str(folder.parent)


def test_a_dataset_of_the_hub_is_read_by_rows(
    published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = tables.hub(published, ANY, 4, stream=False)
    assert contents(read(source)) == expected(10)
    assert contents(read(tables.hub(f"{published}:test", ANY, 4, stream=False))) == expected(3)


def test_streaming_gives_the_same_shard_by_shard(published: str) -> None:
    source = tables.hub(published, ANY, 4, stream=True)
    assert len(source.parts) == 2
    found = read(source)
    assert contents(found) == expected(10)
    assert [one.where for one in found][5:7] == ["0:5", "1:0"]


def test_what_cannot_be_had_from_the_hub_is_one_sentence(published: str) -> None:
    with pytest.raises(
        BadData,
        match=r"published:none: .* nor a dataset that can be loaded from the Hugging Face hub",
    ):
        tables.hub(f"{published}:none", ANY, 4, stream=True)


def test_parts_travel_to_other_processes(published: str, tmp_path: Path) -> None:
    dataset().save_to_disk(tmp_path / "saved")
    for source in (
        tables.saved(tmp_path / "saved", "source", ANY, 4),
        tables.hub(published, ANY, 4, stream=True),
    ):
        sent = pickle.dumps(source.parts[1])
        assert len(sent) < 10_000
        assert list(pickle.loads(sent).read()) == list(source.parts[1].read())
