"""Becomes tests/unit/conftest.py of the staged tree: most mutants die of a quick test, so those by example go last.

Many of the others let what a test waits for never come. If the unchanged code needs longer, nothing runs.
"""

from __future__ import annotations

import pytest
from headrace_core.testing import async_test

# Before a test file imports them.
async_test.WAIT_S = 5.0
async_test._TEST_LIMIT_S = 4 * async_test.WAIT_S


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: getattr(getattr(item, "obj", None), "is_hypothesis_test", False))
