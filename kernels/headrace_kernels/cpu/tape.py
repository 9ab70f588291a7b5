"""A series of kernel calls, recorded once and made again without Python in between: `src/tape.cpp`.

What a step computes is the same series of calls on the same memory whoever is in it, if its inputs lie in memory that
stays. So it is run once while it is recorded: its tensors come from an `Arena`, each compiled kernel's call is kept
with its arguments, and so is each operation of plain torch, if it is one of few that can be made again into the same
memory. One that is not, or that nobody thought of, makes the recording useless: the tape has a `problem` then.

Nothing recorded may depend on values: a kernel reads them when it runs, Python would have read those of the recording.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headrace_kernels.cpu import library
from headrace_kernels.cpu.arena import Arena

Mark = Callable[[str], None]
"""Told that what was computed since the last mark was the operation of this name."""

T = TypeVar("T")
_aten = torch.ops.aten
_EMPTY = (
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
)
_AGAIN: dict[Any, Any] = {
    _aten.add.Tensor: _aten.add.out,
    _aten.cat.default: _aten.cat.out,
    _aten.cos.default: _aten.cos.out,
    _aten.div.Tensor_mode: _aten.div.out_mode,
    _aten.index_select.default: _aten.index_select.out,
    _aten.mul.Scalar: _aten.mul.Scalar_out,
    _aten.mul.Tensor: _aten.mul.out,
    _aten.sin.default: _aten.sin.out,
    _aten.stack.default: _aten.stack.out,
}


class _Call(ctypes.Structure):
    _fields_ = (("entry", ctypes.c_void_p), ("arguments", ctypes.c_void_p), ("dtype", ctypes.c_int64))


class Tape:
    """What was recorded. Engine thread only."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self._parts: list[_Kernels | _Operation] = []

    def replay(self, mark: Mark | None = None) -> None:
        """Make the calls again; `mark` is told what was marked when they were recorded, which takes a while longer.

        Raises:
            MemoryError: there is none for what a kernel works on.
        """
        for part in self._parts:
            part.run(mark)

    def mark(self, name: str) -> None:
        """Name what was recorded since the last mark."""
        if self._parts:
            self._parts[-1].names[self._parts[-1].count] = name

    def add_call(self, entry: int, arguments: ctypes.Structure, dtype: int) -> None:
        """Record a kernel's call."""
        last = self._parts[-1] if self._parts else None
        if not isinstance(last, _Kernels):
            last = _Kernels()
            self._parts.append(last)
        last.add(entry, arguments, dtype)

    def add_operation(self, again: Callable[[], object]) -> None:
        """Record an operation of plain torch."""
        self._parts.append(_Operation(again))


class _Kernels:
    """Kernels' calls one after another; `names`: what was marked behind the first so many."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.count = 0
        self._calls: list[tuple[int, ctypes.Structure, int]] = []
        self._table: Any = None

    def add(self, entry: int, arguments: ctypes.Structure, dtype: int) -> None:
        self._calls.append((entry, arguments, dtype))
        self.count = len(self._calls)

    def run(self, mark: Mark | None) -> None:
        if self._table is None:
            rows = [_Call(entry, ctypes.addressof(arguments), dtype) for entry, arguments, dtype in self._calls]
            self._table = (_Call * self.count)(*rows)
        first = 0
        if mark is not None:
            for end, name in self.names.items():
                library.replay(self._table, first, end)
                mark(name)
                first = end
        library.replay(self._table, first, self.count)


class _Operation:
    """One operation of plain torch; `names` [1]: what was marked behind it."""

    def __init__(self, again: Callable[[], object]) -> None:
        self.names: dict[int, str] = {}
        self.count = 1
        self._again = again

    def run(self, mark: Mark | None) -> None:
        self._again()
        if mark is not None:
            for name in self.names.values():
                mark(name)


def record(run: Callable[[Tape], T], arena: Arena) -> tuple[T, Tape]:
    """Return what `run` returns for a new tape, and the tape, of use unless it has a `problem`.

    `run` is computed as ever. What it makes lies in `arena`, from its start on, and so does what a replay makes.
    """
    arena.restart()
    tape = Tape()
    library.recorder.add = tape.add_call
    try:
        with _Operations(tape, arena):
            return run(tape), tape
    finally:
        library.recorder.add = None


class _Operations(TorchDispatchMode):
    """Gives tensors memory of the arena and keeps what plain torch computes."""

    def __init__(self, tape: Tape, arena: Arena) -> None:
        super().__init__()
        self._tape, self._arena = tape, arena

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            # What is made of others comes back here as those.
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        made = func(*args, **kwargs)
        if func.is_view:
            return made
        is_plain = isinstance(made, Tensor) and made.is_contiguous() and made.device.type == "cpu"
        if is_plain and func in _EMPTY:
            return self._arena.like(made)
        again = self._again(func, args, kwargs) if is_plain else None
        if again is None:
            self._tape.problem = self._tape.problem or f"{func} can't be recorded"
            return made
        kept = self._arena.like(made).copy_(made)
        self._tape.add_operation(lambda: again(kept))
        return kept

    def _again(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], object] | None:
        """Return what computes `func` again into a tensor; None: nothing here can."""
        if func in (_aten._to_copy.default, _aten.clone.default):
            # Whatever it was asked for, it gave a contiguous tensor, perhaps of another dtype.
            return lambda kept: kept.copy_(args[0])
        if func not in _AGAIN:
            return None
        into = _AGAIN[func]
        return lambda kept: into(*args, **kwargs, out=kept)
