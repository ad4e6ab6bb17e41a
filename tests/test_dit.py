"""The denoiser is diffusers' PRXTransformer2DModel, tensor by tensor and number by number."""

import pytest
import torch
from einops import rearrange
from pydantic import ValidationError

from daybreak.model import backward, dit, tread
from daybreak.model.text import Text
from daybreak.train.dice import Dice

SMALL = dit.Config(patch=4, bottleneck=24, width=64, depth=3, heads=4, mlp=3.5)


def randomised(config: dit.Config, text_width: int = 20) -> dit.DiT:
    """A denoiser none of whose weights is zero, so that every path carries something."""
    torch.manual_seed(0)
    model = dit.DiT(config, text_width)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return model


def inputs(height: int = 16, width: int = 24) -> tuple[torch.Tensor, torch.Tensor, Text]:
    torch.manual_seed(1)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    image = torch.randn(2, 3, height, width)
    return image, torch.tensor([0.2, 0.9]), Text(torch.randn(2, 5, 20), mask)


@pytest.mark.parametrize("resolution", [False, True])
@pytest.mark.parametrize("bottleneck", [0, 24])
def test_it_equals_diffusers_on_the_same_weights(bottleneck: int, resolution: bool) -> None:
    from diffusers import PRXTransformer2DModel

    config = SMALL.model_copy(update={"bottleneck": bottleneck, "resolution": resolution})
    ours = randomised(config)
    theirs = PRXTransformer2DModel(
        in_channels=3,
        patch_size=4,
        context_in_dim=20,
        hidden_size=64,
        mlp_ratio=3.5,
        num_heads=4,
        depth=3,
        axes_dim=[8, 8],
        bottleneck_size=bottleneck or None,
        resolution_embeds=resolution,
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x_t, t, text = inputs()
    mine = ours(x_t, t, text).x
    reference = theirs(x_t, t, text.tokens, attention_mask=text.mask, return_dict=False)[0]
    assert (mine - reference).abs().max() < 1e-5 * reference.abs().max()

    mine.square().mean().backward()
    reference.square().mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)


def test_before_training_the_guess_is_grey() -> None:
    x_t, t, text = inputs()
    assert dit.DiT(SMALL, 20)(x_t, t, text).x.abs().max() == 0


def test_before_training_blocks_change_nothing_and_time_has_no_say() -> None:
    x_t, t, text = inputs()
    model = dit.DiT(SMALL, 20)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    guess = model(x_t, t, text, taps=(0, 2))
    first, last = guess.tapped
    assert torch.equal(first.tokens, last.tokens)
    assert guess.x.abs().max() > 0
    assert torch.equal(guess.x, model(x_t, 1 - t, text).x)


def test_an_inner_width_that_is_no_whole_number_is_cut_as_diffusers_cuts_it() -> None:
    from diffusers import PRXTransformer2DModel

    config = dit.Config(patch=4, bottleneck=0, width=36, depth=1, heads=3, mlp=2.6)  # 93.6
    theirs = PRXTransformer2DModel(
        in_channels=3,
        patch_size=4,
        context_in_dim=20,
        hidden_size=36,
        mlp_ratio=2.6,
        num_heads=3,
        depth=1,
        axes_dim=[6, 6],
    )
    theirs.load_state_dict(dit.DiT(config, 20).state_dict(), strict=True)


def test_only_sprint_adds_weights_to_those_that_diffusers_knows() -> None:
    plain = dit.DiT(SMALL, 20).state_dict().keys()
    for kind, more in (("tread", set()), ("deferred", set()), ("sprint", {"fuse"})):
        config = tread.Config.model_validate({"kind": kind, "stop": 3})
        names = dit.DiT(SMALL, 20, route=config).state_dict().keys()
        assert {name.split(".")[0] for name in names - plain} == more


def test_padding_words_are_inert() -> None:
    model = randomised(SMALL)
    x_t, t, text = inputs()
    garbage = text.tokens.masked_fill(~text.mask[..., None], 1e3)
    longer = Text(
        torch.nn.functional.pad(garbage, (0, 0, 0, 3)), torch.nn.functional.pad(text.mask, (0, 3))
    )
    torch.testing.assert_close(model(x_t, t, text).x, model(x_t, t, longer).x, atol=1e-5, rtol=1e-5)


def test_pictures_of_a_batch_do_not_see_one_another() -> None:
    model = randomised(SMALL)
    x_t, t, text = inputs()
    alone = model(x_t[1:], t[1:], Text(text.tokens[1:], text.mask[1:])).x
    torch.testing.assert_close(model(x_t, t, text).x[1:], alone, atol=1e-5, rtol=1e-5)


def test_attention_written_out_equals_the_fused_kernel() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16).bfloat16() for n in (10, 14, 14))
    mask = torch.rand(2, 14) > 0.3
    fused = dit.attend(q.float(), k.float(), v.float(), dit.bias_of(mask, torch.float32))
    written = dit.attend(q, k, v, dit.bias_of(mask, torch.bfloat16))
    assert written.dtype == torch.bfloat16
    torch.testing.assert_close(written.float(), fused, atol=2e-2, rtol=2e-2)


def test_compiled_or_not_a_turn_is_the_same_to_the_last_bit() -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(2, 3, 15, 16), dit.rope(3, 5, 16)
    compiled = torch.compile(backward.rotate, backend="eager")
    assert torch.equal(compiled(x, angles), backward.rotate(x, angles))


def test_compiled_or_not_gelu_is_the_same_function() -> None:
    x = torch.linspace(-8, 8, 999)
    compiled = torch.compile(backward.gelu, backend="eager")
    torch.testing.assert_close(compiled(x), backward.gelu(x), atol=1e-6, rtol=1e-6)
    assert compiled(x.bfloat16()).dtype == torch.bfloat16


def test_turning_keeps_lengths_and_depends_on_differences_of_position() -> None:
    angles = dit.rope(3, 5, 16)
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    turned_q = backward.rotate(q.expand(1, 1, 15, 16), angles)[0, 0]
    turned_k = backward.rotate(k.expand(1, 1, 15, 16), angles)[0, 0]
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(15))
    score = (turned_q @ turned_k.T).reshape(3, 5, 3, 5)
    torch.testing.assert_close(score[0, 1, 1, 3], score[1, 2, 2, 4], atol=1e-4, rtol=1e-4)


def test_half_precision_blocks_stay_close_to_full_precision() -> None:
    full, half = randomised(SMALL), randomised(SMALL)
    half.compute = torch.bfloat16
    x_t, t, text = inputs()
    guess, tapped = half(x_t, t, text, taps=(0, 2))
    assert {tap.tokens.dtype for tap in tapped} == {torch.bfloat16}
    assert guess.dtype == torch.float32
    reference = full(x_t, t, text).x
    assert (guess - reference).norm() / reference.norm() < 0.03


def test_in_half_precision_too_pixels_are_made_in_full_from_time_in_full() -> None:
    half = randomised(SMALL)
    half.compute = torch.bfloat16
    x_t, t, text = inputs()
    guess, (last,) = half(x_t, t, text, taps=(2,))
    time = half.time_in(dit.sinusoids(1000 * t, dit.FEATURES))
    pixels = half.final_layer(last.tokens.float(), time)
    expected = rearrange(pixels, "b (y x) (c p q) -> b c (y p) (x q)", y=4, p=4, q=4)
    assert torch.equal(guess, expected)


def test_sides_that_half_precision_cannot_tell_apart_are_told_apart() -> None:
    torch.manual_seed(0)
    told = dit.ResolutionEmbedder(32)
    one, other = (told(torch.empty(1, 3, 16, side).bfloat16()) for side in (1024, 1025))
    assert one.dtype == torch.float32
    assert not torch.allclose(one, other, atol=1e-3)


def test_blocks_compile_without_graph_breaks() -> None:
    model = randomised(SMALL)
    x_t, t, text = inputs()
    expected = model(x_t, t, text).x
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(x_t, t, text).x, expected)


def test_the_whole_network_is_one_graph_on_a_route_and_tapped() -> None:
    model = randomised(SMALL)
    x_t, t, text = inputs()
    route = tread.draw(tread.Config(start=1, stop=2), x_t, SMALL.patch, Dice(0, 0, 0, 2))
    expected = model(x_t, t, text, route, (1,))
    whole = torch.compile(model, fullgraph=True, backend="eager")
    guess = whole(x_t, t, text, route, (1,))
    torch.testing.assert_close(guess.x, expected.x)
    torch.testing.assert_close(guess.tapped[0].tokens, expected.tapped[0].tokens)


def test_the_published_model_has_its_published_size() -> None:
    config = dit.Config(patch=32, bottleneck=256, width=1792, depth=16, heads=28)
    with torch.device("meta"):
        model = dit.DiT(config, 2304)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_177_215_744
    assert len(model.state_dict()) == 190


def test_impossible_sizes_are_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="heads = 3 does not divide width = 64"):
        dit.Config(width=64, heads=3)
    with pytest.raises(ValidationError, match="multiple of 4"):
        dit.Config(width=60, heads=10)


def test_a_small_pictures_patches_lie_in_the_middle_of_those_they_stand_for() -> None:
    coarse, fine = dit.rope(2, 2, 4, stretch=2.0), dit.rope(4, 4, 4)  # one pair an axis, turn 1
    place = torch.atan2(coarse[:, 1::2], coarse[:, ::2])
    whole = torch.atan2(fine[:, 1::2], fine[:, ::2]).view(4, 4, 2)
    parts = whole.view(2, 2, 2, 2, 2).mean((1, 3)).view(4, 2)
    torch.testing.assert_close(place, parts)


def test_a_rotary_table_is_made_once_for_a_resolution_and_serves_training_after_drawing() -> None:
    config = dit.Config(patch=4, native=16, bottleneck=0, width=32, depth=2, heads=2)
    model = dit.DiT(config, text_width=8)
    words = Text(torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool))
    t = torch.rand(2)
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16), t, words)
    (table,) = model._tables.values()
    model(torch.randn(2, 3, 16, 16), t, words).x.sum().backward()
    assert next(iter(model._tables.values())) is table
    model(torch.randn(2, 3, 16, 32), t, words)
    assert len(model._tables) == 2
    assert torch.equal(table, dit.rope(4, 4, 16))


def test_only_pictures_smaller_than_native_are_stretched_and_all_shapes_of_a_size_alike() -> None:
    size = dit.Config(patch=4, width=32, heads=2, native=64)
    sides = [(64, 64), (48, 84), (128, 128), (32, 32), (24, 44), (16, 64), (64, 16), (16, 16)]
    assert [size.stretch(*side) for side in sides] == [1, 1, 1, 2, 2, 2, 2, 4]
    assert dit.Config(patch=4, width=32, heads=2).stretch(16, 16) == 1


def test_the_network_sees_a_small_picture_at_its_native_places() -> None:
    def drawn(native: int, side: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = dit.DiT(
            dit.Config(patch=4, bottleneck=0, width=32, depth=2, heads=2, native=native), 8
        )
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        words = Text(torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))
        x = torch.randn(1, 3, side, side)
        with torch.no_grad():
            return model(x, torch.tensor([0.5]), words).x

    assert torch.equal(drawn(0, 16), drawn(16, 16))
    assert not torch.allclose(drawn(0, 16), drawn(32, 16), atol=1e-3)
