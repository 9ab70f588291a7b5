"""Copying pages out of a cache and back, against the specification; on the CPU's own path too."""

from __future__ import annotations

import pytest
import torch
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.model.kv_cache import KvCache
from headrace_kernels import use_backend
from headrace_kernels.page_copy import gather_pages, gather_pages_ref, scatter_pages, scatter_pages_ref

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64, torch.bool]
)


def _random(shape, dtype, device):
    return (torch.rand(shape, device=device) * 100 - (20 if dtype != torch.uint8 else 0)).to(dtype)


def _bytes(x):
    return x.contiguous().view(torch.uint8)


@DTYPES
def test_gathered_pages_equal_the_specification(dtype, device):
    cache, ids = _random((4, 3, 5), dtype, device), torch.tensor([2, -1, 0, 2], device=device)
    found = gather_pages(cache, ids)
    assert found.is_contiguous()
    assert found.dtype == dtype
    assert torch.equal(_bytes(found), _bytes(gather_pages_ref(cache, ids)))


@DTYPES
def test_scattered_pages_equal_the_specification(dtype, device):
    cache, pages = _random((4, 3, 5), dtype, device), _random((3, 3, 5), dtype, device)
    expected, ids = cache.clone(), torch.tensor([3, -1, 0], device=device)
    scatter_pages(pages, cache, ids)
    scatter_pages_ref(pages, expected, ids)
    assert torch.equal(_bytes(cache), _bytes(expected))


@BACKENDS
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("page", [(64, 656), (7,), (1, 1)])
def test_there_and_back(page, id_dtype, backend, device):
    """Pages of a layer among others: those between them stay as they are."""
    layers = torch.randint(0, 256, (3, 2, *page), dtype=torch.uint8, device=device)
    before, ids = layers.clone(), torch.tensor([2, 0], dtype=id_dtype, device=device)
    with use_backend(backend):
        pages = gather_pages(layers[:, 1], ids)
        assert torch.equal(pages, before[[2, 0], 1])
        layers[:, 1] = 0
        scatter_pages(pages, layers[:, 1], ids)
    before[1, 1] = 0
    assert torch.equal(layers, before)


@BACKENDS
def test_page_minus_one_is_skipped(backend, device):
    cache, ids = torch.ones(2, 8, device=device), torch.tensor([-1, 1], device=device)
    with use_backend(backend):
        assert gather_pages(cache, ids)[:, 0].tolist() == [0, 1]
        scatter_pages(torch.full((2, 8), 5.0, device=device), cache, ids)
    assert cache[:, 0].tolist() == [1, 5]


@BACKENDS
def test_no_pages(backend, device):
    cache, ids = torch.ones(2, 8, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    with use_backend(backend):
        assert gather_pages(cache, ids).shape == (0, 8)
        scatter_pages(cache[:0], cache, ids)
    assert bool((cache == 1).all())


def test_what_does_not_fit(device):
    cache, ids = torch.zeros(4, 3, 5, device=device), torch.tensor([1], device=device)
    with pytest.raises(ValueError, match="must hold contiguous pages"):
        gather_pages(cache.mT, ids)
    with pytest.raises(ValueError, match="int32 or int64"):
        gather_pages(cache, ids.float())
    with pytest.raises(ValueError, match="int32 or int64"):
        gather_pages(cache, ids[None])
    for pages in (cache[:2], cache[:1].double(), cache.mT.contiguous().mT[:1]):
        with pytest.raises(ValueError, match="are not 1 contiguous pages"):
            scatter_pages(pages, cache, ids)


def test_a_pools_copy_on_the_host(device):
    """Out of one pool and, by its bytes on the host, into another, right behind what was launched to fill it."""
    layout = KvLayout(2, 4, CacheDtype.FLOAT32, LatentAttention(6, 2))
    source, target = (KvCache(layout, 3, device, has_host_copy=True) for _ in range(2))
    for number, layer in enumerate(source.layers):
        layer.copy_(torch.arange(layer.numel(), device=device).view(layer.shape) + 1000 * number)
    source.copy_to_host([2, 0])
    for layer in range(2):
        target.page_bytes(layer, 1)[:] = source.page_bytes(layer, 2)
    target.copy_from_host([1])
    for there, here in zip(target.layers, source.layers, strict=True):
        assert torch.equal(there[1], here[2])
        assert not there[[0, 2]].any()
