"""docs/reliability.md shows every cell of the failure matrix, as the matrix is played."""

from tests.matrix.page import PAGE, read_rows, rows, wanted_ends, why_not
from tests.matrix.table import EVENTS, PHASES, cells


def test_the_page_has_a_row_for_every_event_and_a_cell_for_every_phase():
    assert read_rows(PAGE.read_text()) == rows(wanted_ends()), "run `make matrix` and `python -m tests.matrix.page`"


def test_the_page_says_of_every_cell_that_is_not_played_why():
    page = PAGE.read_text()
    assert [reason for reason in why_not() if reason not in page] == []


def test_every_cell_is_played_or_has_a_reason():
    num_excluded = sum(len(event.excluded) for event in EVENTS)
    assert len(cells("grpc")) + num_excluded == len(EVENTS) * len(PHASES)
