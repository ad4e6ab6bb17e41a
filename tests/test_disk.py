"""Files and folders that are whole or not there."""

from pathlib import Path

import pytest

from daybreak.data import disk
from daybreak.failure import BadStorage


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    disk.write_json(path, {"was": 1})
    with pytest.raises(TypeError):
        disk.write_json(path, {"is": Path})
    assert disk.read_json(path) == {"was": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_what_a_name_cannot_say_whole_is_told_apart_all_the_same() -> None:
    said = ["a-cat", "a cat", "a cat!", "a-cat-", "..", "/etc/passwd", "x" * 299, "x" * 300]
    said += ["\N{CAT FACE}" * 99, "\u732b" * 99, "\u732b" * 98 + "\u72ac", "", "empty", "a  cat"]
    for hyphen, plain in ("-", "a-cat"), (" ", "a cat"):
        names = {one: disk.named(one, 40, hyphen) for one in said}
        assert names[plain] == "a-cat"
        assert len({name.lower() for name in names.values()}) == len(said)
        for name in names.values():
            assert len(name.encode()) <= 40
            assert Path(name).name == name.lstrip("-.") != ""
            assert disk.plain(name, 40) == name


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    with disk.fresh(tmp_path / "a.json") as staged:
        staged.write_text("{")
        (tmp_path / staged.name.replace("a.json", "b.json")).write_text("half")
    (tmp_path / ".tmp-mine").write_text("a user's own")
    disk.sweep(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".tmp-mine", "a.json"]


def test_a_folder_takes_the_place_of_another_which_comes_back_where_that_fails(
    tmp_path: Path,
) -> None:
    staged, folder = tmp_path / ".tmp-new", tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(OSError, match="No such file"):
        disk.swap(staged, folder)
    assert [file.name for file in folder.iterdir()] == ["old"]
    staged.mkdir()
    was = disk.swap(staged, folder)
    assert not list(folder.iterdir())
    assert [file.name for file in was.iterdir()] == ["old"]


def test_lines_of_later_steps_and_half_written_ones_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert disk.cut_lines(path, 3) == {}
    assert not path.exists()
    whole = b'{"step": 1, "loss": 0.50}\n{"step": 3, "loss": null}\n'
    path.write_bytes(b'{"step": 1}\n' + whole + b'{"loss": 1}\n7\n\n{"step": 4}\n{"step": 2, "lo')
    assert disk.cut_lines(path, 3) == {"step": 3, "loss": None}
    assert path.read_bytes() == whole
    before = path.stat().st_ino
    assert disk.cut_lines(path, 3) == {"step": 3, "loss": None}
    assert path.stat().st_ino == before, "what is whole is not written again"
    assert disk.cut_lines(path, 0) == {}
    assert path.read_bytes() == b""


def test_lines_that_the_disk_does_not_give_are_bad_storage(tmp_path: Path) -> None:
    with pytest.raises(BadStorage, match=r"cannot shorten .* to step 3"):
        disk.cut_lines(tmp_path, 3)
    with pytest.raises(BadStorage, match=r"cannot read .*: Is a directory"):
        disk.read_json(tmp_path)  # and nobody is told to remove what is only closed
