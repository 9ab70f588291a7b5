"""Measured operations, from a file, to be laid over predictions.

    {"source": "H200, 2026-11-20", "points": [
      {"phase": "decode", "operation": "attention_absorbed", "seconds": 1.2e-3, "flops": 5.3e11, "bytes": 2.1e9}]}

`operation` is a name of `operations`; `seconds` of the whole step. A point without `flops` and `bytes` gets those that
the page's setting predicts, which is right if the setting is the one measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class MeasuredError(ValueError):
    """A file of measured operations can't be used."""


class MeasuredPoint(BaseModel):
    """One operation of one step, as measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    phase: Literal["prefill", "decode"]
    operation: str
    seconds: float = Field(gt=0)
    flops: float | None = Field(default=None, gt=0)
    bytes: float | None = Field(default=None, gt=0)


class MeasuredPoints(BaseModel):
    """A set of measurements and what they were made on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    points: list[MeasuredPoint]


def load_measured(path: Path) -> MeasuredPoints:
    """Read measured operations from a JSON file.

    Raises:
        MeasuredError: Naming the file and the field.
    """
    try:
        return MeasuredPoints.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MeasuredError(f"{path} can't be read: {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise MeasuredError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
