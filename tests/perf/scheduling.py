"""What a decode step costs besides the network: `python -m tests.perf.scheduling FOLDER` (`make bench-scheduling`).

A colocated worker decodes a batch; its router is a process of its own. Of each step is measured, on the engine's
thread, what planning takes, the network, sampling and applying, waits for the interpreter included; and what the event
loop's thread computes meanwhile, which is bookkeeping, metrics and the step's message. `share` is all but the network,
of the time from one step's end to the next one's; `cpu_share` the same of CPU time, of all threads, on which it matters
less what else the machine does. Prints medians over the steps and writes build/bench/scheduling.json.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headrace_core.worker.threads import limit_threads

from tests.perf.report_file import merge

_log = logging.getLogger(__name__)
_REPORT = Path("build/bench/scheduling.json")
_CONTEXT = 256
_PARTS = ("plan", "network", "sampling", "apply", "loop")


class Stopwatch:
    """Seconds of each part, step by step: a row is closed when the step is applied."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._row: dict[str, float] = dict.fromkeys(_PARTS, 0.0)
        self._cpu_s = 0.0
        """Of this step, but for the network."""
        self._cpu_ended_s = time.process_time()
        self._ended_s = time.perf_counter()
        self._loop_s: Callable[[], float] = lambda: 0.0
        self._loop_before_s = 0.0

    def watch_loop(self) -> None:
        """Count what the calling thread computes from now on as the event loop's."""
        clock = time.pthread_getcpuclockid(threading.get_ident())
        self._loop_s = lambda: time.clock_gettime(clock)

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call`, the seconds of which are `part`'s."""

        def run(*arguments: Any, **named: Any) -> Any:
            begun_s, cpu_begun_s = time.perf_counter(), time.process_time()
            try:
                return call(*arguments, **named)
            finally:
                self._row[part] += time.perf_counter() - begun_s
                self._cpu_s += (part != "network") * (time.process_time() - cpu_begun_s)

        return run

    def end_step(self, num_rows: int) -> None:
        """Close the row."""
        now_s, cpu_now_s, loop_s = time.perf_counter(), time.process_time(), self._loop_s()
        self._row["loop"] = loop_s - self._loop_before_s
        cpu_share = (self._cpu_s + self._row["loop"]) / (cpu_now_s - self._cpu_ended_s)
        row = {**self._row, "step": now_s - self._ended_s, "batch": num_rows, "cpu_share": cpu_share}
        self.rows.append(row)
        self._cpu_ended_s, self._cpu_s = cpu_now_s, 0.0
        self._ended_s, self._loop_before_s = now_s, loop_s
        self._row = dict.fromkeys(_PARTS, 0.0)


def _install(watch: Stopwatch) -> None:
    from headrace_core.engine import executor
    from headrace_core.model.model import Model
    from headrace_decode.scheduler import DecodeScheduler

    apply = watch.timed("apply", DecodeScheduler.apply)

    def applied(self: Any, result: Any, now: float) -> None:
        num_rows = len(result.tokens)
        apply(self, result, now)
        watch.end_step(num_rows)

    DecodeScheduler.plan = watch.timed("plan", DecodeScheduler.plan)  # pyright: ignore[reportAttributeAccessIssue]
    DecodeScheduler.apply = applied
    Model.forward = watch.timed("network", Model.forward)  # pyright: ignore[reportAttributeAccessIssue]
    executor.sample_chunks = watch.timed("sampling", executor.sample_chunks)  # pyright: ignore[reportPrivateImportUsage]


async def _generate(address: str, batch: int, num_tokens: int) -> None:
    from headrace_core.request import SamplingParams
    from headrace_core.testing.mini_router import MiniRouter

    params = SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=num_tokens, ignore_eos=True)
    async with MiniRouter(decode=address) as router:
        prompts = [[(7 * i + 31 * key) % 1000 + 16 for i in range(_CONTEXT)] for key in range(batch)]
        await asyncio.gather(*(router.generate(f"r{key}", p, params=params) for key, p in enumerate(prompts)))


async def _measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from headrace_core.config import DecodeSettings
    from headrace_decode.service import DecodeService

    from tests.perf.machine import machine

    watch = Stopwatch()
    _install(watch)
    settings = DecodeSettings(
        model=options.checkpoint, role="both", listen="127.0.0.1:0", kv_pool_mib=512, roofline_every_steps=0
    )
    service = DecodeService(settings)
    address = await service.start()
    watch.watch_loop()
    command = [sys.executable, "-m", "tests.perf.scheduling", "--router", address, "--tokens", str(options.tokens)]
    router = await asyncio.create_subprocess_exec(*command, "--batch", str(options.batch), ".")
    await router.wait()
    await service.stop()
    rows = [row for row in watch.rows if row["batch"] == options.batch][5:]
    if router.returncode or not rows:
        raise subprocess.SubprocessError("the router's process failed")
    found = {part: statistics.median(row[part] for row in rows) for part in (*_PARTS, "step")}
    share = statistics.median(sum(row[part] for part in _PARTS if part != "network") / row["step"] for row in rows)
    return {
        "machine": machine(),
        "batch": options.batch,
        "steps": len(rows),
        "threads": torch.get_num_threads(),
        **{f"{part}_ms": round(seconds * 1e3, 3) for part, seconds in found.items()},
        "share": round(share, 4),
        "cpu_share": round(statistics.median(row["cpu_share"] for row in rows), 4),
    }


def _main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    _log.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--router", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.router:
        asyncio.run(_generate(options.router, options.batch, options.tokens))
        return
    # As a worker does, before torch is imported, which reads it then: hence the imports within.
    limit_threads(options.threads)
    report = asyncio.run(_measure(options))
    merge(_REPORT, {f"batch {options.batch}": report})
    for name, value in report.items():
        _log.info("%-12s %s", name, value)


if __name__ == "__main__":
    _main()
