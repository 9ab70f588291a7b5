"""Incremental decoding equals decoding all at once, whatever the tokens, and never shows half a character."""

import json

import pytest
from headrace_router.text.detokenizer import Detokenizer, Vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def _byte_level():
    chars = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144))]
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(chars)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.add_tokens([AddedToken("「x」", special=False)])
    return tokenizer


def _byte_fallback():
    pieces = ["<unk>", "▁", "▁a", "b", "▁▁", "日", "é"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    vocab |= {f"<0x{byte:02X}>": len(pieces) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


def _word_piece():
    words = ["[UNK]", "play", "##ing", "##ed", "a", "b", ",", "."]
    tokenizer = Tokenizer(models.WordPiece(vocab={word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


TOKENIZERS = {"byte_level": _byte_level(), "byte_fallback": _byte_fallback(), "word_piece": _word_piece()}


def _stream(tokenizer, ids, **options):
    decoder = Detokenizer(Vocabulary(tokenizer), silent_ids=frozenset(), **{"is_continuation": False, **options})
    return [decoder.push(token_id) for token_id in ids], decoder.finish()


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_tokens_give_the_text_of_decoding_all_at_once(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=40))
    pieces, rest = _stream(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=True)


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=30))
def test_real_text_is_shown_without_a_replacement_character(text):
    tokenizer = TOKENIZERS["byte_level"]
    pieces, rest = _stream(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == text
    assert rest == ""
    assert all(piece == "" or len(piece) >= 1 for piece in pieces)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_each_character_is_shown_with_its_last_byte():
    tokenizer = TOKENIZERS["byte_level"]
    pieces, _ = _stream(tokenizer, tokenizer.encode("aé日👩").ids)
    assert pieces == ["a", "", "é", "", "", "日", "", "", "", "👩"]


def test_a_character_cut_at_the_end_is_what_the_reference_says():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("ok👩").ids[:-1]
    pieces, rest = _stream(tokenizer, ids)
    assert "".join(pieces) == "ok"
    assert "ok" + rest == tokenizer.decode(ids)


def test_special_and_silent_tokens_have_no_text():
    tokenizer = TOKENIZERS["byte_level"]
    eos, added = tokenizer.token_to_id("<eos>"), tokenizer.token_to_id("「x」")
    a = tokenizer.encode("a").ids[0]
    decoder = Detokenizer(Vocabulary(tokenizer), silent_ids=frozenset({a}), is_continuation=False)
    assert [decoder.push(token) for token in (eos, a, added)] == ["", "", "「x」"]


def test_an_id_that_the_tokenizer_does_not_have_has_no_text():
    pieces, rest = _stream(TOKENIZERS["byte_level"], [10_000])
    assert (pieces, rest) == ([""], "")


def test_a_continuation_keeps_its_leading_space():
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = [tokenizer.token_to_id("▁a"), tokenizer.token_to_id("b")]
    assert _stream(tokenizer, ids)[0] == ["a", "b"]
    assert _stream(tokenizer, ids, is_continuation=True)[0] == [" a", "b"]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([1, 4, 5]), min_size=1, max_size=40))
def test_other_decoders_give_the_same_text_too(ids):
    tokenizer = TOKENIZERS["word_piece"]
    pieces, rest = _stream(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)


def test_the_window_of_other_decoders_stays_short():
    decoder = Detokenizer(Vocabulary(TOKENIZERS["word_piece"]), silent_ids=frozenset(), is_continuation=False)
    for _ in range(1000):
        decoder.push(4)
    assert len(decoder._window) <= 16


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_an_id_as_large_as_a_file_may_say_costs_no_table_so_long(kind):
    parts = json.loads(TOKENIZERS[kind].to_str())
    parts["model"]["vocab"]["é"] = large = 2**32 - 1
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    pieces, rest = _stream(tokenizer, [large - 1, large])
    assert "".join(pieces) + rest == tokenizer.decode([large])
