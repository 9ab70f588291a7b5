"""`headrace experts`: what it says of made-up pages, at any width, in colours or none, as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from headrace_client.commands import experts as command
from headrace_client.commands.app import app
from headrace_client.experts.counted import counted
from headrace_client.experts.outlook import outlook
from headrace_client.experts.picture import picture
from headrace_client.top.samples import Samples
from headrace_core.engine.balance import Moved, Seen, StepParts
from headrace_core.errors import InvalidRequestError, NotFoundError
from headrace_core.worker.balance_metrics import BalanceMetrics
from headrace_core.worker.metrics import ExpertTokens
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from rich.cells import cell_len
from typer.testing import CliRunner

TOKENS = {1: [400, 200, 100, 100], 2: [100, 100, 100, 100]}


def page(*, is_group: bool = True, tokens: dict[int, list[int]] | None = None) -> str:
    """Return a worker's page of metrics, as its own code makes it: of a group of two, or of one process."""
    registry = CollectorRegistry()
    expert_tokens = ExpertTokens()
    registry.register(expert_tokens)
    expert_tokens.add(TOKENS if tokens is None else tokens)
    Gauge("headrace_ranks", "Ranks", registry=registry).set(2 if is_group else 1)
    metrics = BalanceMetrics(registry)
    if is_group:
        parts = [StepParts(6.0, 1.0, 1.0), StepParts(3.0, 1.0, 4.0)]
        metrics.observe(Seen({1: [30.0, 10.0], 2: [10.0, 10.0]}, 0.25, parts, 6))
        metrics.observe(Moved(2, 5, 4_000_000, 1.5))
        metrics.observe(Moved(0, 0, 0, 0.5, "rank 1: DAMAGED_FILE: gone"))
    return generate_latest(registry).decode() + "headrace_step_seconds_count 10\nheadrace_step_seconds_sum 0.2\n"


def seen(text: str, ranks: int | None = None, redundant: int | None = None):
    found = counted(Samples.of(text, 0.0), "w:1")
    return found, outlook(found, ranks, redundant)


def test_a_group_shows_where_its_experts_are_and_where_steps_go():
    found, out = seen(page())
    assert (out.num_ranks, out.num_slots, out.is_measured) == (2, 6, True)
    assert out.now.loss == pytest.approx(0.25)
    assert out.now.time_more == pytest.approx(1 / 3)
    # A copy of expert 0 and one of another: 400 and 400 of layer 1, all even in layer 2.
    assert out.rebalanced.loss == pytest.approx(0.0)
    assert out.step is not None
    assert out.step.now == (pytest.approx((0.015, 0.0025, 0.0025)), pytest.approx((0.0075, 0.0025, 0.01)))
    assert out.step.ideal == (pytest.approx((0.01125, 0.0025, 0.0)),) * 2
    assert (found.moved_experts, found.moved_bytes, found.rebalances) == (5, 4e6, {"done": 1, "failed": 1})


def test_of_one_process_it_says_what_a_group_would_lose():
    _, out = seen(page(is_group=False), ranks=2, redundant=0)
    assert not out.is_measured
    assert out.step is None
    assert out.now.loss == pytest.approx(1 - (400 + 200) / (600 + 200))
    assert out.rebalanced.loss == pytest.approx(1 - (400 + 200) / (500 + 200))
    assert seen(page(is_group=False))[1].num_ranks == 4


@pytest.mark.parametrize("width", [40, 60, 100, 300])
@pytest.mark.parametrize("is_group", [True, False])
def test_no_line_is_wider_than_the_terminal_and_a_loss_is_said_both_ways(width, is_group):
    wide = {layer: [1 + (7 * layer + expert * expert) % 90 for expert in range(256)] for layer in range(58)}
    for tokens in (TOKENS, wide):
        found, out = seen(page(is_group=is_group, tokens=tokens), ranks=2)
        for is_whole in (False, True):
            lines = [line.plain for line in picture(found, out, width, is_whole=is_whole)]
            assert max(map(cell_len, lines)) <= max(width, 60), lines
            assert sum(line.lstrip()[:1].isdigit() for line in lines[3:]) >= (len(tokens) if is_whole else 2)
    if is_group:
        text = "\n".join(lines)
        assert "ranks wait 25% of the experts' time" in text
        assert "33% more time" in text
        assert "rebalances: 1 done, 1 failed; moved 5 experts, 4.0 MB" in text


def test_a_step_is_drawn_beside_its_ideal():
    lines = [line.plain for line in picture(*seen(page()), 60)]
    first, second = (next(line for line in lines if line.startswith(f"rank {rank}")) for rank in (0, 1))
    room = (60 - 9 - 2) // 2
    assert len(first[9 : 9 + room].rstrip()) == len(second[9 : 9 + room].rstrip()) == room, "both last as long"
    assert first[9 : 9 + room].count("█") == 2 * second[9 : 9 + room].count("█")
    assert "░" in second
    assert "░" not in second[9 + room + 2 :]


def test_what_can_t_be_is_refused():
    for ranks, redundant in ((5, None), (2, 5)):
        with pytest.raises(InvalidRequestError, match=r"--ranks 5|--redundant 5"):
            seen(page(), ranks=ranks, redundant=redundant)
    with pytest.raises(NotFoundError, match="no token was routed to an expert yet"):
        seen(page(tokens={}))
    with pytest.raises(NotFoundError, match="no token"):
        seen('headrace_expert_tokens_total{layer="x",expert="1"} 5\n')


def test_the_command_reads_a_page_that_was_saved(tmp_path: Path):
    (tmp_path / "page.txt").write_text(page())
    result = CliRunner(env={"COLUMNS": "60", "NO_COLOR": "1"}).invoke(
        app, ["experts", "--page", str(tmp_path / "page.txt")]
    )
    assert result.exit_code == 0, result.stderr
    assert "2 ranks, where experts are" in result.stdout
    assert "\x1b" not in result.stdout
    assert max(map(cell_len, result.stdout.splitlines())) <= max(60, len(str(tmp_path / "page.txt")))
    told = json.loads(CliRunner().invoke(app, ["experts", "--page", str(tmp_path / "page.txt"), "--json"]).stdout)
    assert told["now"]["loss"] == pytest.approx(0.25)
    assert told["expert_tokens"] == {str(layer): tokens for layer, tokens in TOKENS.items()}
    assert told["step_s"]["now"][0][0] == pytest.approx(0.015)


@pytest.mark.parametrize("what", ["nothing", "a folder", "no page"])
def test_a_page_that_is_none_is_one_line_and_exit_code_2(tmp_path: Path, what):
    path = tmp_path / "page"
    if what == "a folder":
        path.mkdir()
    if what == "no page":
        path.write_bytes(b"\xff\xfe{{{")
    result = CliRunner().invoke(app, ["experts", "--page", str(path)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --page")
    assert command.HELP.startswith("Draw how evenly")


@pytest.mark.parametrize(
    ("pages", "chosen"),
    [
        ({"a:1": page(is_group=False, tokens={1: [9000, 10]}), "b:1": page()}, "b:1"),
        ({"a:1": page(is_group=False, tokens={1: [9, 10]}), "b:1": page(is_group=False)}, "b:1"),
        ({"a:1": page(is_group=False), "b:1": page(tokens={})}, "a:1"),
    ],
    ids=["a group before one process", "of processes the busiest", "a group that did nothing yet is passed over"],
)
def test_of_several_workers_the_one_that_is_meant_is_shown(monkeypatch, pages, chosen):
    workers = [SimpleNamespace(address=address) for address in pages]
    processes = {address: Samples.of(text, 0.0) for address, text in pages.items()}
    look = SimpleNamespace(info=SimpleNamespace(workers=workers), processes=processes)
    monkeypatch.setattr(command, "take_look", lambda client, now_s: look)
    result = CliRunner(env={"COLUMNS": "60", "NO_COLOR": "1"}).invoke(app, ["experts", "--ranks", "2"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == chosen
