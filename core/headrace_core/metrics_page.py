"""Reads the metrics that a process serves over HTTP.

Directly: a proxy that the environment names is for what is outside, and knows no worker's address.
"""

from __future__ import annotations

import http.client
import urllib.request

_MOST_BYTES = 32 << 20
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def read_metrics(address: str, timeout_s: float) -> str:
    """Return what is served at `host:port`, in Prometheus' text format; at most 32 MiB of it.

    Raises:
        ValueError: it can't be had, or is no text; says why.
    """
    try:
        with _OPENER.open(f"http://{address}/metrics", timeout=timeout_s) as answer:
            return answer.read(_MOST_BYTES).decode()
    except (OSError, http.client.HTTPException, OverflowError) as error:
        raise ValueError(f"no metrics at {address}: {error}") from None
