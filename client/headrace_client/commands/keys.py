"""`headrace keys`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from headrace_core.api_keys import MOST_PER_MINUTE, NAME, ApiKey, new_key, read_keys, write_entry
from headrace_core.errors import InvalidRequestError
from rich.text import Text

from headrace_client.commands.terminal import stderr, stdout

HELP = """Make an API key: show it once, and add its hash to the file of a router's keys.

Examples:
  headrace keys keys.toml alice
  headrace keys keys.toml batch --requests-per-minute 60 --tokens-per-minute 200000
  python -m headrace_router --model DIR --keys-file keys.toml
  HEADRACE_API_KEY=hr_alice_... headrace generate "Once upon a time"

A running router reads the file again. To take a key back, delete its entry.
"""


def keys(  # the signature is the command line
    file: Annotated[Path, typer.Argument(help="The router's --keys-file; made if need be.")],
    name: Annotated[str, typer.Argument(help="Whose key: 1 to 32 of a-z 0-9 -. Waiting is shared fairly by it.")],
    requests_per_minute: Annotated[
        int, typer.Option(min=0, max=MOST_PER_MINUTE, help="Most requests in a minute; 0: any.")
    ] = 0,
    tokens_per_minute: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_PER_MINUTE, help="Most tokens in a minute, of prompts and answers together; 0: any."
        ),
    ] = 0,
    slo_class: Annotated[
        str,
        typer.Option(metavar="CLASS", help="Class of its requests that name none: one of the router's --slo-classes."),
    ] = "",
) -> None:
    """Run the command.

    Raises:
        InvalidRequestError: BAD_KEYS, the file or the name can't be used.
    """
    try:
        if file.exists() and not file.is_file():  # a device's place would be taken by a file
            raise ValueError("it is no regular file")
        content = file.read_bytes() if file.exists() else b""
        if name in read_keys(content):
            raise ValueError(f"there is a key [{name}] already; delete its entry to give a new one")
        if not NAME.fullmatch(slo_class or "a"):
            raise ValueError(f"--slo-class {slo_class!r} is no name of a class")
        key, digest = new_key(name)
        entry = write_entry(ApiKey(name, digest, requests_per_minute, tokens_per_minute, slo_class)).encode()
        _write(file, content + (b"\n" if content else b"") + entry)
    except (OSError, ValueError) as error:
        raise InvalidRequestError("BAD_KEYS", f"{file}: {error}") from None
    stdout.print(Text(key), soft_wrap=True)
    stderr.print(Text(f"This is the only time that it is shown; {file} has its hash."), style="dim")


def _write(path: Path, content: bytes) -> None:
    """Write a file in one piece: a router may be reading the one before."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    scratch = path.with_name(f"{path.name}.new")
    scratch.unlink(missing_ok=True)
    with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    scratch.replace(path)
