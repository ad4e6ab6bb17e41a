"""Rounds of products that bring all singular values of a matrix near one.

    X <- (a + b S + c S^2) X,  S = X X^T          a round makes a s + b s^3 + c s^5 of each s

Each round has its own (a, b, c): the best for where the last one has left the singular values.

Letters  s singular value, r the shorter side of a matrix, c the longer one, k matrices of a shape.
Source   Polar Express, arXiv 2505.16932; rounds of products: kellerjordan.github.io/posts/muon.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# A round makes a s + b s^3 + c s^5 of a singular value s. Of all (a, b, c) these bring the worst of
# an interval nearest to one: first of [0.003, 1], then each time of where the last one has left it.
# Each interval is taken 2 % higher, since a norm in bfloat16 may be too small and beyond its end a
# round explodes. The last one leaves [0.78, 1.22].
Round = tuple[float, float, float]
ROUNDS: tuple[Round, ...] = (
    (8.22176, -23.34686, 16.63376),
    (3.97276, -2.84494, 0.51701),
    (3.47347, -2.50575, 0.48102),
    (2.50437, -1.79072, 0.40706),
)
# The five of the first Muon, all alike, which leave [0.68, 1.20] of what was above 0.01.
NEWTON_SCHULZ: tuple[Round, ...] = ((3.4445, -4.7750, 2.0315),) * 5
NAMED = {"polar-express": ROUNDS, "newton-schulz": NEWTON_SCHULZ}
TINY = 1e-7  # a matrix of a smaller norm is not made longer


def orthogonal(
    x: Float[Tensor, "k rows columns"], rounds: Sequence[Round] = ROUNDS
) -> Float[Tensor, "k rows columns"]:
    """Bring all singular values of each matrix near one: X <- (a + b S + c S^2) X, S = X X^T.

    None has to be known: at first all are at most one, the norm of the matrix. Those below 0.003
    grow by 280 and stay behind. Computed in the precision of `x`.
    """
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT  # S is then the smaller of the two squares
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=TINY)
    pairs, _ = pairing(x.shape, len(rounds))
    for first, second in zip(rounds[: 2 * pairs : 2], rounds[1 : 2 * pairs : 2], strict=True):
        x = _two_rounds(x, first, second)
    for a, b, c in rounds[2 * pairs :]:
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def pairing(shape: Sequence[int], rounds: int = len(ROUNDS)) -> tuple[int, int]:
    """How many pairs of rounds, and how many single ones, matrices of a shape are taken through.

    A pair costs 4 r^2 c + 10 r^3 products and sums, two single rounds 8 r^2 c + 4 r^3, r being the
    shorter side: a pair pays where the other is long.
    """
    r, c = sorted(shape[-2:])
    return divmod(rounds, 2) if c >= 2 * r else (0, rounds)


def _two_rounds(
    x: Float[Tensor, "k rows columns"], first: Round, second: Round
) -> Float[Tensor, "k rows columns"]:
    """Take two rounds that touch the long side only twice, not four times.

    A round is X <- P X with P = a + b S + c S^2, so the next one's S is P S P: small matrices. Not
    more than two: rounded S may have values below zero, which each round makes a^2 times larger.
    """
    s = x @ x.mT
    a, b, c = first
    p = torch.baddbmm(s, s, s, beta=b, alpha=c)
    p.diagonal(dim1=-2, dim2=-1).add_(a)
    s = p @ s @ p
    a, b, c = second
    return torch.baddbmm(p, torch.baddbmm(s, s, s, beta=b, alpha=c), p, beta=a) @ x
