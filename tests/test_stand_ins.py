"""Random networks of the size of those that are not here."""

from pathlib import Path

import pytest
import torch

from daybreak import config
from daybreak.model import text, vision
from daybreak.objective import lpips
from daybreak.train import measure, networks, stand_ins


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_stand_in_has_as_many_weights_as_the_table_says(name: str) -> None:
    with torch.device("meta"):
        built = stand_ins.build(name)
    count = sum(weight.numel() for weight in built.parameters())
    # The table leaves vectors and learned places out: 2.8 % of the smallest.
    assert count == pytest.approx(networks.NETWORKS[name].weights, rel=0.03)


def test_stand_ins_are_read_like_the_networks_whose_place_they_take(tmp_path: Path) -> None:
    said: list[str] = []
    recipe = config.load(
        "prx_24h",
        (
            "text.encoder=google/flan-t5-small",
            "repa.teacher=facebook/dinov3-vits16-pretrain-lvd1689m",
            "dino.teacher=facebook/dinov2-small",
        ),
    )
    found = stand_ins.replaced(recipe, tmp_path, said.append)
    assert len(said) == 4
    words = text.pretrained(found.text)(["a red circle"])
    assert words.tokens.shape[-1] == 512
    assert words.tokens.isfinite().all()
    assert found.repa is not None
    assert found.dino is not None
    assert found.lpips is not None
    for source, key, width in (
        (found.repa.teacher, "repa.teacher", 384),
        (found.dino.teacher, "dino.teacher", 384),
    ):
        seen = vision.load(source, key)(torch.rand(1, 3, 32, 32), 2, 2)
        assert seen.shape == (1, 4, width)
        assert seen.isfinite().all()
        assert seen.std() > 0
    assert lpips.load(found.lpips).depths[-1][-1][0].shape == (512, 512, 3, 3)
    assert stand_ins.replaced(found, tmp_path / "again", said.append) == found, "now they are here"
    assert len(said) == 4


def test_what_is_measured_needs_none_of_the_networks(tmp_path: Path) -> None:
    recipe = config.load("quickstart", ("text.encoder=google/flan-t5-small",))
    short = measure.shortened(recipe, 1, tmp_path)
    assert Path(short.text.encoder or "").is_dir()
