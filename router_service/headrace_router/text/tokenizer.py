"""Text to token ids: the model folder's own tokenizer, nothing of the weights.

What comes around a text prompt's own tokens is what the files say: `add_bos_token` and `add_eos_token` of
tokenizer_config.json where they are true or false, else what the post-processor of tokenizer.json adds. So read these
files transformers 4 (`LlamaTokenizerFast`, which most checkpoints were published for) and llama.cpp's converter;
transformers 5 drops both fields (`_from_pretrained` in tokenization_utils_base.py, 5.23), and with them DeepSeek's
begin token, which its post-processor does not add. A token that the text itself begins (or ends) with is not doubled.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from headrace_core.errors import CheckpointError, InvalidRequestError
from headrace_core.json_file import UnreadableError, is_there, read_text
from headrace_core.process import release_freed_memory
from tokenizers import Tokenizer as FastTokenizer

from headrace_router.text import tiktoken_model
from headrace_router.text.control_text import PlainText
from headrace_router.text.detokenizer import Detokenizer, Vocabulary
from headrace_router.text.token_size import longest_token_bytes
from headrace_router.text.tokenizer_config import read_tokenizer_config

_OTHER_FORMAT = "tokenizer.model"
_PROBES = ("a", "0", ".", "\N{CJK UNIFIED IDEOGRAPH-4E00}")
"""Texts to see what the post-processor adds to; any will do that has a token."""
_TRIM_CHARS = 256 << 10
"""From this length on, what encoding took (100 to 250 times the text) is given back to the system at once."""


class Tokenizer:
    """The tokenizer of one model. Thread-safe: encoding reads only."""

    def __init__(self, folder: Path) -> None:
        """Load from a checkpoint folder.

        Raises:
            CheckpointError: NO_TOKENIZER, BAD_TOKENIZER or UNREADABLE_FILE; says which file.
        """
        # A pool of the library's own would put small texts behind large ones: each is encoded on its caller's thread.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._fast = _read(folder)
        self._fast.no_truncation()
        self._fast.no_padding()
        self.config = read_tokenizer_config(folder)
        before, after = _added_by_post_processor(self._fast)
        self._before = self._around("bos_token", before)
        self._after = self._around("eos_token", after)
        self.longest_token_bytes = longest_token_bytes(self._fast)
        """Most bytes of a text that one token can stand for; None if unknown."""
        self._vocabulary = Vocabulary(self._fast)
        self.specials = self._vocabulary.specials
        """Special tokens, which answers do not show: their ids, by text."""

    def encode(self, text: str, *, with_special: bool, max_tokens: int) -> list[int]:
        """Return the ids of `text`.

        Args:
            text: any number of threads may be here at once; each encodes without the GIL.
            with_special: put the special tokens around it that the model wants around a text. False for a conversation:
                its template writes them.
            max_tokens: most that are wanted, the special ones not counted.

        Raises:
            InvalidRequestError: PROMPT_TOO_LONG.
        """
        # encode_batch_fast, because it releases the GIL and has no offsets: half the time and two thirds of the memory.
        encoding = self._fast.encode_batch_fast([text], add_special_tokens=False)[0]
        try:
            check_num_tokens(len(encoding), max_tokens)
            ids = encoding.ids
        finally:
            del encoding
            if len(text) >= _TRIM_CHARS:
                release_freed_memory()
        if with_special:
            before = [] if ids[: len(self._before)] == self._before else self._before
            after = [] if ids[len(ids) - len(self._after) :] == self._after else self._after
            ids = [*before, *ids, *after]
        return ids

    def check_size(self, num_bytes: int, max_tokens: int) -> None:
        """Refuse a text of `num_bytes`, UTF-8, that has more than `max_tokens` tokens whatever it says.

        Raises:
            InvalidRequestError: PROMPT_TOO_LONG.
        """
        if self.longest_token_bytes is not None:
            check_num_tokens(-(-num_bytes // self.longest_token_bytes), max_tokens, qualifier="at least ")

    @property
    def control_texts(self) -> list[str]:
        """Texts that a tokenizer reads as tokens of their own, wherever they stand.

        Raises:
            CheckpointError: BAD_TOKENIZER, one is read so even where `control_text.PlainText` broke it.
        """
        added = self._fast.get_added_tokens_decoder()
        plain = PlainText([token.content for token in added.values()])
        for token_id, token in added.items():
            if token.special and token_id in self._fast.encode(plain.of(token.content), add_special_tokens=False).ids:
                raise CheckpointError(
                    "BAD_TOKENIZER",
                    f"--plain-user-text: {token.content[:80]!r} can't be told from a user's words by this tokenizer",
                )
        return [token.content for token in added.values()]

    def special_ids(self, texts: Iterable[str]) -> frozenset[int]:
        """Return the special tokens among these texts."""
        return frozenset(self.specials[text] for text in texts if text in self.specials)

    def detokenizer(
        self, *, silent_ids: frozenset[int], is_continuation: bool, shown_ids: frozenset[int] = frozenset()
    ) -> Detokenizer:
        """Return a fresh decoder for one sample.

        Args:
            silent_ids: ids without text, besides the special ones: those that end the sequence.
            is_continuation: the text goes on from the prompt's, so a leading space is kept.
            shown_ids: special ones that have their text all the same.
        """
        return Detokenizer(
            self._vocabulary, silent_ids=silent_ids, is_continuation=is_continuation, shown_ids=shown_ids
        )

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token stands for, alone; of a special token its text. Empty if there is no such token."""
        return self._vocabulary.bytes_of(token_id)

    def text_of(self, token_ids: list[int]) -> str:
        """Return the text of these tokens, without the special ones'."""
        detokenizer = self.detokenizer(silent_ids=frozenset(), is_continuation=False)
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.finish()

    def _around(self, name: str, added: list[int]) -> list[int]:
        """Return `added`, the post-processor's ids on one side of a text, corrected by the config's word on `name`."""
        is_added = self.config.is_added.get(name)
        if is_added is None:
            return added
        text = self.config.special_tokens.get(name)
        token_id = self._fast.token_to_id(text) if text else None
        if not is_added:
            return [each for each in added if each != token_id]
        if token_id is None:
            problem = f"{name}, {text!r}, is no token of tokenizer.json" if text else f"{name} is missing"
            raise CheckpointError(
                "BAD_TOKENIZER", f"tokenizer_config.json: add_{name} is true, but {problem}; correct one of them"
            )
        return added if token_id in added else [token_id]


def _read(folder: Path) -> FastTokenizer:
    path = folder / "tokenizer.json"
    if not is_there(path):
        if is_there(folder / tiktoken_model.FILE):
            return tiktoken_model.read_tiktoken(folder)
        hint = f"; {_OTHER_FORMAT} can't be read yet: convert it" if (folder / _OTHER_FORMAT).is_file() else ""
        raise CheckpointError("NO_TOKENIZER", f"{path} is missing; the router needs a fast tokenizer's file{hint}")
    try:
        return FastTokenizer.from_str(read_text(path))
    except UnreadableError as error:
        raise CheckpointError("UNREADABLE_FILE", str(error)) from error
    except Exception as error:
        raise CheckpointError("BAD_TOKENIZER", f"{path} can't be read: {error}") from error


def check_num_tokens(num_tokens: int, max_tokens: int, *, qualifier: str = "") -> None:
    """Refuse a prompt of more than `max_tokens`, one less than the model's context.

    Raises:
        InvalidRequestError: PROMPT_TOO_LONG.
    """
    if num_tokens > max_tokens:
        raise InvalidRequestError(
            "PROMPT_TOO_LONG",
            f"the prompt has {qualifier}{num_tokens} tokens; with at least one of output the model's context holds "
            f"{max_tokens + 1}",
        )


def _added_by_post_processor(fast: FastTokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that tokenizer.json's post-processor puts before and after every text."""
    for probe in _PROBES:
        own, whole = (fast.encode(probe, add_special_tokens=is_whole).ids for is_whole in (False, True))
        for start in range(len(whole) - len(own) + 1):
            if own and whole[start : start + len(own)] == own:
                return whole[:start], whole[start + len(own) :]
    raise CheckpointError(
        "BAD_TOKENIZER", f"tokenizer.json: it has no token for any of {', '.join(_PROBES)}, or hides them behind others"
    )
