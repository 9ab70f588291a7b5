"""Who is alive: every address discovered, the worker behind it, and what the fleet as a whole can do.

A fleet serves one model: the first worker that joins decides its fingerprint and layout. A worker with another one is
refused, and asked again, as long as a worker of the fleet is connected; when none is, the next that comes decides
anew. So any prefill worker fits any decode worker. An address that is no longer listed gets no new sequences and is
left when its last one ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from headrace.v1 import worker_service_pb2
from headrace.v1.types_pb2 import WORKER_ROLE_BOTH, WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL, WorkerRole
from headrace_core.errors import InvalidRequestError
from headrace_core.kv.layout import KvLayout
from headrace_core.wire import decode_layout

from headrace_router.discovery import Discovery
from headrace_router.link import Link, LinkState
from headrace_router.worker import Worker

_FILE_CHECK_S = 0.5

ROLE_NAMES: dict[WorkerRole.ValueType, str] = {
    WORKER_ROLE_PREFILL: "prefill",
    WORKER_ROLE_DECODE: "decode",
    WORKER_ROLE_BOTH: "both",
}


@dataclass(frozen=True, slots=True)
class FleetModel:
    """What the fleet serves."""

    fingerprint: str
    layout: KvLayout
    vocab_size: int
    max_context_tokens: int
    """The smallest of its workers'."""
    eos_token_ids: tuple[int, ...]


class Registry:
    """All links. `run` it as a task. Event loop only."""

    def __init__(self, discovery: Discovery, *, dns_refresh_s: float) -> None:
        self.listeners: list[Callable[[], None]] = []
        self.model: FleetModel | None = None
        """The last one known, also while no worker is connected."""
        self._discovery = discovery
        self._dns_refresh_s = dns_refresh_s
        self._links: dict[str, tuple[Link, asyncio.Task[None]]] = {}
        self._joined = asyncio.Event()

    @property
    def links(self) -> list[Link]:
        """Every address known, in order."""
        return [link for _, (link, _) in sorted(self._links.items())]

    def workers(self) -> list[Worker]:
        """Return those that take new sequences now."""
        return [link.worker for link, _ in self._links.values() if link.takes_work and link.worker is not None]

    async def wait_model(self) -> FleetModel:
        """Wait until a worker has ever joined and return what the fleet serves."""
        await self._joined.wait()
        assert self.model is not None, "a worker joined, so the model is known"
        return self.model

    def missing(self) -> str:
        """Say what the fleet lacks to serve any request; empty if it lacks nothing."""
        ready = [link.worker for link, _ in self._links.values() if link.state is LinkState.READY]
        has_prefill = any(worker is not None and worker.can_prefill for worker in ready)
        has_decode = any(worker is not None and worker.can_decode for worker in ready)
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
        try:
            while True:
                has_changed = self._discovery.has_file_changed()
                now_s = time.monotonic()
                if has_changed or now_s - looked_up_s >= self._dns_refresh_s:
                    looked_up_s = now_s
                    self._follow(await self._discovery.resolve())
                self._leave_idle()
                self._check_links()
                await asyncio.sleep(min(_FILE_CHECK_S, self._dns_refresh_s))
        finally:
            tasks = [task for _, task in self._links.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def judge(self, link: Link, info: worker_service_pb2.GetInfoResponse) -> str:
        """Return why a worker can't join; empty if it does. See `link.Fleet`."""
        if info.role not in ROLE_NAMES:
            return f"its role is {info.role}, which this router does not know"
        try:
            layout = decode_layout(info.layout)
        except InvalidRequestError as error:
            return str(error)
        others = [other for other, _ in self._links.values() if other is not link and other.worker is not None]
        for other in others:
            if other.info is not None and other.info.incarnation == info.incarnation:
                return f"it is the process that is also at {other.address}"
        model = self.model
        if model is not None and others:
            if info.model_fingerprint != model.fingerprint:
                return f"its model is {info.model_fingerprint[:12]}; this fleet serves {model.fingerprint[:12]}"
            if layout != model.layout:
                return f"its cache layout is {layout}; this fleet's is {model.layout}"
        contexts = [other.info.max_context_tokens for other in others if other.info is not None]
        self.model = FleetModel(
            fingerprint=info.model_fingerprint,
            layout=layout,
            vocab_size=info.vocab_size,
            max_context_tokens=min([info.max_context_tokens, *contexts]),
            eos_token_ids=tuple(info.eos_token_ids),
        )
        self._joined.set()
        return ""

    def on_change(self) -> None:
        """Tell the listeners. See `link.Fleet`."""
        for listener in self.listeners:
            listener()

    def _follow(self, addresses: set[str]) -> None:
        for address in addresses - self._links.keys():
            link = Link(address, self)
            self._links[address] = link, asyncio.create_task(link.run(), name=f"link-{address}")
        for address, (link, _) in self._links.items():
            link.set_listed(address in addresses)
        self.on_change()

    def _leave_idle(self) -> None:
        for address, (link, task) in list(self._links.items()):
            if not link.is_listed and not (link.worker is not None and link.worker.is_busy):
                task.cancel()
                del self._links[address]

    def _check_links(self) -> None:
        for _, task in self._links.values():
            if task.done():
                task.result()
