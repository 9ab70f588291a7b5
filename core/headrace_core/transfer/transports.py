"""The table of transports, best first."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.v1 import types_pb2

from headrace_core.errors import LayoutMismatchError
from headrace_core.transfer.fake import FakeHolder, FakeTaker
from headrace_core.transfer.grpc import GrpcHolder, GrpcTaker
from headrace_core.transfer.transport import Transport, offer_name

TRANSPORTS = {"grpc": Transport(GrpcHolder, GrpcTaker), "fake": Transport(FakeHolder, FakeTaker)}


def choose_offer(
    offers: Sequence[types_pb2.TransportOffer], usable: frozenset[str], *, endpoint: str
) -> types_pb2.TransportOffer:
    """Return the first offer that this worker may use.

    Raises:
        LayoutMismatchError: NO_COMMON_TRANSPORT.
    """
    for offer in offers:
        if offer_name(offer) in usable:
            return offer
    names = ", ".join(filter(None, map(offer_name, offers))) or "nothing"
    raise LayoutMismatchError(
        "NO_COMMON_TRANSPORT", f"{endpoint} offers {names}; this worker takes {', '.join(sorted(usable))}"
    )
