"""Text to token ids: the model folder's own tokenizer and chat template, nothing of the weights.

Reads `tokenizer.json`, and from `tokenizer_config.json` (or `chat_template.jinja`, which wins) the chat template and
the special tokens that templates name. The template runs in a sandbox: it comes with the model, not with us.

What comes around a text prompt's own tokens is what the files say: `add_bos_token` and `add_eos_token` of
tokenizer_config.json where they are true or false, else what the post-processor of tokenizer.json adds. So read these
files transformers 4 (`LlamaTokenizerFast`, which most checkpoints were published for) and llama.cpp's converter;
transformers 5 drops both fields (`_from_pretrained` in tokenization_utils_base.py, 5.23), and with them DeepSeek's
begin token, which its post-processor does not add. A token that the text itself begins (or ends) with is not doubled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, cast

from headrace_core.errors import CheckpointError, InvalidRequestError
from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from headrace_router.detokenizer import Detokenizer, Vocabulary

CHAT_ROLES = ("system", "user", "assistant")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_PROBES = ("a", "0", ".", "\N{CJK UNIFIED IDEOGRAPH-4E00}")
"""Texts to see what the post-processor adds to; any will do that has a token."""


class Tokenizer:
    """The tokenizer of one model. Thread-safe: encoding reads only."""

    def __init__(self, folder: Path) -> None:
        """Load from a checkpoint folder.

        Raises:
            CheckpointError: NO_TOKENIZER, BAD_TOKENIZER or BAD_TEMPLATE; says which file.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError("NO_TOKENIZER", f"{path} is missing; the router needs a fast tokenizer's file")
        try:
            self._fast = FastTokenizer.from_file(str(path))
        except Exception as error:
            raise CheckpointError("BAD_TOKENIZER", f"{path} can't be read: {error}") from error
        self._fast.no_truncation()
        self._fast.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        named = {name: _token_text(config, name) for name in _SPECIAL_NAMES}
        self._special_tokens = {name: text for name, text in named.items() if text}
        before, after = _added_by_post_processor(self._fast)
        self._before = self._around(config, "bos_token", before)
        self._after = self._around(config, "eos_token", after)
        self._template = _compile(_template_source(folder, config))
        self._vocabulary = Vocabulary(self._fast)

    @property
    def has_chat_template(self) -> bool:
        """True if the model comes with a chat template."""
        return self._template is not None

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text prompt, with the special tokens that the model wants around a text."""
        ids = self._encode(text)
        before = [] if ids[: len(self._before)] == self._before else self._before
        after = [] if ids[len(ids) - len(self._after) :] == self._after else self._after
        return [*before, *ids, *after]

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the ids of a conversation of (role, content), ready for the assistant's answer.

        Raises:
            InvalidRequestError: BAD_REQUEST, the model has no template or its template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequestError(
                "BAD_REQUEST", "this model has no chat template; send `text` or `tokens` instead of `chat`"
            )
        try:
            text = self._template.render(
                messages=[{"role": role, "content": content} for role, content in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequestError("BAD_REQUEST", f"the chat template refuses these messages: {error}") from error
        return self._encode(text)

    def detokenizer(self, *, silent_ids: frozenset[int], is_continuation: bool) -> Detokenizer:
        """Return a fresh decoder for one sample.

        Args:
            silent_ids: ids without text, besides the special ones: those that end the sequence.
            is_continuation: the text goes on from the prompt's, so a leading space is kept.
        """
        return Detokenizer(self._vocabulary, silent_ids=silent_ids, is_continuation=is_continuation)

    def _encode(self, text: str) -> list[int]:
        # encode_batch, because it alone releases the GIL: a long prompt must not stop the event loop.
        return self._fast.encode_batch([text], add_special_tokens=False)[0].ids

    def _around(self, config: dict[str, Any], name: str, added: list[int]) -> list[int]:
        """Return `added`, the post-processor's ids on one side of a text, corrected by `add_{name}` of `config`."""
        flag = config.get(f"add_{name}")
        if flag is None:
            return added
        text = self._special_tokens.get(name)
        token_id = self._fast.token_to_id(text) if text else None
        if flag is False:
            return [each for each in added if each != token_id]
        where = f"tokenizer_config.json: add_{name} is {flag!r}"
        if flag is not True:
            raise CheckpointError("BAD_TOKENIZER", f"{where}; it must be true, false or null")
        if token_id is None:
            problem = f"{name}, {text!r}, is no token of tokenizer.json" if text else f"{name} is missing"
            raise CheckpointError("BAD_TOKENIZER", f"{where}, but {problem}; correct one of them")
        return added if token_id in added else [token_id]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError("BAD_TOKENIZER", f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError("BAD_TOKENIZER", f"{path} must hold one JSON object")
    return cast("dict[str, Any]", content)


def _token_text(config: dict[str, Any], name: str) -> str | None:
    """Return the text of a special token, which is written as text, or as an object with its text under `content`."""
    value: object = config.get(name)
    if isinstance(value, dict):
        value = cast("dict[str, object]", value).get("content", value)
    if value is None or isinstance(value, str):
        return value
    raise CheckpointError(
        "BAD_TOKENIZER",
        f"tokenizer_config.json: {name} is {config[name]!r}; it must be text, an object with its text under `content`, "
        "or null",
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


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source: object = config.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in cast("list[dict[str, str]]", source)}
        return named.get("default")
    return source if isinstance(source, str) else None


def _compile(source: str | None) -> Template | None:
    if source is None:
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    functions: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise CheckpointError("BAD_TEMPLATE", f"the model's chat template does not compile: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
