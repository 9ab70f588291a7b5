"""A JSON report that several commands share: each replaces its own keys and leaves the others'."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """Return the report; empty if there is none yet."""
    return json.loads(path.read_text()) if path.is_file() else {}


def merge(path: Path, values: Mapping[str, Any]) -> None:
    """Set these keys of the report; whoever reads meanwhile sees it before or after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**read(path), **values}, indent=1) + "\n")
    partial.replace(path)
