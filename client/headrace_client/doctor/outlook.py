"""What a worker would use here: asked of a process that decides as workers do, since nothing here knows torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from headrace_core.packages import WORKER_PACKAGES

from headrace_client.doctor.machine import Machine, last_line

_PROGRAM = ("-P", "-m", "headrace_core.worker.doctor", "--model", ".")
_TIMEOUT_S = 300.0
_REFUSED = 2
"""Its exit code where a worker would not start."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """`worker` is `headrace_core.worker.capabilities`' answer, or None: there is none."""

    worker: dict[str, Any] | None
    problem: str
    """Why no worker can run; empty: one can."""
    is_refused: bool = False
    """Whether it is a worker's own word, of this machine or its settings, rather than a package that can't be used."""

    @property
    def can_run(self) -> bool:
        """Whether a worker can run here."""
        return not self.problem


def outlook(machine: Machine) -> Outlook:
    """Ask, a few seconds: torch is imported there. Nothing is asked where packages are not installed."""
    lacking = [name for name in WORKER_PACKAGES if not machine.packages[name]]
    if lacking:
        return Outlook(None, f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed")
    try:
        done = subprocess.run([sys.executable, *_PROGRAM], capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Outlook(None, f"a worker's process did not answer in {_TIMEOUT_S:.0f} s")
    if done.returncode < 0:
        return Outlook(None, f"a worker's process was ended by signal {-done.returncode}")
    if done.returncode:
        refusals = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
        return Outlook(None, last_line(refusals[-1] if refusals else done.stderr), done.returncode == _REFUSED)
    worker: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Outlook(worker, worker["kernels_problem"])
