"""Kills workers with SIGKILL, each role in each phase that its metrics show, and starts successors in their places."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections import Counter
from collections.abc import Callable

from headrace_client.cluster.cluster_process import ClusterProcess
from headrace_client.cluster.local_cluster import LocalCluster

from tests.load.phases import PHASES, Gauges

_WATCH_S = 20.0
"""Longest wait for a phase to be seen; then the next one's turn comes."""


async def kill_in_turn(
    cluster: LocalCluster, kills: Counter[tuple[str, str]], *, pause_s: float, until: asyncio.Event
) -> None:
    """Kill one worker about every `pause_s`, phase by phase; its successor serves before the next dies."""
    while not until.is_set():
        for (role, phase), is_in_phase in PHASES.items():
            await _wait(until, pause_s)
            if until.is_set():
                return
            victim = await _find(cluster, role, is_in_phase, until)
            if victim is None:
                continue
            victim.kill()
            kills[role, phase] += 1
            await asyncio.to_thread(victim.wait)
            await asyncio.to_thread(cluster.restart, victim)


async def _find(
    cluster: LocalCluster, role: str, is_in_phase: Callable[[Gauges], bool], until: asyncio.Event
) -> ClusterProcess | None:
    deadline = time.monotonic() + _WATCH_S
    while time.monotonic() < deadline and not until.is_set():
        for process in cluster.workers:
            if process.role == role and process.poll() is None:
                gauges = await asyncio.to_thread(read_gauges, process.metrics_address)
                if gauges and is_in_phase(gauges):
                    return process
    return None


async def _wait(until: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(until.wait(), seconds)
    except TimeoutError:
        return


def read_gauges(address: str) -> Gauges:
    """Return a process's metrics without labels by name; empty if it does not answer."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    pairs = (line.rsplit(" ", 1) for line in lines if line and line[0] != "#" and "{" not in line)
    return {name: float(value) for name, value in pairs}
