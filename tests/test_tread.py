"""A route leaves tokens out and puts them back; everything else is as without it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from daybreak.model import dit, tread
from daybreak.model.text import Text
from daybreak.train.dice import Dice

SMALL = dit.Config(patch=4, bottleneck=0, width=32, depth=4, heads=2)
HALF = tread.Config(start=1, stop=3, carried=0.5)
TAPS = (0, 1, 2, 3)


def randomised(route: tread.Config | None = None, **changes: object) -> dit.DiT:
    """A denoiser none of whose weights is zero."""
    torch.manual_seed(0)
    model = dit.DiT(SMALL.model_copy(update=changes), 12, route=route)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(height: int = 16, width: int = 24) -> tuple[torch.Tensor, torch.Tensor, Text]:
    torch.manual_seed(1)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    image = torch.randn(2, 3, height, width)
    return image, torch.tensor([0.2, 0.9]), Text(torch.randn(2, 5, 12), mask)


def drawn(config: tread.Config, image: torch.Tensor, step: int = 1) -> tread.Route:
    return tread.draw(config, image, SMALL.patch, Dice(0, step, 0, len(image)))


# The draw


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    carried=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 1000),
)
def test_putting_back_what_was_taken_changes_nothing(
    rows: int, columns: int, carried: float, seed: int
) -> None:
    n = rows * columns
    config = tread.Config(stop=2, carried=carried)
    image = torch.zeros(3, 1, 2 * rows, 2 * columns)
    route = tread.draw(config, image, 2, Dice(seed, 0, 0, 3))
    assert route.kept.shape == (3, max(1, n - round(n * carried)))
    for row in route.kept.tolist():
        assert row == sorted(set(row))
        assert 0 <= row[0] <= row[-1] < n
    tokens = torch.arange(3 * n * 2, dtype=torch.float32).view(3, n, 2)
    assert torch.equal(route.put(route.take(tokens), into=tokens), tokens)
    changed = route.put(-1 - route.take(tokens), into=tokens)
    assert torch.equal((changed < 0).any(-1).sum(1), torch.full((3,), route.kept.shape[1]))
    assert torch.equal(route.take(changed), -1 - route.take(tokens))


def test_every_token_is_kept_equally_often() -> None:
    config, image = tread.Config(stop=2, carried=0.75), torch.zeros(4000, 1, 4, 4)
    route = tread.draw(config, image, 1, Dice(0, 0, 0, 4000))
    share = torch.zeros(16).index_add(0, route.kept.flatten(), torch.ones(route.kept.numel()))
    assert (share / 4000 - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_each_picture_and_each_step_has_its_own_tokens_however_the_batch_is_cut() -> None:
    image = torch.zeros(4, 3, 32, 32)
    whole = drawn(HALF, image).kept
    assert len({tuple(row) for row in whole.tolist()}) == 4
    assert not torch.equal(whole, drawn(HALF, image, step=2).kept)
    halves = [
        tread.draw(HALF, image[i : i + 2], SMALL.patch, Dice(0, 1, i, 2)).kept for i in (0, 2)
    ]
    assert torch.equal(torch.cat(halves), whole)


# The network


def test_a_route_that_carries_nothing_is_the_dense_network_bit_for_bit() -> None:
    model, (x_t, t, text) = randomised(), inputs()
    route = drawn(tread.Config(start=1, stop=3, carried=0), x_t)
    assert torch.equal(model(x_t, t, text, route).x, model(x_t, t, text).x)


def test_tokens_left_out_return_as_they_were_bit_for_bit() -> None:
    model, (x_t, t, text) = randomised(), inputs()
    route = drawn(HALF, x_t)
    seen: dict[str, torch.Tensor] = {}
    before = model(x_t, t, text, route, TAPS).tapped
    model.blocks[3].register_forward_pre_hook(lambda _, args: seen.update(entering=args[0]))
    model(x_t, t, text, route)
    expected = route.put(before[2].tokens, into=before[0].tokens)
    assert torch.equal(seen["entering"], expected)
    left_out = torch.ones(2, 24, dtype=torch.bool).scatter(1, route.kept, False)
    assert left_out.sum() == 24
    assert torch.equal(seen["entering"][left_out], before[0].tokens[left_out])


def test_tokens_on_the_route_see_only_one_another_and_keep_their_positions() -> None:
    model, (x_t, t, text) = randomised(), inputs()
    route = drawn(HALF, x_t)
    first, second = model(x_t, t, text, route, (0, 1)).tapped
    picture = torch.zeros(1, 24, 1).scatter(1, route.kept[:1, :, None], 1.0)
    angles = dit.rope(4, 6, SMALL.head_width)[picture[0, :, 0].bool()]
    words = model.txt_in(text.tokens[:1])
    mask = torch.cat((text.mask[:1], torch.ones(1, 12, dtype=torch.bool)), 1)
    bias = dit.bias_of(mask, torch.float32)
    kept = first.tokens[0, route.kept[0]][None]
    time = model.time_in(dit.sinusoids(1000 * t[:1], dit.FEATURES))
    alone = model.blocks[1](kept, words, bias, time, angles)
    torch.testing.assert_close(second.tokens[:1], alone, atol=1e-5, rtol=1e-5)


def test_padding_words_are_inert_on_a_route() -> None:
    model, (x_t, t, text) = randomised(), inputs()
    route = drawn(HALF, x_t)
    garbage = Text(text.tokens.masked_fill(~text.mask[..., None], 1e3), text.mask)
    expected = model(x_t, t, text, route).x
    torch.testing.assert_close(model(x_t, t, garbage, route).x, expected, atol=1e-5, rtol=1e-5)


def test_taps_say_which_tokens_they_hold() -> None:
    model, (x_t, t, text) = randomised(), inputs()
    route = drawn(HALF, x_t)
    routed = model(x_t, t, text, route, (2, 0, 3, 1)).tapped
    assert [tap.block for tap in routed] == [0, 1, 2, 3]
    assert [tap.tokens.shape[1] for tap in routed] == [24, 12, 12, 24]
    assert [tap.kept is route.kept for tap in routed] == [False, True, True, False]
    assert [tap.kept is None for tap in routed] == [True, False, False, True]
    dense = model(x_t, t, text, taps=(1,)).tapped[0]
    assert dense.kept is None
    assert dense.tokens.shape == (2, 24, 32)
    assert model(x_t, t, text).tapped == ()


def test_gradient_flows_through_tokens_that_were_left_out() -> None:
    model, (x_t, t, text) = randomised(), inputs()
    route = drawn(HALF, x_t)
    x_t.requires_grad_()
    model(x_t, t, text, route).x.sum().backward()
    assert x_t.grad is not None
    patches = x_t.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5))
    assert (patches > 0).all()


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 4), (12, 28), (32, 16)])
def test_any_resolution_can_be_routed(height: int, width: int) -> None:
    model, (x_t, t, text) = randomised(), inputs(height, width)
    guess = model(x_t, t, text, drawn(HALF, x_t))
    assert guess.x.shape == x_t.shape
    assert guess.x.isfinite().all()


def test_recomputed_blocks_see_the_same_tokens() -> None:
    x_t, t, text = inputs()
    route = drawn(HALF, x_t)
    plain, recomputing = randomised(), randomised()
    apply_activation_checkpointing(
        recomputing, check_fn=lambda module: isinstance(module, dit.Block)
    )
    for model in (plain, recomputing):
        model(x_t, t, text, route).x.square().mean().backward()
    for one, other in zip(plain.parameters(), recomputing.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_one_graph_holds_the_network_with_and_without_a_route() -> None:
    model, (x_t, t, text) = randomised(depth=2), inputs()
    first = tread.Config(stop=2)
    for route in (drawn(first, x_t), None):
        torch._dynamo.reset()
        report = torch._dynamo.explain(model)(x_t, t, text, route)
        assert report.graph_count == 1
        assert report.graph_break_count == 0, report.break_reasons
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    whole = torch.compile(model, fullgraph=True, backend="eager")
    for step, graphs in ((1, 1), (2, 1), (3, 1), (0, 2)):  # a new draw is no new graph
        route = drawn(first, x_t, step) if step else None
        expected = model(x_t, t, text, route).x  # which makes the table of turns
        guess = whole(x_t, t, text, route).x
        torch.testing.assert_close(guess, expected, atol=1e-5, rtol=1e-4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_the_compiler_of_training_takes_routed_blocks() -> None:
    model, (x_t, t, text) = randomised(), inputs()
    route = drawn(HALF, x_t)
    expected = [model(x_t, t, text, way).x for way in (route, None)]
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False)
    for way, x in zip((route, None), expected, strict=True):
        torch.testing.assert_close(model(x_t, t, text, way).x, x, atol=1e-5, rtol=1e-4)


# The other kinds


def test_pixels_of_tokens_that_walked_are_known() -> None:
    image = torch.zeros(2, 3, 8, 12)
    route = tread.Route(1, 2, torch.tensor([[0, 5], [1, 2]]))
    seen = tread.walked(route, image, 4)
    assert seen.shape == (2, 1, 8, 12)
    grid = seen[:, 0, ::4, ::4].tolist()
    assert grid[0] == [[True, False, False], [False, False, True]]
    assert grid[1] == [[False, True, True], [False, False, False]]
    assert torch.equal(seen[:, 0, 3::4, 3::4], seen[:, 0, ::4, ::4])


def test_what_is_deferred_has_no_say_in_the_rest() -> None:
    model, (x_t, t, text) = randomised(), inputs()
    config = tread.Config(kind="deferred", start=0, stop=4, carried=0.5)
    route = drawn(config, x_t)
    seen = tread.walked(route, x_t, 4)
    other = torch.where(seen, x_t, torch.randn_like(x_t))
    guess, again = model(x_t, t, text, route).x, model(other, t, text, route).x
    assert torch.equal(torch.where(seen, guess, 0), torch.where(seen, again, 0))


def test_sprint_fuses_what_waited_with_what_walked_and_begins_as_half_of_each() -> None:
    config = tread.Config(kind="sprint", start=1, stop=3, carried=0.75)
    fuse = tread.Fusion(config, 6)
    waited, walked = torch.randn(2, 8, 6), torch.randn(2, 2, 6)
    route = tread.Route(1, 3, torch.tensor([[0, 3], [2, 7]]))
    joined = fuse(route, walked, waited)
    torch.testing.assert_close(route.take(joined), (route.take(waited) + walked) / 2)
    torch.testing.assert_close(joined, route.put(route.take(joined), into=waited / 2))
    with torch.no_grad():
        fuse.mask.add_(4.0)
    moved = fuse(route, walked, waited) - joined
    torch.testing.assert_close(
        moved, route.put(torch.zeros(2, 2, 6), into=torch.full((2, 8, 6), 2.0))
    )


def test_sprint_fuses_without_a_route_too() -> None:
    config = tread.Config(kind="sprint", start=1, stop=3, carried=0)
    model, (x_t, t, text) = randomised(config), inputs()
    dense = model(x_t, t, text).x
    assert torch.equal(model(x_t, t, text, drawn(config, x_t)).x, dense)
    assert torch.equal(model.eval()(x_t, t, text).x, dense)  # as the averaged model draws
    assert model.fuse is not None
    torch.nn.init.zeros_(model.fuse.join.weight)
    assert not torch.equal(model(x_t, t, text).x, dense)


def test_sprint_computes_in_the_precision_of_the_blocks() -> None:
    config = tread.Config(kind="sprint", start=1, stop=3, carried=0.5)
    full, half = randomised(config), randomised(config)
    half.compute = torch.bfloat16
    x_t, t, text = inputs()
    guess, tapped = half(x_t, t, text, drawn(config, x_t), TAPS)
    assert {tap.tokens.dtype for tap in tapped} == {torch.bfloat16}
    reference = full(x_t, t, text, drawn(config, x_t)).x
    assert (guess - reference).norm() / reference.norm() < 0.05


@pytest.mark.parametrize("kind", ["tread", "sprint"])
def test_every_weight_learns_on_a_route(kind: str) -> None:
    config = tread.Config(kind=kind, start=1, stop=3, carried=0.5)
    model, (x_t, t, text) = randomised(config), inputs()
    model(x_t, t, text, drawn(config, x_t)).x.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_route_that_is_no_stretch_is_refused() -> None:
    with pytest.raises(ValidationError, match="start = 3 is not before stop = 3"):
        tread.Config(start=3, stop=3)
    with pytest.raises(ValidationError):
        tread.Config(stop=3, carried=1.0)
