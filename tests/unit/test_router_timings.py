"""The waterfall's parts sum to the whole, whatever workers report."""

from headrace_router.timings import Waterfall
from hypothesis import given
from hypothesis import strategies as st

_GAPS = st.floats(-0.001, 10)
_REPORTS = st.lists(st.integers(-5, 10**8), max_size=3)


@given(st.floats(0, 1e6), st.lists(st.tuples(_GAPS, _REPORTS, st.booleans()), max_size=12))
def test_phases_sum_to_the_total_and_to_ttft(start_s, steps):
    waterfall, now_s = Waterfall(start_s), start_s
    for gap_s, reports, is_first in steps:
        now_s += gap_s
        waterfall.split([(f"part{i}", us) for i, us in enumerate(reports)], "rest", now_s)
        if is_first:
            waterfall.mark_first_token()
    durations = [phase.duration_us for phase in waterfall.phases]
    assert all(duration >= 0 for duration in durations)
    assert sum(durations) == waterfall.total_us
    before = sum(phase.duration_us for phase in waterfall.phases if phase.is_before_first_token)
    assert before == (waterfall.total_us if waterfall.ttft_us is None else waterfall.ttft_us)


def test_reports_are_nested_in_what_the_router_measured():
    waterfall = Waterfall(1.0)
    waterfall.split([("prefill_queue", 200), ("prefill", 10**9)], "prefill_rpc", 1.001)
    assert [(phase.name, phase.duration_us) for phase in waterfall.phases] == [
        ("prefill_queue", 200),
        ("prefill", 800),
        ("prefill_rpc", 0),
    ]


def test_what_was_moved_meanwhile_is_in_no_sum_and_no_longer_than_there_was_time():
    waterfall = Waterfall(1.0)
    waterfall.split([("prefill", 700)], "prefill_hop", 1.001)
    phases = list(waterfall.phases)
    waterfall.hide(400)
    assert (waterfall.hidden_us, waterfall.total_us, waterfall.phases) == (400, 1000, phases)
    waterfall.hide(1 << 63)
    assert waterfall.hidden_us == 1000
