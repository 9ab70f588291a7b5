"""How much of the machine other programs used meanwhile: what a measurement is worth.

CPU seconds of the whole machine (with interrupts, and what its hypervisor took) less those of this process and all
below it, over all CPU seconds there were.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class MachineUse:
    """CPU seconds since the machine started: all that there were, all that were used, this process tree's."""

    total_s: float
    busy_s: float
    own_s: float

    def others_share(self, before: MachineUse) -> float:
        """Return the share of the machine's CPU time since `before` that others used, 0 ... 1."""
        total_s = self.total_s - before.total_s
        others_s = (self.busy_s - before.busy_s) - (self.own_s - before.own_s)
        return min(1.0, max(0.0, others_s / total_s)) if total_s > 0 else 0.0


def machine_use() -> MachineUse:
    """Return the machine's use so far."""
    times = psutil.cpu_times()._asdict()
    # Guests' time is in users' already.
    total_s = sum(seconds for name, seconds in times.items() if not name.startswith("guest"))
    return MachineUse(total_s, total_s - times["idle"] - times.get("iowait", 0.0), _tree_s())


def _tree_s() -> float:
    """Return the CPU seconds of this process, all below it, and those of them that have ended."""
    this, total_s = psutil.Process(), 0.0
    for process in (this, *this.children(recursive=True)):
        try:
            total_s += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue  # ended meanwhile
    return total_s
