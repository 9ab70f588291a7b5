"""Where a step is cut, so that what its first layers wrote moves while its later ones are computed. Pure.

Half of the layers, then half of the rest, and so on: what is left to move when the step is over is an eighth. Equal
parts would leave more, and gain only where pages are moved more slowly than a step makes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace_core.kv.layout import KvLayout

MOST_PARTS = 4
LEAST_BYTES = 512 << 10
"""What is worth a run of its own: it moves in about the time that a run costs whatever its size."""


@dataclass(frozen=True, slots=True)
class LayerStops:
    """The numbers of layers, rising and not all, after which a step says how far it is; what is worth a run."""

    stops: tuple[int, ...]
    page_layer_bytes: int
    least_bytes: int = LEAST_BYTES

    @classmethod
    def of(cls, layout: KvLayout, *, least_bytes: int = LEAST_BYTES) -> LayerStops:
        """Return those for pages of `layout`."""
        halves = {layout.num_layers - (layout.num_layers >> part) for part in range(1, MOST_PARTS)}
        return cls(tuple(sorted(halves - {layout.num_layers})), layout.page_layer_bytes, least_bytes)

    def is_worth(self, num_layers: int, num_pages: int) -> bool:
        """Return whether so many layers of so many pages are worth a run of their own."""
        return num_layers * num_pages * self.page_layer_bytes >= self.least_bytes
