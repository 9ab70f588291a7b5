"""Headrace's client: `Client` blocks, `AsyncClient` is for asyncio; docs/client.md shows both. No torch."""

from headrace_core.errors import (
    DeadlineError,
    HeadraceError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from headrace_core.request import FinishReason, SamplingParams, TokenLogprobs

from headrace_client.async_client import AsyncClient, AsyncStream
from headrace_client.client import Client, Stream
from headrace_client.connection import ConnectionOptions
from headrace_client.results import (
    ChatMessage,
    Delta,
    Generation,
    Phase,
    Sample,
    ServerInfo,
    Timings,
    Usage,
    Worker,
)
from headrace_client.retry import RetryPolicy

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
    "RetryPolicy",
    "Sample",
    "SamplingParams",
    "ServerInfo",
    "Stream",
    "Timings",
    "TokenLogprobs",
    "UnavailableError",
    "Usage",
    "Worker",
]
