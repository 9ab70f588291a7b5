"""Transport `nixl`: one-sided reads by NVIDIA NIXL with UCX: RDMA, TCP, or on one machine out of the other process.

NIXL is no dependency of ours: docs/operations.md says how it is installed. What was found out about it decides how it
is used (1.5): giving a transfer up does not stop it, and bytes land after its release has said that it is done. So none
is given up: its handle is asked until it is over, and where that does not come, the agent is destroyed with all its
connections, and only then are the pages free. Each holder has an agent of its own here, so that this is nobody else's
loss. Agents' names are random: one that comes a second time is refused for good. What a transfer says at its end proves
nothing, as ever, and notifications are dropped. Nothing is unpickled: addresses are numbers of our own message.

An agent is used on one thread. A taker's is blocked by `transfer` while it reads another process. A holder's does what
is left to a holder (connecting, and answering over TCP) every millisecond: NIXL's own thread for that never sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import logging
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc.aio
import numpy as np
from headrace.v1 import types_pb2

from headrace_core.errors import HandoffLostError
from headrace_core.transfer.memory import PageMemory
from headrace_core.transfer.transport import Holding, Source, UnprovenError
from headrace_core.transfer.values import Run
from headrace_core.transfer.verify import run_to_its_end

log = logging.getLogger(__name__)

PROOF_TIMEOUT_S = 5.0
_PROOF_BYTES = 16
_TURN_S = 0.001
"""How long the thread asks for one transfer before it looks at the others."""

_ANSWER_PERIOD_S = 0.001

Region = tuple[int, int, int]
"""Address, bytes, device."""


def probe() -> str:
    """See `Transport.probe`."""
    if importlib.util.find_spec("nixl") is None:
        return "NIXL is not installed (docs/operations.md)"
    try:
        _api()
    except ImportError as error:
        return f"NIXL can't be loaded: {error}"
    return ""


def _api() -> Any:
    api: Any = importlib.import_module("nixl._api")
    logging.getLogger("nixl").setLevel(logging.WARNING)  # it writes to stdout
    return api


def _region(view: memoryview) -> Region:
    return int(np.frombuffer(view, np.uint8).ctypes.data), len(view), 0


class _Agent:
    """An agent that has registered memory; it lives until `destroy`."""

    def __init__(self, regions: Sequence[Region]) -> None:
        api = _api()
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self.nixl: Any = api.nixl_agent(f"headrace-{secrets.token_hex(8)}", config)
        self._registered: Any = self.nixl.register_memory([(*region, "") for region in regions], "DRAM")

    def destroy(self) -> None:
        """End every connection and transfer: no byte can land then. Memory must not be freed before."""
        try:
            self.nixl.deregister_memory(self._registered)
        finally:
            self._registered = self.nixl = None


class NixlHolder:
    """Registers the pool when it is first offered."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        self._agent: _Agent | None = None
        self._offer: types_pb2.TransportOffer | None = None
        self._proof = bytearray(secrets.token_bytes(_PROOF_BYTES))
        self._is_closed = threading.Event()
        self._answering: threading.Thread | None = None

    def offer(self) -> types_pb2.TransportOffer | None:
        """See `HolderEnd`."""
        if self._offer is None:
            layers = [_region(layer) for layer in self._holding.memory().host_layers()]
            proof = _region(memoryview(self._proof))
            try:
                self._agent = _Agent([*layers, proof])
            except Exception as error:
                # NIXL's errors have no base of their own.
                log.warning("NIXL can't register the pool", exc_info=error)
                return None
            self._answering = threading.Thread(target=self._answer, args=(self._agent.nixl,), name="nixl-holder")
            self._answering.start()
            self._offer = types_pb2.TransportOffer(
                nixl=types_pb2.NixlTransport(
                    metadata=self._agent.nixl.get_agent_metadata(),
                    layer_addresses=[address for address, _, _ in layers],
                    proof_address=proof[0],
                    proof=bytes(self._proof),
                )
            )
        return self._offer

    def serve(self, server: grpc.aio.Server) -> None:
        """See `HolderEnd`: the pool is not there yet."""

    def close(self) -> None:
        """See `HolderEnd`."""
        self._is_closed.set()
        if self._answering is not None:
            self._answering.join()
        if self._agent is not None:
            self._agent.destroy()
        self._agent = self._offer = None

    def _answer(self, agent: Any) -> None:
        while not self._is_closed.wait(_ANSWER_PERIOD_S):
            agent.get_new_notifs()


class _Link:
    """A holder's agent, and ours for it. Its methods on the taker's thread alone."""

    def __init__(self, endpoint: str, metadata: bytes, regions: Sequence[Region]) -> None:
        self.endpoint = endpoint
        self.is_torn = False
        """End what is under way. Event loop only, as `moving`."""
        self.moving: set[asyncio.Task[None]] = set()
        """Runs on their way."""
        self.proof = bytearray(_PROOF_BYTES)
        """Where the holder's is read to."""
        self._agent = _Agent([*regions, _region(memoryview(self.proof))])
        self._handles: list[Any] = []
        self._remote = self._agent.nixl.add_remote_agent(metadata).decode()

    def post(self, local: Sequence[Region], remote: Sequence[Region]) -> Any:
        """Begin to read `remote` into `local`; return the transfer."""
        nixl = self._agent.nixl
        local_list, remote_list = nixl.get_xfer_descs(list(local), "DRAM"), nixl.get_xfer_descs(list(remote), "DRAM")
        handle = nixl.initialize_xfer("READ", local_list, remote_list, self._remote)
        self._handles.append(handle)
        nixl.transfer(handle)
        return handle

    def is_done(self, handle: Any) -> bool:
        """Return whether a transfer is over; ask for a while before saying no.

        Raises:
            ConnectionError: it is over, and failed.
        """
        ends_s = time.monotonic() + _TURN_S
        while True:
            state = self._agent.nixl.check_xfer_state(handle)
            if state != "PROC":
                self._handles.remove(handle)
                self._agent.nixl.release_xfer_handle(handle)
                if state != "DONE":
                    raise ConnectionError(f"NIXL says {state}")
                return True
            if time.monotonic() > ends_s:
                return False

    def destroy(self) -> None:
        """End all of it. Idempotent."""
        if self._agent.nixl is not None:
            self._handles.clear()
            with contextlib.suppress(Exception):  # that it is gone already is an error of NIXL's
                self._agent.nixl.remove_remote_agent(self._remote)
            self._agent.destroy()


class NixlTransfer:
    """A read under way, in a task of its own that ends when no byte can land any more."""

    def __init__(self, moving: asyncio.Task[None], timeout_s: float) -> None:
        self._moving = moving
        self._timeout_s = timeout_s

    @property
    def is_drained(self) -> bool:
        """See `Transfer`."""
        return self._moving.done()

    async def wait(self) -> None:
        """See `Transfer`."""
        done, _ = await asyncio.wait([self._moving], timeout=self._timeout_s)
        if not done:
            raise HandoffLostError("HOLDER_LOST", "the transfer took too long")
        self._moving.result()

    def cancel(self) -> None:
        """See `Transfer`: it can't be stopped, but by tearing its connection down."""

    async def drained(self) -> None:
        """See `Transfer`."""
        await asyncio.wait([self._moving])
        self._moving.exception()  # seen: it is `wait`'s to raise


class NixlTaker:
    """Reads by an agent for each holder."""

    def __init__(self, memory: PageMemory) -> None:
        self._memory = memory
        self._layers = [_region(layer) for layer in memory.host_layers()]
        self._thread = ThreadPoolExecutor(1, "nixl")
        self._links: dict[bytes, _Link] = {}
        """By their holder's proof."""
        self._proving = asyncio.Lock()

    async def prove(self, source: Source) -> None:
        """See `TakerEnd`: what only the holder could tell is read from where it says."""
        offer = source.offer.nixl
        if self._link(source) is not None:
            return
        async with self._proving:
            if self._link(source) is not None:
                return  # somebody else was faster
            try:
                link = await self._run(_Link, source.endpoint, offer.metadata, self._layers)
                try:
                    await self._read_proof(link, offer)
                except BaseException:
                    await self._forget(link)
                    raise
            except Exception as error:  # NIXL's errors have no base of their own
                raise UnprovenError(str(error) or "no answer") from error
            self._links[offer.proof] = link

    def pull(self, source: Source, run: Run, page_ids: Sequence[int], *, timeout_s: float) -> NixlTransfer:
        """See `TakerEnd`."""
        link = self._link(source)
        layers = range(run.first_layer, run.first_layer + run.num_layers)
        addresses = source.offer.nixl.layer_addresses
        if link is None or layers.stop > len(addresses):
            raise HandoffLostError("HOLDER_LOST", f"{source.endpoint} can't be read any more")
        size = len(self._memory.page_bytes(0, 0))
        local = [(self._layers[layer][0] + page_id * size, size, 0) for layer in layers for page_id in page_ids]
        remote = [(addresses[layer] + page_id * size, size, 0) for layer in layers for page_id in run.page_ids]
        moving = asyncio.ensure_future(self._pull(link, local, remote))
        link.moving.add(moving)
        moving.add_done_callback(link.moving.discard)
        return NixlTransfer(moving, timeout_s)

    async def disconnect(self, endpoint: str) -> None:
        """See `TakerEnd`: what is under way ends with its agent."""
        for link in list(self._links.values()):
            if link.endpoint == endpoint:
                await self._tear(link)

    async def close(self) -> None:
        """See `TakerEnd`."""
        for link in list(self._links.values()):
            await self._tear(link)
        self._thread.shutdown()
        self._thread = ThreadPoolExecutor(1, "nixl")  # which starts with its first call

    def _link(self, source: Source) -> _Link | None:
        link = self._links.get(source.offer.nixl.proof)
        return link if link is not None and link.endpoint == source.endpoint else None

    async def _tear(self, link: _Link) -> None:
        """Return when nothing of it is under way."""
        await self._forget(link)
        if link.moving:
            await asyncio.wait(link.moving)

    async def _forget(self, link: _Link) -> None:
        link.is_torn = True
        self._links = {proof: other for proof, other in self._links.items() if other is not link}
        await self._run(link.destroy)

    async def _read_proof(self, link: _Link, offer: types_pb2.NixlTransport) -> None:
        here, there = _region(memoryview(link.proof)), (offer.proof_address, _PROOF_BYTES, 0)
        async with asyncio.timeout(PROOF_TIMEOUT_S):
            await self._move(link, [here], [there])
        if bytes(link.proof) != offer.proof:
            raise ConnectionError("what was read there is not that holder's")

    async def _pull(self, link: _Link, local: Sequence[Region], remote: Sequence[Region]) -> None:
        try:
            await self._move(link, local, remote)
        except Exception as error:  # NIXL's errors have no base of their own
            await self._forget(link)  # an agent that met an error may never come out of it
            raise HandoffLostError("HOLDER_LOST", f"{link.endpoint} did not deliver: {error}") from error

    async def _move(self, link: _Link, local: Sequence[Region], remote: Sequence[Region]) -> None:
        def begin() -> tuple[Any, bool]:
            handle = link.post(local, remote)
            return handle, link.is_done(handle)

        handle, is_done = await self._run(self._unless_torn, link, begin)
        while not is_done:
            is_done = await self._run(self._unless_torn, link, lambda: link.is_done(handle))

    @staticmethod
    def _unless_torn(link: _Link, call: Any) -> Any:
        if link.is_torn:
            raise ConnectionError("the connection to the holder was torn down")
        return call()

    async def _run(self, function: Any, *args: Any) -> Any:
        return await run_to_its_end(self._thread, function, *args)
