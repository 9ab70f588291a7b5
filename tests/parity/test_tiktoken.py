"""`tiktoken.model` as the tiktoken library reads it, with the split pattern that Kimi's authors published."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import pytest
import tiktoken
from headrace_core.errors import CheckpointError
from headrace_router.text.tiktoken_model import SPLIT_PATTERN
from headrace_router.text.tokenizer import Tokenizer
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

# As in tokenization_moonshot.py and tokenization_kimi.py.
PUBLISHED = "|".join(
    [
        r"""[\p{Han}]+""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
CORPUS = json.loads(Path(__file__).with_name("mixed_scripts.json").read_text())
NUM_RANKS = 900
UNREACHABLE = "Zqxwv"


def ranks_of(corpus):
    """Ranks that a corpus gives: the bytes, then what is merged most often."""
    fast = FastTokenizer(models.BPE())
    splits = [
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    fast.pre_tokenizer = pre_tokenizers.Sequence(splits)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=NUM_RANKS, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(corpus * 4, trainer)
    by_char = {char: byte for byte, char in tiktoken_bytes().items()}
    ordered = sorted(fast.get_vocab().items(), key=lambda item: item[1])
    ranks = {bytes(by_char[char] for char in text): rank for rank, (text, _) in enumerate(ordered)}
    # A word that no merges lead to, as published files have some: taken where it is a whole piece.
    return {**ranks, UNREACHABLE.encode(): len(ranks)}


def tiktoken_bytes():
    """GPT-2's character for each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def lines_of(ranks):
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


def config_of(first):
    named = {first: "[BOS]", first + 1: "[EOS]", first + 4: "<|im_user|>", first + 5: "<|im_end|>"}
    decoder = {str(token_id): {"content": text, "special": True} for token_id, text in named.items()}
    return {"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "added_tokens_decoder": decoder}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder as its authors ship it, and the library's reading of it."""
    folder, ranks = tmp_path_factory.mktemp("kimi"), ranks_of(CORPUS)
    (folder / "tiktoken.model").write_text(lines_of(ranks))
    config = config_of(len(ranks))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    names = {int(token_id): entry["content"] for token_id, entry in config["added_tokens_decoder"].items()}
    special = {
        names.get(token_id, f"<|reserved_token_{token_id}|>"): token_id
        for token_id in range(len(ranks), len(ranks) + 258)
    }
    return folder, tiktoken.Encoding("kimi", pat_str=PUBLISHED, mergeable_ranks=ranks, special_tokens=special)


def texts():
    """The corpus, and 3,000 mixtures of it: whatever characters stand beside each other."""
    dice, characters = random.Random(0), "".join(CORPUS)
    yield from CORPUS
    yield from (
        "",
        " ",
        "\n",
        "a",
        UNREACHABLE,
        f"{UNREACHABLE}s",
        "[BOS]hi<|im_user|> there\n<|im_end|>[EOS]",
        "x<|reserved_token_870|> x",
    )
    for _ in range(3000):
        pieces = (dice.choice((dice.choice(CORPUS)[dice.randrange(40) :], dice.choice(characters))) for _ in range(6))
        yield "".join(piece[: dice.randrange(1, 12)] for piece in pieces)


def test_ids_and_texts_are_those_of_the_tiktoken_library(model):
    folder, theirs = model
    ours = Tokenizer(folder)
    for text in texts():
        expected = theirs.encode(text, allowed_special="all")
        assert ours.encode(text, with_special=False, max_tokens=10**6) == expected, text
        plain = theirs.encode_ordinary(text)
        assert b"".join(map(ours.token_bytes, plain)) == text.encode(), text


def test_what_is_special_and_how_much_a_token_stands_for_is_known(model):
    folder, theirs = model
    ours = Tokenizer(folder)
    assert ours.specials == theirs._special_tokens
    longest = max(len(theirs.decode_single_token_bytes(token_id)) for token_id in range(theirs.n_vocab))
    assert ours.longest_token_bytes == longest


BYTES = [bytes((byte,)) for byte in range(256)]


def spoilt(change):
    lines = lines_of({token: rank for rank, token in enumerate(BYTES)}).splitlines()
    change(lines)
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (spoilt(lambda lines: lines.__setitem__(3, "Aw==")), "line 4"),
        (spoilt(lambda lines: lines.__setitem__(3, "Aw== 4")), "line 4: ranks must be"),
        (spoilt(lambda lines: lines.__setitem__(3, "A* 3")), "line 4"),
        (spoilt(lambda lines: lines.__setitem__(3, "AA== 3")), "line 4: ranks must be"),
        (spoilt(lambda lines: lines.pop()), "byte 255 is no token"),
        ("", "byte 0 is no token"),
        ("\ud800", None),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_name_and_line(content, says, tmp_path):
    (tmp_path / "tiktoken.model").write_bytes(content.encode("utf-8", "surrogatepass"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config_of(256)))
    with pytest.raises(CheckpointError, match=rf"tiktoken\.model.*{says or ''}") as caught:
        Tokenizer(tmp_path)
    assert caught.value.reason == "BAD_TOKENIZER"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"tokenizer_class": "QWenTokenizer"}, "tokenizer_class is 'QWenTokenizer'"),
        ({}, "tokenizer_class is None"),
        ({**config_of(256), "added_tokens_decoder": {"256": {"content": 3}}}, r"added_tokens_decoder\[256\]"),
        (
            {**config_of(256), "added_tokens_decoder": {"256": {"content": "a"}, "257": {"content": "a"}}},
            r"added_tokens_decoder\[257\]",
        ),
    ],
)
def test_what_the_config_must_say_is_asked_for_by_name(config, says, tmp_path):
    (tmp_path / "tiktoken.model").write_text(spoilt(lambda lines: None))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says) as caught:
        Tokenizer(tmp_path)
    assert caught.value.reason == "BAD_TOKENIZER"
