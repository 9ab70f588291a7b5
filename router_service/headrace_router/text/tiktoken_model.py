"""A tokenizer from `tiktoken.model`, for folders without tokenizer.json: Kimi-K2, Moonlight.

The file has a line for each token, base64 of its bytes and its rank. How text is cut before that is code of the
authors', not data, so it is known here by the class that tokenizer_config.json names; others are refused.

    rank order    two neighbours that are a token together become it; of all such pairs in a piece of text the one of
                  the lowest rank goes first: `tokenizers`' BPE with every cut of every token as a merge
    special ids   those after the last rank, named by `added_tokens_decoder`, else <|reserved_token_ID|>

Source: moonshotai/Moonlight-16B-A3B tokenization_moonshot.py, openai/tiktoken.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any, cast

from headrace_core.errors import CheckpointError
from headrace_core.json_file import UnreadableError, is_there, read_object, read_text
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from headrace_router.text.detokenizer import BYTE_ALPHABET

FILE = "tiktoken.model"
_CONFIG = "tokenizer_config.json"
_CLASS = "TikTokenTokenizer"
_NUM_SPECIAL = 258
"""Ids after the last rank: 256 reserved ones and two."""
SPLIT_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""The class's `pat_str`."""
_CHARS = {byte: char for char, byte in BYTE_ALPHABET.items()}


def read_tiktoken(folder: Path) -> Tokenizer:
    """Return the tokenizer of `folder`/tiktoken.model.

    Raises:
        CheckpointError: BAD_TOKENIZER, the file or tokenizer_config.json beside it makes no sense or names a class that
            is not known; UNREADABLE_FILE.
    """
    config = _read_config(folder / _CONFIG)
    name = config.get("tokenizer_class")
    if name != _CLASS:
        raise CheckpointError(
            "BAD_TOKENIZER",
            f"{folder / _CONFIG}: tokenizer_class is {name!r}; how that cuts text is not in {FILE}. {_CLASS} is known; "
            "of others convert it to tokenizer.json",
        )
    ranks = _read_ranks(folder / FILE)
    vocabulary = {_text(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(ranks), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_special_tokens(config, len(ranks)))
    return tokenizer


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return read_object(path) if is_there(path) else {}
    except UnreadableError as error:
        raise CheckpointError("UNREADABLE_FILE", str(error)) from error
    except ValueError as error:
        raise CheckpointError("BAD_TOKENIZER", str(error)) from error


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Return the rank of each token, 0, 1, 2 ... in this order; every single byte is among them."""
    ranks: dict[bytes, int] = {}
    try:
        text = read_text(path)
    except UnreadableError as error:
        raise CheckpointError("UNREADABLE_FILE", str(error)) from error
    except ValueError as error:
        raise _bad(path, str(error)) from error
    for number, line in enumerate(filter(None, text.split("\n"))):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if not token or int(rank) != number or token in ranks:
                raise ValueError("ranks must be 0, 1, 2 ..., each of another token")
        except (ValueError, binascii.Error) as error:
            raise _bad(path, f"line {number + 1}: {error}") from error
        ranks[token] = number
    missing = [byte for byte in range(256) if bytes((byte,)) not in ranks]
    if missing:
        raise _bad(path, f"byte {missing[0]} is no token, so there are texts that it can't encode")
    return ranks


def _bad(path: Path, problem: str) -> CheckpointError:
    return CheckpointError("BAD_TOKENIZER", f"{path} can't be read: {problem}; download it again")


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """Return every cut of every token into two others, by the token's rank."""
    return [
        (_text(token[:cut]), _text(token[cut:]))
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]


def _text(token: bytes) -> str:
    return "".join(_CHARS[byte] for byte in token)


def _special_tokens(config: dict[str, Any], first: int) -> list[AddedToken]:
    named: object = config.get("added_tokens_decoder") or {}
    entries = cast("dict[str, object]", named) if isinstance(named, dict) else {}
    texts: list[str] = []
    for token_id in range(first, first + _NUM_SPECIAL):
        entry = entries.get(str(token_id))
        content: object = cast("dict[str, object]", entry).get("content") if isinstance(entry, dict) else None
        text = f"<|reserved_token_{token_id}|>" if content is None else content
        if not isinstance(text, str) or not text or text in texts:
            raise CheckpointError(
                "BAD_TOKENIZER",
                f"{_CONFIG}: added_tokens_decoder[{token_id}].content is {text!r:.80}; it must be a text of its own",
            )
        texts.append(text)
    return [AddedToken(text, special=True, normalized=False) for text in texts]
