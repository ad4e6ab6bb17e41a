"""Flow matching: the equations of the docstring, and the sampler that walks along them."""

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from daybreak.generate import sampler
from daybreak.model import flow
from daybreak.train.dice import Dice


def test_the_velocity_of_x_t_is_noise_minus_image() -> None:
    x, eps = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    noisy = flow.corrupt(x, torch.tensor([0.05, 0.3, 0.7, 1.0]), eps)
    torch.testing.assert_close(flow.velocity(noisy.x_t, x, noisy.t), eps - x, atol=2e-5, rtol=1e-5)


def test_below_t_min_the_velocity_stops_growing() -> None:
    x, x_t = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.1)
    at = [float(flow.velocity(x_t, x, torch.tensor([t]))) for t in (0.001, 0.01, flow.T_MIN)]
    assert at == [at[0]] * 3


def test_euler_on_a_perfect_denoiser_returns_the_image() -> None:
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    for shift in (1.0, 3.0):
        drawn = sampler.euler(lambda x_t, t: image, torch.randn(2, 3, 8, 8), 12, shift)
        torch.testing.assert_close(drawn, image, atol=1e-5, rtol=0)


def test_a_stochastic_step_keeps_the_guess_and_draws_the_noise_anew() -> None:
    image, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(5, 2, 3, 8, 8)
    seen, fresh = [], iter(noise[1:])

    def perfect(x_t: torch.Tensor, t: float) -> torch.Tensor:
        seen.append((x_t, t))
        return image

    drawn = sampler.euler(perfect, noise[0], 4, 2.0, lambda: next(fresh))
    torch.testing.assert_close(drawn, image, atol=1e-6, rtol=0)
    for (x_t, t), eps in zip(seen, noise, strict=False):
        torch.testing.assert_close(x_t, (1 - t) * image + t * eps, atol=1e-6, rtol=0)
    assert len(seen) == 4


def test_the_time_grid_falls_from_one_to_zero_and_the_shift_keeps_the_ends() -> None:
    for shift in (0.2, 0.5, 1.0, 3.0):
        grid = sampler.times(28, shift)
        assert grid[0] == 1
        assert grid[-1] == 0
        assert all(now > then for now, then in itertools.pairwise(grid))
    assert math.isclose(sampler.times(2, 3.0)[1], 0.75)
    assert sampler.times(10, 1.0)[::2] == [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


@given(st.floats(0.25, 4), st.integers(1, 64), st.sampled_from([4, 8, 16, 32]))
def test_a_picture_of_any_aspect_has_about_as_many_pixels(
    aspect: float, patches: int, patch: int
) -> None:
    side = patch * patches
    height, width = sampler.size(sampler.Config(aspect=aspect), side, patch)
    assert height % patch == width % patch == 0 < min(height, width)
    assert abs(height - side / math.sqrt(aspect)) <= patch / 2 or height == patch
    assert abs(width - side * math.sqrt(aspect)) <= patch / 2 or width == patch
    assert sampler.size(sampler.Config(), side, patch) == (side, side)


def test_drawn_times_have_the_moments_of_the_published_distribution() -> None:
    config = flow.Config(shift=3.0, uniform=0.1)
    t = flow.draw_time(config, Dice(0, 0, 0, 20_000))
    assert t.min() >= flow.T_FIRST
    assert t.max() < 1
    assert abs(float(t.mean()) - 0.693) < 0.01  # computed for shift 3, one tenth uniform
    quantiles = torch.quantile(t, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    expected = torch.tensor([0.29, 0.58, 0.74, 0.85, 0.94])
    torch.testing.assert_close(quantiles, expected, atol=0.02, rtol=0)


def test_noise_scale_scales_the_noise() -> None:
    image = torch.zeros(64, 3, 8, 8)
    config = flow.Config(noise_scale=2.0)
    assert abs(float(flow.draw_noise(config, image, Dice(0, 0, 0, 64)).std()) - 2) < 0.05


def test_the_shift_of_a_stage_stands_in_for_the_recipes_and_multiplies_the_odds() -> None:
    config = flow.Config(shift=3.0, uniform=0.0)
    usual = flow.draw_time(config, Dice(0, 1, 0, 200))
    doubled = flow.draw_time(config, Dice(0, 1, 0, 200), 6.0)
    other = config.model_copy(update={"shift": 6.0})
    assert torch.equal(doubled, flow.draw_time(other, Dice(0, 1, 0, 200)))
    odds = [t.double() / (1 - t.double()) for t in (usual, doubled)]
    torch.testing.assert_close(odds[1], 2 * odds[0], atol=0, rtol=1e-3)


def test_on_a_side_twice_as_long_the_same_noise_hides_half_as_much() -> None:
    """Why a stage of twice the resolution wants twice the shift."""
    small = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(2, -1).repeat_interleave(2, -2)  # the same picture, finer
    eps = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    odds = 0.7
    for times in (1, 2):
        t = torch.tensor([times * odds / (1 + times * odds)])
        x_t = flow.corrupt(large, t, eps).x_t / (1 - t)
        seen = torch.nn.functional.avg_pool2d(x_t, 2) - small  # what is left of the noise
        assert abs(float(seen.std()) - times * odds / 2) < 0.02


def test_mean_and_spread_are_those_of_the_logit_beside_the_shift() -> None:
    config = flow.Config(shift=2.0, mean=-0.5, spread=0.4, uniform=0.0)
    logit = torch.logit(flow.draw_time(config, Dice(0, 0, 0, 5000)).double())
    assert abs(float(logit.mean()) - (math.log(2) - 0.5)) < 0.03
    assert abs(float(logit.std()) - 0.4) < 0.02


def test_no_time_is_nearer_to_an_end_than_the_first_one() -> None:
    t = flow.draw_time(flow.Config(spread=20.0, uniform=0.0), Dice(0, 0, 0, 500))
    assert t.min() == torch.tensor(flow.T_FIRST)
    assert t.max() == torch.tensor(1 - flow.T_FIRST)


def test_the_least_time_that_is_divided_by_is_the_one_that_exports_know() -> None:
    assert flow.T_MIN == 0.05


def test_velocities_are_made_in_float32_whatever_comes_in() -> None:
    x_t, x = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    t = torch.full((4,), 0.05)
    v = flow.velocity(x_t, x, t)
    assert v.dtype == torch.float32
    assert torch.equal(v, flow.velocity(x_t.float(), x.float(), t))
