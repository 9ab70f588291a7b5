"""Every reason that an error can carry, and what it means, by the error that carries it.

A reason is stable: callers may switch on it. `python -m headrace_core.reasons` writes the table of docs/errors.md; a
test holds both against every place that raises.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from headrace_core.errors import (
    CheckpointError,
    DeadlineError,
    HandoffLostError,
    HeadraceError,
    InvalidRequestError,
    LayoutMismatchError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    ProtocolError,
    StartupError,
    TransferCorruptError,
    UnauthenticatedError,
    UnavailableError,
)

REASONS: Mapping[type[HeadraceError], Mapping[str, str]] = {
    InvalidRequestError: {
        "BAD_CERTIFICATE": "the client's TLS roots or its certificate can't be used; says why",
        "BAD_CLUSTER": "these processes can't serve anything together",
        "BAD_CREDENTIALS": "the client's API key can't be read, or be sent as metadata",
        "BAD_FIDELITY": "`headrace simulate --fidelity` is none it knows",
        "BAD_FIT": "a file of fitted step times can't be used",
        "BAD_GRAMMAR": "an answer can't be held to its grammar: that can't be read, is too much, or has no worker",
        "BAD_HANDOFF": "what a hand-off brought does not fit the sequence it was for; between workers, tried again",
        "BAD_KEYS": "a file of API keys, or the name of a new one, can't be used; says why",
        "BAD_OPTION": "a command's option has no such value",
        "BAD_REPORT": "a file is no report of `headrace bench --json`",
        "BAD_REQUEST": "a message is malformed or contradicts itself",
        "BAD_SAMPLING": "a sampling parameter, named in the message, is out of its range or leaves no token to choose",
        "BAD_SLO": "a latency objective can't be read",
        "BAD_STUDY": "`headrace simulate --study` is none it knows",
        "BAD_TABLES": "a folder of measured kernel times can't be used",
        "BAD_TOKEN": "a token id is outside the vocabulary",
        "BAD_TRACE": "a request trace can't be read",
        "BAD_WORKLOAD": "a workload's numbers make no sense",
        "CLIENT_CLOSED": "the client was closed by its own program, before the call or during it",
        "EMPTY_PROMPT": "the prompt has no tokens",
        "NO_MEMORY": "the model leaves no memory for pages on this hardware",
        "NO_MODEL": "the folder is not a model's, or the hub gives nobody a model of this name, or not us",
        "NO_PLAN": "no number of workers meets the objectives",
        "PROMPT_TOO_LONG": "the prompt exceeds the context, or the bytes a router takes",
    },
    NotFoundError: {
        "NO_EXPERTS": "`headrace experts`: no worker's metrics can be read, or no token was routed to an expert yet",
        "NOT_A_ROUTER": "a worker, or another gRPC server, answers at the router's address",
        "UNKNOWN_MODEL": "the router serves another model",
        "UNKNOWN_SERVICE": "health was asked about a service that is not here",
    },
    LayoutMismatchError: {
        "LAYOUT_MISMATCH": "page size, dtype, layers or widths differ between two workers",
        "MODEL_MISMATCH": "weights, config or compute type differ between two workers",
        "NO_COMMON_TRANSPORT": "two workers have no transport in common",
        "REFUSED": "a worker does not fit the fleet; `headrace status` says why",
    },
    UnauthenticatedError: {
        "BAD_API_KEY": "no key that the router knows was sent",
        "NO_IDENTITY": "the caller's certificate names nobody of this system, or who drains has none",
    },
    PermissionDeniedError: {
        "NOT_A_PEER": "a worker was to take pages from an address that is none of its peers' (`--peers`)",
        "WRONG_ROLE": "the role in the caller's certificate may not call this",
        "WRONG_TAKER": "pages were asked for under a lease of another worker",
    },
    OverloadedError: {
        "MESSAGE_TIMEOUT": "the request's message took too long to arrive",
        "NO_FREE_PAGES": "the pages are taken, or the sequence is larger than a pool",
        "RATE_LIMITED": "the API key's requests or tokens of this minute are used up; says when to come again",
        "QUEUE_FULL": "too much is waiting; try again later",
        "SLO_UNREACHABLE": "the request's target for its speed can't be met now; says when to come again",
        "SLOW_READER": "the reader of a session, of log-probabilities or of a stream over HTTP fell too far behind",
    },
    UnavailableError: {
        "CONNECTION_LOST": "the connection to the router broke",
        "DRAINING": "the process is going away and takes no new work",
        "NO_HUB": "a model can't be downloaded now: the hub does not answer, or may not be asked",
        "NO_WORKERS": "no worker is ready, or none with a context so long; says what is missing",
        "RANK_LOST": "a rank of a worker's group is gone, or did not come in time; says in what",
        "RETRIES_EXHAUSTED": "every attempt failed, or they lost two workers; says how the last one did",
        "SESSION_CLOSED": "the session of a router with a decode worker ended",
        "STARTING": "the process is loading its model",
        "START_FAILED": "a process of a local cluster, or that for chat templates, could not start; says why",
        "START_TIMEOUT": "a process of a local cluster was not ready in time",
        "UNREACHABLE": "nothing answers at the router's address",
        "WORKER_LOST": "a worker's connection broke",
    },
    HandoffLostError: {
        "HOLDER_LOST": "the worker that holds the pages is gone",
        "LEASE_ENDED": "the pages are not held any more",
        "STALE_ATTEMPT": "a later attempt of the same sample exists",
        "STALE_PAGE": "a page was reused since it was sealed",
        "TAKER_LOST": "the worker that was to take the pages is gone",
        "WORKER_RESTARTED": "the holder, or the worker of a session, is another process now",
    },
    TransferCorruptError: {
        "CHECKSUM": "bytes differ from the holder's checksums",
        "SHORT_READ": "fewer bytes arrived than promised",
        "TOKENS_MISMATCH": "the pages of a hand-off are those of other tokens",
    },
    ProtocolError: {
        "PROTOCOL": "a worker sent what the protocol does not allow, or what this version does not know",
    },
    DeadlineError: {
        "DEADLINE_EXCEEDED": "the caller's time limit passed",
    },
    CheckpointError: {
        "BAD_CONFIG": "config.json or generation_config.json can't be read or is inconsistent; names file and field",
        "BAD_LOGITS": "before it serves, a worker tries the network: its output is not finite",
        "BAD_TENSOR_SHAPE": "a tensor's shape is not what config.json says",
        "BAD_TOKENIZER": "a tokenizer file can't be read, or two contradict each other; names file and field",
        "DAMAGED_FILE": "a weight file is cut short or no safetensors file",
        "EXTRA_TENSOR": "a tensor that the network does not have",
        "MISSING_TENSOR": "a tensor that the network needs is not there",
        "MODEL_TOO_LARGE": "weights and pages exceed the memory that is free, or all there is; with the figures",
        "NON_FINITE_WEIGHT": "a weight or its scale is NaN or infinite, or too large for --dtype; names the tensor",
        "NO_TOKENIZER": "tokenizer.json is missing",
        "UNREADABLE_FILE": "the system does not let a file of the checkpoint be read; says why",
        "UNSUPPORTED_MODEL": "config.json asks for something that is not implemented; names the field",
    },
    StartupError: {
        "BAD_ADDRESS": "an address is not host:port",
        "BAD_KEYS": "the file of API keys can't be used; says why",
        "BAD_RANKS": "a model can't be shared out to ranks so, or they can't meet; names what is wrong",
        "BAD_TLS": "a certificate, key or root is missing, expired, of another role; or ranks are on several machines",
        "BAD_TRACING": "a variable of OpenTelemetry (OTEL_*) can't be used",
        "BIND": "an address can't be listened on",
        "DISK_FULL": "a model's download does not fit the disk",
        "KERNELS_DISAGREE": "on this GPU the kernels and plain torch disagree",
        "NO_BACKEND": "the kernels that --kernels names can't be had here; says why",
        "NO_LENDING": "threads can't be lent: the folder can't be used, or how many there are is not said",
        "NO_CRYPTOGRAPHY": "certificates are made by the package cryptography",
        "NO_EXACT": "exact numerics can't be held with these kernels or types; says which",
        "NO_FP8_CACHE": "the cache of this network can't be kept in 8 bits",
        "NO_FP8_DISPATCH": "experts can't be given their tokens in 8 bits; says why",
        "NO_INT8": "weights can't be multiplied in 8 bits there",
        "NO_FP8_WEIGHTS": "the checkpoint's weights can't be held in 8 bits as they are stored; says why",
        "NO_GPU": "torch sees no GPU",
        "NO_MATPLOTLIB": "plots need matplotlib",
        "NO_MTP": "the module that --speculate mtp asks for can't be had; says why",
        "NO_KERNEL": "the GPU's kernels do not take this network or page size",
        "NO_OPENTELEMETRY": "--trace-sample needs OpenTelemetry, which is not installed",
        "NO_WORKER_PACKAGES": "workers need packages that are not installed; says which command brings them",
        "NO_TRANSPORT": "pages can't be moved here by the transport that --transport names; says why",
        "POOL_TOO_SMALL": "the pool does not hold one page",
        "READY_FILE": "the file that tells of readiness can't be written; says why",
    },
    HeadraceError: {
        "BAD_LOGITS": "the network's output for this request is not finite: is the checkpoint damaged?",
        "BUG": "an error of ours; the process's log has the traceback",
        "ENGINE_FAILED": "computing this request raised, also alone; the worker's log has the traceback",
        "START_FAILED": "the router of a local cluster refuses to be asked",
    },
}


_KNOWN = frozenset(reason for reasons in REASONS.values() for reason in reasons)


def label(reason: str) -> str:
    """Return `reason` as the label of a metric: one that is not in the table, a peer's invention, is OTHER."""
    return reason if reason in _KNOWN else "OTHER"


def table() -> str:
    """Return the table of docs/errors.md, in Markdown."""
    lines = ["| error | status | reason | means |", "|---|---|---|---|"]
    for error, reasons in REASONS.items():
        for reason, meaning in sorted(reasons.items()):
            lines.append(f"| `{error.__name__}` | {error.status} | {reason} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
