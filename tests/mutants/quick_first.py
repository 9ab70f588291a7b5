"""Becomes tests/unit/conftest.py of the staged tree: the quickest tests go first, since most mutants die of one.

Many of the others let what a test waits for never come (if the unchanged code needs longer, nothing runs), or loop.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from headrace_core.testing import async_test

# Before a test file imports them.
async_test.WAIT_S = 5.0
async_test._TEST_LIMIT_S = 4 * async_test.WAIT_S

# What mutmut measured on the unchanged code, unless this is where it measures.
_STATS = Path("mutmut-stats.json")
_SECONDS: dict[str, float] = json.loads(_STATS.read_text())["duration_by_test"] if _STATS.is_file() else {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _SECONDS.get(item.nodeid, 0.0))


signal.signal(signal.SIGPROF, lambda *_: os._exit(36))  # mutmut's status of what took too long


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test use so much CPU and no more: mutmut alone would let a quick one loop for minutes."""
    if item.nodeid in _SECONDS:
        signal.setitimer(signal.ITIMER_PROF, 2.0 + 10 * _SECONDS[item.nodeid])
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
