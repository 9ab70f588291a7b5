"""Headrace's client: `Client` blocks, `AsyncClient` is for asyncio; docs/client.md shows both. No torch.

Names are loaded when they are first used: the command has to be there before grpc is.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace_core.errors import (
        DeadlineError,
        HeadraceError,
        InvalidRequestError,
        NotFoundError,
        OverloadedError,
        UnavailableError,
    )
    from headrace_core.request import FinishReason

    from headrace_client.async_client import AsyncClient, AsyncStream
    from headrace_client.client import Client, Stream
    from headrace_client.connection import ConnectionOptions
    from headrace_client.results import (
        ChatMessage,
        Delta,
        Generation,
        Phase,
        PromptTokenLogprobs,
        Sample,
        ServerInfo,
        Timings,
        TokenLogprobs,
        Usage,
        Worker,
    )
    from headrace_client.retry import RetryPolicy
    from headrace_client.sampling import SamplingParams
    from headrace_client.service_level import ServiceLevel

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "ChatMessage",
    "Client",
    "ConnectionOptions",
    "DeadlineError",
    "Delta",
    "FinishReason",
    "Generation",
    "HeadraceError",
    "InvalidRequestError",
    "NotFoundError",
    "OverloadedError",
    "Phase",
    "PromptTokenLogprobs",
    "RetryPolicy",
    "Sample",
    "SamplingParams",
    "ServerInfo",
    "ServiceLevel",
    "Stream",
    "Timings",
    "TokenLogprobs",
    "UnavailableError",
    "Usage",
    "Worker",
]

_HOMES = {
    "headrace_core.errors": (
        "DeadlineError",
        "HeadraceError",
        "InvalidRequestError",
        "NotFoundError",
        "OverloadedError",
        "UnavailableError",
    ),
    "headrace_client.sampling": ("SamplingParams",),
    "headrace_client.service_level": ("ServiceLevel",),
    "headrace_core.request": ("FinishReason",),
    "headrace_client.async_client": ("AsyncClient", "AsyncStream"),
    "headrace_client.client": ("Client", "Stream"),
    "headrace_client.connection": ("ConnectionOptions",),
    "headrace_client.results": (
        "ChatMessage",
        "Delta",
        "Generation",
        "Phase",
        "Sample",
        "ServerInfo",
        "Timings",
        "PromptTokenLogprobs",
        "TokenLogprobs",
        "Usage",
        "Worker",
    ),
    "headrace_client.retry": ("RetryPolicy",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
