"""From options to what is asked: the dataset, and the levels of load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace_core.errors import InvalidRequestError
from headrace_core.request_trace import load_trace

from headrace_client.bench import datasets
from headrace_client.bench.load import Arrivals
from headrace_client.bench.prompts import Session


@dataclass(frozen=True, slots=True)
class Dataset:
    """What to ask; None: as the preset says."""

    name: str
    trace: Path | None = None
    num_requests: int | None = None
    num_input: int | None = None
    num_output: int | None = None
    spread: float = 0.0
    num_prefixes: int = 8
    num_prefix_tokens: int = 512
    num_turns: int = 4
    time_scale: float = 1.0
    length_scale: float = 1.0
    seed: int = 0

    def sessions(self) -> list[Session]:
        """Return what is asked.

        Raises:
            InvalidRequestError: BAD_OPTION, BAD_TRACE.
        """
        if self.trace is not None:
            workload = load_trace(self.trace)
            return datasets.from_trace(
                workload,
                num_requests=self.num_requests,
                time_scale=self.time_scale,
                length_scale=self.length_scale,
                seed=self.seed,
            )
        preset = datasets.PRESETS.get(self.name)
        if preset is None:
            known = ", ".join(datasets.PRESETS)
            raise InvalidRequestError("BAD_OPTION", f"--dataset {self.name!r} is none of {known}")
        shape = datasets.Shape(
            self.num_requests or preset.num_requests,
            self._scaled(self.num_input or preset.num_input),
            self._scaled(self.num_output or preset.num_output),
            self.spread,
            self.seed,
        )
        if self.name == "shared-prefix":
            num_tokens = self._scaled(self.num_prefix_tokens)
            prefixes = {"num_prefixes": self.num_prefixes, "num_prefix_tokens": num_tokens}
            return datasets.shared_prefix(shape, **prefixes)
        if self.name == "multi-turn":
            return datasets.multi_turn(shape, num_turns=self.num_turns)
        return datasets.independent(shape)

    def _scaled(self, num_tokens: int) -> int:
        return max(1, round(num_tokens / self.length_scale))


def warm_up_of(sessions: Sequence[Session], count: int) -> list[Session]:
    """Return `count` requests of the mean lengths, which share nothing with `sessions`."""
    turns = [turn for session in sessions for turn in session.turns]
    num_input = round(sum(turn.num_new_tokens for turn in turns) / len(turns))
    num_output = round(sum(turn.num_output for turn in turns) / len(turns))
    return datasets.independent(datasets.Shape(count, num_input, max(1, num_output), seed=_WARM_UP_SEED))


_WARM_UP_SEED = 1 << 31
"""No seed of a dataset, whose prompts are to be new to the server."""


def levels_of(rates: str | None, concurrencies: str | None, *, burstiness: float, seed: int) -> list[Arrivals]:
    """Return the levels of load, one run each, from lists such as `1,8,32`; one of the two may have several.

    Raises:
        InvalidRequestError: BAD_OPTION, naming what is wrong.
    """
    found_rates = _numbers("--request-rate", rates)
    found_clients = _numbers("--concurrency", concurrencies)
    if len(found_rates) > 1 and len(found_clients) > 1:
        raise InvalidRequestError("BAD_OPTION", "--request-rate and --concurrency both have several levels; ramp one")
    for clients in found_clients:
        if clients is not None and not clients.is_integer():
            raise InvalidRequestError("BAD_OPTION", f"--concurrency {clients:g} is no whole number")
    return [
        Arrivals(rate, burstiness, None if clients is None else int(clients), seed)
        for rate in found_rates
        for clients in found_clients
    ]


def _numbers(option: str, text: str | None) -> list[float | None]:
    if text is None:
        return [None]
    numbers: list[float | None] = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = 0.0
        if not number > 0:
            raise InvalidRequestError("BAD_OPTION", f"{option} {part!r} is no positive number; write 8, or 1,8,32")
        numbers.append(number)
    return numbers
