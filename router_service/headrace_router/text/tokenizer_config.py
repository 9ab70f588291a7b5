"""What tokenizer_config.json, and special_tokens_map.json and chat_template.jinja beside it, say of a model's text.

Read as transformers reads them (`_from_pretrained` in tokenization_utils_base.py, 5.23): the map's tokens replace the
config's, unless the config has `added_tokens_decoder`; `extra_special_tokens` may name more of them for templates.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from headrace_core.errors import CheckpointError
from headrace_core.json_file import UnreadableError, is_there, read_object, read_text

_CONFIG = "tokenizer_config.json"
_MAP = "special_tokens_map.json"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_EXTRA = "extra_special_tokens"
_MAX_SHOWN = 200
"""Characters of a value that a message repeats."""


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """The parts that the router uses. No `templates`: the model has no chat template, or it can't be read."""

    special_tokens: dict[str, str]
    """Texts by name, such as `bos_token`; templates use them."""
    is_added: dict[str, bool]
    """For `bos_token` and `eos_token`: whether a text gets it; a name that is missing is not decided here."""
    templates: dict[str, str]
    """Chat templates by name; the one that is used unless another is asked for is `default`."""
    template_problem: str
    """Why it can't be read. No reason not to serve: a text needs no template."""


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Read them; without the files, all is empty.

    Raises:
        CheckpointError: BAD_TOKENIZER, naming file and field.
    """
    values = _read_json(folder / _CONFIG)
    is_added = {name: _flag(values, f"add_{name}") for name in ("bos_token", "eos_token")}
    special = _special_tokens(values, _CONFIG)
    if "added_tokens_decoder" not in values:
        special |= _special_tokens(_read_json(folder / _MAP), _MAP)
    templates: dict[str, str] = {}
    problem = ""
    try:
        templates = _find_templates(folder, values)
    except ValueError as error:
        problem = f"this model's chat template can't be read: {error}"
    return TokenizerConfig(
        special_tokens={name: text for name, text in special.items() if text},
        is_added={name: flag for name, flag in is_added.items() if flag is not None},
        templates=templates,
        template_problem=problem,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not is_there(path):
        return {}
    try:
        return read_object(path)
    except UnreadableError as error:
        raise CheckpointError("UNREADABLE_FILE", str(error)) from error
    except ValueError as error:
        raise CheckpointError("BAD_TOKENIZER", str(error)) from error


def _special_tokens(values: dict[str, Any], file: str) -> dict[str, str | None]:
    """Return the special tokens that `file`, of these values, names: those that all models have, and the model's own.

    None: it says that there is no such token.
    """
    extra = values.get(_EXTRA)
    own: dict[str, object] = {**cast("dict[str, object]", extra)} if isinstance(extra, dict) else {}
    own |= {
        name: value
        for name, value in values.items()
        if name.endswith("_token") and name not in _SPECIAL_NAMES and isinstance(value, str)
    }
    named: dict[str, object] = {name: values[name] for name in _SPECIAL_NAMES if name in values}
    return {name: _token_text(value, name, file) for name, value in (own | named).items()}


def _token_text(value: object, name: str, file: str) -> str | None:
    """Return the text of a special token, which is written as text, or as an object with its text under `content`."""
    text = value
    if isinstance(value, dict):
        text = cast("dict[str, object]", value).get("content", value)
    if text is None or (isinstance(text, str) and _is_unicode(text)):
        return text
    raise CheckpointError(
        "BAD_TOKENIZER",
        f"{file}: {name} is {repr(value)[:_MAX_SHOWN]}; it must be text, an object with its text under `content`, "
        "or null",
    )


def _is_unicode(text: str) -> bool:
    """True if no half of a surrogate pair is alone in it, which JSON can write and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _flag(config: dict[str, Any], name: str) -> bool | None:
    value: object = config.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise CheckpointError(
        "BAD_TOKENIZER", f"{_CONFIG}: {name} is {repr(value)[:_MAX_SHOWN]}; it must be true, false or null"
    )


def _find_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the chat templates by name: those of files, else the config's.

    Raises:
        ValueError: there is one, and it can't be read.
    """
    path = folder / "chat_template.jinja"
    found: dict[str, object] = {"default": read_text(path)} if is_there(path) else {}
    for other in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[other.stem] = read_text(other)
    source: object = None if found else config.get("chat_template")
    if isinstance(source, list):
        named = [cast("dict[str, object]", each) for each in cast("list[object]", source) if isinstance(each, dict)]
        found = {str(each.get("name")): each.get("template") for each in named}
    elif isinstance(source, dict):
        found = cast("dict[str, object]", source)
    elif source is not None:
        found = {"default": source}
    texts = {name: text for name, text in found.items() if isinstance(text, str) and _is_unicode(text)}
    if len(texts) < len(found):
        raise ValueError(f"chat_template of {_CONFIG} is neither text nor a list or object of templates with names")
    return texts
