"""`headrace certs`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from headrace_core.errors import StartupError
from rich.text import Text

from headrace_client.commands.terminal import stdout

HELP = """Make certificates for development: an authority, and an identity for each role.

Examples:
  headrace certs build/certs
  headrace up --model demo/model --tls build/certs
  headrace generate --identity build/certs/client "Once upon a time"

A second call with the same DIR renews the identities; running processes read them within their next connection. \
DIR/ca.key signs whatever it is asked to: it is no place for it in production (docs/security.md).
"""


_NAME, _DAYS, _HOSTS = "dev", 90, ("localhost", "127.0.0.1", "::1")


def make(folder: Path, *, name: str = _NAME, days: int = _DAYS, hosts: Sequence[str] = _HOSTS) -> list[Path]:
    """Make the set; see `certificates.make_set`.

    Raises:
        StartupError: NO_CRYPTOGRAPHY; and as it does.
    """
    try:
        from headrace_client.certificates import make_set
    except ImportError:
        problem = "certificates are made by the package cryptography: pip install 'headrace[certs]'"
        raise StartupError("NO_CRYPTOGRAPHY", problem) from None
    return make_set(folder, name=name, days=days, hosts=hosts)


def certs(  # the signature is the command line
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; made if need be.")],
    name: Annotated[str, typer.Option(help="Name of the identities, after their role.")] = _NAME,
    days: Annotated[int, typer.Option(min=1, max=36_500, help="Days that they are valid.")] = _DAYS,
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or address by which a client may know the router that brings no identity; may be repeated. "
            f"Default: {', '.join(_HOSTS)}."
        ),
    ] = None,
) -> None:
    """Run the command. Raises what `make_set` lists; `app` reports it."""
    for made in make(folder, name=name, days=days, hosts=host or _HOSTS):
        stdout.print(Text(str(made)), soft_wrap=True)
