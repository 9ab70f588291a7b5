"""Hatch's hook: a wheel carries the demo model, and the compiled kernels for CPUs, and so is one for this platform.

Without a compiler the wheel is a pure one, with a warning: its kernels run on plain torch. That is an error with
HEADRACE_REQUIRE_CPU_KERNELS=1, as where images are built. An editable install has the library that `make setup` builds.
"""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CpuKernelsHook(BuildHookInterface[Any]):
    """Compiles the library before the wheel is put together."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the model and the library to what the wheel holds.

        Raises:
            RuntimeError: it can't be built, and the environment says that it must.
        """
        if version == "editable":
            return
        # `headrace demo` has its model at hand wherever it is installed: 6.7 MB of the wheel. Images bring theirs.
        demo = Path(self.root) / "demo" / "model"
        if demo.is_dir():
            build_data["force_include"][str(demo)] = "headrace_client/demo_model"
        # By its path: nothing is installed yet.
        build = runpy.run_path(str(Path(self.root) / "kernels/headrace_kernels/cpu/build.py"))
        library: Path = build["LIBRARY"]
        problem = build["ensure"](library)
        if problem:
            self.app.display_warning(f"no compiled kernels for CPUs ({problem}): the wheel's run on plain torch")
            return
        build_data["force_include"][str(library)] = f"headrace_kernels/cpu/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
