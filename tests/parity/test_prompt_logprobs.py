"""Log-probabilities of prompts against transformers': however they are cut, whatever is cached, alone and in groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from headrace_core.errors import HeadraceError
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.model import prompt_scores
from headrace_core.model.load import load_model
from headrace_core.request import SamplingParams
from headrace_core.testing.rank_processes import run_ranks
from headrace_decode.speculation import Speculation

from tests.parity.decoding import Decoding
from tests.parity.rank_cases import Case, scored_prompt, scores

TOLERANCE = 1e-4
PAGE = 4
DEMO = Path(__file__).parents[2] / "demo" / "model"


def scoring(num_top, **params):
    return SamplingParams(temperature=0.0, seed=1, max_tokens=3, prompt_logprobs=num_top, **params)


def check(parts, prompt, logits, num_top):
    """Check what was said of a prompt, in parts, against the logits at its every position."""
    assert [part.first for part in parts] == [1 + sum(len(p.logprobs) for p in parts[:i]) for i in range(len(parts))]
    found = [value for part in parts for value in part.logprobs]
    expected = logits[:-1].log_softmax(dim=-1)
    own = expected.gather(1, torch.tensor(prompt[1:])[:, None])
    torch.testing.assert_close(torch.tensor(found), own[:, 0], rtol=0, atol=TOLERANCE)
    tops = torch.tensor([value for part in parts for value in part.top_logprobs]).view(-1, num_top)
    torch.testing.assert_close(tops, expected.topk(num_top).values, rtol=0, atol=TOLERANCE)
    ids = torch.tensor([token for part in parts for token in part.top_ids]).view(-1, num_top)
    torch.testing.assert_close(expected.gather(1, ids), expected.topk(num_top).values, rtol=0, atol=TOLERANCE)
    for rank, row, value in zip((r for part in parts for r in part.ranks), expected, own[:, 0], strict=True):
        assert (row > value + TOLERANCE).sum() < rank <= (row >= value - TOLERANCE).sum()


@pytest.mark.parametrize("name", ["v3", "mixtral", "v32", "demo"])
@pytest.mark.parametrize("max_step_tokens", [1, 7, 512])
def test_they_are_those_of_transformers_cold_and_cached(name, max_step_tokens, checkpoint, oracle, random_tokens):
    """The second time all of the prompt is cached, and the answer's tokens are the same."""
    folder = DEMO if name == "demo" else checkpoint(name)
    prompt = random_tokens(33)
    decoding = Decoding(load_model(folder, dtype="float32"), max_sequences=4, page_size=PAGE)
    allocator = PageAllocator(64, PAGE)
    logits = oracle(folder).logits(prompt)
    tokens = []
    for _ in range(2):
        run = decoding.run([prompt], [scoring(3)], allocator=allocator, max_step_tokens=max_step_tokens)
        check(run.scored[0], prompt, logits, 3)
        tokens.append(run.outputs[0])
    plain = decoding.run([prompt], [SamplingParams(temperature=0.0, seed=1, max_tokens=3)])
    assert tokens == [plain.outputs[0]] * 2


def test_a_slice_of_rows_at_a_time_says_the_same(monkeypatch, checkpoint, oracle, random_tokens):
    prompt = random_tokens(33)
    monkeypatch.setattr(prompt_scores, "MOST_LOGITS", 160 * 5)
    decoding = Decoding(load_model(checkpoint("v3")), max_sequences=4, page_size=PAGE)
    run = decoding.run([prompt], [scoring(2)], max_step_tokens=20)
    check(run.scored[0], prompt, oracle(checkpoint("v3")).logits(prompt), 2)


def test_beside_others_pre_empted_and_with_drafts(checkpoint, oracle, random_tokens):
    """A pool too small for all: who gives way is computed again, and what was said of its prompt is not said twice."""
    model = load_model(checkpoint("v3"))
    prompts = [random_tokens(9 + 5 * key, seed=key) for key in range(4)]
    params = [scoring(2, ignore_eos=True) if key % 2 else SamplingParams(temperature=0, seed=1) for key in range(4)]
    params = [SamplingParams(**{**_fields(each), "max_tokens": 40, "ignore_eos": True}) for each in params]
    run = Decoding(model, max_sequences=4, page_size=PAGE).run(
        prompts, params, Speculation(num_tokens=3, max_rows=16), pool_tokens=120, max_step_tokens=6
    )
    assert run.num_preempted
    assert sorted(run.scored) == [1, 3]
    for key in (1, 3):
        check(run.scored[key], prompts[key], oracle(checkpoint("v3")).logits(prompts[key]), 2)


def _fields(params):
    return {name: getattr(params, name) for name in ("temperature", "seed", "prompt_logprobs")}


def test_what_is_not_finite_fails_the_sequence(checkpoint, random_tokens):
    model = load_model(checkpoint("v3"))
    decoding = Decoding(model, max_sequences=2, page_size=PAGE)
    prompt = random_tokens(9)

    def on_step(plan, result, cache):
        failures.extend(result.failures.values())

    failures: list[HeadraceError] = []
    with torch.inference_mode():
        model._weights.embedding[prompt[0]] = float("nan")
    run = decoding.run([prompt], [scoring(1)], on_step=on_step)
    assert [error.reason for error in failures] == ["BAD_LOGITS"]
    assert not run.scored


_GROUPS = [
    (2, [("v3", "tp2", "ep2"), ("mixtral", "dp2", "ep2"), ("v32", "tp2", "tp2")]),
    (4, [("v3", "tp2", "ep4"), ("v2", "dp2", "tp4")]),
]


@pytest.mark.parametrize(("num_ranks", "names"), _GROUPS)
def test_groups_and_lanes_say_the_same(num_ranks, names, checkpoint, oracle):
    cases = [Case(checkpoint(name), *more) for name, *more in names]
    first, *others = run_ranks(num_ranks, scores, cases)
    assert not any(said for rank in others for said in rank)
    for case, said in zip(cases, first, strict=True):
        assert sorted(said) == list(range(5))
        for key, parts in said.items():
            prompt = scored_prompt(key)
            assert sum(len(part.logprobs) for part in parts) == len(prompt) - 1
            check(parts, prompt, oracle(case.folder).logits(prompt), 4)
