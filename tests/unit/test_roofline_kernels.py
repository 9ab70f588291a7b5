"""`headrace roofline --kernels`: what is measured, what is not and why, and how it is drawn."""

import io
import json
import subprocess

import pytest
from headrace_core.roofline.hardware_measure import cpu_hardware
from headrace_core.roofline.model_shape import Dtype
from headrace_core.worker.kernel_cases import KernelCase, kernel_cases
from headrace_core.worker.kernel_speed import beside_floors, kernel_seconds
from headrace_kernels import use_backend
from headrace_kernels.dispatch import TABLE
from headrace_planner import cli_kernels
from headrace_planner.__main__ import app
from rich.console import Console
from typer.testing import CliRunner

_HARDWARE = cpu_hardware({Dtype.BF16: 1e9}, memory_bytes_per_s=1e9, copy_bytes_per_s=1e9, source="")


def _report():
    cases = [KernelCase("packed_experts", "small", 1e6, 10.0, lambda: lambda: None)]
    return {
        "threads": 1,
        "isa": "",
        "bytes_per_s": 1e9,
        "flops_per_s": 1e9,
        "cases": beside_floors(cases, kernel_seconds(cases), _HARDWARE),
    }


def test_a_backend_that_can_not_run_says_why():
    (case,) = _report()["cases"]
    assert (case["floor_s"], case["bound"]) == (1e-3, "memory")
    assert case["backends"]["reference"]["share"] == pytest.approx(1e-3 / case["backends"]["reference"]["s"])
    assert case["backends"]["cpu"] == {"not_measured": "the family has no kernel of it"}
    assert case["backends"]["aiter"] == {"not_measured": "the package aiter is not installed"}
    assert "not_measured" in case["backends"]["triton"]


def test_every_family_with_compiled_kernels_has_a_case():
    families = {case.family for case in kernel_cases()}
    assert {family for family, backends in TABLE.items() if "cpu" in backends} <= families <= set(TABLE)


@pytest.mark.parametrize("case", kernel_cases(), ids=lambda case: f"{case.family} {case.shape}")
def test_every_case_can_be_called(case):
    with use_backend("reference"):
        case.make()()


def test_shares_are_drawn_and_reasons_said_once():
    shown = io.StringIO()
    report = _report()
    report["cases"][0]["backends"]["reference"] = {"s": 2e-3, "share": 0.5}
    cli_kernels.show_kernels(Console(file=shown, width=140), report)
    rows = {line.split()[0]: line for line in shown.getvalue().splitlines() if line.strip()}
    assert "floor 1,000 µs, memory" in rows["packed_experts"]
    assert f"{'█' * 16}{'░' * 16}  50%  2,000 µs" in rows["reference"]
    assert all("not measured" in rows[name] for name in ("cpu", "triton"))
    assert shown.getvalue().count("the package aiter is not installed") == 1


def test_the_command_says_what_went_wrong(monkeypatch):
    def run(words, **_):
        return subprocess.CompletedProcess(words, 1, "", "Traceback\nModuleNotFoundError: No module named 'torch'\n")

    monkeypatch.setattr(subprocess, "run", run)
    result = CliRunner().invoke(app, ["roofline", "--kernels"])
    assert result.exit_code == 1
    assert "No module named 'torch': kernels need the extra `worker`" in result.output


def test_the_command_prints_json(monkeypatch):
    report = _report()
    monkeypatch.setattr(
        subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 0, json.dumps(report) + "\n", "")
    )
    result = CliRunner().invoke(app, ["roofline", "--kernels", "--json"])
    assert json.loads(result.stdout)["cases"] == report["cases"]
