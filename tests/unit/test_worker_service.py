"""What a worker tells of its load: something every second, whatever a watcher asks for."""

import asyncio

import pytest
from headrace.v1 import worker_service_pb2 as pb
from headrace_core.batch.scheduler import Load
from headrace_core.testing.async_test import WAIT_S, async_test
from headrace_core.worker.worker_service import LoadBoard, WorkerServicer


@pytest.mark.parametrize("interval_ms", [0, 1, 1000, 60_000, 2**32 - 1])
@async_test
async def test_no_interval_makes_a_worker_go_silent(interval_ms):
    board = LoadBoard()
    servicer = WorkerServicer(pb.GetInfoResponse, board, lambda: None)
    reports = servicer.WatchLoad(pb.WatchLoadRequest(min_interval_ms=interval_ms), None)
    async with asyncio.timeout(WAIT_S):
        assert await anext(reports) == await anext(reports), "there is nothing new, and it is told all the same"
        board.set_load(Load(num_running=3))
        while (await anext(reports)).num_running != 3:
            pass
    await reports.aclose()
