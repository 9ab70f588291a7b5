"""The same program under another Triton than the installed one: a process of its own that finds the other first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def report_under(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the report of `python -m headrace_kernels.aot ARGUMENTS` under the Triton that was installed in `folder`.

    What the process prints goes where this one's output goes.

    Raises:
        ValueError: the folder holds no Triton, or the process ended without a report.
    """
    if not (folder / "triton" / "__init__.py").exists():
        raise ValueError(f"no Triton in {folder}: pip install --no-deps --target {folder} triton==VERSION brings one")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "report.json"
        found_first = os.pathsep.join(filter(None, (str(folder.resolve()), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-m", "headrace_kernels.aot", *arguments, "--json", str(path)],
            env=os.environ | {"PYTHONPATH": found_first},
            check=False,
        )
        if not path.exists():
            raise ValueError(f"nothing was compiled with the Triton in {folder}: exit status {done.returncode}")
        return json.loads(path.read_text())
