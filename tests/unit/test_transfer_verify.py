"""Pages are used only if they are the right ones; work on them in a thread is waited for, also by who gave it up."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from headrace_core.errors import LayoutMismatchError, TransferCorruptError
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_core.testing.handoff_parts import PlainMemory, run_of
from headrace_core.transfer.verify import accept_pages, check_bytes, check_compatible, run_to_its_end

THREADS = ThreadPoolExecutor(2)


@async_test
async def test_a_result_and_an_error_are_passed_on():
    assert await run_to_its_end(THREADS, divmod, 7, 2) == (3, 1)
    assert await run_to_its_end(THREADS, int, "11", base=2) == 3
    with pytest.raises(ZeroDivisionError):
        await run_to_its_end(THREADS, divmod, 7, 0)


@pytest.mark.parametrize("num_cancels", [1, 2, 3])
@pytest.mark.parametrize("error", [None, OSError("late")])
@async_test
async def test_however_often_cancelled_it_ends_after_the_thread_has(error, num_cancels):
    has_begun, may_end, has_ended = threading.Event(), threading.Event(), threading.Event()

    def work():
        has_begun.set()
        may_end.wait(WAIT_S)
        has_ended.set()
        if error:
            raise error

    task = asyncio.ensure_future(run_to_its_end(THREADS, work))
    await eventually(has_begun.is_set, "the thread has begun")
    for _ in range(num_cancels):
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=0.05)
        assert not done
    may_end.set()
    await asyncio.wait([task])
    assert has_ended.is_set()
    assert task.cancelled()


def test_pages_that_arrived_whole_become_what_is_computed_with():
    memory = PlainMemory()
    accept_pages(replace(run_of(memory, [4, 2]), page_ids=(9, 9)), memory, [4, 2], endpoint="x")
    assert memory.copies == [("from_host", (4, 2), range(2))]


@pytest.mark.parametrize(("layer", "index"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_one_wrong_byte_anywhere_keeps_the_pages_from_being_used(layer, index):
    memory = PlainMemory()
    page_ids = [4, 2]
    run = replace(run_of(memory, page_ids), first_page=7)
    memory.page_bytes(layer, page_ids[index])[63] ^= 1
    with pytest.raises(TransferCorruptError) as raised:
        accept_pages(run, memory, page_ids, endpoint="10.0.0.7:5000")
    assert raised.value.reason == "CHECKSUM"
    assert str(raised.value) == f"page {7 + index} of layer {layer} from 10.0.0.7:5000 arrived with another checksum"
    assert memory.copies == []


def test_pages_in_another_order_are_other_pages():
    memory = PlainMemory()
    with pytest.raises(TransferCorruptError):
        check_bytes(run_of(memory, [4, 2]), memory, [2, 4], endpoint="x")


@pytest.mark.parametrize(
    "few",
    [lambda sums: (sums[0], sums[1][:1]), lambda sums: (sums[0][:1], sums[1])],
    ids=["a-page-of-the-last", "a-page-of-the-first"],
)
def test_pages_for_which_a_run_has_no_checksum_are_not_accepted(few):
    memory = PlainMemory()
    run = run_of(memory, [4, 2])
    with pytest.raises(ValueError, match="zip"):
        accept_pages(replace(run, checksums=few(run.checksums)), memory, [4, 2], endpoint="x")
    assert memory.copies == []


LAYOUT = KvLayout(2, 4, CacheDtype.FLOAT32, LatentAttention(3, 1))


def test_the_same_model_and_layout_are_compatible():
    check_compatible("fa4e", LAYOUT, ours=("fa4e", replace(LAYOUT)), who="x")


def test_another_model_is_refused_by_the_first_letters_of_both_fingerprints():
    with pytest.raises(LayoutMismatchError) as raised:
        check_compatible("a" * 64, LAYOUT, ours=("b" * 64, LAYOUT), who="10.0.0.7:5000")
    assert raised.value.reason == "MODEL_MISMATCH"
    assert f"10.0.0.7:5000 serves model {'a' * 12}, this worker {'b' * 12}:" in str(raised.value)
    assert "same config, weights and --dtype" in str(raised.value)


def test_another_layout_is_refused_naming_both_and_the_option():
    layout = replace(LAYOUT, dtype=CacheDtype.FP8_E4M3, attention=LatentAttention(4, 2))
    other = replace(layout, dtype=CacheDtype.BFLOAT16)
    with pytest.raises(LayoutMismatchError) as raised:
        check_compatible("fa4e", layout, ours=("fa4e", other), who="10.0.0.7:5000")
    assert raised.value.reason == "LAYOUT_MISMATCH"
    assert str(raised.value) == (
        "pages of 10.0.0.7:5000 are not laid out as this worker's: dtype fp8_e4m3, not bfloat16 "
        "(--kv-cache-dtype, --dtype); start both with the same options"
    )
