"""The files that start a run on a cluster: what their tools accept, and what becomes of exit codes.

There is no cluster here. Commands of one, and torchrun, are small scripts on the PATH; what they
are asked to do is the test. A real run under launch/torchrun.sh is in tests/faults.
"""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api import models

from daybreak import config

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [LAUNCH / "torchrun.sh", LAUNCH / "slurm.sbatch"]

# What a task and its resources may hold: docs.skypilot.co, "SkyPilot YAML".
TASK = {"name", "num_nodes", "resources", "workdir", "volumes", "setup", "run", "envs", "secrets"}
RESOURCES = {"accelerators", "cpus", "disk_size", "image_id", "infra", "job_recovery", "memory"}
RESOURCES |= {"network_tier", "ports", "use_spot"}
RECOVERY = {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}

# Long options of sbatch that take a value, and those that take none: slurm.schedmd.com/sbatch.html.
VALUED = {"cpus-per-task", "gpus-per-node", "job-name", "nodes", "ntasks-per-node", "open-mode"}
VALUED |= {"output", "signal", "time"}
BARE = {"exclusive", "requeue"}

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Run:
    """Start a script beside a `torchrun` that is a line of shell, and notes what it was asked."""

    def run(script: Path, torchrun: str, **environment: str) -> "subprocess.Popen[str]":
        tools = {
            "torchrun": f'echo "$*" >> asked; mkdir -p "$RUN"; {torchrun}',
            "srun": 'shift 2; exec "$@"',
            "scontrol": 'if [ "$1" = show ]; then echo one; echo two; else echo "$*" > queued; fi',
        }
        for name, line in tools.items():
            (tmp_path / "bin").mkdir(exist_ok=True)
            (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        (tmp_path / "launch").mkdir(exist_ok=True)
        (tmp_path / "launch" / "torchrun.sh").write_text((LAUNCH / "torchrun.sh").read_text())
        (tmp_path / "launch" / "torchrun.sh").chmod(0o755)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", str(script)],
            cwd=tmp_path,
            env=os.environ | {"PATH": path, "RUN": "run"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell's background jobs ignore it, and so would bash.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )

    return run


def status(code: object) -> str:
    """Write status.json as daybreak does, in one step."""
    return f'echo \'{{"code": {code}}}\' > "$RUN/s"; mv "$RUN/s" "$RUN/status.json"'


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


def test_torchrun_may_be_started_by_its_name() -> None:
    assert os.access(LAUNCH / "torchrun.sh", os.X_OK)


@pytest.mark.parametrize(
    ("torchrun", "code"),
    [
        ("exit 0", 0),
        (f"{status(75)}; exit 1", 75),
        (f"{status(2)}; exit 1", 2),
        (f"{status('null')}; exit 1", 1),
        ("exit 1", 1),
    ],
    ids=["done", "preempted", "refused", "killed", "never began"],
)
def test_the_exit_code_is_that_of_the_status(
    start: Run, tmp_path: Path, torchrun: str, code: int
) -> None:
    process = start(LAUNCH / "torchrun.sh", torchrun)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code, output
    asked = (tmp_path / "asked").read_text()
    assert "--nproc-per-node gpu" in asked
    assert asked.endswith("-m daybreak train prx_24h --out run --set parallel.dp_replicate=1\n")


@pytest.mark.parametrize(("given", "seen"), [("", "1"), ("0", "0")], ids=["unsaid", "allowed"])
def test_a_run_asks_nothing_of_the_hub_unless_it_may(
    start: Run, tmp_path: Path, given: str, seen: str
) -> None:
    process = start(LAUNCH / "torchrun.sh", 'echo "$HF_HUB_OFFLINE" > hub', HF_HUB_OFFLINE=given)
    process.communicate(timeout=20)
    assert (tmp_path / "hub").read_text() == f"{seen}\n"


def test_a_status_of_an_earlier_start_says_nothing_about_this_one(
    start: Run, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text('{"code": 75}')
    process = start(LAUNCH / "torchrun.sh", "exit 1")
    process.communicate(timeout=20)
    assert process.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_torchrun_once(start: Run, tmp_path: Path, number: int) -> None:
    hears = "trap 'echo heard >> heard' TERM; touch ready; for i in {1..20}; do sleep 0.1; done"
    process = start(LAUNCH / "torchrun.sh", f"{hears}; {status(75)}; exit 1")
    wait_for(tmp_path / "ready")
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75, output
    assert (tmp_path / "heard").read_text() == "heard\n"


@pytest.mark.parametrize(("code", "again"), [(75, True), (6, True), (2, False), (5, False)])
def test_slurm_queues_again_what_can_be_tried_again(
    start: Run, tmp_path: Path, code: int, again: bool
) -> None:
    job = {"SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_JOB_ID": "17"}
    job["SLURM_CPUS_PER_TASK"] = "64"
    process = start(LAUNCH / "slurm.sbatch", f"{status(code)}; exit 1", **job)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code, output
    assert (tmp_path / "queued").exists() == again
    if again:
        assert (tmp_path / "queued").read_text() == "requeue 17\n"
    asked = (tmp_path / "asked").read_text()
    assert "--nnodes 4" in asked
    assert "parallel.dp_replicate=4" in asked
    assert "--rdzv-endpoint one:29400" in asked


def test_slurm_is_asked_for_what_the_recipe_is_made_for() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = [shlex.split(line.removeprefix("#SBATCH ")) for line in lines if "#SBATCH" in line]
    assert all(len(words) == 1 and words[0].startswith("--") for words in options)
    asked = dict(words[0].removeprefix("--").partition("=")[::2] for words in options)
    assert {name for name, value in asked.items() if value} <= VALUED
    assert {name for name, value in asked.items() if not value} <= BARE
    first_command = next(number for number, line in enumerate(lines) if line[:1] not in {"#", ""})
    assert not any("#SBATCH" in line for line in lines[first_command:]), "sbatch stops reading"
    devices(int(asked["nodes"]), int(asked["gpus-per-node"]))
    assert asked["ntasks-per-node"] == "1"
    assert "requeue" in asked
    number, _, before = asked["signal"].partition("@")
    assert hasattr(signal, f"SIG{number}")
    assert int(before) >= 600, "as long as torchrun waits for a checkpoint"


def test_skypilot_is_asked_for_what_the_recipe_is_made_for() -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task.keys() <= TASK
    assert task["resources"].keys() <= RESOURCES
    recovery = task["resources"]["job_recovery"]
    assert recovery.keys() <= RECOVERY
    assert recovery["recover_on_exit_codes"] == [6, 75]
    devices(task["num_nodes"], int(task["resources"]["accelerators"].partition(":")[2]))
    known = {"NODES", "HEAD", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_IPS"}
    assert set(re.findall(r"\b[A-Z][A-Z_]{3,}\b", task["run"])) <= known
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def kubeflow() -> tuple[dict[str, Any], dict[str, Any]]:
    runtime, job = yaml.safe_load_all((LAUNCH / "kubeflow.yaml").read_text())
    return runtime, job


def test_kubeflow_knows_every_key() -> None:
    kinds = models.TrainerV1alpha1ClusterTrainingRuntime, models.TrainerV1alpha1TrainJob
    for table, kind in zip(kubeflow(), kinds, strict=True):
        assert kind.from_dict(table).to_dict() == table
    misspelt = kubeflow()[1]
    misspelt["spec"]["trainer"]["nodes"] = 4
    assert models.TrainerV1alpha1TrainJob.from_dict(misspelt).to_dict() != misspelt


def test_kubeflow_is_asked_for_what_the_recipe_is_made_for() -> None:
    runtime, job = kubeflow()
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    trainer = job["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
    devices(trainer["numNodes"], trainer["numProcPerNode"])
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    work = node["template"]["spec"]
    pod = work["template"]["spec"]
    (rule,) = work["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [6, 75, 137]
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"] == "node"
    assert pod["restartPolicy"] == "Never", "a pod failure policy is refused with any other"
    assert pod["terminationGracePeriodSeconds"] >= 600
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    subprocess.run(["bash", "-n"], input=trainer["args"][0], text=True, check=True)


def devices(nodes: int, each: int) -> None:
    """Check that the published recipe can be shared out to so many."""
    assert (nodes, each) == (4, 8)
    for stage in config.load("prx_24h").stage:
        assert stage.batch % (nodes * each) == 0


def wait_for(path: Path) -> None:
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")
