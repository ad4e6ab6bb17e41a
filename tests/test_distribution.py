"""Drawn against true pictures: the same give nothing, others give much, and few are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from daybreak.data import scenes
from daybreak.evaluate import distribution, examples, prompts
from daybreak.evaluate.artist import Artist, Pictures
from daybreak.evaluate.clip_score import Clip
from daybreak.evaluate.features import Extractor
from daybreak.evaluate.prompts import Prompts
from daybreak.failure import BadData, BadRecipe

CONFIG = scenes.Config(canvas="32")


def corners(name: str = "corners", digest: str = "0" * 16, family: str = "") -> Extractor:
    """Means of the four quarters: twelve numbers of a picture."""

    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)

    return Extractor(name, digest, None, network, family)


def artist(first: int, brighter: int = 0, taught: frozenset[str] = frozenset()) -> Artist:
    """Draws other scenes than were asked for, as well distributed as the true ones."""

    def draw(asked: Any, seeds: Any, height: int, width: int) -> Pictures:
        drawn = [scenes.sample(CONFIG, 0, first + seed).image for seed in seeds]
        pictures = np.stack([picture[:height, :width] for picture in drawn])
        return (pictures.astype(int) + brighter).clip(0, 255).astype(np.uint8)

    return Artist(draw, 32, 8, "f00d", {}, taught)


def idle() -> Artist:
    """Is not to draw."""

    def draw(asked: Any, seeds: Any, height: int, width: int) -> Pictures:
        raise AssertionError("refused before a picture is drawn")

    return artist(0)._replace(draw=draw)


def test_pictures_of_the_same_kind_are_at_no_distance(tmp_path: Path) -> None:
    fresh = examples.of_scenes(CONFIG, 1, 200)
    same = distribution.distribution(artist(0), fresh, [corners()], tmp_path).values
    apart = distribution.distribution(artist(0, 40), fresh, [corners()], tmp_path).values
    assert same["corners.kernel"].low < 0.002
    assert apart["corners.kernel"].low > 3 * abs(same["corners.kernel"].value)
    assert apart["corners.frechet"].value > 5 * same["corners.frechet"].value
    assert same["corners.coverage"].value > 0.8 > apart["corners.coverage"].value
    assert same["corners.cmmd"].value < apart["corners.cmmd"].value


def test_a_picture_without_features_has_no_cmmd_and_all_other_distances(tmp_path: Path) -> None:
    found = distribution.distribution(
        artist(0, -255), examples.of_scenes(CONFIG, 1, 40), [corners()], tmp_path
    )
    assert "corners.cmmd" not in found.values
    assert "corners.kernel" in found.values
    assert any("cmmd is left out" in said for said in found.remarks)


def test_the_reference_is_computed_once_and_known_by_its_contents(tmp_path: Path) -> None:
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return corners().network(x)

    watching = Extractor("watching", "1", None, network)
    fresh = examples.of_scenes(CONFIG, 1, 40)
    first = distribution.distribution(artist(0), fresh, [watching], tmp_path)
    assert sum(seen) == 80
    second = distribution.distribution(artist(0), fresh, [watching], tmp_path)
    assert sum(seen) == 80 + 40
    assert first == second
    others = (
        (fresh, watching._replace(digest="2")),
        (examples.of_scenes(CONFIG, 2, 40), watching),
    )
    for these, network_of in others:
        before = sum(seen)
        distribution.distribution(artist(0), these, [network_of], tmp_path)
        assert sum(seen) == before + 80


def test_a_cache_that_is_not_whole_is_made_again(tmp_path: Path) -> None:
    fresh = examples.of_scenes(CONFIG, 1, 40)
    first = distribution.distribution(artist(0), fresh, [corners()], tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert distribution.distribution(artist(0), fresh, [corners()], tmp_path) == first


def test_several_networks_judge_the_same_pictures(tmp_path: Path) -> None:
    two = [corners(), corners("a/tiny-clip", "1" * 16)]
    found = distribution.distribution(artist(0), examples.of_scenes(CONFIG, 1, 40), two, tmp_path)
    assert found.values["corners.kernel"] == found.values["tiny-clip.kernel"]
    assert "tiny-clip.cmmd" in found.values
    known = [*distribution.names("corners"), *distribution.names("a/tiny-clip")]
    assert set(known) == found.values.keys()
    assert set(found.details["extractors"]) == {"corners", "a/tiny-clip"}


def test_pictures_are_counted_while_they_are_drawn(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    fresh = examples.of_scenes(CONFIG, 1, 70)
    distribution.distribution(
        artist(0), fresh, [corners()], tmp_path, progress=lambda n, of: told.append((n, of))
    )
    assert told == [(64, 70), (70, 70)]


def test_a_network_that_taught_the_model_is_no_judge(tmp_path: Path) -> None:
    fresh, by = examples.of_scenes(CONFIG, 1, 40), artist(0, taught=frozenset({"dino"}))
    judges = [
        corners("judge", family="dinov3_vit"),
        corners("dino/clip", "1" * 16, "clip"),
    ]
    found = distribution.distribution(by, fresh, judges, tmp_path)
    said = [remark for remark in found.remarks if "took part" in remark]
    assert len(said) == 1
    assert said[0].startswith("judge took part in the training of this model")


def test_few_pictures_come_with_a_warning_and_fewer_are_refused(tmp_path: Path) -> None:
    found = distribution.distribution(
        artist(0), examples.of_scenes(CONFIG, 1, 40), [corners()], tmp_path
    )
    assert any("40 pictures" in said for said in found.remarks)
    with pytest.raises(BadData, match="10 pictures of scenes to compare with are too few"):
        distribution.distribution(idle(), examples.of_scenes(CONFIG, 1, 10), [corners()], tmp_path)


# A fixed list of captions


def coco(tmp_path: Path, n: int = 60) -> tuple[Prompts, Path]:
    folder = tmp_path / "true" / "deeper"
    folder.mkdir(parents=True)
    for number in range(n):
        picture = scenes.sample(CONFIG, 5, number).image
        Image.fromarray(picture).resize((48, 40)).save(folder / f"{number}.png")
    listed = tmp_path / "captions.txt"
    listed.write_text("".join(f"caption {number}\n" for number in range(n)))
    return prompts.read(listed), tmp_path / "true"


def test_a_list_of_captions_is_drawn_once_and_compared_at_one_size(tmp_path: Path) -> None:
    asked, true = coco(tmp_path)
    judges = [corners()]
    found = distribution.coco30k(artist(0), asked, true, judges, tmp_path / "cache", side=32)
    assert found.pictures == 60
    assert found.details["captions"] == asked.digest
    assert found.details["reference_pictures"] == 60
    assert (found.details["reference_enlarged"], found.details["clip"]) == (0, None)
    assert found.values["corners.frechet"].value > 0
    smaller = distribution.coco30k(artist(0), asked, true, judges, tmp_path / "cache", side=16)
    assert smaller.values != found.values
    assert smaller.details["reference"] != found.details["reference"]
    two = [corners("other", "1" * 16), corners()]
    both = distribution.coco30k(artist(0), asked, true, two, tmp_path / "cache", side=32)
    assert both.values["other.kernel"] == both.values["corners.kernel"]
    assert both.values["corners.kernel"] == found.values["corners.kernel"]
    assert both.details["reference"].keys() == {"other", "corners"}


def test_a_clip_gives_the_other_axis(tmp_path: Path) -> None:
    asked, true = coco(tmp_path)
    clip = Clip(corners("clip"), lambda words: np.ones((len(words), 12), np.float32), len, 8)
    found = distribution.coco30k(artist(0), asked, true, [corners()], tmp_path, clip, side=32)
    assert found.details["clip"] == clip.pictures.digest
    assert 90 < found.values["clip_score"].value <= 100
    assert found.remarks[-1] == "60 prompts are longer than CLIP reads"


def test_enlarged_pictures_are_not_judged(tmp_path: Path) -> None:
    asked, true = coco(tmp_path)
    with pytest.raises(BadRecipe, match=r"draws 32 px and FID-30K is measured at 256 px"):
        distribution.coco30k(idle(), asked, true, [corners()], tmp_path)


def test_true_pictures_that_are_small_are_enlarged_and_told_of(tmp_path: Path) -> None:
    asked, true = coco(tmp_path)
    Image.new("RGB", (40, 20)).save(true / "small.png")
    found = distribution.coco30k(artist(0), asked, true, [corners()], tmp_path / "cache", side=32)
    assert found.details["reference_enlarged"] == 1
    said = "1 of the 61 true pictures are smaller than 32 px and were enlarged"
    assert found.remarks[0] == said


@pytest.mark.parametrize(
    ("captions", "pictures", "words"),
    [
        (60, 0, "holds no pictures"),
        (19, 60, "19 captions to draw are too few for these distances: give 20 or more"),
        (60, 5, "5 pictures in .*true are too few for these distances: give 6 or more"),
    ],
)
def test_a_list_or_a_folder_that_is_too_small_is_named_before_a_picture_is_drawn(
    tmp_path: Path, captions: int, pictures: int, words: str
) -> None:
    asked, true = coco(tmp_path)
    asked = asked._replace(texts=asked.texts[:captions])
    for file in sorted(true.rglob("*.png"))[pictures:]:
        file.unlink()
    with pytest.raises(BadData, match=words):
        distribution.coco30k(idle(), asked, true, [corners()], tmp_path, side=32)
