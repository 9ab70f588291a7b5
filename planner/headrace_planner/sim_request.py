"""One simulated request: the mutable object that moves through router, prefill and decode.

QUEUED ──placed──► PREFILL ──first token──► HANDOFF ──pages arrived──► DECODE ──last token──► DONE
   ▲                  │  └───────────────only one token asked for────────────────────────────► DONE
   │                  └── placed colocated: PREFILL and DECODE are one worker's, no HANDOFF
   └───── a worker it was on ended: the next attempt prefills the prompt and every token so far
QUEUED ──larger than any worker's memory──► REFUSED
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from headrace_core.request_trace import Workload
from headrace_router.placement.capacity import Waiting
from headrace_router.placement.fair_queue import Client, Turn
from headrace_router.placement.policy import EXPECTED_OUTPUT_TOKENS
from headrace_router.placement.prefix import prefix_key

if TYPE_CHECKING:
    from headrace_router.placement.placed import Placed

    from headrace_planner.sim_router import Account

_UNKNOWN = Waiting(0, 0, 0)
_CLIENT = ("all",)


class State(Enum):
    """See the module."""

    QUEUED = "queued"
    PREFILL = "prefill"
    HANDOFF = "handoff"
    DECODE = "decode"
    DONE = "done"
    REFUSED = "refused"


class HasCache(Protocol):
    """A simulated worker's prefix cache."""

    def num_cached_tokens(self, request: SimRequest) -> int:
        """Return how many of the request's tokens it has."""
        ...


@dataclass(slots=True, eq=False)
class SimRequest:
    """`num_done` output tokens reached the router; `key` names the attempt under way."""

    index: int
    arrival_s: float
    num_prompt: int
    num_output: int
    blocks: Sequence[int]
    prefix: int
    waiting: Waiting = _UNKNOWN
    """What placement needs to know, while it is queued."""
    num_done: int = 0
    attempt: int = 0
    key: int = -1
    state: State = State.QUEUED
    avoid: frozenset[str] = frozenset()
    num_to_prefill: int = 0
    """Prompt tokens of the attempt under way: the prompt and what earlier attempts produced."""
    num_cached: int = 0
    """Prompt tokens that were found in caches, of all attempts."""
    takes_all_pages: bool = False
    """True where a worker gives a sequence the pages of its whole output at once: fast fidelity."""
    priority: int = 0
    """Its client's lower ones go first."""
    client: Client = ()
    """Whose it is; empty: nobody's who shares with others."""
    placed: Placed[SimRequest, Account] | None = None
    """What the attempt under way was promised."""
    has_pages: bool = False
    """Of the attempt under way: its decode worker has pages for what is handed over."""
    is_offered: bool = False
    """Its decode worker knows that the prompt is computed."""
    prefill: int = -1
    """Number of the worker that computes the prompt; -1: none, or the decode worker itself."""
    decode: int = -1
    placed_s: float = 0.0
    first_token_s: float = float("nan")
    last_token_s: float = 0.0
    turn: Turn = field(init=False)
    """Its standing in the queue, for all attempts."""

    def __post_init__(self) -> None:
        """Take its place."""
        expected = min(self.num_output, EXPECTED_OUTPUT_TOKENS)
        self.turn = Turn(self.client or _CLIENT, (self.priority, self.index), self.num_prompt + expected)

    @property
    def promised(self) -> Placed[SimRequest, Account]:
        """What the attempt under way was promised; there is one."""
        assert self.placed is not None, "an attempt is under way"
        return self.placed

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return self.num_prompt + self.num_done

    @property
    def num_held_tokens(self) -> int:
        """See `promises.Grows`."""
        return self.num_prompt + self.num_output if self.takes_all_pages else self.num_prompt + self.num_done

    @property
    def num_left(self) -> int:
        """Output tokens still to come."""
        return self.num_output - self.num_done

    def describe(self, *, most_step_s: float = math.inf) -> None:
        """Set `waiting` anew, as `headrace_router.requests.sample` does: when queued."""
        num_tokens, expected = self.num_tokens, self.num_left
        if not self.attempt and expected > EXPECTED_OUTPUT_TOKENS:
            expected = EXPECTED_OUTPUT_TOKENS
        self.waiting = Waiting(
            num_tokens,
            num_tokens + expected,
            self.prefix,
            self.avoid,
            has_output=self.num_done > 0,
            client=self.client,
            most_step_s=most_step_s,
            prefix=self,
        )

    def num_cached_tokens(self, cached: HasCache, page_size: int) -> int:
        """Return how many of the prompt's tokens a worker has cached; see `placement.prefix.Beginnings`."""
        del page_size  # each worker knows its own
        return cached.num_cached_tokens(self)

    def token_ids(self, block_tokens: int, unit_tokens: int) -> list[int]:
        """Return ids for what an attempt prefills, one for each `unit_tokens` tokens.

        Equal blocks have equal ids. Output tokens of earlier attempts have ids that no other request has.
        """
        per_block = block_tokens // unit_tokens
        units = -(-self.num_tokens // unit_tokens)
        prompt_units = min(units, -(-self.num_prompt // unit_tokens))
        ids = [block for block in self.blocks for _ in range(per_block)] if per_block > 1 else list(self.blocks)
        del ids[prompt_units:]
        own = -2 - self.index
        ids.extend([own] * (units - len(ids)))
        return ids


class Arrivals:
    """Makes a workload's requests, in its order."""

    def __init__(self, workload: Workload, *, takes_all_pages: bool) -> None:
        self.num_arrived = 0
        self._takes_all_pages = takes_all_pages
        self._workload = workload
        self._prefixes: dict[int, int] = {}

    def take(self, arrival_s: float) -> SimRequest:
        """Return the next request, which arrives at `arrival_s`."""
        workload, index = self._workload, self.num_arrived
        self.num_arrived += 1
        num_prompt = int(workload.num_prompt[index])
        if workload.blocks is not None and workload.blocks[index]:
            blocks: Sequence[int] = workload.blocks[index]
            prefix = self._prefix(blocks[0])
        else:
            count = -(-num_prompt // workload.block_tokens)
            blocks = range(index << 20, (index << 20) + count)
            prefix = index * 0x9E3779B97F4A7C15 & (1 << 64) - 1
        num_output = int(workload.num_output[index])
        clients, priorities = workload.clients, workload.priorities
        return SimRequest(
            index,
            arrival_s,
            num_prompt,
            num_output,
            blocks,
            prefix,
            takes_all_pages=self._takes_all_pages,
            priority=0 if priorities is None else priorities[index],
            client=() if clients is None else (f"client-{clients[index]}",),
        )

    def _prefix(self, first_block: int) -> int:
        """Return the router's prefix key of prompts that begin with `first_block`."""
        key = self._prefixes.get(first_block)
        if key is None:
            key = self._prefixes[first_block] = prefix_key([first_block])
        return key
