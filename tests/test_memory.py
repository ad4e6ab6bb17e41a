"""Memory on paper, against what autograd and the optimisers really hold."""

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from daybreak import config
from daybreak.model import dit, text, text_to_image
from daybreak.model.text import Text
from daybreak.objective import lpips
from daybreak.objective.objective import Objective
from daybreak.optim import groups
from daybreak.optim.ema import Ema
from daybreak.optim.muon import Muon
from daybreak.train import flops, memory, parallel
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
    one = memory.eager(plain.dit, 64, plain.text.max_tokens, dtype)
    route = flops.route(plain, stage)
    counts = {64: 4} if route is None else {64: 2, 32: 2}
    blocks = sum(
        count * memory.eager(plain.dit, n, plain.text.max_tokens, dtype).each
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
    paper = memory.eager(size, n, 40, dtype).times(3)
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

    paper = memory.parts(recipe, recipe.stage[0], Mesh(1, 1), 4, torch.float32, "cpu")
    assert paper["weights"] == paper["gradients"] == paper["average"]
    assert paper["weights"] == pytest.approx(weights, rel=0.01)
    assert paper["optimiser"] == pytest.approx(state, rel=0.01)
    assert paper["copies"] == 0, "float32 needs no copies"
    assert paper["teachers"] == 0


def test_a_mesh_cuts_what_is_kept_of_weights_and_nothing_else() -> None:
    (stage,) = SMALL["stage"]
    recipe = config.parse(SMALL | {"stage": [stage | {"batch": 64}]}, "small")
    alone, cut = (
        memory.parts(recipe, recipe.stage[0], mesh, 1, torch.bfloat16, "cuda")
        for mesh in (Mesh(8, 1), Mesh(2, 4))
    )
    for part in ("weights", "optimiser", "average"):
        assert cut[part] == alone[part] / 4
    assert cut["gradients"] == alone["gradients"], "which wait whole between two passes"
    assert cut["activations"] == alone["activations"]
    assert cut["copies"] >= alone["copies"]


@pytest.mark.parametrize("mesh", [Mesh(1, 1), Mesh(1, 4)], ids=str)
def test_gradients_wait_whole_where_a_step_takes_several_passes(mesh: Mesh) -> None:
    recipe = config.parse(SMALL, "small")
    share = 8 // mesh.devices
    one, several = (
        memory.parts(recipe, recipe.stage[0], mesh, pictures, torch.float32, "cuda")
        for pictures in (share, share // 2)
    )
    assert one["gradients"] == 0, "where the only pass turns back there are none"
    assert several["gradients"] == one["weights"] * mesh.shard


class Held(TorchDispatchMode):
    """Counts the bytes that live beside what lasts, and the most that ever did."""

    def __init__(self, lasting: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in lasting}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        at, size = storage._cdata, storage.nbytes()
        if at not in self._known:
            self._known.add(at)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, at, size)

    def _forget(self, at: int, size: int) -> None:
        self._known.discard(at)
        self.now -= size


def lasting(*optimizers: Optimizer) -> list[Tensor]:
    """What optimisers remember from step to step."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return [value for state in states for value in state.values()]


@pytest.mark.parametrize("wide", [96, 384])
def test_making_matrices_orthogonal_holds_as_much_as_on_paper(wide: int) -> None:
    """On a device, as it is on a GPU: there is none, and nothing is computed."""
    shapes = [(96, 96)] * 3 + [(wide, 96)] * 4 + [(96, wide)] * 2
    weights = [nn.Parameter(torch.zeros(shape, device="meta")) for shape in shapes]
    optimizer = Muon(weights, 1e-3)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    with Held([*weights, *gradients, *lasting(optimizer)]) as seen:
        optimizer.step()
    paper = memory.orthogonalising(map(torch.Size, shapes), Mesh(1, 1), torch.bfloat16)
    assert paper == pytest.approx(seen.most, rel=0.2)


@pytest.mark.parametrize("pictures", [8, 2], ids=["one pass", "several passes"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("batch", [8, 2], ids=["of many pictures", "of few"])
def test_a_step_at_its_fullest_holds_as_much_as_on_paper(
    batch: int, recompute: bool, pictures: int
) -> None:
    pictures = min(pictures, batch)
    (stage,) = SMALL["stage"]
    table = SMALL | {"parallel": {"recompute": recompute}, "stage": [stage | {"batch": batch}]}
    recipe = config.parse(table, "small")
    tokenizer = text.learn_tokenizer([CAPTION], recipe.text)
    model, twin = (text_to_image.build(recipe.dit, recipe.text, tokenizer) for _ in range(2))
    alone = parallel.World(0, 1, torch.device("cpu"), None, HashStore())
    parallel.prepare(model.dit, model.dit.blocks, alone, recipe.parallel)
    objective, ema = Objective(recipe.flow), Ema(twin, recipe.ema)
    optimizers = groups.optimizers(model, recipe.muon, recipe.adamw, precision=torch.float32)

    def step(number: int) -> None:
        image = torch.rand(batch, 3, 32, 32)
        for first in range(0, batch, pictures):
            dice = Dice(0, number, first, pictures)
            some = image[first : first + pictures]
            loss, _ = objective(model, ema.model, some, [CAPTION] * pictures, dice)
            loss.backward()
            del loss
        parallel.clip(alone, model.parameters(), 1.0)
        for optimizer, _ in optimizers.values():
            optimizer.step()
        ema.update(model, number)
        for optimizer, _ in optimizers.values():
            optimizer.zero_grad()

    step(1)
    stay = [*model.parameters(), *twin.parameters()]
    with Held([*stay, *lasting(*(optimizer for optimizer, _ in optimizers.values()))]) as seen:
        step(2)
    paper = memory.parts(recipe, recipe.stage[0], Mesh(1, 1), pictures, torch.float32, "cpu")
    always = sum(paper[part] for part in ("weights", "optimiser", "average"))
    assert seen.most + always == pytest.approx(sum(paper.values()), rel=0.1)


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

    args = BARE.dit, 64, BARE.text.max_tokens, torch.bfloat16
    saves = 4 * (memory.eager(*args).each - memory.compiled(*args, "cpu").each)
    assert kept_by("cpu") - kept_by("cpu", compile=True) == pytest.approx(saves)
    lpips = ingredients(toys)["lpips"] | {"compile": True}
    pays = [kept_by(kind, **lpips) - kept_by(kind, compile=True) for kind in ("cuda", "cpu")]
    assert pays[0] < pays[1], "the comparison is only compiled on a GPU"


def test_a_frozen_encoder_is_held_and_keeps_nothing() -> None:
    words = {"encoder": "google/t5gemma-2b-2b-ul2", "max_tokens": 16}
    recipe = config.parse(SMALL | {"text": words}, "frozen")
    assert memory.frozen(recipe) == flops.text_encoder(recipe).weights > 2e9
    found = memory.activations(recipe, recipe.stage[0], torch.float32, "cpu")
    width = flops.text_encoder(recipe).width
    outside = memory.outside(recipe.dit, 64, 16, width, 4) + 4 * 3 * 32**2
    blocks = memory.eager(recipe.dit, 64, 16, torch.float32).times(4)
    assert found.each == pytest.approx(blocks.each + outside)
