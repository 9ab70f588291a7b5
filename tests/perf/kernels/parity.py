"""Which families pass their parity tests on the GPU at hand: the speed of a wrong kernel is of no use."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[3]
PARITY = ROOT / "tests" / "parity" / "kernels"
# Warnings are errors in tests, with the versions of requirements.lock. A GPU's machine has its own Python, torch and
# plugins, whose warnings say nothing of a kernel.
OPTIONS = ("-p", "no:benchmark", "-o", "filterwarnings=default")


@dataclass(frozen=True)
class Verdict:
    """What the tests found: families with a test that failed or none that passed, and failed tests of no one family."""

    wrong: frozenset[str]
    elsewhere: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every test passed."""
        return not self.wrong and not self.elsewhere


def run(families: Iterable[str]) -> Verdict:
    """Run the tests of `families`, all of them to their end, and those of no one family if there are several."""
    families = list(families)
    files = [PARITY / f"test_{family}.py" for family in families]
    what = [path for path in files if path.exists()] if len(families) == 1 else [PARITY]
    with tempfile.TemporaryDirectory(prefix="headrace-parity-") as folder:
        report = Path(folder) / "parity.xml"
        command = [sys.executable, "-m", "pytest", "-q", *OPTIONS, f"--junitxml={report}", *map(str, what or [PARITY])]
        subprocess.run(command, cwd=ROOT, check=False)
        return judge(report.read_text() if report.exists() else "", families)


def judge(junit_xml: str, families: Iterable[str]) -> Verdict:
    """Read pytest's report; a run that ended before it wrote one, "", leaves every family wrong."""
    tested = {family for family in families if (PARITY / f"test_{family}.py").exists()}
    passed: set[str] = set()
    failed: set[str] = set()
    elsewhere: list[str] = []
    for case in ElementTree.fromstring(junit_xml).iter("testcase") if junit_xml else ():
        # A file that can't be imported has its own name here, and no class.
        module = case.get("classname") or case.get("name") or ""
        family = module.rpartition(".")[2].removeprefix("test_")
        outcomes = {outcome.tag for outcome in case} & {"failure", "error", "skipped"}
        if not outcomes:
            passed.add(family)
        elif outcomes == {"skipped"}:
            continue
        elif family in tested:
            failed.add(family)
        else:
            elsewhere.append(f"{module}::{case.get('name')}")
    wrong = failed | (tested - passed)
    return Verdict(frozenset(wrong if junit_xml else families), tuple(elsewhere))
