"""What the wheel's build does with the compiled kernels for CPUs; it has the demo model in any case."""

import runpy
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
DEMO = {str(ROOT / "demo" / "model"): "headrace_client/demo_model"}
HOOK = runpy.run_path(str(ROOT / "kernels" / "hatch_build.py"))["CpuKernelsHook"]


@pytest.fixture
def built(monkeypatch):
    """Build with a library that is there, or can't be for `problem`; return what the wheel is to hold, and warnings."""

    def build(version="standard", problem=None):
        library, warnings = Path("/somewhere/headrace_cpu.so"), []
        module = {"LIBRARY": library, "ensure": lambda _: problem}
        monkeypatch.setitem(HOOK.initialize.__globals__, "runpy", SimpleNamespace(run_path=lambda _: module))
        data = {"force_include": {}}
        app = SimpleNamespace(display_warning=warnings.append)
        HOOK(str(ROOT), {}, None, None, "", "wheel", app).initialize(version, data)
        return data, warnings

    return build


def test_a_wheel_carries_the_library_and_is_for_its_platform(built):
    data, warnings = built()
    assert data["force_include"] == {"/somewhere/headrace_cpu.so": "headrace_kernels/cpu/headrace_cpu.so"} | DEMO
    assert data["tag"] == "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert not data["pure_python"]
    assert warnings == []


def test_without_a_compiler_it_is_a_pure_one_with_a_warning(built):
    data, warnings = built(problem="no C++ compiler")
    assert data == {"force_include": DEMO}
    (warning,) = warnings
    assert "no C++ compiler" in warning


def test_an_editable_install_builds_nothing(built):
    assert built(version="editable", problem="asked all the same") == ({"force_include": {}}, [])
