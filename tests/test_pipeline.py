"""The exported folder is a diffusers pipeline, and it draws what our sampler draws."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from daybreak import config
from daybreak.generate import draw, guidance, pipeline, sampler
from daybreak.model import dit, flow, text
from daybreak.model.text_to_image import TextToImage, build

ROOT = Path(__file__).parents[1]
TEXT = text.Config(width=32, depth=1, heads=2, vocabulary=400, max_tokens=16)
HOW = sampler.Config(steps=6, guidance=3.0)
FLOW = flow.Config(shift=3.0, noise_scale=1.5)
PROMPT = "a red circle & a blue square"
CARD = pipeline.Card("tiny", PROMPT, "scenes", (("steps", "10"),), "seed = 0\n")


@pytest.fixture(params=[0, 12])
def model(request: pytest.FixtureRequest) -> TextToImage:
    """A model none of whose weights is zero."""
    config = dit.Config(patch=8, bottleneck=request.param, width=32, depth=2, heads=2)
    tokenizer = text.learn_tokenizer([PROMPT, "a blue square"] * 20, TEXT)
    model = build(config, TEXT, tokenizer, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.dit.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def exported(model: TextToImage, folder: Path, how: sampler.Config = HOW) -> Path:
    return pipeline.export(model, folder, 32, how, FLOW, CARD)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_diffusers_draws_the_same_picture_from_the_same_noise(
    model: TextToImage, tmp_path: Path, scale: float
) -> None:
    from diffusers import PRXPixelPipeline

    theirs = PRXPixelPipeline.from_pretrained(exported(model, tmp_path / "pipeline"))
    theirs.set_progress_bar_config(disable=True)
    start = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ours = sampler.euler(
        guidance.guided(
            sampler.denoiser(model.dit, model.text, [PROMPT]),
            sampler.denoiser(model.dit, model.text, [""]),
            scale,
        ),
        FLOW.noise_scale * start,
        HOW.steps,
        FLOW.shift,
    )
    drawn = theirs(
        PROMPT,
        height=32,
        width=32,
        timesteps=pipeline.timesteps(HOW.steps, FLOW.shift),
        guidance_scale=scale,
        use_resolution_binning=False,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert (drawn - ours).abs().max() < 1e-4 * ours.abs().max().clamp(min=1)


def test_the_cards_snippet_runs_and_its_times_are_ours(
    model: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(model, tmp_path / "pipeline")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    code = card.split("```python\n")[1].split("```")[0]
    script = tmp_path / "snippet.py"
    script.write_text(code.replace("PATH_OF_THIS_FOLDER", folder.as_posix()))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))
    assert (tmp_path / "picture.png").is_file()
    for shift in (1.0, 3.0, 0.6):
        expression = pipeline.snippet("x", "y", 32, HOW, shift).split("timesteps=")[1]
        times = runpy_value(expression.split(",\n")[0], tmp_path)
        np.testing.assert_allclose(times, pipeline.timesteps(HOW.steps, shift), rtol=1e-6)


def test_the_readmes_snippet_is_the_quickstarts_and_runs(
    model: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = config.load("quickstart")
    shift = recipe.flow.shift if recipe.sample.shift is None else recipe.sample.shift
    prompt = "a red circle above a blue square"
    code = pipeline.snippet("runs/quickstart/pipeline", prompt, 32, recipe.sample, shift)
    assert f"```python\n{code}```" in (ROOT / "README.md").read_text()
    exported(model, tmp_path / "runs" / "quickstart" / "pipeline")
    (tmp_path / "snippet.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("snippet.py")
    assert (tmp_path / "picture.png").is_file()


def runpy_value(expression: str, folder: Path) -> list[float]:
    """The value of one Python expression."""
    (folder / "value.py").write_text(f"value = {expression}\n")
    value: list[float] = runpy.run_path(str(folder / "value.py"))["value"]
    return value


def test_the_folder_names_what_every_reader_knows(model: TextToImage, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["noise_scale"] == 1.5
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    described = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".md", ".safetensors"}


def test_exporting_again_replaces_the_folder(model: TextToImage, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "pipeline")
    (folder / "stale").write_text("x")
    exported(model, folder)
    assert not (folder / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_a_picture_does_not_depend_on_what_is_drawn_with_it(model: TextToImage) -> None:
    prompts = [PROMPT, "a blue square", PROMPT]
    together = draw.draw(model, prompts, [1, 2, 3], 32, 32, HOW, FLOW)
    alone = draw.draw(model, prompts[1:2], [2], 32, 32, HOW, FLOW)
    assert np.abs(together[1].astype(int) - alone[0].astype(int)).max() <= 1
    assert not np.array_equal(together[0], together[2])


def test_guidance_of_one_is_the_strong_denoiser_and_an_interval_confines_it() -> None:
    strong = lambda x_t, t: torch.ones(1)
    weak = lambda x_t, t: torch.zeros(1)
    assert guidance.guided(strong, weak, 1.0)(torch.zeros(1), 0.5) == 1
    assert guidance.guided(strong, weak, 3.0)(torch.zeros(1), 0.5) == 3
    confined = guidance.guided(strong, weak, 3.0, (0.2, 0.8))
    assert [float(confined(torch.zeros(1), t)) for t in (0.1, 0.2, 0.8, 0.9)] == [1, 3, 3, 1]


def test_pixels_are_rounded_and_clipped() -> None:
    image = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert draw.to_bytes(image)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
