"""Who is alive: every address discovered, the worker behind it, and what the fleet as a whole can do.

A fleet serves one model: the first worker that joins decides its fingerprint, layout, vocabulary and end-of-sequence
ids. A worker with another one is refused, and asked again, as long as a worker of the fleet is connected; when none is,
the next that comes decides anew. So any prefill worker fits any decode worker, and who joins changes nobody's answer.
An address that is no longer listed gets no new sequences and is left when its last one ends.

What the fleet can do is what the workers can that are ready now, and nothing is kept of those that left: a request that
comes while no pair of workers is ready waits for one, and is checked against that.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.v1 import worker_service_pb2
from headrace_core.discovery import Discovery
from headrace_core.http2.call import Dial, open_call
from headrace_core.kv.layout import KvLayout
from headrace_core.rpc import Connect, channel

from headrace_router.fleet.link import Link
from headrace_router.fleet.worker import Worker
from headrace_router.placement.breaker import admitted

_FILE_CHECK_S = 0.5
_MOST_SHOWN_IDS = 16


@dataclass(frozen=True, slots=True)
class FleetModel:
    """What the workers that are ready now serve together."""

    fingerprint: str
    vocab_size: int
    max_context_tokens: int
    """The most that some pair of them can hold: the smaller of its two, or a `both` worker's own."""
    eos_token_ids: tuple[int, ...]
    without_grammars: str
    """The address of one of them that can't hold an answer to a grammar; empty if all can."""


class Registry:
    """All links. `run` it as a task. Event loop only."""

    def __init__(
        self, discovery: Discovery, *, dns_refresh_s: float, connect: Connect = channel, dial: Dial = open_call
    ) -> None:
        """Args: `connect` reaches workers, `dial` opens their sessions."""
        self.listeners: list[Callable[[], None]] = []
        self.router_id = secrets.randbits(64) | 1
        """Names this process at its workers; never 0."""
        self.model: FleetModel | None = None
        """None while no pair of workers is ready to serve a request."""
        self._discovery = discovery
        self._dns_refresh_s = dns_refresh_s
        self._connect = connect
        self._dial = dial
        self._links: dict[str, tuple[Link, asyncio.Task[None]]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._has_model = asyncio.Event()

    @property
    def links(self) -> list[Link]:
        """Every address known, in order."""
        return [link for _, (link, _) in sorted(self._links.items())]

    @property
    def fingerprint(self) -> str:
        """The model that the connected workers serve; empty while none is."""
        return next((link.worker.info.model_fingerprint for link, _ in self._links.values() if link.worker), "")

    def workers(self) -> list[Worker]:
        """Return those that take new sequences now."""
        takers = [link.worker for link, _ in self._links.values() if link.takes_work and link.worker is not None]
        return admitted(takers, self.ready(), time.monotonic())

    def ready(self) -> list[Worker]:
        """Return the fleet that is there: those that are ready, be it that they take nothing at this moment."""
        return [link.worker for link, _ in self._links.values() if link.is_ready and link.worker is not None]

    async def wait_model(self) -> FleetModel:
        """Wait until workers are ready that can serve a request, and return what they serve."""
        while self.model is None:
            await self._has_model.wait()
        return self.model

    def missing(self) -> str:
        """Say what the fleet lacks to serve any request; empty if it lacks nothing."""
        ready = self.ready()
        has_prefill = any(worker.can_prefill for worker in ready)
        has_decode = any(worker.can_decode for worker in ready)
        if has_prefill and has_decode:
            return ""
        lack = "no worker is ready"
        if has_prefill or has_decode:
            lack = "no decode worker is ready" if has_prefill else "no prefill worker is ready"
        known = ", ".join(
            f"{link.address} is {link.state.value}" + (f" ({link.detail})" if link.detail else "")
            for link in self.links
        )
        return f"{lack}; " + (known or "no worker address is known: see --workers and --workers-file")

    async def run(self) -> None:
        """Follow discovery until cancelled; then leave every worker. What a link raises, a bug, it raises too."""
        looked_up_s = float("-inf")
        discovery = self._discovery
        try:
            while True:
                discovery.has_news.clear()
                has_changed = await discovery.read_file()
                now_s = time.monotonic()
                if has_changed or now_s - looked_up_s >= self._dns_refresh_s:
                    looked_up_s = now_s
                    discovery.look_up()
                discovery.drop_gone(self._is_there)
                self._follow(discovery.addresses)
                self._leave_idle()
                self._check_links()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(_FILE_CHECK_S, self._dns_refresh_s)):
                        await discovery.has_news.wait()
        finally:
            tasks = [*(task for _, task in self._links.values()), *self._leaving]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, discovery.close(), return_exceptions=True)

    def judge(self, link: Link, info: worker_service_pb2.GetInfoResponse, layout: KvLayout) -> str:
        """Return why a worker can't join; empty if it can. See `link.Fleet`."""
        for other, _ in self._links.values():
            worker = other.worker
            if other is link or worker is None:
                continue
            if info.incarnation == worker.info.incarnation:
                return f"it is the process that is also at {other.address}"
            ours, theirs = info.model_fingerprint, worker.info.model_fingerprint
            if ours != theirs:
                return f"its model is {ours[:12]}; this fleet serves {theirs[:12]}"
            if layout != worker.layout:
                return f"its cache layout differs from this fleet's: {layout.difference(worker.layout)}"
            if info.vocab_size != worker.info.vocab_size:
                return f"its vocabulary has {info.vocab_size} tokens; this fleet's has {worker.info.vocab_size}"
            ours_eos, theirs_eos = _eos_ids(info), _eos_ids(worker.info)
            if ours_eos != theirs_eos:
                return f"its end-of-sequence ids are {_shown(ours_eos)}; this fleet's are {_shown(theirs_eos)}"
        return ""

    def on_change(self) -> None:
        """Tell the listeners. See `link.Fleet`."""
        for listener in self.listeners:
            listener()

    def on_state(self) -> None:
        """See what the fleet can do now. See `link.Fleet`."""
        self.model = _model(self.ready())
        if self.model is None:
            self._has_model.clear()
        else:
            self._has_model.set()

    def _follow(self, addresses: Sequence[str]) -> None:
        listed = set(addresses)
        for address in addresses:
            if address not in self._links:
                link = Link(address, self, self._connect, self._dial)
                self._links[address] = link, asyncio.create_task(link.run(), name=f"link-{address}")
        for address, (link, _) in self._links.items():
            link.set_listed(address in listed)
        self.on_change()

    def _is_there(self, address: str) -> bool:
        """Return whether a worker is connected at an address."""
        return address in self._links and self._links[address][0].worker is not None

    def _leave_idle(self) -> None:
        for address, (link, task) in list(self._links.items()):
            if not link.is_listed and not link.is_busy:
                del self._links[address]
                task.cancel()
                # Kept until it has closed its connection: the loop itself only knows tasks that somebody holds.
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)

    def _check_links(self) -> None:
        for _, task in self._links.values():
            if task.done():
                task.result()


def _model(ready: Sequence[Worker]) -> FleetModel | None:
    """Return what these workers, all of one model, serve together; None if no pair of them can serve a request."""
    context = _most_context(ready)
    if not context:
        return None
    return FleetModel(
        fingerprint=ready[0].info.model_fingerprint,
        vocab_size=ready[0].info.vocab_size,
        max_context_tokens=context,
        eos_token_ids=_eos_ids(ready[0].info),
        without_grammars=next((worker.address for worker in ready if not worker.info.has_grammars), ""),
    )


def _eos_ids(info: worker_service_pb2.GetInfoResponse) -> tuple[int, ...]:
    return tuple(sorted(set(info.eos_token_ids)))


def _shown(token_ids: tuple[int, ...]) -> str:
    """Return a list of ids that may be long, for a line of text."""
    return str(list(token_ids)) if len(token_ids) <= _MOST_SHOWN_IDS else f"{len(token_ids)} others"


def _most_context(ready: Sequence[Worker]) -> int:
    """Return the longest sequence that a pair of a prefill and a decode worker, or one of both roles, can hold."""
    prefill = max((worker.info.max_context_tokens for worker in ready if not worker.can_decode), default=0)
    decode = max((worker.info.max_context_tokens for worker in ready if worker.can_decode), default=0)
    both = max(
        (worker.info.max_context_tokens for worker in ready if worker.can_decode and worker.can_prefill), default=0
    )
    return max(min(prefill, decode), both)
