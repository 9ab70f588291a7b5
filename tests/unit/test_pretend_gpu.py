"""The pretended GPU: each rule by a breach that is told, and by what lies beside it and passes."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
import torch
from headrace_core.testing.pretend_gpu import CaptureError, DevicesMixedError, UnderWayError, pretend_gpu, recording


@pytest.fixture(autouse=True)
def pretended():
    with ExitStack() as stack:
        stack.enter_context(pretend_gpu())
        yield stack


def on_gpu(*values):
    return torch.tensor(values, device="cuda")


def captured(run):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def test_tensors_say_cuda_and_go_there_and_back():
    x = torch.zeros(2, 3, device="cuda")
    assert x.is_cuda
    assert str(x.device) == "cuda:0"
    for there in (torch.ones(2).cuda(), torch.ones(2).to("cuda"), torch.as_tensor([1.0, 1.0], device="cuda:0")):
        assert there.is_cuda
        assert there.cpu().tolist() == there.tolist() == [1.0, 1.0]
    assert x.new_zeros(2).is_cuda
    assert not torch.empty_like(x, device="cpu").is_cuda
    assert torch.empty(2, device="meta").is_meta
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


@pytest.mark.parametrize("is_inference", [True, False])
def test_values_are_the_hosts(is_inference):
    with torch.inference_mode(is_inference):
        x = on_gpu(3.0, 1.0, 2.0)
        view = x.view(3, 1)
        view += 1
        assert x.tolist() == [4.0, 2.0, 3.0]
        assert x[[2, 0]].tolist() == [3.0, 4.0]
        assert torch.nn.functional.linear(x.view(1, 3), x.view(1, 3)).item() == 29
        assert x.sort().indices.tolist() == [1, 2, 0]
        x[1] = 7.0
        x[[]] = 9.0
        x[x > 5] = -1.0
        assert x.tolist() == [4.0, -1.0, 3.0]


MIXES = {
    "operands": lambda: on_gpu(1.0, 2.0) + torch.ones(2),
    "a mask made on the host": lambda: on_gpu(1.0, 2.0).masked_fill(torch.ones(2, dtype=torch.bool), 0.0),
    "a result on the host": lambda: torch.ones(2).add_(on_gpu(1.0, 2.0)),
    "a number of the host as result": lambda: torch.tensor(1.0).add_(on_gpu(1.0, 2.0)[0]),
    "an index of the device": lambda: torch.ones(2)[on_gpu(0, 1)],
    "values to be put": lambda: on_gpu(1.0, 2.0).index_put_((on_gpu(0, 1),), torch.ones(2)),
    "index_select": lambda: on_gpu(1.0, 2.0).index_select(0, torch.tensor([0])),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_devices_is_told(name):
    with pytest.raises(DevicesMixedError, match="two devices"):
        MIXES[name]()


def test_a_gpu_takes_numbers_copies_and_indices_from_the_host():
    x = on_gpu(1.0, 2.0)
    assert (x + torch.tensor(1.0)).tolist() == [2.0, 3.0]
    assert x[torch.tensor([1])].tolist() == [2.0]
    x[:] = torch.tensor([5.0, 6.0])
    assert torch.zeros(2).copy_(x).tolist() == [5.0, 6.0]


def test_a_generator_draws_on_its_own_device():
    generator = torch.Generator("cuda").manual_seed(0)
    assert torch.randn(2, generator=generator, device="cuda").is_cuda
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, generator=torch.Generator(), device="cuda")
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, generator=generator)


WAITS = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.max()),
    "if": lambda x: bool((x > 1).all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "masked_select": lambda x: x.masked_select(x > 1),
    "bincount": lambda x: x.long().bincount(),
    "multinomial": lambda x: x.multinomial(1),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "index by a mask": lambda x: x[x > 1],
    "put by a mask": lambda x: x.index_put_((x > 1,), x[:1]),
    "index of the host": lambda x: x[torch.tensor([1])],
    "index that is a list": lambda x: x[[1]],
    "one number put into one place": lambda x: x.__setitem__(0, 1.0),
    "one number put by an index": lambda x: x.__setitem__(torch.tensor([0, 1]).cuda(), 1.0),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "to": lambda x: torch.ones(2).to(x.device),
    "pinned": lambda x: torch.ones(2).pin_memory().to(x.device),
    "copy_": lambda x: x.copy_(torch.ones(2)),
    "copy_ to the host": lambda x: torch.ones(2).copy_(x),
    "not pinned, to the host": lambda x: torch.ones(2).copy_(x, non_blocking=True),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "a stream's synchronize": lambda x: torch.cuda.current_stream().synchronize(),
    "an event's synchronize": lambda x: torch.cuda.current_stream().record_event().synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_the_host_waits_for_is_listed_and_no_graph_holds_it(name):
    x = on_gpu(1.0, 2.0)
    with recording() as journal:
        WAITS[name](x)
    assert len(journal.waits) >= 1
    assert f"test_pretend_gpu.py:{WAITS[name].__code__.co_firstlineno} in <lambda>" in journal.waits[0].place
    with pytest.raises(CaptureError, match=r"test_pretend_gpu.py:\d+ in <lambda>"):
        captured(lambda: WAITS[name](x))
    assert not torch.cuda.is_current_stream_capturing()


FREE = {
    "arithmetic": lambda x: (x * 2 + torch.tensor(1.0)).softmax(0),
    "one number put by a mask": lambda x: x.__setitem__(x > 1, 0.0),
    "one number put into places": lambda x: x.__setitem__(slice(None), 0.0),
    "index of the device": lambda x: x[torch.zeros(2, dtype=torch.int64, device="cuda")],
    "memory": lambda x: (torch.zeros(2, device="cuda"), torch.empty_like(x), x.new_full((2,), 3.0)),
    "choice": lambda x: (x.topk(1), torch.where(x > 1, x, -1.0), torch.stack((x, x)).cumsum(0)),
}


@pytest.mark.parametrize("name", FREE)
def test_what_the_host_does_not_wait_for_goes_into_a_graph(name):
    x = on_gpu(1.0, 2.0)
    with recording() as journal:
        FREE[name](x)
    assert journal.waits == []
    assert journal.copies == []
    captured(lambda: FREE[name](x)).replay()


def test_a_size_that_is_known_need_not_be_waited_for():
    x = on_gpu(1.0, 2.0)
    with recording() as journal:
        assert len(x.repeat_interleave(x.long(), output_size=3)) == 3
    assert journal.waits == []


def test_a_capture_computes_nothing_and_a_replay_all():
    x, total = on_gpu(1.0, 2.0), torch.zeros(1, device="cuda")
    found = {}

    def run():
        found["doubled"] = x * 2
        total.add_(found["doubled"].sum())

    graph = captured(run)
    assert total.tolist() == [0.0]
    assert found["doubled"].isnan().all()
    for value in (1.0, 5.0):
        x.fill_(value)
        with recording() as journal:
            graph.replay()
        assert journal.launches == ["graph"]
        assert found["doubled"].tolist() == [2 * value, 2 * value]
    assert total.tolist() == [24.0]


def test_a_capture_that_failed_is_over_and_has_left_nothing():
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(CaptureError), torch.cuda.graph(graph):
        on_gpu(1.0)
    with pytest.raises(RuntimeError, match="nothing was captured"):
        graph.replay()
    assert on_gpu(1.0).item() == 1.0


def test_new_memory_holds_nothing_of_use():
    assert torch.empty(2, device="cuda").isnan().all()
    assert torch.empty(2, dtype=torch.int32, device="cuda").tolist() == [-1, -1]
    assert torch.empty(2, dtype=torch.float8_e4m3fn, device="cuda").float().isnan().all()


def test_copies_are_listed_with_bytes_and_places():
    x = torch.zeros(4, 8, device="cuda")
    pinned = torch.ones(4, 8, pin_memory=True)
    with recording() as journal:
        x.copy_(pinned, non_blocking=True)
        x.copy_(torch.ones(4, 8), non_blocking=True)
        # In pieces: torch joins them in memory that is not pinned.
        x[:, :2].copy_(pinned[:, :2], non_blocking=True)
        x[0].cpu()
    seen = [(copy.to, copy.num_bytes, copy.is_pinned, copy.is_waited_for) for copy in journal.copies]
    assert seen == [
        ("device", 128, True, False),
        ("device", 128, False, False),
        ("device", 32, False, False),
        ("host", 32, False, True),
    ]
    assert len(journal.waits) == 1
    assert journal.waits[0].place.endswith("in test_copies_are_listed_with_bytes_and_places")


def test_a_copy_that_nobody_waited_for_has_not_come():
    x, host = on_gpu(1.0, 2.0), torch.zeros(2).pin_memory()
    done = torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    assert host.isnan().all()
    done.record()
    assert not done.query()
    x.zero_()
    done.synchronize()
    assert host.tolist() == [1.0, 2.0]
    assert (x + 1).to("cpu", non_blocking=True).isnan().all()


def test_an_event_in_front_of_a_copy_says_nothing_of_it():
    x, host, early = on_gpu(1.0, 2.0), torch.zeros(2).pin_memory(), torch.cuda.Event()
    early.record()
    host.copy_(x, non_blocking=True)
    early.synchronize()
    assert host.isnan().all()


def test_another_stream_is_done_with_a_copy_only_behind_its_own():
    x, host, other = on_gpu(1.0, 2.0), torch.zeros(2).pin_memory(), torch.cuda.Stream()
    host.copy_(x, non_blocking=True)
    other.synchronize()
    assert host.isnan().all()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        torch.cuda.current_stream().synchronize()
    assert host.tolist() == [1.0, 2.0]


def test_memory_that_a_copy_still_reads_is_not_to_be_written():
    x, host, done = torch.zeros(2, device="cuda"), torch.ones(2).pin_memory(), torch.cuda.Event()
    x.copy_(host, non_blocking=True)
    host.fill_(2.0)
    with pytest.raises(UnderWayError, match="the copy at tests/unit/test_pretend_gpu"):
        torch.cuda.synchronize()
    x.copy_(host, non_blocking=True)
    done.record()
    done.synchronize()
    host.fill_(3.0)
    torch.cuda.synchronize()


def test_pinned_memory_is_what_a_graph_copies_at_every_replay():
    x, back = torch.zeros(2, device="cuda"), torch.zeros(2).pin_memory()
    host = torch.ones(2).pin_memory()

    def run():
        x.copy_(host, non_blocking=True)
        back.copy_(x + 1, non_blocking=True)

    graph = captured(run)
    host.fill_(4.0)
    graph.replay()
    assert back.isnan().all()
    torch.cuda.synchronize()
    assert (x.tolist(), back.tolist()) == ([4.0, 4.0], [5.0, 5.0])


def test_threads_started_inside_have_the_gpu():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.ones(2, device="cuda").sum().item()))
    thread.start()
    thread.join()
    assert found == [2.0]


def test_kernels_take_the_devices_tensors_alone_and_run_when_replayed():
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    def add_one(x, out, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        tl.store(out + at, tl.load(x + at) + 1)

    kernel, x, out = InterpretedFunction(add_one), on_gpu(1.0, 2.0), torch.empty(2, device="cuda")
    with pytest.raises(ValueError, match=r"add_one: pointer argument 0 .* on cpu"):
        kernel[(1,)](torch.ones(2), out, SIZE=2)
    graph = captured(lambda: kernel[(1,)](x, out, SIZE=2))
    assert out.isnan().all()
    graph.replay()
    assert out.tolist() == [2.0, 3.0]


def test_one_inside_another_is_the_same():
    outer = on_gpu(1.0)
    with pretend_gpu():
        inner = outer + on_gpu(1.0)
    assert torch.cuda.is_available()
    assert (inner + on_gpu(1.0)).item() == 3.0


def test_a_number_of_the_host_is_the_same_in_every_replay():
    x, number = on_gpu(1.0), torch.tensor(2.0)
    graph = captured(lambda: x.mul_(number))
    number.fill_(100.0)
    graph.replay()
    assert x.item() == 2.0


def test_outside_its_tensors_are_of_no_use(pretended):
    kept = on_gpu(1.0)
    pretended.close()
    with pytest.raises(RuntimeError, match="outside `pretend_gpu`"):
        kept.add(1)
