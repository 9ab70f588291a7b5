"""What a worker says that it would use is what workers use: `headrace doctor` shows it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from headrace_core.config import DecodeSettings
from headrace_core.errors import StartupError
from headrace_core.testing.async_test import WAIT_S
from headrace_core.transfer.transports import TRANSPORTS, usable
from headrace_core.worker import capabilities as module
from headrace_core.worker.capabilities import capabilities
from headrace_kernels import backend, choose_backend
from headrace_kernels.backend import instruction_set
from headrace_kernels.cpu.build import NoCompilerError
from headrace_kernels.dispatch import TABLE, backend_of


@pytest.fixture(autouse=True)
def _chosen_again():
    yield
    choose_backend(None)


def of(**options):
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return capabilities(DecodeSettings(_cli_parse_args=["--model", ".", *arguments]))


def test_it_is_what_workers_of_this_machine_use():
    found, here = of(), torch.empty(0)
    assert (found["device"], found["dtype"], found["kv_cache_dtype"]) == ("cpu", "auto", "auto")
    assert (found["kernels"], found["kernels_problem"]) == (backend(here), "")
    assert found["families"][found["kernels"]] == sum(backend_of(name, here) == backend(here) for name in TABLE)
    assert sum(found["families"].values()) == len(TABLE)
    assert (found["compiled"]["isa"], found["threads"]) == (instruction_set(), torch.get_num_threads())
    assert found["free_bytes"] > 1 << 20
    assert found["transports"] == usable("auto")
    assert found["torch"]["version"] == torch.__version__
    assert found["compiled"]["dtypes"] == ["float32", "bfloat16"]


def test_settings_decide_as_they_do_for_a_worker():
    found = of(kernels="reference", transport="grpc", dtype="float32", kv_cache_dtype="fp8_e4m3")
    assert (found["kernels"], found["families"]) == ("reference", {"reference": len(TABLE)})
    assert found["transports"] == ("grpc",)
    assert (found["dtype"], found["kv_cache_dtype"]) == ("float32", "fp8_e4m3")


def test_with_tls_pages_move_by_what_it_guards(monkeypatch, tmp_path):
    monkeypatch.setattr("headrace_core.transfer.nixl.probe", lambda: "")
    monkeypatch.setitem(TRANSPORTS, "nixl", module.TRANSPORTS["nixl"].__class__(None, None, is_guarded=False))
    assert "nixl" in of()["transports"]
    assert "nixl" not in of(tls=tmp_path)["transports"]


def test_what_speaks_against_a_transport_is_said(monkeypatch):
    monkeypatch.setitem(TRANSPORTS, "nixl", TRANSPORTS["grpc"].__class__(None, None, probe=lambda: "no such thing"))
    assert of()["transport_problems"] == {"shm": TRANSPORTS["shm"].probe(), "nixl": "no such thing", "grpc": ""}


@pytest.mark.parametrize(("options", "reason"), [({"device": "cuda"}, "NO_GPU"), ({"kernels": "aiter"}, "NO_BACKEND")])
def test_what_a_worker_would_not_start_with_is_refused(monkeypatch, options, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StartupError) as refused:
        of(**options)
    assert refused.value.reason == reason


def test_kernels_that_are_not_compiled_say_why_and_what_would_build_them(monkeypatch):
    monkeypatch.setattr(module, "what_is_missing", lambda name: f"no library of {name}")
    monkeypatch.setattr(module.build, "isas", lambda: {"avx2": ()})
    monkeypatch.setattr(module.build, "find_compiler", lambda: ["python", "-m", "ziglang"])
    monkeypatch.setattr(module.build, "is_current", lambda path: False)
    compiled = of()["compiled"]
    assert (compiled["problem"], compiled["is_built"]) == ("no library of cpu", False)
    assert (compiled["sets"], compiled["compiler"], compiled["no_compiler"]) == (["avx2"], "python -m ziglang", "")


@pytest.mark.parametrize(("missing", "sets"), [("find_compiler", ["avx2"]), ("isas", [])])
def test_why_nothing_would_build_them_is_said(monkeypatch, missing, sets):
    def fails():
        raise NoCompilerError("there is none")

    monkeypatch.setattr(module.build, "isas", lambda: {"avx2": ()})
    monkeypatch.setattr(module.build, "find_compiler", lambda: ["g++"])
    monkeypatch.setattr(module.build, missing, fails)
    compiled = of()["compiled"]
    assert (compiled["sets"], compiled["compiler"], compiled["no_compiler"]) == (sets, "", "there is none")


def test_the_gpus_that_torch_sees_are_listed(monkeypatch):
    class Gpu:
        name, total_memory = "NVIDIA H200", 139 << 30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(module, "objection", lambda name, device: f"{name} on {device}")
    found = of()
    assert found["torch"]["gpus"] == [{"name": "NVIDIA H200", "memory_bytes": 139 << 30}] * 2
    assert (found["torch"]["cuda"], found["torch"]["rocm"]) == ("12.8", "")
    assert found["torch"]["gpu_kernels_problem"] == "triton on cuda"
    assert found["kernels_problem"] == f"{found['kernels']} on cpu"


def asked(*options):
    command = [sys.executable, "-P", "-m", "headrace_core.worker.doctor", "--model", ".", *options]
    env = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=WAIT_S, check=False)


def test_its_program_prints_it_with_the_threads_that_a_worker_has():
    result = asked("--threads", "1")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["threads"] == 1


def test_its_program_says_in_a_line_why_a_worker_would_not_start():
    result = asked("--kernels", "aiter")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--kernels aiter" in result.stderr.splitlines()[-1]
