"""Guidance extrapolates from a weak denoiser through a strong one, where and how far it is told."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from daybreak.generate import custom_pipeline, guidance, sampler
from daybreak.generate.draw import draw
from daybreak.model import dit, flow, text, tread
from daybreak.model.text_to_image import TextToImage, build
from daybreak.train.dice import Dice

APG = sampler.Apg(eta=0.3, momentum=-0.4, norm=0.5)
ROUTE = tread.Config(start=1, stop=3, carried=0.5)


def constant(value: float) -> sampler.Denoiser:
    return lambda x_t, t: torch.full_like(x_t, value)


def linear(seed: int) -> sampler.Denoiser:
    """A denoiser that depends on picture and time."""
    torch.manual_seed(seed)
    weight = torch.randn(3, 3)
    return lambda x_t, t: torch.einsum("bchw,cd->bdhw", x_t, weight) * (1 - t) + t


def test_a_scale_of_one_is_the_strong_denoiser_and_an_interval_confines_any_other() -> None:
    strong, weak, x_t = constant(1.0), constant(0.0), torch.zeros(1, 3, 2, 2)
    assert guidance.guided(strong, sampler.in_turn(strong, weak), 1.0) is strong
    assert guidance.guided(strong, sampler.in_turn(strong, weak), 3.0)(x_t, 0.5).unique() == 3
    for apg in (None, sampler.Apg(eta=1, momentum=0)):
        confined = guidance.guided(strong, sampler.in_turn(strong, weak), 3.0, (0.2, 0.8), apg)
        guesses = [float(confined(x_t, t).mean()) for t in (0.1, 0.2, 0.8, 0.9)]
        assert guesses == [1, 3, 3, 1]


def test_outside_the_interval_the_weak_denoiser_is_not_asked() -> None:
    asked = []
    weak: sampler.Denoiser = lambda x_t, t: asked.append(t) or x_t  # type: ignore[func-returns-value]
    denoise = guidance.guided(constant(1.0), sampler.in_turn(constant(1.0), weak), 3.0, (0.3, 0.6))
    for t in (0.9, 0.6, 0.45, 0.3, 0.1):
        denoise(torch.zeros(1, 3, 2, 2), t)
    assert asked == [0.6, 0.45, 0.3]


def test_projected_guidance_that_takes_nothing_away_is_classifier_free_guidance() -> None:
    x_t = torch.randn(2, 3, 4, 4)
    both = sampler.in_turn(linear(0), linear(1))
    plain = guidance.guided(linear(0), both, 4.0)
    same = guidance.guided(linear(0), both, 4.0, apg=sampler.Apg(eta=1, momentum=0))
    for t in (0.9, 0.5, 0.1):
        torch.testing.assert_close(same(x_t, t), plain(x_t, t), atol=1e-5, rtol=1e-5)


def test_projected_guidance_equals_diffusers() -> None:
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    strong, weak, memory = linear(0), linear(1), MomentumBuffer(APG.momentum)
    ours = guidance.guided(strong, sampler.in_turn(strong, weak), 4.0, apg=APG)
    assert APG.norm is not None
    bound = APG.norm * (3 * 4 * 4) ** 0.5
    for t in (0.9, 0.5, 0.1):
        x_t = torch.randn(2, 3, 4, 4)
        theirs = normalized_guidance(
            strong(x_t, t), weak(x_t, t), 3.0, memory, APG.eta, bound, use_original_formulation=True
        )
        torch.testing.assert_close(ours(x_t, t), theirs, atol=1e-5, rtol=1e-5)


def test_what_is_projected_is_orthogonal_to_the_guess_and_no_longer_than_allowed() -> None:
    torch.manual_seed(0)
    difference, guess = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    left = guidance.projected(difference, guess, sampler.Apg(norm=0.1))
    assert (left * guess).sum((1, 2, 3)).abs().max() < 1e-4
    assert (left.square().mean((1, 2, 3)).sqrt() <= 0.1 + 1e-6).all()
    assert guidance.projected(difference, torch.zeros_like(guess), sampler.Apg()).isfinite().all()


# Self-guidance, with a network


@pytest.fixture(scope="module")
def model() -> TextToImage:
    """A model none of whose weights is zero."""
    config = text.Config(width=32, depth=1, heads=2, vocabulary=400, max_tokens=16)
    tokenizer = text.learn_tokenizer(["a red circle", "a blue square"] * 20, config)
    size = dit.Config(patch=8, bottleneck=0, width=32, depth=4, heads=2)
    built = build(size, config, tokenizer, seed=1)
    torch.manual_seed(0)
    for parameter in built.dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return built.eval().requires_grad_(False)


def dice(*seeds: int) -> list[Dice]:
    return [Dice(seed, 0, 0, 1) for seed in seeds]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.6)])
def test_with_and_without_words_in_one_pass_is_what_it_is_in_two(
    model: TextToImage, interval: tuple[float, float]
) -> None:
    """The words are of several lengths, so what stands in for none is padded."""
    prompts = ["a red circle " * 3, "a blue square"]
    how = sampler.Config(steps=6, guidance=3.0, interval=interval)
    noise, _ = sampler.begin(dice(5, 6), (3, 32, 32), 1.0, None, 8, torch.device("cpu"))
    strong = sampler.denoiser(model.dit, model.text(prompts))
    weak = sampler.denoiser(model.dit, model.text(["", ""]))
    apart = guidance.guided(strong, sampler.in_turn(strong, weak), 3.0, interval)
    expected = sampler.euler(apart, noise, 6, flow.Config().shift)
    shown = expected.add(1).mul(127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    drawn = draw(model, prompts, [5, 6], 32, 32, how, flow.Config())
    assert np.abs(drawn - shown).max() <= 1
    assert len(np.unique(drawn)) > 100


def test_self_guidance_is_the_dense_network_against_the_routed_one(model: TextToImage) -> None:
    how = sampler.Config(steps=1, guide="self", guidance=3.0)
    noise, route = sampler.begin(dice(5, 6), (3, 32, 32), 1.0, ROUTE, 8, torch.device("cpu"))
    assert route is not None
    t, words = torch.ones(2), model.text(["a red circle", ""])
    dense, routed = model.dit(noise, t, words).x, model.dit(noise, t, words, route).x
    picture = draw(model, ["a red circle", ""], [5, 6], 32, 32, how, flow.Config(), ROUTE)
    expected = routed + 3 * (dense - routed)  # one step from t = 1 lands on the guess
    shown = expected.add(1).mul(127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(picture - shown).max() <= 1
    assert np.abs(picture - dense.add(1).mul(127.5).permute(0, 2, 3, 1).numpy()).max() > 20


def test_the_weak_tokens_of_a_picture_follow_from_its_seed_alone() -> None:
    cpu = torch.device("cpu")
    noise, route = sampler.begin(dice(1, 2, 3), (3, 32, 32), 1.0, ROUTE, 8, cpu)
    alone, way = sampler.begin(dice(2), (3, 32, 32), 1.0, ROUTE, 8, cpu)
    assert route is not None
    assert way is not None
    assert torch.equal(noise[1:2], alone)
    assert torch.equal(route.kept[1:2], way.kept)
    assert not torch.equal(route.kept[0], route.kept[1])
    unrouted, nothing = sampler.begin(dice(2), (3, 32, 32), 1.0, None, 8, cpu)
    assert torch.equal(unrouted, alone)
    assert nothing is None


def test_self_guidance_without_a_route_is_refused(model: TextToImage) -> None:
    how = sampler.Config(steps=1, guide="self")
    with pytest.raises(ValueError, match="on a route"):
        draw(model, ["a"], [0], 32, 32, how, flow.Config())


def test_the_last_stochastic_step_draws_no_noise() -> None:
    image, drawn = torch.rand(1, 3, 4, 4) * 2 - 1, []

    def anew() -> torch.Tensor:
        drawn.append(1)
        return torch.randn(1, 3, 4, 4)

    sampler.euler(lambda x_t, t: image, torch.randn(1, 3, 4, 4), 5, 1.0, anew)
    assert len(drawn) == 4


def test_the_noise_of_a_walk_has_the_scale_of_the_flow() -> None:
    cpu = torch.device("cpu")
    unit, loud = (
        sampler.begin([Dice(3, 0, 0, 1)], (3, 8, 8), scale, None, 4, cpu)[0] for scale in (1.0, 1.5)
    )
    assert torch.equal(loud, 1.5 * unit)


def test_what_is_remembered_reaches_back_to_the_first_step() -> None:
    differences = iter((1.0, 0.0, 0.0))
    apg = sampler.Apg(eta=1.0, momentum=-0.5)
    denoise = guidance.guided(
        constant(0.0),
        lambda x_t, t: (torch.zeros_like(x_t), torch.full_like(x_t, -next(differences))),
        2.0,
        apg=apg,
    )
    x_t = torch.zeros(1, 3, 2, 2)
    assert [float(denoise(x_t, t).mean()) for t in (0.9, 0.5, 0.1)] == [1.0, -0.5, 0.25]


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("norm", [None, 0.1, 10.0])
def test_the_folders_own_projection_is_that_of_training(eta: float, norm: float | None) -> None:
    difference, guess = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    apg = sampler.Apg(eta=eta, norm=norm)
    theirs = custom_pipeline.projected(difference, guess, apg.model_dump())
    assert torch.equal(theirs, guidance.projected(difference, guess, apg))


@given(st.integers(1, 200), st.floats(0.01, 20))
def test_the_folders_own_grid_is_ours_to_the_last_bit(steps: int, shift: float) -> None:
    """Else an interval of guidance could begin a step later in one of them."""
    assert custom_pipeline.times(steps, shift) == sampler.times(steps, shift)
