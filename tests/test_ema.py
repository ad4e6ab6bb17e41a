"""The averaged weights."""

import torch
from torch import nn

from daybreak.optim.ema import Config, Ema


def linear(value: float) -> torch.nn.Linear:
    model = torch.nn.Linear(2, 2)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


def test_an_update_moves_by_one_minus_decay() -> None:
    ema = Ema(linear(0.0), Config(decay=0.9))
    ema.update(linear(1.0), step=1000)
    torch.testing.assert_close(ema.model.weight, torch.full((2, 2), 0.1))


def test_early_updates_forget_the_random_beginning() -> None:
    ema = Ema(linear(0.0), Config(decay=0.999))
    for step in range(1, 51):
        ema.update(linear(1.0), step)
    assert float(ema.model.weight.min()) > 0.99


def test_only_every_so_many_steps_count() -> None:
    ema = Ema(linear(0.0), Config(decay=0.9, every=10))
    ema.update(linear(1.0), step=9)
    assert float(ema.model.weight.max()) == 0
    ema.update(linear(1.0), step=1000)
    assert float(ema.model.weight.max()) > 0


def test_without_a_ramp_the_first_update_copies_and_the_others_decay() -> None:
    ema = Ema(linear(0.0), Config(decay=0.9, every=10, ramp=False))
    ema.update(linear(1.0), step=10)
    assert torch.equal(ema.model.weight, torch.ones(2, 2))
    ema.update(linear(2.0), step=20)
    torch.testing.assert_close(ema.model.weight, torch.full((2, 2), 1.1))


def test_it_is_never_trained() -> None:
    average = Ema(linear(0.0), Config()).model
    assert not average.training
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_the_ramp_is_that_of_the_docstring() -> None:
    ema, expected = Ema(linear(0.0), Config(decay=0.3, every=2)), 0.0
    for step in range(1, 13):
        ema.update(linear(1.0), step)
        if step % 2 == 0:
            count = step // 2
            decay = min(0.3, (1 + count) / (10 + count))
            expected += (1 - decay) * (1 - expected)
        torch.testing.assert_close(ema.model.weight, torch.full((2, 2), expected))


def test_what_is_frozen_is_not_touched_by_the_average() -> None:
    model, twin = (nn.ModuleList([linear(value), linear(value)]) for value in (1.0, 0.0))
    model[0].requires_grad_(False)
    Ema(twin, Config(decay=0.5)).update(model, 1)
    weights = twin.state_dict()
    assert float(weights["0.weight"].max()) == 0
    assert float(weights["1.weight"].min()) > 0
