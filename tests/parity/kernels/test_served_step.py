"""What the host does in a served decode step, on a pretended GPU: one wait, a few copies, none of them waited for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from headrace_core.batch.step import Chunk, ForwardPlan, SamplingMemo, SamplingRow, StepPlan
from headrace_core.engine.executor import Executor
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.load import load_model
from headrace_core.request import SamplingParams
from headrace_core.testing.pretend_gpu import pretend_gpu, recording
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint

from tests.parity.kernels.conftest import HAS_GPU

pytestmark = pytest.mark.skipif(HAS_GPU, reason="a GPU is there, and kernels are compiled for it")

CONFIG = {
    **TINY_CONFIGS["v2"],
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": None,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
PAGE_SIZE = 16
PROMPT_TOKENS = 3
CHANGES = {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "logit_bias": {5: 2.0}, "min_tokens": 9}
ROWS = [
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.0},
    {"temperature": 0.0, "top_logprobs": 3, **CHANGES},
    {"temperature": 0.8, "top_logprobs": 0, **CHANGES},
]
PLAIN, ALL = [0, 1], [0, 1, 2, 3]


class Sequences:
    """One sequence for each of `ROWS`, stepped as a worker's engine steps them."""

    def __init__(self, folder, device):
        self.model = load_model(folder, device=device)
        cache = KvCache(self.model.kv_layout(PAGE_SIZE), 2 * len(ROWS), device)
        if device == "cuda":
            self.model.prepare_decode(cache, max_rows=len(ROWS), max_context_tokens=2 * PAGE_SIZE)
        self._step = Executor(self.model, cache).step
        prompts = [[(3 * i + 5 * key) % 150 + 2 for i in range(PROMPT_TOKENS)] for key in ALL]
        self.rows = [
            SamplingRow(SamplingParams(seed=key, **ROWS[key]), prompts[key], [], 0, 0, (1,), SamplingMemo())
            for key in ALL
        ]

    def step(self, keys):
        """Run the next step of the sequences `keys`; return its result."""
        chunks, rows = [], {}
        for key in keys:
            row = self.rows[key]
            position = PROMPT_TOKENS + len(row.output_token_ids)
            token_ids = row.output_token_ids[-1:] or row.prompt_token_ids
            pages = [2 * key, 2 * key + 1]
            chunks.append(Chunk(key, token_ids, position - len(token_ids), pages, True, f"r{key}"))
            rows[key] = replace(row, position=position)
        result = self._step(StepPlan(ForwardPlan(chunks), rows))
        for key, (token,) in result.tokens.items():
            self.rows[key].output_token_ids.append(token.token_id)
        return result

    def damage(self, key):
        """Make the token that sequence `key` computes next no number."""
        with torch.inference_mode():
            self.model._weights.embedding[self.rows[key].output_token_ids[-1]] = torch.nan


def serve(folder, device, journals):
    """Return the results of some steps; keep what host and device did in the last two, of all and of the plain rows.

    In the first of these one row fails.
    """
    sequences = Sequences(folder, device)
    results = [sequences.step(ALL), sequences.step(ALL)]
    sequences.damage(2)
    for keys in (ALL, PLAIN):
        with recording() as journal:
            results.append(sequences.step(keys))
        journals.append(journal)
    return results


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """What came of the steps on the pretended GPU and on a CPU, and the former's journals."""
    folder = tmp_path_factory.mktemp("served")
    write_checkpoint(folder, CONFIG)
    journals = []
    with pretend_gpu():
        found = serve(folder, "cuda", journals)
    return found, serve(folder, "cpu", []), journals


def test_a_decode_step_waits_once_for_one_copy_of_its_tokens(served):
    for journal in served[2]:
        assert journal.launches.count("graph") == 1
        assert [wait.what for wait in journal.waits] == ["an event's synchronize"], journal.waits
        assert all(copy.is_pinned and not copy.is_waited_for for copy in journal.copies), journal.copies


def test_a_decode_step_copies_a_handful_of_times(served):
    of_all, of_plain = (
        [[copy.num_bytes for copy in journal.copies if copy.to == to] for to in ("device", "host")]
        for journal in served[2]
    )
    columns, counts = 7 * 8, 8 * CONFIG["n_routed_experts"]
    # A row's inputs are 28 bytes and its page ids; there is room for four, which are two pages long at most.
    assert of_plain == [[4 * 28 + 2 * 4, 2 * columns], [counts, 2 * 8]]
    # And which two rows ask for log-probabilities, and their own and three tokens' for each.
    assert of_all == [[4 * 28 + 4 * 4, 4 * columns, 2 * 8], [counts, 4 * 8 + 2 * (3 * 8 + 4 * 4)]]


def test_a_served_step_has_the_tokens_failures_and_counts_of_a_cpu(served):
    found, expected, _ = served
    for there, here in zip(found, expected, strict=True):
        assert {key: str(error) for key, error in there.failures.items()} == {
            key: str(error) for key, error in here.failures.items()
        }
        # Which experts a row that is no number chooses means nothing.
        assert there.failures or there.expert_counts == here.expert_counts
        assert list(there.tokens) == list(here.tokens)
        for (token,), (other,) in zip(there.tokens.values(), here.tokens.values(), strict=True):
            assert token.token_id == other.token_id
            assert (token.logprobs is None) == (other.logprobs is None)
            if token.logprobs is not None:
                assert token.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-4)
                assert [best for best, _ in token.logprobs.top] == [best for best, _ in other.logprobs.top]
    assert [list(result.failures) for result in found] == [[], [], [2], []]
    assert [list(result.tokens) for result in found] == [ALL, ALL, [0, 1, 3], PLAIN]
