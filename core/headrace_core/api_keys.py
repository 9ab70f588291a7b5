"""API keys: what a client shows to a router, and what a router keeps of it in a file of TOML.

    [alice]                              hr_alice_<43 characters>     the key, which alice alone has
    sha256 = "3f7a…"
    requests_per_minute = 600            0 or nothing: as many as there is room for
    tokens_per_minute = 100000
    slo_class = "interactive"            of requests that name none (`--slo-classes`)

A key is 256 random bits, so one round of SHA-256 keeps it as well as a slow hash keeps a password.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
_PREFIX = "hr"
_SECRET_BYTES = 32
_NOBODY = hashlib.sha256(secrets.token_bytes(_SECRET_BYTES)).digest()
MOST_PER_MINUTE = 10**12
_FIELDS = {"sha256", "requests_per_minute", "tokens_per_minute", "slo_class"}


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What a router knows of one key."""

    name: str
    sha256: bytes
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    """Of prompts and answers together."""
    slo_class: str = ""
    """Of its requests that name none; empty: none."""


def new_key(name: str) -> tuple[str, bytes]:
    """Return a new key and its hash.

    Raises:
        ValueError: `name` is no name of a key.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a key: 1 to 32 of a-z 0-9 -, with no - at an end")
    key = f"{_PREFIX}_{name}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    return key, hashlib.sha256(key.encode()).digest()


def find(keys: Mapping[str, ApiKey], shown: bytes) -> ApiKey | None:
    """Return the key that is shown; None if it is none of these.

    Its name is public. How long this takes says nothing of the rest, nor whether there is a key of that name.
    """
    parts = shown.split(b"_", 2)
    key = keys.get(parts[1].decode("ascii", "replace")) if len(parts) == 3 else None
    is_right = hmac.compare_digest(hashlib.sha256(shown).digest(), key.sha256 if key else _NOBODY)
    return key if is_right else None


def write_entry(key: ApiKey) -> str:
    """Return a key as an entry of the file."""
    limits = {"requests_per_minute": key.requests_per_minute, "tokens_per_minute": key.tokens_per_minute}
    lines = [f"[{key.name}]", f'sha256 = "{key.sha256.hex()}"']
    lines += [f"{name} = {value}" for name, value in limits.items() if value]
    return "\n".join([*lines, *([f'slo_class = "{key.slo_class}"'] if key.slo_class else [])]) + "\n"


def read_keys(content: bytes) -> dict[str, ApiKey]:
    """Return the keys of a file, by name.

    Raises:
        ValueError: it is none; names what is wrong in a line, and nothing that was to be secret.
    """
    try:
        tables: dict[str, Any] = tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    return {name: _read_key(name, table) for name, table in tables.items()}


def _read_key(name: str, table: Any) -> ApiKey:
    if not NAME.fullmatch(name):
        raise ValueError(f"[{name[:40]}] is no name of a key")
    if not isinstance(table, dict) or not set[Any](table) <= _FIELDS:
        raise ValueError(f"[{name}] must have sha256, and may have {', '.join(sorted(_FIELDS - {'sha256'}))}")
    fields: dict[str, Any] = table
    digest: Any = fields.get("sha256")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"[{name}] sha256 must be 64 hexadecimal digits: `headrace keys` writes them")
    limits = [fields.get(limit, 0) for limit in ("requests_per_minute", "tokens_per_minute")]
    if any(type(limit) is not int or not 0 <= limit <= MOST_PER_MINUTE for limit in limits):
        raise ValueError(f"[{name}] a limit must be a whole number, 0 or more")
    slo_class = fields.get("slo_class", "")
    if not isinstance(slo_class, str) or not NAME.fullmatch(slo_class or "a"):
        raise ValueError(f"[{name}] slo_class must be the name of a class")
    requests, tokens = limits
    return ApiKey(name, bytes.fromhex(digest), requests, tokens, slo_class)
