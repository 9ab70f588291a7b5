"""What a model's folder says of how to sample: generation_config.json, for requests that do not say it themselves.

Read are `temperature`, `top_p`, `top_k` and `repetition_penalty`; null says nothing. `do_sample` is not: who wants the
likeliest token says temperature 0.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace_core.errors import CheckpointError, InvalidRequestError
from headrace_core.families.fields import Fields
from headrace_core.json_file import UnreadableError, is_there, read_object
from headrace_core.request import SamplingParams

GENERATION_CONFIG = "generation_config.json"


def read_generation_config(directory: Path) -> dict[str, Any]:
    """Return the fields of `directory`/generation_config.json; none where there is no such file.

    Raises:
        CheckpointError: BAD_CONFIG or UNREADABLE_FILE.
    """
    path = directory / GENERATION_CONFIG
    try:
        return read_object(path) if is_there(path) else {}
    except UnreadableError as error:
        raise CheckpointError("UNREADABLE_FILE", str(error)) from None
    except ValueError as error:
        raise CheckpointError("BAD_CONFIG", str(error)) from None


def read_sampling_defaults(directory: Path) -> SamplingParams:
    """Return what a request gets that says nothing.

    Raises:
        CheckpointError: BAD_CONFIG, a value can't be; names it. UNREADABLE_FILE.
    """
    fields = Fields(read_generation_config(directory), file=GENERATION_CONFIG)
    try:
        said: dict[str, Any] = {
            name: fields.number(name) for name in ("temperature", "top_p", "repetition_penalty") if name in fields
        }
        if "top_k" in fields:
            said["top_k"] = fields.count("top_k", least=0)
        sampling = replace(SamplingParams(), **said)
        sampling.validate()
    except InvalidRequestError as error:
        raise CheckpointError("BAD_CONFIG", f"{GENERATION_CONFIG}: {error}; {_OTHERWISE}") from None
    except CheckpointError as error:
        raise CheckpointError(error.reason, f"{error}; {_OTHERWISE}") from None
    return sampling


_OTHERWISE = "correct it, or start the router with --generation-config none"
