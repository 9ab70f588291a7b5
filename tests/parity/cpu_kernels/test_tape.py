"""Recorded decode steps give the bits of those that are not, and nothing is recorded that can't be made again."""

from __future__ import annotations

import threading

import pytest
import torch
from headrace_core.model.load import load_model
from headrace_core.model.op_timer import RunningOpTimer
from headrace_core.model.weights_dtype import WeightsDtype
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint, write_fp8_checkpoint
from headrace_kernels.cpu.arena import Arena
from headrace_kernels.cpu.tape import record
from headrace_kernels.linear import Linear

PAGE_SIZE = 8
# Numbers of sequences of steps one after another: most of them come back to a recording after another was replayed.
BATCHES = (1, 3, 2, 3, 1, 4, 2, 4, 3, 1, 4)


def logits_of(model, *, is_recorded, timers=None):
    """Logits of `BATCHES`, sequences growing over the borders of pages; the bytes of the cache; the experts' counts."""
    sequences = PagedSequences(model, page_size=PAGE_SIZE, num_pages=40)
    if is_recorded:
        model.record_decode(sequences.cache, max_rows=4, max_context_tokens=80)
    for key, length in enumerate((3, 8, 15, 30)):
        model.forward([sequences.chunk(key, list(range(2, 2 + length)))], sequences.cache)
    model.take_expert_counts()
    found = []
    for step, batch in enumerate(BATCHES):
        # Who is in a step changes, too.
        keys = [(step + i) % 4 for i in range(batch)]
        chunks = [sequences.chunk(key, [(7 * step + key) % 100]) for key in keys]
        timer = RunningOpTimer()
        # Replayed memory is another step's next.
        found.append(model.forward(chunks, sequences.cache, timer).clone())
        if timers is not None:
            timers.append(timer.seconds)
    return found, [layer.view(torch.uint8).clone() for layer in sequences.cache.layers], model.take_expert_counts()


@pytest.fixture(params=["v3", "v3-yarn", "v3-no-q-lora", "v3-tied", "v2-groups", "mixtral"])
def model(request, tmp_path, dtype):
    write_checkpoint(tmp_path, TINY_CONFIGS[request.param])
    return load_model(tmp_path, dtype=str(dtype).removeprefix("torch."))


def test_recorded_steps_give_the_same_bits(model):
    expected, expected_cache, expected_counts = logits_of(model, is_recorded=False)
    logits, cache, counts = logits_of(model, is_recorded=True)
    assert model._decode_steps.problem is None
    assert sorted(model._decode_steps._tapes) == [1, 2, 3, 4]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(cache, expected_cache, strict=True))
    assert counts == expected_counts


@pytest.mark.parametrize(
    ("name", "weights_dtype"), [("v3", WeightsDtype.INT8), ("mixtral", WeightsDtype.INT8), ("v3", WeightsDtype.FP8)]
)
def test_recorded_steps_of_weights_in_8_bits_give_the_same_bits(name, weights_dtype, tmp_path, dtype):
    if weights_dtype is WeightsDtype.FP8:
        write_fp8_checkpoint(tmp_path, TINY_CONFIGS[name])
    else:
        write_checkpoint(tmp_path, TINY_CONFIGS[name])
    model = load_model(tmp_path, dtype=str(dtype).removeprefix("torch."), weights_dtype=weights_dtype)
    expected, expected_cache, _ = logits_of(model, is_recorded=False)
    logits, cache, _ = logits_of(model, is_recorded=True)
    assert model._decode_steps.problem is None
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(cache, expected_cache, strict=True))


def test_recorded_steps_name_the_same_operations(model):
    plain, recorded = [], []
    logits_of(model, is_recorded=False, timers=plain)
    logits_of(model, is_recorded=True, timers=recorded)
    assert [list(seconds) for seconds in recorded] == [list(seconds) for seconds in plain]
    assert all(second >= 0 for seconds in recorded for second in seconds.values())


def test_a_step_over_another_cache_is_computed_as_ever(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"])
    model = load_model(tmp_path)
    expected = logits_of(model, is_recorded=False)[0]
    model.record_decode(
        PagedSequences(model, page_size=PAGE_SIZE, num_pages=4).cache, max_rows=4, max_context_tokens=80
    )
    logits = logits_of(model, is_recorded=False)[0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))


def test_a_cache_that_kernels_do_not_read_is_computed_as_ever(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"])
    model = load_model(tmp_path, kv_cache_dtype="fp8_e4m3")
    expected = logits_of(model, is_recorded=False)[0]
    model.forget_decode()
    logits = logits_of(model, is_recorded=True)[0]
    assert "can't be recorded" in model._decode_steps.problem
    assert model._decode_steps._tapes == {}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "compute"),
    [
        ("bmm", lambda x: torch.bmm(x[None], x[None])[0]),
        ("add_", lambda x: x.add_(1)),
        ("_local_scalar_dense", lambda x: x * x[0, 0].item()),
        ("nonzero", lambda x: x.nonzero()),
        ("sum", lambda x: x.sum(dim=1)),
    ],
)
def test_what_nobody_thought_of_is_not_recorded(name, compute):
    x = torch.ones(4, 4)
    with torch.inference_mode():
        _, tape = record(lambda tape: compute(x), Arena())
    assert name in tape.problem


def test_a_replay_computes_from_what_lies_there_now(dtype):
    layer, x = Linear(torch.randn(24, 16, dtype=dtype)), torch.randn(3, 16, dtype=dtype)
    with torch.inference_mode():
        out, tape = record(lambda tape: torch.stack((layer(x) * 2, layer(x[:, :])))[0].float(), Arena())
        assert tape.problem is None
        x.normal_()
        expected = (layer(x) * 2).float()
        assert not torch.equal(out, expected)
        tape.replay()
    assert torch.equal(out, expected)


def test_other_threads_calls_are_not_recorded(dtype):
    layer, x = Linear(torch.randn(24, 16, dtype=dtype)), torch.randn(3, 16, dtype=dtype)

    def run(tape):
        thread = threading.Thread(target=lambda: layer(x))
        thread.start()
        thread.join()
        return layer(x)

    with torch.inference_mode():
        _, tape = record(run, Arena())
    assert [part.count for part in tape._parts] == [1]
