"""What the event loop and the engine's thread do at once: the one ends a sequence of which the other has news."""

import queue

import pytest
from headrace.v1 import decode_service_pb2
from headrace_core.config import DecodeSettings
from headrace_core.errors import UnavailableError
from headrace_core.kv.page_pool import PageState
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S, async_test
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.worker_pair import running
from headrace_core.wire import encode_sampling
from headrace_decode.service import DecodeService

PROMPT = list(range(1, 23))


def num_owned(decoder: DecodeService) -> int:
    """Return the pages that sequences have, by the engine's thread; the event loop hears nothing meanwhile."""
    counted: queue.SimpleQueue[int] = queue.SimpleQueue()
    decoder.host.engine.submit(lambda scheduler: counted.put(scheduler.load().page_counts[PageState.OWNED]))
    return counted.get(timeout=WAIT_S)


@pytest.mark.parametrize("by", ["cancel", "session"])
@async_test
async def test_pages_of_a_sequence_that_ends_while_they_are_announced_are_freed(by: str):
    """`running` looks at every page: none is left set aside for a transfer that never began."""
    loaded = loaded_fake_model()
    decoder = DecodeService(DecodeSettings(model="."), loader=lambda _: loaded)
    async with running(decoder):
        session = decoder.open_session(7)
        start = decode_service_pb2.StartSequence(
            sequence_number=1,
            attempt=1,
            request_id="r",
            timeout_ms=60_000,
            token_ids=PROMPT,
            num_prompt_tokens=len(PROMPT),
            sampling=encode_sampling(SamplingParams(seed=1)),
            prefill_address="127.0.0.1:1",
        )
        decoder.start_sequence(session, start)
        while not num_owned(decoder):
            pass
        if by == "cancel":
            decoder.cancel_sequence(session, 1, attempt=1)
        decoder.close_session(session, UnavailableError("SESSION_CLOSED", "over"))
