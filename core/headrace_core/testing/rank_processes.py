"""Processes that are the ranks of a group, over gloo, for tests."""

from __future__ import annotations

import importlib
import multiprocessing
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from headrace_core.ranks.group import OneRank, RankGroup
from headrace_core.ranks.torch_group import join

_START_S = 120.0


def run_ranks(size: int, target: Callable[..., Any], *args: Any, timeout_s: float = 600.0) -> list[Any]:
    """Return, by rank, what `target(world, *args)`, a module's function, returns in `size` processes of one thread.

    Raises:
        AssertionError: one raised, with its traceback, ended without a word, or took longer than `timeout_s`.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends: list[Connection] = []
        processes: list[BaseProcess] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (theirs, f"file://{Path(folder) / 'meeting'}", size, rank, _named(target), pickle.dumps(args))
            processes.append(context.Process(target=_run, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            ends.append(ours)
        try:
            return [_result(rank, end, timeout_s) for rank, end in enumerate(ends)]
        finally:
            for process, end in zip(processes, ends, strict=True):
                process.kill()
                process.join()
                end.close()


def _result(rank: int, end: Connection, timeout_s: float) -> Any:
    assert end.poll(timeout_s), f"rank {rank} said nothing for {timeout_s:.0f} s"
    try:
        is_good, value = end.recv()
    except EOFError as error:
        raise AssertionError(f"rank {rank} ended without a word") from error
    assert is_good, f"rank {rank}: {value}"
    return value


def _named(target: Callable[..., Any]) -> tuple[str, str, str]:
    """Return the folder that `target`'s module is found from, the module and the name: pytest puts none on the path."""
    module = sys.modules[target.__module__]
    assert module.__file__ is not None
    return str(Path(module.__file__).parents[module.__name__.count(".")]), module.__name__, target.__name__


def _run(end: Connection, init_method: str, size: int, rank: int, named: tuple[str, str, str], args: bytes) -> None:
    folder, module, name = named
    sys.path.append(folder)
    target = getattr(importlib.import_module(module), name)
    torch.set_num_threads(1)
    world: RankGroup = OneRank()
    try:
        if size > 1:
            world = join(size, rank=rank, init_method=init_method, device="cpu", timeout_s=_START_S)
        end.send((True, target(world, *pickle.loads(args))))
    except BaseException:
        end.send((False, traceback.format_exc()))
        raise
    # A rank that left at once could take a meeting's last bytes with it: all stay until the parent has heard from all.
    with suppress(EOFError):
        end.recv()
