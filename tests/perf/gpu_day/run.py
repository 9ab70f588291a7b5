"""Run parts one after the other within a time for all: each has a limit, and none leaves a process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from tests.perf.gpu_day.parts import LIMIT, Part, Stage

PASSED, FAILED, CUT_OFF, NOT_STARTED, SKIPPED = "passed", "failed", "cut off", "not started", "skipped"
_GRACE_S = 5.0
_POLL_S = 0.05
# What a command needs at its end to write down what it found.
_TO_END_S = 3.0


@dataclass(frozen=True)
class Outcome:
    """How a part ended, how long it took and might have taken, seconds, and its exit code; None: it never began."""

    name: str
    status: str
    seconds: float = 0.0
    limit_s: float = 0.0
    exit_code: int | None = None

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong; that a machine lacks what a part needs is not."""
        return self.status in (PASSED, SKIPPED)


@contextmanager
def interruption() -> Generator[Event]:
    """Yield what Ctrl-C, SIGTERM and a closed terminal set, in place of ending this process."""
    interrupted = Event()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.signal(each, lambda *_: interrupted.set()) for each in signals}
    try:
        yield interrupted
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class Day:
    """Runs parts in the folder `root`, their output in `out`, until `seconds` are over or `interrupted` is set.

    `environment` is the parts' own.
    """

    def __init__(
        self,
        root: Path,
        out: Path,
        seconds: float,
        environment: Mapping[str, str],
        interrupted: Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._out = out
        self._environment = dict(environment)
        self._interrupted = interrupted
        self._clock = clock
        self._ends_at = clock() + seconds

    def left_s(self) -> float:
        """Return the seconds left; 0 when interrupted."""
        return 0.0 if self._interrupted.is_set() else max(self._ends_at - self._clock(), 0.0)

    def run(self, stages: Sequence[Stage]) -> Generator[Outcome]:
        """Yield how each part ended: as soon as it did, and whatever became of those before it."""
        for number, stage in enumerate(stages):
            weights = [later[0].weight for later in stages[number:]]
            yield from self._run_stage(stage, self.left_s() * weights[0] / sum(weights))

    def _run_stage(self, stage: Stage, limit_s: float) -> Generator[Outcome]:
        running: dict[Part, subprocess.Popen[bytes]] = {}
        began = self._clock()
        try:
            for part in stage:
                if part.missing or not limit_s:
                    yield Outcome(part.name, SKIPPED if part.missing else NOT_STARTED)
                else:
                    running[part] = self._start(part, limit_s)
            while running:
                is_over = self._interrupted.is_set() or self._clock() - began >= limit_s
                done = [part for part, process in running.items() if process.poll() is not None]
                ended = [(part, running.pop(part), part not in done) for part in (list(running) if is_over else done)]
                _end([process for _, process, _ in ended])
                for part, process, is_cut in ended:
                    status = CUT_OFF if is_cut else FAILED if process.returncode else PASSED
                    yield Outcome(part.name, status, self._clock() - began, limit_s, process.returncode)
                time.sleep(_POLL_S)
        finally:
            _end(running.values())

    def _start(self, part: Part, limit_s: float) -> subprocess.Popen[bytes]:
        told = f"{max(limit_s - _TO_END_S, 1):.0f}"
        command = [told if argument == LIMIT else argument for argument in part.command]
        with (self._out / part.log).open("ab") as log:
            log.write(f"== {part.name}, at most {limit_s:.0f} s: {' '.join(command)}\n".encode())
            log.flush()
            # A session of its own: it is ended with all the processes that it started.
            return subprocess.Popen(
                command,
                cwd=self._root,
                env=self._environment | dict(part.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End processes with all that they started: asked first, to write down what they found, then killed."""
    processes = list(processes)
    asked = [process for process in processes if process.poll() is None]
    for process in asked:
        _signal(process, signal.SIGINT)
    ends_at = time.monotonic() + _GRACE_S
    for process in asked:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(ends_at - time.monotonic(), 0))
    for process in processes:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], signum: signal.Signals) -> None:
    # Its group outlives it as long as anything it started does.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signum)
