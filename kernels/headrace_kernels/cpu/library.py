"""The compiled kernels: found, loaded, called.

The library holds each family once for every instruction set it was built for (`build`); which one runs is decided here,
once, by what the machine has. Where there is no library, or one of other sources, or on a machine without such
instructions, nothing here is called: kernels run on plain torch, and `problem` says why.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from headrace_kernels.cpu.build import LIBRARY, is_current

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def isa() -> str:
    """Return the instruction set that kernels run on: "avx512", "avx2", "neon"; "" where none of them can."""
    return _library().isa


def use(isa: str) -> None:
    """Let kernels that are called next run on `isa`, which this machine must have."""
    _library().use(isa)


def problem() -> str | None:
    """Return why compiled kernels can't run here; None: they can."""
    return _library().problem


class Counters(NamedTuple):
    """What compiled kernels have done since the process began, or between two moments (`since`)."""

    calls: int
    """Kernels called."""
    stages: int
    """Parts of them that threads share out; a thread that has nothing left to do waits for the end of each."""
    call_ns: int
    """Nanoseconds that callers spent in them, without waiting for others' calls."""
    busy_ns: int
    """Nanoseconds that all threads spent on their parts."""

    def since(self, before: Counters) -> Counters:
        """Return what was counted after `before`."""
        return Counters(*(now - then for now, then in zip(self, before, strict=True)))


def counters() -> Counters:
    """Return what was counted so far; zeros where there is no library."""
    return _library().counters()


def takes(dtype: torch.dtype) -> bool:
    """Return whether compiled kernels compute on `dtype`."""
    return dtype in _DTYPES


def call(name: str, arguments: ctypes.Structure, dtype: torch.dtype) -> None:
    """Run entry `name` on as many threads as torch has here; calls of several threads take turns.

    Raises:
        MemoryError: there is none for what it works on.
    """
    entry = _library().entry(name)
    if entry(ctypes.byref(arguments), _DTYPES[dtype], torch.get_num_threads()):
        raise MemoryError(f"no memory for what kernel {name} works on")
    if recorder.add is not None:
        recorder.add(ctypes.cast(entry, ctypes.c_void_p).value, arguments, _DTYPES[dtype])


def replay(calls: ctypes.Array[Any], first: int, end: int) -> None:
    """Make calls `first` ... `end` of a tape (`tape`) on as many threads as torch has here.

    Raises:
        MemoryError: there is none for what they work on.
    """
    at = ctypes.byref(calls, first * ctypes.sizeof(calls) // len(calls))
    if _library().replay(at, end - first, torch.get_num_threads()):
        raise MemoryError("no memory for what the kernels of a step work on")


class _Recorder(threading.local):
    """Who is told of this thread's calls, if anybody is: the entry's address, its arguments and its dtype."""

    add: Callable[[Any, ctypes.Structure, int], None] | None = None


recorder = _Recorder()


class Library:
    """The library at `path`, and the instruction set its kernels run on; `isa` None: the best that the machine has."""

    def __init__(self, path: Path, isa: str | None = None) -> None:
        self.isa, self.problem = "", self._load(path)
        self._entries: dict[str, Any] = {}
        if self.problem is None:
            self._dll.headrace_isa.restype = ctypes.c_char_p
            self.replay = self._dll.headrace_replay
            self.replay.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
            self.isa = isa or self._dll.headrace_isa().decode()
            if not self.isa:
                self.problem = "this processor has none of the instructions they are compiled for (AVX2, AVX512)"

    def entry(self, name: str) -> Any:
        """Return the function of entry `name`."""
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = getattr(self._dll, f"headrace_{name}_{self.isa}")
            entry.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        return entry

    def counters(self) -> Counters:
        """See the function of this name."""
        found = (ctypes.c_int64 * len(Counters._fields))()
        if self.problem is None:
            self._dll.headrace_counters(found)
        return Counters(*found)

    def use(self, isa: str) -> None:
        """See the function of this name."""
        self.isa = isa
        self._entries.clear()

    def _load(self, path: Path) -> str | None:
        if not path.exists():
            return f"the library of compiled CPU kernels, {path}, is not there: `make setup` builds it"
        # Arguments are structures that both sides must see alike: another version would read beyond them.
        if not is_current(path):
            return f"{path} was built from other sources: `make setup` builds it"
        try:
            self._dll = ctypes.CDLL(str(path))
        except OSError as error:
            return f"the library of compiled CPU kernels can't be loaded: {error}"
        return None


@functools.cache
def _library() -> Library:
    return Library(LIBRARY)
