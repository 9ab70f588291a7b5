"""Threads that the workers of one machine lend each other: whoever computes has those of the ones that do not.

In a folder that they share each worker has a file of two bytes: how many threads are its own, and whether it computes.
Who computes looks at the others' before a step and after each layer, and takes its share of the threads of those that
don't. Nothing is asked for, granted or given back, so nothing can be kept: whoever begins to compute does so at once,
on its own threads, and the other one sees it a layer later.

A file is locked for as long as its worker lives; the system drops the lock of one that died. Who sees a file that
nobody locks removes it, and with it the dead worker's threads: nobody has those any more.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from headrace_core.errors import StartupError

_LOOK_S = 1.0
"""How often it is looked for workers that came and that died."""
_MOST_THREADS = 255


class LentThreads:
    """One worker's side. Engine thread only, but to construct and to close it, before that runs and when it ended."""

    def __init__(self, folder: Path, num_own: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Make the worker known in `folder`, which is made if it is not there.

        Raises:
            StartupError: NO_LENDING, no file can be locked there, or `num_own` is not a number of threads to lend.
        """
        if not 0 < num_own <= _MOST_THREADS:
            raise StartupError("NO_LENDING", f"--lend-threads with --threads {num_own}: say how many, 1 to 255")
        self._folder, self._num_own, self._clock = folder, num_own, clock
        self._is_busy = False
        self._others: dict[str, int] = {}
        self._looks_at = float("-inf")
        scratch = folder / f".{os.getpid()}-{secrets.token_hex(4)}"
        self._path = folder / scratch.name[1:]
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            os.pwrite(self._file, bytes((num_own, 0)), 0)
            # Others see it when it is whole and locked.
            scratch.rename(self._path)
        except OSError as error:
            raise StartupError("NO_LENDING", f"--lend-threads {folder}: {error}; name a folder of this user") from error

    def take(self) -> int:
        """Return on how many threads to compute now: its own, and its share of those that others lend."""
        if not self._is_busy:
            self._tell(is_busy=True)
        now = self._clock()
        if now >= self._looks_at:
            self._looks_at = now + _LOOK_S
            self._look()
        num_idle, names = 0, [self._path.name]
        for name, file in self._others.items():
            num_threads, is_busy = os.pread(file, 2, 0)
            if is_busy:
                names.append(name)
            else:
                num_idle += num_threads
        share, rest = divmod(num_idle, len(names))
        return self._num_own + share + (sorted(names).index(self._path.name) < rest)

    def rest(self) -> None:
        """Lend all threads until the next `take`. Idempotent."""
        if self._is_busy:
            self._tell(is_busy=False)

    def close(self) -> None:
        """Be known no more."""
        self._path.unlink(missing_ok=True)
        for file in (self._file, *self._others.values()):
            os.close(file)
        self._others.clear()

    def _tell(self, *, is_busy: bool) -> None:
        os.pwrite(self._file, bytes((is_busy,)), 1)
        self._is_busy = is_busy

    def _look(self) -> None:
        """Forget who died or went, and find who came."""
        for name, file in list(self._others.items()):
            if _is_dead(file):
                (self._folder / name).unlink(missing_ok=True)
                os.close(self._others.pop(name))
        try:
            names = [name for name in os.listdir(self._folder) if not name.startswith(".")]
        except OSError:
            return
        for name in names:
            if name not in self._others and name != self._path.name:
                self._open(name)

    def _open(self, name: str) -> None:
        try:
            file = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return  # it went just now
        if len(os.pread(file, 2, 0)) == 2:
            self._others[name] = file
        else:
            os.close(file)


def _is_dead(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
