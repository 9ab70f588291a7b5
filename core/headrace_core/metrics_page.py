"""Reads the metrics that a process serves over HTTP.

Directly: a proxy that the environment names is for what is outside, and knows no worker's address.
"""

from __future__ import annotations

import http.client
import urllib.error
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
    except http.client.HTTPException:
        said = "what answers there does not speak HTTP: is it the port that the worker serves on, or one with TLS?"
    except urllib.error.URLError as error:
        said = str(error) if isinstance(error, urllib.error.HTTPError) else str(error.reason)
    except (OSError, OverflowError, UnicodeDecodeError) as error:
        said = str(error)
    raise ValueError(f"no metrics at {address}: {said}")
