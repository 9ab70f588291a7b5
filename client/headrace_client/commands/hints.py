"""Commands that a reader pastes into another terminal, to use what runs in this one."""

from __future__ import annotations

from pathlib import Path

from headrace_core.address import parse_address
from headrace_core.identity import CERT, KEY, ROOTS, Role

from headrace_client.commands.options import API_KEY_VARIABLE
from headrace_client.connection import DEFAULT_ADDRESS

ASK_FOR_KEY = f"read -rs {API_KEY_VARIABLE} && export {API_KEY_VARIABLE}"
"""Takes a key from the keyboard: shown nowhere, and in no shell's history."""

_ANY_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def reachable(address: str) -> str:
    """Return where a client of this machine finds what listens at `address`."""
    found = parse_address(address)
    return str(type(found)(_ANY_HOSTS.get(found.host, found.host), found.port))


def client_options(address: str, tls: Path | None) -> str:
    """Return the options, a space before each, with which `headrace generate` and others find a router."""
    server = reachable(address)
    options = "" if server == DEFAULT_ADDRESS else f" --server {server}"
    return f"{options} --identity {tls / Role.CLIENT.value}" if tls else options


def curl_line(address: str, tls: Path | None = None, *, has_keys: bool = False) -> str:
    """Return a command that asks a router over HTTP; `tls` is a folder of identities.

    A key comes from the environment, and by a descriptor: an argument could be seen by whoever lists processes.
    """
    address = reachable(address)
    url = f"http://{address}"
    if tls:
        folder = tls / Role.CLIENT.value
        name = f"{Role.ROUTER.server_name}:{address.rpartition(':')[2]}"
        url = f"--cacert {folder / ROOTS} --cert {folder / CERT} --key {folder / KEY} "
        url += f"--connect-to {name}:{address} https://{name}"
    body = '{"prompt": "Once upon a time", "max_tokens": 40, "stream": true}'
    key = f' -H @<(echo "authorization: Bearer ${API_KEY_VARIABLE}")' if has_keys else ""
    return f"curl -N {url}/v1/completions -H 'content-type: application/json'{key} -d '{body}'"
