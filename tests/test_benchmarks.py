"""The benchmarks run at tiny size, and write down what they have measured."""

import json
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from daybreak import config, doctor
from daybreak.train import flops

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
USUAL = "bfloat16" if doctor.fast_bfloat16() else "float32"


@pytest.fixture
def measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> dict[str, Any]:
    name, *arguments = request.param
    file = tmp_path / "found.json"
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--json", str(file)])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["threads"] > 0
    assert found["processor"]
    return found


def test_no_arm_always_comes_after_the_same_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    in_turn = runpy.run_path(str(BENCHMARKS / "turns.py"))["in_turn"]
    order = ""

    def note(name: str) -> None:
        nonlocal order
        order += name

    seconds = in_turn({name: partial(note, name) for name in "abc"}, rounds=3, warm=1)
    assert order == "abccbaabccba"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


SMALL = ["--set", "dit.width=32", "--set", "dit.heads=2", "--set", "dit.depth=1"]
STEP = ["step.py", "--eager", "--batch", "1", "--rounds", "1", "--threads", "1"]


@pytest.mark.parametrize(
    "measured", [[*STEP, "--optimiser", "--case", "padded", "small"]], indirect=True
)
def test_step_gives_a_ratio_for_every_pair_of_every_case(measured: dict[str, Any]) -> None:
    assert set(measured["cases"]) == {"padded, 1 threads", "small, 1 threads"}
    for case in measured["cases"].values():
        assert case["outputs differ by"] < 1e-4
        assert set(case["ratios"]) == {"float32", USUAL}
        assert all(ratio["time"] > 0 and ratio["saved"] > 0 for ratio in case["ratios"].values())


@pytest.mark.parametrize("measured", [[*STEP, "--recipe", "quickstart"]], indirect=True)
def test_a_recipes_step_is_set_against_the_plain_class(measured: dict[str, Any]) -> None:
    case = measured["cases"]["quickstart, 16 px, 1 threads"]
    assert set(case["ratios"]) == {f"against diffusers, {USUAL}"}
    assert case["ratios"][f"against diffusers, {USUAL}"]["time"] > 0


@pytest.mark.parametrize("measured", [[*STEP, "--case", "routes"]], indirect=True)
def test_a_routed_step_keeps_less_than_a_dense_one(measured: dict[str, Any]) -> None:
    ratio = measured["cases"]["routes, 1 threads"]["ratios"]["float32"]
    assert ratio["saved"] < 0.8


@pytest.mark.parametrize(
    "measured",
    [
        [
            "sampler.py",
            "--steps",
            "2",
            "--guidance",
            "1",
            "3",
            "--batch",
            "2",
            "--rounds",
            "1",
            *SMALL,
        ]
    ],
    indirect=True,
)
def test_sampler_times_every_scale_of_guidance(measured: dict[str, Any]) -> None:
    assert [(row["steps"], row["guidance"]) for row in measured["rows"]] == [(2, 1.0), (2, 3.0)]
    for row in measured["rows"]:
        assert len(row["speeds"]) == 4
        assert all(speed > 0 for speed in row["speeds"].values())


@pytest.mark.parametrize(
    "measured",
    [["recipe.py", "quickstart", "--batch", "2", "--steps", "2", "--set", "compile=false", *SMALL]],
    indirect=True,
)
def test_recipe_takes_a_step_apart_without_losing_time(measured: dict[str, Any]) -> None:
    for stage in measured["stages"]:
        parts = stage["parts"]
        assert {"pictures", "text, forward", "denoiser", "backward", "muon", "adamw"} <= set(parts)
        assert 0 < stage["flops_per_second_of_denoiser"] < stage["flops_per_second"]
        assert stage["flops"]["muon"] > 0
        assert abs(parts["the rest"]) < 0.2 * stage["seconds"]


@pytest.mark.parametrize(
    "measured",
    [
        [
            *("recipe.py", "quickstart", "--batch", "2", "--steps", "2", "--mesh", "4x1"),
            *("--set", "compile=false", *SMALL),
        ]
    ],
    indirect=True,
)
def test_recipe_takes_the_step_of_one_of_four_devices_apart(measured: dict[str, Any]) -> None:
    assert measured["mesh"] == [4, 1]
    recipe = config.load("quickstart", tuple(SMALL[1::2]))
    whole = flops.work(recipe, recipe.stage[0], False).step["muon"]
    for stage in measured["stages"]:
        assert stage["batch"] == 2, "of each device"
        assert stage["flops"]["muon"] == pytest.approx(whole), "each has all matrices"
    assert not dist.is_initialized()


def run_on_nothing(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    called = [sys.executable, BENCHMARKS / "null_gpu.py", *arguments]
    return subprocess.run(called, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA")
def test_a_torch_without_cuda_has_no_gpu_that_computes_nothing() -> None:
    done = run_on_nothing("-c", "print(1)")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("this torch was built without CUDA: ")
    assert done.stderr.count("\n") == 1


without_gpu = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available(), reason="for CUDA without a GPU"
)
TORCHRUN = ["--gpus", "2", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "gpu"]


@pytest.mark.slow
@without_gpu
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_a_run_walks_its_path_on_a_gpu_that_computes_nothing(
    tmp_path: Path, recompute: str
) -> None:
    steps = [word for stage in range(3) for word in ("--set", f"stage.{stage}.steps=2")]
    steps += ["--set", f"parallel.recompute={recompute}"]
    more = ["--set", "sample.every=3", "--set", "save_every=4", *SMALL, *steps]
    done = run_on_nothing("-m", "daybreak", "train", "quickstart", "--out", tmp_path / "run", *more)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["machine"]["device"], facts["machine"]["gpu"]) == ("cuda", "NVIDIA H200 (null)")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.0] * 6
    assert (tmp_path / "run" / "checkpoint-6").is_dir()


@pytest.mark.slow
@without_gpu
def test_two_ranks_walk_their_path_each_on_its_own_gpu(tmp_path: Path) -> None:
    steps = [word for stage in range(3) for word in ("--set", f"stage.{stage}.steps=2")]
    more = ["--set", "sample.every=3", "--set", "save_every=4", "--set", "compile=false", *steps]
    train = ["-m", "daybreak", "train", "quickstart", "--out", str(tmp_path / "run"), *SMALL]
    done = run_on_nothing(*TORCHRUN, *train, *more)
    assert done.returncode == 0, done.stderr
    assert "on cuda with 1 thread on each of 2 processes" in done.stdout
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.0] * 6
    manifest = json.loads((tmp_path / "run" / "checkpoint-6" / "manifest.json").read_text())
    assert manifest["ranks"] == 2


@without_gpu
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("dist.all_reduce(torch.ones(1 + rank, device='cuda'))", "is another one than others'"),
        ("torch.ones(1, device='cuda:0')", "the rank of device 1 is at work on device 0"),
    ],
    ids=["another sum", "another device"],
)
def test_a_rank_that_is_out_of_step_on_nothing_is_told(
    tmp_path: Path, wrong: str, said: str
) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(
        "import os, torch\nimport torch.distributed as dist\n"
        "rank = int(os.environ['RANK'])\ntorch.cuda.set_device(rank)\n"
        "dist.init_process_group('nccl')\ndist.all_reduce(torch.ones(1, device='cuda'))\n"
        f"torch.cuda.synchronize()\n{wrong}\ntorch.cuda.synchronize()\n"
    )
    done = run_on_nothing(*TORCHRUN, script)
    assert done.returncode == 1
    assert said in done.stderr


LOSES_THE_OTHER = """
import os, signal
import torch
import torch.distributed as dist
from daybreak.train import parallel, watchdog

os.environ["LOCAL_WORLD_SIZE"] = "1"  # as if the other one were on another machine
signal.signal(signal.SIGTERM, lambda *_: None)  # nor torchrun would end this one
with parallel.world(parallel.Config()) as here, watchdog.Watchdog(here, 10.0, print) as dog:
    for step in range(1, 3):
        dist.all_reduce(torch.ones(1, device=here.device))
        torch.cuda.synchronize()
        dog.beat(step)
        if here.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@without_gpu
def test_a_rank_that_nccl_tells_of_a_lost_one_leaves_for_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NULL_GPU_TELLS", "1")
    monkeypatch.setenv("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "1000")  # before torch aborts it
    script = tmp_path / "loses_the_other.py"
    script.write_text(LOSES_THE_OTHER)
    done = run_on_nothing(*TORCHRUN, script)
    assert "for the step after 1 to finish; rank 1 does not answer" in done.stderr
    assert "exitcode  : 6 " in done.stderr


@pytest.mark.parametrize(
    "measured",
    [["parallel.py", "--batch", "2", "--rounds", "1", "--set", "compile=false", *SMALL]],
    indirect=True,
)
def test_parallel_sets_steps_and_saves_against_one_another(measured: dict[str, Any]) -> None:
    assert set(measured["ratios"]) == {
        "step, FSDP2 over a mesh of one",
        "step, FSDP2 over a mesh of one: processor",
        "save, in the background: blocks",
        "save, in the background: costs in all",
    }
    assert measured["ratios"]["save, in the background: blocks"] < 1
    assert all(len(times) == 1 for times in measured["seconds"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "measured", [["prepare.py", "--source", "scenes:400", "--kills", "2"]], indirect=True
)
def test_prepare_is_killed_and_leaves_the_same_manifest(measured: dict[str, Any]) -> None:
    assert measured["pictures"] == 400
    assert measured["killed"] >= 1  # one that is faster than the unbroken one may get through
    assert measured["same manifest"]
    assert measured["peak_mib"]["all"] >= measured["peak_mib"]["tenth"] > 0
