"""The stack on a real engine: Docker's client for images and containers, compose for the rest."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import docker
from headrace_core.testing.async_test import WAIT_S

ROOT = Path(__file__).parents[2]
BASE = ROOT / "deploy" / "compose.yaml"
COMPOSE = ROOT / "build" / "compose" / "tool" / "bin" / "docker-compose"
PROJECT = "headrace-test"
SERVICES = ("router", "prefill", "decode")
HERE = "127.0.0.1"
START_S = 4 * WAIT_S


class Stack:
    """One project of compose files, later ones over earlier ones."""

    def __init__(self, files: Sequence[Path], environment: Mapping[str, str]) -> None:
        self.engine: Any = docker.from_env(timeout=600)
        self._command = [str(COMPOSE), "--project-name", PROJECT, "--progress", "quiet"]
        for file in files:
            self._command += ["--file", str(file)]
        self._environment = {**os.environ, **environment}

    def compose(self, *arguments: str) -> str:
        """Run compose and return what it printed; what it says besides is the error, if it fails."""
        done = subprocess.run(
            [*self._command, *arguments], env=self._environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"compose {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def up(self, *arguments: str) -> None:
        """Start what does not run, of images that are there."""
        self.compose("up", "--detach", "--no-build", "--no-recreate", *arguments)

    def down(self) -> float:
        """Stop and remove everything, volumes included; return the seconds that it took."""
        began_s = time.monotonic()
        self.compose("down", "--volumes")
        return time.monotonic() - began_s

    def containers(self, service: str, *, stopped: bool = False) -> list[Any]:
        """Return a service's containers."""
        labels = [f"com.docker.compose.project={PROJECT}", f"com.docker.compose.service={service}"]
        return self.engine.containers.list(all=stopped, filters={"label": labels})

    def container_at(self, service: str, address: str) -> Any:
        """Return the container whose worker the router knows at `host:port`."""
        host = address.rpartition(":")[0]
        for container in self.containers(service):
            networks = container.attrs["NetworkSettings"]["Networks"].values()
            if any(network["IPAddress"] == host for network in networks):
                return container
        raise AssertionError(f"no container of {service} is at {address}")

    def wait_healthy(self, service: str, count: int) -> None:
        """Return when `count` containers of a service are healthy by their own health command."""

        def healthy() -> bool:
            states = [container.attrs["State"]["Health"]["Status"] for container in self.containers(service)]
            return states == ["healthy"] * count

        wait_until(healthy, f"{count} healthy containers of {service}")


def wait_until(condition: Callable[[], Any], what: str, *, limit_s: float = START_S) -> None:
    """Return when `condition` holds."""
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {limit_s:.0f} s: {what}"
        time.sleep(0.2)
