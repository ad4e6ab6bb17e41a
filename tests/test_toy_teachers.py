"""Toy teachers are made from a seed, and a recipe takes them as the command line prints them."""

import shlex
from pathlib import Path

import pytest
import torch

from daybreak import config
from daybreak.failure import BadRecipe, BadStorage
from daybreak.model import toy_teachers, vision
from daybreak.objective import lpips
from tests import warm


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*.safetensors")
    }


def test_they_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        toy_teachers.make(tmp_path / name, seed)
        torch.rand(3)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert len(a) == 3
    assert a == b
    assert not set(a.values()) & set(c.values())
    one, two = (torch.load(tmp_path / name / "vgg16.pth", weights_only=True) for name in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_nearer_picture_is_nearer_for_every_one_of_them(toys: dict[str, Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1
    steps = [truth + level * torch.randn(truth.shape, generator=generator) for level in (0.1, 0.5)]
    vgg = lpips.load(lpips.Config(vgg=str(toys["vgg"]), heads=str(toys["heads"])))
    near, far = (lpips.distance(vgg, picture, truth) for picture in steps)
    assert (near < far).all()
    for kind in ("dinov2", "dinov2_with_registers", "dinov3"):
        teacher = vision.load(str(toys[kind]), "dino.teacher")
        right, near, far = (teacher(picture, 4, 4) for picture in (truth, *steps))
        assert ((near - right).norm(dim=-1).mean(1) < (far - right).norm(dim=-1).mean(1)).all()


def test_the_command_makes_them_and_prints_how_to_use_them(tmp_path: Path, tiny: Path) -> None:
    done = warm.run("-m", "daybreak", "doctor", "--make-toy-teachers", tmp_path / "toys")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[::2] == ["--set"] * 4
    tiny.write_text(tiny.read_text() + "\n[repa]\nblocks = [0]\n[lpips]\n[dino]\n")
    recipe = config.load(tiny, tuple(words[1::2]))
    assert recipe.repa is not None
    assert recipe.dino is not None
    assert recipe.lpips is not None
    assert vision.load(recipe.repa.teacher, "repa.teacher").patch == 16
    assert vision.load(recipe.dino.teacher, "dino.teacher").patch == 14
    assert len(lpips.load(recipe.lpips).heads) == 5


def test_a_place_that_cannot_be_a_folder_is_a_storage_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadStorage, match="cannot make the folder"):
        toy_teachers.make(tmp_path / "file")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "vgg16.pth").write_text("precious")
    with pytest.raises(BadRecipe, match="is not empty"):
        toy_teachers.make(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
