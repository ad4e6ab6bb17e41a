"""Guessed velocities keep away from a neighbour's, in pairs that no cut of the batch parts."""

import pytest
import torch
from pydantic import ValidationError

from daybreak.objective import contrastive


def velocities(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    guess, truth = torch.randn(2, count, 3, 4, 4, generator=generator)
    return guess, truth


def test_it_is_minus_the_squared_distance_to_the_neighbour() -> None:
    guess, truth = velocities(4)
    apart = [(guess[i] - truth[j]).square().mean() for i, j in ((0, 1), (1, 0), (2, 3), (3, 2))]
    everyone = torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(contrastive.term(guess, truth, everyone), -torch.stack(apart).mean())


def test_a_picture_without_a_caption_keeps_away_from_nothing() -> None:
    guess, truth = velocities(4)
    guess.requires_grad_()
    contrastive.term(guess, truth, torch.tensor([True, False, True, True])).backward()
    assert guess.grad is not None
    assert guess.grad[1].abs().sum() == 0
    assert (guess.grad[[0, 2, 3]].abs().sum((1, 2, 3)) > 0).all()


def test_however_the_batch_is_cut_the_pairs_are_the_same() -> None:
    guess, truth = velocities(6)
    captioned = torch.tensor([True, True, False, True, True, True])
    whole = contrastive.term(guess, truth, captioned)
    parts = [
        contrastive.term(guess[cut], truth[cut], captioned[cut]) * (cut.stop - cut.start) / 6
        for cut in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(whole, sum(parts))


def test_an_odd_batch_has_no_pairs() -> None:
    with pytest.raises(RuntimeError):
        contrastive.term(*velocities(3), torch.ones(3, dtype=torch.bool))


def test_a_weight_that_leaves_the_loss_without_a_lower_bound_is_refused() -> None:
    assert contrastive.Config(weight=0.99).weight == 0.99
    with pytest.raises(ValidationError, match="less than 1"):
        contrastive.Config(weight=1.0)
