"""Requests to serve: recorded traces in the formats of Mooncake and Azure, as arrays. Files are read, never copied.

A prompt is a list of blocks of `block_tokens` tokens; equal block ids are equal tokens after equal beginnings, so two
prompts that start with the same ids share a prefix.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace_core.errors import InvalidRequestError

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival. `blocks` is None when no two prompts share anything."""

    arrival_s: NDArray[np.float64]
    num_prompt: NDArray[np.int64]
    num_output: NDArray[np.int64]
    blocks: Sequence[Sequence[int]] | None = None
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    max_in_flight: int = 0
    """Clients that each wait for their answer before they ask again; 0: requests come when they come."""

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """From time 0 to the last arrival."""
        return float(self.arrival_s[-1]) if len(self) else 0.0

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self) / self.duration_s if self.duration_s > 0 else 0.0

    def scaled(self, factor: float) -> Workload:
        """Return the same requests arriving `factor` times as fast."""
        return self._with(self.arrival_s / factor, slice(None))

    def head(self, num_requests: int) -> Workload:
        """Return the first `num_requests`."""
        return self._with(self.arrival_s, slice(0, num_requests))

    def until(self, end_s: float) -> Workload:
        """Return the requests that arrive before `end_s`."""
        return self.head(int(np.searchsorted(self.arrival_s, end_s)))

    def _with(self, arrival_s: NDArray[np.float64], part: slice) -> Workload:
        return Workload(
            arrival_s[part],
            self.num_prompt[part],
            self.num_output[part],
            self.blocks[part] if self.blocks is not None else None,
            self.block_tokens,
            self.max_in_flight,
        )


def load_trace(path: Path) -> Workload:
    """Read a trace: `.jsonl` in Mooncake's format, `.csv` in Azure's.

    Raises:
        InvalidRequestError: BAD_TRACE, naming the file and what is wrong.
    """
    if not path.is_file():
        raise InvalidRequestError("BAD_TRACE", f"{path} is no file")
    try:
        workload = _mooncake(path) if path.suffix == ".jsonl" else _azure(path)
    except (KeyError, ValueError, TypeError) as error:
        expected = "JSON lines with timestamp, input_length, output_length, hash_ids; or CSV with TIMESTAMP, "
        text = f"{path}: {error!r}; expected {expected}ContextTokens, GeneratedTokens"
        raise InvalidRequestError("BAD_TRACE", text) from error
    if not len(workload):
        raise InvalidRequestError("BAD_TRACE", f"{path} has no requests")
    return workload


def prefix_hits(workload: Workload) -> NDArray[np.int64]:
    """Return how many prompt tokens of each request an infinite prefix cache would hold when it arrives."""
    hits = np.zeros(len(workload), dtype=np.int64)
    seen: set[int] = set()
    for index, blocks in enumerate(workload.blocks or ()):
        count = next((place for place, block in enumerate(blocks) if block not in seen), len(blocks))
        hits[index] = count * workload.block_tokens
        seen.update(blocks)
    return np.minimum(hits, workload.num_prompt)


def prefix_hit_share(workload: Workload) -> float:
    """Return the share of prompt tokens that an infinite prefix cache would hold already."""
    return float(prefix_hits(workload).sum() / workload.num_prompt.sum())


def _mooncake(path: Path) -> Workload:
    arrivals: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    blocks: list[tuple[int, ...]] = []
    with path.open() as lines:
        for line in lines:
            record: dict[str, Any] = json.loads(line)
            arrivals.append(float(record["timestamp"]) / 1000)
            prompts.append(int(record["input_length"]))
            outputs.append(int(record["output_length"]))
            blocks.append(tuple(record.get("hash_ids", ())))
    order = np.argsort(np.array(arrivals), kind="stable")
    has_blocks = any(blocks)
    return Workload(
        np.array(arrivals)[order],
        np.maximum(1, np.array(prompts))[order],
        np.maximum(1, np.array(outputs))[order],
        [blocks[i] for i in order] if has_blocks else None,
    )


def _azure(path: Path) -> Workload:
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    # Seven digits of a second: one more than Python reads.
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    arrivals = np.array(times)
    order = np.argsort(arrivals, kind="stable")
    prompts = np.array([int(row["ContextTokens"]) for row in rows])
    outputs = np.array([int(row["GeneratedTokens"]) for row in rows])
    return Workload(arrivals[order] - arrivals.min(), np.maximum(1, prompts)[order], np.maximum(1, outputs)[order])
