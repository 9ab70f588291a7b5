"""Work on pages that runs in a thread is waited for, also by who no longer wants it."""

from __future__ import annotations

import asyncio
import threading

import pytest
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.transfer.verify import run_to_its_end


@async_test
async def test_a_result_and_an_error_are_passed_on():
    assert await run_to_its_end(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await run_to_its_end(divmod, 7, 0)


@pytest.mark.parametrize("error", [None, OSError("late")])
@async_test
async def test_when_cancelled_it_ends_after_the_thread_has(error):
    has_begun, may_end, has_ended = threading.Event(), threading.Event(), threading.Event()

    def work():
        has_begun.set()
        may_end.wait(10)
        has_ended.set()
        if error:
            raise error

    task = asyncio.ensure_future(run_to_its_end(work))
    await eventually(has_begun.is_set, "the thread has begun")
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=0.05)
    assert not done
    may_end.set()
    await asyncio.wait([task])
    assert has_ended.is_set()
    assert task.cancelled()
