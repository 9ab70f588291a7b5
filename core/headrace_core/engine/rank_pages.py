"""One rank's pages, as the group sees them: it takes its part of whole ones, and gives its part of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headrace_core.engine.group_messages import Ask, Pages
from headrace_core.model.kv_cache import KvCache
from headrace_core.ranks.page_share import PageShare


class RankPages:
    """See the module. Engine thread only."""

    def __init__(self, cache: KvCache, share: PageShare) -> None:
        assert cache.layout == share.own, "the cache is this rank's part"
        self._cache = cache
        self.share = share

    def take(self, pages: Pages) -> None:
        """Have its part of these pages in the cache."""
        layers = layers_of(pages)
        for (layer, page_id), page in zip(
            cells(layers, pages.page_ids), pieces(pages.content, self.share.whole.page_layer_bytes), strict=True
        ):
            self._cache.page_bytes(layer, page_id)[:] = self.share.cut(page)
        self._cache.copy_from_host(pages.page_ids, layers)

    def give(self, ask: Ask) -> bytes:
        """Return its part of these pages, as they are now."""
        layers = layers_of(ask)
        self._cache.copy_to_host(ask.page_ids, layers)
        return b"".join(self._cache.page_bytes(layer, page_id) for layer, page_id in cells(layers, ask.page_ids))


def layers_of(message: Pages | Ask) -> range:
    """Return the layers that a message is of."""
    return range(message.first_layer, message.first_layer + message.num_layers)


def cells(layers: range, page_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Return (layer, page id) in the order of a message's bytes."""
    return ((layer, page_id) for layer in layers for page_id in page_ids)


def pieces(content: bytes | memoryview, size: int) -> Iterator[memoryview]:
    """Cut bytes into pieces of `size`."""
    view = memoryview(content)
    return (view[at : at + size] for at in range(0, len(view), size))
