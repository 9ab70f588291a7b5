"""Requests to serve: recorded traces in the formats of Mooncake and Azure, as arrays. Files are read, never copied.

A prompt is a list of blocks of `block_tokens` tokens; equal block ids are equal tokens after equal beginnings, so two
prompts that start with the same ids share a prefix.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO

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
    clients: Sequence[int] | None = None
    """Whose each request is; None: all are one client's, which need share with nobody."""
    priorities: Sequence[int] | None = None
    """Of each among its client's: lower ones go first; None: in order of arrival."""

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
            self.clients[part] if self.clients is not None else None,
            self.priorities[part] if self.priorities is not None else None,
        )


def load_trace(path: Path) -> Workload:
    """Read a trace: `.jsonl` in Mooncake's format, `.csv` in Azure's. Its first request arrives at 0, in any order.

    Raises:
        InvalidRequestError: BAD_TRACE, naming the file, the line and what is wrong.
    """
    if not path.is_file():
        raise InvalidRequestError("BAD_TRACE", f"{path} is no file")
    try:
        requests = sorted(_requests(path), key=lambda request: request.arrival_s)
    except (OSError, csv.Error) as error:
        raise InvalidRequestError("BAD_TRACE", f"{path}: {error}") from error
    if not requests:
        raise InvalidRequestError("BAD_TRACE", f"{path} has no requests")
    first_s = requests[0].arrival_s
    has_blocks = any(request.blocks for request in requests)
    return Workload(
        np.array([request.arrival_s - first_s for request in requests]),
        np.array([max(1, request.num_prompt) for request in requests]),
        np.array([max(1, request.num_output) for request in requests]),
        [request.blocks for request in requests] if has_blocks else None,
    )


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


_MOST_TOKENS = 100_000_000


@dataclass(frozen=True, slots=True)
class _Recorded:
    """One line. A length of 0, which some recorders write, is taken for 1."""

    arrival_s: float
    num_prompt: int
    num_output: int
    blocks: tuple[int, ...] = ()

    def checked(self) -> _Recorded:
        if not math.isfinite(self.arrival_s):
            raise ValueError(f"the time {self.arrival_s} is no number")
        for length in (self.num_prompt, self.num_output):
            if not 0 <= length <= _MOST_TOKENS:
                raise ValueError(f"the length {length} is not from 0 to {_MOST_TOKENS}")
        return self


def _requests(path: Path) -> Iterator[_Recorded]:
    with path.open(newline="", errors="replace") as lines:
        for number, parse in _rows(path, lines):
            try:
                yield parse().checked()
            except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
                expected = "JSON lines with timestamp, input_length, output_length, hash_ids; or CSV with TIMESTAMP, "
                text = f"{path}, line {number}: {error!r}; expected {expected}ContextTokens, GeneratedTokens"
                raise InvalidRequestError("BAD_TRACE", text) from error


def _rows(path: Path, lines: TextIO) -> Iterator[tuple[int, Callable[[], _Recorded]]]:
    """Yield the number of each line that is not empty, and what reads it."""
    if path.suffix == ".jsonl":
        yield from ((number, partial(_mooncake, line)) for number, line in enumerate(lines, 1) if line.strip())
    else:
        yield from ((number, partial(_azure, row)) for number, row in enumerate(csv.DictReader(lines), 2))


def _mooncake(line: str) -> _Recorded:
    record: dict[str, Any] = json.loads(line)
    arrival_s = float(record["timestamp"]) / 1000
    blocks = tuple(int(block) % _HASHES for block in record.get("hash_ids") or ())
    return _Recorded(arrival_s, int(record["input_length"]), int(record["output_length"]), blocks)


_HASHES = 1 << 64
"""Hashes that were written as signed numbers become unsigned."""


def _azure(row: dict[str, str]) -> _Recorded:
    # Seven digits of a second: one more than Python reads.
    arrival_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
    return _Recorded(arrival_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
