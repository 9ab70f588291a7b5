"""A wait that is ended is ended: nobody is told so in vain."""

import asyncio

import pytest
from headrace_core.endable import EndableWait
from headrace_core.errors import HeadraceError

ERROR = HeadraceError("X", "x")


async def end_inside(wait: EndableWait, then) -> None:
    async with wait:
        assert wait.end(ERROR)
        await then()


def test_a_wait_that_is_ended_raises_the_error():
    async def test():
        wait = EndableWait()
        assert not wait.end(ERROR)
        with pytest.raises(HeadraceError, match="x"):
            await end_inside(wait, asyncio.Event().wait)

    asyncio.run(test())


def test_a_wait_that_is_ended_in_the_tick_in_which_it_is_over_raises_the_error():
    async def test():
        wait, future = EndableWait(), asyncio.get_running_loop().create_future()

        async def inside():
            async with wait:
                await future

        task = asyncio.ensure_future(inside())
        await asyncio.sleep(0)
        future.set_result(None)
        assert wait.end(ERROR)
        with pytest.raises(HeadraceError, match="x"):
            await task
        assert not wait.end(ERROR)

    asyncio.run(test())


def test_another_error_from_inside_stays():
    async def fail():
        raise ValueError("other")

    async def test():
        wait = EndableWait()
        with pytest.raises(ValueError, match="other"):
            await end_inside(wait, fail)
        with pytest.raises(TimeoutError):
            async with EndableWait(0.0):
                await asyncio.Event().wait()

    asyncio.run(test())
