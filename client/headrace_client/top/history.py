"""Looks at a router and its workers, and what happened between the oldest of the last minute and the newest."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from headrace_client.client import Client
from headrace_client.results import ServerInfo
from headrace_client.top.samples import Samples, scrape

WINDOW_S = 60.0

_MOST_THREADS = 16
_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Look:
    """All that is to be seen at one time. `processes`: metrics of the router, under "", and of workers by address."""

    at_s: float
    info: ServerInfo
    processes: Mapping[str, Samples]


@dataclass(frozen=True, slots=True)
class News:
    """What one process counted, and in how many seconds; 0: since it began, whenever that was."""

    samples: Samples
    span_s: float

    def rate(self, name: str, **labels: str) -> float:
        """Return how much of a counter came in a second; 0 where that is not known."""
        return self.samples.total(name, **labels) / self.span_s if self.span_s else 0.0


@dataclass(frozen=True, slots=True)
class View:
    """What a frame shows. `span_s` is how long the longest of `news` is; 0: there was one look alone."""

    info: ServerInfo
    span_s: float
    news: Mapping[str, News]


class History:
    """The looks of the last minute."""

    def __init__(self) -> None:
        self._looks: deque[Look] = deque()

    def add(self, look: Look) -> View:
        """Take a look and return what is to be shown."""
        looks = self._looks
        looks.append(look)
        # One at least as old as the window stays, to count from.
        while len(looks) > 1 and looks[1].at_s <= look.at_s - WINDOW_S:
            looks.popleft()
        news = {name: self._news(name, samples) for name, samples in look.processes.items()}
        return View(look.info, max((each.span_s for each in news.values()), default=0.0), news)

    def _news(self, name: str, samples: Samples) -> News:
        for look in self._looks:
            first = look.processes.get(name)
            if first is not None and first is not samples:
                return News(samples.since(first), samples.at_s - first.at_s)
        return News(samples, 0.0)


def take_look(client: Client, at_s: float) -> Look:
    """Ask the router, and read the metrics of every process that says where they are, all at a time.

    Raises:
        HeadraceError: what `Client.server_info` lists.
    """
    info = client.server_info(timeout_s=_TIMEOUT_S)
    found = {"": _address(client.address, info.metrics_port)}
    found |= {worker.address: _address(worker.address, worker.metrics_port) for worker in info.workers}
    addresses = {name: address for name, address in found.items() if address}
    with ThreadPoolExecutor(_MOST_THREADS) as threads:
        scraped = threads.map(functools.partial(scrape, at_s=at_s), addresses.values())
        processes = dict(zip(addresses, scraped, strict=True))
    return Look(at_s, info, {name: samples for name, samples in processes.items() if samples is not None})


def _address(serves: str, port: int) -> str:
    return f"{serves.rpartition(':')[0]}:{port}" if port else ""
