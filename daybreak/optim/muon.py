"""Muon: orthogonalised momentum; each matrix is orthogonalised by one rank, its owner.

    B <- m B + (1 - m) G                                    momentum of the gradient
    U  = m B + (1 - m) G                                    Nesterov momentum
    W <- (1 - lr decay) W - 0.2 lr sqrt(max(rows, columns)) orthogonal(U)

`orthogonal` needs the whole matrix, but under FSDP2 a rank holds only some of its rows. So the
matrices of one shape are dealt out over the ranks that share them. One all-to-all brings each owner
the rows of its matrices, it orthogonalises all of them at once, and a second all-to-all returns the
rows. The exchanges of different shapes overlap with the computation. Replicas of HSDP all do the
same work, so nothing is sent between them.

Rows are sent in the precision of the orthogonalisation, to which they would be rounded anyway. So
the owner gets exactly the matrix that a single device would have.

Letters  m momentum, k matrices of one shape.
Source   kellerjordan.github.io/posts/muon; scale 0.2 sqrt(max(rows, columns)): arXiv 2502.16982;
         `orthogonal`: optim/polar_express.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from daybreak.optim.polar_express import ROUNDS, Round, orthogonal


class Muon(Optimizer):
    """SGD with orthogonalised momentum, for matrices.

    A weight matrix moves along U V^T instead of its momentum U S V^T, so that every direction gets
    a step of about the same length. With `rounds` = NEWTON_SCHULZ the steps on one device equal
    those of `torch.optim.Muon` with `match_rms_adamw`, to rounding. On several devices, two
    collectives serve all matrices of one shape. Every rank must have gradients for the same ones.

    If the attribute `found_inf` is set, as in torch's fused optimisers, a step changes nothing when
    that tensor is 1; the host does not read it.

    Shapes  parameters (rows, columns): plain tensors, or DTensors sharded by rows, evenly or not,
            along one mesh dimension and replicated along the others. State is like the parameters.
    Units   lr as in AdamW: the update has an RMS of about 0.2 lr, whatever the shape.
    Errors  ValueError for a parameter that is not a matrix, or is sharded by columns.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        precision: torch.dtype = torch.bfloat16,
        rounds: Sequence[Round] = ROUNDS,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.precision, self.rounds = precision, rounds
        self._dealt: dict[int, tuple[list[int], list[Stack]]] = {}  # by group
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(
                        f"Muon moves matrices, not a parameter of shape {tuple(parameter.shape)}"
                    )
                _sharers(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Take one step: all exchanges in parallel; without any, one shape after the other."""
        refused: Tensor | None = getattr(self, "found_inf", None)
        for number, group in enumerate(self.param_groups):
            stacks = self._stacks(number, [p for p in group["params"] if p.grad is not None])
            alone = all(stack.group is None for stack in stacks)
            for some in [[stack] for stack in stacks] if alone else [stacks]:
                coming = [
                    stack.gather(self._updates(stack, group["momentum"], refused)) for stack in some
                ]
                going = [
                    stack.scatter(orthogonal(stack.whole(rows.open()), self.rounds))
                    for stack, rows in zip(some, coming, strict=True)
                ]
                for stack, rows in zip(some, going, strict=True):
                    stack.move(rows.open(), group["lr"], group["weight_decay"], refused)

    def _stacks(self, number: int, weights: list[nn.Parameter]) -> list["Stack"]:
        """Deal out the matrices of a group, or return the last step's stacks if they are the same.

        Finding the process groups of 120 DTensors takes 0.8 ms before the first kernel of a step.
        The stacks keep their matrices alive, so no other matrix can have the same `id`.
        """
        which = [id(weight) for weight in weights]
        before, stacks = self._dealt.get(number, ([], []))
        if which != before:
            stacks = _stacks(weights)
            self._dealt[number] = which, stacks
        return stacks

    def _updates(
        self, stack: "Stack", momentum: float, refused: Float[Tensor, ""] | None
    ) -> Float[Tensor, "k held columns"]:
        """Update the momentum from the gradients; return this rank's rows of U.

        On a CPU one matrix after the other, so that each stays in cache; else all at once. In a
        refused step the momentum takes the place of the gradient, which leaves it unchanged.
        """
        buffers, gradients = [], []
        stays = None if refused is None else refused > 0
        for weight in stack.weights:
            gradient, state = weight.grad, self.state[weight]
            assert gradient is not None
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            buffers.append(_local(state["momentum_buffer"]))
            gradients.append(_local(gradient))
            if stays is not None:
                torch.where(stays, buffers[-1], gradients[-1], out=gradients[-1])
        first = gradients[0]
        ahead = first.new_empty((len(gradients), *first.shape), dtype=self.precision)
        at_once = 1 if first.device.type == "cpu" else len(gradients)
        for begin in range(0, len(gradients), at_once):
            some = slice(begin, begin + at_once)
            torch._foreach_lerp_(buffers[some], gradients[some], 1 - momentum)
            points = torch._foreach_lerp(gradients[some], buffers[some], momentum)
            torch._foreach_copy_(list(ahead[some]), points)
        return ahead


class Parcel(NamedTuple):
    """A tensor that a collective may still be writing."""

    tensor: Tensor
    work: dist.Work | None

    def open(self) -> Tensor:
        """Wait for the collective and return the tensor."""
        if self.work:
            self.work.wait()
        return self.tensor


class Stack(NamedTuple):
    """Matrices of one shape, sorted by owner, and how the ranks of a group share them.

    Between two ranks one piece is sent: the rows that one holds of all matrices the other owns.
    """

    weights: list[nn.Parameter]
    owned: list[int]  # how many of them each rank owns
    held: list[int]  # how many rows of each of them each rank holds
    rank: int
    group: dist.ProcessGroup | None  # None: one rank owns and holds everything

    def gather(self, rows: Float[Tensor, "k held columns"]) -> Parcel:
        """Send the rows held here to the owners of their matrices."""
        return self._exchange(rows.flatten(), self._by_owner(), self._by_holder())

    def whole(self, pieces: Float[Tensor, " n"]) -> Float[Tensor, "mine rows columns"]:
        """Assemble the matrices owned here from the rows that every holder has sent."""
        mine, columns = self.owned[self.rank], self.weights[0].shape[1]
        parts = zip(pieces.split(self._by_holder()), self.held, strict=True)
        return _joined([part.view(mine, held, columns) for part, held in parts], dim=1)

    def scatter(self, matrices: Float[Tensor, "mine rows columns"]) -> Parcel:
        """Send the rows of the matrices owned here back to their holders."""
        pieces = _joined([rows.flatten() for rows in matrices.split(self.held, dim=1)])
        return self._exchange(pieces, self._by_holder(), self._by_owner())

    def move(
        self,
        pieces: Float[Tensor, " n"],
        lr: float,
        weight_decay: float,
        refused: Float[Tensor, ""] | None,
    ) -> None:
        """Update the rows held here by the returned directions, unless the step is refused."""
        rows, columns = self.weights[0].shape
        weights = [_local(weight) for weight in self.weights]
        directions = pieces.view(len(weights), self.held[self.rank], columns)
        decay: float | Tensor = lr * weight_decay
        if refused is not None:
            taken = 1 - refused
            decay, directions = decay * taken, directions * taken
        if weight_decay:
            torch._foreach_mul_(weights, 1 - decay)
        scale = -0.2 * lr * math.sqrt(max(rows, columns))
        torch._foreach_add_(weights, list(directions), alpha=scale)

    def _by_owner(self) -> list[int]:
        held = self.held[self.rank] * self.weights[0].shape[1]
        return [owned * held for owned in self.owned]

    def _by_holder(self) -> list[int]:
        owned = self.owned[self.rank] * self.weights[0].shape[1]
        return [owned * held for held in self.held]

    def _exchange(self, pieces: Tensor, out: list[int], back: list[int]) -> Parcel:
        """Start a collective; `out` and `back` are the sizes of the pieces by rank."""
        if self.group is None:
            return Parcel(pieces, None)
        came = pieces.new_empty(sum(back))
        work = dist.all_to_all_single(came, pieces, back, out, self.group, async_op=True)
        return Parcel(came, work)


def _stacks(weights: Sequence[nn.Parameter]) -> list[Stack]:
    """Group matrices by shape and deal them out, each stack from the rank after the last one's."""
    by_shape: dict[tuple[torch.Size, dist.ProcessGroup | None], list[nn.Parameter]] = {}
    for weight in weights:
        by_shape.setdefault((weight.shape, _sharers(weight)), []).append(weight)
    stacks, dealt = [], 0
    for (shape, group), equal in by_shape.items():
        size = group.size() if group else 1
        hands = [equal[(rank - dealt) % size :: size] for rank in range(size)]
        share = -(-shape[0] // size)  # FSDP2 cuts as torch.chunk does: the last ranks hold less
        held = [max(0, min(share, shape[0] - rank * share)) for rank in range(size)]
        order = [weight for hand in hands for weight in hand]
        rank = group.rank() if group else 0
        stacks.append(Stack(order, [len(hand) for hand in hands], held, rank, group))
        dealt += len(equal)
    return stacks


def _sharers(weight: Tensor) -> dist.ProcessGroup | None:
    """Return the group of ranks that hold rows of a matrix, or None if this one holds them all."""
    if not isinstance(weight, DTensor):
        return None
    sharded = [axis for axis, place in enumerate(weight.placements) if place != Replicate()]
    if [weight.placements[axis] for axis in sharded] not in ([], [Shard(0)]):
        raise ValueError(f"Muon shares matrices by rows, not as {weight.placements}")
    groups = [weight.device_mesh.get_group(axis) for axis in sharded]
    return next((group for group in groups if group.size() > 1), None)


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
