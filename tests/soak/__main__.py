"""Every way to fail at once, beside clients whose every token is checked: `make soak MINUTES=10`.

Real processes around the fake model, whose tokens depend on every byte of every page: a router, two prefill and two
decode workers, each behind a proxy. Eight clients ask for greedy and seeded answers, stop strings, log-probabilities
and two samples; others leave, read slowly or give no time. Every few seconds a process is killed, stopped, ended or cut
off, in each phase that its metrics show; frames and entries are spoilt besides. Prints what became of the answers and
writes build/soak.json; exits with 1 if an answer was wrong, lost or came twice, if pages leaked, if anything but a
socket was left, if the router called a worker lost to which nothing had been done, and, from ten minutes on, if the run
was too thin to mean anything. BURNERS=2 keeps that many cores busy besides.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headrace_client import ConnectionOptions
from headrace_core.testing.async_test import WAIT_S
from rich.console import Console

from tests.load.burners import burning
from tests.load.clients import HealthyResult, references, requests, run_clients
from tests.load.phases import PHASES
from tests.matrix.scene import Scene
from tests.perf.machine import machine
from tests.soak.disturber import KINDS, Disturber
from tests.soak.restless import run_restless
from tests.soak.verdicts import Verdicts

ROOT = Path(__file__).parents[2]
LOGS = ROOT / "build" / "soak-logs"
NUM_CLIENTS = 8
MIN_ANSWERS = 200
FULL_MINUTES = 10.0
PAUSE_S = 2.0
EXPECTED = {
    "UNREACHABLE": "the router was down",
    "CONNECTION_LOST": "the router died with the answer half sent",
    "DRAINING": "the router stopped before it had begun",
    "RETRIES_EXHAUSTED": "two workers died under one sample, or four attempts failed",
}
"""Errors that clients may see, and when. Any other end is an answer that was lost."""


async def run(minutes: float, transport: str, console: Console) -> dict[str, Any]:
    """Return the report; `problems` lists what makes the run a failure."""
    scene = Scene(transport=transport, num_pairs=2, is_proxied=True, no_workers_timeout_s=WAIT_S, log_format="json")
    async with scene:
        address = scene.router.listed
        console.print("computing the answers alone")
        wanted = await references(scene.client, requests(most_repeats=11), least_margin=0.0)
        console.print(f"{len(wanted)} requests take part")
        until = asyncio.Event()
        disturber = Disturber(scene, pause_s=PAUSE_S, until=until)
        clients = asyncio.create_task(
            run_clients(address, ConnectionOptions(), wanted, num_clients=NUM_CLIENTS, until=until)
        )
        restless = asyncio.create_task(run_restless(address, wanted, until))
        disturbing = asyncio.create_task(disturber.run())
        tasks = (clients, restless, disturbing)
        deadline = time.monotonic() + 60 * minutes
        while (left_s := deadline - time.monotonic()) > 0 and not any(task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=min(left_s, 30.0), return_when=asyncio.FIRST_COMPLETED)
            left_s = max(0.0, deadline - time.monotonic())
            console.print(f"{left_s:.0f} s left, struck {disturber.struck.total()} times")
        until.set()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        problems = [f"{type(end).__name__}: {end}" for end in ends if isinstance(end, BaseException)]
        healthy = HealthyResult() if isinstance(ends[0], BaseException) else ends[0]
        leaked = await _leaked(scene)
        left = await scene.end()
        # Seen after a partition: gRPC keeps a socket of a worker that stops until the process ends. Told, not judged.
        problems += [what for what in left if not what.endswith(": socket")]
        verdicts = Verdicts.of(scene.lines("router"), disturber.strikes)
        problems += verdicts.false_alarms
        if problems or leaked or healthy.wrong:
            scene.keep_logs(LOGS)
            console.print(f"whole logs: {LOGS}")
    counts = _counts(healthy, leaked)
    return {
        "minutes": minutes,
        "transport": transport,
        "counts": counts,
        "errors": healthy.errors,
        "restless": {} if isinstance(ends[1], BaseException) else ends[1],
        "struck": {" ".join(key): count for key, count in disturber.struck.items()},
        "spoilt": disturber.spoilt,
        "left": left,
        "verdicts": asdict(verdicts),
        "problems": problems + leaked + healthy.wrong + _too_thin(counts, disturber, minutes),
    }


async def _leaked(scene: Scene) -> list[str]:
    """Return what is wrong with the pages of each process, once nothing is under way."""
    found = await asyncio.gather(*(process.ask("free") for process in scene.processes), return_exceptions=True)
    return [f"leaked: {error}" for error in found if isinstance(error, BaseException)]


def _counts(healthy: HealthyResult, leaked: list[str]) -> dict[str, int]:
    faults = Counter(text.partition(":")[0] for text in healthy.wrong)
    unexpected = sum(count for reason, count in healthy.errors.items() if reason not in EXPECTED)
    return {
        "exact": healthy.num_exact,
        "of_these_sampled": healthy.num_sampled,
        "wrong": faults["wrong"],
        "lost": faults["lost"] + unexpected,
        "twice": faults["twice"],
        "leaked": len(leaked),
    }


def _too_thin(counts: dict[str, int], disturber: Disturber, minutes: float) -> list[str]:
    if minutes < FULL_MINUTES:
        return []
    struck = disturber.struck
    seen = {(role, phase) for _, role, phase in struck}
    found = [f"no {role} worker while {phase}" for role, phase in PHASES if (role, phase) not in seen]
    found += [f"no {kind}" for kind in KINDS if not any(kind == struck_kind for struck_kind, *_ in struck)]
    if counts["exact"] < MIN_ANSWERS or 3 * counts["of_these_sampled"] < counts["exact"]:
        found.append(f"only {counts['exact']} answers were checked, {counts['of_these_sampled']} sampled ones")
    return [f"too thin: {what}" for what in found]


def _show(report: dict[str, Any], console: Console) -> None:
    console.print(f"struck: {report['struck'] or 'nothing'}; spoilt: {dict(report['spoilt'])}")
    console.print(f"answers: {report['counts']}; errors: {dict(report['errors']) or 'none'}")
    console.print(f"left when processes ended: {report['left'] or 'nothing'}")
    verdicts = report["verdicts"]
    console.print(
        f"workers called lost: {verdicts['num_lost']}, {len(verdicts['false_alarms'])} of them false alarms; suspect: "
        f"{verdicts['num_suspect']}, {verdicts['num_idly_suspect']} of them though nothing was done to them"
    )
    console.print(f"clients that leave, are late or slow: {report['restless']}")
    for problem in report["problems"]:
        console.print(f"problem: {problem}", markup=False, highlight=False, style="red")


def main() -> None:
    """Run and exit with 1 on any problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--transport", default="grpc")
    parser.add_argument("--burners", type=int, default=0, help="processes that keep cores busy with nothing")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "soak.json")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    with burning(arguments.burners):
        report = asyncio.run(run(arguments.minutes, arguments.transport, console))
    report |= {"machine": machine(), "command": sys.argv}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    _show(report, console)
    counts = report["counts"]
    is_bad = any(counts[name] for name in ("wrong", "lost", "twice", "leaked")) or report["problems"]
    raise SystemExit(bool(is_bad))


if __name__ == "__main__":
    main()
