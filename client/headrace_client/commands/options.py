"""Options that several subcommands share, and what they turn into."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer
from headrace_core.address import parse_address
from headrace_core.errors import InvalidRequestError

from headrace_client.client import Client
from headrace_client.commands import hints
from headrace_client.connection import DEFAULT_ADDRESS, ConnectionOptions
from headrace_client.retry import RetryPolicy
from headrace_client.sampling import SamplingParams
from headrace_client.service_level import ServiceLevel

_MOST_KEY_BYTES = 4096


def finite(value: float | None) -> float | None:
    """Return an option's number; a bound of its own lets NaN and infinity pass.

    Raises:
        BadParameter: it is no finite number.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number of its range")
    return value


Timeout = Annotated[
    float | None,
    typer.Option(min=0.001, callback=finite, help="Seconds the whole answer may take. Default: the router's limit."),
]


@dataclass(frozen=True)
class Router:
    """Where it is, and how to reach it. No option takes the key itself: whoever lists processes would see it."""

    panel: ClassVar = "Connection"

    server: Annotated[
        str,
        typer.Option("--server", "-s", envvar="HEADRACE_SERVER", help="The router's HOST:PORT."),
    ] = DEFAULT_ADDRESS
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the API key, if the router asks for one. Default: the key in HEADRACE_API_KEY.",
            show_default=False,
        ),
    ] = None
    tls: Annotated[
        bool,
        typer.Option("--tls", help="Encrypt, and trust the system's root certificates."),
    ] = False
    tls_roots: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Encrypt, and trust the root certificates of this PEM file."),
    ] = None
    identity: Annotated[
        Path | None,
        typer.Option(
            envvar="HEADRACE_IDENTITY",
            metavar="DIR",
            help="Encrypt, and show the certificate in this folder, of role client or operator; see `headrace certs`.",
            show_default=False,
        ),
    ] = None

    def connect(self) -> Client:
        """Return a client.

        Raises:
            InvalidRequestError: BAD_OPTION, `server` is no address; BAD_CREDENTIALS, BAD_CERTIFICATE.
        """
        try:
            parse_address(self.server)
        except ValueError as error:
            raise InvalidRequestError("BAD_OPTION", f"--server: {error}") from None
        options = ConnectionOptions(
            use_tls=self.tls,
            root_certificates=self.tls_roots,
            identity=self.identity,
            api_key=_api_key(self.api_key_file),
            retry=self._retry(),
        )
        hints.same_router.set(self._given())
        hints.server_option.set(hints.ROUTER_OPTION)
        return Client(self.server, options)

    def _retry(self) -> RetryPolicy:
        return RetryPolicy()

    def _given(self) -> tuple[str, ...]:
        """Return the options that are not as always."""
        words: list[str] = []
        for field in dataclasses.fields(Router):
            value, name = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if value != field.default:
                words += [name] if value is True else [name, str(value)]
        return tuple(words)


@dataclass(frozen=True)
class WaitedRouter(Router):
    """One that a request waits for."""

    wait: Annotated[
        float,
        typer.Option(
            "--wait",
            min=0.0,
            callback=finite,
            help="Seconds to wait for a router, and for its workers to be ready; --timeout bounds that, too.",
        ),
    ] = RetryPolicy().longest_wait_s

    def _retry(self) -> RetryPolicy:
        return RetryPolicy(longest_wait_s=self.wait)


@dataclass(frozen=True)
class Answer:
    """What a conversation says of how its answers are chosen; None: as the model's authors say."""

    panel: ClassVar = "Sampling"

    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", "-m", help="Most tokens to generate. Default: 256."),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            "-t",
            help="0 always takes the likeliest token. Default, here and of top-p, top-k and the repetition penalty: as "
            "the model's authors say, shown by `headrace status`.",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(help="Choose among the likeliest tokens with this total probability."),
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Choose among this many likeliest tokens; 0: all.")] = None
    min_p: Annotated[
        float,
        typer.Option(help="Drop tokens less likely than this times the likeliest."),
    ] = 0.0
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Above 1, tokens seen in prompt or output become less likely."),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(help="Same seed, same text. Default: the router draws one."),
    ] = None
    top_logprobs: Annotated[
        int | None,
        typer.Option(help="Show each token's log-probability, and those of this many likeliest tokens; 0 to 20."),
    ] = None

    def params(self) -> SamplingParams:
        """Return what is sent."""
        return SamplingParams(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Answer)})


@dataclass(frozen=True)
class Sampling(Answer):
    """And what only a single request says."""

    presence_penalty: Annotated[float, typer.Option(help="Subtracted once from tokens already in the output.")] = 0.0
    frequency_penalty: Annotated[
        float,
        typer.Option(help="Subtracted from output tokens for each time they occurred."),
    ] = 0.0
    min_tokens: Annotated[int, typer.Option(help="Fewest tokens before the text may end.")] = 0
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past end-of-sequence tokens.")] = False
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="End before this text; may be repeated."),
    ] = None
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option("--stop-token-id", help="End at this token; may be repeated."),
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        typer.Option("--logit-bias", metavar="ID=BIAS", help="Make a token likelier or less likely; may be repeated."),
    ] = None

    def params(self) -> SamplingParams:
        """Return what is sent. Raises as `parse_logit_bias`."""
        return dataclasses.replace(
            Answer.params(self),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_id or ()),
            stop_strings=tuple(self.stop or ()),
            logit_bias=parse_logit_bias(self.logit_bias),
        )


@dataclass(frozen=True)
class Speed:
    """How soon tokens should come."""

    panel: ClassVar = "Speed"

    slo_class: Annotated[
        str,
        typer.Option(
            metavar="CLASS",
            help="One of the router's --slo-classes. Default: the key's, if it has one.",
            show_default=False,
        ),
    ] = ""
    slo_ttft_ms: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="MS",
            help="Most milliseconds until the first token, in place of the class's; 0: any. What can't be had is "
            "refused.",
        ),
    ] = None
    slo_itl_ms: Annotated[
        int | None,
        typer.Option(min=0, metavar="MS", help="Most milliseconds between two tokens, likewise."),
    ] = None
    priority: Annotated[int, typer.Option(help="Of your requests that wait, those of lower ones start first.")] = 0

    def level(self) -> ServiceLevel:
        """Return what is sent."""
        return ServiceLevel(self.slo_class, self.slo_ttft_ms, self.slo_itl_ms, self.priority)


def _api_key(file: Path | None) -> str:
    if file is None:
        return os.environ.get(hints.API_KEY_VARIABLE, "")
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
