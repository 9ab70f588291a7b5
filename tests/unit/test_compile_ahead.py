"""What the benchmark's cases launch, recorded and compiled without a GPU."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton.compiler
from headrace_kernels.aot.launches import TARGETS, specialise
from triton.compiler import make_backend
from triton.runtime import driver

from tests.perf.in_turn import Limits, Lost
from tests.perf.kernels import compile_ahead
from tests.perf.kernels.compile_ahead import compile_all, jobs_of_candidate, jobs_of_cases, record
from tests.perf.kernels.harness import families


@pytest.mark.parametrize("family", sorted(families("cases")))
def test_every_familys_cases_launch_something_without_a_gpu(family):
    cases = families("cases")[family]()
    for case in {id(case): case for case in (cases[0], cases[len(cases) // 2], cases[-1])}.values():
        assert record(case), case.shape


def test_equal_launches_are_compiled_once():
    jobs = jobs_of_cases(["rms_norm"])
    assert len({compile_ahead.key_of(job) for job in jobs}) == len(jobs) < len(families("cases")["rms_norm"]())
    assert str(jobs[0]) == "rms_norm add V2-Lite T=1 N=2048, launch 0"
    job = jobs_of_candidate("moe_router", 0, {"num_warps": 8, "num_stages": 2})[0]
    assert str(job) == "moe_router 64x2048 {'num_stages': 2, 'num_warps': 8}, launch 0"


def test_a_launch_on_a_gpu_finds_what_was_compiled_ahead(monkeypatch):
    """Triton's own launcher, told that there is such a GPU, asks for the same code with the same options."""
    asked = []
    gpu = SimpleNamespace(
        get_current_target=lambda: TARGETS["cuda"], get_current_device=lambda: 0, get_current_stream=lambda _: 0
    )
    monkeypatch.setattr(driver, "_active", gpu)
    monkeypatch.setattr(triton.compiler, "compile", lambda src, target, options: asked.append((src, options)))
    backend = make_backend(TARGETS["cuda"])
    for case in (families("cases")["rms_norm"]()[0], families("cases")["moe_router"]()[0]):
        for launch in record(case):
            monkeypatch.setattr(launch.kernel, "device_caches", defaultdict(launch.kernel.create_binder))
            args = [torch.empty_like(a, device="cpu") if isinstance(a, torch.Tensor) else a for a in launch.args]
            options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
            launch.kernel.run(*args, grid=launch.grid, warmup=True, **options, **launch.constants)
            ahead, (source, options) = specialise(launch, "cuda"), asked.pop()
            assert ahead.source.hash() == source.hash()
            assert backend.parse_options(ahead.options).hash() == backend.parse_options(options).hash()


def test_what_a_process_cannot_compile_has_a_reason(monkeypatch):
    jobs = jobs_of_cases(["rms_norm"])[:2]
    monkeypatch.setattr(compile_ahead, "in_turn", lambda count, *_: iter([Lost("cut off after 60 s")] * count))
    found = dict(compile_all(jobs, 2, Limits()))
    assert {compile_ahead.trouble(each) for each in found.values()} == {("cut off after 60 s",)}
    assert set(found) == set(jobs)


def test_a_candidate_is_compiled_in_a_process_of_its_own(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    jobs = jobs_of_candidate("moe_router", 2, {"num_warps": 8, "num_stages": 2})
    ((job, found),) = compile_all(jobs, 1, Limits())
    assert (job, compile_ahead.trouble(found)) == (jobs[0], ())
    assert found.resources.registers > 0
