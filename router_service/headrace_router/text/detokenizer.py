"""Token ids to text, one at a time: never half a character, and in the end exactly what decoding all at once gives.

Three kinds of vocabulary, told apart by the `decoder` in tokenizer.json:

- byte-level BPE (DeepSeek, Kimi, Llama 3, Qwen): each token is a run of bytes; an incremental UTF-8 decoder joins them.
- byte fallback (Mixtral, Llama 2): tokens are text, and `<0xE2>` tokens are bytes. The reference decodes a run of byte
  tokens as a whole (one wrong byte spoils the run), so a run is held back until it ends.
- anything else: the text of a short window of tokens with the new one, less the text without it.

The first two look a token up in a table: O(1). The third decodes a window that ends at the last token whose text was
complete: O(1) amortised.

Source: decode_chain of ByteLevel, ByteFallback, Fuse, Replace and Strip in huggingface/tokenizers, `decoders/`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

_Utf8 = codecs.getincrementaldecoder("utf-8")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_WINDOW_TOKENS = 6
"""Tokens of context that the third kind decodes before a new one."""
_MAX_PENDING_TOKENS = 16
"""Pending tokens at which the third kind takes a trailing U+FFFD for real: no character has more bytes."""


class Vocabulary:
    """What the detokenizers of one model share. Immutable after construction."""

    def __init__(self, fast: FastTokenizer) -> None:
        specials = [(token.content, each) for each, token in fast.get_added_tokens_decoder().items() if token.special]
        self.specials = dict(specials)
        self.special_ids = frozenset(token_id for _, token_id in specials)
        self._last_silent: tuple[frozenset[int], frozenset[int]] | None = None
        self.decode: Callable[[list[int]], str] = fast.decode
        # By id, and no lists: an id may be as large as the file says.
        self.token_bytes: dict[int, bytes] | None = None
        self.token_texts: dict[int, str | None] = {}
        """For `token_bytes`: a token's text, if it is made of whole characters."""
        self.token_pieces: dict[int, str | int] | None = None
        self.num_strip = 0
        decoder: dict[str, Any] = json.loads(fast.to_str()).get("decoder") or {}
        texts = {token_id: text for text, token_id in fast.get_vocab(with_added_tokens=True).items()}
        steps = _fallback_steps(decoder)
        if decoder.get("type") == "ByteLevel":
            self.token_bytes = {token_id: byte_level_bytes(text) for token_id, text in texts.items()}
            self.token_texts = {token_id: _whole_text(token) for token_id, token in self.token_bytes.items()}
        elif steps is not None:
            replace, self.num_strip = steps
            self.token_pieces = {token_id: _fallback_piece(text, replace) for token_id, text in texts.items()}
        self._special_texts = {token_id: text for text, token_id in specials}

    def with_specials(self, token_ids: frozenset[int]) -> frozenset[int]:
        """Return these ids and those of the special tokens; of the ids that were asked for last it is known."""
        if self._last_silent is None or self._last_silent[0] != token_ids:
            self._last_silent = token_ids, self.special_ids | token_ids
        return self._last_silent[1]

    def bytes_of(self, token_id: int) -> bytes:
        """Return what a token stands for, alone; of a special token its text. Empty if there is no such token."""
        if token_id in self._special_texts:
            return self._special_texts[token_id].encode()
        if self.token_bytes is not None:
            return self.token_bytes.get(token_id, b"")
        if self.token_pieces is not None:
            piece = self.token_pieces.get(token_id, "")
            return bytes([piece]) if isinstance(piece, int) else piece.encode()
        return self.decode([token_id]).encode()


class Detokenizer:
    """Decodes one sample. `push` each token in order, then `finish` once; the texts, joined, are the whole."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        silent_ids: frozenset[int],
        is_continuation: bool,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._shown = shown_ids - silent_ids
        self._silent = vocabulary.with_specials(silent_ids)
        self._utf8 = _Utf8(errors="replace")
        self._is_inside = False
        """True while the last character lacks bytes."""
        self._vocabulary = vocabulary
        self._num_strip = 0 if is_continuation else vocabulary.num_strip
        self._run = bytearray()
        self._window: list[int] = []
        self._num_read = 0
        self._read_text = ""
        self._table = vocabulary.token_bytes
        self._pieces = vocabulary.token_pieces

    def push(self, token_id: int) -> str:
        """Take one token and return the text that is now certain; may be empty."""
        if token_id in self._silent:
            return self._break() + self._vocabulary.bytes_of(token_id).decode() if token_id in self._shown else ""
        if self._table is not None:
            return self._push_bytes(token_id, self._table)
        if self._pieces is not None:
            return self._push_piece(self._pieces[token_id]) if token_id in self._pieces else ""
        return self._push_window(token_id)

    def finish(self) -> str:
        """Return what was held back; an incomplete character becomes U+FFFD, as in decoding all at once."""
        if self._table is not None:
            return self._utf8.decode(b"", True)
        if self._pieces is not None:
            return self._strip(self._end_run())
        text = self._vocabulary.decode(self._window)
        return text[len(self._read_text) :]

    def _break(self) -> str:
        """Return what was held back: a token comes that is no part of any character."""
        text = self.finish()
        self._utf8.reset()
        self._is_inside = False
        self._window, self._num_read, self._read_text = [], 0, ""
        return text

    def _push_bytes(self, token_id: int, table: dict[int, bytes]) -> str:
        if token_id not in table:
            return ""
        text = self._vocabulary.token_texts[token_id]
        if text is not None and not self._is_inside:
            return text
        text = self._utf8.decode(table[token_id])
        self._is_inside = bool(self._utf8.getstate()[0])
        return text

    def _push_piece(self, piece: str | int) -> str:
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        return self._strip(self._end_run() + piece if self._run else piece)

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _strip(self, text: str) -> str:
        """Drop the first spaces of the whole text, as many as the decoder strips."""
        while text and self._num_strip:
            if text[0] != " ":
                self._num_strip = 0
            else:
                text = text[1:]
                self._num_strip -= 1
        return text

    def _push_window(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._vocabulary.decode(self._window)
        num_pending = len(self._window) - self._num_read
        if text.endswith(_REPLACEMENT) and num_pending < _MAX_PENDING_TOKENS:
            return ""
        new = text[len(self._read_text) :]
        if len(self._window) > 2 * _WINDOW_TOKENS:
            del self._window[:-_WINDOW_TOKENS]
            text = self._vocabulary.decode(self._window)
        self._num_read, self._read_text = len(self._window), text
        return new


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_ALPHABET = _byte_alphabet()
"""The byte that each character of a byte-level token stands for."""


def byte_level_bytes(text: str) -> bytes:
    """Return what a byte-level token stands for: UTF-8 if a character is outside the alphabet (an added token)."""
    if all(char in BYTE_ALPHABET for char in text):
        return bytes(BYTE_ALPHABET[char] for char in text)
    return text.encode("utf-8")


def _whole_text(token: bytes) -> str | None:
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _fallback_steps(decoder: dict[str, Any]) -> tuple[tuple[str, str], int] | None:
    """Return ((pattern, content), spaces stripped) of Replace, ByteFallback, Fuse[, Strip]; None for other decoders."""
    steps: list[dict[str, Any]] = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else []
    if [step["type"] for step in steps[:3]] != ["Replace", "ByteFallback", "Fuse"]:
        return None
    pattern = steps[0]["pattern"].get("String")
    if pattern is None or len(steps) > 4:
        return None
    num_strip = 0
    if len(steps) == 4:
        strip = steps[3]
        if strip["type"] != "Strip" or strip["content"] != " " or strip["stop"]:
            return None
        num_strip = int(strip["start"])
    return (pattern, steps[0]["content"]), num_strip


def _fallback_piece(text: str, replace: tuple[str, str]) -> str | int:
    """Return the byte that `<0xE2>` stands for, or the token's text."""
    text = text.replace(*replace)
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return text
    return text
