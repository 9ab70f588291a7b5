"""Which rank of a group this process is: what torchrun, or whoever starts the ranks in its place, set for it.

    RANK, WORLD_SIZE              its number, from 0, and how many there are; a WORLD_SIZE of 1, or none: no group
    LOCAL_RANK                    its number on this machine: which of its GPUs it has; none: as RANK
    LOCAL_WORLD_SIZE              how many are on this machine; none: all if MASTER_ADDR is loopback, else unknown
    MASTER_ADDR, MASTER_PORT      where rank 0 is met; torch.distributed reads them

Torch-free: it is asked before torch is imported.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from headrace_core.address import is_loopback
from headrace_core.errors import StartupError

_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_TORCHRUN = "TORCHELASTIC_RUN_ID"
_PR_SET_PDEATHSIG = 1
_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Rank `rank` of `size`, number `local_rank` on its machine. Of one rank: a process alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    is_one_machine: bool = True
    """Whether all ranks are known to be on this machine."""

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"


ALONE_PLACE = RankPlace()


def read_place(environment: Mapping[str, str]) -> RankPlace:
    """Return what `environment` says.

    Raises:
        StartupError: BAD_RANKS, it says half of it, or nonsense.
    """
    size = _number(environment, "WORLD_SIZE", default=1, least=1)
    if size == 1:
        return ALONE_PLACE
    rank = _number(environment, "RANK", default=-1, least=0)
    if rank >= size:
        raise StartupError("BAD_RANKS", f"RANK is {rank}, WORLD_SIZE {size}: ranks are 0 to {size - 1}")
    for name in _MEETING:
        if not environment.get(name):
            raise StartupError("BAD_RANKS", f"WORLD_SIZE is {size} but {name} is not set: start ranks with torchrun")
    is_one_machine = (
        is_loopback_host(environment["MASTER_ADDR"])
        or _number(environment, "LOCAL_WORLD_SIZE", default=1, least=1) == size
    )
    return RankPlace(rank, size, _number(environment, "LOCAL_RANK", default=rank, least=0), is_one_machine)


def is_loopback_host(host: str) -> bool:
    """Return whether `host`, a name or an address without a port, is this machine's loopback."""
    return is_loopback(f"[{host}]:0" if ":" in host else f"{host}:0")


def own_place() -> RankPlace:
    """Return this process's place, let it see its own GPU, and have it told to leave when torchrun is gone.

    Raises as `read_place` does.
    """
    place = read_place(os.environ)
    take_gpu(place, os.environ)
    if place.size > 1 and _TORCHRUN in os.environ and sys.platform == "linux":
        # Killed, it would leave its ranks behind.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return place


def take_gpu(place: RankPlace, environment: MutableMapping[str, str]) -> None:
    """Let a rank see one GPU of those that its machine's ranks share, so that it is its first; before torch is loaded.

    Where each rank is given its own, as in a container of one GPU, nothing is changed.
    """
    visible = [gpu for gpu in environment.get(_VISIBLE_GPUS, "").split(",") if gpu]
    if place.size > 1 and len(visible) != 1:
        environment[_VISIBLE_GPUS] = visible[place.local_rank % len(visible)] if visible else str(place.local_rank)


def _number(environment: Mapping[str, str], name: str, *, default: int, least: int) -> int:
    text = environment.get(name, str(default))
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise StartupError("BAD_RANKS", f"{name} is {text!r}: say a number from {least} on, as torchrun does")
    return int(text)
