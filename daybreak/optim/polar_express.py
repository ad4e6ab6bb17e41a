"""Orthogonalisation: rounds of matrix products that bring all singular values of a matrix near one.

    X <- (a + b S + c S^2) X,  S = X X^T          a round maps each s to a s + b s^3 + c s^5

Each round has its own (a, b, c), optimal for the interval of singular values left by the last one.

Letters  s singular value, r the shorter side of a matrix, c the longer one, k matrices of a shape.
Source   Polar Express, arXiv 2505.16932; rounds of products: kellerjordan.github.io/posts/muon.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# These (a, b, c) minimise the largest distance from one over an interval of s: [0.003, 1] for the
# first round, then the interval that the last round maps to. Each interval's upper end is raised by
# 2 %, because a norm in bfloat16 may be too small and a round diverges beyond its interval. After
# the last round the singular values are in [0.78, 1.22].
Round = tuple[float, float, float]
ROUNDS: tuple[Round, ...] = (
    (8.22176, -23.34686, 16.63376),
    (3.97276, -2.84494, 0.51701),
    (3.47347, -2.50575, 0.48102),
    (2.50437, -1.79072, 0.40706),
)
# The five equal rounds of the original Muon; they map singular values above 0.01 to [0.68, 1.20].
NEWTON_SCHULZ: tuple[Round, ...] = ((3.4445, -4.7750, 2.0315),) * 5
NAMED = {"polar-express": ROUNDS, "newton-schulz": NEWTON_SCHULZ}
TINY = 1e-7  # smallest norm that a matrix is divided by


def orthogonal(
    x: Float[Tensor, "k rows columns"], rounds: Sequence[Round] = ROUNDS
) -> Float[Tensor, "k rows columns"]:
    """Bring all singular values of each matrix near one: X <- (a + b S + c S^2) X, S = X X^T.

    Dividing by the Frobenius norm first makes all of them at most one. Those below 0.003 grow by a
    factor of up to 280 and do not reach one. Computed in the precision of `x`.
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
    """Return how many rounds are computed in pairs, and how many singly, for matrices of a shape.

    A pair costs 4 r^2 c + 10 r^3 multiplications and additions, two single rounds 8 r^2 c + 4 r^3.
    Pairs are used if c >= 2 r.
    """
    r, c = sorted(shape[-2:])
    return divmod(rounds, 2) if c >= 2 * r else (0, rounds)


def _two_rounds(
    x: Float[Tensor, "k rows columns"], first: Round, second: Round
) -> Float[Tensor, "k rows columns"]:
    """Compute two rounds with two products that involve the long side, not four.

    A round is X <- P X with P = a + b S + c S^2, so the next S is P S P, a product of small
    matrices. More than two rounds would not be safe: rounding can give S negative eigenvalues,
    which each round multiplies by a^2.
    """
    s = x @ x.mT
    a, b, c = first
    p = torch.baddbmm(s, s, s, beta=b, alpha=c)
    p.diagonal(dim1=-2, dim2=-1).add_(a)
    s = p @ s @ p
    a, b, c = second
    return torch.baddbmm(p, torch.baddbmm(s, s, s, beta=b, alpha=c), p, beta=a) @ x
