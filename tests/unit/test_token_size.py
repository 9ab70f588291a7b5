"""The most text that a token can stand for: sound where it is said, and not said where it can't be."""

import string

import pytest
from headrace_core.errors import InvalidRequestError
from headrace_router.testing import write_tokenizer
from headrace_router.text.token_size import longest_token_bytes
from headrace_router.text.tokenizer import Tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

CORPUS = [
    "the little fox went to the river    and found a boat",
    "été à la mer; 12345 1234 日本 ☺",
    "=====  ===== -----",
]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPLIT = pre_tokenizers.Split(Regex(r"\s+|\p{L}+|\p{N}{1,3}"), "isolated")


def byte_level(pre_tokenizer, *, normalizer=None, added=(), **model):
    """Byte-level BPE, trained to have long tokens."""
    fast = FastTokenizer(models.BPE(**model))
    fast.pre_tokenizer, fast.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=ALPHABET, special_tokens=["<bos>"])
    fast.train_from_iterator(CORPUS, trainer)
    if normalizer:
        fast.normalizer = normalizer
    fast.add_tokens(list(added))
    return fast


def byte_fallback(*, is_complete=True, normalizer=None, **options):
    """BPE over characters, with tokens for the bytes of those it does not know, as Mixtral has it."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256 if is_complete else 255))]
    words += ["▁", *string.ascii_lowercase, "th", "the", "▁the", "▁▁", "▁▁▁▁", "日"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁"), ("▁▁", "▁▁")]
    settings = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, **options}
    fast = FastTokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges, **settings))
    fast.normalizer = normalizer or normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return fast


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
WHOLE = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
LOSSLESS = {
    "byte level": byte_level(BYTE_LEVEL),
    "byte level, split before": byte_level(pre_tokenizers.Sequence([SPLIT, pre_tokenizers.Digits(), WHOLE])),
    "byte level, not split": byte_level(WHOLE),
    "byte level, long added token": byte_level(
        BYTE_LEVEL, added=[AddedToken("«a long added token»", normalized=False)]
    ),
    "byte level, longer text": byte_level(BYTE_LEVEL, normalizer=normalizers.Replace("a", "aa")),
    "byte fallback": byte_fallback(),
    "byte fallback by Metaspace": byte_fallback(normalizer=normalizers.Prepend("▁")),
}
LOSSLESS["byte fallback by Metaspace"].pre_tokenizer = pre_tokenizers.Metaspace(split=False)
LOSSY = {
    "NFC": byte_level(BYTE_LEVEL, normalizer=normalizers.NFC()),
    "lower case among others": byte_level(
        BYTE_LEVEL, normalizer=normalizers.Sequence([normalizers.Prepend("x"), normalizers.Lowercase()])
    ),
    "strip": byte_level(BYTE_LEVEL, normalizer=normalizers.Strip()),
    "shorter text": byte_level(BYTE_LEVEL, normalizer=normalizers.Replace("  ", " ")),
    "shorter text by a pattern": byte_level(BYTE_LEVEL, normalizer=normalizers.Replace(Regex(" +"), "     ")),
    "spaces dropped": byte_level(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), BYTE_LEVEL])),
    "a separator dropped": byte_level(pre_tokenizers.Sequence([pre_tokenizers.Split(",", "removed"), BYTE_LEVEL])),
    "an added token that takes spaces": byte_level(BYTE_LEVEL, added=[AddedToken("<x>", rstrip=True)]),
    "no byte fallback": byte_fallback(byte_fallback=False),
    "a byte is missing": byte_fallback(is_complete=False),
    "words": FastTokenizer(models.WordLevel(vocab={"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
    "unigrams": FastTokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
}
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet=" \n=-a0▁日", max_size=60),
    st.lists(st.sampled_from([*CORPUS, "«a long added token»", "<bos>", "▁▁▁▁", "    "]), max_size=6).map("".join),
)


@pytest.mark.parametrize("kind", LOSSLESS)
@given(text=TEXTS)
def test_no_text_has_fewer_tokens_than_the_bound_says(kind, text):
    longest = longest_token_bytes(LOSSLESS[kind])
    assert longest is not None
    assert len(LOSSLESS[kind].encode(text, add_special_tokens=False).ids) * longest >= len(text.encode())


@pytest.mark.parametrize("kind", LOSSLESS)
def test_the_bound_is_reached(kind):
    """By a text that is the longest token: so it is no larger than it must be. (`▁` stands for itself or one space.)"""
    fast = LOSSLESS[kind]
    longest = longest_token_bytes(fast)
    texts = [fast.decode([token_id], skip_special_tokens=False) for token_id in range(fast.get_vocab_size())]
    texts += list(fast.get_vocab())
    assert any(
        len(text.encode()) == longest and len(fast.encode(text, add_special_tokens=False).ids) <= 2 for text in texts
    )


@pytest.mark.parametrize("kind", LOSSY)
def test_a_tokenizer_that_may_lose_text_has_no_bound(kind):
    assert longest_token_bytes(LOSSY[kind]) is None


def test_the_demo_models_bound_is_known(model_dir):
    assert Tokenizer(model_dir).longest_token_bytes == 13


def test_a_text_is_refused_from_the_first_byte_that_no_context_holds(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    assert tokenizer.longest_token_bytes == len("<bos>")
    tokenizer.check_size(50, max_tokens=10)
    with pytest.raises(InvalidRequestError, match=r"at least 11 tokens; .* context holds 11") as caught:
        tokenizer.check_size(51, max_tokens=10)
    assert caught.value.reason == "PROMPT_TOO_LONG"
