"""Who may ask this router for text: the keys of a file, and what each may take in a minute.

A limit is a bucket that is full at first and fills again within a minute. A request takes one from that of requests
before its message is read, and from that of tokens, once it has been read, all that it may come to: its prompt and
`max_tokens` for each of its samples. What it did not use comes back when it ends. More than a minute's tokens are let
through when the bucket is full, and make up for it afterwards. What a limit refuses takes nothing from it. Event loop
only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from headrace_core.api_keys import ApiKey, find, read_keys
from headrace_core.door import Call
from headrace_core.errors import OverloadedError, StartupError, UnauthenticatedError
from headrace_core.shares import Caller

from headrace_router.callers.caller import authorization_of, caller_of

log = logging.getLogger(__name__)

_OPEN = "/grpc.health."
"""What needs no key: probes have none."""
_BEARER = b"Bearer "
_MOST_FILE_BYTES = 4 << 20
_LOOK_S = 0.5
"""How often the file is looked at, at most."""
_LEAST_RETRY_S = 0.05

Clock = Callable[[], float]


class Bucket:
    """Fills with `per_minute` in a minute, and holds no more; 0: has no bottom."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._seen_s = clock()

    def take(self, amount: int) -> float:
        """Take `amount` if it is there, or if the bucket is full; return 0, or how long it takes until it will be."""
        if not self.per_minute:
            return 0.0
        now_s = self._clock()
        per_s = self.per_minute / 60
        self._level = min(self.per_minute, self._level + (now_s - self._seen_s) * per_s)
        self._seen_s = now_s
        missing = min(amount, self.per_minute) - self._level
        if missing > 0:
            return missing / per_s
        self._level -= amount
        return 0.0

    def give_back(self, amount: int) -> None:
        """Give back what was taken and not used."""
        self._level = min(self.per_minute, self._level + amount)


class Keys:
    """The file's keys; read again when it changes. One that can't be read any more leaves the keys as they were."""

    def __init__(self, path: Path, clock: Clock = time.monotonic, *, classes: Collection[str] = ()) -> None:
        """Read the file; `classes` are those that keys may have.

        Raises:
            StartupError: BAD_KEYS.
        """
        self._path = path
        self._clock = clock
        self._classes = classes
        self._looked_s = clock()
        self._stamp = self._look()
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}
        try:
            self._take(self._read())
        except (OSError, ValueError) as error:
            raise StartupError("BAD_KEYS", f"--keys-file {path}: {error}") from None

    def caller_of(self, context: Any) -> Caller:
        """Return who makes a call: its key, wherever it calls from; its address, if it shows none of ours."""
        key = self._shown(context)
        return Caller(f"key:{key.name}", f"key:{key.name}") if key else caller_of(context, is_asked=True)

    def guard(self, call: Call) -> None:
        """Refuse calls without a key; a `door.Guard`.

        Raises:
            UnauthenticatedError: BAD_API_KEY.
        """
        if not call.method.startswith(_OPEN) and self._shown(call.context) is None:
            raise UnauthenticatedError(
                "BAD_API_KEY", "send a key of this router as metadata `authorization: Bearer KEY`"
            )

    def take_request(self, context: Any, count: int = 1) -> None:
        """Count a request, or several, against their key's limit.

        Raises:
            OverloadedError: RATE_LIMITED.
        """
        key = self._shown(context)
        if key is not None:
            _refuse(key, self._requests[key.name].take(count), f"{key.requests_per_minute} requests")

    def take_tokens(self, caller: Caller, amount: int) -> Callable[[int], None]:
        """Count tokens that a request may use; return what to tell, once, how many it did use.

        Raises:
            OverloadedError: RATE_LIMITED.
        """
        name = caller.name.removeprefix("key:")
        bucket, key = self._tokens.get(name), self._keys.get(name)
        if bucket is None or key is None:  # taken out of the file meanwhile: its requests under way may end
            return _nothing
        _refuse(key, bucket.take(amount), f"{key.tokens_per_minute} tokens")
        return lambda used: bucket.give_back(amount - used)

    def slo_class_of(self, caller: Caller) -> str:
        """Return the class of a caller's requests that name none; empty: it has none."""
        key = self._keys.get(caller.name.removeprefix("key:"))
        return key.slo_class if key else ""

    def _shown(self, context: Any) -> ApiKey | None:
        self._refresh()
        authorization = authorization_of(context)
        return find(self._keys, authorization[len(_BEARER) :]) if authorization.startswith(_BEARER) else None

    def _refresh(self) -> None:
        now_s = self._clock()
        if now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(self._read())
            log.info("read the keys again", extra={"path": str(self._path), "keys": len(self._keys)})
        except (OSError, ValueError) as error:
            data = {"path": str(self._path), "problem": str(error), "kept": len(self._keys)}
            log.error("can't read the keys", extra=data)

    def _look(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> dict[str, ApiKey]:
        with self._path.open("rb") as file:
            content = file.read(_MOST_FILE_BYTES + 1)
        if len(content) > _MOST_FILE_BYTES:
            raise ValueError(f"it is larger than {_MOST_FILE_BYTES >> 20} MiB")
        return read_keys(content)

    def _take(self, keys: dict[str, ApiKey]) -> None:
        for key in keys.values():
            if key.slo_class and key.slo_class not in self._classes:
                raise ValueError(f"[{key.name}] slo_class {key.slo_class!r} is not in --slo-classes")
        self._keys = keys
        self._requests = self._buckets(self._requests, {key.name: key.requests_per_minute for key in keys.values()})
        self._tokens = self._buckets(self._tokens, {key.name: key.tokens_per_minute for key in keys.values()})

    def _buckets(self, before: dict[str, Bucket], limits: dict[str, int]) -> dict[str, Bucket]:
        """Return a bucket for each limit: the one before, where the limit is the same."""
        kept = {name: bucket for name, bucket in before.items() if limits.get(name) == bucket.per_minute}
        return {name: kept.get(name) or Bucket(limit, self._clock) for name, limit in limits.items()}


def _refuse(key: ApiKey, wait_s: float, limit: str) -> None:
    if wait_s:
        wait_s = max(wait_s, _LEAST_RETRY_S)
        raise OverloadedError(
            "RATE_LIMITED",
            f"the key {key.name} may take {limit} a minute; try again in {wait_s:.1f} s",
            retry_after_s=wait_s,
        )


def _nothing(_: int) -> None:
    pass
