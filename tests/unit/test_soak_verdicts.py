"""What `make soak` counts as a false alarm."""

import json

from tests.soak.verdicts import Strike, Verdicts

LOST, SUSPECT = "worker is unreachable", "worker is suspect"


def said(at_s, address, event=LOST):
    return json.dumps({"time": at_s, "event": event, "address": address, "detail": "it says nothing"})


STRIKES = [
    Strike("stop", "decode", "a", 100.0, 101.0),
    Strike("stop", "router", "r", 200.0, 203.0),
    Strike("stop", "router", "r", 300.0, 314.0),
    Strike("partition", "router", "r", 400.0, 414.0),
]


def test_only_what_was_done_to_a_worker_explains_that_it_is_called_lost():
    lines = [said(102.5, "a"), said(102.5, "b"), said(99.0, "a"), said(120.0, "a"), "no JSON", "{}"]
    found = Verdicts.of(lines, STRIKES)
    assert found.num_lost == 4
    assert found.false_alarms == [f"false alarm: {address}: it says nothing" for address in ("b", "a", "a")]


def test_a_router_that_was_away_shortly_explains_nothing_and_one_that_its_workers_gave_up_does():
    found = Verdicts.of([said(203.0, "a"), said(314.0, "a"), said(414.0, "a")], STRIKES)
    assert len(found.false_alarms) == 2


def test_to_suspect_a_worker_is_no_alarm():
    found = Verdicts.of([said(100.5, "a", SUSPECT), said(500.0, "b", SUSPECT)], STRIKES)
    assert (found.num_suspect, found.num_idly_suspect, found.num_lost, found.false_alarms) == (2, 1, 0, [])
