"""A pool that others can be let read: they see what its owner writes, and can neither write it nor cut it off."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import mmap
import os
from pathlib import Path

import pytest
import torch
from headrace_core.errors import StartupError
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.model.kv_cache import KvCache
from headrace_core.transfer.memfd import ALIGNMENT, Memfd, map_sealed
from headrace_core.transfer.memory import MemoryKind, new_memory

LAYOUT = KvLayout(3, 4, CacheDtype.FLOAT32, LatentAttention(3, 1))
"""Pages of 64 bytes in each of 3 layers."""


def pool(num_pages: int = 70) -> tuple[Memfd, KvCache]:
    memory = Memfd()
    return memory, KvCache(LAYOUT, num_pages, allocate=memory.allocate)


@pytest.mark.parametrize("has_host_copy", [False, True])
def test_a_cache_on_shared_memory_is_like_any_other(has_host_copy: bool):
    memory = Memfd()
    cache = KvCache(LAYOUT, 5, has_host_copy=has_host_copy, allocate=memory.allocate)
    assert [tuple(layer.shape) for layer in cache.layers] == [(5, 4, 4)] * 3
    assert all(not layer.any() for layer in cache.layers)
    if has_host_copy:
        assert cache.layers[0].data_ptr() % 64 == 0
        return
    cache.layers[2][4] = torch.arange(16.0).view(4, 4)
    assert bytes(cache.page_bytes(2, 4)) == torch.arange(16.0).numpy().tobytes()
    assert [bytes(layer) for layer in cache.host_layers()] == [layer.numpy().tobytes() for layer in cache.layers]
    cache.zero_pages([4])
    assert not cache.layers[2].any()


def test_a_reader_sees_what_the_owner_writes_now():
    memory, cache = pool()
    pages, proof = map_sealed(memory.descriptor)
    assert (proof, len(pages)) == (memory.proof, 3 * memory.layer_stride)
    for layer, page_id in ((0, 0), (1, 69), (2, 7)):
        cache.page_bytes(layer, page_id)[:] = bytes([layer + 1]) * 64
        start = layer * memory.layer_stride + page_id * 64
        assert bytes(pages[start : start + 64]) == bytes([layer + 1]) * 64
    assert memory.layer_stride == 2 * ALIGNMENT, "70 pages of 64 bytes, up to a border"


def test_every_layer_begins_where_kernels_may_load_aligned():
    _, cache = pool(num_pages=1)
    assert {layer.data_ptr() % ALIGNMENT for layer in cache.layers} == {0}


def _truncate(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)


def _grow(descriptor: int) -> None:
    os.ftruncate(descriptor, 1 << 30)


def _write(descriptor: int) -> None:
    os.pwrite(descriptor, b"x", 0)


def _map(descriptor: int) -> None:
    mmap.mmap(descriptor, ALIGNMENT)


def _unseal(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 0)


@pytest.mark.parametrize("attack", [_truncate, _grow, _write, _map, _unseal])
@pytest.mark.parametrize("is_opened_again", [False, True], ids=["as passed", "opened again for writing"])
def test_who_has_the_descriptor_can_change_nothing(attack, is_opened_again: bool):
    memory, cache = pool()
    cache.page_bytes(0, 0)[:] = b"a" * 64
    descriptor = os.dup(memory.descriptor)
    if is_opened_again:
        os.close(descriptor)
        descriptor = os.open(f"/proc/self/fd/{memory.descriptor}", os.O_RDWR)
    try:
        with pytest.raises((OSError, ValueError), match=r"Errno|mmap length"):
            attack(descriptor)
    finally:
        os.close(descriptor)
    assert bytes(cache.page_bytes(0, 0)) == b"a" * 64


def test_memory_whose_size_could_change_is_not_mapped(tmp_path: Path):
    unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 2 * ALIGNMENT)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 2 * ALIGNMENT)
    short = os.memfd_create("short", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(short, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    proof_alone = os.memfd_create("proof alone", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(proof_alone, ALIGNMENT)
    fcntl.fcntl(proof_alone, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    for descriptor, problem in (
        (unsealed, "not sealed"),
        (file, "Invalid argument"),
        (short, "^0 bytes are no pool"),
        (proof_alone, "4096 bytes are no pool"),
    ):
        with pytest.raises(OSError, match=problem):
            map_sealed(descriptor)
        os.close(descriptor)


def mappings():
    return Path("/proc/self/maps").read_text().count("/memfd:headrace-pages ")


def descriptors():
    """Return how many descriptors of such memory are open; others come and go with threads that tests before left."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            count += "memfd:headrace-pages" in os.readlink(descriptor)
    return count


def test_nothing_is_left_of_it():
    gc.collect()
    before = descriptors(), mappings()
    memory, cache = pool()
    pages, _ = map_sealed(memory.descriptor)
    assert descriptors() > before[0]
    assert mappings() == before[1] + 2
    del memory, cache, pages
    gc.collect()
    assert (descriptors(), mappings()) == before


def test_more_than_this_machine_can_share_is_refused():
    before = descriptors()
    with pytest.raises(StartupError, match=rf"^no memory can be shared here \({2**62 + ALIGNMENT} bytes\): ") as raised:
        Memfd().allocate(1, 2**62)
    assert raised.value.reason == "NO_TRANSPORT"
    assert descriptors() == before


def test_a_kind_says_what_a_pool_is_allocated_from():
    assert new_memory(MemoryKind.PLAIN) is None
    assert isinstance(new_memory(MemoryKind.MEMFD), Memfd)
