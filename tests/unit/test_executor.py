"""The torch side of a step: rows that fail alone, and what is left of a run that raised: nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from headrace_core.batch.step import Chunk, FatalStepError
from headrace_core.engine.executor import Executor
from headrace_core.testing.paged_sequences import greedy_plan


class LostDevice:
    """A model and a cache whose device fails in the method named `failing`."""

    def __init__(self, failing):
        self.failing = failing

    def zero_pages(self, page_ids):
        self._use("zero_pages")

    def forward(self, chunks, cache, timer, on_layer=None):
        self._use("forward")
        return torch.empty((0, 8))

    def take_failures(self):
        return {}

    def take_expert_counts(self):
        self._use("take_expert_counts")
        return {}

    def _use(self, name):
        if name == self.failing:
            raise torch.AcceleratorError("an illegal memory access was encountered", 700)


@pytest.mark.parametrize("failing", ["zero_pages", "forward", "take_expert_counts"])
def test_a_lost_device_is_fatal_wherever_a_step_notices(failing):
    device = LostDevice(failing)
    with pytest.raises(FatalStepError, match="illegal memory access"):
        Executor(device, device).step(greedy_plan([Chunk(0, [1], 0, [0], False)], [0]))


class StandInModel:
    """Logits by the last token of each chunk; every run counts one token for an expert and may then raise."""

    def __init__(self):
        self.failure = None
        self.counts = 0

    def forward(self, chunks, cache, timer, on_layer=None):
        self.counts += len(chunks)
        if self.failure is not None:
            raise self.failure
        rows = [chunk.token_ids[-1] for chunk in chunks if chunk.is_sampled]
        return torch.stack([torch.full((8,), float("nan")) if t == 0 else torch.eye(8)[t] for t in rows])

    def take_failures(self):
        return {}

    def take_expert_counts(self):
        counts, self.counts = self.counts, 0
        return {1: [counts]}


def chunk(key, token_id):
    return Chunk(key, [token_id], 5, [0], True, request_id=f"r{key}")


def test_rows_without_a_token_are_failures_that_name_their_requests():
    step = Executor(StandInModel(), None).step
    result = step(greedy_plan([chunk(1, 3), chunk(2, 0), replace(chunk(3, 4), is_sampled=False), chunk(4, 5)]))
    assert {key: [token.token_id for token in tokens] for key, tokens in result.tokens.items()} == {1: [3], 4: [5]}
    assert list(result.failures) == [2]
    assert result.failures[2].reason == "BAD_LOGITS"
    assert str(result.failures[2]).startswith("request r2: ")
    assert "damaged" in str(result.failures[2])


def test_what_a_run_that_raised_has_counted_is_not_counted_again():
    model = StandInModel()
    step = Executor(model, None).step
    model.failure = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        step(greedy_plan([chunk(1, 3), chunk(2, 4)]))
    model.failure = None
    assert step(greedy_plan([chunk(1, 3)])).expert_counts == {1: [1]}


class LayeredModel(StandInModel):
    """Four layers; keeps whom it would tell of them."""

    def __init__(self):
        super().__init__()
        self.told = []

    def forward(self, chunks, cache, timer, on_layer=None):
        self.told.append(on_layer)
        for layer in range(4) if on_layer else ():
            on_layer(layer + 1)
        return super().forward(chunks, cache, timer)


class MarkedCache:
    """Counts its marks."""

    def __init__(self):
        self.num_marks = 0

    def mark(self):
        self.num_marks += 1
        return f"mark {self.num_marks}"


def test_the_cache_is_marked_at_the_plans_stops_and_nowhere_else():
    model, stops = LayeredModel(), []
    step = Executor(model, MarkedCache()).step
    step(greedy_plan([chunk(1, 3)], stops=(2, 3)), lambda num_layers, mark: stops.append((num_layers, mark)))
    assert stops == [(2, "mark 1"), (3, "mark 2")]


def test_a_model_is_not_even_asked_to_tell_of_layers_when_nobody_wants_to_know():
    """Decode steps, and those of a worker that computes prompts for itself."""
    model = LayeredModel()
    step = Executor(model, None).step
    step(greedy_plan([chunk(1, 3)]), lambda num_layers, mark: None)
    step(greedy_plan([chunk(1, 3)], stops=(2,)))
    assert model.told == [None, None]
