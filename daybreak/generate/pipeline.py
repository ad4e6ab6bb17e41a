"""Export: a trained model as a folder that `diffusers` loads without daybreak.

    pipeline/   model_index.json, transformer/, scheduler/, text_encoder/, tokenizer/, README.md,
                pipeline.py

The denoiser's weights already have diffusers' names, so nothing is renamed. `PRXPixelPipeline`
draws the same picture as our sampler only with the right values of three settings, so the export
writes them:

  - `noise_scale`, whose default in the pipeline is 2.0;
  - a scheduler with `shift = 1`, and in the model card the `timesteps` of our grid, because the
    scheduler's own shift leads to a different grid from that of training;
  - `use_resolution_binning=False` in the card, because binning supports only 1024 px.

If the recipe samples stochastically, so does the scheduler, with noise from torch's global
generator, because `PRXPixelPipeline` does not pass its own on. So the card seeds the global one.

What that class lacks (self-guidance, an interval, projected guidance) is in pipeline.py, a custom
diffusers pipeline that is exported too. The recipe's sampling settings are in the scheduler's
configuration under a private key, which schedulers keep and ignore.

Source  diffusers 0.42: `PRXPixelPipeline`, `FlowMatchEulerDiscreteScheduler`.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file

from daybreak.data import disk
from daybreak.failure import BadRecipe, BadStorage
from daybreak.generate import sampler
from daybreak.model import dit, flow, hub, tread
from daybreak.model.text_to_image import TextToImage
from daybreak.train import dice


class Card(NamedTuple):
    """The contents of the model card."""

    name: str
    prompt: str
    data: str
    facts: tuple[tuple[str, str], ...]  # rows of the card's table
    recipe: str  # the resolved recipe, TOML
    taught: tuple[str, ...] = ()  # families of its teachers, which should not evaluate it


def export(
    model: TextToImage,
    folder: Path,
    resolution: int,
    how: sampler.Config,
    flow_config: flow.Config,
    card: Card,
    route: tread.Config | None = None,
) -> Path:
    """Write the pipeline folder atomically. An earlier export is replaced, but files that others
    have added to it, such as the scores of `daybreak evaluate`, are kept.

    Errors  BadStorage if the disk fails; BadRecipe if diffusers has no class for the network, or if
            `folder` holds anything but an export.
    """
    if folder.exists() and not _replaceable(folder):
        raise BadRecipe(
            f"{folder} holds files that are not of an exported pipeline and would be lost: "
            "choose a new or empty folder with --out"
        )
    if model.dit.fuse is not None:
        raise BadRecipe(
            'a run with tread.kind = "sprint" cannot be exported, as no diffusers class has its '
            'extra layer: train with kind = "tread" to export'
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".tmp-{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
        ) as place:
            staged = Path(place)
            _fill(staged, model, resolution, how, flow_config, card, route)
            staged.chmod(0o755)
            old = disk.swap(staged, folder)
        for other in list(old.iterdir()) if old.exists() else ():  # keep files of others
            if not (folder / other.name).exists():
                other.rename(folder / other.name)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise BadStorage(f"cannot write {folder}: {error.strerror or error}") from error
    except SafetensorError as error:  # safetensors raises it instead of OSError
        raise BadStorage(f"cannot write {folder}: {error}") from error
    return folder


def _replaceable(folder: Path) -> bool:
    """Whether a path is an empty folder or one that `export` has written."""
    if not folder.is_dir():
        return False
    written = {"model_index.json", "pipeline.py", "transformer"}
    return not any(folder.iterdir()) or all((folder / name).exists() for name in written)


def _fill(
    folder: Path,
    model: TextToImage,
    resolution: int,
    how: sampler.Config,
    flow_config: flow.Config,
    card: Card,
    route: tread.Config | None,
) -> None:
    """Write all files of a pipeline folder into an empty folder."""
    _transformer(model.dit, folder / "transformer")
    plain = how.stochastic and flow_config.noise_scale == 1  # the scheduler's noise has scale 1
    private = {"_sampling": sampling(how, flow_config, route), "_taught": list(card.taught)}
    _scheduler(folder / "scheduler", plain, private)
    shutil.copyfile(Path(__file__).with_name("custom_pipeline.py"), folder / "pipeline.py")
    encoder: Any = model.text.encoder
    with hub.without_bars():
        encoder.save_pretrained(folder / "text_encoder")
    model.text.tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer_class = _portable(folder / "tokenizer" / "tokenizer_config.json")
    _write(
        folder / "model_index.json",
        {
            "_class_name": "PRXPixelPipeline",
            "_diffusers_version": "0.39.0",
            "default_sample_size": resolution,
            "noise_scale": flow_config.noise_scale,
            "prompt_max_tokens": model.text.config.max_tokens,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", type(encoder).__name__],
            "tokenizer": ["transformers", tokenizer_class],
            "transformer": ["diffusers", "PRXTransformer2DModel"],
        },
    )
    size = sampler.size(how, resolution, model.dit.config.patch)
    (folder / "README.md").write_text(_card(card, size, how, flow_config), encoding="utf-8")


def sampling(
    how: sampler.Config, flow_config: flow.Config, route: tread.Config | None
) -> dict[str, Any]:
    """Return the settings of pipeline.py (its `Sampling`), ready for JSON."""
    place = route if route is not None and route.kind == "tread" else None
    return {
        "steps": how.steps,
        "stochastic": how.stochastic,
        "shift": sampler.shift(how, flow_config),
        "guide": how.guide,
        "guidance": how.guidance,
        "interval": how.interval,
        "apg": how.apg and how.apg.model_dump(),
        "route": place and place.model_dump(include={"start", "stop", "carried"}),
    }


def _transformer(model: dit.DiT, folder: Path) -> None:
    """Write configuration and weights of `PRXTransformer2DModel`."""
    config = model.config
    folder.mkdir()
    _write(
        folder / "config.json",
        {
            "_class_name": "PRXTransformer2DModel",
            "_diffusers_version": "0.39.0",
            "in_channels": model.channels,
            "patch_size": config.patch,
            "context_in_dim": model.text_width,
            "hidden_size": config.width,
            "mlp_ratio": config.mlp,
            "num_heads": config.heads,
            "depth": config.depth,
            "axes_dim": [config.head_width // 2] * 2,
            "theta": int(dit.ROPE_BASE),
            "time_factor": 1000.0,
            "time_max_period": 10_000,
            "bottleneck_size": config.bottleneck or None,
            "resolution_embeds": config.resolution,
        },
    )
    save_file(
        {name: weight.detach().float().cpu() for name, weight in model.state_dict().items()},
        folder / "diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )


def _scheduler(folder: Path, stochastic: bool, private: dict[str, Any]) -> None:
    """Write a scheduler that does not shift the given timesteps; `private` keys are added to it."""
    folder.mkdir()
    _write(
        folder / "scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": "0.39.0",
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "stochastic_sampling": stochastic,
            **private,
        },
    )


def _portable(path: Path) -> str:
    """Set the tokenizer's class name to one that transformers 4 also has; returns the name."""
    described = json.loads(path.read_text(encoding="utf-8"))
    if described.get("tokenizer_class") == "TokenizersBackend":
        described["tokenizer_class"] = "PreTrainedTokenizerFast"
        _write(path, described)
    return str(described["tokenizer_class"])


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def snippet(
    source: str, prompt: str, size: tuple[int, int], how: sampler.Config, shift: float
) -> str:
    """Return Python code that draws `prompt` at `size` (height, width) from the folder `source`."""
    height, width = size
    u = f"[1 - i / {how.steps} for i in range({how.steps})]"
    times = f"[1000 * u for u in {u}]"
    if shift != 1:
        times = f"[1000 * {shift:g} * u / (1 + {shift - 1:g} * u) for u in {u}]"
    return f'''import torch
from diffusers import PRXPixelPipeline

pipeline = PRXPixelPipeline.from_pretrained("{source}")
torch.manual_seed(0)
image = pipeline(
    {json.dumps(prompt, ensure_ascii=False)},
    height={height},
    width={width},
    timesteps={times},
    guidance_scale={how.guidance:g},
    use_resolution_binning=False,
).images[0]
image.save("picture.png")
'''


def custom_snippet(source: str, prompt: str, size: tuple[int, int]) -> str:
    """Return Python code that draws `prompt` with the folder's own pipeline.py."""
    height, width = size
    asked = "" if height == width else f"height={height}, width={width}, "
    return f'''import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(
    "{source}", custom_pipeline="pipeline", trust_remote_code=True
)
generator = torch.Generator().manual_seed({dice.key(0, 0, 0)})
image = pipeline({json.dumps(prompt, ensure_ascii=False)}, {asked}generator=generator).images[0]
image.save("picture.png")
'''


def _card(card: Card, size: tuple[int, int], how: sampler.Config, flow_config: flow.Config) -> str:
    """Return the model card: front matter, a snippet that runs, facts, recipe."""
    shift = sampler.shift(how, flow_config)
    custom = custom_snippet("PATH_OF_THIS_FOLDER", card.prompt, size)
    rows = "\n".join(f"| {name} | {value} |" for name, value in card.facts)
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, diffusers, prx, pixel-space, flow-matching, daybreak]
widget:
- text: {json.dumps(card.prompt, ensure_ascii=False)}
---
# {card.name}

A text-to-image model in pixel space, trained from random weights by daybreak on `{card.data}`.

```python
{snippet("PATH_OF_THIS_FOLDER", card.prompt, size, how, shift)}```

One prompt per call: `PRXPixelPipeline` mixes up the time of several prompts under guidance.
`timesteps` is the grid the model was tuned for; the scheduler's own is another. What the recipe
says of sampling beyond that (self-guidance, an interval, projected guidance) needs `pipeline.py`,
which lies in this folder and knows the settings. This is the picture of `daybreak sample --seed 0`:

```python
{custom}```

| | |
|---|---|
{rows}

Limits: the model knows what its data shows and nothing else. Licence: none is stated here; that of
the pictures it was trained on decides, and that of the text encoder in this folder, if it was not
trained along.

## Recipe

```toml
{card.recipe}```
"""
