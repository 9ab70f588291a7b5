"""The module's rows in the cache: every token has its own, and what is wrong in them costs guesses alone."""

from __future__ import annotations

import pytest
import torch
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.load import load_model
from headrace_core.model.numerics import Numerics
from headrace_core.request import SamplingParams
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_decode.speculation import NO_DRAFTS, Speculation
from headrace_kernels import backend

from tests.parity.decoding import Decoding
from tests.parity.test_drafts import FOLDER, prompts

PAGE = 16
MTP = Speculation(2, 12, "mtp")
has_exact = pytest.mark.skipif(
    backend(torch.empty(0)) != "cpu", reason="bits do not depend on the step with compiled CPU kernels: make setup"
)


def greedy(num_tokens, **params):
    return SamplingParams(temperature=0.0, seed=0, max_tokens=num_tokens, ignore_eos=True, **params)


def own_rows(model, token_ids):
    """Return the module's rows of all tokens but the last, [tokens, width], computed at once."""
    sequences = PagedSequences(model, page_size=PAGE, num_pages=len(token_ids) // PAGE + 1)
    chunk = sequences.chunk(0, token_ids[:-1])
    model.all_mtp_logits([chunk], {0: token_ids[-1:]}, sequences.cache)
    return rows(sequences.cache, chunk.page_ids)[: len(token_ids) - 1]


def rows(cache, page_ids):
    return cache.layers[-1][torch.tensor(page_ids)].flatten(0, 1).clone()


class Seen:
    """The module's rows of each sequence when it ran for it last, as many as there are then."""

    def __init__(self):
        self.rows = {}

    def __call__(self, plan, result, cache):
        for chunk in plan.chunks if plan.forward.runs_mtp else ():
            given = [token.token_id for token in result.tokens.get(chunk.key, [])]
            self.rows[chunk.key] = rows(cache, chunk.page_ids)[: chunk.start + len(chunk.behind(given))]


@has_exact
def test_every_token_has_the_row_that_it_has_when_all_is_computed_at_once():
    """To the bit: prompts in chunks, drafts right and wrong, sequences pre-empted and computed again."""
    texts = [prompt[: 20 + 5 * i] for i, prompt in enumerate(prompts()[1:16:2])]
    model, seen = load_model(FOLDER, numerics=Numerics.EXACT, has_mtp=True), Seen()
    decoding = Decoding(model, max_sequences=4, page_size=PAGE)
    run = decoding.run(texts, [greedy(30)] * len(texts), MTP, pool_tokens=256, on_step=seen, max_step_tokens=24)
    assert run.num_preempted > 0
    assert 0 < run.num_right < run.num_drafted
    for key, text in enumerate(texts):
        expected = own_rows(model, text + run.outputs[key])
        # At a sequence's end there is nothing to guess.
        count = len(seen.rows[key])
        assert count >= len(expected) - MTP.num_tokens
        assert torch.equal(seen.rows[key], expected[:count]), f"sequence {key}"


@has_exact
def test_a_shared_pages_last_row_alone_is_of_another_sequences_token():
    start = prompts()[1][: 2 * PAGE]
    texts = [start + tail for tail in ([40, 41, 42], [50, 51])]
    model = load_model(FOLDER, numerics=Numerics.EXACT, has_mtp=True)
    decoding, allocator = Decoding(model, max_sequences=1, page_size=PAGE), PageAllocator(64, PAGE)
    found = []
    for text in texts:
        seen = Seen()
        decoding.run([text], [greedy(4)], MTP, on_step=seen, allocator=allocator)
        found.append(seen.rows[0])
    expected = [own_rows(model, text)[: len(text) - 1] for text in texts]
    assert torch.equal(found[0][: len(expected[0])], expected[0])
    differs = (found[1][: len(expected[1])] != expected[1]).any(dim=1).nonzero().flatten().tolist()
    # The row at the page's end, and, as it is attended to, not those behind it: a row is made of its own token alone.
    assert differs == [2 * PAGE - 1]


@pytest.mark.parametrize("garbage", ["nan", "noise"])
@pytest.mark.parametrize("when", ["before every step", "when prompts are computed"])
def test_wrong_rows_cost_guesses_and_no_token(when, garbage):
    """Poisons the layer under a worker's feet: for good, or that of prompts, as if they had come without it."""
    texts, params = prompts()[1:21:2], [greedy(40)] * 5 + [SamplingParams(temperature=0.8, seed=7, max_tokens=40)] * 5

    def poison(plan, result, cache: KvCache):
        if when == "before every step" or any(len(c.token_ids) - c.num_draft > 1 for c in plan.chunks):
            cache.layers[-1].fill_(torch.nan) if garbage == "nan" else cache.layers[-1].normal_(std=30)

    model = load_model(FOLDER, dtype="float32", has_mtp=True)
    decoding = Decoding(model, max_sequences=1, page_size=PAGE)
    plain = decoding.run(texts, params, NO_DRAFTS)
    sound = decoding.run(texts, params, Speculation(1, 12, "mtp"))
    poisoned = decoding.run(texts, params, Speculation(1, 12, "mtp"), on_step=poison)
    assert poisoned.outputs == sound.outputs == plain.outputs
    assert poisoned.num_right < 0.8 * sound.num_right
