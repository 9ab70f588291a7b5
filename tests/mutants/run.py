"""Let mutmut make and test a group's mutants in build/mutants/<group>, and keep there when, on what, how long."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.mutants.stage import ROOT, Group, stage

BUILD = ROOT / "build" / "mutants"


@dataclass(frozen=True, slots=True)
class Run:
    """When a group was run, on which code, and how long it took."""

    commit: str
    """Ends in -dirty if the tree was not what was committed."""
    date: str
    """UTC, as it began."""
    seconds: int


def run(group: Group, jobs: int) -> Run:
    """Let mutmut make and test the group's mutants, `jobs` at a time; its words go to a log beside the folder."""
    folder = BUILD / group.name
    stage(group, folder)
    log = folder.with_suffix(".log")
    path = os.pathsep.join(filter(None, (str(BUILD / "tool"), os.environ.get("PYTHONPATH"))))
    # Hashes of strings vary from process to process: the order of sets would, too.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(jobs)]
    commit, date = _commit(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    begun = time.monotonic()
    with log.open("wb") as output:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output, check=False)
    if done.returncode:
        sys.exit(f"mutmut failed on {group.name}, exit status {done.returncode}: see {log.relative_to(ROOT)}")
    kept = Run(commit, date, round(time.monotonic() - begun))
    _record(folder).write_text(json.dumps(asdict(kept)) + "\n")
    return kept


def last(group: Group) -> Run:
    """Return what is kept of the group's last run; exit if it was never run to its end."""
    record = _record(BUILD / group.name)
    if not record.is_file():
        sys.exit(f"{group.name} was not run to its end: `make mutants GROUP={group.name}`")
    return Run(**json.loads(record.read_text()))


def _record(folder: Path) -> Path:
    return folder / "run.json"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
