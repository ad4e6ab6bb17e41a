"""The exported folder is a diffusers pipeline, and it draws what our sampler draws."""

import ast
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from daybreak import config
from daybreak.failure import BadRecipe, BadStorage
from daybreak.generate import draw, guidance, pipeline, sampler
from daybreak.model import dit, flow, text, tread
from daybreak.model.text_to_image import TextToImage, build
from daybreak.train import dice

ROOT = Path(__file__).parents[1]
TEXT = text.Config(width=32, depth=1, heads=2, vocabulary=400, max_tokens=16)
HOW = sampler.Config(steps=6, guidance=3.0)
FLOW = flow.Config(shift=3.0, noise_scale=1.5)
PROMPT = "a red circle & a blue square"
ROUTE = tread.Config(start=1, stop=2, carried=0.5)
CARD = pipeline.Card("tiny", PROMPT, "scenes", (("steps", "10"),), "seed = 0\n")


@pytest.fixture(params=[0, 12])
def model(request: pytest.FixtureRequest) -> TextToImage:
    """A model none of whose weights is zero."""
    config = dit.Config(
        patch=8,
        bottleneck=request.param,
        width=32,
        depth=3,
        heads=2,
        resolution=bool(request.param),
    )
    tokenizer = text.learn_tokenizer([PROMPT, "a blue square"] * 20, TEXT)
    model = build(config, TEXT, tokenizer, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.dit.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def exported(
    model: TextToImage, folder: Path, how: sampler.Config = HOW, flow_: flow.Config = FLOW
) -> Path:
    return pipeline.export(model, folder, 32, how, flow_, CARD, ROUTE)


def timesteps(steps: int, shift: float) -> list[float]:
    """Our time grid in the unit of diffusers' schedulers, without the final zero."""
    return [1000 * t for t in sampler.times(steps, shift)[:-1]]


def apart(
    model: TextToImage,
    folder: Path,
    scale: float,
    how: sampler.Config = HOW,
    flow_: flow.Config = FLOW,
) -> float:
    """How far diffusers' picture is from ours, for the same noise; 1 is the size of a pixel."""
    from diffusers import PRXPixelPipeline

    theirs = PRXPixelPipeline.from_pretrained(exported(model, folder, how, flow_))
    theirs.set_progress_bar_config(disable=True)
    start = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)  # of the noise that a stochastic scheduler draws
    both = sampler.in_one(sampler.denoiser(model.dit, model.text([PROMPT, ""])))
    strong = sampler.denoiser(model.dit, model.text([PROMPT]))
    ours = sampler.euler(
        guidance.guided(strong, both, scale),
        flow_.noise_scale * start,
        how.steps,
        flow_.shift,
        (lambda: torch.randn(start.shape)) if how.stochastic else None,
    )
    torch.manual_seed(1)
    drawn = theirs(
        PROMPT,
        height=32,
        width=32,
        timesteps=timesteps(how.steps, flow_.shift),
        guidance_scale=scale,
        use_resolution_binning=False,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    return float((drawn - ours).abs().max() / ours.abs().max().clamp(min=1))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_diffusers_draws_the_same_picture_from_the_same_noise(
    model: TextToImage, tmp_path: Path, scale: float
) -> None:
    assert apart(model, tmp_path / "pipeline", scale) < 1e-4


def test_its_own_class_draws_stochastically_too(model: TextToImage, tmp_path: Path) -> None:
    how = sampler.Config(steps=6, stochastic=True)
    assert apart(model, tmp_path / "pipeline", 3.0, how, flow.Config(shift=3.0)) < 1e-4


@pytest.mark.parametrize(
    "how",
    [
        HOW,
        sampler.Config(steps=5, guidance=4.0, guide="self", interval=(0.3, 0.95)),
        sampler.Config(steps=5, guidance=4.0, guide="self", shift=1.5, apg=sampler.Apg(norm=0.02)),
        sampler.Config(steps=5, guidance=4.0, apg=sampler.Apg(eta=0.5, momentum=-0.7)),
        sampler.Config(steps=5, guidance=1.0),
        sampler.Config(steps=5, guidance=4.0, guide="self", stochastic=True),
    ],
    ids=["classifier-free", "self, interval", "self, projected", "projected", "none", "stochastic"],
)
def test_the_folders_own_pipeline_draws_as_the_recipe_says(
    model: TextToImage, tmp_path: Path, how: sampler.Config
) -> None:
    from diffusers import DiffusionPipeline

    folder = exported(model, tmp_path / "pipeline", how)
    theirs = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline="pipeline", trust_remote_code=True
    )
    theirs.set_progress_bar_config(disable=True)
    prompts, seeds = [PROMPT, "a blue square"], [0, 7]
    ours = draw.draw(model, prompts, seeds, 24, 40, how, FLOW, ROUTE)
    generators = [torch.Generator().manual_seed(dice.key(seed, 0, 0)) for seed in seeds]
    drawn = theirs(prompts, height=24, width=40, generator=generators).images
    assert np.abs(np.stack(drawn).astype(int) - ours.astype(int)).max() <= 1


def test_two_exported_folders_keep_their_own_settings(model: TextToImage, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    loaded: list[Any] = []
    for steps in (3, 4):
        folder = exported(model, tmp_path / str(steps), sampler.Config(steps=steps))
        pipe = DiffusionPipeline.from_pretrained(
            folder, custom_pipeline="pipeline", trust_remote_code=True
        )
        pipe.set_progress_bar_config(disable=True)
        loaded.append(pipe)
    start = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, second = (pipe(PROMPT, latents=start, output_type="pt").images for pipe in loaded)
    assert not torch.equal(first, second)
    asked = loaded[0](PROMPT, num_inference_steps=4, latents=start, output_type="pt").images
    assert torch.equal(asked, second)
    with pytest.raises(ValueError, match="neither"):
        loaded[0](PROMPT, guide="other")


def test_the_plain_class_loads_the_folder_without_a_complaint(
    model: TextToImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import diffusers

    folder = exported(model, tmp_path / "pipeline")
    diffusers.utils.logging.enable_propagation()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
        assert type(pipe) is diffusers.PRXPixelPipeline
        assert "will be ignored" not in caplog.text
        index = folder / "model_index.json"
        index.write_text(index.read_text().replace("{", '{"stray": 1,', 1))
        diffusers.DiffusionPipeline.from_pretrained(folder)
        assert "will be ignored" in caplog.text  # that is how it would complain
    finally:
        diffusers.utils.logging.disable_propagation()


def test_a_fused_network_is_not_exported(tmp_path: Path) -> None:
    fused = tread.Config(kind="sprint", start=1, stop=2)
    size = dit.Config(patch=8, bottleneck=0, width=32, depth=3, heads=2)
    tokenizer = text.learn_tokenizer([PROMPT] * 20, TEXT)
    model = build(size, TEXT, tokenizer, route=fused)
    with pytest.raises(BadRecipe, match="no diffusers class"):
        exported(model, tmp_path / "pipeline")
    assert list(tmp_path.iterdir()) == []


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
    custom = card.split("```python\n")[2].split("```")[0]
    script.write_text(custom.replace("PATH_OF_THIS_FOLDER", folder.as_posix()))
    runpy.run_path(str(script))
    with Image.open(tmp_path / "picture.png") as picture:
        ours = draw.draw(model, [PROMPT], [0], 32, 32, HOW, FLOW, ROUTE)[0]
        assert np.abs(np.asarray(picture).astype(int) - ours.astype(int)).max() <= 1
    for shift in (1.0, 3.0, 0.6):
        expression = pipeline.snippet("x", "y", (32, 32), HOW, shift).split("timesteps=")[1]
        times = runpy_value(expression.split(",\n")[0], tmp_path)
        np.testing.assert_allclose(times, timesteps(HOW.steps, shift), rtol=1e-6)


def test_the_readmes_snippet_is_the_quickstarts_and_runs(
    model: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = config.load("quickstart")
    shift = recipe.flow.shift if recipe.sample.shift is None else recipe.sample.shift
    prompt = "a red circle above a blue square"
    code = pipeline.snippet("runs/quickstart/pipeline", prompt, (32, 32), recipe.sample, shift)
    assert f"```python\n{code}```" in (ROOT / "README.md").read_text()
    exported(model, tmp_path / "runs" / "quickstart" / "pipeline", recipe.sample)
    (tmp_path / "snippet.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    drawn = []
    for _ in range(2):
        runpy.run_path("snippet.py")
        drawn.append((tmp_path / "picture.png").read_bytes())
    assert recipe.sample.stochastic
    assert drawn[0] == drawn[1]


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
    assert suffixes == {".json", ".md", ".safetensors", ".py"}


def test_exporting_again_replaces_the_folder(model: TextToImage, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "pipeline")
    (folder / "transformer" / "stale").write_text("x")
    (folder / "notes.txt").write_text("mine")
    exported(model, folder)
    assert not (folder / "transformer" / "stale").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_nothing_but_an_exported_folder_is_replaced(model: TextToImage, tmp_path: Path) -> None:
    thesis = tmp_path / "mine" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    for place in (thesis.parent, thesis):
        with pytest.raises(BadRecipe, match="files that are not of an exported pipeline"):
            exported(model, place)
    assert thesis.read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert (exported(model, tmp_path / "empty") / "model_index.json").is_file()


def test_a_picture_does_not_depend_on_what_is_drawn_with_it(model: TextToImage) -> None:
    prompts = [PROMPT, "a blue square", PROMPT]
    together = draw.draw(model, prompts, [1, 2, 3], 32, 32, HOW, FLOW)
    for alone in (
        draw.draw(model, prompts[1:2], [2], 32, 32, HOW, FLOW)[0],
        draw.draw(model, prompts, [1, 2, 3], 32, 32, HOW, FLOW, batch=1)[1],
    ):
        assert np.abs(together[1].astype(int) - alone.astype(int)).max() <= 1
    assert not np.array_equal(together[0], together[2])


def test_pixels_are_rounded_and_clipped() -> None:
    image = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert draw.to_bytes(image)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
    rough = torch.linspace(-1, 1, 400).view(1, 1, 1, 400).bfloat16()
    assert np.array_equal(draw.to_bytes(rough), draw.to_bytes(rough.float())), "rounded once"


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3]])
def test_every_prompt_has_its_seed(model: TextToImage, seeds: list[int]) -> None:
    how = sampler.Config(steps=1, guidance=1.0)
    with pytest.raises(ValueError, match=rf"2 prompts, {len(seeds)} seeds"):
        draw.draw(model, [PROMPT, "a blue square"], seeds, 32, 32, how, FLOW)


@pytest.mark.parametrize("kind", ["t5gemma", "qwen3_vl"])
def test_a_frozen_encoder_travels_with_its_template_and_the_layers_it_has_left(
    tmp_path: Path, kind: str
) -> None:
    import transformers

    size = {"vocab_size": 400, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3}
    size |= {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
    torch.manual_seed(0)
    if kind == "t5gemma":
        half = size | {"query_pre_attn_scalar": 8}
        published: Any = transformers.T5GemmaForConditionalGeneration(
            transformers.T5GemmaConfig(encoder=half, decoder=half, vocab_size=400)
        )
    else:
        turns = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        published = transformers.Qwen3VLForConditionalGeneration(
            transformers.Qwen3VLConfig(
                text_config=size | {"rope_parameters": turns},
                vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16},
            )
        )
    published.save_pretrained(tmp_path / "published")
    text.learn_tokenizer([PROMPT] * 20, TEXT).save_pretrained(tmp_path / "published")
    words = text.Config(
        encoder=str(tmp_path / "published"), max_tokens=32, template="a blue {} circle", skip=1
    )
    model = build(dit.Config(patch=8, bottleneck=0, width=32, depth=3, heads=2), words)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.dit.parameters():
            parameter.normal_(std=0.1, generator=generator)

    assert apart(model, tmp_path / "pipeline", HOW.guidance) < 1e-4


def its_own(model: TextToImage, folder: Path, how: sampler.Config) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        exported(model, folder, how), custom_pipeline="pipeline", trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


USUAL = sampler.Config(
    steps=5,
    guidance=4.0,
    stochastic=True,
    guide="self",
    apg=sampler.Apg(eta=0.0, momentum=-0.7, norm=0.002),
)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({}, {}),
        ({"stochastic": False}, {"stochastic": False}),
        (
            {"apg": {"norm": None}, "stochastic": False},
            {"apg": sampler.Apg(momentum=-0.7), "stochastic": False},
        ),
        ({"guidance_scale": 1.0}, {"guidance": 1.0}),
        ({"interval": (0.0, 0.0)}, {"interval": (0.0, 0.0)}),
    ],
)
def test_what_a_call_says_stands_in_for_the_recipe_and_nothing_else(
    model: TextToImage, tmp_path: Path, said: dict[str, Any], meant: dict[str, Any]
) -> None:
    pipe = its_own(model, tmp_path / "pipeline", USUAL)
    generator = torch.Generator().manual_seed(dice.key(4, 0, 0))
    drawn = pipe(PROMPT, height=24, width=40, generator=generator, **said).images[0]
    how = USUAL.model_copy(update=meant)
    ours = draw.draw(model, [PROMPT], [4], 24, 40, how, FLOW, ROUTE)[0]
    assert np.abs(np.asarray(drawn).astype(int) - ours.astype(int)).max() <= 1


def dice_noise(seed: int) -> torch.Tensor:
    return dice.Dice(seed, 0, 0, 1).normal(3, 32, 32)


def test_below_the_least_time_it_divides_by_that_one_too(
    model: TextToImage, tmp_path: Path
) -> None:
    how = sampler.Config(steps=30, guidance=1.0, shift=1.0)
    assert 0 < sampler.times(30, 1.0)[-2] < flow.T_MIN
    pipe = its_own(model, tmp_path / "pipeline", how)
    generator = torch.Generator().manual_seed(dice.key(4, 0, 0))
    drawn = pipe(PROMPT, generator=generator, output_type="pt").images
    start = FLOW.noise_scale * dice_noise(4)
    ours = sampler.euler(sampler.denoiser(model.dit, model.text([PROMPT])), start, 30, 1.0)
    torch.testing.assert_close(drawn, ours, atol=1e-4, rtol=1e-4)


def test_a_negative_prompt_is_what_it_is_guided_away_from(
    model: TextToImage, tmp_path: Path
) -> None:
    how = sampler.Config(steps=4, guidance=3.0)
    pipe = its_own(model, tmp_path / "pipeline", how)
    generator = torch.Generator().manual_seed(dice.key(4, 0, 0))
    drawn = pipe(
        PROMPT, negative_prompt="a blue square", generator=generator, output_type="pt"
    ).images
    strong = sampler.denoiser(model.dit, model.text([PROMPT]))
    weak = sampler.denoiser(model.dit, model.text(["a blue square"]))
    denoise = guidance.guided(strong, sampler.in_turn(strong, weak), 3.0)
    ours = sampler.euler(denoise, FLOW.noise_scale * dice_noise(4), 4, FLOW.shift)
    torch.testing.assert_close(drawn, ours, atol=1e-3, rtol=1e-3)


def test_sides_that_patches_do_not_fill_are_refused(model: TextToImage, tmp_path: Path) -> None:
    pipe = its_own(model, tmp_path / "pipeline", sampler.Config(steps=1))
    with pytest.raises(ValueError, match="30"):
        pipe(PROMPT, height=30, width=32)


def test_pictures_do_not_depend_on_how_many_are_drawn_at_once(model: TextToImage) -> None:
    how, heard = sampler.Config(steps=2, stochastic=True, guide="self"), list[int]()
    args = ([PROMPT, "a blue square", ""], [5, 6, 7], 24, 32, how, FLOW, ROUTE)
    whole, parts = draw.draw(model, *args), draw.draw(model, *args, 2, heard.append)
    assert np.abs(whole.astype(int) - parts).max() <= 1
    assert heard == [2, 1]


def test_the_folder_says_what_the_plain_class_has_to_know(
    model: TextToImage, tmp_path: Path
) -> None:
    import json

    how = sampler.Config(steps=3, stochastic=True, shift=1.5)
    folder = exported(model, tmp_path / "pipeline", how)  # FLOW's noise is 1.5 times as loud
    index = json.loads((folder / "model_index.json").read_text())
    assert index["prompt_max_tokens"] == TEXT.max_tokens
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["stochastic_sampling"] is False
    assert "[1000 * 1.5 * u / (1 + 0.5 * u) for u in" in (folder / "README.md").read_text()


def test_an_mlp_of_another_width_is_exported_too(tmp_path: Path) -> None:
    from diffusers import PRXTransformer2DModel

    config = dit.Config(patch=8, bottleneck=0, width=32, depth=1, heads=2, mlp=2.0)
    model = build(config, TEXT, text.learn_tokenizer([PROMPT] * 20, TEXT))
    folder = exported(model, tmp_path / "pipeline")
    theirs = PRXTransformer2DModel.from_pretrained(folder / "transformer")
    assert theirs.blocks[0].gate_proj.weight.shape == (64, 32)


def test_others_may_read_what_was_exported(model: TextToImage, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "pipeline")
    assert folder.stat().st_mode & 0o777 == 0o755


def test_an_export_that_fails_leaves_nothing_and_keeps_what_was_there(
    model: TextToImage, tmp_path: Path
) -> None:
    card = CARD._replace(data="\udcff")  # no text that could be written
    with pytest.raises(UnicodeEncodeError):
        pipeline.export(model, tmp_path / "pipeline", 32, HOW, FLOW, card)
    assert list(tmp_path.iterdir()) == []
    folder = exported(model, tmp_path / "pipeline")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(UnicodeEncodeError):
        pipeline.export(model, folder, 64, HOW, FLOW, card)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_place_that_holds_no_folder_is_a_storage_failure(
    model: TextToImage, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadStorage, match="cannot write"):
        exported(model, tmp_path / "file" / "pipeline")


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_a_storage_failure(model: TextToImage, tmp_path: Path) -> None:
    with pytest.raises(BadStorage, match=r"cannot write.*File too large"):
        exported(model, tmp_path / "pipeline")
    assert list(tmp_path.iterdir()) == []


def test_another_pipeline_of_diffusers_is_not_replaced(model: TextToImage, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "unet").mkdir(parents=True)
    for name in ("model_index.json", "pipeline.py"):
        (theirs / name).write_text("theirs")
    with pytest.raises(BadRecipe, match="files that are not of an exported pipeline"):
        exported(model, theirs)
    assert (theirs / "model_index.json").read_text() == "theirs"


def test_a_prompt_of_any_signs_is_quoted_in_code_and_card(
    model: TextToImage, tmp_path: Path
) -> None:
    prompt = 'a "red": circle\n\\ ünd'
    for code in (
        pipeline.snippet("x", prompt, (64, 96), HOW, 1.0),
        pipeline.custom_snippet("x", prompt, (64, 96)),
    ):
        said = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        assert prompt in said
    assert "height=64,\n    width=96,\n" in pipeline.snippet("x", prompt, (64, 96), HOW, 1.0)
    assert ", height=64, width=96, generator" in pipeline.custom_snippet("x", prompt, (64, 96))
    card = CARD._replace(prompt=prompt)
    folder = pipeline.export(model, tmp_path / "pipeline", 32, HOW, FLOW, card)
    front = (folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert f"- text: {json.dumps(prompt, ensure_ascii=False)}\n" in front
