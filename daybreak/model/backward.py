"""The operations between a block's matrix products, with backward passes written by hand.

Autograd stores every intermediate result of a norm, a rotation, a gate or a softmax. Storing only
the argument and recomputing the intermediate results in the backward pass costs less memory and
less time (docs/performance.md). No matrix product is computed twice. `torch.compile` derives its
own backward pass, so it gets the same equations as plain operations.

Letters  b images, n tokens, h width, m inner width of the MLP, a heads, d width of a head, k keys.
Errors   Only first derivatives exist: a second one (`create_graph=True`) raises RuntimeError.
Source   recomputation: arXiv 1604.06174; attention: arXiv 2205.14135, appendix B.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from daybreak.model import product

EPSILON = 1e-6  # of norms


def modulate(
    x: Float[Tensor, "b n h"], scale: Float[Tensor, "b 1 h"], shift: Float[Tensor, "b 1 h"]
) -> Float[Tensor, "b n h"]:
    """(1 + scale) LayerNorm(x) + shift, in float32; the norm has no parameters of its own."""
    if torch.compiler.is_compiling():
        y = F.layer_norm(x.float(), x.shape[-1:], eps=EPSILON)
        return ((1 + scale) * y + shift).to(x.dtype)
    modulated: Tensor = _Modulate.apply(x, scale, shift)  # type: ignore[no-untyped-call]
    return modulated


class _Modulate(Function):
    """u = s y + shift, y = (x - mean) / deviation, s = 1 + scale.

    d shift = sum_n du, d scale = sum_n du y, dx = (s du - mean(s du) - y mean(s du y)) / deviation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y, mean, inverse = torch.native_layer_norm(x.float(), x.shape[-1:], None, None, EPSILON)
        ctx.save_for_backward(x, scale, mean, inverse)
        return ((1 + scale.float()) * y + shift).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale, mean, inverse = ctx.saved_tensors
        full, du, s = x.float(), du.float(), 1 + scale.float()
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            s * du, full, x.shape[-1:], mean, inverse, None, None, [True, False, False]
        )
        dscale = (full - mean).mul_(inverse).mul_(du).sum(1, keepdim=True)
        dshift = du.sum(1, keepdim=True)
        return dx.to(x.dtype), dscale.to(scale.dtype), dshift.to(scale.dtype)


def head_norm(
    x: Float[Tensor, "b a n d"],
    weight: Float[Tensor, " d"],
    angles: Float[Tensor, "... n d"] | None = None,
) -> Float[Tensor, "b a n d"]:
    """RMSNorm over the width of a head, then rotation by `angles`, if given, in float32."""
    if torch.compiler.is_compiling():
        full = x.float()
        u = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + EPSILON) * weight
        return (u if angles is None else rotate(u, angles)).to(x.dtype)
    normed: Tensor = _HeadNorm.apply(x, weight, angles)  # type: ignore[no-untyped-call]
    return normed


class _HeadNorm(Function):
    """u = rotate(w y), y = x / root, root = sqrt(mean x^2).

    With e = rotate^-1(du): dw = sum e y, dx = (w e - y mean(w e y)) / root.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, angles: Tensor | None) -> Tensor:
        full = x.float()
        inverse = torch.rsqrt(full.square().mean(-1, keepdim=True) + EPSILON)
        ctx.save_for_backward(x, weight, angles, inverse)
        u = (full * inverse).mul_(weight)
        return (u if angles is None else rotate(u, angles)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, angles, inverse = ctx.saved_tensors
        e = du.float().contiguous()
        if angles is not None:
            e = rotate(e, angles, back=True)
        y = x.float() * inverse
        along = e * y
        mean = (along @ weight.float())[..., None] / len(weight)
        dx = (e * weight).addcmul_(y, mean, value=-1).mul_(inverse)
        return dx.to(x.dtype), along.sum((0, 1, 2)).to(weight.dtype), None


def rotate(
    x: Float[Tensor, "b a n d"], angles: Float[Tensor, "... n d"], back: bool = False
) -> Float[Tensor, "b a n d"]:
    """Rotate neighbouring pairs: (x + i y) -> (x + i y) (cos + i sin), or `back`: (cos - i sin).

    `torch.compile` does not support complex numbers, so it gets the same product in real ones.
    """
    pairs, turns = x.unflatten(-1, (-1, 2)), angles.unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():
        turning = torch.view_as_complex(turns)
        turned = torch.view_as_complex(pairs) * (turning.conj() if back else turning)
        return torch.view_as_real(turned).flatten(-2)
    (even, odd), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def attention(
    q: Float[Tensor, "b a n d"],
    k: Float[Tensor, "b a k d"],
    v: Float[Tensor, "b a k d"],
    bias: Float[Tensor, "b 1 1 k"],
) -> Float[Tensor, "b a n d"]:
    """softmax(q k^T / sqrt(d) + bias) v, without a fused kernel."""
    if torch.compiler.is_compiling():
        return _weights(q, k, bias) @ v
    answer: Tensor = _Attention.apply(q, k, v, bias)  # type: ignore[no-untyped-call]
    return answer


class _Attention(Function):
    """u = P v; P is stored for the backward pass, in the precision of q.

    With e = du v^T: dv = P^T du, ds = P (e - sum_k e P) / sqrt(d), dq = ds k, dk = ds^T q.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        p = _weights(q, k, bias)
        ctx.save_for_backward(q, k, v, p)
        return p @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, p = ctx.saved_tensors
        ds = torch.ops.aten._softmax_backward_data(du @ v.mT, p, -1, p.dtype)
        ds = ds.mul_(q.shape[-1] ** -0.5)
        return ds @ k, ds.mT @ q, p.mT @ du, None


def _weights(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    score = torch.add(bias, (q @ k.mT).float(), alpha=q.shape[-1] ** -0.5)
    return score.softmax(-1).to(q.dtype)


def gated(
    gate: Float[Tensor, "b n m"], up: Float[Tensor, "b n m"], weight: Float[Tensor, "h m"]
) -> Float[Tensor, "b n h"]:
    """(gelu(gate) up) W^T: the gate of an MLP and its last matrix product."""
    if torch.compiler.is_compiling():
        return product.linear(gelu(gate) * up, weight)
    projected: Tensor = _Gated.apply(gate, up, weight)  # type: ignore[no-untyped-call]
    return projected


class _Gated(Function):
    """u = (g up) W^T, g = gelu(gate).

    With e = du W: dW = du^T (g up), d up = e g, d gate = e up gelu'(gate).
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return product.product(gelu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, weight = ctx.saved_tensors
        e, g = product.product(du, weight.mT), gelu(gate)
        dgate = torch.ops.aten.gelu_backward(e * up, gate, approximate="tanh")
        dup = e.mul_(g)
        return dgate, dup, product.outer(du, g.mul_(up))


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, x (1 + tanh z) / 2 = x sigmoid(2 z).

    When compiled, the second form costs half: it needs an exponential, not a hyperbolic tangent.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    cube = x.float() * (1 + 0.044715 * x.float().square())
    return (x.float() * torch.sigmoid(math.sqrt(8 / math.pi) * cube)).to(x.dtype)
