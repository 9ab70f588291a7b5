"""Becomes tests/unit/conftest.py of the staged tree: the quickest tests go first, since most mutants die of one.

Many of the others let what a test waits for never come. If the unchanged code needs longer, nothing runs.
"""

from __future__ import annotations

import json
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
