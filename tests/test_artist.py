"""Who draws: ours, a folder of our own export, and pipelines of diffusers that are none of ours."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from daybreak.evaluate import artist
from daybreak.evaluate.artist import Artist, Pictures
from daybreak.failure import BadRecipe
from daybreak.generate import pipeline, sampler
from daybreak.model import dit, flow, text
from daybreak.model.text_to_image import TextToImage, build
from daybreak.train import parallel

PROMPTS = ["a red circle", "a blue square", "", "a green star above a red cross", "two circles"]
HOW = sampler.Config(steps=3, guidance=2.5)
FLOW = flow.Config(shift=1.5)


@pytest.fixture(scope="module")
def model() -> TextToImage:
    settings = text.Config(width=32, depth=1, heads=2, vocabulary=300, max_tokens=24)
    tokenizer = text.learn_tokenizer(PROMPTS, settings)
    size = dit.Config(patch=8, bottleneck=0, width=32, depth=2, heads=2)
    network = build(size, settings, tokenizer)
    generator = torch.Generator().manual_seed(0)
    for weight in network.weights().values():  # zeros would draw nothing but noise
        weight.add_(torch.empty_like(weight).normal_(0, 0.05, generator=generator))
    return network


def drawn(by: Artist, seeds: Sequence[int], side: int = 32) -> Pictures:
    return by.draw(PROMPTS[: len(seeds)], seeds, side, side)


def test_what_is_drawn_for_a_seed_does_not_depend_on_what_is_beside_it(model: TextToImage) -> None:
    by = artist.ours(model, 32, HOW, FLOW)
    together = drawn(by, [5, 6, 7])
    assert together.shape == (3, 32, 32, 3)
    assert together.dtype == np.uint8
    alone = by.draw([PROMPTS[1]], [6], 32, 32)[0].astype(int)
    assert np.abs(alone - together[1]).max() <= 1
    np.testing.assert_array_equal(artist.square(by)(PROMPTS[:3], [5, 6, 7]), together)


def test_an_exported_run_is_drawn_as_the_run_itself(model: TextToImage, tmp_path: Path) -> None:
    card = pipeline.Card("a run", "a circle", "scenes", (), "", ("dino",))
    folder = pipeline.export(model, tmp_path / "pipeline", 32, HOW, FLOW, card)
    exported = artist.pipeline(folder)
    assert (exported.side, exported.facts["pipeline"]) == (32, "GuidedPixelPipeline")
    assert exported.taught == {"dino"}, "who has taught it does not judge it"
    ours = drawn(artist.ours(model, 32, HOW, FLOW), [1, 2, 3]).astype(int)
    assert np.abs(drawn(exported, [1, 2, 3]) - ours).max() <= 1
    fewer = artist.pipeline(folder, steps=1)
    assert np.abs(drawn(fewer, [1, 2, 3]) - ours).max() > 1


def test_a_pipeline_of_another_class_draws(foreign: Path) -> None:
    by = artist.pipeline(foreign, steps=2, guidance=3.0)
    assert (by.side, by.unit) == (16, 16)
    assert by.facts["sampler"] == {
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "class": "DDIMScheduler",
    }
    one, two = drawn(by, [1, 2], 16), drawn(by, [1, 3], 16)
    np.testing.assert_array_equal(one[0], two[0])
    assert (one[1] != two[1]).any()
    assert by.draw(PROMPTS[:1], [1], 24, 32).shape == (1, 24, 32, 3)
    assert artist.pipeline(foreign, side=32, steps=1).side == 32


def test_a_folder_is_known_by_every_byte_of_its_weights_and_by_nothing_else(
    foreign: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(foreign, folder)
    before = artist.pipeline(folder, steps=1).digest
    assert before == artist.pipeline(foreign, steps=1).digest
    (folder / "evaluation" / "reference").mkdir(parents=True)
    save_file({"seen": torch.zeros(1)}, folder / "evaluation" / "reference" / "0.safetensors")
    (folder / "README.md").write_text("written by another version")
    assert artist.pipeline(folder, steps=1).digest == before
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights, {"format": "pt"})
    assert artist.pipeline(folder, steps=1).digest != before


def test_a_pipeline_that_takes_no_prompt_is_refused(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel  # the ranks below draw without

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(BadRecipe, match="DDPMPipeline takes no prompt"):
        artist.pipeline(tmp_path)


def test_code_that_lies_in_the_folder_is_not_run(foreign: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(foreign, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    index = json.loads((folder / artist.INDEX).read_text())
    (folder / artist.INDEX).write_text(json.dumps(index | {"_class_name": ["evil", "Evil"]}))
    with pytest.raises(BadRecipe, match="cannot be loaded"):
        artist.pipeline(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_safetensors_are_refused(foreign: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(foreign, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BadRecipe, match="cannot be loaded"):
        artist.pipeline(folder)


def test_a_size_that_a_pipeline_cannot_draw_is_refused(foreign: Path) -> None:
    by = artist.pipeline(foreign, steps=1)
    for draw in (
        lambda: by.draw(PROMPTS[:1], [0], 17, 17),
        lambda: artist.pipeline(foreign, side=100, steps=1),
    ):
        with pytest.raises(BadRecipe, match=r"cannot draw what is asked \(.* divisible by 8"):
            draw()


@pytest.mark.parametrize(("patch", "side"), [(8, 32), (32, 64)])
def test_an_exported_run_draws_the_sides_that_the_run_draws(
    model: TextToImage, patch: int, side: int, tmp_path: Path
) -> None:
    size = dit.Config(patch=patch, bottleneck=8, width=32, depth=1, heads=2)
    network = build(size, model.text.config, model.text.tokenizer)
    card = pipeline.Card("a run", "a circle", "scenes", (), "")
    exported = artist.pipeline(
        pipeline.export(network, tmp_path / "pipeline", side, HOW, FLOW, card), steps=1
    )
    assert exported.unit == artist.ours(network, side, HOW, FLOW).unit == patch
    assert drawn(exported, [1], side + patch).shape == (1, side + patch, side + patch, 3)


class OneSize:
    """A pipeline that cannot be asked for a size, as some of diffusers."""

    scheduler = object()

    def __call__(self, prompt: str, generator: object, return_dict: bool) -> object:
        return ([Image.new("RGB", (16, 16))],)

    def to(self, device: object) -> "OneSize":
        return self

    def set_progress_bar_config(self, disable: bool) -> None:
        """Has none."""


def test_a_pipeline_of_one_size_is_not_asked_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artist, "_load", lambda folder, dtype: OneSize())
    by = artist.pipeline(tmp_path)
    assert drawn(by, [1, 2], 16).shape == (2, 16, 16, 3)
    with pytest.raises(BadRecipe, match="draws 16 x 16 pixels where 32 x 32 were asked for"):
        drawn(by, [1], 32)
    with pytest.raises(BadRecipe, match="draws one size only; leave --resolution out"):
        artist.pipeline(tmp_path, 32)


def test_two_processes_draw_the_pictures_of_one(on_ranks: Callable[..., str]) -> None:
    """Run below as a script: five pictures on two ranks, which do not divide them."""
    assert on_ranks(2, __file__).count("the same five") == 2


def noise(prompts: Sequence[str], seeds: Sequence[int], height: int, width: int) -> Pictures:
    assert len(prompts) == len(seeds)
    rows = [np.random.default_rng(seed).integers(0, 256, (height, width, 3)) for seed in seeds]
    return np.stack(rows).astype(np.uint8)


if __name__ == "__main__":
    drawn_here: list[int] = []

    def part(prompts: Sequence[str], seeds: Sequence[int], height: int, width: int) -> Pictures:
        drawn_here.extend(seeds)
        return noise(prompts, seeds, height, width)

    with parallel.world(parallel.Config()) as here:
        together = artist.shared(part, here)(PROMPTS, [7, 8, 9, 10, 11], 4, 6)
    assert len(drawn_here) == 3
    np.testing.assert_array_equal(together, noise(PROMPTS, [7, 8, 9, 10, 11], 4, 6))
    sys.stdout.write("the same five\n")
