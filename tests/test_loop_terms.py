"""Training with every term: the log adds up, projectors are kept, teachers are not."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore  # type: ignore[attr-defined]

from daybreak import config
from daybreak.failure import BadRecipe
from daybreak.train import accelerator, building, checkpoint, health, loop, parallel
from daybreak.train.dice import Dice
from tests import warm

TERMS = """
[tread]
start = 0
stop = 1

[repa]
teacher = "{dinov3}"
blocks = [0, 1]

[lpips]
vgg = "{vgg}"
heads = "{heads}"
fraction = 0.5

[dino]
teacher = "{dinov2}"
below = 0.9

[contrastive]

[[stage]]
resolution = 32
steps = 4
batch = 8
lr = 1e-3
without = ["repa", "tread"]
"""
WEIGHTS = {"flow": 1.0, "repa": 0.5, "lpips": 0.1, "dino": 0.01, "contrastive": 0.05}


@pytest.fixture
def full(tiny: Path, toys: dict[str, Path]) -> Path:
    """The tiny recipe with all terms; the second of its two stages does without REPA."""
    torch.set_num_threads(1)
    tiny.write_text(tiny.read_text().replace("steps = 10", "steps = 6") + TERMS.format(**toys))
    return tiny


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def hashes(run: Path) -> dict[str, str]:
    found = checkpoint.required(run, print)
    files = json.loads((found.folder / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith("safetensors")}


def test_the_loss_of_a_step_is_the_weighted_sum_in_the_log(full: Path) -> None:
    recipe = config.load(full, ("micro=4",))
    loop.train(recipe, lambda line: None)
    lines = log(Path(recipe.out))
    assert len(lines) == 10
    for line in lines:
        parts = {name: line[name] for name in WEIGHTS if name in line}
        assert ("repa" in parts) == (line["step"] <= 6)
        assert len(parts) >= 4
        total = sum(WEIGHTS[name] * value for name, value in parts.items())
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert line["lpips"] > 0
        assert 0 < line["dino"] < 2


def test_projectors_are_saved_and_rest_with_their_term_and_teachers_are_never_saved(
    full: Path,
) -> None:
    recipe = config.load(full, ("save_every=6",))
    loop.train(recipe, lambda line: None)
    run = Path(recipe.out)
    middle, end = (
        load_file(run / f"checkpoint-{step}" / "objective.safetensors") for step in (6, 10)
    )
    assert {name.split(".")[0] for name in middle} == {"repa"}
    assert all(torch.equal(middle[name], end[name]) for name in middle)

    began = building.loss(recipe, torch.float32).learned.state_dict()
    assert began.keys() == middle.keys()
    assert not any(torch.equal(began[name], middle[name]) for name in middle)

    folder = run / "checkpoint-10"
    model = load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in model} == {"text", "dit"}
    assert load_file(folder / "ema.safetensors").keys() == model.keys()
    moments = load_file(folder / "optimizer.safetensors")
    muon = {name for name in moments if name.startswith("muon.")}
    averages = {name for name in moments if name.endswith(".exp_avg")}
    assert len(muon) + len(averages) == len(model) + len(middle)


def test_a_run_with_projectors_continues_bit_for_bit_from_any_checkpoint(full: Path) -> None:
    recipe = config.load(full, ("save_every=3", "keep=4", "sample.every=100"))
    run = Path(recipe.out)
    loop.train(recipe, lambda line: None)
    losses, files = [line["loss"] for line in log(run)], hashes(run)
    assert "objective.safetensors" in files
    for step in (9, 6, 3):
        for later in (found for found in checkpoint.found(run) if found.step > step):
            shutil.rmtree(later.folder)
        assert loop.train(recipe, lambda line: None) == (10, 0)
        assert [line["loss"] for line in log(run)] == losses
        assert hashes(run) == files


def test_the_average_teaches_when_repa_is_its_own_teacher(full: Path) -> None:
    sets = ('repa.teacher="self"', "repa.target=1", "repa.blocks=[0]", "repa.until=3")
    recipe = config.load(full, sets, ("lpips", "dino", "contrastive"))
    loop.train(recipe, lambda line: None)
    assert ["repa" in line for line in log(Path(recipe.out))] == [True] * 3 + [False] * 7


def test_a_missing_teacher_is_told_before_anything_is_written(full: Path, tmp_path: Path) -> None:
    for key, message in (
        ("repa.teacher", "neither a local folder nor a model"),
        ("dino.teacher", "neither a local folder nor a model"),
        ("lpips.vgg", "528 MiB"),
        ("lpips.heads", "pip install --no-deps lpips"),
    ):
        with pytest.raises(BadRecipe, match=message) as caught:
            loop.train(config.load(full, (f"{key}={tmp_path / 'nowhere'}",)), lambda line: None)
        assert key in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_command_line_says_it_in_one_sentence_and_leaves_with_two(
    full: Path, tmp_path: Path
) -> None:
    done = warm.run("-m", "daybreak", "train", full, "--set", "lpips.vgg=nowhere.pth")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("daybreak: lpips.vgg: nowhere.pth does")
    assert "Traceback" not in done.stderr


WRONG = [
    ("repa.blocks=[5]", r"repa\.blocks names block 5, but dit\.depth = 2"),
    ('repa.projector="conv"', r"needs every token, but block 0 lies on the route"),
    ("repa.teacher=self", r"target is the block of the averaged model"),
    ("stage.0.batch=7", r"in pairs, so stage\.0\.batch = 7 and micro = 0 must both be even"),
    ("lpips.fraction=0", r"lpips\.fraction = 0"),
    ("dino.bellow=0.5", r"unknown key dino\.bellow; did you mean below\?"),
    ('stage.1.without=["text"]', r"stage\.1\.without\.0 = 'text'"),
]


@pytest.mark.parametrize(("assignment", "message"), WRONG, ids=[wrong for wrong, _ in WRONG])
def test_what_does_not_fit_is_refused_on_load(full: Path, assignment: str, message: str) -> None:
    with pytest.raises(BadRecipe, match=message) as caught:
        config.load(full, (assignment,))
    assert "\n" not in str(caught.value)


def test_a_section_left_out_leaves_the_stages_too(full: Path) -> None:
    recipe = config.load(full, (), ("repa",))
    assert recipe.repa is None
    assert [stage.without for stage in recipe.stage] == [(), ("tread",)]
    with pytest.raises(BadRecipe, match=r"stage\.0\.without names repa, but there is no section"):
        config.load(full, ('stage.0.without=["repa"]',), ("repa",))


class Nowhere(Dice):
    """Dice whose numbers lie on torch's device without memory, for which there is no generator."""

    def __init__(self, seed: int, step: int, first: int, count: int) -> None:
        super().__init__(seed, step, first, count)

    def normal(self, *shape: int) -> torch.Tensor:
        return super().normal(*shape).to("meta")

    def uniform(self, *shape: int) -> torch.Tensor:
        return super().uniform(*shape).to("meta")

    def share(self, fraction: float) -> torch.Tensor | slice:
        some = super().share(fraction)
        return some if isinstance(some, slice) else some.to("meta")


def test_a_step_keeps_to_its_device_and_never_waits_for_it(
    full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There most operations fail that also read the processor's memory, and all that ask for a
    number: what a GPU would be waited for. transformers' LFM2 asks once whether words are padded.
    """
    asked: list[str] = []
    answer = torch.Tensor.__bool__

    def note(tensor: torch.Tensor) -> bool:
        if tensor.is_meta:
            asked.append(sys._getframe(1).f_code.co_name)
        return tensor.is_meta or answer(tensor)

    monkeypatch.setattr(torch.Tensor, "__bool__", note)
    monkeypatch.setattr(accelerator, "choose", lambda: torch.device("meta"))
    recipe = config.load(full, ("compile=false",))
    sources = building.sources(recipe)
    here = parallel.World(0, 1, torch.device("meta"), None, HashStore())
    objective, state, ema = building.build(recipe, sources, here, None, torch.bfloat16, None, print)
    learning = [*state.model.parameters(), *objective.learned.parameters()]
    image = torch.zeros(8, 3, 32, 32, device="meta")
    dice = Nowhere(recipe.seed, 1, 0, 8)
    loss, parts = objective(state.model, state.average, image, ["a red circle"] * 8, dice)
    assert set(parts) == {*WEIGHTS, "words"}
    loss.backward()
    assert all(weight.grad is not None and weight.grad.is_meta for weight in learning)
    norm = parallel.clip(here, learning, recipe.clip)
    rows = parallel.gather(here, torch.stack((loss.detach(), norm)))
    guard = health.Guard(health.Config(spike="skip"), None)
    state.optimizers["muon"][0].found_inf = guard.refuses(rows)  # type: ignore[attr-defined]
    for optimizer, _ in state.optimizers.values():
        for group in optimizer.param_groups:
            group["fused"] = False  # which this device has not
        optimizer.step()
    ema.update(state.model, 1)
    assert asked == ["create_recurrent_attention_mask"]
