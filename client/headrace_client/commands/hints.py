"""Commands that a reader pastes into another terminal, to use what runs in this one.

Each is a whole line for bash or zsh: names are quoted, hosts are ones that can be reached, folders are absolute, since
the other terminal may stand elsewhere, and a key is in no argument, which whoever lists processes could see.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from headrace_core.address import parse_address
from headrace_core.identity import CERT, KEY, ROOTS, Role

from headrace_client.connection import DEFAULT_ADDRESS

API_KEY_VARIABLE = "HEADRACE_API_KEY"
ASK_FOR_KEY = f"read -rs {API_KEY_VARIABLE} && export {API_KEY_VARIABLE}"
"""Takes a key from the keyboard: shown nowhere, and in no shell's history."""

ROUTER_OPTION, HTTP_OPTION = "--server HOST:PORT", "--base-url URL"

same_router: ContextVar[tuple[str, ...]] = ContextVar("same_router", default=())
"""The options by which this command reaches its router, for hints at other commands."""

server_option: ContextVar[str] = ContextVar("server_option", default=ROUTER_OPTION)
"""The option that named the server which this command asks."""

_ANY_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def reachable(address: str) -> str:
    """Return where a client of this machine finds what listens at `address`."""
    found = parse_address(address)
    return str(type(found)(_ANY_HOSTS.get(found.host, found.host), found.port))


def headrace(*words: str | Path) -> str:
    """Return a command line of this program: by its name if the shell finds it by that, else by where it is."""
    installed = Path(sys.executable).with_name("headrace")
    if shutil.which("headrace"):
        program = ["headrace"]
    else:
        program = [str(installed)] if installed.exists() else [sys.executable, "-m", "headrace_client"]
    return shlex.join([*program, *map(str, words)])


@dataclass(frozen=True, slots=True)
class Reached:
    """A router of this machine: what it listens at, and what it asks of clients.

    `identities` is a folder of them, if it wants to know who calls; `is_encrypted`: it has a certificate of its own.
    """

    address: str
    identities: Path | None = None
    has_keys: bool = False
    is_encrypted: bool = False

    def headrace(self, command: str, *words: str) -> str:
        """Return a line for one of the commands that ask a router."""
        server = reachable(self.address)
        options = [] if server == DEFAULT_ADDRESS else ["--server", server]
        if self.identities:
            options += ["--identity", str(self.identities.resolve() / Role.CLIENT.value)]
        elif self.is_encrypted:
            options.append("--tls")
        return headrace(command, *options, *words)

    def curl(self, http_address: str) -> str:
        """Return a line that asks it over HTTP, where it listens at `http_address`."""
        address = reachable(http_address)
        words = ["curl", "-N", f"{'https' if self.is_encrypted else 'http'}://{address}/v1/completions"]
        if self.identities:
            folder = self.identities.resolve() / Role.CLIENT.value
            name = f"{Role.ROUTER.server_name}:{address.rpartition(':')[2]}"
            words[2] = f"https://{name}/v1/completions"
            words += ["--cacert", str(folder / ROOTS), "--cert", str(folder / CERT), "--key", str(folder / KEY)]
            words += ["--connect-to", f"{name}:{address}"]
        words += ["-H", "content-type: application/json"]
        words += ["-d", '{"prompt": "Once upon a time", "max_tokens": 40, "stream": true}']
        if not self.has_keys:
            return shlex.join(words)
        return f'echo "authorization: Bearer ${API_KEY_VARIABLE}" | {shlex.join([*words, "-H", "@-"])}'
