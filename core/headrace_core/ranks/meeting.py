"""Where the ranks of a group find one another: a store of rank 0's, reachable where MASTER_ADDR says and nowhere else.

torch.distributed's store and gloo's connections know no secrets and no encryption: who reaches them is believed. Left
to torch, rank 0's store listens on every interface of its machine, and gloo at the address of the machine's name. Here
the store listens at MASTER_ADDR alone, and where that is loopback, gloo keeps to loopback as well. torchrun's own
store, where it has one (TORCHELASTIC_USE_AGENT_STORE), is torchrun's to bind.
"""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented

from headrace_core.errors import StartupError
from headrace_core.ranks.place import is_loopback_host

_AGENT = "TORCHELASTIC_USE_AGENT_STORE"
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def meeting_store(rank: int, size: int, timeout: timedelta) -> Store:
    """Return the store of the group that the environment names: rank 0 makes it, the others connect to it.

    Sets GLOO_SOCKET_IFNAME to loopback's where MASTER_ADDR is on it, unless it is set.

    Raises:
        StartupError: BAD_RANKS, rank 0 can't listen at MASTER_ADDR and MASTER_PORT, or they are none.
        RuntimeError: torch's: nobody answers there within `timeout`.
    """
    host, port = _meeting_place()
    if is_loopback_host(host):
        os.environ.setdefault(_GLOO_INTERFACE, "lo" if sys.platform == "linux" else "lo0")
    if rank or os.environ.get(_AGENT) == "True":
        store = TCPStore(host, port, size, is_master=False, timeout=timeout)
    else:
        listening = _listen(host, port)
        store = TCPStore(host, port, size, is_master=True, timeout=timeout, master_listen_fd=listening.detach())
    # As torch does: other users of a torchrun's store may choose the same names.
    return PrefixStore("default_pg", store)


def _meeting_place() -> tuple[str, int]:
    host, text = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not (text.isascii() and text.isdigit()) or int(text) >= 1 << 16:
        problem = f"MASTER_ADDR is {host!r}, MASTER_PORT {text!r}: say where rank 0 is met, as torchrun does"
        raise StartupError("BAD_RANKS", problem)
    return host, int(text)


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at `host`, an address of this machine, and nowhere else."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise StartupError("BAD_RANKS", f"MASTER_ADDR {host}: {error.strerror or error}") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(socket.SOMAXCONN)
    except OSError as error:
        listening.close()
        problem = (
            f"rank 0 can't be met at {host}:{port}: {error.strerror}; MASTER_ADDR must be an address of its machine"
        )
        raise StartupError("BAD_RANKS", f"{problem}, MASTER_PORT a free port there") from error
    return listening
