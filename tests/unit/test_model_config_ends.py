"""Which tokens end a sequence: config.json's, or those that generation_config.json names in their place."""

from __future__ import annotations

import json

import pytest
from headrace_core.errors import CheckpointError
from headrace_core.families.config_json import parse_config
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_config


@pytest.mark.parametrize(("eos", "expected"), [(1, (1,)), ([1, 5], (1, 5)), (None, ())])
def test_end_of_sequence_is_one_token_several_or_none(read_config, eos, expected):
    assert read_config(TINY_CONFIGS["v3"], eos_token_id=eos).eos_token_ids == expected


@pytest.fixture
def read_with(tmp_path):
    """Read config.json with `eos_token_id` 7, and generation_config.json of the text or the values given."""

    def read_with(generation):
        write_config(tmp_path, {**TINY_CONFIGS["v3"], "eos_token_id": 7})
        text = generation if isinstance(generation, bytes) else json.dumps(generation).encode()
        (tmp_path / "generation_config.json").write_bytes(text)
        return parse_config(tmp_path)

    return read_with


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": 18}, (18,)),
        ({"eos_token_id": [1, 18]}, (1, 18)),
        ({"eos_token_id": [18, 1, 18]}, (18, 1)),
        ({"eos_token_id": []}, ()),
        ({"eos_token_id": None}, (7,)),
        ({"temperature": 0.6}, (7,)),
        ({}, (7,)),
    ],
)
def test_the_ends_that_generation_config_names_replace_those_of_config(read_with, generation, expected):
    assert read_with(generation).eos_token_ids == expected


@pytest.mark.parametrize("eos", [160, -1, [1, 160], True, [True], 1.0, "1", {"id": 1}, [[1]]])
def test_an_end_that_is_no_token_is_refused_by_file_and_field(read_config, read_with, tmp_path, eos):
    for read_it, file in ((lambda: read_with({"eos_token_id": eos}), "generation_config"), (
        lambda: read_config({**TINY_CONFIGS["v3"], "eos_token_id": eos}), "config",
    )):  # fmt: skip
        with pytest.raises(CheckpointError, match=rf"^{file}\.json: eos_token_id is ") as caught:
            read_it()
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        assert caught.value.reason == "BAD_CONFIG"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"", b'"eos"', b"[" * 100_000])
def test_a_generation_config_that_is_no_json_object_is_refused(read_with, content):
    with pytest.raises(CheckpointError, match=r"generation_config\.json") as caught:
        read_with(content)
    assert caught.value.reason == "BAD_CONFIG"


def test_a_link_to_a_generation_config_that_is_gone_is_refused(tmp_path):
    write_config(tmp_path, TINY_CONFIGS["v3"])
    (tmp_path / "generation_config.json").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        parse_config(tmp_path)


def test_the_ends_of_config_are_not_judged_where_others_replace_them(tmp_path):
    write_config(tmp_path, {**TINY_CONFIGS["v3"], "eos_token_id": -1})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 18}')
    assert parse_config(tmp_path).eos_token_ids == (18,)
