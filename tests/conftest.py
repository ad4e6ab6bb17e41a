"""What several tests need: a recipe small enough to run in a second."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
