"""Becomes tests/unit/conftest.py of the staged tree: most mutants die of a quick test, so those by example go last."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: getattr(getattr(item, "obj", None), "is_hypothesis_test", False))
