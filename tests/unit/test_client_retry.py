"""The retry policy alone: no network, a clock and a die of its own."""

import pytest
from headrace_client.retry import Attempts, RetryPolicy
from headrace_core.errors import (
    DeadlineError,
    HandoffLostError,
    HeadraceError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)

POLICY = RetryPolicy(max_attempts=5, first_pause_s=1.0, longest_pause_s=3.0)
FULL = OverloadedError("QUEUE_FULL", "full")


def test_pauses_double_up_to_the_longest_and_end():
    attempts = Attempts(POLICY, None, draw=lambda: 1.0)
    assert [attempts.pause_after(FULL) for _ in range(4)] == [1.0, 2.0, 3.0, 3.0]
    with pytest.raises(OverloadedError):
        attempts.pause_after(FULL)


def test_a_pause_is_drawn_from_zero_to_its_limit():
    assert Attempts(POLICY, None, draw=lambda: 0.25).pause_after(UnavailableError("DRAINING", "bye")) == 0.25


def test_what_the_router_says_comes_on_top():
    full = OverloadedError("QUEUE_FULL", "full", retry_after_s=0.5)
    attempts = Attempts(POLICY, None, draw=lambda: 0.0)
    assert attempts.pause_after(full) == 0.5
    patient = OverloadedError("QUEUE_FULL", "full", retry_after_s=1e6)
    assert attempts.pause_after(patient) == POLICY.longest_pause_s


def test_no_pause_reaches_past_the_deadline():
    now = [0.0]
    attempts = Attempts(POLICY, 2.5, draw=lambda: 1.0, clock=lambda: now[0])
    assert attempts.pause_after(FULL) == 1.0
    now[0] = 1.0
    assert attempts.remaining_s() == 1.5
    with pytest.raises(OverloadedError):
        attempts.pause_after(FULL)
    now[0] = 9.0
    assert attempts.remaining_s() == 0.0


@pytest.mark.parametrize("kind", [InvalidRequestError, DeadlineError, HandoffLostError, HeadraceError])
def test_other_errors_are_final(kind):
    with pytest.raises(kind):
        Attempts(POLICY, None).pause_after(kind("X", "x"))


def test_what_the_router_has_tried_enough_is_not_tried_again():
    with pytest.raises(UnavailableError):
        Attempts(POLICY, None).pause_after(UnavailableError("RETRIES_EXHAUSTED", "2 attempts failed"))


def test_one_attempt_means_no_retry():
    with pytest.raises(OverloadedError):
        Attempts(RetryPolicy(max_attempts=1), None).pause_after(FULL)


def test_no_try_begins_after_the_longest_wait_and_the_error_says_how_long_it_was():
    now = [0.0]
    attempts = Attempts(RetryPolicy(longest_wait_s=30.0), None, draw=lambda: 1.0, clock=lambda: now[0])
    assert attempts.pause_after(UnavailableError("DRAINING", "bye")) > 0
    now[0] = 30.25
    with pytest.raises(
        UnavailableError, match=r"no decode worker is ready \(given up after 2 tries in 30.2 s\)"
    ) as caught:
        attempts.pause_after(UnavailableError("NO_WORKERS", "no decode worker is ready"))
    assert caught.value.reason == "NO_WORKERS"


def test_a_time_limit_that_passed_says_what_was_missing_and_what_the_last_try_met():
    now = [0.0]
    attempts = Attempts(POLICY, 5.0, draw=lambda: 0.0, clock=lambda: now[0])
    attempts.pause_after(OverloadedError("QUEUE_FULL", "full"))
    now[0] = 5.0
    with pytest.raises(DeadlineError) as caught:
        attempts.pause_after(DeadlineError("DEADLINE_EXCEEDED", "Deadline Exceeded"))
    said = "the time limit passed before anything of the answer came, after 5.0 s; the try before ended with: full"
    assert str(caught.value) == said
