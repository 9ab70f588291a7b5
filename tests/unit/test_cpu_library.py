"""The compiled CPU kernels' library: when it is built, what is said where it can't be, which is loaded."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from headrace_kernels.cpu import agreement, build, library
from headrace_kernels.cpu.library import Library


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch):
    for name in ("CXX", "HEADRACE_REQUIRE_CPU_KERNELS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def runs(monkeypatch):
    """The compiler's commands, none of which runs: what they would write holds the sources' checksum."""
    ran = []

    def run(command, **_):
        ran.append(command)
        Path(command[command.index("-o") + 1]).write_text(build.checksum())

    monkeypatch.setattr(build.subprocess, "run", run)
    monkeypatch.setattr(build, "find_compiler", lambda: ["c++"])
    return ran


def test_it_is_built_once_for_the_same_sources(runs, tmp_path, capsys):
    library = tmp_path / "some.so"
    assert build.ensure(library) is None
    assert "compiling" in capsys.readouterr().out
    plain, sources = {"pool", "tape"}, {path.stem for path in build.SOURCES.glob("*.cpp")}
    assert plain < sources
    expected = len(plain) + len(sources - plain) * len(build.isas()) + 1
    assert len(runs) == expected, "the pool and the tape, each family for each set, the linker"
    runs.clear()
    assert build.ensure(library) is None
    assert (runs, capsys.readouterr().out) == ([], "")


def test_it_is_built_again_when_a_source_or_a_flag_changes(runs, tmp_path, monkeypatch):
    library, sources = tmp_path / "some.so", tmp_path / "src"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    build.ensure(library)
    (sources / "panel.h").write_text("// changed\n")
    assert not build.is_current(library)
    build.ensure(library)
    assert build.is_current(library)
    monkeypatch.setattr(build, "_FLAGS", ("-O1",))
    assert not build.is_current(library)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(build, "is_current", lambda _: False)


def test_without_a_compiler_one_line_says_what_runs_and_what_to_install(no_compiler, capsys):
    build.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert "plain torch, which is slower" in line
    assert "install g++, or `pip install ziglang`" in line


def test_a_library_that_is_asked_for_is_an_error_without_a_compiler(no_compiler, monkeypatch):
    monkeypatch.setenv("HEADRACE_REQUIRE_CPU_KERNELS", "1")
    with pytest.raises(SystemExit, match="HEADRACE_REQUIRE_CPU_KERNELS"):
        build.main()


def test_what_a_compiler_refuses_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(build.subprocess, "run", refuse)
    monkeypatch.setattr(build, "find_compiler", lambda: ["c++"])
    assert "c++" in (build.ensure(tmp_path / "some.so") or "")
    assert list(tmp_path.iterdir()) == []


def test_a_system_without_compiled_kernels_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    assert "riscv64" in (build.ensure(tmp_path / "some.so") or "")


def test_ziglang_is_taken_where_the_system_has_no_compiler(no_compiler, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: name == "ziglang" or None)
    assert build.find_compiler()[:4] == [sys.executable, "-m", "ziglang", "c++"]


def test_a_compiler_that_is_named_is_taken_or_missed(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.NoCompilerError, match="no-such-compiler"):
        build.find_compiler()


def test_what_is_no_library_of_these_sources_is_not_loaded(tmp_path):
    library = tmp_path / "some.so"
    assert "is not there" in (Library(library).problem or "")
    library.write_text("another version")
    assert "other sources" in (Library(library).problem or "")
    library.write_text(build.checksum())
    broken = Library(library)
    assert "can't be loaded" in (broken.problem or "")
    assert broken.isa == ""


def test_the_build_needs_nothing_but_python(tmp_path):
    """It runs before anything is installed."""
    code = f"import runpy, sys; runpy.run_path({build.__file__!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, check=False).returncode == 0


@pytest.mark.parametrize("do_agree", [True, False])
def test_a_wider_set_runs_where_it_gives_the_same_bits_alone(do_agree, monkeypatch, caplog):
    asked, used = [], []
    monkeypatch.setattr(agreement.library, "isa", lambda: "avx512")
    monkeypatch.setattr(agreement.library, "use", used.append)
    monkeypatch.setattr(agreement, "_results", lambda dtype: asked.append(used[-1]) or [torch.tensor(len(asked) % 2)])
    monkeypatch.setattr(agreement.torch, "equal", lambda *_: do_agree)
    agreement.settle()
    assert asked == ["avx2", "avx2", "avx512", "avx512"]
    assert used[2:] == ([] if do_agree else ["avx2"])
    assert ("avx2 runs" in caplog.text) is not do_agree


def test_what_is_compared_is_many_numbers_and_no_two_alike(monkeypatch):
    if library.problem() is not None:
        pytest.skip(library.problem())
    results = [tensor for dtype in (torch.float32, torch.bfloat16) for tensor in agreement._results(dtype)]
    assert len(results) == 36
    assert all(tensor.isfinite().all() and len(tensor.unique()) > 1 for tensor in results)
