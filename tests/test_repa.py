"""REPA compares each token with what the teacher sees at the same place."""

import pytest
import torch
from pydantic import ValidationError

from daybreak.model.dit import Tapped
from daybreak.objective import repa


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_tokens_that_say_what_the_teacher_sees_agree() -> None:
    target = random(2, 12, 8)
    assert float(repa.disagreement(3 * target, target, None)) == pytest.approx(0, abs=1e-6)
    assert float(repa.disagreement(-target, target, None)) == pytest.approx(2, abs=1e-6)


def test_tokens_of_a_route_are_compared_at_their_own_places() -> None:
    target = random(2, 12, 8)
    kept = torch.tensor([[0, 3, 7, 11], [1, 2, 8, 9]])
    said = torch.stack([target[row, places] for row, places in enumerate(kept)])
    assert float(repa.disagreement(said, target, kept)) == pytest.approx(0, abs=1e-6)
    assert float(repa.disagreement(said, target.roll(1, 1), kept)) > 0.5
    assert float(repa.disagreement(said, target.flip(0), kept)) > 0.5


def test_the_term_is_one_minus_the_mean_cosine_of_what_the_projector_says() -> None:
    torch.manual_seed(0)
    term = repa.Repa(repa.Config(blocks=(1, 3)), 16, 8)
    target, kept = random(2, 12, 8), torch.tensor([[0, 5], [4, 6]])
    first = Tapped(1, random(2, 12, 16, seed=1), None)
    second = Tapped(3, random(2, 2, 16, seed=2), kept)
    apart = []
    for tap in (first, second):
        x = tap.tokens
        for number in range(3):
            weight = term.state_dict()[f"projectors.{tap.block}.layers.{number}.weight"]
            bias = term.state_dict()[f"projectors.{tap.block}.layers.{number}.bias"]
            x = x @ weight.T + bias
            x = x * torch.sigmoid(x) if number < 2 else x
        for row in range(2):
            places = range(12) if tap.kept is None else tap.kept[row].tolist()
            cosines = [
                x[row, i] @ target[row, place] / x[row, i].norm() / target[row, place].norm()
                for i, place in enumerate(places)
            ]
            apart.append(1 - torch.stack(cosines).mean())
    torch.testing.assert_close(term((first, second), target, 3), torch.stack(apart).mean())


def test_spatial_normalisation_takes_away_what_all_patches_share() -> None:
    target = random(2, 12, 8) * 3 + 5
    even = repa.normalised(target, 1.0)
    torch.testing.assert_close(even.mean(1), torch.zeros(2, 8), rtol=0, atol=1e-5)
    torch.testing.assert_close(even.std(1), torch.ones(2, 8))
    half = repa.normalised(target, 0.5)
    expected = (target - 0.5 * target.mean(1, keepdim=True)) / target.std(1, keepdim=True)
    torch.testing.assert_close(half, expected)
    term = repa.Repa(repa.Config(blocks=(0,), spatial_norm=1.0), 8, 8)
    tapped = (Tapped(0, random(2, 12, 8, seed=3), None),)
    torch.testing.assert_close(term(tapped, target, 3), term(tapped, 7 * target - 2, 3))


def test_spatial_normalisation_with_nothing_taken_away_still_evens_out() -> None:
    target, said = random(2, 12, 8) * torch.linspace(0.1, 9, 8), random(2, 12, 8, seed=3)
    term = repa.Repa(repa.Config(blocks=(0,), spatial_norm=0.0), 8, 8)
    even = target / target.std(1, keepdim=True)
    expected = repa.disagreement(term.projectors["0"](said, 3), even, None)
    torch.testing.assert_close(term((Tapped(0, said, None),), target, 3), expected)


def test_what_is_the_same_everywhere_in_a_picture_is_no_reason_for_nan() -> None:
    assert torch.equal(repa.normalised(torch.ones(2, 12, 8), 1.0), torch.zeros(2, 12, 8))


def test_tokens_in_half_precision_are_compared_in_full() -> None:
    said, target = random(2, 12, 8).bfloat16(), random(2, 12, 8, seed=1)
    exact = repa.disagreement(said.float(), target, None)
    assert torch.equal(repa.disagreement(said, target, None), exact)


def test_a_convolution_looks_at_a_token_and_its_eight_neighbours() -> None:
    tokens = random(1, 4 * 5, 6).requires_grad_()
    said = repa.Conv(6, 3)(tokens, rows=4)
    assert said.shape == (1, 20, 3)
    said[0, 2 * 5 + 1].sum().backward()  # row 2, column 1
    assert tokens.grad is not None
    touched = tokens.grad[0].abs().sum(-1).unflatten(0, (4, 5)) > 0
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[1:4, 0:3] = True
    assert torch.equal(touched, expected)


def test_projectors_compute_in_the_precision_of_the_tokens() -> None:
    for kind in ("mlp", "conv"):
        term = repa.Repa(repa.Config.model_validate({"blocks": [0], "projector": kind}), 8, 4)
        loss = term((Tapped(0, random(1, 4, 8).bfloat16(), None),), random(1, 4, 4), 2)
        assert loss.dtype == torch.float32
        assert {p.dtype for p in term.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"teacher": "self"}, "target is the block of the averaged model"),
        ({"target": 3}, "target is the block of the averaged model"),
        ({"blocks": [3, 2]}, "must be in rising order"),
        ({"blocks": [2, 2]}, "must be in rising order"),
        ({"blocks": [-1]}, "must be in rising order"),
        ({"blocks": []}, "at least 1 item"),
    ],
)
def test_what_makes_no_sense_is_refused(table: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        repa.Config.model_validate(table)


def test_blocks_must_exist_and_a_convolution_needs_every_token() -> None:
    repa.Config(blocks=(7,)).check(8, range(1, 7))
    repa.Config(blocks=(7,), projector="conv").check(8, range(1, 7))
    with pytest.raises(ValueError, match=r"repa\.blocks names block 7, but dit\.depth = 7"):
        repa.Config(blocks=(7,)).check(7, range(0))
    with pytest.raises(ValueError, match=r"repa\.target names block 9, but dit\.depth = 8"):
        repa.Config(teacher="self", target=9).check(8, range(0))
    with pytest.raises(ValueError, match=r"conv.*block 6 lies on the route .*\(1 to 7, exclusive"):
        repa.Config(blocks=(0, 6), projector="conv").check(8, range(1, 7))
    with pytest.raises(ValueError, match=r"conv.*block 3 lies on the route"):
        repa.Config(blocks=(3, 7), projector="conv").check(8, range(1, 7))
