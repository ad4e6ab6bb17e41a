"""Products of tokens and weights: the same numbers, whichever library makes them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from daybreak.model import product

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has made this processor, large products go to oneDNN."""
    monkeypatch.setattr(product, "MKL_IS_SLOW", True)


def given(k: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((4, 160, k), (n, k), (n,))
    return tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)


@needs_onednn
@pytest.mark.parametrize(("k", "n"), [(192, 320), (320, 192)])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_torch(k: int, n: int, bias: bool) -> None:
    mine, reference = given(k, n), given(k, n)
    assert mine[0].numel() * n > product.SMALL
    direction = torch.randn(4, 160, n)
    outputs = [
        linear(x, weight, shift if bias else None)
        for linear, (x, weight, shift) in ((product.linear, mine), (F.linear, reference))
    ]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-5)
    assert type(outputs[0].grad_fn).__name__ != type(outputs[1].grad_fn).__name__
    for output in outputs:
        output.backward(direction)
    for one, other in zip(mine[: 2 + bias], reference, strict=False):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-5)


def test_what_is_small_or_not_float32_is_torchs_own_to_the_last_bit() -> None:
    few = given(16, 24)
    half = given(192, 320, torch.bfloat16)
    for x, weight, shift in (few, half):
        assert torch.equal(product.linear(x, weight, shift), F.linear(x, weight, shift))
        assert torch.equal(product.product(x, weight), F.linear(x, weight))


@needs_onednn
def test_it_is_one_graph_to_the_compiler_with_its_way_back() -> None:
    graph = torch.compile(product.linear, fullgraph=True, backend="aot_eager")
    mine, reference = given(192, 320), given(192, 320)
    for linear, (x, weight, _) in ((graph, mine), (product.linear, reference)):
        linear(x, weight).square().sum().backward()
    for one, other in zip(mine[:2], reference, strict=False):
        torch.testing.assert_close(one.grad, other.grad)


@needs_onednn
def test_its_flops_are_counted_forth_and_back() -> None:
    x, weight, _ = given(192, 320)
    with FlopCounterMode(display=False) as counter:
        product.linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * math.prod(x.shape) * len(weight)


@needs_onednn
def test_a_second_derivative_is_refused() -> None:
    x, weight, _ = given(192, 320)
    (slope,) = torch.autograd.grad(product.linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
