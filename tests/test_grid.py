"""The sheet shows every picture, pixel by pixel, with its words, and remembers who made it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFont

from daybreak.generate import grid


def pictures(count: int, height: int = 32, width: int = 32) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


class Box(NamedTuple):
    """Where a picture is: its first row and column, and those behind its last."""

    top: int
    left: int
    bottom: int
    right: int


def found(sheet: Image.Image, picture: npt.NDArray[np.uint8], factor: int) -> Box | None:
    pixels = np.asarray(sheet)
    large = picture.repeat(factor, 0).repeat(factor, 1)
    height, width = large.shape[:2]
    corners = np.argwhere((pixels == large[0, 0]).all(-1)).tolist()
    boxes = [Box(y, x, y + height, x + width) for y, x in corners]
    return next(
        (one for one in boxes if np.array_equal(pixels[one[0] : one[2], one[1] : one[3]], large)),
        None,
    )


@pytest.mark.parametrize(("size", "factor"), [(32, 4), (48, 3), (100, 2), (128, 1), (160, 1)])
def test_every_picture_is_there_enlarged_by_a_whole_number(size: int, factor: int) -> None:
    shown = pictures(3, size, size)
    sheet = grid.grid(shown, ["a", "b", "c"])
    assert all(found(sheet, picture, factor) for picture in shown)


def test_pictures_of_several_shapes_share_a_sheet() -> None:
    shown = [pictures(1, 64, 32)[0], pictures(1, 32, 64)[0], pictures(1, 16, 16)[0]]
    sheet = grid.grid(shown, ["a", "b", "c"], columns=2)
    assert all(found(sheet, picture, 2) for picture in shown)


def test_pictures_stand_in_the_middle_of_framed_even_cells() -> None:
    shown = [*pictures(3, 32, 16), *pictures(1, 16, 8)]
    sheet = grid.grid(shown, [""] * 4, columns=2)
    boxes = [box for box in (found(sheet, picture, 4) for picture in shown) if box]
    first, right, below, small = boxes
    assert first.top == first.left
    assert (right.top, below.left) == (first.top, first.left)
    assert sheet.size == (right.right + first.left, below.bottom + first.top)
    assert below.top - first.bottom == right.left - first.right > 0
    assert small.top + small.bottom == below.top + below.bottom
    assert small.left + small.right == right.left + right.right
    pixels = np.asarray(sheet)
    for box in boxes:
        across, down = slice(box.left - 1, box.right + 1), slice(box.top - 1, box.bottom + 1)
        for edge in (
            pixels[box.top - 1, across],
            pixels[box.bottom, across],
            pixels[down, box.left - 1],
            pixels[down, box.right],
        ):
            assert (edge == grid.FRAME).all()


def test_the_label_of_any_picture_makes_room_for_itself() -> None:
    long, shown = "a red circle left of a blue square " * 4, pictures(6)
    heights = {
        grid.grid(shown, [long if n == place else "" for n in range(6)], columns=2).height
        for place in range(6)
    }
    assert len(heights) == 1
    assert heights != {grid.grid(shown, [""] * 6, columns=2).height}


def test_columns_and_title_shape_the_sheet() -> None:
    shown = pictures(6)
    wide = grid.grid(shown, ["x"] * 6, columns=6)
    high = grid.grid(shown, ["x"] * 6, columns=1)
    assert wide.width > 6 * 128
    assert high.height > 6 * 128
    assert grid.grid(shown, ["x"] * 6, columns=6, title="title").height > wide.height
    assert grid.grid(shown, [""] * 6, columns=6).height < wide.height
    assert grid.grid(shown[:2], ["x"] * 2, columns=9).size == grid.grid(shown[:2], ["x"] * 2).size


@pytest.mark.parametrize("count", range(1, 101))
def test_the_sheet_is_neither_a_ribbon_nor_a_tower(count: int) -> None:
    columns = grid._columns(count)
    assert 1 <= columns <= count
    assert columns <= 2 * np.sqrt(1.5 * count)
    assert columns >= np.sqrt(count) - 1


def test_the_usual_counts_leave_no_gaps() -> None:
    assert [grid._columns(count) for count in [8, 16, 24, 32, 64]] == [4, 4, 6, 8, 8]


def test_labels_wrap_within_their_width_and_end_in_an_ellipsis() -> None:
    font = ImageFont.load_default(13)
    assert grid._wrap("a red circle", font, 400) == ["a red circle"]
    assert grid._wrap("", font, 400) == []
    long = "a small green triangle left of a large yellow star " * 4
    lines = grid._wrap(long, font, 128)
    assert len(lines) == grid.LINES
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 128 for line in lines)
    word = grid._wrap("x" * 100, font, 128)
    assert len(word) == 1
    assert font.getlength(word[0]) <= 128


def test_labels_in_any_script_are_drawn_without_an_error() -> None:
    grid.grid(pictures(1), ["猫 Kätzchen \u2028 🐈 \x00"])


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        grid.grid([], [])
    with pytest.raises(ValueError, match="2 pictures, 1 labels"):
        grid.grid(pictures(2), ["a"])


def test_a_saved_picture_says_how_it_was_made(tmp_path: Path) -> None:
    made = {"prompt": "ein Kätzchen 猫", "seed": "17", "recipe": "a" * 64}
    shown = Image.fromarray(pictures(1)[0])
    path = tmp_path / "samples" / "00.png"
    grid.save(shown, path, made)
    with Image.open(path) as image:
        assert {key: image.info[key] for key in made} == made
        assert np.array_equal(np.asarray(image), np.asarray(shown))
    assert [file.name for file in path.parent.iterdir()] == ["00.png"]


def test_a_save_that_fails_leaves_the_old_picture_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "00.png"
    grid.save(Image.new("RGB", (2, 2)), path, {})
    before = path.read_bytes()
    with pytest.raises(OSError, match="cannot write mode"):
        grid.save(Image.new("F", (2, 2)), path, {})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["00.png"]
