"""Real processes on loopback, shared by the tests of one file: starting a cluster takes seconds."""

from pathlib import Path

import pytest
from headrace_core.testing.cluster_checks import Reference

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "demo" / "model"


@pytest.fixture(scope="session")
def model_dir() -> Path:
    return MODEL


@pytest.fixture(scope="session")
def reference(model_dir) -> Reference:
    return Reference(model_dir)
