"""The loss is the equation in its docstring."""

import torch

from daybreak.model import dit, flow
from daybreak.model.text import Text
from daybreak.objective.objective import Objective
from daybreak.train.dice import Dice

CONFIG = flow.Config(shift=2.0)


def setting(count: int = 6) -> tuple[dit.DiT, torch.Tensor, Text]:
    torch.manual_seed(0)
    model = dit.DiT(dit.Config(patch=4, bottleneck=0, width=32, depth=1, heads=2), 8)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    image = torch.rand(count, 3, 8, 8) * 2 - 1
    return model, image, Text(torch.randn(count, 4, 8), torch.ones(count, 4, dtype=torch.bool))


def test_it_is_the_squared_difference_of_velocities() -> None:
    model, image, text = setting()
    loss, parts = Objective(CONFIG)(model, image, text, Dice(0, 1, 0, 6))

    dice = Dice(0, 1, 0, 6)
    t = flow.draw_time(CONFIG, dice)
    eps = dice.normal(3, 8, 8)
    level = t.view(-1, 1, 1, 1)
    guess = model((1 - level) * image + level * eps, t, text).x
    expected = ((guess - image) / level.clamp(min=0.05)).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert parts.keys() == {"flow"}
    assert not parts["flow"].requires_grad


def test_micro_batches_see_the_noise_of_the_whole_batch() -> None:
    model, image, text = setting()
    objective = Objective(CONFIG)
    whole, _ = objective(model, image, text, Dice(0, 1, 0, 6))
    halves = [
        objective(
            model,
            image[first : first + 3],
            Text(text.tokens[first : first + 3], text.mask[first : first + 3]),
            Dice(0, 1, first, 3),
        )[0]
        for first in (0, 3)
    ]
    torch.testing.assert_close(whole, sum(halves) / 2)
