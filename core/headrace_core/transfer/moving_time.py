"""How long something of a hand-off was moving, however many runs at once. Event loop only."""

from __future__ import annotations

from collections.abc import Callable


class MovingTime:
    """See the module: whatever moves is a context of it while it does. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._num_moving = 0
        self._since_s = 0.0
        self._before_s = 0.0

    @property
    def seconds(self) -> float:
        """Until now."""
        return self._before_s + (self._clock() - self._since_s if self._num_moving else 0.0)

    async def __aenter__(self) -> None:
        if not self._num_moving:
            self._since_s = self._clock()
        self._num_moving += 1

    async def __aexit__(self, *_: object) -> None:
        if self._num_moving == 1:
            self._before_s = self.seconds
        self._num_moving -= 1
