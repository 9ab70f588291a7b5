"""Workers of one machine lend their threads while they do not compute; a dead one's are nobody's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from headrace_core.batch.step import Chunk
from headrace_core.engine.executor import Executor
from headrace_core.errors import StartupError
from headrace_core.model.load import load_model
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.paged_sequences import PagedSequences, greedy_plan
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from headrace_core.worker.lent_threads import LentThreads


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def workers(folder: Path, *threads: int, clock: Clock | None = None) -> list[LentThreads]:
    return [LentThreads(folder, count, clock=clock or Clock()) for count in threads]


def test_who_computes_alone_has_the_threads_of_all_and_two_that_compute_have_their_own(tmp_path):
    first, second = workers(tmp_path / "lent", 1, 3)
    assert (first.take(), first.take()) == (4, 4)
    assert second.take() == 3
    assert first.take() == 1, "seen at once"
    first.rest()
    assert second.take() == 4
    second.rest()
    second.rest()
    assert first.take() == 4


def test_those_that_compute_share_what_is_lent_and_together_have_no_more_than_there_is(tmp_path):
    all_four = workers(tmp_path, 2, 1, 1, 3)
    busy = all_four[:3]
    for worker in busy:
        worker.take()
    counts = [worker.take() for worker in busy]
    assert sum(counts) == 7
    assert sorted(count - own for count, own in zip(counts, (2, 1, 1), strict=True)) == [1, 1, 1]
    busy[0].rest()
    assert sum(worker.take() for worker in busy[1:]) == 7, "five are shared by two"


def test_who_comes_later_is_found_and_who_goes_is_forgotten(tmp_path):
    clock = Clock()
    (first,) = workers(tmp_path, 1, clock=clock)
    assert first.take() == 1
    (second,) = workers(tmp_path, 2)
    clock.now_s = 1.0
    assert first.take() == 3
    second.close()
    clock.now_s = 2.0
    assert first.take() == 1
    assert len(os.listdir(tmp_path)) == 1


_WORKER = """
import sys, time
from pathlib import Path
from headrace_core.worker.lent_threads import LentThreads
lent = LentThreads(Path(sys.argv[1]), 2)
if sys.argv[2] == "busy":
    lent.take()
print("here", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("state", ["busy", "idle"])
def test_a_killed_worker_keeps_no_thread_and_lends_none(tmp_path, state):
    """Neither are the cores that it used lost to the others for longer than a look, nor are its own had twice."""
    clock = Clock()
    (first,) = workers(tmp_path, 1, clock=clock)
    command = [sys.executable, "-c", _WORKER, str(tmp_path), state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        assert first.take() == (1 if state == "busy" else 3)
        process.send_signal(signal.SIGKILL)
        process.wait(WAIT_S)
    clock.now_s = 1.0
    assert first.take() == 1
    (again,) = workers(tmp_path, 2)
    clock.now_s = 2.0
    assert first.take() == 3, "the one that took its place lends"
    again.close()


@pytest.mark.parametrize("count", [0, 256])
def test_who_does_not_say_how_many_threads_are_its_own_can_not_lend(tmp_path, count):
    with pytest.raises(StartupError) as caught:
        LentThreads(tmp_path, count)
    assert caught.value.reason == "NO_LENDING"
    assert "--threads" in str(caught.value)


def test_a_folder_that_is_none_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="--lend-threads") as caught:
        LentThreads(tmp_path / "file", 1)
    assert caught.value.reason == "NO_LENDING"


@pytest.mark.parametrize("kind", ["v3", "v2-groups", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_that_come_and_go_between_layers_change_no_bit(tmp_path, kind, dtype):
    write_checkpoint(tmp_path, TINY_CONFIGS[kind])
    model = load_model(tmp_path, dtype=dtype)
    before = torch.get_num_threads()

    def pages_after(counts: list[int]) -> list[torch.Tensor]:
        """Compute a prompt and a decode step; before each layer there is another number of threads."""
        sequences = PagedSequences(model, page_size=4, num_pages=64, is_poisoned=False)
        asked = iter(counts * 100)
        run = Executor(model, sequences.cache, num_threads=lambda: next(asked))
        tokens = [run.step(greedy_plan([sequences.chunk(key, range(5, 40 + key)) for key in (0, 1)])).tokens]
        tokens.append(run.step(greedy_plan([sequences.chunk(key, [9 + key]) for key in (0, 1)])).tokens)
        return [torch.tensor([[t.token_id for t in found[key]] for found in tokens for key in (0, 1)])] + [
            layer.clone() for layer in sequences.cache.layers
        ]

    expected = pages_after([1])
    for counts in ([2], [1, 3, 2], [3, 1, 1, 2]):
        assert all(torch.equal(a, b) for a, b in zip(pages_after(counts), expected, strict=True)), counts
    torch.set_num_threads(before)


def test_a_step_computes_on_what_there_is_before_it_and_after_each_layer():
    seen, before = [], torch.get_num_threads()

    class Model:
        def forward(self, chunks, cache, timer, on_layer=None):
            for layer in range(2):
                seen.append(torch.get_num_threads())
                on_layer(layer + 1)
            seen.append(torch.get_num_threads())
            return torch.eye(8)[:1]

        def take_failures(self):
            return {}

        def take_expert_counts(self):
            return {}

    counts = iter([2, 1, 3])
    Executor(Model(), None, num_threads=lambda: next(counts)).step(greedy_plan([Chunk(0, [1], 0, [0], True)]))
    torch.set_num_threads(before)
    assert seen == [2, 1, 3]
