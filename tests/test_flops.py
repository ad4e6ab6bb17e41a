"""The arithmetic of a step: counted on paper, and by torch's own counter."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public all the same
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from daybreak import config
from daybreak.model import dit, text, text_to_image, tread, vision
from daybreak.model.text import Text
from daybreak.objective import repa
from daybreak.objective.objective import Objective
from daybreak.optim import polar_express
from daybreak.optim.groups import MuonConfig
from daybreak.train import flops, networks, parallel
from daybreak.train.dice import Dice

TINY = dit.Config(patch=8, bottleneck=0, width=32, depth=2, heads=2)
MIDDLE = dit.Config(patch=16, bottleneck=64, width=384, depth=8, heads=6)
FULL = dit.Config()

PUBLISHED = {
    "out": "runs/published",
    "data": {"source": "data/published"},
    "text": {"encoder": "google/t5gemma-2b-2b-ul2", "max_tokens": 256},
    "dit": {},
    "tread": {"start": 1, "stop": 15},
    "repa": {},
    "lpips": {},
    "dino": {},
    "muon": {},
    "stage": [
        {"resolution": 512, "steps": 100_000, "batch": 1024, "lr": 1e-4},
        {"resolution": 1024, "steps": 20_000, "batch": 512, "lr": 1e-4, "without": ["repa"]},
    ],
}

SMALL = {
    "out": "runs/small",
    "data": {"source": "scenes"},
    "scenes": {"canvas": "32"},
    "text": {"width": 32, "depth": 2, "heads": 2, "vocabulary": 300, "max_tokens": 16},
    "dit": {"patch": 4, "bottleneck": 16, "width": 64, "depth": 4, "heads": 2},
    "stage": [{"resolution": 32, "steps": 10, "batch": 4, "lr": 1e-3}],
}


@pytest.mark.parametrize(
    ("size", "side", "words", "context", "route"),
    [
        (TINY, 32, 24, 32, None),
        (MIDDLE, 256, 40, 256, None),
        (MIDDLE, 256, 40, 256, tread.Config(start=1, stop=7)),
        (MIDDLE, 256, 40, 256, tread.Config(kind="sprint", start=2, stop=6, carried=0.75)),
        (FULL, 512, 256, 2304, tread.Config(start=1, stop=15)),
        (FULL, 1024, 256, 2304, None),
    ],
)
def test_the_denoiser_takes_as_many_flops_as_the_counter_counts(
    size: dit.Config, side: int, words: int, context: int, route: tread.Config | None
) -> None:
    n = (side // size.patch) ** 2
    with torch.device("meta"):
        model = dit.DiT(size, context, route=route)
        tokens = torch.empty(1, words, context, requires_grad=True)
        read = Text(tokens, torch.ones(1, words, dtype=torch.bool))
        kept = torch.empty(1, flops.visible(route, n), dtype=torch.long)
        walk = tread.Route(route.start, route.stop, kept) if route else None
        with FlopCounterMode(display=False) as counter:
            guess = model(torch.empty(1, 3, side, side), torch.empty(1), read, walk)
            guess.x.sum().backward()
    counted = flops.denoiser(size, n, words, context, route, words_learn=True)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_words_that_do_not_learn_save_one_product() -> None:
    saved = flops.denoiser(TINY, 16, 24, 40, None, True) - flops.denoiser(TINY, 16, 24, 40)
    assert saved == 2 * 24 * 40 * TINY.width


def test_recomputed_blocks_go_forth_twice() -> None:
    model = dit.DiT(TINY, 40)
    alone = parallel.World(0, 1, torch.device("cpu"), None, HashStore())
    parallel.prepare(model, model.blocks, alone, parallel.Config(recompute=True))
    words = Text(torch.rand(2, 24, 40, requires_grad=True), torch.ones(2, 24, dtype=torch.bool))
    side = 4 * TINY.patch
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.rand(2, 3, side, side), torch.rand(2), words).x.sum().backward()
    counted = 2 * flops.denoiser(TINY, 16, 24, 40, words_learn=True, recompute=True)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.05)


def with_teachers(toys: dict[str, Path]) -> config.Recipe:
    """A small recipe with every term."""
    return config.parse(
        SMALL
        | {
            "tread": {"start": 1, "stop": 3},
            "repa": {"teacher": str(toys["dinov3"]), "blocks": [1, 3]},
            "lpips": {"vgg": str(toys["vgg"]), "heads": str(toys["heads"]), "fraction": 0.5},
            "dino": {"teacher": str(toys["dinov2_with_registers"])},
        },
        "small",
    )


def interpolated(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return nn.functional.interpolate(image, (height, width), mode="bilinear", antialias=True)


def test_a_step_with_every_term_takes_as_many_flops_as_the_counter_counts(
    toys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Scaling is not counted: two small products, nothing beside networks that are no toys.
    monkeypatch.setattr(vision, "resize", interpolated)
    recipe = with_teachers(toys)
    caption = "a red circle above a blue square"
    tokenizer = text.learn_tokenizer([caption], recipe.text)
    model = text_to_image.build(recipe.dit, recipe.text, tokenizer, route=recipe.tread)
    objective = Objective(
        recipe.flow, recipe.tread, recipe.repa, recipe.lpips, recipe.dino, width=recipe.dit.width
    )
    image = torch.rand(4, 3, 32, 32) * 2 - 1
    long = " ".join([caption] * 4)  # as long as the recipe allows
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = objective(model, model, image, [long] * 4, Dice(0, 1, 0, 4))
        loss.backward()
    counted = 4 * sum(flops.work(recipe, recipe.stage[0]).picture.values())
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("rounds", ["polar-express", "newton-schulz"])
def test_orthogonal_steps_take_as_many_flops_as_the_counter_counts(
    rounds: Literal["polar-express", "newton-schulz"],
) -> None:
    muon = MuonConfig(rounds=rounds)
    for shape in ((96, 32), (32, 112), (48, 48)):
        with FlopCounterMode(display=False) as counter:
            polar_express.orthogonal(torch.randn(1, *shape), polar_express.NAMED[rounds])
        assert flops.orthogonalisation([torch.Size(shape)], muon) == counter.get_total_flops()


def total(recipe: config.Recipe) -> float:
    """FLOPs of all pictures, with captions that were encoded before."""
    return sum(
        stage.count * stage.batch * sum(flops.work(recipe, stage, cached=True).picture.values())
        for stage in recipe.stage
    )


def test_the_published_run_is_reproduced_on_paper() -> None:
    published = config.parse(PUBLISHED, "published")
    assert total(published) == pytest.approx(1.66e20, rel=0.02)
    shorter = config.parse(PUBLISHED | {"tread": {"start": 2, "stop": 13}}, "published")
    assert total(shorter) == pytest.approx(1.83e20, rel=0.02)
    dense = config.parse({k: v for k, v in PUBLISHED.items() if k != "tread"}, "published")
    assert total(dense) == pytest.approx(2.43e20, rel=0.02)
    assert total(config.load("prx_24h")) == pytest.approx(1.66e20, rel=0.02)
    weights = sum(shape.numel() for shape, _ in flops.learned(published))
    assert weights == 1_177_215_744 + 1792 * 1024 + 2 * 1024**2 + 3 * 1024  # and REPA's projector


def test_a_teacher_that_leaves_early_is_paid_for_as_long_as_it_stays() -> None:
    longer = config.parse(PUBLISHED, "published")
    until = config.parse(PUBLISHED | {"repa": {"until": 25_000}}, "published")
    whole, part = (flops.terms(recipe, recipe.stage[0])["repa"] for recipe in (longer, until))
    assert part == pytest.approx(whole / 4)
    assert "repa" not in flops.terms(until, until.stage[1])


def test_two_terms_with_one_teacher_and_one_view_look_once() -> None:
    shared = "facebook/dinov2-with-registers-base"
    apart = config.parse(PUBLISHED, "published")
    together = config.parse(PUBLISHED | {"repa": {"teacher": shared}}, "published")
    before, after = (flops.terms(recipe, recipe.stage[0])["dino"] for recipe in (apart, together))
    assert before - after == networks.NETWORKS[shared].forward(256)
    leaves = config.parse(PUBLISHED | {"repa": {"teacher": shared, "until": 25_000}}, "published")
    alone = flops.terms(leaves, leaves.stage[0])["dino"]
    assert alone - after == pytest.approx(0.75 * (before - after)), "then DINO looks for itself"


def test_the_average_as_teacher_costs_a_forward_pass_of_every_token() -> None:
    recipe = config.parse(
        SMALL | {"repa": {"teacher": "self", "blocks": [1], "target": 2}}, "small"
    )
    model = flops.denoiser(recipe.dit, 64, 16, 32, None, words_learn=True) / 3
    words = flops.text_encoder(recipe).forward(16)
    head = 3 * 2 * 64 * 3 * 64**2
    assert flops.terms(recipe, recipe.stage[0])["repa"] == pytest.approx(model + words + head)


@pytest.mark.parametrize("name", ["lpips", "dino"])
def test_a_term_that_looks_at_a_share_of_the_pictures_costs_that_share(name: str) -> None:
    every, some = (
        config.parse(PUBLISHED | {name: {"fraction": share}}, "published") for share in (1, 0.25)
    )
    whole, part = (flops.terms(recipe, recipe.stage[0])[name] for recipe in (every, some))
    assert part == pytest.approx(whole / 4)


def test_a_teacher_that_leaves_in_a_later_stage_is_paid_for_as_long_as_it_stays_there() -> None:
    stages = [
        {"resolution": 512, "steps": 100, "batch": 8, "lr": 1e-4},
        {"resolution": 512, "steps": 20, "batch": 8, "lr": 1e-4},
    ]
    recipe = config.parse(PUBLISHED | {"repa": {"until": 105}, "stage": stages}, "published")
    first, second = (flops.terms(recipe, stage)["repa"] for stage in recipe.stage)
    assert second == pytest.approx(first / 4)


def test_a_block_on_the_route_sees_what_walks_and_others_see_everything() -> None:
    recipe = config.parse(SMALL | {"tread": {"start": 1, "stop": 3}}, "small")
    seen = [flops.walking(recipe, recipe.stage[0], block) for block in range(4)]
    assert seen == [64, 32, 32, 64]


def test_a_projector_of_neighbours_takes_as_many_flops_as_the_counter_counts() -> None:
    section = {"teacher": "self", "blocks": [1], "target": 2, "projector": "conv"}
    recipe = config.parse(SMALL | {"repa": section}, "small")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        said = repa.Conv(64, 64)(torch.empty(1, 64, 64, requires_grad=True), 8)
        said.sum().backward()
    assert flops.projectors(recipe, recipe.stage[0]) == counter.get_total_flops()


def test_each_replica_makes_all_matrices_orthogonal_and_pictures_are_shared() -> None:
    recipe = config.parse(PUBLISHED, "published")
    stage = recipe.stage[0]
    work = flops.work(recipe, stage)
    assert work.step["muon"] > 0
    one, four = (flops.of_step(recipe, stage, replicas=replicas) for replicas in (1, 4))
    assert four - one == pytest.approx(3 * work.step["muon"])
