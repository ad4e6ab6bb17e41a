"""One run on many processes.

One process, started plainly or by torchrun, is alone: nothing here changes what it computes. Of
several each is a rank of a mesh, dp_replicate x dp_shard: weights, average and optimiser state are
cut into rows over `dp_shard` and repeated over `dp_replicate` (FSDP2; both above one: HSDP). A
global batch is shared out evenly, so the steps are the same for any number of ranks, to rounding.

    with world(config, batches) as here:
        prepare(model.dit, model.dit.blocks, here, config, compute)      in place; average alike
        first, count = share(here, batch)                                this rank's samples
        accumulate((model.dit,), config, last)                           before each micro-batch
        norm = clip(here, parameters, limit)                             of the whole gradient
        rows = gather(here, row)                                         everybody's numbers
        found = together(here, work)                                     beside the steps

What is frozen is not prepared: every rank keeps a copy.

Letters  r ranks.
Source   FSDP2: docs.pytorch.org, torch.distributed.fsdp.fully_shard; HSDP: arXiv 2304.11277.
"""

import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
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
    TCPStore,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from daybreak.failure import BadRecipe, Failure, LostPeer
from daybreak.train import accelerator

# Sharded tensors take a second to import, and a recipe names only Config: they are imported where
# they are used.

COLLECTIVE = timedelta(hours=1)  # the watchdog (train/watchdog) speaks long before
GOODBYE = timedelta(seconds=20)
ROLL_CALL = 3.0  # seconds in which who is still there says so
Found = TypeVar("Found")


class Config(BaseModel):
    """How weights and work are spread over the ranks.

    `dp_shard = 0` takes all ranks that `dp_replicate` leaves. `reshard_after_forward` frees a
    block's weights between forward and backward pass: less memory, one more gathering.
    `recompute` forgets what is inside a block and computes it again. `start_timeout`, in seconds,
    is how long ranks wait for one another at the start.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dp_replicate: int = Field(default=1, gt=0)
    dp_shard: int = Field(default=0, ge=0)
    reshard_after_forward: bool = False
    recompute: bool = False
    start_timeout: float = Field(default=300.0, gt=0)


class World(NamedTuple):
    """A process among its peers. Without a mesh it is alone."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    store: Store  # where ranks leave each other notes, without a collective
    group: dist.ProcessGroup | None = None  # for what one thread does beside the steps

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes for all."""
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """How many times over the weights are held, each time by several ranks or by one."""
        return self.mesh.size(0) if self.mesh is not None and self.mesh.ndim > 1 else 1


@contextmanager
def world(config: Config, batches: Sequence[int] = ()) -> Iterator[World]:
    """Join the other ranks, if torchrun has started any, and leave them at the end.

    `batches` are the global batches of the run, so that one that cannot be shared is refused here.

    Errors  BadRecipe before any rank meets another, if mesh or batches do not fit their number;
            LostPeer if they do not all meet, or if one is lost later.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    shards = _shards(config, size, batches)
    device = _device()
    if size == 1:  # nothing to cut: FSDP would copy, and change nothing
        try:
            yield World(0, 1, device, None, HashStore())
        except torch.AcceleratorError as error:
            if not _is_broken(error):
                raise
            raise _broken(device, 0, error) from error
        return

    rank = int(os.environ["RANK"])
    store = _meet(rank, size, config.start_timeout)
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
        if _is_broken(error):
            broken = _broken(device, rank, error)
            _leave_note(store, rank, broken)
            raise broken from error
        if not _is_loss(error):
            _leave_note(store, rank, error)
            raise
        known = note(store)
        gone = [] if known else _absent(store, rank, size)
        silent = f"{', '.join(f'rank {number}' for number in gone)} does not answer" if gone else ""
        raise LostPeer(
            lost(rank, known or silent or str(error).splitlines()[0]), gone[0] if gone else None
        ) from error
    _farewell(store, rank, size)
    dist.destroy_process_group()  # only where nobody is lost: it may wait for them


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
    """Return where this rank's samples begin in a global batch, and how many they are."""
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
    """Make a module and its blocks ready to learn, in place: names and call stay as they are.

    Blocks are gathered one at a time, in the precision they compute in, and the rest of the module
    in its own, float32; gradients are averaged in float32. Arguments are never cast: 1000 t in
    bfloat16 would be another time. Weights must be equal on all ranks before. Afterwards all ranks
    must call the module equally often, and one that learns only where a backward pass follows.

    An average is prepared like its model, with `reshard_after_forward`, so that after a forward
    pass its parameters are the rows again that it has to move.
    """
    blocks = list(blocks)
    for block in blocks:  # in the order that torch asks for
        if config.recompute:
            from torch.distributed._composable import checkpoint  # type: ignore[attr-defined]

            checkpoint(block, preserve_rng_state=False)
        if compiled:
            # What a product needs on the way back may be worked out again: half as much is kept,
            # for no time (docs/performance.md).
            torch._functorch.config.ban_recompute_materialized_backward = False
            block.compile(dynamic=False)
    if here.mesh is None:
        return

    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    narrow = None if compute == torch.float32 else compute
    policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    for part, precision in (*((block, policy) for block in blocks), (module, whole)):
        fully_shard(
            part,
            mesh=here.mesh,
            reshard_after_forward=config.reshard_after_forward,
            mp_policy=precision,
        )


def accumulate(modules: Iterable[nn.Module], config: Config, last: bool) -> None:
    """Say before a micro-batch whether it is the last of its step.

    Until then gradients add up on their rank, and gathered weights stay, so that a step moves as
    much as with one micro-batch (unless `reshard_after_forward` trades that for memory).
    """
    from torch.distributed.fsdp import FSDPModule

    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_is_last_backward(last)
            module.set_requires_gradient_sync(last)
            module.set_reshard_after_backward(last or config.reshard_after_forward)


def clip(here: World, parameters: Iterable[nn.Parameter], limit: float) -> Float[Tensor, ""]:
    """Shorten the gradient to `limit`, if it is longer; return its norm, equal on all ranks.

    Replicas take the first one's norm: each adds it up by itself, and in another order it could
    differ in its last bit, and then all weights would.
    """
    from torch.distributed.tensor import DTensor

    learning = [parameter for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm([p.grad for p in learning if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if here.mesh is not None and here.mesh.ndim > 1:
        dist.broadcast(norm, 0)
    # Times one changes nothing; but only where no device has to be waited for is it known before.
    if norm.device.type != "cpu" or not norm + 1e-6 <= limit:
        clip_grads_with_norm_(learning, limit, norm)
    return norm


def gather(here: World, row: Shaped[Tensor, " n"]) -> Shaped[Tensor, "r n"]:
    """Return the row of numbers that every rank has given, in the order of the ranks.

    Means, maxima and "any of them" follow from it, the same on all ranks to the last bit: a loss,
    whether it is finite, whether somebody was asked to stop. A row in the processor's memory
    travels from there, and no rank waits for its device.
    """
    if here.mesh is None:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(here.size)]
    dist.all_gather(rows, row)
    return torch.stack(rows)


def together(here: World, work: Callable[[], Found]) -> list[Found]:
    """Do something on every rank; return what each has found, in their order.

    For what happens beside the steps, in one thread at a time.

    Errors  the failure of the first rank that met one, on all ranks.
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


def fulfil(pending: Future[Found], work: Callable[[], Found]) -> None:
    """Do some work and keep what comes of it, also where that is no Exception."""
    try:
        found = work()
    except BaseException as error:  # noqa: BLE001 - whoever asks for the result raises it again
        pending.set_exception(error)
    else:
        pending.set_result(found)


def answer(here: World) -> None:
    """Say that this rank is there, if somebody asks; for a thread that is never in a collective."""
    with suppress(dist.DistError):
        if here.store.check(["who is there?"]):
            here.store.set(f"rank {here.rank} is there", "")


def note(store: Store) -> str:
    """Return what the first rank that failed has left, if one has and could."""
    with suppress(dist.DistError):
        if store.check(["note"]):
            return store.get("note").decode()
    return ""


def lost(rank: int, why: str) -> str:
    """The sentence of a rank that cannot go on without the others."""
    again = "the same command continues from the last checkpoint"
    return f"rank {rank} lost the others ({why}): {again}"


def _absent(store: Store, rank: int, size: int) -> list[int]:
    """Return the ranks that do not answer; none where nobody keeps notes any more."""
    until, gone = time.monotonic() + ROLL_CALL, list[int]()
    with suppress(dist.DistError):
        store.set("who is there?", "")
        store.set(f"rank {rank} is there", "")
        while gone := [n for n in range(size) if not store.check([f"rank {n} is there"])]:
            if time.monotonic() > until:
                return gone
            time.sleep(0.1)
    return []


def _shards(config: Config, size: int, batches: Sequence[int]) -> int:
    """Return the ranks that share one copy of the weights. Errors: BadRecipe."""
    replicate, shards = config.dp_replicate, config.dp_shard or size // config.dp_replicate
    if replicate * shards != size:
        wanted = f"dp_replicate = {replicate}" + (
            f" times dp_shard = {shards} makes {replicate * shards} processes, and this run has"
            if config.dp_shard
            else " does not divide the number of processes, which is"
        )
        raise BadRecipe(
            f"[parallel] {wanted} {size}: start another number with torchrun --nproc-per-node, or "
            "change [parallel]"
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
            f"this machine has {there} GPUs and too many processes: start torchrun with "
            f"--nproc-per-node {there}"
        )
    return accelerator.choose(number)


def _meet(rank: int, size: int, seconds: float) -> Store:
    """Find the other ranks at MASTER_ADDR:MASTER_PORT; torchrun may have opened it for them.

    Errors  LostPeer, after `seconds` at most, with the ranks that have not come.
    """
    host, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "0"))
    until = time.monotonic() + seconds
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):  # one machine: nobody else need hear
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    names = [f"rank {number}" for number in range(size)]
    store: Store | None = None
    try:
        if not opens:
            _knock(host, port, until)
        base = _connected(host, port, size, opens, until)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"daybreak/{attempt}", base)
        store.set(names[rank], socket.gethostname())
        store.wait(names, timedelta(seconds=max(0.1, until - time.monotonic())))
    except (OSError, dist.DistError) as error:
        missing = _missing(store, names) if store else []
        raise LostPeer(
            f"{', '.join(missing)} of {size} did not come within {seconds:.0f} s: see why in their "
            "logs, and start all of them again"
            if missing
            else f"{names[rank]} cannot meet the others at {host}:{port} "
            f"({str(error).splitlines()[0]}): check MASTER_ADDR and MASTER_PORT"
        ) from error
    return store


def _knock(host: str, port: int, until: float) -> None:
    """Wait until somebody listens there. Errors: OSError when it is too late."""
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _connected(host: str, port: int, size: int, opens: bool, until: float) -> Store:
    """Open the store there, or connect to it. Errors: OSError or DistError.

    In a thread, for torch waits for ever where somebody listens who is no store.
    """
    found: Future[Store] = Future()
    left = max(0.1, until - time.monotonic())
    wait = timedelta(seconds=left)

    def connect() -> Store:
        return TCPStore(host, port, size, opens, wait, wait_for_workers=False)

    threading.Thread(target=fulfil, args=(found, connect), name="meet", daemon=True).start()
    try:
        return found.result(left)
    except TimeoutError as error:
        raise TimeoutError("whoever listens there does not answer") from error


def _missing(store: Store, names: Sequence[str]) -> list[str]:
    with suppress(dist.DistError):
        return [name for name in names if not store.check([name])]
    return []


def _farewell(store: Store, rank: int, size: int) -> None:
    """Wait until all are done, so that nobody hangs up on a rank that still listens."""
    with suppress(dist.DistError):
        store.set(f"rank {rank} is done", "")
        store.wait([f"rank {number} is done" for number in range(size)], GOODBYE)


def _is_broken(error: Exception) -> bool:
    """Whether this rank's device is to blame (ECC, Xid, NVLink), not code, memory or its age."""
    others = ("device-side assert triggered", "out of memory", "no kernel image")
    return isinstance(error, torch.AcceleratorError) and not any(
        other in str(error) for other in others
    )


def _broken(device: torch.device, rank: int, error: Exception) -> LostPeer:
    return LostPeer(
        f"{device} on {socket.gethostname()} failed ({str(error).splitlines()[0]}): the same "
        "command continues from the last checkpoint; if it fails again, without it",
        rank,
    )


def _is_loss(error: Exception) -> bool:
    """Whether another rank is to blame. gloo has no error class; its messages name its source."""
    signs = ("gloo/transport", "caused pair closure", "NCCL")
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and any(sign in str(error) for sign in signs)
    )


def _leave_note(store: Store, rank: int, error: Exception) -> None:
    """Tell the others why this rank goes; the first note is the cause."""
    with suppress(dist.DistError):
        store.compare_set("note", "", f"rank {rank}: {error}"[:500])
