"""x W^T by the faster of torch's two CPU libraries, MKL and oneDNN.

torch computes float32 products with MKL, which on processors not made by Intel uses half the width
of AVX512: 220 GFLOP/s, where oneDNN, which torch uses for bfloat16, reaches 490
(docs/performance.md). So on such processors large float32 products go to oneDNN; all others are
left to torch.

Letters  m rows, k and n sides of the weight.
Errors   Products by oneDNN have first derivatives only: a second one (`create_graph=True`) raises
         RuntimeError.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

SMALL = 2**25  # products with at most so many multiplications are left to torch


def linear(
    x: Float[Tensor, "*m k"], weight: Float[Tensor, "n k"], bias: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "*m n"]:
    """X W^T + b, in the precision of both."""
    if not _pays(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


class _Linear(Function):
    """y = x W^T; dx = dy W, dW = dy^T x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        return product(dy, weight.mT) if of_x else None, outer(dy, x) if of_weight else None


def product(x: Float[Tensor, "*m k"], weight: Float[Tensor, "n k"]) -> Float[Tensor, "*m n"]:
    """X W^T without a backward pass: nothing is stored for one."""
    if not _pays(x, weight):
        return F.linear(x, weight)
    return _onednn(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def outer(y: Float[Tensor, "*m n"], x: Float[Tensor, "*m k"]) -> Float[Tensor, "n k"]:
    """Y^T X, the sum over all rows."""
    left, right = y.flatten(0, -2).mT, x.flatten(0, -2).mT
    if not _pays(left, right):
        return left @ right.mT
    if len(left) > len(right):  # oneDNN copies its first operand to contiguous rows: the smaller
        return _onednn(right, left).mT
    return _onednn(left, right)


# A custom operator: `torch.compile` cannot handle `mkldnn._linear_pointwise`, but calls this as is.
torch.library.define("daybreak::onednn", "(Tensor x, Tensor weight) -> Tensor")


@torch.library.impl("daybreak::onednn", "CPU")
def _(x: Tensor, weight: Tensor) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return made


@torch.library.register_fake("daybreak::onednn")  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


_onednn: Callable[[Tensor, Tensor], Tensor] = torch.ops.daybreak.onednn.default


@register_flop_formula(torch.ops.daybreak.onednn)
def _flops(x: Sequence[int], weight: Sequence[int], **_: object) -> int:
    return 2 * math.prod(x) * weight[0]


def _pays(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() * len(weight) > SMALL
        and MKL_IS_SLOW
    )


def _mkl_is_slow() -> bool:
    """Whether this processor has AVX512 and is not made by Intel, the maker of MKL."""
    try:
        another = "GenuineIntel" not in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and another and torch.backends.mkldnn.is_available()


MKL_IS_SLOW = _mkl_is_slow()
