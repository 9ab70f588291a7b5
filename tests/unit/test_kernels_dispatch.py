"""The table of kernel families and backends, and what chooses among them."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import headrace_kernels
import pytest
import torch
from headrace_kernels import backend, choose_backend, dispatch, use_backend
from headrace_kernels.dispatch import FOLDERS, TABLE, backend_of, objection, select
from headrace_kernels.rms_norm import rms_norm

PACKAGE = Path(headrace_kernels.__file__).parent
CPU = torch.zeros(1)
# `headrace_kernels.backend` is the function of that name, too.
backend_module = importlib.import_module("headrace_kernels.backend")
# What the modules of a folder share: no family's.
SHARED = {
    "triton": {"combine_splits", "configs", "dependent_launch", "fp8", "latent_rows", "launch"},
    "cpu": {"agreement", "arena", "arguments", "build", "latent_rows", "library", "panels", "tape"},
}


def modules(folder):
    return {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}


@pytest.fixture
def cpu_library(monkeypatch):
    monkeypatch.setattr(backend_module, "cpu_problem", lambda: None)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_holds_what_the_table_says(name):
    claimed = {family for family, backends in TABLE.items() if name in backends}
    assert modules(FOLDERS[name]) - SHARED.get(name, set()) == claimed


def test_entries_ask_for_the_families_of_the_table():
    texts = "".join(path.read_text() for path in PACKAGE.glob("*.py"))
    assert set(re.findall(r'select\("(\w+)"', texts)) == set(TABLE)


def test_every_family_has_a_reference():
    assert all("reference" in backends for backends in TABLE.values())


@pytest.mark.parametrize("family", [family for family, backends in TABLE.items() if "triton" in backends])
def test_backends_have_the_functions_that_the_entry_calls(family):
    called = {name for path in PACKAGE.glob("*.py") for name in _called(path.read_text(), family)}
    assert called
    with use_backend("triton"):
        on_a_gpu = select(family, CPU)
    with use_backend("reference"):
        plain = select(family, CPU)
    assert [name for name in called if not (hasattr(on_a_gpu, name) and hasattr(plain, name))] == []


def _called(text, family):
    return re.findall(rf'select\("{family}", \w+\)\.(\w+)\(', text)


def test_what_a_family_lacks_falls_back(cpu_library):
    assert backend(CPU) == "cpu"
    with use_backend("cpu"):
        assert backend_of("act_quant", CPU) == "reference"
        assert select("act_quant", CPU).__name__ == "headrace_kernels.reference.act_quant"
    with use_backend("triton"):
        assert backend_of("rms_norm", CPU) == "triton"
        assert backend_of("silu_mul", CPU) == "reference"


def test_a_family_with_a_kernel_of_the_backend_runs_on_it(cpu_library, monkeypatch):
    monkeypatch.setitem(TABLE, "rms_norm", ("reference", "cpu"))
    assert backend_of("rms_norm", CPU) == "cpu"
    assert backend_of("rms_norm", torch.zeros(1, device="meta")) == "reference"
    asked = []
    monkeypatch.setattr(
        dispatch, "import_module", lambda name: asked.append(name) or SimpleNamespace(rms_norm=lambda *_: "compiled")
    )
    monkeypatch.setattr(dispatch, "_module", dispatch._module.__wrapped__)
    assert rms_norm(torch.ones(2, 4), torch.ones(4), 0.0) == "compiled"
    assert asked == ["headrace_kernels.cpu.rms_norm"]


def test_a_gpu_s_next_best_is_triton(monkeypatch):
    monkeypatch.setattr(backend_module, "what_is_missing", lambda _: None)
    with use_backend("aiter"):
        assert backend_of("rms_norm", CPU) == "triton"
        assert backend_of("silu_mul", CPU) == "reference"


def test_nested_backends_end_in_order():
    with use_backend("triton"):
        with use_backend("reference"):
            assert backend(CPU) == "reference"
        assert backend(CPU) == "triton"
        with pytest.raises(ZeroDivisionError), use_backend("reference"):
            _ = 1 / 0
        assert backend(CPU) == "triton"


def test_aiter_is_refused_by_name_where_it_is_not_installed():
    with pytest.raises(ValueError, match=r"'aiter'.*package aiter"), use_backend("aiter"):
        pass
    with pytest.raises(ValueError, match=r"'aiter'.*package aiter"):
        choose_backend("aiter")


def test_compiled_kernels_are_refused_where_there_is_no_library(monkeypatch):
    monkeypatch.setattr(backend_module, "cpu_problem", lambda: "the library is not there")
    assert backend(CPU) == "reference"
    with pytest.raises(ValueError, match=r"'cpu'.*library"), use_backend("cpu"):
        pass


def test_a_process_choice_gives_way_to_what_is_forced(cpu_library):
    try:
        choose_backend("reference")
        assert backend(CPU) == "reference"
        with use_backend("triton"):
            assert backend(CPU) == "triton"
        choose_backend("triton")
        assert backend(CPU) == "cpu", "what a worker on a GPU does on its host"
    finally:
        choose_backend(None)
    assert backend(CPU) == "cpu"


@pytest.mark.parametrize(
    ("name", "device", "says"),
    [("triton", "cpu", "run on cuda"), ("cpu", "cuda", "run on cpu"), ("aiter", "cuda", "package aiter")],
)
def test_objections_say_why(name, device, says):
    assert says in objection(name, device)


def test_nothing_speaks_against_plain_torch():
    assert objection("reference", "cpu") is None
    assert objection("reference", "cuda") is None


def test_a_package_without_a_family_of_its_own_is_no_backend(monkeypatch):
    monkeypatch.setattr("headrace_kernels.dispatch.what_is_missing", lambda _: None)
    assert "no kernel family" in objection("aiter", "cuda")


def test_a_cpu_does_not_import_triton():
    names = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
    code = (
        f"import importlib, sys, torch; [importlib.import_module(f'headrace_kernels.{{n}}') for n in {names}];"
        "from headrace_kernels.linear import Linear; Linear(torch.ones(2, 2))(torch.ones(1, 2));"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
