"""Two network namespaces with a delay between them: what a benchmark of ranks on two machines runs in. Needs root.

The kernel's own delay (netem, on a veth pair) where it has one; else two TUN devices, one in each namespace, whose
packets a process hands on when each has waited its time. Addresses are of 192.0.2.0/30 (RFC 5737, documentation), in
the two namespaces alone; both go when they are closed.
"""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import select
import struct
import subprocess
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

ADDRESSES = ("192.0.2.1", "192.0.2.2")
_MTU = 60_000
_PACKET_BYTES = 1 << 16
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000


class DelayLine(NamedTuple):
    """Names of the two namespaces and of the device in each, and what delays: "netem" or "tun"."""

    namespaces: tuple[str, str]
    device: str
    kind: str

    def command(self, side: int, argv: Sequence[str]) -> list[str]:
        """Return the command that runs `argv` in namespace `side`."""
        return ["ip", "netns", "exec", self.namespaces[side], *argv]


@contextmanager
def delay_line(delay_s: float) -> Generator[DelayLine]:
    """Make two namespaces whose packets take `delay_s` each way, and take them away again.

    Raises:
        PermissionError, subprocess.CalledProcessError: not root, or no such devices.
    """
    names = (f"headrace-{os.getpid()}-a", f"headrace-{os.getpid()}-b")
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        if _netem(names, delay_s):
            yield DelayLine(names, "veth0", "netem")
        else:
            with _tun(names, delay_s):
                yield DelayLine(names, "tun0", "tun")
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _netem(names: tuple[str, str], delay_s: float) -> bool:
    """Join the namespaces by a veth pair with netem at both ends; False: this kernel has none."""
    _ip("-n", names[0], "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", names[1])
    for name, address in zip(names, ADDRESSES, strict=True):
        delay = f"{delay_s * 1e6:.0f}us"
        added = subprocess.run(
            ["tc", "-n", name, "qdisc", "add", "dev", "veth0", "root", "netem", "delay", delay, "limit", "100000"],
            capture_output=True,
        )
        if added.returncode:
            _ip("-n", names[0], "link", "del", "veth0")
            return False
        _up(name, "veth0", address)
    return True


def _up(name: str, device: str, address: str) -> None:
    _ip("-n", name, "addr", "add", f"{address}/30", "dev", device)
    _ip("-n", name, "link", "set", device, "up")


@contextmanager
def _tun(names: tuple[str, str], delay_s: float) -> Generator[None]:
    """Join the namespaces by TUN devices and a process that hands packets on."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    relay = multiprocessing.get_context("spawn").Process(target=_relay, args=(theirs, names, delay_s), daemon=True)
    relay.start()
    theirs.close()
    try:
        try:
            ours.recv()
        except EOFError:
            raise PermissionError("no TUN devices could be made; they need root and /dev/net/tun") from None
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "link", "set", "tun0", "mtu", str(_MTU))
            _up(name, "tun0", address)
        yield
    finally:
        relay.kill()
        relay.join()
        ours.close()


def _relay(said: Connection, names: tuple[str, str], delay_s: float) -> None:
    """Hand each device's packets to the other `delay_s` after they came, until killed or left alone."""
    ends = [_open_tun(name) for name in names]
    # It stands for a wire: it must not wait for those who compute.
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(60))
    said.send("ready")
    waiting: list[deque[tuple[float, bytes]]] = [deque(), deque()]
    while True:
        due_s = min((line[0][0] for line in waiting if line), default=None)
        left_s = None if due_s is None else max(0.0, due_s - time.monotonic())
        readable, _, _ = select.select([*ends, said], [], [], left_s)
        if said in readable:
            return
        now_s = time.monotonic()
        for side, end in enumerate(ends):
            if end in readable:
                waiting[side].append((now_s + delay_s, os.read(end, _PACKET_BYTES)))
            line = waiting[side]
            while line and line[0][0] <= now_s:
                # A device that is not up yet takes nothing: lost, as on a wire.
                with suppress(OSError):
                    os.write(ends[1 - side], line[0][1])
                line.popleft()


def _open_tun(namespace: str) -> int:
    """Return a TUN device in `namespace`: it is of the namespace that it was opened in."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/self/ns/net").open("rb") as own, Path(f"/run/netns/{namespace}").open("rb") as there:
        for file in (there, own):
            if libc.setns(file.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns to {file.name}")
            if file is there:
                device = os.open("/dev/net/tun", os.O_RDWR)
                fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"tun0", _IFF_TUN | _IFF_NO_PI))
    return device
