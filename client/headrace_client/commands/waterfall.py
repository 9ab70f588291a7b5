"""A request's time as a picture: one bar per phase, each beginning where the one before it ends."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headrace_client.commands.terminal import format_bytes
from headrace_client.results import Phase, Timings, Usage

_BAR_WIDTH = 44


def waterfall(timings: Timings, usage: Usage) -> RenderableType:
    """Return the picture: phases to the first token on a scale of their own, since decoding dwarfs them."""
    early = [phase for phase in timings.phases if phase.is_before_first_token]
    late = [phase for phase in timings.phases if not phase.is_before_first_token]
    late_us = timings.total_us - timings.ttft_us
    num_tokens = usage.num_output_tokens
    rate = f", {late_us / (num_tokens - 1) / 1000:.2f} ms per token" if num_tokens > 1 else ""
    return Group(
        Text.assemble(("Time to the first token: ", "bold"), (_ms(timings.ttft_us), "bold cyan")),
        _bars(early, timings.ttft_us, "cyan"),
        Text.assemble(("After it: ", "bold"), (_ms(late_us), "bold green"), f" for {num_tokens} tokens{rate}"),
        _bars(late, late_us, "green"),
        Text.assemble(("In all: ", "bold"), _ms(timings.total_us)),
        Text(describe_handoff(timings)),
    )


def describe_handoff(timings: Timings) -> str:
    """Return one line about what was moved, by which transport, between which workers."""
    if timings.num_transfer_pages == 0:
        text = f"Nothing was handed off: {timings.decode_worker or 'one worker'} computed prompt and answer."
    else:
        pages = "1 page" if timings.num_transfer_pages == 1 else f"{timings.num_transfer_pages} pages"
        text = (
            f"Handed off: {pages}, {format_bytes(timings.transfer_bytes)}, by "
            f"{timings.transport}, from prefill {timings.prefill_worker} to decode {timings.decode_worker}."
        )
        if timings.hidden_transfer_us:
            text += (
                f" {format_bytes(timings.hidden_transfer_bytes)} of it came while the prompt was computed: "
                f"{_ms(timings.hidden_transfer_us)} of moving are in no bar."
            )
    return text if timings.num_attempts <= 1 else f"{text} It took {timings.num_attempts} attempts."


def _bars(phases: Sequence[Phase], total_us: int, colour: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", min_width=15)
    table.add_column(min_width=_BAR_WIDTH, no_wrap=True)
    table.add_column(justify="right", min_width=11)
    table.add_column(justify="right", style="dim")
    start_us = 0
    for phase in phases:
        table.add_row(
            f"  {phase.name}",
            Text(_bar(start_us, phase.duration_us, total_us), style=colour),
            _ms(phase.duration_us),
            f"{100 * phase.duration_us / max(1, total_us):.0f} %",
        )
        start_us += phase.duration_us
    return table


def _bar(start_us: int, duration_us: int, total_us: int) -> str:
    """Return the phase's bar, at least a hair wide, so that no phase is invisible."""
    scale = _BAR_WIDTH / max(1, total_us)
    begin = min(_BAR_WIDTH - 1, round(start_us * scale))
    end = round((start_us + duration_us) * scale)
    return " " * begin + ("█" * (end - begin) if end > begin else "▏")


def _ms(duration_us: int) -> str:
    return f"{duration_us / 1000:,.2f} ms"
