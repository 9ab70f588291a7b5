"""A group of one whose rows arrive when somebody waits for them, and that says what was done in which order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace_core.ranks.group import Coming, OneRank


class PatientGroup(OneRank):
    """See `RankGroup`. `said`: "begin" and "wait" of each exchange, and what others append."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """See `RankGroup`."""
        return self.begin_exchange(rows, send, receive).wait()

    def begin_exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Coming:
        """See `RankGroup`; nothing is here before it is waited for."""
        self.said.append("begin")
        return _Late(super().exchange(rows, send, receive), self.said)


class _Late:
    def __init__(self, rows: Tensor, said: list[str]) -> None:
        self._rows: Tensor | None = rows
        self._said = said

    def wait(self) -> Tensor:
        """See `Coming`."""
        assert self._rows is not None, "waited for twice"
        rows, self._rows = self._rows, None
        self._said.append("wait")
        return torch.clone(rows)
