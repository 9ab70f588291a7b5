"""Log-probabilities as a table: at each position the token chosen, and below it those that were likeliest."""

from __future__ import annotations

import math

from rich.table import Table
from rich.text import Text

from headrace_client.results import Sample

_MOST_TOKEN_WIDTH = 32


def table(sample: Sample) -> Table:
    """Return a sample's table; tokens are written as Python would, so that blanks and control characters show."""
    rows = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    rows.add_column("#", justify="right", style="dim", no_wrap=True)
    rows.add_column("token", overflow="ellipsis", no_wrap=True, max_width=_MOST_TOKEN_WIDTH)
    for name in ("id", "logprob", "p"):
        rows.add_column(name, justify="right", no_wrap=True)
    for position, (token_id, entry) in enumerate(zip(sample.token_ids, sample.logprobs, strict=True)):
        rows.add_row(str(position), *_cells(entry.token, token_id, entry.logprob), style="bold")
        for (top_id, logprob), token in zip(entry.top, entry.top_tokens, strict=True):
            rows.add_row("", *_cells(token, top_id, logprob, indent="  "))
    return rows


def shown(token: bytes) -> str:
    r"""Return a token's text in quotes; what is only a part of a character as bytes: b'\xe7'."""
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)


def _cells(token: bytes, token_id: int, logprob: float, indent: str = "") -> tuple[Text, str, str, str]:
    return Text(indent + shown(token)), str(token_id), f"{logprob:.4f}", f"{math.exp(min(0.0, logprob)):.2%}"
