"""Compile the kernels of this folder's `src` into the library beside it.

    python -m headrace_kernels.cpu.build

One compiler run for each family and instruction set, beside each other. Needs a C++ compiler with C++20: `$CXX`, else
g++, clang++ or c++ of the system, else PyPI's `ziglang` if it is installed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_FOLDER = Path(__file__).parent
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread")
_ISAS = {
    "x86_64": {
        "avx2": ("-mavx2", "-mfma"),
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    },
    "aarch64": {"neon": ()},
}
_ISA_FREE = "pool.cpp"


class NoCompilerError(RuntimeError):
    """There is no compiler, or no instruction set to compile for."""


def build(to: Path) -> None:
    """Compile the library to `to`, which is replaced at once or not at all.

    Raises:
        NoCompilerError: nothing here can compile it.
        subprocess.CalledProcessError: the compiler refused; its words are on stderr.
    """
    compiler = find_compiler()
    isas = _ISAS.get(platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64"))
    if isas is None or sys.platform != "linux":
        raise NoCompilerError(f"there are no compiled kernels for {sys.platform} on {platform.machine()}")
    sources = sorted((_FOLDER / "src").glob("*.cpp"))
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        jobs: list[list[str]] = []
        objects: list[str] = []
        for source in sources:
            for isa, flags in {"": ()}.items() if source.name == _ISA_FREE else isas.items():
                objects.append(str(Path(folder) / f"{source.stem}.{isa}.o"))
                named = [f"-DHEADRACE_ISA={isa}"] if isa else []
                jobs.append([*compiler, *_FLAGS, *flags, *named, "-c", str(source), "-o", objects[-1]])
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda job: subprocess.run(job, check=True), jobs))
        made = Path(folder) / to.name
        subprocess.run([*compiler, "-shared", "-pthread", *objects, "-o", str(made)], check=True)
        made.replace(to)


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
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise NoCompilerError(
        f"no C++ compiler: {named} is not there" if named else "no C++ compiler: install g++, or `pip install ziglang`"
    )


if __name__ == "__main__":
    from headrace_kernels.cpu.library import PATH

    try:
        build(PATH)
    except (NoCompilerError, subprocess.CalledProcessError) as error:
        sys.exit(f"{error}; kernels run on plain torch, which is slower")
