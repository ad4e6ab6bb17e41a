"""Backward passes written by hand are those of autograd, and keep less."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from daybreak.model import backward, dit


class Case(NamedTuple):
    """A function written by hand, and the same as its equation has it."""

    by_hand: Callable[..., Tensor]
    written_out: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]  # of what gradients flow to
    rest: tuple[Tensor | None, ...] = ()


ANGLES = dit.rope(3, 4, 16)
BIAS = dit.bias_of(torch.arange(17).expand(2, 17) > 2, torch.float32)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def turned(x: Tensor, weight: Tensor, angles: Tensor | None) -> Tensor:
    u = F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)
    return u if angles is None else backward.rotate(u, angles)


def gated(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    return (F.gelu(gate, approximate="tanh") * up) @ weight.mT


def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


CASES = {
    "modulated norm": Case(backward.modulate, modulated, ((2, 12, 32), (2, 1, 32), (2, 1, 32))),
    "turned norm": Case(backward.head_norm, turned, ((2, 3, 12, 16), (16,)), (ANGLES,)),
    "norm": Case(backward.head_norm, turned, ((2, 3, 12, 16), (16,)), (None,)),
    "gated MLP": Case(backward.gated, gated, ((2, 12, 56), (2, 12, 56), (16, 56))),
    "attention": Case(
        backward.attention, attended, ((2, 3, 12, 16), (2, 3, 17, 16), (2, 3, 17, 16)), (BIAS,)
    ),
}


def test_a_small_scale_is_not_rounded_away_in_half_precision() -> None:
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale, shift = torch.full((2, 1, 32), 0.0035).bfloat16(), torch.zeros(2, 1, 32).bfloat16()
    exact = modulated(x.float(), scale.float(), shift.float()).bfloat16()
    assert torch.equal(backward.modulate(x, scale, shift), exact)
    assert not torch.equal(backward.modulate(x, 0 * scale, shift), exact)


def test_a_small_scale_is_not_rounded_away_on_the_way_back_either() -> None:
    x, du = torch.randn(2, 2, 12, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale, shift = torch.full((2, 1, 32), 0.0035).bfloat16(), torch.zeros(2, 1, 32).bfloat16()
    exact, x = x.float().requires_grad_(), x.requires_grad_()
    modulated(exact, scale.float(), shift.float()).backward(du.float())
    backward.modulate(x, scale, shift).backward(du)
    assert x.grad is not None
    assert exact.grad is not None
    along = (x.grad.float() * exact.grad).sum() / exact.grad.square().sum()
    assert abs(float(along) - 1) < 0.0005


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_equation(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    given = [torch.randn(shape).to(dtype) for shape in case.shapes]
    if "norm" in name and name != "modulated norm":
        given[1] = given[1].float()  # the scale of a head is a weight
    exact = [tensor.float() for tensor in given]
    for tensor in (*given, *exact):
        tensor.requires_grad_()
    mine = case.by_hand(*given, *case.rest)
    reference = case.written_out(*exact, *case.rest)
    assert mine.dtype == dtype
    direction = torch.randn(mine.shape).to(dtype)
    mine.backward(direction)
    reference.backward(direction.float())
    atol, rtol = (1e-5, 1e-5) if dtype == torch.float32 else (0.1, 0.02)
    torch.testing.assert_close(mine.float(), reference, atol=atol, rtol=rtol)
    for tensor, wanted in zip(given, exact, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        torch.testing.assert_close(tensor.grad.float(), wanted.grad, atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_compiled_they_are_the_same_functions(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    given = [torch.randn(shape).to(dtype) for shape in case.shapes]
    if "norm" in name and name != "modulated norm":
        given[1] = given[1].float()  # the scale of a head is a weight
    again = [tensor.clone() for tensor in given]
    for tensor in (*given, *again):
        tensor.requires_grad_()
    mine = case.by_hand(*given, *case.rest)
    compiled = torch.compile(case.by_hand, fullgraph=True, backend="aot_eager")(*again, *case.rest)
    assert compiled.dtype == dtype
    direction = torch.randn(mine.shape).to(dtype)
    mine.backward(direction)
    compiled.backward(direction)
    atol, rtol = (1e-5, 1e-5) if dtype == torch.float32 else (0.1, 0.02)
    torch.testing.assert_close(compiled, mine, atol=atol, rtol=rtol)
    for one, other in zip(again, given, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=atol, rtol=rtol)


@pytest.mark.parametrize("name", ["norm", "modulated norm"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_row_that_is_almost_nothing_is_made_as_large_as_the_floor_allows(
    name: str, compiled: bool
) -> None:
    case = CASES[name]
    torch._dynamo.reset()
    function = torch.compile(case.by_hand, backend="eager") if compiled else case.by_hand
    x = 1e-3 * torch.randn(case.shapes[0], generator=torch.Generator().manual_seed(0))
    rest = [torch.ones(shape) for shape in case.shapes[1:]]
    exact = case.written_out(x, *rest, *case.rest)
    torch.testing.assert_close(function(x, *rest, *case.rest), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_is_what_came_in_and_a_little_for_each_row(name: str) -> None:
    case = CASES[name]
    given = [torch.randn(shape, requires_grad=True) for shape in case.shapes]
    came_in = {tensor.untyped_storage().data_ptr() for tensor in (*given, ANGLES, BIAS)}
    kept = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in came_in:
            kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        case.by_hand(*given, *case.rest)
    b, n = given[0].shape[0], given[0].shape[-2]
    a_little = {"modulated norm": 2 * b * n, "gated MLP": 0, "attention": b * 3 * n * 17}
    assert sum(kept) == a_little.get(name, b * 3 * n)


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_refused(name: str) -> None:
    case = CASES[name]
    x, *others = (torch.randn(shape, requires_grad=True) for shape in case.shapes)
    u = case.by_hand(x, *others, *case.rest)
    (gradient,) = torch.autograd.grad(u.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
