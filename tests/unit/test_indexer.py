"""What sparse attention is over: which tokens an indexer chooses, and that their number at a time changes nothing."""

import pytest
import torch
from headrace_core.batch.step import Chunk
from headrace_core.errors import StartupError
from headrace_core.families.config import IndexerShape
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.model import sparse_mla
from headrace_core.model.indexer import Indexer, IndexerWeights, IndexQueries
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.load import load_model
from headrace_core.model.numerics import Numerics
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from headrace_core.wire import decode_layout, encode_layout
from headrace_kernels.linear import Linear

NAN, INF = float("nan"), float("inf")


def indexer(top_k, heads=2, width=4):
    """One whose own weights are not asked."""
    nothing = torch.zeros(0)
    weights = IndexerWeights(Linear(torch.zeros(heads * width, 3)), nothing, nothing, torch.zeros(heads, 3))
    return Indexer(IndexerShape(heads, width, top_k), 2, weights)


def by_hand(queries, keys, visible, top_k):
    """Return the chosen of one query in plain Python."""
    heads, weights = queries
    scores = [
        sum(
            float(w * max(torch.dot(q, key) * len(key) ** -0.5, torch.tensor(0.0)))
            for q, w in zip(heads, weights, strict=True)
        )
        for key in keys[:visible]
    ]
    return sorted(sorted(range(visible), key=lambda s: (-scores[s], s))[:top_k])


@pytest.mark.parametrize("top_k", [1, 3, 7, 20])
def test_the_best_of_what_a_query_sees_are_chosen_in_order(top_k):
    generator = torch.Generator().manual_seed(top_k)
    heads, weights = torch.randn(6, 2, 4, generator=generator), torch.randn(6, 2, generator=generator)
    keys = torch.randn(9, 4, generator=generator)
    visible = torch.tensor([1, 2, 5, 7, 8, 9])
    chosen, counts, _ = indexer(top_k).choose(IndexQueries(heads, weights), keys, visible)
    assert chosen.shape == (6, min(top_k, 9))
    for row, count, *query in zip(chosen.tolist(), counts.tolist(), heads, weights, strict=True):
        seen = int(visible[heads.tolist().index(query[0].tolist())])
        assert row[:count] == by_hand(query, keys, seen, top_k)
        assert not any(row[count:])


def test_a_key_each_is_as_one_for_all():
    heads, weights, keys = torch.randn(3, 2, 4), torch.randn(3, 2), torch.randn(8, 4)
    queries, visible = IndexQueries(heads, weights), torch.tensor([8, 3, 6])
    of_all, of_each = (indexer(4).choose(queries, each, visible) for each in (keys, keys.expand(3, -1, -1)))
    assert [each.tolist() for each in of_all] == [each.tolist() for each in of_each]


def test_of_equals_the_earlier_is_chosen():
    """Keys that no head likes all score 0, however many."""
    heads, weights = torch.ones(1, 2, 4), torch.ones(1, 2)
    keys = -torch.ones(600, 4)
    keys[[77, 500]] = 1.0
    chosen, counts, is_sound = indexer(5).choose(IndexQueries(heads, weights), keys, torch.tensor([600]))
    assert (chosen.tolist(), counts.tolist(), is_sound.tolist()) == ([[0, 1, 2, 77, 500]], [5], [True])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_choice_by_what_is_no_number_is_none(value):
    keys = torch.ones(6, 4)
    keys[4] = value
    queries = IndexQueries(torch.tensor([[[1.0] * 4, [-1.0] * 4]]).repeat(2, 1, 1), torch.ones(2, 2))
    assert indexer(2).choose(queries, keys, torch.tensor([4, 5])).is_sound.tolist() == [True, False]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v32")
    write_checkpoint(folder, TINY_CONFIGS["v32"])
    return folder


def logits(model, num_tokens=40):
    cache = KvCache(model.kv_layout(16), 6)
    ids = [5 + 3 * n % 140 for n in range(num_tokens)]
    prompt, step = (
        model.all_logits([Chunk(0, part, start, [4, 0, 2], is_sampled=True)], cache)[0]
        for part, start in ((ids[:-1], 0), (ids[-1:], num_tokens - 1))
    )
    return torch.cat((prompt, step))


@pytest.mark.parametrize("block_bytes", [1, 4000, 30_000])
def test_how_many_queries_are_computed_at_a_time_changes_no_more_than_rounding(folder, monkeypatch, block_bytes):
    model = load_model(folder)
    expected = logits(model)
    monkeypatch.setattr(sparse_mla, "BLOCK_BYTES", block_bytes)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_a_token_that_is_not_chosen_does_not_count(folder):
    """What the last token is over does not change where others' latents do; where one of its own does, it does."""
    model = load_model(folder)
    cache = KvCache(model.kv_layout(16), 6)
    ids = [5 + 3 * n % 140 for n in range(40)]

    def last():
        return model.all_logits([Chunk(0, ids[-1:], 39, [4, 0, 2], is_sampled=True)], cache)[0]

    model.all_logits([Chunk(0, ids[:-1], 0, [4, 0, 2], is_sampled=True)], cache)
    before = last()
    num_changed = 0
    for token in range(39):
        row = cache.layers[0][[4, 0, 2][token // 16], token % 16, :16]
        kept = row.clone()
        row += 1.0  # of the latent alone, not of the key by which it is chosen
        num_changed += not torch.equal(last(), before)
        row.copy_(kept)
    # Nine are chosen, the token itself may be one of them.
    assert num_changed in (8, 9)


def test_its_key_is_part_of_a_page(folder):
    model = load_model(folder)
    layout = model.kv_layout(16)
    assert layout == KvLayout(3, 16, CacheDtype.FLOAT32, LatentAttention(16, 8, 12))
    assert layout.page_shape == (16, 36)
    assert decode_layout(encode_layout(layout)) == layout
    dense = KvLayout(3, 16, CacheDtype.FLOAT32, LatentAttention(16, 8))
    assert "index_dim=12" in layout.difference(dense)


def test_what_it_can_not_be_computed_with_is_refused(folder):
    with pytest.raises(StartupError, match="no format for the keys of an indexer"):
        load_model(folder, kv_cache_dtype="fp8_e4m3")
    with pytest.raises(StartupError, match="--numerics exact: "):
        load_model(folder, numerics=Numerics.EXACT)


def test_no_step_is_recorded(folder):
    model = load_model(folder)
    cache = KvCache(model.kv_layout(16), 6)
    model.record_decode(cache, max_rows=4, max_context_tokens=64)
    model.prepare_decode(cache, max_rows=4, max_context_tokens=64)
    expected = logits(load_model(folder))[-1]
    ids = [5 + 3 * n % 140 for n in range(40)]
    model.forward([Chunk(0, ids[:-1], 0, [4, 0, 2], is_sampled=False)], cache)
    for _ in range(2):
        found = model.forward([Chunk(0, ids[-1:], 39, [4, 0, 2], is_sampled=True)], cache)
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)
