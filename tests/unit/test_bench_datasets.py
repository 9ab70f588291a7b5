"""What `headrace bench` asks: lengths, and which tokens prompts share."""

import json

import pytest
from headrace_client.bench.asked import Dataset, levels_of, warm_up_of
from headrace_client.bench.datasets import PRESETS
from headrace_client.bench.prompts import FIRST_TOKEN, Part
from headrace_core.errors import InvalidRequestError

VOCAB = 300


def prompts(dataset):
    return [[token for turn in session.turns for token in turn.tokens(VOCAB)] for session in dataset.sessions()]


def common(first, second):
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("conversation", (100, 256, 256)),
        ("conversation-large-batch", (4096, 256, 256)),
        ("reasoning", (100, 256, 4096)),
        ("summarization", (100, 4096, 256)),
    ],
)
def test_presets_have_the_field_s_sizes(name, lengths):
    preset = PRESETS[name]
    assert (preset.num_requests, preset.num_input, preset.num_output) == lengths
    sessions = Dataset(name).sessions()
    assert len(sessions) == lengths[0]
    assert {(turn.num_new_tokens, turn.num_output) for each in sessions for turn in each.turns} == {lengths[1:]}


def test_prompts_are_the_same_each_time_and_share_nothing():
    first, again = (prompts(Dataset("random", num_requests=20, num_input=64)) for _ in range(2))
    assert first == again
    assert all(len(prompt) == 64 for prompt in first)
    assert all(FIRST_TOKEN <= token < VOCAB for prompt in first for token in prompt)
    assert max(common(a, b) for a in first for b in first if a is not b) < 4
    assert prompts(Dataset("random", num_requests=20, num_input=64, seed=1)) != first


def test_lengths_spread_evenly_around_their_mean():
    sessions = Dataset("random", num_requests=500, num_input=100, num_output=10, spread=0.5).sessions()
    lengths = [session.turns[0].num_new_tokens for session in sessions]
    assert (min(lengths), max(lengths)) == (50, 150)
    assert 95 < sum(lengths) / len(lengths) < 105


def test_a_shorter_part_of_a_key_is_a_prefix_of_a_longer_one():
    assert Part((2, 7), 512).tokens(VOCAB)[:100] == Part((2, 7), 100).tokens(VOCAB)


def test_shared_prefixes_take_turns():
    dataset = Dataset("shared-prefix", num_requests=6, num_input=10, num_prefixes=2, num_prefix_tokens=40)
    made = prompts(dataset)
    assert {len(prompt) for prompt in made} == {50}
    assert [common(made[0], prompt) >= 40 for prompt in made] == [True, False] * 3


def test_conversations_have_their_requests_in_turns():
    sessions = Dataset("multi-turn", num_requests=10, num_turns=4).sessions()
    assert [len(session.turns) for session in sessions] == [4, 4, 2]


def test_a_trace_keeps_what_its_prompts_share_when_it_is_scaled(tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 1536, "output_length": 32, "hash_ids": [0, 1, 2]},
        {"timestamp": 4000, "input_length": 1100, "output_length": 8, "hash_ids": [0, 1, 9]},
        {"timestamp": 6000, "input_length": 600, "output_length": 1, "hash_ids": [5, 6]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = Dataset("", trace=path, length_scale=16, time_scale=2)
    made = prompts(dataset)
    assert [len(prompt) for prompt in made] == [96, 69, 38]
    assert 64 <= common(made[0], made[1]) <= 66  # two blocks of 512 / 16
    assert common(made[0], made[2]) < 4
    assert [session.arrival_s for session in dataset.sessions()] == [0, 2, 3]
    assert [session.turns[0].num_output for session in dataset.sessions()] == [2, 1, 1]
    assert len(Dataset("", trace=path, num_requests=2).sessions()) == 2


def test_every_dataset_is_made_shorter_by_the_same_scale():
    (session, *_), of_prefixes = (Dataset(name, length_scale=16).sessions() for name in ("reasoning", "shared-prefix"))
    assert (session.turns[0].num_new_tokens, session.turns[0].num_output) == (16, 256)
    assert [part.num_tokens for part in of_prefixes[0].turns[0].parts] == [32, 64]
    assert Dataset("random", num_output=4, length_scale=16).sessions()[0].turns[0].num_output == 1


def test_warming_up_shares_nothing_with_what_is_measured():
    sessions = Dataset("random", num_requests=4, num_input=50).sessions()
    warm = warm_up_of(sessions, 3)
    assert [session.turns[0].num_new_tokens for session in warm] == [50] * 3
    measured = [session.turns[0].tokens(VOCAB) for session in sessions]
    assert max(common(each.turns[0].tokens(VOCAB), prompt) for each in warm for prompt in measured) < 4


def test_levels_are_a_run_each():
    levels = levels_of(None, "1,8,32", burstiness=1.0, seed=0)
    assert [(level.rate, level.concurrency) for level in levels] == [(None, 1), (None, 8), (None, 32)]
    levels = levels_of("2,inf", "4", burstiness=1.0, seed=0)
    assert [(level.rate, level.concurrency) for level in levels] == [(2.0, 4), (float("inf"), 4)]


@pytest.mark.parametrize(
    ("rates", "clients", "says"),
    [
        ("0", None, "'0'"),
        ("x", None, "'x'"),
        (None, "1.5", "whole"),
        ("1,2", "3,4", "ramp one"),
        ("nan", None, "'nan'"),
    ],
)
def test_levels_that_make_no_sense_are_refused_by_name(rates, clients, says):
    with pytest.raises(InvalidRequestError, match=says):
        levels_of(rates, clients, burstiness=1.0, seed=0)


def test_a_dataset_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(InvalidRequestError, match=r"sharegpt.*conversation"):
        Dataset("sharegpt").sessions()
