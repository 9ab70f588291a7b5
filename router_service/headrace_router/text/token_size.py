"""How much text one token can stand for: with it, a text that no context holds is refused without tokenizing it.

The bound must be sound, so it is given only for tokenizers of which every part is known to lose no text: then the
tokens of a text cover all its bytes, each no more than the longest token's. Byte-level BPE (DeepSeek, Kimi, Llama 3)
and BPE with byte fallback (Mixtral, Llama 2) are; what normalizes (NFC, lower case), drops spaces, or takes a whole
word or run for one unknown token is not.
"""

from __future__ import annotations

import json
from typing import Any, cast

from tokenizers import Tokenizer as FastTokenizer

from headrace_router.text.detokenizer import BYTE_ALPHABET, byte_level_bytes

_Part = dict[str, Any]


def longest_token_bytes(fast: FastTokenizer) -> int | None:
    """Return the most bytes of a text, UTF-8, that one token can stand for; None if that can't be said."""
    parts: _Part = json.loads(fast.to_str())
    model: _Part = parts["model"]
    added: list[_Part] = parts.get("added_tokens") or []
    normalizers, splitters = _flat(parts.get("normalizer")), _flat(parts.get("pre_tokenizer"))
    is_byte_level = any(part["type"] == "ByteLevel" for part in splitters)
    is_lossless = (
        model["type"] == "BPE"
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and all(_keeps_all(part) for part in normalizers)
        and all(_splits_only(part) for part in splitters)
        # Such a token takes the spaces beside it along, however many.
        and not any(token["lstrip"] or token["rstrip"] for token in added)
    )
    texts = list(cast("dict[str, int]", model["vocab"])) if is_lossless else []
    if is_byte_level:
        sizes = [len(byte_level_bytes(text)) for text in texts]
        has_all_bytes = BYTE_ALPHABET.keys() <= set(texts)
    else:
        sizes = [len(text.encode()) for text in texts]
        known = set(texts) if model.get("byte_fallback") else set[str]()
        has_all_bytes = all(f"<0x{byte:02X}>" in known for byte in range(256))
    if not has_all_bytes:
        return None
    return max(*sizes, *(len(token["content"].encode()) for token in added), 1)


def _flat(part: _Part | None) -> list[_Part]:
    """Return the parts of a sequence, or the one part."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner: list[_Part] = part.get("normalizers") or part.get("pretokenizers") or []
    return [each for one in inner for each in _flat(one)]


def _keeps_all(normalizer: _Part) -> bool:
    """True if no text gets shorter."""
    if normalizer["type"] == "Replace":
        pattern: str | None = normalizer["pattern"].get("String")
        return pattern is not None and len(normalizer["content"].encode()) >= len(pattern.encode())
    return normalizer["type"] == "Prepend"


def _splits_only(pre_tokenizer: _Part) -> bool:
    """True if no text gets lost between the pieces."""
    if pre_tokenizer["type"] in ("Split", "Punctuation"):
        return pre_tokenizer["behavior"] != "Removed"
    return pre_tokenizer["type"] in ("ByteLevel", "Metaspace", "Digits")
