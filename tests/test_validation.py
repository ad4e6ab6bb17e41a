"""Validation loss: the table is fixed, even in t, and a perfect network has no error."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from daybreak.evaluate.validation import EDGES, NAMES, Errors, by_name, errors, level
from daybreak.model import dit, flow, text
from daybreak.model.text_to_image import TextToImage, build
from daybreak.train.dice import Dice

CAPTIONS = ["a red circle", "two blue squares", "a star", "a green cross and a white circle"] * 3


def model(seed: int = 0) -> TextToImage:
    config = text.Config(width=16, depth=1, heads=2, vocabulary=300, max_tokens=16)
    tokenizer = text.learn_tokenizer(CAPTIONS, config)
    size = dit.Config(patch=8, bottleneck=0, width=16, depth=1, heads=2)
    return build(size, config, tokenizer, seed)


def pictures(n: int = 12) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def awake() -> TextToImage:
    """A network whose guess depends on what it sees; before training every guess is grey."""
    network = model()
    torch.nn.init.normal_(network.dit.final_layer.linear.weight, std=0.5)
    return network


def test_a_network_that_guesses_grey_errs_by_the_pictures_themselves() -> None:
    image = pictures()
    found = errors(model(), image, CAPTIONS)
    squares = image.square().mean((1, 2, 3)).double().numpy()
    assert found.image == pytest.approx(np.stack([squares] * 3, 1))
    t = torch.stack([level(number, 0, len(image)) for number in range(3)], 1).double()
    weight = 1 / t.clamp(min=flow.T_MIN).numpy() ** 2  # the velocity error is that of x, weighted
    assert found.velocity == pytest.approx(found.image * weight, rel=1e-3)


def test_grey_pictures_and_a_network_that_knows_them_leave_no_error() -> None:
    grey = torch.zeros(3, 3, 16, 16)
    found = by_name(errors(model(), grey, CAPTIONS[:3]))
    assert found["loss"] == pytest.approx(0, abs=1e-9)


def test_the_loss_is_the_integral_of_the_velocity_error_over_t() -> None:
    """For grey guesses of pictures with square mean q: q (1/T_MIN + 1/T_MIN - 1)."""
    image = torch.ones(1, 3, 8, 8).expand(2_000, 3, 8, 8)
    t = torch.stack([level(number, 0, len(image)) for number in range(3)], 1).double()
    velocity = (1 / t.clamp(min=flow.T_MIN) ** 2).numpy()
    loss = by_name(Errors(np.ones_like(velocity), velocity))["loss"].mean()
    assert loss == pytest.approx(2 / flow.T_MIN - 1, rel=0.002)


@pytest.mark.parametrize("count", [10, 100, 1_000])
def test_levels_cover_each_bin_evenly(count: int) -> None:
    for number, (low, high) in enumerate(pairwise(EDGES)):
        t = level(number, 0, count).double().numpy()
        assert low <= t.min()
        assert t.max() < high
        even = np.sort((t - low) / (high - low))
        raised = flow.T_FIRST / (high - low)  # what lies below is lifted to it
        assert np.abs(even - (np.arange(count) + 0.5) / count).max() < 2.5 / count + raised


def test_the_table_does_not_depend_on_how_pictures_are_shared_out() -> None:
    network, image = awake(), pictures()
    whole = errors(network, image, CAPTIONS)
    parts = [errors(network, image[i : i + 5], CAPTIONS[i : i + 5], first=i) for i in (0, 5, 10)]
    for name in Errors._fields:
        together = np.concatenate([getattr(part, name) for part in parts])
        assert together == pytest.approx(getattr(whole, name), rel=1e-4)


def test_the_table_is_the_same_for_every_network_and_another_for_another_seed() -> None:
    image = pictures()
    first, second = (errors(model(seed), image, CAPTIONS) for seed in (0, 1))
    assert np.array_equal(first.velocity, second.velocity), "both guess grey"
    assert not np.array_equal(first.velocity, errors(model(), image, CAPTIONS, seed=1).velocity)


def test_louder_noise_is_harder_only_for_a_network_that_looks() -> None:
    image = pictures()
    quiet, loud = (errors(model(), image, CAPTIONS, scale) for scale in (1.0, 2.0))
    assert quiet.image == pytest.approx(loud.image)
    network = awake()
    quiet, loud = (errors(network, image, CAPTIONS, scale) for scale in (1.0, 2.0))
    assert not np.allclose(quiet.image, loud.image)


def test_validation_does_not_touch_the_dice_of_the_run() -> None:
    network = awake()
    before = torch.get_rng_state()
    found = errors(network, pictures(), CAPTIONS)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert np.array_equal(found.velocity, errors(network, pictures(), CAPTIONS).velocity)


def test_a_log_gets_one_number_for_each_bin_and_one_for_all() -> None:
    found = errors(model(), pictures(), CAPTIONS)
    named = {name: column.mean() for name, column in by_name(found).items()}
    assert list(named) == list(NAMES)
    assert list(NAMES) == [
        "loss",
        *(
            f"{kind} {at}"
            for kind in ("velocity", "image")
            for at in ("0.0-0.3", "0.3-0.6", "0.6-1.0")
        ),
    ]
    assert named["loss"] == pytest.approx(found.velocity.mean(0) @ [0.3, 0.3, 0.4])
    assert all(map(math.isfinite, named.values()))


def test_pictures_without_captions_are_refused() -> None:
    with pytest.raises(ValueError, match="12 pictures and 11 captions"):
        errors(model(), pictures(), CAPTIONS[:-1])


def test_errors_are_those_of_the_guess_at_the_level_and_noise_of_each_picture() -> None:
    network, image = model(), pictures(6)
    for weight in network.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.3)
    found = errors(network, image, CAPTIONS[:6], noise_scale=1.5, seed=3, first=10)
    for i, x in enumerate(image):
        for number in range(3):
            t = level(number, 10 + i, 1, seed=3)
            eps = 1.5 * Dice(3, -1 - number, 10 + i, 1).normal(3, 16, 16)
            with torch.no_grad():
                noisy = (1 - t) * x + t * eps
                guess = network.dit(noisy, t, network.text([CAPTIONS[i]])).x
            expected = float((guess - x).square().mean())
            assert found.image[i, number] == pytest.approx(expected, rel=1e-3)
            expected /= max(float(t), 0.05) ** 2
            assert found.velocity[i, number] == pytest.approx(expected, rel=1e-3)
