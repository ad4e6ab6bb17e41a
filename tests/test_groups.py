"""Which weight learns with which optimiser."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from daybreak.model import dit, text
from daybreak.model.text_to_image import TextToImage, build
from daybreak.optim import groups
from daybreak.optim.muon import Muon
from daybreak.optim.polar_express import NEWTON_SCHULZ

TEXT = text.Config(width=32, depth=1, heads=2, vocabulary=400, max_tokens=16)


@pytest.fixture
def model() -> TextToImage:
    return build(
        dit.Config(patch=4, bottleneck=8, width=32, depth=2, heads=2),
        TEXT,
        text.learn_tokenizer(["a red circle"] * 20, TEXT),
    )


def test_muon_has_the_matrices_of_all_layers_and_adamw_everything_else(model: TextToImage) -> None:
    shared = groups.optimizers(model, groups.MuonConfig(), groups.AdamWConfig())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owned = {
        owner: {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for owner, (optimizer, _) in shared.items()
    }
    assert owned["muon"] == {
        f"dit.blocks.{block}.{matrix}.weight"
        for block in (0, 1)
        for matrix in (
            "attention.img_qkv_proj",
            "attention.txt_kv_proj",
            "attention.to_out.0",
            "gate_proj",
            "up_proj",
            "down_proj",
        )
    } | {
        f"text.encoder.layers.0.{matrix}.weight"
        for matrix in (
            "conv.in_proj",
            "conv.out_proj",
            "feed_forward.w1",
            "feed_forward.w2",
            "feed_forward.w3",
        )
    }
    assert owned["adamw"] == set(names.values()) - owned["muon"]


def test_muon_has_the_modulation_too_where_the_recipe_says_so(model: TextToImage) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    few, many = (
        {
            names[id(p)]
            for group in groups.optimizers(model, muon, groups.AdamWConfig())["muon"][
                0
            ].param_groups
            for p in group["params"]
        }
        for muon in (groups.MuonConfig(), groups.MuonConfig(modulation=True))
    )
    assert many - few == {f"dit.blocks.{block}.modulation.lin.weight" for block in (0, 1)}
    assert few < many


def test_without_muon_adamw_has_them_all(model: TextToImage) -> None:
    shared = groups.optimizers(model, None, groups.AdamWConfig())
    assert list(shared) == ["adamw"]
    assert sum(len(group["params"]) for group in shared["adamw"][0].param_groups) == len(
        list(model.parameters())
    )


def test_a_muon_step_is_orthogonal_and_of_the_size_of_an_adamw_step() -> None:
    weight = torch.nn.Parameter(torch.zeros(64, 32))
    blocks = torch.nn.ModuleList([torch.nn.ParameterDict({"w": weight})])
    holder = torch.nn.ModuleDict({"dit": torch.nn.ModuleDict({"blocks": blocks})})
    holder["last"] = torch.nn.Linear(2, 2)
    shared = groups.optimizers(holder, groups.MuonConfig(rate=0.5), groups.AdamWConfig())
    groups.set_rate(shared, 0.02)
    weight.grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    shared["muon"][0].step()
    singular = torch.linalg.svdvals(-weight.detach() / (0.01 * 0.2 * 8))
    assert 0.6 < float(singular.min()) <= float(singular.max()) < 1.3
    assert abs(float(weight.square().mean().sqrt()) / (0.01 * 0.2) - 1) < 0.2


def told(shared: dict[str, tuple[Optimizer, float]], refused: Tensor) -> None:
    """Take a step as on a device that no host waits for."""
    for optimizer, _ in shared.values():
        optimizer.found_inf = refused  # type: ignore[attr-defined]
        optimizer.step()


@pytest.mark.parametrize("take", [groups.step, told])
def test_a_step_that_is_refused_changes_nothing(
    model: TextToImage, take: Callable[[dict[str, tuple[Optimizer, float]], Tensor], None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    shared = groups.optimizers(
        model, groups.MuonConfig(weight_decay=0.1), groups.AdamWConfig(weight_decay=0.1)
    )
    twin = copy.deepcopy(model)
    undisturbed = groups.optimizers(
        twin, groups.MuonConfig(weight_decay=0.1), groups.AdamWConfig(weight_decay=0.1)
    )

    def gradients(*of: TextToImage) -> None:
        for weights in zip(*(one.parameters() for one in of), strict=True):
            given = torch.randn(weights[0].shape, generator=generator)
            for weight in weights:
                weight.grad = given.clone()

    def held(*parts: Any) -> list[Tensor]:
        weights, optimizers = parts
        states = [state for one, _ in optimizers.values() for state in one.state.values()]
        return [*weights.parameters(), *(value for state in states for value in state.values())]

    for one in (shared, undisturbed):
        groups.set_rate(one, 0.02)
    for refused in (True, False, True, False):
        if refused:
            before = [value.clone() for value in held(model, shared)]
            gradients(model)
            for weight in model.parameters():
                assert weight.grad is not None
                weight.grad.view(-1)[0] = torch.nan
            take(shared, torch.tensor(1.0))
            assert all(map(torch.equal, held(model, shared), before))  # at first without a state
            continue
        gradients(model, twin)
        take(shared, torch.tensor(0.0))
        for optimizer, _ in undisturbed.values():
            optimizer.step()
    assert all(map(torch.equal, held(model, shared), held(twin, undisturbed)))


def test_where_no_host_looks_every_optimiser_is_told(model: TextToImage) -> None:
    shared = groups.optimizers(model, groups.MuonConfig(), groups.AdamWConfig())
    refused = torch.ones((), device="meta")  # as on a GPU, its value cannot be seen from here
    groups.step(shared, refused)
    assert [getattr(one, "found_inf", None) is refused for one, _ in shared.values()] == [True] * 2


def test_the_schedule_rises_holds_and_falls() -> None:
    factors = [groups.schedule(step, 100, 10, 0.2) for step in range(1, 101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:80] == [1.0] * 71
    assert factors[80:] == sorted(factors[80:], reverse=True)
    assert factors[-1] == pytest.approx(0.05)
    assert groups.schedule(1, 100, 0, 0.0) == 1.0
    assert groups.schedule(10, 10, 0, 0.05) == 1.0, "less than a step is no cool-down"


def test_optimisers_have_what_the_recipe_says() -> None:
    model = nn.ModuleDict({"dit": nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)])})})
    shared = groups.optimizers(
        model,
        groups.MuonConfig(rate=2.0, momentum=0.8, weight_decay=0.01, rounds="newton-schulz"),
        groups.AdamWConfig(rate=3.0, betas=(0.7, 0.8), eps=1e-5, weight_decay=0.02),
        precision=torch.float64,
    )
    groups.set_rate(shared, 0.5)
    (muon, _), (adamw, _) = shared["muon"], shared["adamw"]
    assert isinstance(muon, Muon)
    assert muon.precision == torch.float64
    assert muon.rounds == NEWTON_SCHULZ
    said = {key: muon.param_groups[0][key] for key in ("lr", "momentum", "weight_decay")}
    assert said == {"lr": 1.0, "momentum": 0.8, "weight_decay": 0.01}
    said = {key: adamw.param_groups[0][key] for key in ("lr", "betas", "eps", "weight_decay")}
    assert said == {"lr": 1.5, "betas": (0.7, 0.8), "eps": 1e-5, "weight_decay": 0.02}


def test_where_warm_up_and_cool_down_meet_the_lower_of_both_counts() -> None:
    factors = [groups.schedule(step, 10, 10, 1.0) for step in range(1, 11)]
    assert factors == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_what_is_frozen_has_no_optimiser() -> None:
    blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)])
    model = nn.ModuleDict({"dit": nn.ModuleDict({"blocks": blocks})})
    shared = groups.optimizers(model, groups.MuonConfig(), groups.AdamWConfig())
    owned = {
        name: [p for group in optimizer.param_groups for p in group["params"]]
        for name, (optimizer, _) in shared.items()
    }
    assert [id(p) for p in owned["muon"]] == [id(blocks[0].weight)]
    assert [id(p) for p in owned["adamw"]] == [id(blocks[0].bias)]
