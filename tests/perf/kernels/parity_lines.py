"""A pytest plugin: `--lines PATH` appends a JSON line for each test that begins and for each outcome, as it comes.

Whoever ends the run early has what was found, and the tests that began and never ended: those that hang.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, default=None, help="append a JSON line for each test as it comes")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("lines")
    # Under xdist the process that gives out the tests hears of all of them.
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Lines(path), "lines")


class _Lines:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(test=nodeid, outcome="began")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._write(
                test=report.nodeid, outcome=_outcome(report), why=_why(report), seconds=round(report.duration, 2)
            )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(test=report.nodeid, outcome="failed", why=_why(report))

    def _write(self, **line: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _outcome(report: pytest.TestReport) -> str:
    return "expected" if hasattr(report, "wasxfail") else report.outcome


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    if report.passed or report.skipped:
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr)[-500:]
