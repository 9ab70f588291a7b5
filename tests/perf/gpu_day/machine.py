"""What a checkout needs of the machine: where its packages lie, modules that are missing, and the GPU."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
# Module and what needs it: without it only that fails.
_NEEDED = {
    "torch": "everything",
    "triton": "everything",
    "numpy": "everything",
    "rich": "everything",
    "pytest": "parity",
    "hypothesis": "parity",
    "pydantic": "step, tokens",
    "grpc": "step, tokens",
    "google.protobuf": "step, tokens",
    "xxhash": "step, tokens",
    "safetensors": "tokens",
    "transformers": "tokens",
}


def source_roots() -> list[Path]:
    """Return the folders of this checkout that its packages are imported from, and the one of the tests."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    also = settings["tool"]["pytest"]["ini_options"]["pythonpath"]
    return [*((ROOT / package).parent for package in packages), *(ROOT / folder for folder in also), ROOT]


def missing_modules() -> list[str]:
    """Return each module that is not there, with what fails for it."""
    return [f"{module} ({needs})" for module, needs in _NEEDED.items() if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def card() -> str:
    """Return what nvidia-smi says of the card: clocks and temperature now; empty without it."""
    if shutil.which("nvidia-smi") is None:
        return ""
    fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"


def main() -> int:
    """Print the GPU and versions as JSON; return 0, 3 with what to do if there is none."""
    from tests.perf.kernels.harness import NoGpuError, require_gpu, versions

    try:
        found = {"GPU": require_gpu(), **versions()}
    except NoGpuError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
