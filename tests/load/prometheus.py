"""A live Prometheus, for who tries queries and alerts on it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from headrace_core.testing.async_test import WAIT_S

needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="there is no prometheus here; apt-get install prometheus brings it"
)
Targets = Sequence[tuple[str, Mapping[str, str]]]
"""host:port of each process' metrics, and labels that its samples get."""

_INTERVAL_S = 1
"""A scrape may take as long: one that is late leaves a hole, and a query then finds nothing."""


class Prometheus:
    """One that scrapes `targets` as job `headrace` and evaluates `rules`, a file's text, every second."""

    def __init__(self, folder: Path, targets: Targets, rules: str = "") -> None:
        each_s = f"{_INTERVAL_S}s"
        config = {
            "global": {"scrape_interval": each_s, "scrape_timeout": each_s, "evaluation_interval": each_s},
            "scrape_configs": [{"job_name": "headrace", "file_sd_configs": [{"files": ["targets.json"]}]}],
            "rule_files": ["rules.yml"] if rules else [],
        }
        self._targets_file = folder / "targets.json"
        self.retarget(targets)
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        (folder / "rules.yml").write_text(rules)
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

    def retarget(self, targets: Targets) -> None:
        """Scrape these from now on."""
        groups = [{"targets": [address], "labels": dict(labels)} for address, labels in targets]
        scratch = self._targets_file.with_suffix(".new")
        scratch.write_text(json.dumps(groups))
        scratch.replace(self._targets_file)
        self._num_targets = len(targets)

    def query(self, promql: str) -> list[dict[str, Any]]:
        """Return the vector that a query gives now."""
        return self._get("query", query=promql)["result"]

    def query_range(self, promql: str, start_s: float, end_s: float, step_s: float) -> list[dict[str, Any]]:
        """Return the series that a query gives over a time, seconds since 1970."""
        return self._get("query_range", query=promql, start=start_s, end=end_s, step=step_s)["result"]

    def rules(self) -> list[dict[str, Any]]:
        """Return every rule, with its health and what it fires for now."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def wait_scraped(self) -> None:
        """Return when every target was scraped twice or more from now on."""
        wanted = f"count(timestamp(up == 1) > {time.time() + 2 * _INTERVAL_S:.3f}) == {self._num_targets}"
        self.wait_for(wanted)

    def wait_for(self, promql: str) -> list[dict[str, Any]]:
        """Return what a query gives as soon as that is anything."""
        deadline_s = time.monotonic() + WAIT_S
        while not (found := self._found(promql)):
            assert time.monotonic() < deadline_s, f"{promql}: nothing; {self._log.read_text()}"
            time.sleep(0.05)
        return found

    def wait_evaluated(self) -> None:
        """Return when every rule was evaluated and none failed."""
        deadline_s = time.monotonic() + WAIT_S
        while bad := [rule for rule in self.rules() if rule["health"] != "ok"]:
            assert time.monotonic() < deadline_s, bad
            time.sleep(0.05)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _found(self, promql: str) -> list[dict[str, Any]]:
        try:
            return self.query(promql)
        except OSError:  # it does not listen yet
            return []

    def _get(self, what: str, **parameters: str | float) -> dict[str, Any]:
        url = f"http://{self._address}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            return json.load(answer)["data"]


def targets(addresses: Sequence[str]) -> Targets:
    """Return targets without labels of their own."""
    return [(address, {}) for address in addresses]
