"""Which families pass their parity tests on the GPU at hand: the speed of a wrong kernel is of no use."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
PARITY = ROOT / "tests" / "parity" / "kernels"
_TEST_S = 60
# Warnings and unknown settings are errors in tests, with the versions of requirements.lock. A GPU's machine has its own
# Python, torch and plugins, whose warnings say nothing of a kernel. A test that hangs in the compiler, where no Python
# runs, ends its process: with xdist that costs the test alone.
_OPTIONS = (
    *("-v", "--tb=short", "-p", "no:benchmark", "-p", "no:cacheprovider", "-p", "tests.perf.kernels.parity_lines"),
    *("-o", "addopts=--import-mode=importlib -rfE", "-o", "filterwarnings=default"),
    *("-o", f"faulthandler_timeout={_TEST_S}", "-o", "faulthandler_exit_on_timeout=true"),
)


@dataclass(frozen=True)
class Verdict:
    """What the tests found: families with a test that failed or none that passed, and failed tests of no one family."""

    wrong: frozenset[str]
    elsewhere: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every test passed."""
        return not self.wrong and not self.elsewhere


def command(what: Sequence[str], lines: Path, processes: int = 1) -> list[str]:
    """Return the command that runs files or tests and appends to `lines`, in several processes where xdist is there."""
    parallel = ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", *_OPTIONS, *parallel, f"--lines={lines}", *what]


def run(families: Iterable[str]) -> Verdict:
    """Run the tests of `families`, all of them to their end, and those of no one family if there are several."""
    families = list(families)
    files = [PARITY / f"test_{family}.py" for family in families]
    what = [path for path in files if path.exists()] if len(families) == 1 else [PARITY]
    with tempfile.TemporaryDirectory(prefix="headrace-parity-") as folder:
        lines = Path(folder) / "parity.jsonl"
        subprocess.run(command([str(path) for path in what or [PARITY]], lines), cwd=ROOT, check=False)
        return judge(lines.read_text() if lines.exists() else "", families)


def outcomes(lines: str) -> dict[str, dict[str, str]]:
    """Return the last that is known of each test, by its name: outcome "began" is that of one that never ended."""
    found: dict[str, dict[str, str]] = {}
    for line in map(json.loads, lines.splitlines()):
        # A test that fails when it is taken down has passed before.
        if found.get(line["test"], {}).get("outcome") != "failed":
            found[line["test"]] = line
    return found


def judge(lines: str, families: Iterable[str]) -> Verdict:
    """Read the plugin's lines; a run that ended before it wrote one, "", leaves every family wrong."""
    tested = {family for family in families if (PARITY / f"test_{family}.py").exists()}
    passed: set[str] = set()
    failed: set[str] = set()
    elsewhere: list[str] = []
    for test, line in outcomes(lines).items():
        family = Path(test.partition("::")[0]).stem.removeprefix("test_")
        if line["outcome"] == "passed":
            passed.add(family)
        elif line["outcome"] in ("skipped", "expected"):
            continue
        elif family in tested:
            failed.add(family)
        else:
            elsewhere.append(test)
    wrong = failed | (tested - passed)
    return Verdict(frozenset(wrong if lines else families), tuple(elsewhere))
