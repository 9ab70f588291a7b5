"""What a worker tells of its load: something every second, whatever a watcher asks for."""

import asyncio
from itertools import count

import pytest
from headrace.v1 import worker_service_pb2 as pb
from headrace_core.batch.scheduler import Load
from headrace_core.testing.async_test import WAIT_S, async_test
from headrace_core.worker.cache_board import MOST_HASHES, CacheBoard
from headrace_core.worker.worker_service import LoadBoard, WorkerServicer


@pytest.mark.parametrize("interval_ms", [0, 1, 1000, 60_000, 2**32 - 1])
@async_test
async def test_no_interval_makes_a_worker_go_silent(interval_ms):
    board = LoadBoard()
    servicer = WorkerServicer(pb.GetInfoResponse, board, lambda: None)
    reports = servicer.WatchLoad(pb.WatchLoadRequest(min_interval_ms=interval_ms), None)
    async with asyncio.timeout(WAIT_S):
        assert (await anext(reports)).is_cache_whole
        assert await anext(reports) == await anext(reports), "there is nothing new, and it is told all the same"
        board.set_load(Load(num_running=3))
        while (await anext(reports)).num_running != 3:
            pass
    await reports.aclose()


def told(board, position):
    report = pb.WatchLoadResponse()
    position = board.put(report, position)
    return list(report.pages_cached), list(report.pages_evicted), report.is_cache_whole, position


@async_test
async def test_a_watcher_hears_of_the_prefix_cache_first_all_and_then_what_changed():
    board = LoadBoard()
    board.set_load(Load(cache_changes=[(1, True), (2, True)]))
    servicer = WorkerServicer(pb.GetInfoResponse, board, lambda: None)
    reports = servicer.WatchLoad(pb.WatchLoadRequest(min_interval_ms=1), None)
    async with asyncio.timeout(WAIT_S):
        first = await anext(reports)
        assert (first.is_cache_whole, list(first.pages_cached)) == (True, [1, 2])
        board.set_load(Load(cache_changes=[(2, False), (3, True)]))
        second = await anext(reports)
        assert (second.is_cache_whole, list(second.pages_cached), list(second.pages_evicted)) == (False, [3], [2])
        third = await anext(reports)
        assert [*third.pages_cached, *third.pages_evicted] == []
    await reports.aclose()


def test_of_each_page_the_last_word_is_told():
    board = CacheBoard()
    *_, position = told(board, None)
    board.take([(5, True), (6, True)])
    board.take([(5, False)])
    assert told(board, position) == ([6], [5], False, 3)


def test_who_lags_too_far_behind_hears_all_of_it_again():
    board = CacheBoard()
    *_, position = told(board, None)
    pages = count(1)
    for _ in range(2):
        board.take([(next(pages), True) for _ in range(MOST_HASHES)])
    cached, evicted, is_whole, _ = told(board, position)
    assert (is_whole, evicted, len(cached)) == (True, [], MOST_HASHES)
    assert cached[0] == 1, "those that were cached first: of none without those before it"
