"""Options that several subcommands share, and what they turn into."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import typer
from headrace_core.address import parse_address
from headrace_core.errors import InvalidRequestError

from headrace_client.client import Client
from headrace_client.connection import ConnectionOptions
from headrace_client.retry import RetryPolicy

API_KEY_VARIABLE = "HEADRACE_API_KEY"
_MOST_KEY_BYTES = 4096
_CONNECTION = "Connection"
_SAMPLING = "Sampling"
_SPEED = "Speed"


def finite(value: float | None) -> float | None:
    """Return an option's number; a bound of its own lets NaN and infinity pass.

    Raises:
        BadParameter: it is no finite number.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number of its range")
    return value


Server = Annotated[
    str,
    typer.Option(
        "--server", "-s", envvar="HEADRACE_SERVER", help="The router's HOST:PORT.", rich_help_panel=_CONNECTION
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File with the API key, if the router asks for one. Default: the key in HEADRACE_API_KEY.",
        rich_help_panel=_CONNECTION,
        show_default=False,
    ),
]
"""No option takes the key itself: whoever lists processes would see it."""
Tls = Annotated[
    bool, typer.Option("--tls", help="Encrypt, and trust the system's root certificates.", rich_help_panel=_CONNECTION)
]
TlsRoots = Annotated[
    Path | None,
    typer.Option(help="Encrypt, and trust the root certificates of this PEM file.", rich_help_panel=_CONNECTION),
]
Identity = Annotated[
    Path | None,
    typer.Option(
        envvar="HEADRACE_IDENTITY",
        metavar="DIR",
        help="Encrypt, and show the certificate in this folder, of role client or operator; see `headrace certs`.",
        rich_help_panel=_CONNECTION,
        show_default=False,
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(min=0.001, callback=finite, help="Seconds the whole answer may take. Default: the router's limit."),
]
Wait = Annotated[
    float,
    typer.Option(
        "--wait",
        min=0.0,
        callback=finite,
        help="Seconds to wait for a router, and for its workers to be ready; --timeout bounds that, too.",
        rich_help_panel=_CONNECTION,
    ),
]
WAIT_S = RetryPolicy().longest_wait_s

MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", "-m", help="Most tokens to generate. Default: 256.", rich_help_panel=_SAMPLING),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "-t",
        help="0 always takes the likeliest token. Default, here and of top-p, top-k and the repetition penalty: as the "
        "model's authors say, shown by `headrace status`.",
        rich_help_panel=_SAMPLING,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Choose among the likeliest tokens with this total probability.", rich_help_panel=_SAMPLING),
]
TopK = Annotated[
    int | None, typer.Option(help="Choose among this many likeliest tokens; 0: all.", rich_help_panel=_SAMPLING)
]
MinP = Annotated[
    float,
    typer.Option(help="Drop tokens less likely than this times the likeliest.", rich_help_panel=_SAMPLING),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Above 1, tokens seen in prompt or output become less likely.", rich_help_panel=_SAMPLING),
]
PresencePenalty = Annotated[
    float, typer.Option(help="Subtracted once from tokens already in the output.", rich_help_panel=_SAMPLING)
]
FrequencyPenalty = Annotated[
    float, typer.Option(help="Subtracted from output tokens for each time they occurred.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[
    int | None,
    typer.Option(help="Same seed, same text. Default: the router draws one.", rich_help_panel=_SAMPLING),
]
MinTokens = Annotated[int, typer.Option(help="Fewest tokens before the text may end.", rich_help_panel=_SAMPLING)]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on past end-of-sequence tokens.", rich_help_panel=_SAMPLING)
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End before this text; may be repeated.", rich_help_panel=_SAMPLING),
]
StopTokenId = Annotated[
    list[int] | None,
    typer.Option("--stop-token-id", help="End at this token; may be repeated.", rich_help_panel=_SAMPLING),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias",
        metavar="ID=BIAS",
        help="Make a token likelier or less likely; may be repeated.",
        rich_help_panel=_SAMPLING,
    ),
]
TopLogprobs = Annotated[
    int | None,
    typer.Option(
        help="Show each token's log-probability, and those of this many likeliest tokens; 0 to 20.",
        rich_help_panel=_SAMPLING,
    ),
]

SloClass = Annotated[
    str,
    typer.Option(
        metavar="CLASS",
        help="One of the router's --slo-classes. Default: the key's, if it has one.",
        rich_help_panel=_SPEED,
        show_default=False,
    ),
]
SloTtftMs = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="MS",
        help="Most milliseconds until the first token, in place of the class's; 0: any. What can't be had is refused.",
        rich_help_panel=_SPEED,
    ),
]
SloItlMs = Annotated[
    int | None,
    typer.Option(min=0, metavar="MS", help="Most milliseconds between two tokens, likewise.", rich_help_panel=_SPEED),
]


def connect(
    server: str,
    api_key_file: Path | None,
    *,
    tls: bool,
    tls_roots: Path | None,
    identity: Path | None,
    wait_s: float = WAIT_S,
) -> Client:
    """Return a client for the connection options given.

    Raises:
        InvalidRequestError: BAD_OPTION, `server` is no address; BAD_CREDENTIALS, BAD_CERTIFICATE.
    """
    try:
        parse_address(server)
    except ValueError as error:
        raise InvalidRequestError("BAD_OPTION", f"--server: {error}") from None
    api_key = _api_key(api_key_file)
    return Client(
        server,
        ConnectionOptions(
            use_tls=tls,
            root_certificates=tls_roots,
            identity=identity,
            api_key=api_key,
            retry=RetryPolicy(longest_wait_s=wait_s),
        ),
    )


def _api_key(file: Path | None) -> str:
    if file is None:
        return os.environ.get(API_KEY_VARIABLE, "")
    try:
        with file.open("rb") as opened:
            key = opened.read(_MOST_KEY_BYTES + 1)
        if len(key) > _MOST_KEY_BYTES:
            raise ValueError("it is too large to be one")
        return key.decode().strip()
    except (OSError, ValueError) as error:
        raise InvalidRequestError("BAD_CREDENTIALS", f"can't read the API key in {file}: {error}") from None


def _is_whole(text: str) -> bool:
    """Return whether it is a number in digits that everybody reads the same; `int` takes more."""
    return text.isascii() and text.isdecimal()


def parse_logit_bias(entries: list[str] | None) -> dict[int, float]:
    """Return token id to bias from `ID=BIAS` entries.

    Raises:
        InvalidRequestError: BAD_SAMPLING, naming the entry.
    """
    biases: dict[int, float] = {}
    for entry in entries or []:
        token_id, _, bias = entry.partition("=")
        try:
            if not _is_whole(token_id):
                raise ValueError
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise InvalidRequestError("BAD_SAMPLING", f"--logit-bias {entry!r} is not ID=BIAS, such as 42=-5") from None
    return biases


def parse_token_ids(text: str) -> list[int]:
    """Return token ids written with commas or spaces between them.

    Raises:
        InvalidRequestError: BAD_TOKEN, naming what is no number.
    """
    token_ids: list[int] = []
    for part in text.replace(",", " ").split():
        if not _is_whole(part):
            raise InvalidRequestError("BAD_TOKEN", f"--tokens: {part!r} is not a token id")
        token_ids.append(int(part))
    return token_ids


def parse_settings(entries: list[str] | None) -> dict[str, str]:
    """Return setting to value from `NAME=VALUE` entries.

    Raises:
        InvalidRequestError: BAD_OPTION, naming the entry.
    """
    settings: dict[str, str] = {}
    for entry in entries or []:
        name, sign, value = entry.removeprefix("--").partition("=")
        if not name or not sign:
            raise InvalidRequestError("BAD_OPTION", f"{entry!r} is not NAME=VALUE, such as max-step-tokens=512")
        settings[name.replace("_", "-")] = value
    return settings
