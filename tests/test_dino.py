"""P-DINO compares features patch by patch, on a grid that keeps a picture's proportions."""

from pathlib import Path

import pytest
import torch

from daybreak.model import vision
from daybreak.objective import dino


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_one_minus_the_mean_cosine() -> None:
    guess, truth = random(2, 6, 8), random(2, 6, 8, seed=1)
    cosines = (guess * truth).sum(-1) / guess.norm(dim=-1) / truth.norm(dim=-1)
    torch.testing.assert_close(dino.distance(guess, truth), 1 - cosines.mean(1))
    one, other = guess.mean(1), truth.mean(1)
    pooled = (one * other).sum(-1) / one.norm(dim=-1) / other.norm(dim=-1)
    torch.testing.assert_close(dino.distance(guess, truth, pooled=True), 1 - pooled)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_perfect_guess_is_at_distance_zero_and_feels_no_pull(
    toys: dict[str, Path], pooled: bool
) -> None:
    teacher = vision.load(str(toys["dinov2"]), "dino.teacher")
    truth = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pulls = []
    for guess in (truth.clone(), truth.flip(0)):
        guess.requires_grad_()
        with torch.no_grad():
            target = teacher(truth, 2, 3)
        miss = dino.distance(teacher(guess, 2, 3), target, pooled)
        miss.sum().backward()
        assert guess.grad is not None
        pulls.append((miss.max().item(), guess.grad.norm().item()))
    (perfect, still), (far, pull) = pulls
    assert perfect < 1e-6 < far
    assert still < 1e-4 * pull


@pytest.mark.parametrize(
    ("tokens", "seen"),
    [
        ((16, 16), (16, 16)),  # 512 px by 32
        ((11, 22), (11, 22)),  # 352 x 704
        ((32, 32), (16, 16)),  # 1024 px by 32
        ((22, 44), (11, 23)),  # 704 x 1408
        ((2, 2), (2, 2)),
        ((1, 900), (1, 480)),
    ],
)
def test_the_grid_is_that_of_the_tokens_unless_it_is_too_fine(
    tokens: tuple[int, int], seen: tuple[int, int]
) -> None:
    assert dino.grid(dino.Config(), *tokens) == seen


def test_the_narrowest_strip_is_a_patch_across() -> None:
    assert dino.grid(dino.Config(patches=4), 1, 40) == (1, 13)
    assert dino.grid(dino.Config(patches=4), 40, 1) == (13, 1)
