"""One frame of `headrace top`: what a `View` has, as tables that fit a terminal of any width."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from headrace_client.commands.terminal import LOST_STATES, STATE_STYLES, format_bytes
from headrace_client.connection import cause_of
from headrace_client.results import Worker
from headrace_client.top.experts import busiest_layers
from headrace_client.top.history import News, View
from headrace_client.top.samples import Histogram
from headrace_client.top.tables import Cells, Column, fitted

_SHARES = (("p25", 0.25), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
_LATENCIES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("TTFT", "headrace_ttft_seconds", {}),
    ("ITL", "headrace_itl_seconds", {}),
    ("E2E", "headrace_e2e_seconds", {}),
    ("queue", "headrace_phase_seconds", {"phase": "queue"}),
)
_LATENCY_COLUMNS = (
    Column("p25", 3, 8),
    Column("p50", 0, 8),
    Column("p90", 1, 8),
    Column("p99", 0, 8),
    Column("observed", 2, 8),
)
_WORKER_COLUMNS = (
    Column("role", 1, 7, is_right=False),
    Column("state", 0, 11, is_right=False),
    Column("pages", 2, 5),
    Column("running", 3, 7),
    Column("waiting", 4, 7),
    Column("leases", 7, 6),
    Column("tokens/s", 5, 8),
    Column("step p50", 6, 8),
    Column("hits", 8, 5),
)
_HANDOFF_COLUMNS = (
    Column("moved", 4, 9),
    Column("moved/s", 1, 11),
    Column("while moving", 0, 12),
    Column("p50", 2, 8),
    Column("p99", 3, 8),
    Column("hidden", 5, 6),
)
_EXPERT_COLUMNS = (
    Column("fullest/mean", 0, 12),
    Column("expert", 1, 6),
    Column("its share", 2, 9),
    Column("", 3, 20, is_right=False),
)
_UNKNOWN = "-"
_LINES_AROUND_WORKERS = 24
_FEWEST_WORKERS = 4
_EXPERT_BAR = 20


def render(view: View, server: str, *, width: int, height: int | None = None) -> RenderableType:
    """Return the frame.

    Args:
        view: what to show.
        server: the router's address.
        width: columns there are; what matters less is left out where they are few.
        height: lines there are, of which workers get what the rest leaves; None: all workers.
    """
    return Group(
        _head(view, server),
        "",
        _latencies(view, width),
        "",
        *_workers(view, width, height),
        "",
        *_handoffs(view, width),
        "",
        *_experts(view, width),
    )


def _head(view: View, server: str) -> RenderableType:
    info, router = view.info, view.news.get("")
    over = f"last {view.span_s:.0f} s" if view.span_s else "since the processes began"
    context = f"context {info.max_context_tokens}" if info.max_context_tokens else "no worker is ready yet"
    first = Text.assemble(
        (info.model_name, "bold"), f"  {info.model_fingerprint[:12]}  {context}  {server}  ", (over, "dim")
    )
    now = f"{info.num_running} requests running, {info.num_queued} queued"
    if router is None:
        return Group(first, Text(f"{now}; the router's metrics can't be read"))
    outcomes = router.samples.by("headrace_requests_total", "outcome")
    others = ", ".join(f"{count:.0f} {outcome}" for outcome, count in outcomes.items() if count and outcome != "ok")
    rates = f"{router.rate('headrace_output_tokens_total'):,.1f} tokens/s, " if router.span_s else ""
    retries = router.samples.total("headrace_retries_total")
    moves = router.samples.total("headrace_moved_sequences_total")
    tail = "".join(f", {count:.0f} {what}" for what, count in (("retries", retries), ("moved", moves)) if count)
    done = f"{rates}{outcomes.get('ok', 0):.0f} answered" + (f", {others}" if others else "") + tail
    return Group(first, Text(f"{now}; {done}"))


def _latencies(view: View, width: int) -> RenderableType:
    news = view.news.get("")
    rows: list[tuple[str, Cells]] = []
    for label, name, labels in _LATENCIES:
        found = news.samples.histogram(name, **labels) if news else Histogram()
        shares = {column: _time(found.quantile(share)) for column, share in _SHARES}
        rows.append((label, shares | {"observed": f"{found.count:,.0f}"}))
    return fitted("latency", _LATENCY_COLUMNS, rows, width)


def _workers(view: View, width: int, height: int | None) -> Sequence[RenderableType]:
    workers = view.info.workers
    if not workers:
        return [Text("no workers")]
    most = len(workers) if height is None else max(_FEWEST_WORKERS, height - _LINES_AROUND_WORKERS)
    rows = [(worker.address, _worker(worker, view.news.get(worker.address))) for worker in workers[:most]]
    more = [Text(f"and {len(workers) - most} more", style="dim")] if len(workers) > most else []
    details = [Text(f"{each.address}: {cause_of(each.detail)}", style="dim") for each in workers if each.detail]
    return [fitted("worker", _WORKER_COLUMNS, rows, width), *more, *details[:_FEWEST_WORKERS]]


def _worker(worker: Worker, news: News | None) -> Cells:
    cells: dict[str, str | Text] = dict.fromkeys((column.name for column in _WORKER_COLUMNS), _UNKNOWN)
    cells["role"] = worker.role or "?"
    cells["state"] = Text(worker.state, style=STATE_STYLES.get(worker.state, ""))
    if worker.state in LOST_STATES:  # what it last said of itself holds no longer
        return cells
    cells["running"], cells["waiting"] = str(worker.num_running), str(worker.num_waiting)
    cells["leases"] = str(worker.num_leases)
    if worker.num_pages:
        cells["pages"] = _share(worker.num_pages - worker.num_free_pages, worker.num_pages)
    if news is not None:
        samples = news.samples
        if news.span_s:
            cells["tokens/s"] = f"{news.rate('headrace_step_tokens_total'):,.1f}"
        cells["step p50"] = _time(samples.histogram("headrace_step_seconds").quantile(0.5))
        looked_up = samples.total("headrace_prefix_cache_query_tokens_total")
        cells["hits"] = _share(samples.total("headrace_prefix_cache_hit_tokens_total"), looked_up)
    return cells


def _handoffs(view: View, width: int) -> Sequence[RenderableType]:
    workers = [news for name, news in view.news.items() if name]
    takers = [news for news in workers if "headrace_handoffs" in news.samples.values]
    in_flight = sum(news.samples.total("headrace_handoffs") for news in takers)
    failures: Counter[str] = Counter()
    for news in workers:
        failures.update(news.samples.by("headrace_handoff_failures_total", "reason"))
    failed = ", ".join(f"{count:.0f} {reason}" for reason, count in sorted(failures.items()) if count)
    line = Text(f"{in_flight:.0f} in flight; failures: {failed or 'none'}")
    names = {name for news in takers for name in news.samples.by("headrace_transfer_busy_seconds_total", "transport")}
    if not names:
        return [Text.assemble(("hand-offs  ", "bold"), line)]
    rows = [(name, _transport(takers, name)) for name in sorted(names)]
    return [fitted("hand-offs", _HANDOFF_COLUMNS, rows, width), line]


def _transport(takers: Sequence[News], transport: str) -> Cells:
    moved = sum(
        news.samples.total("headrace_transfer_bytes_total", transport=transport, direction="received")
        for news in takers
    )
    rate = sum(news.rate("headrace_transfer_bytes_total", transport=transport, direction="received") for news in takers)
    busy_s = sum(news.samples.total("headrace_transfer_busy_seconds_total", transport=transport) for news in takers)
    hidden = sum(news.samples.total("headrace_hidden_transfer_bytes_total", transport=transport) for news in takers)
    took = Histogram()
    for news in takers:
        took += news.samples.histogram("headrace_transfer_seconds", transport=transport)
    return {
        "moved": format_bytes(round(moved)),
        "moved/s": f"{format_bytes(round(rate))}/s" if any(news.span_s for news in takers) else _UNKNOWN,
        "while moving": f"{format_bytes(round(moved / busy_s))}/s" if busy_s else _UNKNOWN,
        "p50": _time(took.quantile(0.5)),
        "p99": _time(took.quantile(0.99)),
        "hidden": _share(hidden, moved),
    }


def _experts(view: View, width: int) -> Sequence[RenderableType]:
    layers = busiest_layers([news.samples for name, news in view.news.items() if name])
    if not layers:
        return [Text.assemble(("experts  ", "bold"), "no token was routed")]
    rows: list[tuple[str, Cells]] = [
        (
            f"layer {layer.layer}",
            {
                "fullest/mean": f"{layer.ratio:.2f}",
                "expert": layer.expert,
                "its share": f"{100 * layer.share:.0f} %",
                "": "█" * max(1, round(_EXPERT_BAR * layer.share)),
            },
        )
        for layer in layers
    ]
    return [fitted("experts", _EXPERT_COLUMNS, rows, width)]


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else _UNKNOWN


def _time(seconds: float | None) -> str:
    if seconds is None:
        return _UNKNOWN
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
