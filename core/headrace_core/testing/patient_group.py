"""A group of one whose rows arrive when somebody waits for them, and that says what was done in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headrace_core.ranks.group import Coming, OneRank


class PatientGroup(OneRank):
    """See `RankGroup`. `said` is told of each exchange when it begins and when it was waited for, with its `name`."""

    def __init__(self, said: list[str], name: str, on_wait: Callable[[], None] | None = None) -> None:
        self.said = said
        self._name = name
        self._on_wait = on_wait

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """See `RankGroup`."""
        return self.begin_exchange(rows, send, receive).wait()

    def begin_exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Coming:
        """See `RankGroup`; nothing is here before it is waited for."""
        self.said.append(f"{self._name} begins")
        return _Late(super().exchange(rows, send, receive), self._wait)

    def _wait(self) -> None:
        if self._on_wait is not None:
            self._on_wait()
        self.said.append(f"{self._name} waited")


class _Late:
    def __init__(self, rows: Tensor, wait: Callable[[], None]) -> None:
        self._rows: Tensor | None = rows
        self._wait = wait

    def wait(self) -> Tensor:
        """See `Coming`."""
        assert self._rows is not None, "waited for twice"
        rows, self._rows = self._rows, None
        self._wait()
        return torch.clone(rows)
