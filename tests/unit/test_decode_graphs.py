"""Decode steps from fixed buffers: padding, limits and what is copied; the capture is a plain call here."""

from __future__ import annotations

import pytest
import torch
from headrace_core.batch.step import Chunk
from headrace_core.model.decode_graphs import DecodeGraphs, DecodeOutput, buckets, is_decode_step

PAGE_SIZE = 4


def chunk(key, token, start, pages, *, is_sampled=True):
    return Chunk(key, [token], start, pages, is_sampled)


class Recorder:
    """Keeps a copy of every batch and answers the rows' tokens as logits."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append([t.clone() for t in (batch.token_ids, batch.positions, batch.slot_mapping)])
        self.table, self.lens = batch.block_table.clone(), batch.context_lens.clone()
        tokens = batch.token_ids[:, None].float()
        return DecodeOutput(tokens + 0.5, batch.positions[None, :, None], tokens)


def graphs(forward, max_rows=12, max_pages=3):
    return DecodeGraphs(
        forward, max_rows=max_rows, max_pages=max_pages, page_size=PAGE_SIZE, device="cpu", capture=lambda run: run
    )


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (3, [1, 2, 3]), (4, [1, 2, 4]), (12, [1, 2, 4, 8, 16])])
def test_buckets_reach_the_most_rows(most, expected):
    assert buckets(most) == expected


def test_rows_are_padded_with_the_first_which_writes_nothing():
    recorder = Recorder()
    steps = graphs(recorder)
    output = steps.run([chunk(0, 7, 5, [9, 2]), chunk(1, 8, 3, [4]), chunk(2, 6, 8, [1, 3, 5])])
    assert output.logits[:, 0].tolist() == [7, 8, 6]
    assert output.hidden[:, 0].tolist() == [7.5, 8.5, 6.5]
    assert output.experts.tolist() == [[[5], [3], [8]]]
    tokens, positions, slots = (t.tolist() for t in recorder.batches[-1])
    assert tokens == [7, 8, 6, 7]
    assert positions == [5, 3, 8, 5]
    assert slots == [2 * PAGE_SIZE + 1, 4 * PAGE_SIZE + 3, 5 * PAGE_SIZE, -1]
    assert recorder.lens.tolist() == [6, 4, 9, 6]
    assert recorder.table[:3, :1].tolist() == [[9], [4], [1]]
    assert recorder.table[3].tolist()[:2] == [9, 2]


def test_a_step_leaves_nothing_behind_for_the_next():
    recorder = Recorder()
    steps = graphs(recorder)
    steps.run([chunk(i, 10 + i, 4, [i, i + 1]) for i in range(8)])
    assert steps.run([chunk(0, 3, 2, [5])]).logits[:, 0].tolist() == [3]
    assert [t.tolist() for t in recorder.batches[-1]] == [[3], [2], [5 * PAGE_SIZE + 2]]
    assert recorder.lens.tolist() == [3]


def test_captured_calls_write_nothing():
    recorder = Recorder()

    def capture(run):
        run()
        return run

    DecodeGraphs(recorder, max_rows=12, max_pages=3, page_size=PAGE_SIZE, device="cpu", capture=capture)
    assert [len(batch[0]) for batch in recorder.batches] == [16, 8, 4, 2, 1]
    assert all(set(slots.tolist()) == {-1} for _, _, slots in recorder.batches)


def test_what_does_not_fit_is_refused():
    steps = graphs(Recorder(), max_rows=2)
    with pytest.raises(ValueError, match="more than the 2"):
        steps.run([chunk(i, 0, 1, [i]) for i in range(3)])
    with pytest.raises(ValueError, match="chunk 5"):
        steps.run([chunk(5, 0, PAGE_SIZE, [1])])
    with pytest.raises(ValueError, match="3 at most"):
        steps.run([chunk(5, 0, 3 * PAGE_SIZE, [1, 2, 3, 4])])


def test_only_single_sampled_tokens_behind_others_make_a_decode_step():
    decode = chunk(0, 1, 3, [1])
    assert is_decode_step([decode, decode])
    assert not is_decode_step([decode, chunk(0, 1, 0, [1])])
    assert not is_decode_step([decode, chunk(0, 1, 3, [1], is_sampled=False)])
    assert not is_decode_step([Chunk(0, [1, 2], 3, [1, 2], True)])


@pytest.mark.parametrize("has_experts", [True, False])
def test_an_output_for_fewer_rows_is_kept_in_the_largest_ones_memory(has_experts):
    def output(rows, value):
        experts = torch.full((3, rows, 2), value) if has_experts else None
        return DecodeOutput(torch.full((rows, 3), value + 0.5), experts, torch.full((rows, 5), float(value)))

    largest = output(4, 0)
    largest.first(2).copy_(output(2, 7))
    assert largest.logits[:, 0].tolist() == [7, 7, 0, 0]
    if has_experts:
        assert largest.experts[:, :, 0].tolist() == [[7, 7, 0, 0]] * 3


def test_a_sequences_pages_may_grow_change_and_make_room_for_anothers():
    recorder = Recorder()
    steps = graphs(recorder)
    for pages in ([9], [9, 2], [9, 2, 7], [9, 4, 7], [5, 4], [6]):
        # Before and behind it are sequences whose pages stay as they are.
        steps.run([chunk(0, 1, 5, [8, 3]), chunk(1, 1, 4 * len(pages) - 1, list(pages)), chunk(2, 1, 4, [1, 0])])
        assert recorder.table[1, : len(pages)].tolist() == pages
        assert recorder.table[[0, 2], :2].tolist() == [[8, 3], [1, 0]]
        assert recorder.table[3, :2].tolist() == [8, 3], "padding reads what row 0 reads"


@pytest.mark.parametrize("max_rows", [1, 3, 12])
def test_the_inputs_lie_where_kernels_were_compiled_for(max_rows):
    """Triton compiles for pointers that are multiples of 16 bytes; another would be compiled while clients wait."""
    seen = []

    def forward(batch):
        seen.extend((batch.token_ids, batch.positions, batch.slot_mapping, batch.context_lens, batch.block_table))
        return DecodeOutput(batch.token_ids[:, None].float(), None, batch.token_ids[:, None].float())

    graphs(forward, max_rows=max_rows).run([chunk(0, 7, 5, [9, 2])])
    assert [column.data_ptr() % 16 for column in seen] == [0] * 5
