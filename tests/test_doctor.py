"""The doctor looks at the real machine, says what it found, and never falls ill itself."""

import sys
import tomllib
from pathlib import Path

import pytest
import torch

from daybreak import config, doctor, host
from daybreak.failure import BadRecipe
from daybreak.train import building

ROOT = Path(__file__).parents[1]


def test_the_report_names_everything_once() -> None:
    findings = doctor.report()
    names = [finding.name for finding in findings]
    assert len(set(names)) == len(names)
    for name in ["daybreak", "python", "torch", "diffusers", "transformers", "cores", "memory"]:
        assert name in names
    for name in ["disk", "instructions", "bfloat16", "compiler", "gpu", "extra eval"]:
        assert name in names


def test_what_is_not_well_comes_with_a_remark_and_everything_fits_a_line() -> None:
    for finding in doctor.report():
        assert finding.value
        assert finding.mark == "ok" or finding.remark
        assert "\n" not in finding.value + finding.remark


def test_versions_are_those_that_are_running() -> None:
    found = {finding.name: finding.value for finding in doctor.versions()}
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert torch.__version__.startswith(found["torch"])


def test_the_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"])


def test_an_extra_that_is_absent_is_neither_well_nor_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"one": "pytest", "other": "no_such_module"})
    one, other = doctor.extras()
    assert (one.value, one.mark, one.remark) == ("usable", "ok", "")
    assert (other.value, other.mark) == ("absent", "-")
    assert other.remark == 'pip install "daybreak[other]"'


def test_a_missing_package_is_named() -> None:
    finding = doctor._version("no_such_package")
    assert finding.mark == "slow"
    assert finding.remark == "pip install no_such_package"


def test_limits_of_a_container_count(tmp_path: Path) -> None:
    assert host.cpu_quota(tmp_path) is None
    assert host.memory_limit(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert host.cpu_quota(tmp_path) == 1.5
    assert host.memory_limit(tmp_path) == doctor.GIB
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert host.cpu_quota(tmp_path) is None
    assert host.memory_limit(tmp_path) is None


@pytest.mark.parametrize(("threads", "mark"), [(1, "ok"), (2, "slow")])
def test_a_container_of_half_a_core_is_told_to_take_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, mark: str
) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = doctor.cores()
    assert found.mark == mark
    assert found.remark.endswith("OMP_NUM_THREADS=1") == (threads > 1)


def test_limits_of_an_older_container_count(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "memory").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in [("-1", None), ("200000", 2.0)]:
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        assert host.cpu_quota(tmp_path) == cores
    for limit, expected in [("9223372036854771712", None), ("1000", 1000)]:
        (tmp_path / "memory" / "memory.limit_in_bytes").write_text(limit)
        assert host.memory_limit(tmp_path) == expected


def test_the_compiler_is_tried_and_not_only_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    for name in [str(broken), str(tmp_path / "absent"), "no-such-compiler"]:
        monkeypatch.setenv("CXX", name)
        doctor.compiler.cache_clear()
        assert doctor.compiler() is None
        assert doctor.compilation().mark == "slow"
        assert Path(name).name in doctor.compilation().remark
    doctor.compiler.cache_clear()


def test_a_gpu_without_a_compiler_is_refused_and_a_processor_is_told(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, told = config.load(tiny, ("compile=true",)), list[str]()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    doctor.compiler.cache_clear()
    with pytest.raises(BadRecipe, match=r"apt install gcc.*--set compile=false"):
        building.compiles(recipe, torch.device("cuda"), told.append)
    assert not building.compiles(recipe, torch.device("cpu"), told.append)
    assert len(told) == 1
    doctor.compiler.cache_clear()


def test_what_triton_compiles_with_is_a_compiler_of_c() -> None:
    found = doctor.compiler("cuda")
    assert found is None or Path(found).is_file()


def test_the_compiler_found_is_a_file_and_its_remark_agrees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    doctor.compiler.cache_clear()
    found = doctor.compiler()
    assert found is None or Path(found).is_file()
    assert doctor.compilation().mark == ("slow" if found is None else "ok")


def test_missing_python_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    true = tmp_path / "g++"
    true.write_text("#!/bin/sh\nexit 0\n")
    true.chmod(0o755)
    monkeypatch.setenv("CXX", str(true))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    doctor.compiler.cache_clear()
    assert doctor.compiler() is None
    assert "Python.h not found" in doctor.compilation().remark
    doctor.compiler.cache_clear()


def test_bfloat16_agrees_with_what_torch_sees() -> None:
    if torch.cuda.is_available():
        assert doctor.fast_bfloat16() == torch.cuda.is_bf16_supported(including_emulation=False)
    elif sys.platform == "linux":
        able = torch.cpu.get_capabilities()
        expected = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
        assert doctor.fast_bfloat16() == expected
    assert doctor.bfloat16().mark == ("ok" if doctor.fast_bfloat16() else "slow")


def test_little_shared_memory_is_told_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "LITTLE_SHARED", 0)
    (finding,) = doctor.shared_memory(tmp_path)
    assert finding.mark == "ok"
    monkeypatch.setattr(doctor, "LITTLE_SHARED", 2**70)
    (finding,) = doctor.shared_memory(tmp_path)
    assert finding.mark == "slow"
    assert "--shm-size" in finding.remark
    assert doctor.shared_memory(tmp_path / "of another system") == []


def test_the_disk_is_that_of_a_folder_still_to_be_made(tmp_path: Path) -> None:
    assert f"GiB free at {tmp_path}" in doctor.disk(tmp_path / "runs" / "later").value
