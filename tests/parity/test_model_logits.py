"""Our logits against transformers', at every position, however the tokens are cut into chunks, pages and batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from headrace_core.model.load import load_model
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, Variation

TOLERANCE = 1e-4
DEEPSEEK = ["v3", "v3-no-q-lora", "v3-yarn-mscale", "v2-groups"]


def chunked_logits(model, token_ids, cuts, *, page_size=4):
    """Logits of one sequence computed in chunks that end at `cuts`."""
    sequences = PagedSequences(model, page_size=page_size, num_pages=len(token_ids))
    borders = [0, *cuts, len(token_ids)]
    pieces = [
        model.all_logits([sequences.chunk(0, token_ids[a:b])], sequences.cache)[0]
        for a, b in itertools.pairwise(borders)
    ]
    return torch.cat(pieces)


@pytest.mark.parametrize("name", TINY_CONFIGS)
@pytest.mark.parametrize("cuts", [[], [7, 20, 21, 22, 40, 41]], ids=["whole", "chunked"])
def test_logits_equal_transformers_at_every_position(name, cuts, checkpoint, oracle, random_tokens):
    model = load_model(checkpoint(name))
    token_ids = random_tokens(50)
    expected = oracle(checkpoint(name)).logits(token_ids)
    logits = chunked_logits(model, token_ids, cuts)
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_page_size_does_not_matter(page_size, checkpoint, oracle, random_tokens):
    model = load_model(checkpoint("v3"))
    token_ids = random_tokens(40, seed=1)
    expected = oracle(checkpoint("v3")).logits(token_ids)
    logits = chunked_logits(model, token_ids, [13, 14, 30], page_size=page_size)
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", DEEPSEEK)
def test_absorbed_equals_naive(name, checkpoint, random_tokens):
    model = load_model(checkpoint(name))
    token_ids = random_tokens(33, seed=2)
    model.max_decode_chunk = 0
    naive = chunked_logits(model, token_ids, [1, 9, 10])
    model.max_decode_chunk = len(token_ids)
    absorbed = chunked_logits(model, token_ids, [1, 9, 10])
    torch.testing.assert_close(absorbed, naive, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["v3", "v2-lite", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize("batch", range(1, 9))
def test_mixed_batches_equal_each_sequence_alone(name, batch, checkpoint, oracle, random_tokens):
    """Prompts, continued prompts and single tokens share steps; lengths differ; pages are scattered among NaN."""
    model = load_model(checkpoint(name))
    sequences = PagedSequences(model, page_size=4, num_pages=128)
    texts = [random_tokens(5 + 9 * i % 37, seed=i) for i in range(batch)]
    found = [[] for _ in texts]
    for step in range(3):
        chunks = []
        for key, text in enumerate(texts):
            done, half = sequences.num_computed(key), len(text) // 2
            # Every third sequence goes token by token at the end, the others in halves of changing place.
            end = [half, len(text) - 1, len(text)][(step + (key % 2 if step < 2 else 0)) % 3]
            if end > done:
                chunks.append(sequences.chunk(key, text[done:end]))
        for chunk, logits in zip(chunks, model.all_logits(chunks, sequences.cache), strict=True):
            found[chunk.key].append(logits)
    for text, pieces in zip(texts, found, strict=True):
        expected = oracle(checkpoint(name)).logits(text)
        torch.testing.assert_close(torch.cat(pieces), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["v3", "mixtral", "qwen3-moe"])
def test_a_cached_prefix_continues_like_the_whole_prompt(name, checkpoint, oracle, random_tokens):
    model = load_model(checkpoint(name))
    sequences = PagedSequences(model, page_size=4, num_pages=64)
    first, second = random_tokens(30, seed=3), random_tokens(9, seed=4)
    model.forward([sequences.chunk(0, first, is_sampled=False)], sequences.cache)
    sequences.share_pages(0, 1, 20)
    logits = model.forward([sequences.chunk(1, second)], sequences.cache)
    expected = oracle(checkpoint(name)).logits(first[:20] + second)[-1]
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=TOLERANCE)


def test_forward_gives_the_last_logits_of_chunks_that_sample(checkpoint, oracle, random_tokens):
    model = load_model(checkpoint("v3"))
    sequences = PagedSequences(model, page_size=4, num_pages=64)
    texts = [random_tokens(count, seed=count) for count in (6, 11, 3)]
    chunks = [sequences.chunk(key, text, is_sampled=key != 1) for key, text in enumerate(texts)]
    logits = model.forward(chunks, sequences.cache)
    expected = torch.stack([oracle(checkpoint("v3")).logits(texts[i])[-1] for i in (0, 2)])
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    nothing = model.forward([sequences.chunk(9, [5, 6], is_sampled=False)], sequences.cache)
    assert nothing.shape == (0, 160)


@pytest.mark.parametrize("num_shards", [2, 5])
def test_shards_are_read_as_one_checkpoint(num_shards, checkpoint, oracle, random_tokens):
    directory = checkpoint("v2-groups", Variation(num_shards=num_shards))
    model = load_model(directory)
    assert model.fingerprint == load_model(checkpoint("v2-groups")).fingerprint
    token_ids = random_tokens(20)
    expected = oracle(directory).logits(token_ids)
    torch.testing.assert_close(chunked_logits(model, token_ids, []), expected, rtol=0, atol=TOLERANCE)


def test_mtp_layers_are_left_out(checkpoint, oracle, random_tokens):
    directory = checkpoint("v3", Variation(num_mtp_layers=1))
    token_ids = random_tokens(20)
    expected = oracle(checkpoint("v3")).logits(token_ids)
    torch.testing.assert_close(chunked_logits(load_model(directory), token_ids, []), expected, rtol=0, atol=TOLERANCE)
