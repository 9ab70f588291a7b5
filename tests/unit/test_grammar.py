"""Answers held to a grammar: by the sampler, from any state, and refused by name where they can't be."""

import contextlib
import json
import re

import pytest
import torch
from headrace.v1 import types_pb2
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import Chunk, SamplingMemo, SamplingRow
from headrace_core.errors import InvalidRequestError
from headrace_core.grammar import Grammars, check_grammar
from headrace_core.model.drafts import sample_chunks
from headrace_core.model.sampler import sample
from headrace_core.request import MAX_GRAMMAR_BYTES, Grammar, GrammarKind, SamplingParams
from headrace_core.wire import decode_sampling, encode_sampling
from headrace_router.testing import EOS, VOCAB_SIZE, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
JSON = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
NUMBER = Grammar(GrammarKind.REGEX, "[0-9]{3}")
WORDS = Grammar(GrammarKind.LARK, 'start: "yes" | "no"')


@pytest.fixture(scope="module")
def grammars(tmp_path_factory):
    return Grammars(write_tokenizer(tmp_path_factory.mktemp("model")), VOCAB_SIZE, [EOS])


def row(grammar, output=(), memo=None, **params):
    filled = SamplingParams(**{"seed": 3, "grammar": grammar, **params})
    return SamplingRow(filled, [1], list(output), 0, 1 + len(output), (EOS,), memo or SamplingMemo())


def logits(seed, scale=3.0):
    return torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * scale


def generated(grammars, grammar, seed, is_rebuilt=False, **params):
    """Return the tokens of an answer to its end; rebuilt: with a fresh state for every token, as at another worker."""
    output, memo = [], SamplingMemo()
    while not output or output[-1] != EOS:
        asked = row(grammar, output, SamplingMemo() if is_rebuilt else memo, seed=seed, **params)
        (token,) = sample(logits(seed * 1000 + len(output)), [asked], grammars)
        output.append(token.token_id)
        assert len(output) < 400
    return output


def drafted(grammars, grammar, seed, answer, **params):
    """Return the tokens of an answer by steps with drafts of three tokens of `answer`, every fourth of them wrong."""
    output, memo = [], SamplingMemo()
    while not output or output[-1] != EOS:
        coming = [token for token in answer[len(output) :][:3] if token != EOS]
        draft = [token + 1 if (len(output) + i) % 4 == 3 else token for i, token in enumerate(coming)]
        chunk = Chunk(1, [0, *draft], 5, [0], True, num_draft=len(draft))
        rows = torch.cat([logits(seed * 1000 + len(output) + i) for i in range(len(draft) + 1)])
        (tokens,) = sample_chunks(rows, [chunk], [row(grammar, output, memo, seed=seed, **params)], grammars)
        output += [token.token_id for token in tokens]
        assert len(output) < 400
    return output


@pytest.mark.parametrize("params", [{}, {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "min_tokens": 4}])
def test_drafts_change_no_token_of_what_depends_on_those_before(grammars, params):
    for seed in range(1, 6):
        answer = generated(grammars, JSON, seed, **params)
        assert drafted(grammars, JSON, seed, answer, **params) == answer


def holds(text):
    value = json.loads(text)
    assert set(value) == {"name", "age", "tags"}
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 6
    assert 0 <= value["age"] <= 120
    assert len(value["tags"]) <= 3
    assert all(tag in ("a", "bc", None) for tag in value["tags"])


@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 20), temperature=st.sampled_from([0.0, 0.7, 2.0]))
def test_every_answer_holds_and_a_state_rebuilt_from_its_tokens_is_the_one_that_went_on(grammars, seed, temperature):
    output = generated(grammars, JSON, seed, temperature=temperature)
    holds(bytes(output[:-1]))
    assert output == generated(grammars, JSON, seed, is_rebuilt=True, temperature=temperature)


@pytest.mark.parametrize(("grammar", "form"), [(NUMBER, r"\d{3}"), (WORDS, "yes|no")])
def test_other_kinds_of_grammar_hold(grammars, grammar, form):
    for seed in range(20):
        assert re.fullmatch(form, bytes(generated(grammars, grammar, seed)[:-1]).decode())


def test_a_row_with_a_grammar_changes_no_other(grammars):
    both = logits(5).expand(3, -1)
    plain = row(None)
    alone = sample(both[:1], [plain], grammars)
    among = sample(both, [plain, row(NUMBER), plain], grammars)
    assert [among[0], among[2]] == [alone[0], alone[0]]
    assert ord("0") <= among[1].token_id <= ord("9")


def test_a_grammar_goes_with_bias_and_penalties(grammars):
    bias = {ord("7"): 100.0, ord("x"): 100.0}
    output = generated(grammars, NUMBER, 1, logit_bias=bias)
    assert bytes(output[:-1]) == b"777"
    assert len(set(generated(grammars, NUMBER, 1, temperature=0.0, presence_penalty=2.0))) >= 3


def test_an_output_that_does_not_fit_is_that_rows_error_alone(grammars):
    bad, good = row(NUMBER, b"1x"), row(NUMBER)
    error, token = sample(logits(1).expand(2, -1), [bad, good], grammars)
    assert isinstance(error, InvalidRequestError)
    assert error.reason == "BAD_GRAMMAR"
    assert ord("0") <= token.token_id <= ord("9")


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar(GrammarKind.JSON_SCHEMA, "{"), "JSON|expected|EOF"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "wizard"}'), "wizard"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"not": {"type": "string"}}'), "not"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "string", "pattern": "(a"}'), "unclosed"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "http://127.0.0.1:1/x"}'), "ref|resol|127"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"a":' * 5000), "recursion|limit|EOF"),
        (Grammar(GrammarKind.REGEX, "(a"), "unclosed"),
        (Grammar(GrammarKind.LARK, "start: nothing"), "nothing"),
    ],
)
def test_a_grammar_that_can_not_be_read_is_refused_by_name(grammars, grammar, words):
    for check in (check_grammar, grammars.state):
        with pytest.raises(InvalidRequestError, match=f"(?i){words}") as raised:
            check(grammar)
        assert raised.value.reason == "BAD_GRAMMAR"
        assert len(str(raised.value)) < 400


def test_a_grammar_that_grows_without_end_is_bounded(grammars):
    doubled = "a" * 10
    rules = [f"r{i}: r{i + 1} r{i + 1} | r{i + 1} r{i + 1} r{i + 1}" for i in range(60)]
    for grammar in (
        Grammar(GrammarKind.REGEX, "((((a{1000}){1000}){1000}){1000}){1000}"),
        Grammar(GrammarKind.LARK, "\n".join(["start: r0", *rules, f'r60: "{doubled}"'])),
    ):
        with contextlib.suppress(InvalidRequestError):
            check_grammar(grammar)
            grammars.state(grammar).mask([])


def test_the_wire_carries_a_grammar_and_refuses_what_it_does_not_know():
    for grammar in (JSON, NUMBER, WORDS):
        params = SamplingParams(seed=1, grammar=grammar)
        assert decode_sampling(encode_sampling(params)) == params
    for message, reason in (
        (types_pb2.SamplingParams(grammar=types_pb2.Grammar()), "BAD_GRAMMAR"),
        (types_pb2.SamplingParams(grammar=types_pb2.Grammar(regex="a" * (MAX_GRAMMAR_BYTES + 1))), "BAD_GRAMMAR"),
        (types_pb2.SamplingParams(grammar=types_pb2.Grammar(regex="a"), ignore_eos=True), "BAD_SAMPLING"),
        (types_pb2.SamplingParams(grammar=types_pb2.Grammar(regex="a"), min_tokens=2), "BAD_SAMPLING"),
    ):
        with pytest.raises(InvalidRequestError) as raised:
            decode_sampling(message)
        assert raised.value.reason == reason


def test_without_the_library_or_a_tokenizer_a_worker_says_so_and_refuses(tmp_path, monkeypatch):
    assert "tokenizer.json is missing" in Grammars(tmp_path, VOCAB_SIZE, [EOS]).problem
    assert "no token that ends" in Grammars(write_tokenizer(tmp_path), VOCAB_SIZE, []).problem
    (tmp_path / "tokenizer.json").write_text("{")
    assert "can't be read" in Grammars(tmp_path, VOCAB_SIZE, [EOS]).problem
    write_tokenizer(tmp_path)

    def without(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("headrace_core.grammar.importlib.import_module", without)
    found = Grammars(tmp_path, VOCAB_SIZE, [EOS])
    assert "llguidance is missing" in found.problem
    spec = SequenceSpec("a", 1, 0, [1, 2], 2, SamplingParams(seed=1, max_tokens=4, grammar=NUMBER))
    with pytest.raises(InvalidRequestError, match="pip install llguidance") as raised:
        spec.check(ModelLimits(VOCAB_SIZE, 100, (EOS,), found.problem))
    assert raised.value.reason == "BAD_GRAMMAR"
