"""Sealed pages are copied and summed once for each of their generations, in runs of a bounded size, in order."""

import asyncio
import os
from collections.abc import Sequence

import pytest
import xxhash
from headrace_core.batch.step import Mark
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.testing.async_test import async_test
from headrace_core.testing.handoff_parts import PlainMemory
from headrace_core.transfer.sealer import Sealer

LAYOUT = KvLayout(2, 4, CacheDtype.FLOAT32, LatentAttention(3, 1))
"""Of `PlainMemory`'s pages: 64 bytes in each of two layers."""


def sums(memory: PlainMemory, page_ids: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(xxhash.xxh3_64_intdigest, layer)) for layer in memory.content(page_ids))


@async_test
async def test_a_run_has_the_sums_of_every_layer_of_its_pages():
    memory = PlainMemory()
    sealer = Sealer(memory, LAYOUT)
    run = await sealer.seal(4, [(5, 7), (1, 8), (3, 9)])
    assert memory.copies == [("to_host", (5, 1, 3), range(2))]
    assert (run.first_layer, run.first_page, run.page_ids, run.generations) == (0, 4, (5, 1, 3), (7, 8, 9))
    assert run.checksums == sums(memory, [5, 1, 3])
    assert len({total for layer in run.checksums for total in layer}) == 6
    sealer.close()


@async_test
async def test_rule_4_a_page_that_was_sealed_is_not_summed_again_unless_it_was_reused():
    memory = PlainMemory()
    sealer = Sealer(memory, LAYOUT)
    first = await sealer.seal(0, [(5, 7), (1, 8)])
    again = await sealer.seal(0, [(5, 7), (1, 8), (3, 9)])
    assert memory.copies == [("to_host", (5, 1), range(2)), ("to_host", (3,), range(2))]
    assert [layer[:2] for layer in again.checksums] == list(first.checksums)
    memory.page_bytes(1, 5)[0] ^= 1
    other = await sealer.seal(0, [(5, 8), (1, 8)])
    assert memory.copies[2:] == [("to_host", (5,), range(2))]
    assert other.checksums == sums(memory, [5, 1])
    sealer.close()


@pytest.mark.parametrize(
    ("most_bytes", "sizes"), [(1, [1] * 5), (255, [1] * 5), (256, [2, 2, 1]), (384, [3, 2]), (1 << 20, [5])]
)
@async_test
async def test_runs_are_bounded_and_together_they_are_all_pages_in_order(most_bytes: int, sizes: list[int]):
    sealer = Sealer(PlainMemory(), LAYOUT, most_run_bytes=most_bytes)
    pages = [(page_id, 1) for page_id in (4, 2, 0, 1, 3)]
    parts = list(sealer.parts(10, pages))
    assert [len(part) for _, part in parts] == sizes
    assert [page for _, part in parts for page in part] == pages
    assert [start for start, _ in parts] == [10 + sum(sizes[:index]) for index in range(len(sizes))]
    sealer.close()


@async_test
async def test_rule_1_sealing_gives_way_to_steps():
    niceness: list[int] = []

    class Watching(PlainMemory):
        def copy_to_host(self, page_ids: Sequence[int], layers: range, behind: Mark | None = None) -> None:
            niceness.append(os.getpriority(os.PRIO_PROCESS, 0))

    sealer = Sealer(Watching(), LAYOUT)
    await asyncio.gather(sealer.seal(0, [(5, 7)]), sealer.seal(1, [(1, 8)]))
    assert all(value > os.getpriority(os.PRIO_PROCESS, 0) for value in niceness)
    assert len(niceness) == 2
    sealer.close()
