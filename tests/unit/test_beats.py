"""Rule 2: an end that says nothing is noticed, whatever its connection does; one's own delay is not taken for it."""

import asyncio

import pytest
from headrace_core import beats
from headrace_core.beats import MOST_QUIET_BEATS, Outbox, Silence
from headrace_core.errors import UnavailableError
from headrace_core.testing.async_test import async_test, eventually


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(beats, "BEAT_S", 0.01)


@async_test
async def test_silence_is_told_once_and_not_while_something_is_heard():
    told: list[str] = []
    quiet, loud = Silence(lambda: told.append("quiet")), Silence(lambda: told.append("loud"))
    closed = Silence(lambda: told.append("closed"))
    closed.close()
    while not told:
        loud.heard()
        await asyncio.sleep(0.002)
    for _ in range(3 * MOST_QUIET_BEATS):
        loud.heard()
        await asyncio.sleep(0.01)
    assert told == ["quiet"]
    for silence in (quiet, loud):
        silence.close()


@async_test
async def test_a_loop_that_was_held_up_itself_does_not_blame_the_others():
    """All the beats of that time wait to be read: they count as one."""
    import time

    told: list[str] = []
    silence = Silence(lambda: told.append("quiet"))
    time.sleep(0.01 * MOST_QUIET_BEATS * 3)  # noqa: ASYNC251 - the loop is to be held up
    await asyncio.sleep(0.012)
    silence.heard()
    assert told == []
    await eventually(lambda: told == ["quiet"], "real silence is noticed")


@async_test
async def test_an_outbox_says_what_was_put_in_order_and_beats_when_there_is_nothing():
    outbox = Outbox("beat")
    outbox.put("a")
    outbox.put("b")
    said: list[str] = []
    async for item in outbox:
        said.append(item)
        if said.count("beat") == 2:
            outbox.put("c")
            outbox.close()
    assert said == ["a", "b", "beat", "beat", "c"]


@async_test
async def test_an_outbox_ends_with_its_first_error_once_all_is_said():
    outbox = Outbox("beat")
    outbox.put("a")
    outbox.close(UnavailableError("DRAINING", "first"))
    outbox.close(UnavailableError("STARTING", "second"))
    said = aiter(outbox)
    assert await anext(said) == "a"
    with pytest.raises(UnavailableError) as raised:
        await anext(said)
    assert raised.value.reason == "DRAINING"
