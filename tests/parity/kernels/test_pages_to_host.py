"""Pages between a pretended GPU and its pool's copy on the host: what is copied, and in what order."""

from __future__ import annotations

import pytest
import torch
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.model import page_ring
from headrace_core.model.kv_cache import KvCache
from headrace_core.testing.pretend_gpu import pretend_gpu, recording

from tests.parity.kernels.conftest import HAS_GPU

pytestmark = pytest.mark.skipif(HAS_GPU, reason="a GPU is there, and kernels are compiled for it")


def test_pages_are_handed_over_through_pinned_memory(monkeypatch):
    """Two buffers of two pages: each copy waits for its own buffer, and all has arrived at the end."""
    layout = KvLayout(3, 4, CacheDtype.BFLOAT16, LatentAttention(6, 2))
    monkeypatch.setattr(page_ring, "BUFFER_BYTES", 2 * layout.page_layer_bytes)
    there, here = [7, 0, 10, 3, 9], [2, 5, 1, 0, 9]
    with pretend_gpu():
        source, target = (KvCache(layout, 11, "cuda") for _ in range(2))
        for number, layer in enumerate(source.layers):
            layer.copy_(torch.randn(layer.shape, generator=torch.Generator().manual_seed(number)))
        with recording() as journal:
            source.copy_to_host(there)
            for layer in range(3):
                for source_page, target_page in zip(there, here, strict=True):
                    target.page_bytes(layer, target_page)[:] = source.page_bytes(layer, source_page)
            target.copy_from_host(here)
        assert all(copy.is_pinned and not copy.is_waited_for for copy in journal.copies), journal.copies
        assert max(copy.num_bytes for copy in journal.copies) == 2 * layout.page_layer_bytes
        for from_layer, to_layer in zip(source.layers, target.layers, strict=True):
            assert torch.equal(to_layer[here], from_layer[there])


def test_a_hand_over_goes_behind_what_was_launched_and_is_over_when_it_returns():
    layout = KvLayout(2, 4, CacheDtype.FLOAT32, LatentAttention(6, 2))
    with pretend_gpu():
        cache = KvCache(layout, 2, "cuda")
        for copy in (cache.copy_to_host, cache.copy_from_host):
            on_device = torch.ones(1).pin_memory().to("cuda", non_blocking=True)
            launched = torch.cuda.Event()
            launched.record()
            assert not launched.query()
            copy([1])
            assert launched.query(), "the steps' stream was waited for"
            assert cache._stream.query(), "and its own"
            assert on_device.item() == 1


def test_a_copy_behind_a_mark_waits_for_what_was_launched_before_it_and_for_nothing_since():
    layout = KvLayout(2, 4, CacheDtype.FLOAT32, LatentAttention(6, 2))
    with pretend_gpu():
        cache = KvCache(layout, 2, "cuda")

        def launch() -> torch.cuda.Event:
            torch.ones(1).pin_memory().to("cuda", non_blocking=True)
            launched = torch.cuda.Event()
            launched.record()
            return launched

        before = launch()
        mark = cache.mark()
        since = launch()
        cache.copy_to_host([1], range(1), mark)
        assert before.query(), "the layer was written when it was copied"
        assert not since.query(), "the rest of the step is still under way"
        cache.copy_to_host([1], range(1, 2))
        assert since.query(), "without a mark it goes behind all of it"
