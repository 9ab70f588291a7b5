"""The compiled kernels: found, loaded, called.

The library holds each family once for every instruction set it was built for (`build`); which one runs is decided here,
once, by what the machine has. Without the library, or on a machine without such instructions, nothing here is called:
kernels run on plain torch.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("headrace_cpu.so")
"""Where `build` puts the library, and where a wheel carries it."""

_log = logging.getLogger(__name__)

_NARROWER = {"avx512": "avx2"}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


@functools.cache
def isa() -> str:
    """Return the instruction set that kernels run on: "avx512", "avx2", "neon"; "" where none of them can.

    The wider one is compared with the narrower one first, and does not run where they differ.
    """
    library = _library()
    narrower = _NARROWER.get(library.isa)
    if narrower is not None:
        from headrace_kernels.cpu.agreement import do_agree

        wider = library.isa
        if not do_agree(library.use, narrower, wider):
            _log.error(
                "compiled kernels for %s and %s disagree here: %s runs; please report it", wider, narrower, narrower
            )
            library.use(narrower)
    return library.isa


def is_available() -> bool:
    """Return whether compiled kernels run here."""
    return bool(isa())


def takes(dtype: torch.dtype) -> bool:
    """Return whether compiled kernels compute on `dtype`."""
    return dtype in _DTYPES


def call(name: str, arguments: ctypes.Structure, dtype: torch.dtype) -> None:
    """Run entry `name` on as many threads as torch has.

    Raises:
        MemoryError: there is none for what it works on.
    """
    library = _library()
    library.set_num_threads(torch.get_num_threads())
    if library.entry(name)(ctypes.byref(arguments), _DTYPES[dtype]):
        raise MemoryError(f"no memory for what kernel {name} works on")


class _Library:
    def __init__(self) -> None:
        self.isa = ""
        self._num_threads = 1
        self._entries: dict[str, Any] = {}
        if not PATH.exists():
            return
        self._dll = ctypes.CDLL(str(PATH))
        self._dll.headrace_isa.restype = ctypes.c_char_p
        self.isa = self._dll.headrace_isa().decode()

    def entry(self, name: str) -> Any:
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = getattr(self._dll, f"headrace_{name}_{self.isa}")
            entry.argtypes = [ctypes.c_void_p, ctypes.c_int]
        return entry

    def use(self, isa: str) -> None:
        self.isa = isa
        self._entries.clear()

    def set_num_threads(self, count: int) -> None:
        if count != self._num_threads:
            self._dll.headrace_set_num_threads(count)
            self._num_threads = count


@functools.cache
def _library() -> _Library:
    return _Library()
