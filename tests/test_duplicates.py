"""Copies are found however they were saved, and different pictures are left alone."""

import io
import time
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from daybreak.data import duplicates, images
from daybreak.data.duplicates import Group

EMOJI = Path(__file__).parents[2] / "shared" / "data" / "emoji"
Picture = npt.NDArray[np.uint8]
Look = npt.NDArray[np.int16]


def drawing(number: int, side: int = 128) -> Picture:
    """A few discs and boxes, different for each number."""
    random = np.random.default_rng(number)
    image = Image.new("RGB", (side, side), tuple(random.integers(180, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for shape in (draw.ellipse, draw.rectangle, draw.ellipse):
        x, y, r = (random.random(3) * [0.8, 0.8, 0.3] + [0.1, 0.1, 0.1]) * side
        shape((x - r, y - r, x + r, y + r), fill=tuple(random.integers(0, 200, 3).tolist()))
    return np.array(image)


def resaved(picture: Picture, quality: int, scale: float = 1) -> Picture:
    image = Image.fromarray(picture)
    size = (round(image.width * scale), round(image.height * scale))
    file = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=quality)
    return images.decode(file.getvalue(), "copy")


def find(pictures: list[Picture], near: int = 4, order: list[int] | None = None) -> list[Group]:
    """The groups among pictures whose files are all different."""
    hashes = np.array([duplicates.perceptual_hash(one) for one in pictures]).view(np.uint64)
    ids = np.arange(len(pictures), dtype=np.uint64)
    rank = np.array(order or range(len(pictures)))
    return duplicates.find(ids, hashes, rank, near, lambda row: duplicates.thumbnail(pictures[row]))


def test_the_hash_is_that_of_its_definition() -> None:
    grey = np.asarray(
        Image.fromarray(drawing(1)).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    ).astype(float)
    n = np.arange(32)
    cosine = 2 * np.cos(np.pi * np.arange(8)[:, None] * (2 * n + 1) / 64)
    low = np.rint(cosine @ grey @ cosine.T)
    bits = "".join("1" if value > np.median(low) else "0" for value in low.ravel())
    assert duplicates.perceptual_hash(drawing(1)) % 2**64 == int(bits, 2)


def test_copies_of_other_quality_and_size_are_found() -> None:
    originals = [drawing(number) for number in range(20)]
    copies = [resaved(one, quality=60, scale=0.75) for one in originals]
    groups = find([*originals, *copies])
    pairs = {(group.kept, row) for group in groups for row, _ in group.dropped}
    assert pairs <= {(number, number + 20) for number in range(20)}
    assert len(pairs) >= 18
    assert all(group.kind == "near" for group in groups)
    assert all(far <= 4 for group in groups for _, far in group.dropped)


def test_the_same_shape_in_another_colour_is_another_picture() -> None:
    def heart(colour: str) -> Picture:
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).polygon(
            [(32, 56), (8, 24), (20, 8), (32, 20), (44, 8), (56, 24)], colour
        )
        return np.array(image)

    red, green = heart("red"), heart("green")
    hashes = [duplicates.perceptual_hash(one) for one in (red, green)]
    assert (hashes[0] ^ hashes[1]).bit_count() <= 4  # the hash alone does not tell them apart
    assert find([red, green]) == []


def test_zero_looks_for_exact_duplicates_only() -> None:
    picture = drawing(0)
    assert find([picture, picture], near=0) == []
    assert find([picture, picture], near=1) == [Group("near", 0, ((1, 0),))]


def test_equal_files_are_exact_duplicates_and_the_first_in_order_is_kept() -> None:
    ids = np.array([5, 7, 5, 9, 5, 7], np.uint64)
    order = np.array([4, 1, 0, 2, 3, 5])
    groups = duplicates.find(ids, ids, order, 0, lambda row: np.zeros(3, np.int16))
    assert groups == [
        Group("exact", 1, ((5, 0),)),
        Group("exact", 4, ((0, 0), (2, 0))),
    ]


def test_what_is_alike_to_a_dropped_picture_only_is_kept() -> None:
    # 0 - 1 - 2: each two bits from the next, so 0 and 2 are four apart
    hashes = np.array([0b0000, 0b0011, 0b1111], np.uint64)
    ids = np.arange(3, dtype=np.uint64)
    groups = duplicates.find(
        ids, hashes, ids.astype(np.int64), 2, lambda row: np.zeros(3, np.int16)
    )
    assert groups == [Group("near", 0, ((1, 2),))]
    middle = np.array([1, 0, 2])
    groups = duplicates.find(ids, hashes, middle, 2, lambda row: np.zeros(3, np.int16))
    assert groups == [Group("near", 1, ((0, 2), (2, 2)))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 63), max_size=5), min_size=1, max_size=12),
    st.integers(1, 6),
)
def test_bands_find_every_pair_that_comparing_all_finds(
    seeds: list[int], flips: list[list[int]], near: int
) -> None:
    flipped = [
        seed ^ sum(1 << bit for bit in set(bits)) for seed, bits in zip(seeds, flips, strict=False)
    ]
    hashes = np.array([*seeds, *flipped], np.uint64)
    count = len(hashes)
    ids = np.arange(count, dtype=np.uint64)
    groups = duplicates.find(
        ids, hashes, ids.astype(np.int64), near, lambda row: np.zeros(3, np.int16)
    )
    kept, taken = dict[int, list[tuple[int, int]]](), set[int]()
    for row in range(count):
        if row in taken:
            continue
        alike = [
            (other, (int(hashes[row]) ^ int(hashes[other])).bit_count())
            for other in range(row + 1, count)
            if other not in taken
        ]
        kept[row] = [(other, far) for other, far in alike if far <= near]
        taken |= {other for other, _ in kept[row]}
    assert groups == [Group("near", row, tuple(rows)) for row, rows in kept.items() if rows]


@pytest.mark.skipif(not EMOJI.is_dir(), reason="the emoji pictures are not beside this checkout")
def test_no_two_different_emoji_are_taken_for_one() -> None:
    names = sorted(path.name for path in EMOJI.glob("*.png"))
    pictures = [images.decode((EMOJI / name).read_bytes(), name) for name in names]
    groups = find(pictures)
    assert len(groups) == 4
    for group in groups:
        for row, _ in group.dropped:
            assert np.array_equal(pictures[row], pictures[group.kept]), (names[row], group)


@pytest.mark.parametrize(("louder", "alike"), [(20, True), (34, False), (100, False)])
def test_a_dot_in_another_colour_is_another_picture(louder: int, alike: bool) -> None:
    picture = np.full((128, 128, 3), 90, np.uint8)
    picture[32:96, 16:80] = 200
    other = picture.copy()
    other[8:16, 8:16] += np.uint8(louder)
    hashes = np.zeros(2, np.uint64)
    ids = np.arange(2, dtype=np.uint64)
    both = [picture, other]
    groups = duplicates.find(
        ids, hashes, np.arange(2), 4, lambda row: duplicates.thumbnail(both[row])
    )
    assert groups == ([Group("near", 0, ((1, 0),))] if alike else [])


def test_an_exact_duplicate_is_no_near_one_as_well() -> None:
    ids, hashes = np.array([5, 5, 7], np.uint64), np.zeros(3, np.uint64)
    groups = duplicates.find(ids, hashes, np.arange(3), 1, lambda row: np.zeros(3, np.int16))
    assert groups == [Group("exact", 0, ((1, 0),)), Group("near", 0, ((2, 0),))]


def test_copies_of_a_near_duplicate_go_to_the_picture_that_is_kept() -> None:
    kept, low, other = drawing(1), resaved(drawing(1), quality=60), drawing(2)
    pictures = [low, low, kept, other, other]  # 0 and 1 are one file, so are 3 and 4
    ids = np.array([7, 7, 8, 9, 9], np.uint64)
    hashes = np.array([duplicates.perceptual_hash(one) for one in pictures]).view(np.uint64)
    far = int(np.bitwise_count(hashes[0] ^ hashes[2]))

    def look(row: int) -> Look:
        return duplicates.thumbnail(pictures[row])

    found = duplicates.find(ids, hashes, np.array([2, 0, 1, 3, 4]), 4, look)
    assert found == [Group("exact", 3, ((4, 0),)), Group("near", 2, ((0, far), (1, far)))]


def test_thousands_of_different_pictures_of_one_hash_take_seconds() -> None:
    thumbnails = np.random.default_rng(0).integers(0, 256, (3000, 768)).astype(np.int16)
    thumbnails[1999] = thumbnails[7] + duplicates.APART
    ids, hashes = np.arange(3000, dtype=np.uint64), np.full(3000, 5, np.uint64)
    start = time.process_time()
    found = duplicates.find(ids, hashes, np.arange(3000), 4, thumbnails.__getitem__)
    assert found == [Group("near", 7, ((1999, 0),))]
    assert time.process_time() - start < 8  # pair by pair it took 12


def test_thumbnails_are_held_of_no_more_than_what_hangs_together() -> None:
    # pairs of hashes that differ in a bit, each far from all others
    random = np.random.default_rng(0).integers(0, 2**63, 500).astype(np.uint64)
    hashes = np.concatenate([random, random ^ np.uint64(1)])
    ids, large = np.arange(1000, dtype=np.uint64), 20_000  # values, 40 kB each
    tracemalloc.start()
    found = duplicates.find(
        ids, hashes, np.arange(1000), 2, lambda row: np.full(large, row % 500, np.int16)
    )
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 500
    assert most < 8_000_000  # all of them are 40 MB
