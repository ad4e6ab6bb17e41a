"""What several tests need: a recipe small enough to run in a second."""

import hashlib
import io
import json
import os
import resource
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the library that reads it is imported

TINY = """
out = "{out}"
seed = 3
clip = 1.0
precision = "float32"
compile = false
save_every = 5

[data]
source = "scenes"
workers = 0

[scenes]
canvas = "32"

[text]
width = 32
depth = 1
heads = 2
vocabulary = 400
max_tokens = 24

[dit]
patch = 8
bottleneck = 0
width = 32
depth = 2
heads = 2

[flow]
shift = 1.0

[muon]

[sample]
every = 10
steps = 4
prompts = ["a red circle", "a blue square and a green star"]

[[stage]]
resolution = 32
steps = 10
batch = 8
lr = 3e-3
warmup = 2
cooldown = 0.4
"""


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """The text of that recipe, its run folder left open."""
    return TINY


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A recipe file of 10 steps on scenes; its run folder is beside it."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(out=(tmp_path / "run").as_posix()))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of eight captioned pictures, 40 x 30 pixels, each of one colour."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        colour = np.array([30 * number, 255 - 30 * number, 17 * number], dtype=np.uint8)
        Image.fromarray(np.full((30, 40, 3), colour)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"colour number {number}")
    return folder


Rows = Sequence[dict[str, Any]]


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Path]:
    """Writes a prepared dataset, for 64 px and unit 16, and returns its folder.

    A row says what is not usual about a picture: `{"bucket": "32x128", "captions": ["a dog"]}`.
    """

    def write(
        rows: Rows,
        rejected: Rows = (),
        duplicates: Rows = (),
        called: str = "prepared",
        shards: int = 1,
    ) -> Path:
        from datasets import Dataset, Features, List, Value
        from datasets import Image as Encoded

        types = {"id": Value("string"), "image": Encoded()}
        types |= dict.fromkeys(("height", "width"), Value("int32"))
        types |= {"bucket": Value("string"), "captions": List(Value("string"))}
        types |= {"caption_weights": List(Value("float32"))}
        types |= dict.fromkeys(("source", "where", "licence"), Value("string"))
        types |= {"hash": Value("int64")}
        stored = [_stored(number, row) for number, row in enumerate(rows)]
        folder = tmp_path / called
        Dataset.from_list(stored, Features(types)).save_to_disk(str(folder), num_shards=shards)
        for name, lines in (("rejected", rejected), ("duplicates", duplicates)):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{name}.jsonl").write_text(text)
        counts = {
            "read": len(rows) + len(rejected),
            "kept": len(rows),
            "rejected": Counter(row["kind"] for row in rejected),
            "duplicates": sum(len(group["dropped"]) for group in duplicates),
            "captions_lost": 0,
        }
        manifest = {
            "schema": 1,
            "settings": {"resolution": 64, "unit": 16, "max_aspect": 4.0},
            "counts": counts,
            "buckets": Counter(row["bucket"] for row in stored),
            "licences": Counter(row["licence"] for row in stored),
            "files": {path.name: _seal(path) for path in sorted(folder.iterdir())},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return write


def _stored(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """A row of a prepared dataset: a picture of one colour, as large as its bucket."""
    usual: dict[str, Any] = {"bucket": "64x64", "captions": ["a colour"], "licence": "CC0"} | row
    height, width = map(int, usual["bucket"].split("x"))
    size = {"height": height, "width": width} | row
    colour = np.array([37 * number % 256, 255 - 37 * number % 256, 128], dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.full((size["height"], size["width"], 3), colour)).save(file, "PNG")
    return (
        {
            "id": hashlib.sha256(file.getvalue()).hexdigest()[:16],
            "image": {"bytes": file.getvalue(), "path": None},
            "caption_weights": [1.0] * len(usual["captions"]),
            "source": "pictures",
            "where": f"{number}.png",
            "hash": number,
        }
        | size
        | usual
    )


def _seal(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Lets no file grow beyond 4 kB: to whoever writes one, a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def on_ranks() -> Callable[..., str]:
    """Run a file as a script on several processes, as torchrun does; returns what they print."""
    from tests import warm  # a lazy import: most tests start no process

    def run(ranks: int, script: str, *arguments: object) -> str:
        started = warm.ranks(ranks, script, *arguments)
        said = ["".join(process.communicate()) for process in started]
        assert [process.returncode for process in started] == [0] * ranks, "".join(said)
        return "".join(said)

    return run


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny teachers with random weights, by kind: folders, and the two files of LPIPS."""
    from daybreak.model import toy_teachers

    return toy_teachers.make(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of diffusers that is none of ours: Stable Diffusion, tiny, with random weights.

    It draws 16 x 16 pixels unless it is asked for more.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    from daybreak.model import text

    torch.manual_seed(0)
    settings = text.Config(vocabulary=300, max_tokens=16)
    tokenizer = text.learn_tokenizer(["a red circle", "two blue squares"], settings)
    tokenizer.model_max_length = 16
    channels, groups = (8, 16), 4
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=channels,
            norm_num_groups=groups,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
        ),
        vae=AutoencoderKL(
            block_out_channels=channels,
            norm_num_groups=groups,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                vocab_size=len(tokenizer),
                max_position_embeddings=16,
            )
        ),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("foreign") / "stable-diffusion"
    pipeline.save_pretrained(folder)
    return folder
