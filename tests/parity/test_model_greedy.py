"""64 greedy tokens against transformers' own cached generation."""

from __future__ import annotations

import pytest
from headrace_core.model.load import load_model
from headrace_core.testing.paged_sequences import generate_greedy
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS

NUM_TOKENS = 64


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_greedy_tokens_equal_transformers(name, checkpoint, oracle, random_tokens):
    prompts = [random_tokens(count, seed=count) for count in (3, 21)]
    expected = [oracle(checkpoint(name)).greedy(prompt, NUM_TOKENS) for prompt in prompts]
    model = load_model(checkpoint(name))
    assert generate_greedy(model, prompts, NUM_TOKENS, page_size=16, max_chunk=8) == expected


@pytest.mark.parametrize("name", ["v3-yarn", "v32", "v2-lite", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize("batch", range(1, 9))
def test_batches_of_mixed_lengths_give_the_tokens_of_each_alone(name, batch, checkpoint, oracle, random_tokens):
    """By induction: each token is the oracle's best after the tokens before it."""
    prompts = [random_tokens(1 + 7 * i, seed=i) for i in range(batch)]
    model = load_model(checkpoint(name))
    outputs = generate_greedy(model, prompts, NUM_TOKENS, page_size=4, max_chunk=6)
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = oracle(checkpoint(name)).logits(prompt + output[:-1])
        assert logits[len(prompt) - 1 :].argmax(dim=-1).tolist() == output
