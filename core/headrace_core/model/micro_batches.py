"""Cut a decode step in two, so that one half's tokens can travel while the other's are computed."""

from __future__ import annotations

from collections.abc import Sequence

from headrace_core.batch.step import Chunk
from headrace_core.model.decode_graphs import is_decode_step


def cut(chunks: Sequence[Chunk], num_lanes: int, least_rows: int) -> tuple[list[Chunk], list[Chunk]] | None:
    """Return two halves of every lane's chunks, in their order; None: the step is better computed at once.

    So it is unless all of it decodes and every lane has `least_rows` at least. Then each lane has rows in either half,
    and so all ranks meet in both as often. Rows of one sequence, as of a draft, stay together: each reads what those
    before it write.
    """
    if not is_decode_step(chunks):
        return None
    halves: tuple[list[Chunk], list[Chunk]] = ([], [])
    for lane in range(num_lanes):
        rows = [chunk for chunk in chunks if chunk.lane == lane]
        middle = len(rows) // 2
        while middle > 0 and rows[middle - 1].key == rows[middle].key:
            middle -= 1
        if not middle or len(rows) < least_rows:
            return None
        halves[0].extend(rows[:middle])
        halves[1].extend(rows[middle:])
    return halves
