"""Randomness depends on (seed, step, global sample index) and on nothing else."""

import pytest
import torch

from daybreak.train import dice
from daybreak.train.dice import Dice


def test_a_slice_of_the_dice_is_the_dice_of_the_slice() -> None:
    whole = Dice(seed=1, step=5, first=0, count=8)
    parts = [Dice(1, 5, 0, 3), Dice(1, 5, 3, 5)]
    assert torch.equal(whole.normal(2, 3), torch.cat([part.normal(2, 3) for part in parts]))
    assert torch.equal(whole.uniform(4), torch.cat([part.uniform(4) for part in parts]))


def test_seed_step_and_sample_each_change_the_draw() -> None:
    draws = [Dice(*key, count=1).normal(16) for key in [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3)]]
    for number, draw in enumerate(draws):
        for other in draws[:number]:
            assert not torch.equal(draw, other)


def test_the_draws_are_unit_gaussians_and_fair_fractions() -> None:
    gauss = Dice(0, 0, 0, 200).normal(100)
    assert abs(float(gauss.mean())) < 0.03
    assert abs(float(gauss.std()) - 1) < 0.03
    flat = [dice.fraction(0, "crop", number) for number in range(5000)]
    assert 0 <= min(flat) < 0.01 < 0.99 < max(flat) < 1
    assert abs(sum(flat) / len(flat) - 0.5) < 0.02


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    Dice(0, 0, 0, 4).normal(8)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25, 0.3, 0.07])
def test_a_share_is_exact_and_does_not_depend_on_the_cut(fraction: float) -> None:
    samples = torch.arange(200)
    whole = samples[Dice(0, 1, 0, 200).share(fraction)]
    assert len(whole) == round(200 * fraction)
    cut = [part[Dice(0, 1, int(part[0]), 10).share(fraction)] for part in samples.split(10)]
    assert torch.equal(torch.cat(cut), whole)


def test_a_whole_share_copies_nothing() -> None:
    samples = torch.arange(4)
    assert samples[Dice(0, 1, 0, 4).share(1.0)].data_ptr() == samples.data_ptr()


def test_no_two_lists_of_parts_are_one_text() -> None:
    assert dice.key(1, 23) != dice.key(12, 3)
    assert dice.key(1, 2, 3) != dice.key(12, 3)
