"""The table of transports, best first."""

from __future__ import annotations

from collections.abc import Callable

from headrace_core.errors import LayoutMismatchError
from headrace_core.transfer.fake import FakeTransport
from headrace_core.transfer.grpc import GrpcTransport
from headrace_core.transfer.ticket import Ticket
from headrace_core.transfer.transport import PageMemory, Transport, offer_name

TRANSPORTS: dict[str, Callable[[PageMemory], Transport]] = {"grpc": GrpcTransport, "fake": FakeTransport}


def choose_transport(ticket: Ticket, usable: frozenset[str]) -> str:
    """Return the first transport on offer that this worker may use.

    Raises:
        LayoutMismatchError: NO_COMMON_TRANSPORT.
    """
    offered = [offer_name(offer) for offer in ticket.offers]
    for name in offered:
        if name in usable:
            return name
    raise LayoutMismatchError(
        "NO_COMMON_TRANSPORT",
        f"{ticket.holder_endpoint} offers {', '.join(filter(None, offered)) or 'nothing'}; "
        f"this worker takes {', '.join(sorted(usable))}",
    )
