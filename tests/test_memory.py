"""Memory on paper, against what autograd and the optimisers really hold."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from daybreak import config
from daybreak.model import dit, text, text_to_image
from daybreak.model.text import Text
from daybreak.objective import lpips
from daybreak.objective.objective import Objective
from daybreak.optim import groups
from daybreak.train import flops, memory
from daybreak.train.dice import Dice
from daybreak.train.memory import Mesh

CAPTION = " ".join(["a red circle above a blue square"] * 4)
SMALL: dict[str, Any] = {
    "out": "runs/small",
    "compile": False,
    "data": {"source": "scenes"},
    "scenes": {"canvas": "32"},
    "text": {"width": 32, "depth": 2, "heads": 2, "vocabulary": 300, "max_tokens": 16},
    "dit": {"patch": 4, "bottleneck": 16, "width": 96, "depth": 4, "heads": 2},
    "muon": {},
    "stage": [{"resolution": 32, "steps": 10, "batch": 8, "lr": 1e-3}],
}
DTYPES = [torch.float32, torch.bfloat16]


def kept(run: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of a call, but for the weights."""
    storages: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes(), tensor
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()  # noqa: F841 - holds what is kept
    own = {weight.untyped_storage()._cdata for weight in weights}
    return sum(size for at, (size, _) in storages.items() if at not in own)


def ingredients(toys: dict[str, Path]) -> dict[str, dict[str, Any]]:
    lpips = {"vgg": str(toys["vgg"]), "heads": str(toys["heads"])}
    found: dict[str, dict[str, Any]] = {
        "tread": {"tread": {"start": 1, "stop": 3}},
        "repa": {"repa": {"teacher": str(toys["dinov3"]), "blocks": [2]}},
        "lpips": {"lpips": lpips},
        "dino": {"dino": {"teacher": str(toys["dinov2_with_registers"])}},
    }
    found["none of them"] = {}
    found["all of them"] = {key: value for each in found.values() for key, value in each.items()}
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["none of them", "tread", "repa", "lpips", "dino", "all of them"])
def test_a_pass_keeps_as_much_as_autograd_says(
    toys: dict[str, Path], dtype: torch.dtype, which: str
) -> None:
    recipe = config.parse(SMALL | ingredients(toys)[which], "small")
    tokenizer = text.learn_tokenizer([CAPTION], recipe.text)
    model = text_to_image.build(recipe.dit, recipe.text, tokenizer, 0, dtype, recipe.tread)
    terms = recipe.repa, recipe.lpips, recipe.dino
    objective = Objective(recipe.flow, recipe.tread, *terms, width=recipe.dit.width, compute=dtype)
    weights: list[Tensor] = [*model.parameters(), *objective.learned.parameters()]
    for teacher in objective.teachers.values():
        weights += teacher.network.parameters()
    if objective.vgg:
        weights += [part for depth in objective.vgg.depths for layer in depth for part in layer]
    image = torch.rand(4, 3, 32, 32) * 2 - 1
    dice = Dice(0, 1, 0, 4)

    measured = kept(lambda: objective(model, model, image, [CAPTION] * 4, dice)[0], weights)

    paper = memory.activations(recipe, recipe.stage[0], dtype, "cpu")
    assert 4 * paper.each + paper.once == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("which", ["none of them", "tread"])
def test_recomputed_blocks_keep_what_goes_into_them_and_one_is_at_work(
    toys: dict[str, Path], which: str
) -> None:
    table = SMALL | ingredients(toys)[which]
    plain = config.parse(table, "plain")
    again = config.parse(table | {"parallel": {"recompute": True}}, "again")
    stage, dtype = plain.stage[0], torch.bfloat16
    before, after = (memory.activations(r, stage, dtype, "cpu") for r in (plain, again))
    one = memory.asked(plain.dit, 64, plain.text.max_tokens, dtype, "cpu")
    route = flops.route(plain, stage)
    counts = {64: 4} if route is None else {64: 2, 32: 2}
    blocks = sum(
        count * memory.asked(plain.dit, n, plain.text.max_tokens, dtype, "cpu").each
        for n, count in counts.items()
    )
    inputs = sum(count * n * 2 * plain.dit.width for n, count in counts.items())
    assert before.each - after.each == pytest.approx(blocks - inputs - one.each)
    assert after.once < before.once


def walk(size: dit.Config, dtype: torch.dtype, n: int, compiled: bool) -> int:
    """What the denoiser keeps of three pictures of n tokens with 40 words of 256 numbers."""
    model = dit.DiT(size, 256, compute=dtype)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    x_t = torch.randn(3, 3, n * size.patch, size.patch)
    words = Text(torch.randn(3, 40, 256), torch.arange(40) < torch.tensor([[12], [40], [3]]))
    return kept(lambda: model(x_t, torch.rand(3), words), model.parameters())


@pytest.mark.parametrize("n", [64, 300], ids=["attention written out", "fused attention"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_that_is_not_compiled_keeps_as_much_as_autograd_says(
    dtype: torch.dtype, n: int
) -> None:
    size = dit.Config(patch=4, bottleneck=0, width=96, depth=3, heads=2)
    paper = memory.asked(size, n, 40, dtype, "cpu").times(3)
    outside = 3 * memory.outside(size, n, 40, 256, dtype.itemsize)
    measured = walk(size, dtype, n, compiled=False)
    assert 3 * paper.each + paper.once + outside == pytest.approx(measured, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("n", [64, 300], ids=["attention written out", "fused attention"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_compiled_block_keeps_as_much_as_autograd_says(dtype: torch.dtype, n: int) -> None:
    size = dit.Config(patch=4, bottleneck=0, width=192, depth=3, heads=3)
    paper = memory.compiled(size, n, 40, dtype, "cpu").times(3)
    outside = 3 * memory.outside(size, n, 40, 256, dtype.itemsize)
    with functorch.patch(ban_recompute_materialized_backward=False):  # as parallel.prepare has it
        measured = walk(size, dtype, n, compiled=True)
    assert 3 * paper.each + paper.once + outside == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_compiled_comparison_keeps_what_it_compares(
    toys: dict[str, Path], dtype: torch.dtype
) -> None:
    vgg = lpips.load(lpips.Config(vgg=str(toys["vgg"]), heads=str(toys["heads"])), dtype)
    guess, truth = (torch.rand(2, 3, 3, 64, 64) * 2 - 1).unbind()
    weights = [part for depth in vgg.depths for layer in depth for part in layer]
    sizes = [(len(depth[0][0]), len(depth)) for depth in vgg.depths]
    for one in (vgg, lpips.compiled(vgg)):
        paper = memory.perceived(sizes, 64, dtype.itemsize, compiled=one is not vgg)
        call = partial(lpips.distance, one, guess.requires_grad_(), truth)
        assert 3 * paper == pytest.approx(kept(call, [*weights, *vgg.heads]), rel=0.05)


def test_weights_average_and_optimiser_are_as_large_as_the_real_ones() -> None:
    recipe = config.parse(SMALL, "small")
    tokenizer = text.learn_tokenizer([CAPTION * 9, *map(str, range(999))], recipe.text)
    model = text_to_image.build(recipe.dit, recipe.text, tokenizer)
    optimizers = groups.optimizers(model, recipe.muon, recipe.adamw)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    state = 0
    for optimizer, _ in optimizers.values():
        optimizer.step()
        for moments in optimizer.state.values():
            state += sum(value.nbytes for value in moments.values() if value.ndim)
    weights = sum(weight.nbytes for weight in model.parameters())

    paper = memory.parts(recipe, recipe.stage[0], Mesh(1, 1), 8, torch.float32, "cpu")
    assert paper["weights"] == paper["gradients"] == paper["average"]
    assert paper["weights"] == pytest.approx(weights, rel=0.01)
    assert paper["optimiser"] == pytest.approx(state, rel=0.01)
    assert paper["copies"] == 0, "float32 needs no copies"
    assert paper["teachers"] == 0


def test_a_mesh_cuts_what_is_kept_of_weights_and_nothing_else() -> None:
    recipe = config.parse(SMALL, "small")
    alone, cut = (
        memory.parts(recipe, recipe.stage[0], mesh, 1, torch.bfloat16, "cuda")
        for mesh in (Mesh(8, 1), Mesh(2, 4))
    )
    for part in ("weights", "gradients", "optimiser", "average"):
        assert cut[part] == alone[part] / 4
    assert cut["activations"] == alone["activations"]
    assert cut["copies"] >= alone["copies"]


def test_gradients_wait_whole_where_a_step_takes_several_passes() -> None:
    recipe = config.parse(SMALL, "small")
    whole = memory.parts(recipe, recipe.stage[0], Mesh(1, 1), 8, torch.float32, "cuda")
    several = memory.parts(recipe, recipe.stage[0], Mesh(1, 4), 1, torch.float32, "cuda")
    assert several["gradients"] == pytest.approx(whole["gradients"] * 5 / 4)


def test_frozen_networks_are_counted_in_the_precision_they_compute_in(
    toys: dict[str, Path],
) -> None:
    recipe = config.parse(SMALL | ingredients(toys)["all of them"], "small")
    objective = Objective(recipe.flow, None, recipe.repa, recipe.lpips, recipe.dino, width=96)
    held = sum(
        sum(weight.nbytes for weight in teacher.network.parameters())
        for teacher in objective.teachers.values()
    )
    assert objective.vgg
    held += sum(kernel.nbytes for depth in objective.vgg.depths for kernel, _ in depth)
    paper = memory.parts(recipe, recipe.stage[0], Mesh(1, 1), 8, torch.float32, "cpu")
    assert paper["teachers"] == pytest.approx(held, rel=0.15)  # positions are not counted
    assert flops.teachers(recipe, recipe.stage[0]).keys() == {"repa", "dino"}
