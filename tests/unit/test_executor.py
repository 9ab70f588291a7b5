"""The torch side of a step."""

from __future__ import annotations

import pytest
import torch
from headrace_core.batch.step import Chunk, StepPlan
from headrace_core.engine.engine import FatalStepError
from headrace_core.engine.executor import Executor


class LostDevice:
    """A model and a cache whose device fails in the method named `failing`."""

    def __init__(self, failing):
        self.failing = failing

    def zero_pages(self, page_ids):
        self._use("zero_pages")

    def forward(self, chunks, cache, timer):
        self._use("forward")
        return torch.empty((0, 8))

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
        Executor(device, device).step(StepPlan([Chunk(0, [1], 0, [0], None)], [0]))
