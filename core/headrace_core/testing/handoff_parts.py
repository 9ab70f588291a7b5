"""The parts of a hand-off for tests of one of them: plain memory, a holder that says what it is told, a ticket.

Ships with the product, and says so. No torch, no engine, no pool.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.v1 import types_pb2

from headrace_core.errors import HeadraceError
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.request import SampledToken, hash_tokens
from headrace_core.transfer.ticket import Ticket
from headrace_core.transfer.verify import checksums

INCARNATION = 42


class PlainMemory:
    """`PageMemory` of bytes, page by page different; `copies` are the calls of `copy_to_host` and `copy_from_host`."""

    def __init__(self, *, num_layers: int = 2, num_pages: int = 8, page_bytes: int = 64, seed: int = 1) -> None:
        first = [[seed * 89 + layer * 31 + page * 7 for page in range(num_pages)] for layer in range(num_layers)]
        self._pages = [[_counting(value, page_bytes) for value in layer] for layer in first]
        self.copies: list[tuple[str, tuple[int, ...]]] = []

    def page_bytes(self, layer: int, page_id: int) -> memoryview:
        """See `PageMemory`."""
        return memoryview(self._pages[layer][page_id])

    def copy_to_host(self, page_ids: Sequence[int]) -> None:
        """See `PageMemory`."""
        self.copies.append(("to_host", tuple(page_ids)))

    def copy_from_host(self, page_ids: Sequence[int]) -> None:
        """See `PageMemory`."""
        self.copies.append(("from_host", tuple(page_ids)))

    def content(self, page_ids: Sequence[int]) -> list[list[bytes]]:
        """Return the bytes of these pages, [layers][pages]."""
        return [[bytes(layer[page_id]) for page_id in page_ids] for layer in self._pages]


class StubHolder:
    """`LeaseHolder` of one lease. After `num_good_looks` at its pages, every look raises `error`."""

    def __init__(
        self,
        page_ids: Sequence[int],
        *,
        error: HeadraceError | None = None,
        num_good_looks: int = 0,
        lease_s: float = 30,
    ) -> None:
        self._page_ids = tuple(page_ids)
        self._error = error
        self._num_good_looks = num_good_looks
        self._lease_s = lease_s
        self.looks: list[tuple[str, int, int, bytes]] = []
        self.renewed: list[tuple[str, int]] = []
        self.released: list[tuple[str, int]] = []

    def held_pages(self, lease_id: str, *, attempt: int, incarnation: int, tokens_sha256: bytes) -> Sequence[int]:
        """See `LeaseHolder`."""
        self.looks.append((lease_id, attempt, incarnation, tokens_sha256))
        if self._error and len(self.looks) > self._num_good_looks:
            raise self._error
        return self._page_ids

    def renew(self, lease_id: str, *, incarnation: int) -> float:
        """See `LeaseHolder`."""
        self.renewed.append((lease_id, incarnation))
        if self._error:
            raise self._error
        return self._lease_s

    def release(self, lease_id: str, *, incarnation: int) -> None:
        """See `LeaseHolder`."""
        self.released.append((lease_id, incarnation))
        if self._error:
            raise self._error


def ticket_for(
    memory: PlainMemory,
    page_ids: Sequence[int],
    *,
    endpoint: str = "127.0.0.1:1",
    num_layers: int = 2,
    offers: Sequence[types_pb2.TransportOffer] = (),
) -> Ticket:
    """Return a ticket for pages of `memory`, whose pages have 64 bytes: 4 tokens of 4 float32, the tokens 0, 1, ..."""
    layout = KvLayout(num_layers, 4, CacheDtype.FLOAT32, LatentAttention(3, 1))
    return Ticket(
        request_id="r",
        attempt=3,
        holder_endpoint=endpoint,
        holder_incarnation=INCARNATION,
        model_fingerprint="fa4e",
        layout=layout,
        page_ids=tuple(page_ids),
        generations=(0,) * len(page_ids),
        checksums=checksums(memory, min(num_layers, 2), page_ids),
        num_tokens=4 * len(page_ids),
        tokens_sha256=hash_tokens(range(4 * len(page_ids))),
        first_token=SampledToken(11),
        seed=1,
        sample_index=0,
        lease_id="lease-1",
        lease_s=30.0,
        offers=tuple(offers),
    )


def _counting(first: int, num_bytes: int) -> bytearray:
    return bytearray((first + offset) % 251 for offset in range(num_bytes))
