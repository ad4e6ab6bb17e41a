"""Files and folders that are whole or not there."""

from pathlib import Path

import pytest

from daybreak.data import disk


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    disk.write_json(path, {"was": 1})
    with pytest.raises(TypeError):
        disk.write_json(path, {"is": Path})
    assert disk.read_json(path) == {"was": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


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
