"""Pages between a pool and its copy on the host, through two buffers in turn."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.model import page_ring
from headrace_core.model.kv_cache import KvCache
from headrace_core.testing.async_test import WAIT_S


@pytest.mark.parametrize("buffer_bytes", [1, 64, 3 * 64, 1 << 20])
def test_pages_go_through_buffers_of_any_size_in_order(buffer_bytes, monkeypatch):
    """A page of a layer is 64 bytes: one to a buffer, three, or all that there are."""
    monkeypatch.setattr(page_ring, "BUFFER_BYTES", buffer_bytes)
    layout = KvLayout(3, 4, CacheDtype.BFLOAT16, LatentAttention(6, 2))
    source, target = (KvCache(layout, 11, has_host_copy=True) for _ in range(2))
    for number, layer in enumerate(source.layers):
        layer.copy_(torch.randn(layer.shape, generator=torch.Generator().manual_seed(number)))
    there, here = [7, 0, 10, 3, 9, 1, 4], [2, 5, 1, 0, 9, 10, 6]
    source.copy_to_host(there)
    for layer in range(3):
        for source_page, target_page in zip(there, here, strict=True):
            target.page_bytes(layer, target_page)[:] = source.page_bytes(layer, source_page)
    target.copy_from_host(here)
    for from_layer, to_layer in zip(source.layers, target.layers, strict=True):
        assert torch.equal(to_layer[here], from_layer[there])
        assert not to_layer[[3, 4, 7, 8]].any()


def test_copies_of_two_threads_take_turns():
    """They share the buffers: one of them begins when the other has emptied them."""
    layout = KvLayout(2, 4, CacheDtype.FLOAT32, LatentAttention(6, 2))
    cache = KvCache(layout, 2, has_host_copy=True)
    for page_id in range(2):
        for layer in cache.layers:
            layer[page_id] = page_id + 1
    is_inside, may_go_on = threading.Event(), threading.Event()
    rows = cache._ring._parts

    def wait_inside(layers, host, page_ids):
        if list(page_ids) == [0]:
            is_inside.set()
            assert may_go_on.wait(WAIT_S)
        return rows(layers, host, page_ids)

    cache._ring._parts = wait_inside
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache.copy_to_host, [0])
        assert is_inside.wait(WAIT_S)
        second = threads.submit(cache.copy_to_host, [1])
        with pytest.raises(TimeoutError):
            second.result(timeout=0.05)
        may_go_on.set()
        first.result(WAIT_S)
        second.result(WAIT_S)
    for page_id in range(2):
        assert np.frombuffer(cache.page_bytes(1, page_id), np.float32).tolist() == [page_id + 1] * 32


def test_a_copy_that_failed_is_no_bar_to_the_next():
    layout = KvLayout(2, 4, CacheDtype.FLOAT32, LatentAttention(6, 2))
    cache = KvCache(layout, 2, has_host_copy=True)
    cache.layers[1][1] = 5
    with pytest.raises(IndexError):
        cache.copy_to_host([1, 2])
    cache.copy_to_host([1])
    assert set(np.frombuffer(cache.page_bytes(1, 1), np.float32).tolist()) == {5}


def test_only_the_layers_that_are_asked_for_are_copied_either_way():
    layout = KvLayout(4, 4, CacheDtype.FLOAT32, LatentAttention(6, 2))
    cache = KvCache(layout, 2, has_host_copy=True)
    for number, layer in enumerate(cache.layers, start=1):
        layer.fill_(number)

    def on_host() -> list[float]:
        return [np.frombuffer(cache.page_bytes(layer, 1), np.float32)[0].item() for layer in range(4)]

    for layer in range(4):
        cache.page_bytes(layer, 1)[:] = bytes(layout.page_layer_bytes)
    cache.copy_to_host([1], range(1, 3))
    assert on_host() == [0, 2, 3, 0]
    cache.copy_from_host([1], range(3, 4))
    assert [layer[1].max().item() for layer in cache.layers] == [1, 2, 3, 0]
    assert [layer[0].max().item() for layer in cache.layers] == [1, 2, 3, 4]
