"""What calls share: threads, and the memory they work in."""

from __future__ import annotations

import multiprocessing
import resource
import threading
from pathlib import Path

import pytest
import torch
from headrace_core.testing.async_test import WAIT_S
from headrace_kernels import use_backend
from headrace_kernels.gqa_prefill import gqa_prefill
from headrace_kernels.linear import Linear

from tests.parity.cpu_kernels.inputs import NAN, on_threads, plain, starts
from tests.parity.cpu_kernels.test_moe import Layer, tokens


def attention(scale=1.0):
    """A call whose scratch is as large as its threads are many."""
    query, cache = plain(40, 4, 16, dtype=torch.float32, scale=scale), plain(5, 2, 16, 4, 16, dtype=torch.float32)
    where = torch.arange(80), starts([20, 20]), starts([40, 40])
    return lambda: gqa_prefill(query, cache, *where, scale=0.3)


def test_nothing_of_an_earlier_call_is_left_in_the_memory_of_the_next(dtype):
    layer, inputs = Layer(50, 24, 5, dtype), tokens(9, 50, 5, 3, dtype)
    linear = Linear(plain(33, 50, dtype=dtype))
    calls = {"linear": lambda: linear(inputs[0]), "experts": lambda: layer(*inputs), "attention": attention()}
    before = {name: call() for name, call in calls.items()}
    for threads in (1, 3):
        on_threads(threads, lambda: Linear(plain(33, 50, dtype=dtype))(torch.full((600, 50), NAN, dtype=dtype)))
        on_threads(threads, attention(scale=NAN))
        for name, call in calls.items():
            assert torch.equal(on_threads(threads, call), before[name])


def test_threads_of_one_process_may_want_different_numbers_at_once():
    """As two engines of one process: each call is right, whatever number the other one's has."""
    failures: list[str] = []

    def work(number: int) -> None:
        torch.set_num_threads(number)
        torch.manual_seed(number)
        call = attention()
        expected = call()
        for _ in range(300):
            if not torch.equal(call(), expected):
                failures.append(f"{number} threads")

    workers = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 4)]
    before = torch.get_num_threads()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(before)
    assert failures == []


@pytest.fixture
def busy():
    """Another thread that computes on two threads all the time."""
    is_begun, is_over = threading.Event(), threading.Event()
    # Long: what forks holds the interpreter's lock, for which short ones would wait, done.
    x, linear = plain(600, 2000, dtype=torch.float32), Linear(plain(2000, 2000, dtype=torch.float32))

    def work():
        torch.set_num_threads(2)
        with use_backend("cpu"):
            while not is_over.is_set():
                linear(x)
                is_begun.set()

    worker = threading.Thread(target=work)
    worker.start()
    assert is_begun.wait(WAIT_S)
    yield
    is_over.set()
    worker.join()


def in_child(queue, call, threads):
    torch.set_num_threads(threads)
    queue.put(call().tolist())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_child_that_was_forked_while_a_kernel_ran_computes_with_threads_of_its_own(threads, busy):
    call = attention()
    expected = on_threads(2, call)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=in_child, args=(queue, call, threads))
    child.start()
    child.join(WAIT_S)
    if child.is_alive():
        child.kill()
        child.join()
        pytest.fail("the child hangs")
    assert child.exitcode == 0
    assert torch.equal(torch.tensor(queue.get()), expected)


def test_threads_that_the_system_does_not_give_are_done_without():
    """Far more than a process may have here, in a process whose limit is low."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    call = attention()
    expected = call()

    def limited(queue):
        # Room for some stacks more, not for all.
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (100 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        in_child(queue, call, 600)

    child = context.Process(target=limited, args=(queue,))
    child.start()
    child.join(WAIT_S)
    assert child.exitcode == 0
    assert torch.equal(torch.tensor(queue.get()), expected)


def test_no_inputs_are_a_bias():
    linear = Linear(torch.empty(5, 0), torch.arange(5.0))
    assert linear(torch.empty(2, 0)).tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0]] * 2
