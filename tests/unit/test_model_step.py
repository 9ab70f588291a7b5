"""Laying out steps, cache memory, expert counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from headrace_core.batch.step import Chunk, ForwardPlan, SamplingRow, StepPlan, StepResult
from headrace_core.engine.executor import Executor
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.model import step_inputs
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.load import load_model
from headrace_core.model.step_inputs import prepare_step
from headrace_core.request import SamplingParams
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from headrace_core.worker.warm_up import warm_up


def chunk(key, count, start, pages):
    return Chunk(key, list(range(10, 10 + count)), start, pages, True)


def test_decode_rows_come_first_and_chunks_know_their_place():
    chunks = [chunk(0, 5, 0, [3, 1]), chunk(1, 1, 6, [8, 2]), chunk(2, 3, 4, [5, 6, 7])]
    step = prepare_step(chunks, 4, max_decode_chunk=1)
    assert step.chunk_rows == [1, 0, 6]
    assert step.positions.tolist() == [6, 0, 1, 2, 3, 4, 4, 5, 6]
    assert step.slot_mapping.tolist() == [10, 12, 13, 14, 15, 4, 24, 25, 26]
    assert step.decode is not None
    assert step.decode.context_lens.tolist() == [7]
    (group,) = step.prefill
    assert (group.first, group.end) == (1, 9)
    assert group.query_starts.tolist() == [0, 5, 8]
    assert group.key_starts.tolist() == [0, 5, 12]
    assert group.slots.tolist() == [12, 13, 14, 15, 4, 20, 21, 22, 23, 24, 25, 26]


def test_a_short_chunk_may_become_decode_rows():
    step = prepare_step([chunk(0, 3, 4, [5, 6])], 4, max_decode_chunk=3)
    assert step.decode is not None
    assert step.decode.context_lens.tolist() == [5, 6, 7]
    assert step.decode.block_table.tolist() == [[5, 6]] * 3
    assert step.prefill == []


def test_groups_bound_how_many_keys_are_expanded_at_once(monkeypatch):
    monkeypatch.setattr(step_inputs, "GROUP_KEY_TOKENS", 8)
    chunks = [chunk(i, 3, 2 * i, list(range(9))) for i in range(4)]
    groups = prepare_step(chunks, 4, max_decode_chunk=0).prefill
    assert [(g.first, g.end, len(g.slots)) for g in groups] == [(0, 6, 8), (6, 9, 7), (9, 12, 9)]


@pytest.mark.parametrize("bad", [chunk(7, 0, 0, [1]), chunk(7, 5, 0, [1]), chunk(7, 1, -1, [1])])
def test_a_chunk_that_does_not_fit_its_pages_is_refused(bad):
    with pytest.raises(ValueError, match="chunk 7"):
        prepare_step([bad], 4, max_decode_chunk=1)


def test_page_bytes_are_the_caches_own_memory():
    layout = KvLayout(2, 4, CacheDtype.BFLOAT16, LatentAttention(6, 2))
    cache = KvCache(layout, 3)
    assert [tuple(layer.shape) for layer in cache.layers] == [(3, 4, 8)] * 2
    page = cache.page_bytes(1, 2)
    assert len(page) == layout.page_layer_bytes
    page[:2] = torch.tensor([1.5], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert cache.layers[1][2, 0, 0] == 1.5
    cache.layers[1][2, 3, 7] = -2.0
    assert bytes(page[-2:]) == b"\x00\xc0"
    cache.layers[0][1] = 5
    cache.zero_pages([2])
    assert not cache.layers[1][2].any()
    assert cache.layers[0][1].all()
    cache.zero_pages([])
    for page_id in (-1, 3):
        with pytest.raises(IndexError):
            cache.page_bytes(0, page_id)


def test_a_host_copy_follows_the_device_page_by_page():
    layout = KvLayout(2, 4, CacheDtype.BFLOAT16, LatentAttention(6, 2))
    cache = KvCache(layout, 3, has_host_copy=True)
    for layer in cache.layers:
        layer.copy_(torch.arange(layer.numel()).view(layer.shape))
    cache.copy_to_host([2, 0])
    cache.layers[1][2] = 0
    page = cache.page_bytes(1, 2)
    assert bytes(page[:2]) == torch.tensor([64.0], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    page[:2] = b"\xc0\x3f"
    assert not cache.layers[1][2].any(), "nothing is computed with before it is taken"
    cache.copy_from_host([2])
    assert cache.layers[1][2, 0, 0] == 1.5
    assert cache.layers[1][2, 3, 7] == 95
    assert cache.layers[0][1, 0, 0] == 32, "other pages stay"
    for copy in (cache.copy_to_host, cache.copy_from_host):
        copy([])


@pytest.mark.parametrize("name", ["v3", "mixtral"])
def test_a_layer_is_told_when_it_is_written_and_not_before_the_next_one(name, tmp_path):
    """Pages of the layers told of hold what they hold when the step is over, those of the others what they held."""
    write_checkpoint(tmp_path, TINY_CONFIGS[name])
    model = load_model(tmp_path)
    sequences = PagedSequences(model, page_size=4, num_pages=16)
    sequences.chunk(1, range(10, 16))
    seen: list[list[bytes]] = []

    def contents() -> list[bytes]:
        return [b"".join(sequences.cache.page_bytes(layer, page) for page in range(16)) for layer in range(num_layers)]

    def on_layer(done: int) -> None:
        assert done == len(seen) + 1
        seen.append(contents())

    num_layers = sequences.cache.layout.num_layers
    before = contents()
    chunks = [sequences.chunk(0, range(10, 19)), sequences.chunk(1, [5]), sequences.chunk(2, [6, 7], is_sampled=False)]
    model.forward(chunks, sequences.cache, on_layer=on_layer)
    after = contents()
    assert len(seen) == num_layers
    for done, content in enumerate(seen, start=1):
        assert content[:done] == after[:done]
        assert content[done:] == before[done:]


def test_expert_counts_cover_every_token_and_are_taken_once(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"])
    model = load_model(tmp_path)
    sequences = PagedSequences(model, page_size=4, num_pages=8)
    model.forward([sequences.chunk(0, range(10, 19))], sequences.cache)
    model.forward([sequences.chunk(0, [5])], sequences.cache)
    counts = model.take_expert_counts()
    assert sorted(counts) == [1, 2], "layer 0 is dense"
    assert all(sum(layer) == 10 * 3 and len(layer) == 8 for layer in counts.values())
    assert all(sum(layer) == 0 for layer in model.take_expert_counts().values())


def test_warming_up_leaves_nothing_behind(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"])
    model = load_model(tmp_path)
    sizes = []
    forward = model.forward
    model.forward = lambda chunks, cache: sizes.append(len(chunks[0].token_ids)) or forward(chunks, cache)
    cache = KvCache(model.kv_layout(4), 3, has_host_copy=True)
    warm_up(model, cache, max_step_tokens=512)
    assert sizes == [1, 2, 4, 8, 12], "no longer than the pool"
    assert not any(layer.any() for layer in cache.layers)
    assert not any(sum(layer) for layer in model.take_expert_counts().values())
    warm_up(model, cache, max_step_tokens=3)
    assert sizes[5:] == [1, 2, 3]


def sampled(key, token_ids, start, pages):
    return Chunk(key, token_ids, start, pages, True, f"r{key}")


def sampled_plan(chunks):
    def row(chunk):
        params = SamplingParams(temperature=0.9, seed=chunk.key, top_logprobs=5)
        return SamplingRow(params, [], [], 0, chunk.start + len(chunk.token_ids), ())

    return StepPlan(ForwardPlan(chunks), {chunk.key: row(chunk) for chunk in chunks})


def top_logprobs(token):
    assert token.logprobs is not None
    return dict(token.logprobs.top)


@pytest.mark.parametrize("kind", ["v3", "v2", "mixtral"])
def test_a_token_of_a_damaged_embedding_spoils_no_other_row(tmp_path, kind):
    """In prompts and in decode. It may choose other experts than a sound one; their groups' sizes decide last bits."""
    write_checkpoint(tmp_path, TINY_CONFIGS[kind])
    model = load_model(tmp_path)
    with torch.inference_mode():
        model._weights.embedding[7] = torch.nan

    def tokens_beside(token_id: int) -> list[StepResult]:
        step = Executor(model, KvCache(model.kv_layout(4), 64)).step
        pages = [list(range(8 * key, 8 * key + 8)) for key in range(5)]
        prompts = [sampled(key, list(range(20 + key, 23 + 5 * key)), 0, pages[key]) for key in (1, 2, 3)]
        bad = sampled(0, [30, token_id, 31, 32, 33, 34], 0, pages[0])
        alone = replace(bad, token_ids=[30, 35, 31, 32, 33, 34], key=4, page_ids=pages[4])
        first = step(sampled_plan([prompts[0], bad, *prompts[1:], alone]))
        rows = [sampled(c.key, [40 + c.key], len(c.token_ids), c.page_ids) for c in prompts]
        second = step(sampled_plan([*rows[:2], sampled(4, [token_id], 6, alone.page_ids), rows[2]]))
        return [first, second]

    found, expected = tokens_beside(7), tokens_beside(8)
    assert [set(result.failures) for result in found] == [{0}, {4}]
    assert not any(result.failures for result in expected)
    for one, other in zip(found, expected, strict=True):
        assert set(one.tokens) == set(other.tokens) - set(one.failures)
        for key, (token,) in one.tokens.items():
            assert token.token_id == other.tokens[key][0].token_id
            assert top_logprobs(token) == pytest.approx(top_logprobs(other.tokens[key][0]), abs=1e-5)
