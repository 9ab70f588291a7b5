"""`headrace top`: frames of what real processes once served, and what is made of looks that come and go."""

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from headrace_client.client import Client
from headrace_client.commands import top
from headrace_client.results import ServerInfo, Worker
from headrace_client.top import history
from headrace_client.top.frame import render
from headrace_client.top.history import WINDOW_S, History, Look
from headrace_client.top.samples import Histogram, Samples
from headrace_core.errors import UnauthenticatedError, UnavailableError
from headrace_core.testing.fake_router import FakeRouter
from rich.console import Console

RECORDED = Path(__file__).parent / "top_recorded"
"""/metrics of a router, a prefill and a decode worker under load, half a minute apart; less what top does not read."""
SERVER = "127.0.0.1:50050"
PREFILL, DECODE, GONE = "127.0.0.1:42813", "127.0.0.1:40901", "127.0.0.1:46165"


def worker(address, role, state="ready", **counts):
    counts = {"num_pages": 170, "num_free_pages": 161, "num_running": 2, "num_waiting": 1, "num_leases": 0, **counts}
    return Worker(address, role, state, detail="", transports=(), transport_in_use="", transfer_bytes_per_s=0, **counts)


WORKERS = (
    worker(DECODE, "decode"),
    worker(PREFILL, "prefill", num_free_pages=170, num_running=0, num_waiting=0, num_leases=3),
    replace(worker(GONE, "decode", "unreachable"), detail="connection refused"),
)
INFO = ServerInfo("model", "f574b27e43e5922b", 4096, WORKERS, num_queued=1, num_running=6, version="0.1.0")


def look(number, at_s, info=INFO):
    names = {"": "router", PREFILL: "prefill", DECODE: "decode"}
    processes = {
        name: Samples.of((RECORDED / f"{role}-{number}.txt").read_text(), at_s) for name, role in names.items()
    }
    return Look(at_s, info, processes)


def lines(view, width=100, height=None):
    """Return a frame as a terminal shows it."""
    console = Console(width=width, file=io.StringIO())
    console.print(render(view, SERVER, width=width, height=height))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def both_looks():
    seen = History()
    seen.add(look(1, 1000.0))
    return seen.add(look(2, 1030.0))


def counters(at_s, **values):
    return Samples(at_s, {name: {frozenset(): value} for name, value in values.items()})


def test_a_frame_has_what_came_between_two_looks():
    assert lines(both_looks()) == WIDE.splitlines()


def test_where_it_is_narrow_what_matters_less_is_left_out():
    frame = lines(both_looks(), width=44)
    assert frame == NARROW.splitlines()
    assert max(map(len, frame)) <= 44


def test_one_look_alone_shows_all_since_the_processes_began():
    assert lines(History().add(look(2, 1030.0)))[:9] == ALONE.splitlines()


def test_metrics_that_cannot_be_read_are_dashes():
    frame = lines(History().add(Look(0.0, INFO, {})))
    assert "the router's metrics can't be read" in frame[1]
    assert "TTFT       -    -    -    -         0" in frame
    assert any(
        line.startswith(f"{DECODE}  decode   ready          5 %        2        1       0         -") for line in frame
    )
    assert "hand-offs  0 in flight; failures: none" in frame
    assert "experts  no token was routed" in frame


def test_without_workers_it_says_so():
    assert "no workers" in lines(History().add(Look(0.0, replace(INFO, workers=()), {})))


def test_more_workers_than_there_are_lines_are_counted():
    many = tuple(worker(f"10.0.0.{number}:1", "decode") for number in range(30))
    view = History().add(Look(0.0, replace(INFO, workers=many), {}))
    assert sum("10.0.0." in line for line in lines(view)) == 30
    frame = lines(view, height=40)
    assert sum("10.0.0." in line for line in frame) == 16
    assert "and 14 more" in frame
    assert len(frame) <= 40


def test_percentiles_are_those_of_prometheus():
    found = Histogram(((0.1, 10.0), (0.2, 30.0), (math.inf, 40.0)))
    assert found.quantile(0.25) == pytest.approx(0.1)
    assert found.quantile(0.5) == pytest.approx(0.15)
    assert found.quantile(0.99) == 0.2, "of what is past the last edge only that is known"
    assert Histogram().quantile(0.5) is Histogram(((0.1, 0.0), (math.inf, 0.0))).quantile(0.5) is None
    assert (found + found).count == 80
    assert Histogram() + found == found + Histogram() == found


def test_a_process_that_was_started_again_counts_from_its_beginning():
    before = counters(0.0, headrace_a_total=5.0, headrace_b_total=1.0, headrace_gauge=7.0)
    after = counters(9.0, headrace_a_total=2.0, headrace_b_total=3.0, headrace_gauge=4.0)
    assert after.since(before) is after
    later = counters(10.0, headrace_a_total=6.0, headrace_b_total=3.0, headrace_gauge=4.0)
    assert [later.since(before).total(f"headrace_{name}") for name in ("a_total", "b_total", "gauge")] == [
        1.0,
        2.0,
        4.0,
    ]


def test_a_minute_is_looked_back_and_no_more():
    seen = History()
    for second in range(0, 200, 2):
        view = seen.add(Look(float(second), INFO, {"": counters(float(second), headrace_x_total=float(second))}))
        news = view.news[""]
        assert news.span_s == view.span_s == min(second, WINDOW_S)
        assert news.samples.total("headrace_x_total") == news.span_s
        assert news.rate("headrace_x_total") == (1.0 if second else 0.0)


def test_a_worker_that_came_later_counts_from_its_first_look():
    seen = History()
    seen.add(Look(0.0, INFO, {"": counters(0.0)}))
    first = counters(10.0, headrace_x_total=100.0)
    assert seen.add(Look(10.0, INFO, {"": counters(10.0), DECODE: first})).news[DECODE].span_s == 0.0
    again = counters(20.0, headrace_x_total=150.0)
    news = seen.add(Look(20.0, INFO, {"": counters(20.0), DECODE: again})).news[DECODE]
    assert (news.samples.total("headrace_x_total"), news.span_s) == (50.0, 10.0)


def test_a_router_that_goes_away_is_told_of_and_asked_again(monkeypatch):
    console = Console(width=100, height=40, force_terminal=True, file=io.StringIO())
    came = [
        look(2, 1030.0),
        UnavailableError("UNREACHABLE", "no connection to a router"),
        look(2, 1032.0),
        KeyboardInterrupt(),
    ]
    shown = []

    def take_look(client, at_s):
        shown.append(console.file.getvalue())
        console.file.truncate(0)
        answer = came.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(top, "stdout", console)
    monkeypatch.setattr(top, "take_look", take_look)
    monkeypatch.setattr(top.time, "sleep", lambda seconds: None)
    seen = History()
    with Client(SERVER) as client:
        top._watch(client, seen, seen.add(look(1, 1000.0)), 2.0)
    _, before, during, after = shown
    assert "asking again" not in before
    assert "no connection to a router; asking again. Below is what was last seen." in during
    assert "last 30 s" in before
    assert "last 30 s" in during
    assert "asking again" not in after
    assert "last 32 s" in after


def test_a_terminal_that_can_only_write_on_gets_frames_one_below_the_other(monkeypatch):
    console = Console(width=100, force_terminal=True, file=io.StringIO(), _environ={"TERM": "dumb"})
    came = [look(2, 1030.0), look(2, 1032.0)]

    def take_look(client, at_s):
        if not came:
            raise KeyboardInterrupt
        return came.pop(0)

    monkeypatch.setattr(top, "stdout", console)
    monkeypatch.setattr(top, "take_look", take_look)
    monkeypatch.setattr(top.time, "sleep", lambda seconds: None)
    seen = History()
    with Client(SERVER) as client:
        top._watch(client, seen, seen.add(look(1, 1000.0)), 2.0)
    written = console.file.getvalue()
    assert written.index("last 30 s") < written.index("last 32 s")


def test_a_token_that_is_wrong_is_no_trouble_to_wait_out():
    with FakeRouter(token="secret") as router, Client(router.address) as client, pytest.raises(UnauthenticatedError):
        history.take_look(client, 0.0)


WIDE = """\
model  f574b27e43e5  context 4096  127.0.0.1:50050  last 30 s
6 requests running, 1 queued; 126.1 tokens/s, 47 answered

latency       p25       p50       p90       p99  observed
TTFT     190.0 ms  589.3 ms    1.95 s    2.44 s        48
ITL       17.6 ms   27.9 ms   69.1 ms  169.8 ms     3,736
E2E        1.99 s    3.10 s    4.84 s    9.22 s        47
queue      1.5 ms   12.5 ms  472.0 ms  764.8 ms        47

worker           role     state        pages  running  waiting  leases  tokens/s  step p50  hits
127.0.0.1:40901  decode   ready          5 %        2        1       0      62.5   22.3 ms  86 %
127.0.0.1:42813  prefill  ready          0 %        0        0       3      54.0  130.0 ms  86 %
127.0.0.1:46165  decode   unreachable      -        -        -       -         -         -     -
127.0.0.1:46165: connection refused

hand-offs    moved     moved/s  while moving     p50      p99  hidden
shm        1.1 MiB  36.8 KiB/s     7.6 MiB/s  7.9 ms  88.5 ms     0 %
0 in flight; failures: none

experts  fullest/mean  expert  its share
layer 2          1.52       1       19 %  ████
layer 3          1.30       7       16 %  ███
layer 1          1.24       5       15 %  ███
"""
NARROW = """\
model  f574b27e43e5  context 4096
127.0.0.1:50050  last 30 s
6 requests running, 1 queued; 126.1
tokens/s, 47 answered

latency       p50       p90       p99
TTFT     589.3 ms    1.95 s    2.44 s
ITL       27.9 ms   69.1 ms  169.8 ms
E2E        3.10 s    4.84 s    9.22 s
queue     12.5 ms  472.0 ms  764.8 ms

worker           role     state        pages
127.0.0.1:40901  decode   ready          5 %
127.0.0.1:42813  prefill  ready          0 %
127.0.0.1:46165  decode   unreachable      -
127.0.0.1:46165: connection refused

hand-offs     moved/s  while moving
shm        36.8 KiB/s     7.6 MiB/s
0 in flight; failures: none

experts  fullest/mean  expert  its share
layer 2          1.52       1       19 %
layer 3          1.30       7       16 %
layer 1          1.24       5       15 %
"""
ALONE = """\
model  f574b27e43e5  context 4096  127.0.0.1:50050  since the processes began
6 requests running, 1 queued; 241 answered

latency       p25       p50       p90       p99  observed
TTFT     411.1 ms  775.6 ms    2.09 s    2.47 s       248
ITL       22.7 ms   42.7 ms  104.1 ms  199.8 ms    20,308
E2E        2.89 s    4.98 s    9.44 s   14.00 s       241
queue      1.3 ms   13.0 ms  834.5 ms    1.60 s       241

"""
