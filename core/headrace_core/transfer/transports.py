"""The table of transports, best first, and the choice between them.

A worker may use those that its `--transport` and its machine allow (`usable`); a holder offers them; a taker tries the
offers in turn until one is proven (`choose`). With a transport named a side has that one alone: nothing falls back.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from headrace.v1 import types_pb2

from headrace_core.errors import LayoutMismatchError, StartupError
from headrace_core.transfer import nixl, shm
from headrace_core.transfer.fake import FakeHolder, FakeTaker
from headrace_core.transfer.grpc import GrpcHolder, GrpcTaker
from headrace_core.transfer.memory import MemoryKind
from headrace_core.transfer.transport import Reading, Source, TakerEnd, Transport, UnprovenError, offer_name

log = logging.getLogger(__name__)

TRANSPORTS = {
    "shm": Transport(shm.ShmHolder, lambda memory, _: shm.ShmTaker(memory), MemoryKind.MEMFD, shm.probe),
    "nixl": Transport(nixl.NixlHolder, lambda memory, _: nixl.NixlTaker(memory), probe=nixl.probe, is_guarded=False),
    "grpc": Transport(GrpcHolder, GrpcTaker),
    "fake": Transport(FakeHolder, lambda memory, _: FakeTaker(memory), is_automatic=False),
}


def usable(name: str, *, has_tls: bool = False) -> tuple[str, ...]:
    """Return the transports that this process may use, best first: `auto`, all that can be had here; else that one.

    With TLS `auto` has none by which pages can be read that TLS does not guard; one that is named is warned of.

    Raises:
        StartupError: NO_TRANSPORT, the one named can't be had here.
    """
    if name == "auto":
        return tuple(
            each
            for each, it in TRANSPORTS.items()
            if it.is_automatic and (it.is_guarded or not has_tls) and not it.probe()
        )
    problem = TRANSPORTS[name].probe()
    if problem:
        raise StartupError("NO_TRANSPORT", f"--transport {name}: {problem}")
    if has_tls and not TRANSPORTS[name].is_guarded:
        log.warning(
            "pages move in clear text, and whoever reaches this worker may read them", extra={"transport": name}
        )
    return (name,)


def memory_kind(names: Sequence[str]) -> MemoryKind:
    """Return what a holder's pool is made of, so that all of these can read it."""
    kinds = {TRANSPORTS[name].memory for name in names} - {MemoryKind.PLAIN}
    assert len(kinds) <= 1, "one kind that serves all: so far there is one besides plain memory"
    return kinds.pop() if kinds else MemoryKind.PLAIN


async def choose(
    offers: Sequence[types_pb2.TransportOffer], takers: Mapping[str, TakerEnd], *, endpoint: str, reading: Reading
) -> Source:
    """Return where to read: the first offer by which bytes can be had.

    Raises:
        LayoutMismatchError: NO_COMMON_TRANSPORT, there is none; says what speaks against each.
    """
    problems: list[str] = []
    for offer in offers:
        taker = takers.get(offer_name(offer))
        if taker is not None:
            source = Source(endpoint, reading, offer)
            try:
                await taker.prove(source)
                return source
            except UnprovenError as problem:
                problems.append(f"; {offer_name(offer)}: {problem}")
    offered = ", ".join(filter(None, map(offer_name, offers))) or "nothing"
    taken = ", ".join(sorted(takers))
    raise LayoutMismatchError(
        "NO_COMMON_TRANSPORT", f"{endpoint} offers {offered}; this worker takes {taken}{''.join(problems)}"
    )
