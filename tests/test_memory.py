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


BARE = config.parse(SMALL, "small")


def held(mesh: Mesh, pictures: int, recipe: config.Recipe = BARE) -> dict[str, float]:
    return memory.parts(recipe, recipe.stage[0], mesh, pictures, torch.bfloat16, "cuda")


@pytest.mark.parametrize(
    ("count", "mesh"),
    [(1, (1, 1)), (6, (1, 6)), (8, (1, 8)), (9, (9, 1)), (12, (3, 4)), (32, (4, 8))],
)
def test_weights_are_cut_within_a_node_and_evenly(count: int, mesh: tuple[int, int]) -> None:
    assert memory.mesh_for(count) == mesh


def test_gradients_do_not_wait_where_a_step_is_one_pass_or_nothing_is_cut() -> None:
    assert held(Mesh(1, 4), 2)["gradients"] == held(Mesh(1, 4), 2)["weights"]
    assert held(Mesh(1, 4), 1)["gradients"] > held(Mesh(1, 4), 2)["gradients"]
    assert held(Mesh(1, 1), 1)["gradients"] == held(Mesh(1, 1), 1)["weights"]


def test_what_a_pass_holds_grows_with_its_pictures() -> None:
    one, three = held(Mesh(1, 1), 1), held(Mesh(1, 1), 3)
    growing = {"activations", "pictures", "workspace"}
    assert {part: three[part] / one[part] for part in growing} == dict.fromkeys(growing, 3)
    assert one["pictures"] == 4 * 4 * 3 * 32**2
    assert {name: size for name, size in one.items() if name not in growing} == {
        name: size for name, size in three.items() if name not in growing
    }


def test_weights_that_were_gathered_are_whole_unless_they_are_let_go_again() -> None:
    once, again = (
        config.parse(
            SMALL | {"compile": True, "parallel": {"reshard_after_forward": reshard}}, "cut"
        )
        for reshard in (False, True)
    )
    whole = held(Mesh(1, 1), 1, once)
    cut, twice = (held(Mesh(1, 4), 1, recipe)["copies"] for recipe in (once, again))
    assert cut == whole["weights"] / 2
    assert twice == cut / 2, "two of four blocks"
    assert whole["copies"] < twice, "one device gathers nothing"


def test_terms_that_rest_in_a_stage_keep_nothing_but_their_networks(toys: dict[str, Path]) -> None:
    (stage,) = SMALL["stage"]
    names = ["repa", "lpips", "dino"]
    some = {name: ingredients(toys)[name][name] for name in names}
    recipe = config.parse(SMALL | some | {"stage": [stage | {"without": names}, stage]}, "rests")
    rests, works = (
        memory.parts(recipe, one, Mesh(1, 1), 1, torch.bfloat16, "cpu") for one in recipe.stage
    )
    alone = memory.parts(BARE, BARE.stage[0], Mesh(1, 1), 1, torch.bfloat16, "cpu")
    assert rests["activations"] == alone["activations"] < works["activations"]
    assert rests["teachers"] == works["teachers"] > alone["teachers"] == 0


@pytest.mark.parametrize("which", ["lpips", "dino"])
def test_a_term_keeps_what_it_looks_at(toys: dict[str, Path], which: str) -> None:
    """A half of the pictures; and LPIPS of a picture that is half as wide a quarter."""
    table = SMALL | {
        "scenes": {"canvas": "128"},
        "stage": [SMALL["stage"][0] | {"resolution": 128}],
    }
    term = ingredients(toys)[which][which]

    def kept_by(**more: float) -> float:
        bare, recipe = (
            config.parse(table, "bare"),
            config.parse(table | {which: term | more}, "term"),
        )
        each = [
            memory.activations(r, r.stage[0], torch.float32, "cpu").each for r in (bare, recipe)
        ]
        return each[1] - each[0]

    assert kept_by(fraction=0.5) == pytest.approx(kept_by() / 2)
    if which == "lpips":
        assert kept_by(resize=0.5) == pytest.approx(kept_by(resize=1.0) / 4)


def test_what_is_compiled_keeps_what_compiled_code_keeps(toys: dict[str, Path]) -> None:
    def kept_by(kind: str, **more: Any) -> float:
        recipe = config.parse(SMALL | more, "small")
        return memory.activations(recipe, recipe.stage[0], torch.bfloat16, kind).each

    args = BARE.dit, 64, BARE.text.max_tokens, torch.bfloat16, "cpu"
    saves = 4 * (memory.asked(*args).each - memory.compiled(*args).each)
    assert kept_by("cpu") - kept_by("cpu", compile=True) == pytest.approx(saves)
    lpips = ingredients(toys)["lpips"] | {"compile": True}
    pays = [kept_by(kind, **lpips) - kept_by(kind, compile=True) for kind in ("cuda", "cpu")]
    assert pays[0] < pays[1], "the comparison is only compiled on a GPU"


def test_a_frozen_encoder_is_held_and_keeps_nothing() -> None:
    words = {"encoder": "google/t5gemma-2b-2b-ul2", "max_tokens": 16}
    recipe = config.parse(SMALL | {"text": words}, "frozen")
    assert memory.asleep(recipe) == flops.text_encoder(recipe).weights > 2e9
    found = memory.activations(recipe, recipe.stage[0], torch.float32, "cpu")
    width = flops.text_encoder(recipe).width
    outside = memory.outside(recipe.dit, 64, 16, width, 4) + 4 * 3 * 32**2
    blocks = memory.asked(recipe.dit, 64, 16, torch.float32, "cpu").times(4)
    assert found.each == pytest.approx(blocks.each + outside)
