"""A sample's text ends where a stop string says so: not among the first `min_tokens`, and also by special tokens."""

from __future__ import annotations

import pytest
from headrace_core.testing.fake_script import scripted
from headrace_core.testing.fake_worker import FakeWorker
from headrace_router.testing import EOS, VOCAB_SIZE, byte_ids, run_router, scripted_worker, text_request
from headrace_router.text.assembler import Assembler

from tests.unit.test_router_flow import STOP


class Letters:
    """A detokenizer: a token is a character's number, 0 has no text, and some text may be certain only at the end."""

    def __init__(self, late: str = "") -> None:
        self._late = late

    def push(self, token_id: int) -> str:
        return chr(token_id) if token_id else ""

    def finish(self) -> str:
        return self._late


def shown(tokens: str, assembler: Assembler) -> str:
    text = ""
    for char in tokens:
        text += assembler.push(ord(char) if char != "0" else 0)
        if assembler.matched:
            break
    return text + assembler.finish()


@pytest.mark.parametrize(
    ("min_tokens", "text", "matched"),
    [(0, "x", "ab"), (1, "x", "ab"), (2, "xab", "ab"), (3, "xab", "ab"), (4, "xabab", ""), (9, "xabab", "")],
)
def test_a_stop_string_that_begins_in_the_first_tokens_is_text(min_tokens, text, matched):
    letters: object = Letters()
    assembler = Assembler(letters, ["ab"], min_tokens=min_tokens)  # type: ignore[arg-type]
    assert (shown("xabab", assembler), assembler.matched) == (text, matched)


def test_what_is_certain_only_at_the_end_may_complete_a_stop_string():
    letters: object = Letters(late="b!")
    assembler = Assembler(letters, ["ab"])  # type: ignore[arg-type]
    assert (shown("xa", assembler), assembler.matched) == ("x", "ab")
    assembler = Assembler(letters, ["ab"], min_tokens=3)  # type: ignore[arg-type]
    assert (shown("xa", assembler), assembler.matched) == ("xab!", "")


def test_a_special_token_ends_the_text_and_what_was_held_back_is_shown():
    letters: object = Letters()
    assembler = Assembler(letters, ["ab", "<end>"], special_stops={0: "<end>"})  # type: ignore[arg-type]
    assert (shown("xa0b", assembler), assembler.matched) == ("xa", "<end>")
    assembler = Assembler(letters, ["<end>"], special_stops={0: "<end>"}, min_tokens=2)  # type: ignore[arg-type]
    assert (shown("x0b0c", assembler), assembler.matched) == ("xb", "<end>")


def workers(text: str) -> list[FakeWorker]:
    tokens = scripted([*byte_ids(text), EOS])
    return [FakeWorker(role, next_token=tokens, vocab_size=VOCAB_SIZE) for role in ("prefill", "decode")]


def test_the_text_of_a_special_token_stands_for_the_token(tmp_path):
    async def test(router):
        (sample,) = await router.generate(text_request("hi", sampling={"stop_strings": ["<eos>"], "ignore_eos": True}))
        assert sample.text == "abc"
        assert (sample.last.finish_reason, sample.last.matched_stop_string) == (STOP, "<eos>")

    run_router(tmp_path, workers("abc"), test)


def test_a_special_token_within_a_stop_string_is_refused_by_name(tmp_path):
    async def test(router):
        problem = await router.refused(text_request("hi", sampling={"stop_strings": ["so\n<eos>"]}))
        assert problem.reason == "BAD_SAMPLING"
        assert "stop_strings: 'so\\n<eos>' has the special token '<eos>' in it" in str(problem)

    run_router(tmp_path, workers("abc"), test)


def test_min_tokens_holds_off_stop_strings_too(tmp_path):
    async def test(router):
        (sample,) = await router.generate(text_request("hi", sampling={"stop_strings": ["l"], "min_tokens": 3}))
        assert (sample.text, sample.last.matched_stop_string) == ("Hel", "l")
        assert sample.token_ids == byte_ids("Hell")

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test)
