"""`make pictures`: the dashboards over some minutes of a live cluster, as pictures: docs/images/dashboard-*.png.

    python -m tests.perf.dashboards [--seconds 240]

Starts two prefill and two decode workers with the demo model and small pools, scrapes them with a real Prometheus, and
lets clients come: few, then more than there is room for; a decode worker is killed, and comes back, twice. matplotlib
draws the pictures from Prometheus' answers, and they say so: Grafana would show the same numbers, in its own looks.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headrace_client import Client
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_client.dashboards.boards import BOARDS
from headrace_core.errors import HeadraceError
from headrace_core.request import SamplingParams

from tests.load.prometheus import Prometheus, targets
from tests.perf.dashboards.draw import picture

ROOT = Path(__file__).parents[3]
_STEP_S = 2.0
_CHOICES = {"__rate_interval": "15s", "layer": "1"}
_HEROES = ("Zorvim", "Lumira", "Tokka", "Berion", "Quill", "Nessa", "Ardo", "Mirabel")
_WORKER = {"kv-pool-mib": 1, "page-size": 16, "max-step-sequences": 8, "roofline-every-steps": 16}
_ROUTER = {"slo-ttft-ms": 1000, "slo-itl-ms": 100, "max-queued-requests": 8}


class Clients:
    """Each has conversations of three turns, one after the other, until told to stop."""

    def __init__(self, address: str) -> None:
        self._client = Client(address)
        self._stopped = threading.Event()
        self._threads = ThreadPoolExecutor(32)
        self._count = 0

    def add(self, count: int) -> None:
        """Let more of them come."""
        for _ in range(count):
            self._threads.submit(self._talk, self._count)
            self._count += 1

    def stop(self) -> None:
        """Return when all have had their answers."""
        self._stopped.set()
        self._threads.shutdown()
        self._client.close()

    def _talk(self, number: int) -> None:
        hero = _HEROES[number % len(_HEROES)]
        turn = 0
        while not self._stopped.is_set():
            text = f"Once upon a time there was a little fox named {hero}. " * (2 + 3 * (number % 4))
            for _ in range(3):
                turn += 1
                params = SamplingParams(temperature=0.8, seed=turn, max_tokens=24 + 24 * (turn % 4), ignore_eos=True)
                try:
                    text += self._client.generate(text, params).text + f" And then {hero} said:"
                except HeadraceError:  # the pictures show who was refused, and why
                    time.sleep(1)


def main() -> None:
    """Start, load, break, mend, draw."""
    parser = argparse.ArgumentParser(prog="python -m tests.perf.dashboards", description="Draw the dashboards.")
    parser.add_argument("--seconds", type=float, default=240.0, help="how long the pictures are")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="where they go")
    given = parser.parse_args()
    if not shutil.which("prometheus"):
        parser.error("there is no prometheus here; apt-get install prometheus brings it")
    folder = Path(tempfile.mkdtemp(prefix="headrace-pictures-"))
    model = ROOT / "demo" / "model"
    with LocalCluster(model, 2, 2, worker_options=_WORKER, router_options=_ROUTER) as cluster:
        prometheus = Prometheus(folder, targets([each.metrics_address for each in cluster.processes]))
        try:
            prometheus.wait_scraped()
            begin_s, told = time.time(), _play(cluster, prometheus, given.seconds)
            _draw_all(prometheus, begin_s, given.seconds, told, given.out)
        finally:
            prometheus.close()
            shutil.rmtree(folder)


def _play(cluster: LocalCluster, prometheus: Prometheus, seconds: float) -> str:
    """Let happen what the pictures show, and return it in words."""
    clients, part_s = Clients(cluster.router_address), seconds / 10
    begin_s = time.monotonic()

    def until(parts: float) -> str:
        time.sleep(max(0.0, begin_s + parts * part_s - time.monotonic()))
        passed_s = int(time.monotonic() - begin_s)
        return f"{passed_s // 60}:{passed_s % 60:02d}"

    try:
        clients.add(3)
        told = [f"3 clients; 18 from {until(2.5)}"]
        clients.add(15)
        for kill_at in (5, 7.5):
            killed = cluster.workers[-1]
            told.append(f"a decode worker is killed at {until(kill_at)}")
            killed.kill()
            killed.wait()
            until(kill_at + 0.7)
            cluster.restart(killed)
            prometheus.retarget(targets([each.metrics_address for each in cluster.processes if each.poll() is None]))
            told.append(f"and is back at {until(0)}")
        until(10)
    finally:
        clients.stop()
    return ", ".join(told)


def _draw_all(prometheus: Prometheus, begin_s: float, seconds: float, told: str, out: Path) -> None:
    def ask(promql: str) -> list[dict[str, Any]]:
        found = prometheus.query_range(promql, begin_s, begin_s + seconds, _STEP_S)
        return [{**each, "values": [(at - begin_s, value) for at, value in each["values"]]} for each in found]

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    footer = (
        "Drawn by `make pictures` with matplotlib from a live Prometheus; not a screenshot of Grafana. Two prefill and "
        "two decode workers, the demo model, small pools, two CPU cores that others used too: no benchmark. "
        f"{told[0].upper()}{told[1:]}. "
        f"{datetime.now(UTC):%Y-%m-%d}, {commit.stdout.strip()}."
    )
    out.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        picture(board, ask, _CHOICES, seconds, out / f"dashboard-{board.name}.png", footer)


if __name__ == "__main__":
    main()
