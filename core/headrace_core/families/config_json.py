"""Parse config.json as Hugging Face checkpoints have it, old spellings and new, and refuse what would be misread.

Of generation_config.json the end-of-sequence ids are read: where it names any (`eos_token_id`: an id, or a list,
which may be empty), they replace config.json's, as in transformers. A file that names none (null, or no such field)
leaves config.json's, where transformers would go on past every end. What it says of sampling, the router reads
(`generation_config`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace_core.errors import CheckpointError
from headrace_core.families.config import ModelConfig
from headrace_core.families.family import Family
from headrace_core.families.fields import CONFIG, Fields, bad, unsupported
from headrace_core.families.generation_config import GENERATION_CONFIG, read_generation_config
from headrace_core.families.table import FAMILIES
from headrace_core.json_file import UnreadableError, is_there, read_object
from headrace_core.request import MAX_EOS_TOKEN_IDS

_EOS = "eos_token_id"


def parse_config(directory: Path) -> ModelConfig:
    """Return what `directory`/config.json describes, and which tokens end a text by generation_config.json beside it.

    Raises:
        CheckpointError: BAD_CONFIG if config.json is missing, or either file is unreadable or inconsistent;
            UNSUPPORTED_MODEL if it asks for something that Headrace does not compute. The message names file and field.
    """
    values = _read(directory / CONFIG)
    model_type = Fields(values).text("model_type")
    family = FAMILIES.get(model_type)
    if family is None:
        unsupported("model_type", model_type, f"one of {', '.join(FAMILIES)}")
    fields = _network_fields(values, family)
    config = family.parse(fields)
    generation = Fields(read_generation_config(directory), file=GENERATION_CONFIG)
    return replace(config, eos_token_ids=_parse_eos(generation if _EOS in generation else fields, config.vocab_size))


def _network_fields(values: dict[str, Any], family: Family) -> Fields:
    """Return the fields that describe the network, those that are left out as the model's class takes them."""
    if not family.section:
        return Fields({**family.defaults, **values})
    if values.get("quantization_config") is not None:
        unsupported("quantization_config", values["quantization_config"], f"null, or in {family.section}")
    section = values.get(family.section)
    if not isinstance(section, dict):
        bad(family.section, section, "an object")
    return Fields({**family.defaults, **section}, f"{family.section}.")


def _read(path: Path) -> dict[str, Any]:
    if not is_there(path):
        raise CheckpointError("BAD_CONFIG", f"{path} does not exist; give the folder of a Hugging Face checkpoint")
    try:
        return read_object(path)
    except UnreadableError as error:
        raise CheckpointError("UNREADABLE_FILE", str(error)) from None
    except ValueError as error:
        raise CheckpointError("BAD_CONFIG", str(error)) from None


def _parse_eos(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    value = fields.raw(_EOS)
    token_ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            bad(_EOS, value, f"a token id below vocab_size, {vocab_size}, a list of them, or null", file=fields.file)
    unique = tuple(dict.fromkeys(token_ids))
    if len(unique) > MAX_EOS_TOKEN_IDS:
        bad(_EOS, value, f"at most {MAX_EOS_TOKEN_IDS} token ids", file=fields.file)
    return unique
