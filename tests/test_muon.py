"""Muon: the same steps as torch's on one device, and the same on many.

Run as a script under torchrun, this file is what each rank does.
"""

import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from daybreak.optim.muon import Muon, _stacks
from daybreak.optim.polar_express import NEWTON_SCHULZ, ROUNDS, orthogonal

pytestmark = pytest.mark.xdist_group("muon")  # one process makes what its tests share

EVEN = [(32, 16)] * 5 + [(16, 16)] * 3 + [(16, 48)] * 2 + [(32, 16)]
UNEVEN = [(10, 6)] * 3 + [(5, 9)] * 2 + [(3, 4)] * 5 + [(1, 8)]
STEPS = 4


class Matrices(nn.Module):
    """Matrices whose gradients are given: the loss is the sum of their products."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.each = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return torch.stack(
            [(matrix * g).sum() for matrix, g in zip(self.each, gradients, strict=True)]
        ).sum()


def train(
    matrices: Matrices, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> tuple[torch.optim.Optimizer, int]:
    """Take some steps; returns the optimiser, and the collectives of its last step."""
    optimizer = make(list(matrices.parameters()))
    generator = torch.Generator().manual_seed(1)
    shapes = [matrix.shape for matrix in matrices.each]
    for _ in range(STEPS):
        optimizer.zero_grad()
        matrices([torch.randn(shape, generator=generator) for shape in shapes]).backward()
        with CommDebugMode() as communication:
            optimizer.step()
    return optimizer, communication.get_total_counts()


def ours(parameters: list[nn.Parameter]) -> Muon:
    return Muon(parameters, lr=0.02, momentum=0.9, weight_decay=0.1, precision=torch.float32)


def moved(matrices: Matrices, start: Matrices) -> list[Tensor]:
    """How far each matrix has come."""
    return [
        (now.full_tensor() if isinstance(now, DTensor) else now).detach() - then.detach()
        for now, then in zip(matrices.each, start.each, strict=True)
    ]


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest relative difference of two lists of matrices."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))


class Case(NamedTuple):
    """What a rank has measured."""

    difference: float
    collectives: int
    groups: int
    state: bool  # a DTensor, placed like its weight


def case(shapes: list[tuple[int, int]], mesh_shape: tuple[int, ...]) -> Case:
    start, single, sharded = (Matrices(shapes) for _ in range(3))
    train(single, ours)
    names = ("dp_replicate", "dp_shard")[-len(mesh_shape) :]
    fully_shard(sharded, mesh=init_device_mesh("cpu", mesh_shape, mesh_dim_names=names))
    optimizer, collectives = train(sharded, ours)
    buffers = [(optimizer.state[weight]["momentum_buffer"], weight) for weight in sharded.each]
    return Case(
        difference(moved(sharded, start), moved(single, start)),
        collectives,
        len(set(shapes)),
        all(
            isinstance(buffer, DTensor)
            and isinstance(weight, DTensor)
            and buffer.placements == weight.placements
            and buffer.to_local().shape == weight.to_local().shape
            for buffer, weight in buffers
        ),
    )


def by_columns() -> str:
    """The sentence that refuses a matrix cut the other way."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(torch.zeros(8, 8), mesh, [Shard(1)]))
    try:
        Muon([weight], lr=0.1)
    except ValueError as error:
        return str(error)
    return ""


def refused() -> bool:
    """Whether sharded weights stay where they are in a step that no rank takes."""
    matrices = Matrices(UNEVEN)
    fully_shard(matrices, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    half = len(UNEVEN) // 2
    weights = list(matrices.parameters())
    optimizers = ours(weights[:half]), torch.optim.AdamW(weights[half:], lr=0.02, fused=True)
    kept = []
    for refuses in (0.0, 1.0):
        matrices([torch.full(shape, math.nan if refuses else 1.0) for shape in UNEVEN]).backward()
        before = [weight.detach().clone() for weight in weights]
        for optimizer in optimizers:
            optimizer.found_inf = torch.tensor(refuses)  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        kept.append([torch.equal(*pair) for pair in zip(weights, before, strict=True)])
    return not any(kept[0]) and all(kept[1])


def owned() -> list[int]:
    """How many matrices each rank owns of some that all differ in shape."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    different = [
        nn.Parameter(distribute_tensor(torch.zeros(8, 2 + number), mesh, [Shard(0)]))
        for number in range(2 * mesh.size())
    ]
    return [sum(each) for each in zip(*(stack.owned for stack in _stacks(different)), strict=True)]


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    meshes = [(size,), (size, 1), *([(2, 2)] if size == 4 else [])]
    found: dict[str, Any] = {
        f"{name} {mesh}": case(shapes, mesh)._asdict()
        for mesh in meshes
        for name, shapes in (("even", EVEN), ("uneven", UNEVEN))
    }
    found["by columns"] = by_columns()
    found["owned"] = owned()
    found["refused"] = refused()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.barrier()  # gloo aborts now and then where one rank leaves and the other still listens
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))


@pytest.mark.parametrize("shapes", [[(24, 16)] * 3 + [(16, 28)] * 2, [(16, 16)]])
def test_on_one_device_it_takes_the_steps_of_torch(shapes: list[tuple[int, int]]) -> None:
    start, mine, theirs = (Matrices(shapes) for _ in range(3))
    train(mine, lambda p: Muon(p, lr=0.02, momentum=0.9, weight_decay=0.1, rounds=NEWTON_SCHULZ))
    train(
        theirs,
        lambda p: torch.optim.Muon(
            p, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
    )
    # Both work in bfloat16, of 8 bits; here they round alike.
    assert difference(moved(mine, start), moved(theirs, start)) < 1e-3


def rounds(x: Tensor) -> Tensor:
    """One round after the other, for matrices of any shape."""
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    for a, b, c in ROUNDS:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


def test_each_round_is_the_best_for_where_the_last_one_leaves_the_singular_values() -> None:
    """Chebyshev: the best of three terms errs equally often, and as far, to either side four times.

    These are the ends of the interval and the two places between them where the curve is level.
    """
    low, high = 0.003, 1.0
    for a, b, c in ROUNDS:
        root = math.sqrt(9 * b * b - 20 * a * c)
        level = [math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1)]
        places = [low, *level, 1.02 * high]
        assert places == sorted(places)
        errors = [1 - (a * s + b * s**3 + c * s**5) for s in places]
        for one, other in itertools.pairwise(errors):
            assert one == pytest.approx(-other, abs=2e-3)
        low, high = 1 - errors[0], 1 + errors[0]
    assert 0.77 < low < high < 1.23


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
@pytest.mark.parametrize("rank", [1, 3])
def test_no_matrix_of_few_directions_explodes(rank: int, shape: tuple[int, int]) -> None:
    """All of its norm lies in few singular values, so that rounding may bring one above 1."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(200, side, rank, generator=generator) for side in shape)
    values = torch.linalg.svdvals(orthogonal((rows @ columns.mT).bfloat16()).float())
    assert 0.7 < float(values[:, 0].min()) <= float(values[:, 0].max()) < 1.3
    assert float(values[:, rank:].max()) < 0.5


@pytest.mark.parametrize("shape", [(48, 16), (16, 32), (16, 31), (16, 16)])
def test_two_rounds_at_once_are_two_rounds(shape: tuple[int, int]) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    assert float((orthogonal(x) - rounds(x)).norm() / rounds(x).norm()) < 1e-5


@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-6])
def test_rounding_hurts_two_rounds_at_once_no_more_than_one_at_a_time(smallest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(96, 336, generator=generator), full_matrices=False)
    x = ((u * torch.logspace(0, math.log10(smallest), 96)) @ v)[None]
    exact = rounds(x.double())
    one, two = (
        float((way(x.bfloat16()).double() - exact).norm() / exact.norm())
        for way in (rounds, orthogonal)
    )
    assert two < max(1.2 * one, 0.04)
    assert float(torch.linalg.matrix_norm(orthogonal(x.bfloat16()).float(), 2)) < 1.3


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_singular_vectors_stay_and_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    turned = u.mT @ orthogonal(x) @ v.mT
    values = turned.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(turned, torch.diag_embed(values), atol=1e-4, rtol=0)
    kept = s > 0.05 * s[:, :1]
    assert 0.6 < float(values[kept].min()) <= float(values.max()) < 1.3


def test_a_matrix_of_zeros_does_not_move() -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    weight.grad = torch.zeros(4, 3)
    Muon([weight], lr=0.1).step()
    assert torch.equal(weight, torch.ones(4, 3))


def test_a_matrix_without_gradient_is_left_alone() -> None:
    one, other = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    one.grad = torch.ones(4, 3)
    optimizer = Muon([one, other], lr=0.1)
    optimizer.step()
    assert torch.equal(other, torch.ones(4, 3))
    assert not torch.equal(one, torch.ones(4, 3))
    assert list(optimizer.state) == [one]


def test_gradients_that_come_and_go_are_dealt_anew() -> None:
    """An optimiser that has stepped before takes the step of one that knows only its state."""
    shapes = [(8, 6)] * 3 + [(6, 4)] * 2
    mine, theirs = list(Matrices(shapes).each), list(Matrices(shapes).each)
    optimizer, before = ours(mine), ours(theirs).state_dict()
    generator = torch.Generator().manual_seed(1)
    for learning in ([0, 1, 2, 3, 4], [0, 2, 3], [0, 2, 3], [1, 4], [], [0, 1, 2, 3, 4]):
        for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            gradient = torch.randn(one.shape, generator=generator)
            one.grad, other.grad = (
                gradient.clone() if number in learning else None for _ in range(2)
            )
        optimizer.step()
        fresh = ours(theirs)
        fresh.load_state_dict(before)
        fresh.step()
        before = fresh.state_dict()
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one, other)


def test_the_same_matrices_are_dealt_once() -> None:
    weights = list(Matrices(EVEN).parameters())
    optimizer = ours(weights)
    dealt = optimizer._stacks(0, weights)
    assert optimizer._stacks(0, list(weights)) is dealt
    assert optimizer._stacks(0, weights[1:]) is not dealt
    assert "_dealt" not in optimizer.state_dict()


def test_what_is_not_a_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not a parameter of shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


@pytest.fixture(scope="module", params=[2, 4])
def measured(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    on_ranks: Callable[..., str],
) -> dict[str, Any]:
    """What real gloo processes have measured."""
    out = tmp_path_factory.mktemp("muon") / "found.json"
    on_ranks(request.param, __file__, out)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_sharded_steps_are_those_of_one_device(measured: dict[str, Any]) -> None:
    differences = {
        name: found["difference"] for name, found in measured.items() if isinstance(found, dict)
    }
    assert len(differences) >= 4
    assert max(differences.values()) <= 1e-5, differences


def test_two_collectives_move_all_matrices_of_a_shape(measured: dict[str, Any]) -> None:
    for name, found in measured.items():
        if isinstance(found, dict):
            alone = name.endswith(", 1)")  # replicated only: every rank has whole matrices
            assert found["collectives"] == (0 if alone else 2 * found["groups"]), name


def test_state_is_sharded_like_the_weights(measured: dict[str, Any]) -> None:
    assert all(found["state"] for found in measured.values() if isinstance(found, dict))


def test_every_rank_owns_as_many_though_all_shapes_differ(measured: dict[str, Any]) -> None:
    assert set(measured["owned"]) == {2}


def test_a_step_that_is_refused_moves_no_row(measured: dict[str, Any]) -> None:
    assert measured["refused"] is True


def test_matrices_cut_by_columns_are_refused(measured: dict[str, Any]) -> None:
    assert "by rows" in measured["by columns"]


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_step_does_not_depend_on_how_large_gradients_are(size: float) -> None:
    x = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonal(size * x), orthogonal(x), rtol=1e-3, atol=1e-3)


def test_another_matrix_with_a_gradient_is_moved_in_its_turn() -> None:
    one, other = (nn.Parameter(torch.zeros(4, 6)) for _ in range(2))
    muon = Muon([one, other], lr=0.1, precision=torch.float32)
    one.grad = torch.randn(4, 6)
    muon.step()
    before, one.grad, other.grad = one.detach().clone(), None, torch.randn(4, 6)
    muon.step()
    assert torch.equal(one, before)
    assert other.any()
