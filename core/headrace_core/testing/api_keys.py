"""API keys for tests: a file's entries and the keys themselves, by name."""

from __future__ import annotations

from headrace_core.api_keys import ApiKey, new_key, write_entry


def make_keys(*names: str, requests_per_minute: int = 0, tokens_per_minute: int = 0) -> tuple[dict[str, str], str]:
    """Return a new key for each name, and what a router's file says of them."""
    made = {name: new_key(name) for name in names}
    entries = [
        write_entry(ApiKey(name, digest, requests_per_minute, tokens_per_minute)) for name, (_, digest) in made.items()
    ]
    return {name: key for name, (key, _) in made.items()}, "\n".join(entries)
