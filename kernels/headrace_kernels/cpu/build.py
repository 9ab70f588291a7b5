"""Compile the kernels of this folder's `src` into the library beside it.

    python -m headrace_kernels.cpu.build

One compiler run for each family and instruction set, beside each other. Needs a C++ compiler with C++20: `$CXX`, else
g++, clang++ or c++ of the system, else PyPI's `ziglang` if it is installed. Nothing is done if the library is of these
sources already: it carries their checksum, by which `library` knows it, too.

With HEADRACE_REQUIRE_CPU_KERNELS=1 a library that can't be built is an error; else kernels run on plain torch.
Imports nothing but Python's own: `make` and the wheel's build run it before anything is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBRARY = Path(__file__).with_name("headrace_cpu.so")
"""Where the library is, here and in a wheel."""

SOURCES = Path(__file__).with_name("src")
_FLAGS = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-pthread")
_PLAIN = ("pool", "tape")
"""Sources that are no kernels: compiled once."""
_ISAS = {
    "x86_64": {
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    },
    "aarch64": {"neon": ()},
}


class NoCompilerError(RuntimeError):
    """There is no compiler, or no instruction set to compile for."""


def checksum() -> str:
    """Return a checksum of the kernels' sources and of how they are compiled."""
    parts = [repr((_FLAGS, _ISAS)).encode()]
    for source in sorted(SOURCES.iterdir()):
        parts += [source.name.encode(), source.read_bytes()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def is_current(library: Path) -> bool:
    """Return whether `library` is there and was built from these sources."""
    return library.exists() and checksum().encode() in library.read_bytes()


def isas() -> Mapping[str, tuple[str, ...]]:
    """Return the instruction sets that are compiled for here, and the compiler's flags for each.

    Raises:
        NoCompilerError: there is none for this system.
    """
    machine = _machine()
    if machine not in _ISAS or sys.platform != "linux":
        raise NoCompilerError(f"there are no compiled kernels for {sys.platform} on {machine}")
    return _ISAS[machine]


def build(to: Path, sets: Mapping[str, tuple[str, ...]], families: frozenset[str] | None = None) -> None:
    """Compile the library to `to`, which is replaced at once or not at all.

    Args:
        to: the library.
        sets: the instruction sets, and the flags for each.
        families: those of `src` to compile; None: all.

    Raises:
        NoCompilerError: nothing here can compile it.
        subprocess.CalledProcessError: the compiler refused; its words are on stderr.
    """
    compiler = find_compiler()
    names = sorted({path.stem for path in SOURCES.glob("*.cpp")} - set(_PLAIN) if families is None else families)
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        jobs = [_job(name, "", (f'-DHEADRACE_SOURCES="{checksum()}"',), folder) for name in _PLAIN]
        for name in names:
            jobs += [_job(name, isa, (f"-DHEADRACE_ISA={isa}", *flags), folder) for isa, flags in sets.items()]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for running in [pool.submit(subprocess.run, [*compiler, *_FLAGS, *job], check=True) for job in jobs]:
                running.result()
        made = Path(folder) / to.name
        objects = [job[-1] for job in jobs]
        _run([*compiler, "-shared", "-pthread", *objects, "-o", str(made)])
        made.replace(to)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def _job(name: str, isa: str, flags: tuple[str, ...], folder: str) -> list[str]:
    return [*flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", f"{folder}/{name}.{isa}.o"]


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler.

    Raises:
        NoCompilerError: there is none.
    """
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        found = shutil.which(name)
        if found:
            return [found]
    if named:
        raise NoCompilerError(f"no C++ compiler: CXX={named} is not there")
    if importlib.util.find_spec("ziglang"):
        # By itself it compiles for this very processor and C library; the library must run on others, too.
        return [sys.executable, "-m", "ziglang", "c++", "-target", f"{_machine()}-linux-gnu.2.28"]
    raise NoCompilerError("no C++ compiler: install g++, or `pip install ziglang`")


def _machine() -> str:
    return platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64")


def ensure(library: Path) -> str | None:
    """Build `library` if it isn't of these sources; return why it can't be, None if it is there now.

    Raises:
        RuntimeError: it can't be built, and HEADRACE_REQUIRE_CPU_KERNELS says that it must.
    """
    if is_current(library):
        return None
    try:
        compiler = " ".join(find_compiler())
        print(f"compiling the kernels for CPUs with {compiler}: a minute or two", flush=True)  # noqa: T201
        build(library, isas())
        return None
    except (NoCompilerError, subprocess.CalledProcessError) as error:
        if os.environ.get("HEADRACE_REQUIRE_CPU_KERNELS") == "1":
            raise RuntimeError(f"{error}; HEADRACE_REQUIRE_CPU_KERNELS=1 asks for compiled kernels") from error
        return str(error)


def main() -> None:
    """Build the library beside this file, or say in one line what runs instead."""
    try:
        problem = ensure(LIBRARY)
    except RuntimeError as error:
        sys.exit(str(error))
    if problem:
        print(f"no compiled kernels for CPUs ({problem}): they run on plain torch, which is slower")  # noqa: T201


if __name__ == "__main__":
    main()
