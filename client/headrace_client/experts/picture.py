"""How experts' tokens lie, what that costs, and where a step's time goes: drawn for a terminal of any width."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.text import Text

from headrace_client.experts.counted import PARTS, Counted
from headrace_client.experts.outlook import Outlook, Placed, Step

_LEVELS = " ▁▂▃▄▅▆▇█"
_GLYPHS = dict(zip(PARTS, "█▓░", strict=True))
"""Told apart without colours, too."""
_STYLES = {"compute": "green", "communication": "blue", "waiting": "red"}
_MOST_WIDTH = 100
_LAYERS = 8
_LEAST_SHOWN = 0.005
"""What would be written as 0 %."""


def picture(counted: Counted, outlook: Outlook, width: int, *, is_whole: bool = False) -> Iterator[Text]:
    """Yield the lines, none wider than `width`, 40 at least; `is_whole`: all layers, not the most uneven alone."""
    width = max(40, min(width, _MOST_WIDTH))
    yield Text(counted.worker, style="bold")
    ranks = f"{counted.num_ranks} ranks" if counted.num_ranks > 1 else "one process"
    num_experts = max(map(len, counted.tokens.values()))
    yield Text(f"{ranks}; {num_experts} experts in each of {len(counted.tokens)} layers", style="dim")
    yield Text()
    yield from _layers(counted, outlook, width, is_whole=is_whole)
    yield Text()
    yield from _losses(outlook)
    if counted.rebalances and sum(counted.rebalances.values()):
        done, failed = (int(counted.rebalances.get(outcome, 0)) for outcome in ("done", "failed"))
        moved = f"{int(counted.moved_experts)} experts, {counted.moved_bytes / 1e6:.1f} MB"
        yield Text(f"rebalances: {done} done, {failed} failed; moved {moved}")
    yield Text()
    if outlook.step is None:
        yield Text("How ranks spend a step is known of groups on CPUs.", style="dim")
    else:
        yield from _step(outlook.step, width)


def _layers(counted: Counted, outlook: Outlook, width: int, *, is_whole: bool) -> Iterator[Text]:
    ratios = {layer: max(of) * len(of) / sum(of) for layer, of in outlook.now.rank_tokens.items()}
    layers = sorted(counted.tokens, key=lambda layer: -ratios.get(layer, 0.0))
    shown = sorted(layers) if is_whole else layers[:_LAYERS]
    room = width - len("layer  ") - len("  busiest    rank over mean")
    yield Text(f"layer  {'experts, busiest first'[:room]:{room}}  busiest    rank over mean", style="bold")
    for layer in shown:
        tokens = counted.tokens[layer]
        order = sorted(range(len(tokens)), key=lambda expert: -tokens[expert])
        busiest = f"{order[0]}: {tokens[order[0]] * len(tokens) / sum(tokens):.1f}x"
        bars = _bars([tokens[expert] for expert in order], room)
        yield Text(f"{layer:5}  {bars:{room}}  {busiest:>9}  {ratios.get(layer, 1.0):>13.2f}x")
    if len(layers) > len(shown):
        yield Text(f"and {len(layers) - len(shown)} more even layers: --all shows them", style="dim")


def _bars(values: Sequence[float], width: int) -> str:
    """Return `values`, of which the first is the largest, as one character each; of several the mean, if need be."""
    each = -(-len(values) // width)
    groups = [values[at : at + each] for at in range(0, len(values), each)]
    means = [sum(group) / len(group) for group in groups]
    most = max(means)
    return "".join(_LEVELS[math.ceil(mean / most * (len(_LEVELS) - 1))] for mean in means)


def _losses(outlook: Outlook) -> Iterator[Text]:
    where = "where experts are" if outlook.is_measured else "experts as numbered"
    yield Text(f"{outlook.num_ranks} ranks, {where}", style="bold")
    yield from _loss(outlook.now)
    yield Text(f"{outlook.num_ranks} ranks, rebalanced (EPLB), {outlook.num_slots} slots a layer", style="bold")
    yield from _loss(outlook.rebalanced)
    faster = (1 - outlook.rebalanced.loss) / (1 - outlook.now.loss) - 1
    if faster >= _LEAST_SHOWN:
        yield Text(f"  a rebalance would do {faster:.0%} more in the same time", style="green")
    else:
        yield Text("  a rebalance would win nothing")


def _loss(placed: Placed) -> Iterator[Text]:
    """Say a loss both ways: of the time there is, and of what could be done in it."""
    yield Text(f"  ranks wait {placed.loss:.0%} of the experts' time for the busiest;")
    yield Text(f"  that is {placed.time_more:.0%} more time than if all had as much")


def _step(step: Step, width: int) -> Iterator[Text]:
    room = (width - len("rank 00  ") - 2) // 2
    longest = max(sum(rank) for rank in step.now)
    ideal = sum(step.ideal[0])
    head = f"{f'now, {longest * 1e3:.3g} ms':{room}}  {f'ideal, {ideal * 1e3:.3g} ms'}"
    yield Text(f"{'a step':9}{head}", style="bold")
    for number, (now, then) in enumerate(zip(step.now, step.ideal, strict=True)):
        line = Text(f"{f'rank {number}':9}")
        for parts, gap in ((now, "  "), (then, "")):
            bar = _bar(parts, longest, room)
            line.append_text(bar)
            line.append(" " * (room - bar.cell_len) + gap if gap else "")
        yield line
    legend = Text(" " * 9)
    for part in PARTS:
        legend.append(f"{_GLYPHS[part]} ", style=_STYLES[part])
        legend.append(f"{part}  ")
    yield legend
    shares = [sum(rank[part] for rank in step.now) / sum(map(sum, step.now)) for part in range(len(PARTS))]
    said = ", ".join(f"{share:.0%} {part}" for part, share in zip(PARTS, shares, strict=True))
    yield Text(f"{'':9}{said}", style="dim")


def _bar(parts: Sequence[float], longest: float, room: int) -> Text:
    """Return a rank's step; ends are rounded, so that bars of one length are."""
    bar, end, drawn = Text(), 0.0, 0
    for name, seconds in zip(PARTS, parts, strict=True):
        end += seconds
        until = round(end / longest * room)
        bar.append(_GLYPHS[name] * (until - drawn), style=_STYLES[name])
        drawn = until
    return bar
