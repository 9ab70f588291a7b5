"""Stop strings: found wherever token borders fall, and nothing of them is ever shown."""

from itertools import pairwise

from headrace_router.text.stop import StopMatcher
from hypothesis import given
from hypothesis import strategies as st

_TEXTS = st.text(alphabet="ab", max_size=30)
_STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


def _cut(text, borders):
    edges = [0, *sorted({border % (len(text) + 1) for border in borders}), len(text)]
    return [text[low:high] for low, high in pairwise(edges)]


def _expected(text, stops):
    """Return (text shown, stop string) by trying every end in order; of those that end there, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, ""


@given(_TEXTS, _STOPS, st.lists(st.integers(0, 30), max_size=8))
def test_any_cut_gives_the_same_text_and_match(text, stops, borders):
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece) for piece in _cut(text, borders))
    shown += matcher.finish()
    assert (shown, matcher.matched) == _expected(text, stops)


@given(_TEXTS, _STOPS)
def test_no_more_is_held_back_than_may_begin_a_stop_string(text, stops):
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(char) for char in text)
    if not matcher.matched:
        held = text[len(shown) :]
        begins = [n for n in range(len(text) + 1) for stop in stops if n < len(stop) and text.endswith(stop[:n])]
        assert len(held) == max(begins)


def test_text_after_the_match_is_dropped():
    matcher = StopMatcher(["END"])
    assert [matcher.push(piece) for piece in ("one E", "ND two", "three")] == ["one ", "", ""]
    assert matcher.matched == "END"
    assert matcher.finish() == ""


def test_held_back_text_is_shown_when_it_can_not_be_a_stop_string():
    matcher = StopMatcher(["\n\nHuman:"])
    assert matcher.push("a\n\nHu") == "a"
    assert matcher.push("ge") == "\n\nHuge"
