"""Workers that share a machine: a step slows down while one of the other kind computes. Time is shared continuously.

With factors of 1 a job is one event. Otherwise, whenever a kind starts or stops being busy, what is left of each job
of the other kind is stretched or shortened. Calls take longer, too, the more sequences are in steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headrace_planner.sim_clock import Clock


@dataclass(slots=True, eq=False)
class HostJob:
    """A step under way: `left_s` seconds of it, alone on the machine, at `since_s`."""

    kind: int
    left_s: float
    since_s: float
    began_s: float
    done: Callable[[float], None]
    num_sequences: int
    rate: float = 1.0
    version: int = 0
    is_over: bool = False


class SharedMachine:
    """One machine with two kinds of workers, 0 (prefill) and 1 (decode or colocated)."""

    def __init__(self, clock: Clock, factors: tuple[float, float], crowding: float = 0.0) -> None:
        """Args: `factors` as `SimConfig.interference`; `crowding` as `Wire.crowding`."""
        self._clock = clock
        self._factors = factors
        self._is_shared = factors != (1.0, 1.0)
        self._jobs: tuple[set[HostJob], set[HostJob]] = (set(), set())
        self._crowding = crowding
        self._num_sequences = 0
        """In steps under way."""

    def start(self, kind: int, seconds: float, done: Callable[[float], None], num_sequences: int) -> HostJob:
        """Run a step of so many sequences that takes `seconds` alone; call `done` with the seconds it took."""
        now_s = self._clock.now_s
        job = HostJob(kind, seconds, now_s, now_s, done, num_sequences)
        self._num_sequences += num_sequences
        if not self._is_shared:
            self._clock.after(seconds, self._end_alone, job)
            return job
        job.rate = 1 / self._factors[kind] if self._jobs[1 - kind] else 1.0
        self._jobs[kind].add(job)
        self._schedule(job)
        if len(self._jobs[kind]) == 1:
            self._rerate(1 - kind)
        return job

    def crowded(self, seconds: float) -> float:
        """Return how long a call takes now that takes `seconds` while nothing is computed."""
        return seconds * (1 + self._crowding * self._num_sequences)

    def cancel(self, job: HostJob) -> None:
        """Forget a job; idempotent."""
        if not job.is_over:
            self._remove(job)

    def _schedule(self, job: HostJob) -> None:
        job.version += 1
        self._clock.after(job.left_s / job.rate, self._end, (job, job.version))

    def _end(self, argument: tuple[HostJob, int]) -> None:
        job, version = argument
        if job.is_over or job.version != version:
            return
        self._remove(job)
        job.done(self._clock.now_s - job.began_s)

    def _end_alone(self, job: HostJob) -> None:
        if not job.is_over:
            self._remove(job)
            job.done(self._clock.now_s - job.began_s)

    def _remove(self, job: HostJob) -> None:
        job.is_over = True
        self._num_sequences -= job.num_sequences
        if not self._is_shared:
            return
        self._jobs[job.kind].discard(job)
        if not self._jobs[job.kind]:
            self._rerate(1 - job.kind)

    def _rerate(self, kind: int) -> None:
        if self._factors[kind] == 1.0:
            return
        now_s = self._clock.now_s
        rate = 1 / self._factors[kind] if self._jobs[1 - kind] else 1.0
        # Jobs in order of their start, so that the order of events does not depend on hashes.
        for job in sorted(self._jobs[kind], key=lambda job: (job.began_s, job.since_s)):
            job.left_s = max(0.0, job.left_s - (now_s - job.since_s) * job.rate)
            job.since_s, job.rate = now_s, rate
            self._schedule(job)


@dataclass(frozen=True, slots=True)
class Host:
    """A worker's place on a machine."""

    machine: SharedMachine
    kind: int

    def start(self, seconds: float, done: Callable[[float], None], num_sequences: int) -> HostJob:
        """Run a step; see `SharedMachine.start`."""
        return self.machine.start(self.kind, seconds, done, num_sequences)

    def cancel(self, job: HostJob) -> None:
        """Forget a step under way."""
        self.machine.cancel(job)
