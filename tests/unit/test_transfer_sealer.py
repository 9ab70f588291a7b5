"""Sealed pages are copied and summed once for each of their generations, in runs of a bounded size, in order."""

import asyncio
import os
import threading
from collections.abc import Sequence

import pytest
import xxhash
from headrace_core.batch.step import Mark
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.testing.async_test import async_test
from headrace_core.testing.handoff_parts import PlainMemory
from headrace_core.transfer.sealer import Sealer
from headrace_core.transfer.verify import yield_to_steps

LAYOUT = KvLayout(2, 4, CacheDtype.FLOAT32, LatentAttention(3, 1))
"""Of `PlainMemory`'s pages: 64 bytes in each of two layers."""

FOUR_LAYERS = KvLayout(4, 4, CacheDtype.FLOAT32, LatentAttention(3, 1))


def sums(memory: PlainMemory, page_ids: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(xxhash.xxh3_64_intdigest, layer)) for layer in memory.content(page_ids))


@async_test
async def test_a_run_has_the_sums_of_every_layer_of_its_pages():
    memory = PlainMemory()
    sealer = Sealer(memory, LAYOUT)
    run = await sealer.seal(4, [(5, 7), (1, 8), (3, 9)], range(2))
    assert memory.copies == [("to_host", (5, 1, 3), range(2))]
    assert (run.first_layer, run.first_page, run.page_ids, run.generations) == (0, 4, (5, 1, 3), (7, 8, 9))
    assert run.checksums == sums(memory, [5, 1, 3])
    assert len({total for layer in run.checksums for total in layer}) == 6
    sealer.close()


@async_test
async def test_rule_4_a_page_that_was_sealed_is_not_summed_again_unless_it_was_reused():
    memory = PlainMemory()
    sealer = Sealer(memory, LAYOUT)
    first = await sealer.seal(0, [(5, 7), (1, 8)], range(2))
    again = await sealer.seal(0, [(5, 7), (1, 8), (3, 9)], range(2))
    assert memory.copies == [("to_host", (5, 1), range(2)), ("to_host", (3,), range(2))]
    assert [layer[:2] for layer in again.checksums] == list(first.checksums)
    memory.page_bytes(1, 5)[0] ^= 1
    other = await sealer.seal(0, [(5, 8), (1, 8)], range(2))
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
    parts = list(sealer.parts(10, pages, num_layers=2))
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
    await asyncio.gather(sealer.seal(0, [(5, 7)], range(2)), sealer.seal(1, [(1, 8)], range(2)))
    assert all(value > os.getpriority(os.PRIO_PROCESS, 0) for value in niceness)
    assert len(niceness) == 2
    sealer.close()


@async_test
async def test_one_thread_copies_so_that_a_page_is_copied_after_its_earlier_owners_was():
    threads: list[str] = []
    is_next_here = threading.Event()

    class Watching(PlainMemory):
        def copy_to_host(self, page_ids: Sequence[int], layers: range, behind: Mark | None = None) -> None:
            threads.append(threading.current_thread().name)
            if len(threads) == 1:
                is_next_here.wait(0.05)  # a second thread would come
            else:
                is_next_here.set()

    sealer = Sealer(Watching(), LAYOUT)
    await asyncio.gather(sealer.seal(0, [(5, 7)], range(2)), sealer.seal(0, [(5, 8)], range(2)))
    assert threads == ["seal_0"] * 2
    sealer.close()


@async_test
async def test_the_last_layers_of_a_page_are_summed_when_they_are_computed_and_the_first_not_again():
    memory = PlainMemory(num_layers=4)
    sealer = Sealer(memory, FOUR_LAYERS)
    mark = object()
    first = await sealer.seal(2, [(5, 7), (1, 8)], range(1), mark)
    rest = await sealer.seal(2, [(5, 7), (1, 8)], range(1, 4))
    assert memory.copies == [("to_host", (5, 1), range(1)), ("to_host", (5, 1), range(1, 4))]
    assert memory.marks == [mark, None]
    assert [(run.first_layer, run.num_layers, run.first_page) for run in (first, rest)] == [(0, 1, 2), (1, 3, 2)]
    assert first.checksums + rest.checksums == sums(memory, [5, 1])
    again = await sealer.seal(0, [(5, 7)], range(4))
    assert len(memory.copies) == 2
    assert again.checksums == sums(memory, [5])
    sealer.close()


@async_test
async def test_a_page_that_somebody_finds_in_the_cache_while_it_is_being_sealed_has_the_same_sums():
    memory = PlainMemory(num_layers=4)
    sealer = Sealer(memory, FOUR_LAYERS)
    pages = [(5, 7), (1, 8)]
    runs = await asyncio.gather(
        sealer.seal(0, pages, range(2)), sealer.seal(0, pages, range(2, 4)), sealer.seal(0, pages[:1], range(4))
    )
    assert runs[0].checksums + runs[1].checksums == sums(memory, [5, 1])
    assert runs[2].checksums == sums(memory, [5])
    assert (await sealer.seal(0, pages, range(4))).checksums == sums(memory, [5, 1])
    sealer.close()


@async_test
async def test_runs_of_few_layers_have_more_pages():
    sealer = Sealer(PlainMemory(), LAYOUT, most_run_bytes=256)
    pages = [(page_id, 1) for page_id in range(5)]
    assert [len(part) for _, part in sealer.parts(0, pages, num_layers=2)] == [2, 2, 1]
    assert [len(part) for _, part in sealer.parts(0, pages, num_layers=1)] == [4, 1]
    sealer.close()


@pytest.mark.parametrize(("own", "becomes"), [(0, 10), (5, 15), (15, 19), (19, 19), (-5, 5)])
def test_what_gives_way_never_asks_for_more_than_its_process_has(monkeypatch, own, becomes):
    """Only root may make a thread less nice again: a nice process's hand-offs would all fail."""
    became: list[int] = []
    monkeypatch.setattr(os, "getpriority", lambda which, who: own)
    monkeypatch.setattr(os, "setpriority", lambda which, who, niceness: became.append(niceness))
    yield_to_steps()
    assert became == [becomes]
