"""A live Prometheus, for who tries queries and alerts on it."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from headrace_core.testing.async_test import WAIT_S


class Prometheus:
    """One that scrapes `targets` every fifth of a second."""

    def __init__(self, folder: Path, targets: list[str]) -> None:
        scrape = {"job_name": "headrace", "scrape_interval": "200ms", "scrape_timeout": "200ms"}
        config = {"scrape_configs": [{**scrape, "static_configs": [{"targets": targets}]}]}
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self._address = f"127.0.0.1:{taken.getsockname()[1]}"
        self._log = folder / "log"
        # The folder of data is named: Debian's default is one for all.
        command = [
            "prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data",
            f"--web.listen-address={self._address}",
        ]  # fmt: skip
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        self._num_targets = len(targets)

    def query(self, promql: str) -> list[dict[str, Any]]:
        """Return the vector that a query gives now."""
        url = f"http://{self._address}/api/v1/query?{urllib.parse.urlencode({'query': promql})}"
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            return json.load(answer)["data"]["result"]

    def wait_scraped(self) -> None:
        """Return when every target was scraped twice or more from now on."""
        wanted = f"count(timestamp(up == 1) > {time.time() + 0.4:.3f}) == {self._num_targets}"
        deadline_s = time.monotonic() + WAIT_S
        while not self._has(wanted):
            assert time.monotonic() < deadline_s, self._log.read_text()
            time.sleep(0.05)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _has(self, promql: str) -> bool:
        try:
            return bool(self.query(promql))
        except OSError:  # it does not listen yet
            return False
