"""One run on many processes: the same steps on 1, 2 and 4, and clear words where it cannot be.

Run as a script under torchrun, this file is what each rank does.
"""

import gc
import json
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from daybreak.data import batches, loader, scenes
from daybreak.failure import BadData, BadRecipe, Failure, LostPeer
from daybreak.model import dit, text
from daybreak.optim import ema, groups
from daybreak.train import parallel
from daybreak.train.dice import Dice
from daybreak.train.parallel import Config, World
from tests import warm

pytestmark = pytest.mark.xdist_group("parallel")  # one process makes what its tests share

CAPTIONS = ["a red circle", "", "a blue square and a green star", "two"] * 3
WORDS = text.Config(width=16, depth=1, heads=2, vocabulary=300, max_tokens=24)
BATCH, SIDE, STEPS = 12, 16, 4


class Count(TorchDispatchMode):
    """Counts collectives, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in {"c10d", "_c10d_functional"}:
            self.seen[func.__name__.split(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


class Taken(NamedTuple):
    """What some steps have left behind."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]  # trained and averaged
    collectives: dict[str, int]  # of forward and backward passes of the last step


class Network(nn.Module):
    """A small denoiser, with a text encoder or with words from nowhere (quicker to import)."""

    def __init__(self, spoken: bool, compute: torch.dtype) -> None:
        super().__init__()
        size = dit.Config(patch=4, bottleneck=0, width=24, depth=3, heads=2)
        self.dit = dit.DiT(size, WORDS.width, compute=compute)
        self.text: text.TextEncoder | None = None
        if spoken:
            tokenizer = text.learn_tokenizer(CAPTIONS, WORDS)
            self.text = text.scratch(WORDS, tokenizer, compute)
        generator = torch.Generator().manual_seed(0)
        for weight in self.parameters():
            with torch.no_grad():  # what begins at zero would hide what is wrong
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)

    def forward(self, dice: Dice, captions: list[str]) -> Tensor:
        x, t = dice.normal(3, SIDE, SIDE), dice.uniform()
        words = self.text(captions) if self.text else said(dice)
        return (self.dit(x, t, words).x - x).square().mean()

    def prepare(self, here: World, config: Config, compute: torch.dtype = torch.float32) -> None:
        parallel.prepare(self.dit, self.dit.blocks, here, config, compute)
        if self.text:
            parallel.prepare(self.text, (), here, config, compute)


def said(dice: Dice) -> text.Text:
    words = dice.normal(3, WORDS.width)
    return text.Text(words, torch.ones(words.shape[:2], dtype=torch.bool))


def take_steps(here: World, config: Config, micro: int = 0, spoken: bool = False) -> Taken:
    """Train a small model as the training loop does."""
    model, twin = (Network(spoken, torch.float32) for _ in range(2))
    model.prepare(here, config)
    twin.prepare(here, Config(reshard_after_forward=True))
    optimizers = groups.optimizers(model, groups.MuonConfig(), groups.AdamWConfig())
    groups.set_rate(optimizers, 2e-4)
    average = ema.Ema(twin, ema.Config(decay=0.9))
    first, count = parallel.share(here, BATCH)
    size = micro or count
    losses, norms, seen = [], [], Counter[str]()
    for step in range(1, STEPS + 1):
        total = torch.zeros(())
        with Count() as collectives:
            for start in range(first, first + count, size):
                captions = CAPTIONS[start : start + size]
                parallel.accumulate(model.children(), config, start + size == first + count)
                loss = model(Dice(0, step, start, size), captions) * (size / count)
                loss.backward()
                total += loss.detach()
        seen = collectives.seen
        norm = parallel.clip(here, model.parameters(), 1.0)
        for optimizer, _ in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():  # as a grid of pictures does
            average.model(Dice(0, step, start, size), captions)
        average.update(model, step)
        row = parallel.gather(here, torch.stack([total, norm])).mean(0)
        losses.append(float(row[0]))
        norms.append(float(row[1]))
    weights = {
        f"{name}.{key}": whole(value.detach()).clone()
        for name, owner in (("model", model), ("average", average.model))
        for key, value in owner.named_parameters()
    }
    return Taken(losses, norms, weights, dict(seen))


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def guess(here: World, t: float, compute: torch.dtype) -> Tensor:
    """What a model that computes in `compute` guesses at one time."""
    model, dice = Network(False, compute), Dice(0, 0, 0, 2)
    model.prepare(here, Config(), compute)
    with torch.no_grad():
        return model.dit(dice.normal(3, SIDE, SIDE), torch.full((2,), t), said(dice)).x


CASES = {
    "shards": (Config(), 0),
    "again": (Config(), 0),
    "micro-batches": (Config(), 1),
    "reshard": (Config(reshard_after_forward=True), 0),
    "recompute": (Config(recompute=True), 1),
    "recompute, reshard": (Config(recompute=True, reshard_after_forward=True), 0),
}


def test_workers_begin_after_a_world_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    linear = nn.Linear(4, 4)
    fully_shard(linear, mesh=init_device_mesh("cpu", (1,)))
    with torch.no_grad():
        linear.weight.mul_(2.0)
    del linear
    parallel.leave()
    gc.collect()  # nobody holds the group but what torch remembers
    monkeypatch.setattr(loader, "START", 15.0)
    monkeypatch.setattr(loader, "STARTS", 1)
    config = batches.Config(source="scenes", workers=1)
    source = batches.Scenes(scenes.Config(canvas="32"), seed=5)
    assert len(list(loader.stream(source, config, 5, 32, batch=2, first=0, count=2))) == 2


def train(out: Path) -> None:
    """Take the steps of every case that tells something at this number of ranks."""
    with parallel.world(Config(), [BATCH]) as here:
        mesh = init_device_mesh(
            "cpu", (2, here.size // 2), mesh_dim_names=("dp_replicate", "dp_shard")
        )
        taken = {"hybrid": take_steps(here._replace(mesh=mesh), Config())}
        if here.size == 2:
            taken |= {name: take_steps(here, *case) for name, case in CASES.items()}
            taken["spoken"] = take_steps(here, Config(), spoken=True)
        else:
            taken["shards"] = take_steps(here, Config())
        found = {name: (t.losses, t.norms, t.collectives) for name, t in taken.items()}
        drawn = guess(here, 0.501, torch.bfloat16)
        rows = parallel.gather(here, torch.tensor([here.rank, 10.0]))
        if here.first:
            out.mkdir()
            (out / "found.json").write_text(json.dumps(found))
            for name, one in taken.items():
                save_file(one.weights, out / f"{name}.safetensors")
            save_file({"guess": drawn, "rows": rows}, out / "other.safetensors")


ERRORS = {
    "broken": "CUDA error: uncorrectable ECC error encountered\nSearch for `cudaErrorECC...",
    "wrong": "CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' in ...",
}


def fail(how: str) -> None:
    """Let rank 1 fail in the middle of a run, one way or the other."""
    with parallel.world(Config(start_timeout=60)) as here:
        parallel.gather(here, torch.ones(1))
        if here.rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how in ERRORS:
                raise torch.AcceleratorError(ERRORS[how])
            raise BadData("tooth.png is not a picture")
        parallel.gather(here, torch.ones(1))


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]))
    else:
        try:
            fail(sys.argv[1])
        except Failure as failure:
            print(failure, flush=True)
            os._exit(failure.code)  # as the command line leaves


@pytest.fixture(scope="module")
def alone() -> dict[bool, Taken]:
    """The same steps on a plain start, without and with a text encoder."""
    with parallel.world(Config(), [BATCH]) as here:
        return {spoken: take_steps(here, Config(), spoken=spoken) for spoken in (False, True)}


class Found(NamedTuple):
    """What a number of ranks has left, by case."""

    ranks: int
    taken: dict[str, Taken]
    other: dict[str, Tensor]


@pytest.fixture(scope="module", params=[2, 4])
def found(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    on_ranks: Callable[..., str],
) -> Found:
    out = tmp_path_factory.mktemp("parallel") / "out"
    on_ranks(request.param, __file__, "train", out)
    cases = json.loads((out / "found.json").read_text())
    taken = {
        name: Taken(losses, norms, load_file(out / f"{name}.safetensors"), collectives)
        for name, (losses, norms, collectives) in cases.items()
    }
    return Found(request.param, taken, load_file(out / "other.safetensors"))


def apart(value: Tensor, wanted: Tensor) -> float:
    return float((value - wanted).norm() / wanted.norm())


def test_any_number_of_ranks_takes_the_same_steps(found: Found, alone: dict[bool, Taken]) -> None:
    for name, taken in found.taken.items():
        wanted = alone[name == "spoken"]
        np.testing.assert_allclose(taken.losses, wanted.losses, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(taken.norms, wanted.norms, rtol=1e-4, err_msg=name)
        assert taken.weights.keys() == wanted.weights.keys()
        assert max(apart(taken.weights[key], wanted.weights[key]) for key in wanted.weights) < 1e-4


def test_one_rank_is_a_plain_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with parallel.world(Config()) as here:
        assert (here.rank, here.size, here.mesh) == (0, 1, None)
        assert here.first


def test_the_same_ranks_take_the_same_steps_to_the_last_bit(found: Found) -> None:
    if found.ranks == 2:
        one, other = found.taken["shards"], found.taken["again"]
        assert one.losses == other.losses
        assert all(torch.equal(value, other.weights[key]) for key, value in one.weights.items())


def test_micro_batches_move_no_more_than_one_batch(found: Found) -> None:
    if found.ranks == 2:
        once, often = (found.taken[name].collectives for name in ("shards", "micro-batches"))
        assert once == often
        # Two blocks, one, and the rest of the denoiser: each gathered and reduced once.
        assert once == {"allgather_base": 3, "reduce_scatter_base": 3}


def test_weights_given_up_after_the_forward_pass_are_gathered_again(found: Found) -> None:
    if found.ranks == 2:
        assert found.taken["reshard"].collectives["allgather_base"] > 3


def test_time_is_never_rounded(found: Found) -> None:
    with parallel.world(Config()) as here:
        right, rounded = (guess(here, t, torch.bfloat16) for t in (0.501, 0.5))
    assert torch.tensor(0.501).bfloat16() == 0.5
    error = (found.other["guess"] - right).norm()
    assert error < 0.1 * (rounded - right).norm()


def test_everybody_sees_the_numbers_of_all(found: Found) -> None:
    assert found.other["rows"].tolist() == [[rank, 10.0] for rank in range(found.ranks)]


@pytest.mark.slow  # the compiler is asked
def test_a_compiled_block_rounds_a_product_and_its_sum_once() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x - (1 + 2**-11)

    block, plain = Block(), World(0, 1, torch.device("cpu"), None, HashStore())
    x = torch.full((4096,), 1 + 2**-12)
    assert not block(x).any()  # 1 + 2^-11 + 2^-24 is rounded before the rest is taken off
    parallel.prepare(block, [block], plain, Config(), compiled=True)
    assert torch.equal(block(x), torch.full_like(x, 2**-24))


def test_shares_are_a_batch_cut_evenly() -> None:
    plain = World(0, 1, torch.device("cpu"), None, HashStore())
    assert parallel.share(plain, 24) == (0, 24)
    ranks = [plain._replace(rank=rank, size=3) for rank in range(3)]
    assert [parallel.share(rank, 24) for rank in ranks] == [(0, 8), (8, 8), (16, 8)]


def test_the_number_that_is_named_can_share_the_batch_of_every_stage() -> None:
    for count in (2, 3, 4):
        with pytest.raises(BadRecipe, match=r"evenly: 1 can"):
            parallel.check_shares([9, 8], count)
    with pytest.raises(BadRecipe, match=r"stage\.1\.batch = 18 evenly: 6 can"):
        parallel.check_shares([24, 18], 8)
    parallel.check_shares([24, 18], 6)


@pytest.mark.parametrize(
    ("size", "config", "sentence"),
    [
        ("8", Config(dp_replicate=2, dp_shard=3), "makes 6 processes, and this run has 8: change"),
        (
            "7",
            Config(dp_replicate=2),
            "does not divide the number of processes, which is 7: change",
        ),
        (None, Config(dp_shard=8), "makes 8 processes, and this run has 1: change"),
        ("8", Config(), r"share stage\.0\.batch = 12 evenly: 6 can, or"),
    ],
)
def test_what_does_not_fit_is_refused_before_ranks_meet(
    monkeypatch: pytest.MonkeyPatch, size: str | None, config: Config, sentence: str
) -> None:
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("RANK", "0")
    with pytest.raises(BadRecipe, match=sentence), parallel.world(config, [BATCH]):
        pass


@pytest.mark.parametrize(
    ("rank", "taken", "sentence"),
    [
        (0, False, "^rank 1, rank 2 of 3 did not connect within 1 s: "),
        (1, False, "^rank 1 cannot connect to the others at 127.0.0.1:.*: check MASTER_ADDR"),
        (0, True, "^rank 0 cannot connect to the others at .*address already in use.*: check"),
        (
            1,
            True,
            "^rank 1 cannot connect to the others at .*listens there, but does not answer",
        ),
    ],
    ids=["nobody comes", "nobody is there", "the port is taken", "somebody else is there"],
)
def test_ranks_that_do_not_meet_say_so_in_time(
    monkeypatch: pytest.MonkeyPatch, rank: int, taken: bool, sentence: str
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if taken:
            other.listen()
        port = other.getsockname()[1] if taken else warm.free_port()
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", str(rank))
        began = time.monotonic()
        with pytest.raises(LostPeer, match=sentence), parallel.world(Config(start_timeout=1)):
            pass
        assert time.monotonic() - began < 10


def test_a_broken_device_is_told_and_a_fault_of_the_code_keeps_its_traceback() -> None:
    def alone(how: str) -> None:
        with parallel.world(Config()):
            raise torch.AcceleratorError(ERRORS[how])

    with pytest.raises(LostPeer, match=r"cpu on .* failed \(.*ECC error.*\): the same command"):
        alone("broken")
    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        alone("wrong")


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("killed", r"rank 0 lost the others \(rank 1 does not answer\): the same command"),
        ("failed", r"rank 0 lost the others \(rank 1: tooth.png is not a picture\)"),
        ("broken", r"rank 0 lost the others \(rank 1: cpu on .* failed \(.*ECC error enc.*\): the"),
        ("wrong", r"rank 0 lost the others \(rank 1: CUDA error: device-side assert triggered"),
    ],
)
def test_who_is_left_says_why_and_leaves_too(how: str, sentence: str) -> None:
    ranks = warm.ranks(2, __file__, how)
    said, _ = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == LostPeer.code, said
    assert re.search(sentence, said)
    ranks[1].communicate(timeout=60)
    codes = {"killed": -signal.SIGKILL, "failed": BadData.code, "broken": LostPeer.code, "wrong": 1}
    assert ranks[1].returncode == codes[how]
