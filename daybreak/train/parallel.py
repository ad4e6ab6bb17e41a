"""One run on many processes.

For a single process, started plainly or by torchrun, nothing here changes what it computes. Several
processes are the ranks of a mesh, dp_replicate x dp_shard: weights, average and optimiser state are
sharded by rows over `dp_shard` and replicated over `dp_replicate` (FSDP2; both above one: HSDP). A
global batch is divided evenly, so the steps are the same for any number of ranks, up to rounding.

    with world(config, batches) as here:
        prepare(model.dit, model.dit.blocks, here, config, compute)      in place; average too
        first, count = share(here, batch)                                this rank's samples
        accumulate((model.dit,), config, last)                           before each micro-batch
        norm = clip(here, parameters, limit)                             of the whole gradient
        rows = gather(here, row)                                         every rank's numbers
        found = together(here, work)                                     outside the steps

Frozen networks are not prepared: every rank keeps a full copy.

Letters  r ranks.
Source   FSDP2: docs.pytorch.org, torch.distributed.fsdp.fully_shard; HSDP: arXiv 2304.11277.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.distributed import (  # type: ignore[attr-defined]  # public, though not declared so
    HashStore,
    PrefixStore,
    Store,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.utils import get_total_norm

from daybreak import host
from daybreak.failure import BadRecipe, Failure, told
from daybreak.train import accelerator, rendezvous

# Sharded tensors take a second to import, and a recipe needs only Config, so they are imported
# where they are used.

# Fused multiply-add, rounded once: a step on a CPU takes a tenth less.
KERNELS = {"cpp.enable_floating_point_contract_flag": "fast"}
COLLECTIVE = timedelta(hours=1)  # the watchdog (train/watchdog) ends a hang long before
TOGETHER = 2  # blocks gathered at once: one by one takes a seventh more host time
Found = TypeVar("Found")


class Config(BaseModel):
    """How weights and work are distributed over the ranks.

    `dp_shard = 0` means all ranks divided by `dp_replicate`. `reshard_after_forward` frees a
    block's weights between forward and backward pass: less memory, one more all-gather.
    `recompute` drops the activations inside a block and computes them again. `start_timeout`, in
    seconds, is how long ranks wait for one another at the start.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dp_replicate: int = Field(default=1, gt=0)
    dp_shard: int = Field(default=0, ge=0)
    reshard_after_forward: bool = False
    recompute: bool = False
    start_timeout: float = Field(default=300.0, gt=0)


class World(NamedTuple):
    """A process and the others of its run. Without a mesh it is the only one."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    store: Store  # where ranks leave each other notes, without a collective
    group: dist.ProcessGroup | None = None  # for the work of one thread outside the steps

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes for all."""
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """How many copies of the weights there are, each held by one or several ranks."""
        return self.mesh.size(0) if self.mesh is not None and self.mesh.ndim > 1 else 1


@contextmanager
def world(config: Config, batches: Sequence[int] = ()) -> Iterator[World]:
    """Join the other ranks, if torchrun has started any, and leave them at the end.

    `batches` are the run's global batch sizes; one that cannot be divided evenly is refused here.

    Errors  BadRecipe before ranks connect, if mesh or batches do not fit the number of ranks;
            LostPeer if not all ranks connect, or if one is lost later.
    """
    size = host.processes()
    shards = _shards(config, size, batches)
    device = _device()
    if size == 1:  # nothing to shard: FSDP would only make copies
        try:
            yield World(0, 1, device, None, HashStore())
        except torch.AcceleratorError as error:
            if not rendezvous.is_broken(error):
                raise
            raise rendezvous.broken(device, 0, error) from error
        return

    rank = int(os.environ["RANK"])
    store = rendezvous.meet(rank, size, config.start_timeout)
    # torchrun makes torch abort this process when NCCL reports a lost node: then nothing would say
    # why.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE,
        )
        mesh = init_device_mesh(
            device.type,
            (config.dp_replicate, shards),
            mesh_dim_names=("dp_replicate", "dp_shard"),
        )
        one_axis = config.dp_replicate == 1
        group = dist.new_group(backend="gloo", timeout=COLLECTIVE)
        yield World(rank, size, device, mesh["dp_shard"] if one_axis else mesh, store, group)
    except Exception as error:
        if rendezvous.is_broken(error):
            broken = rendezvous.broken(device, rank, error)
            rendezvous.leave_note(store, rank, broken)
            raise broken from error
        if not rendezvous.is_loss(error):
            rendezvous.leave_note(store, rank, error)
            raise
        known = rendezvous.note(store)
        gone = [] if known else rendezvous.absent(store, rank, size)
        silent = f"{', '.join(f'rank {number}' for number in gone)} does not answer" if gone else ""
        first = gone[0] if gone else None
        raise rendezvous.lost(rank, known, silent or told(error), first) from error
    rendezvous.farewell(store, rank, size)
    leave()  # only if no rank is lost: it may wait for the others


def leave() -> None:
    """Leave the process group, and clear torch's references to it.

    torch caches per thread how sharded tensors were handled, and the cache refers to the group. A
    worker forked from another thread drops that cache at once. If it held the last reference to the
    group, the worker would wait for ever for the group's threads, which a fork does not have.
    """
    dist.destroy_process_group()
    with suppress(ImportError):  # a name that torch may change
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()


def check_shares(batches: Sequence[int], count: int) -> None:
    """Refuse a number of devices that does not divide the stages' batches. Errors: BadRecipe."""
    common = math.gcd(*batches)
    if common % count:
        near = max(number for number in range(1, count) if common % number == 0)
        number = next(number for number, batch in enumerate(batches) if batch % count)
        raise BadRecipe(
            f"{count} devices cannot share stage.{number}.batch = {batches[number]} evenly: {near} "
            f"can, or set a batch that {count} divides"
        )


def share(here: World, batch: int) -> tuple[int, int]:
    """Return the index of this rank's first sample in a global batch, and how many it has."""
    count = batch // here.size
    return here.rank * count, count


def prepare(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    here: World,
    config: Config,
    compute: torch.dtype = torch.float32,
    compiled: bool = False,
) -> None:
    """Prepare a module and its blocks for training, in place: names and calls stay the same.

    Blocks are gathered two at a time in the precision they compute in, the rest of the module in
    float32; gradients are averaged in float32. Arguments are never cast: 1000 t in bfloat16 would
    be a different time. Weights must be equal on all ranks beforehand. Afterwards all ranks must
    call the module equally often, and a module that learns only where a backward pass follows.

    An average is prepared like its model, with `reshard_after_forward`, so that after a forward
    pass its parameters are again the sharded rows, which the update needs.
    """
    if compiled:
        from torch._functorch import config as functorch

        # Inputs of matrix products may be recomputed in the backward pass: this halves what is kept
        # and costs no time (docs/performance.md).
        functorch.ban_recompute_materialized_backward = False
    blocks = list(blocks)
    for block in blocks:  # checkpoint, compile, shard: the order that torch requires
        if config.recompute:
            from torch.distributed._composable import checkpoint  # type: ignore[attr-defined]

            checkpoint(block, preserve_rng_state=False)
        if compiled:
            block.compile(dynamic=False, options=KERNELS)
    if here.mesh is None:
        return

    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    narrow = None if compute == torch.float32 else compute
    policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    units = [blocks[first : first + TOGETHER] for first in range(0, len(blocks), TOGETHER)]
    for unit, precision in (*((unit, policy) for unit in units), ([module], whole)):
        fully_shard(
            unit,
            mesh=here.mesh,
            reshard_after_forward=config.reshard_after_forward,
            mp_policy=precision,
        )
    if not config.reshard_after_forward:  # gather the next unit before the host reaches it
        for (block, *_), (following, *_) in itertools.pairwise(units):
            if isinstance(block, FSDPModule) and isinstance(following, FSDPModule):
                block.set_modules_to_forward_prefetch([following])


def accumulate(modules: Iterable[nn.Module], config: Config, last: bool) -> None:
    """Announce, before each micro-batch, whether it is the last of its step.

    Until the last, gradients add up on their rank and gathered weights stay, so that a step sends
    no more than with one micro-batch (unless `reshard_after_forward` trades that for memory).
    """
    from torch.distributed.fsdp import FSDPModule

    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_is_last_backward(last)
            module.set_requires_gradient_sync(last)
            module.set_reshard_after_backward(last or config.reshard_after_forward)


def clip(here: World, parameters: Iterable[nn.Parameter], limit: float) -> Float[Tensor, ""]:
    """Scale the gradient down to norm `limit`, if larger; return its norm, equal on all ranks.

    Each rank sums over its own rows, then one all-reduce sums over all ranks. If each replica
    computed the sum by itself, they could differ in the last bit, and then so would all weights.
    """
    rows = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm(rows)
    if here.mesh is not None:
        squares = norm.square()
        dist.all_reduce(squares)
        norm = (squares / here.replicas).sqrt()
    # A factor of one changes nothing, so it is skipped on a CPU; a GPU would have to be waited for.
    if norm.device.type != "cpu" or not norm + 1e-6 <= limit:
        torch._foreach_mul_(rows, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def local(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this rank holds, or all of it if it is not sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(here: World, row: Shaped[Tensor, "..."]) -> Shaped[Tensor, "r ..."]:
    """Return the rows of numbers, or tables, of all ranks, in the order of the ranks.

    Means, maxima and "any of them" computed from it are the same on all ranks to the last bit: a
    loss, whether it is finite, whether a rank was asked to stop. A row in CPU memory is sent from
    there, without waiting for the device.
    """
    if here.mesh is None:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(here.size)]
    dist.all_gather(rows, row)
    return torch.stack(rows)


def together(here: World, work: Callable[[], Found]) -> list[Found]:
    """Call `work` on every rank; return the results of all, in the order of the ranks.

    For work outside the steps, in one thread at a time.

    Errors  the failure of the lowest rank that had one, on all ranks.
    """
    mine: tuple[Found | None, Failure | None]
    try:
        mine = work(), None
    except Failure as failure:
        mine = None, failure
    rows: list[Any] = [mine]
    if here.group is not None:
        rows = [None] * here.size
        dist.all_gather_object(rows, mine, group=here.group)
    failures = [failure for _, failure in rows if failure is not None]
    if failures:
        raise failures[0]
    return [found for found, _ in rows]


def _shards(config: Config, size: int, batches: Sequence[int]) -> int:
    """Return how many ranks share one copy of the weights. Errors: BadRecipe."""
    replicate, shards = config.dp_replicate, config.dp_shard or size // config.dp_replicate
    if replicate * shards != size:
        wanted = f"dp_replicate = {replicate}" + (
            f" times dp_shard = {shards} makes {replicate * shards} processes, and this run has"
            if config.dp_shard
            else " does not divide the number of processes, which is"
        )
        raise BadRecipe(
            f"[parallel] {wanted} {size}: change [parallel], or the number of processes with "
            "torchrun --nproc-per-node"
        )
    check_shares(batches, size)
    return shards


def _device() -> torch.device:
    """Return this rank's device. Errors: BadRecipe if there are fewer GPUs than ranks."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise BadRecipe(
            f"this machine has {there} GPUs and more processes than that: start torchrun with "
            f"--nproc-per-node {there}"
        )
    return accelerator.choose(number)
