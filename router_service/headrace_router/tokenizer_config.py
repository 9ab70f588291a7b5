"""What tokenizer_config.json, and chat_template.jinja beside it, say of a model's text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from headrace_core.errors import CheckpointError

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """The parts that the router uses. `template` None: the model has no chat template, or it can't be read."""

    special_tokens: dict[str, str]
    """Texts by name, such as `bos_token`; templates use them."""
    is_added: dict[str, bool]
    """For `bos_token` and `eos_token`: whether a text gets it; a name that is missing is not decided here."""
    template: str | None
    template_problem: str
    """Why it can't be read. No reason not to serve: a text needs no template."""


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Read them; without the files, all is empty.

    Raises:
        CheckpointError: BAD_TOKENIZER, naming file and field.
    """
    values = _read_json(folder / "tokenizer_config.json")
    special = {name: _token_text(values, name) for name in _SPECIAL_NAMES}
    is_added = {name: _flag(values, f"add_{name}") for name in ("bos_token", "eos_token")}
    template, problem = None, ""
    try:
        template = _find_template(folder, values)
    except ValueError as error:
        problem = f"this model's chat template can't be read: {error}"
    return TokenizerConfig(
        special_tokens={name: text for name, text in special.items() if text},
        is_added={name: flag for name, flag in is_added.items() if flag is not None},
        template=template,
        template_problem=problem,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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


def _flag(config: dict[str, Any], name: str) -> bool | None:
    value: object = config.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise CheckpointError(
        "BAD_TOKENIZER", f"tokenizer_config.json: {name} is {value!r}; it must be true, false or null"
    )


def _find_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the text of the chat template: the file's, else the config's; of several with names, `default`.

    Raises:
        ValueError: there is one, and it can't be read.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(str(error)) from error
    source: object = config.get("chat_template")
    if isinstance(source, list):
        named = [cast("dict[str, object]", each) for each in cast("list[object]", source) if isinstance(each, dict)]
        source = next((each.get("template") for each in named if each.get("name") == "default"), None)
    if source is None or isinstance(source, str):
        return source
    raise ValueError("chat_template of tokenizer_config.json is neither text nor a list of templates with names")
