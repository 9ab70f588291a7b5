"""What became of a token, as the clients of `make stress` and `make soak` tell it."""

import pytest

from tests.load.clients import fault_of

WANTED = (3, 1, 4, 1, 5, 9, 2, 6)


@pytest.mark.parametrize(
    ("got", "fault"),
    [
        (WANTED[:5], "lost"),
        ((3, 1, 4, 5, 9, 2, 6), "lost"),
        ((3, 1, 4, 5, 9, 2, 6, 7), "lost"),
        ((3, 1, 4, 4, 1, 5, 9, 2, 6), "twice"),
        ((3, 1, 4, 3, 1, 4, 1, 5), "twice"),
        ((3, 1, 4, 1, 5, 9, 2, 6, 6), "twice"),
        ((3, 1, 4, 1, 5, 9, 8, 6), "wrong"),
        ((3, 1, 4, 1, 5, 9, 2, 6, 5), "wrong"),
    ],
)
def test_an_answer_that_differs_is_named_by_how(got: tuple[int, ...], fault: str):
    assert fault_of(((got, "length", ""),), ((WANTED, "length", ""),)) == fault


def test_an_answer_that_only_ends_for_another_reason_is_wrong():
    assert fault_of(((WANTED, "stop", "x"),), ((WANTED, "length", ""),)) == "wrong"
