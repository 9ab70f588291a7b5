"""Hostile clients of every kind and killed workers, beside eight healthy clients whose every token is checked.

    make stress MINUTES=10

Prints what became of each kind of attack, which workers were killed in which phase, and the healthy clients' answers,
errors and slowest gap between two pieces of an answer; writes them to build/stress.json, with machine and commit. Exits
with 1 if an answer was wrong or refused, a refusal carried no reason of ours, or pages were not free at the end; and,
from ten minutes on, if the run was too thin to mean anything.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from headrace_client import AsyncClient, ConnectionOptions
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_client.commands.options import API_KEY_VARIABLE
from headrace_core.testing.api_keys import make_keys
from headrace_core.testing.cluster_checks import all_pages_free
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.load.clients import HealthyResult, references, requests, run_clients
from tests.load.phases import PHASES
from tests.perf.machine import machine
from tests.stress.hostile import KINDS
from tests.stress.killer import kill_in_turn

ROOT = Path(__file__).parents[2]
NUM_CLIENTS = 8
MIN_ANSWERS = 200
MIN_ATTEMPTS = 100
"""Of each kind of attack: served or refused."""
FULL_MINUTES = 10.0

# The prefill pools are smaller than the decode pools, as is usual, and smaller than the context.
_WORKERS = {"dtype": "float32", "page-size": 16, "max-step-tokens": 128, "max-step-sequences": 48}
_PREFILL = {"kv-pool-mib": 4}
_DECODE = {"kv-pool-mib": 8}


async def run(minutes: float, *, is_attacked: bool, is_killing: bool, console: Console) -> dict[str, Any]:
    """Return the report; `problems` lists what makes the run a failure."""
    keys, entries = make_keys("healthy", "hostile")
    with tempfile.TemporaryDirectory() as folder:
        keys_file = Path(folder) / "keys.toml"
        keys_file.write_text(entries)
        return await _serve(keys_file, keys, minutes, is_attacked=is_attacked, is_killing=is_killing, console=console)


async def _serve(
    keys_file: Path,
    keys: Mapping[str, str],
    minutes: float,
    *,
    is_attacked: bool,
    is_killing: bool,
    console: Console,
) -> dict[str, Any]:
    router = {"keys-file": keys_file, "listen": "[::]:0", "request-timeout-s": 120}
    cluster = LocalCluster(
        ROOT / "demo" / "model", num_prefill=2, num_decode=2, worker_options=_WORKERS, prefill_options=_PREFILL,
        decode_options=_DECODE, router_options=router, api_key=keys["healthy"],
    )  # fmt: skip
    await asyncio.to_thread(cluster.start)
    try:
        return await _run(cluster, keys, minutes, is_attacked=is_attacked, is_killing=is_killing, console=console)
    finally:
        await asyncio.to_thread(cluster.stop)


async def _run(
    cluster: LocalCluster,
    keys: Mapping[str, str],
    minutes: float,
    *,
    is_attacked: bool,
    is_killing: bool,
    console: Console,
) -> dict[str, Any]:
    port = cluster.router_address.rsplit(":", 1)[1]
    healthy_address, hostile_address = f"127.0.0.1:{port}", f"[::1]:{port}"
    options = ConnectionOptions(api_key=keys["healthy"])
    async with AsyncClient(healthy_address, options) as client:
        console.print("computing the answers alone")
        wanted = await references(client, requests())
        console.print(f"{len(wanted)} requests take part")
        kills: Counter[tuple[str, str]] = Counter()
        until = asyncio.Event()
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "hostile.json"
            attacker = _attack(hostile_address, keys["hostile"], report) if is_attacked else None
            clients = asyncio.create_task(
                run_clients(healthy_address, options, wanted, num_clients=NUM_CLIENTS, until=until)
            )
            killing = asyncio.create_task(
                kill_in_turn(cluster, kills, pause_s=6.0, until=until) if is_killing else asyncio.sleep(0)
            )
            peak_mib = await _pass_time(60 * minutes, cluster, console)
            until.set()
            await killing
            healthy = await clients
            hostile = await asyncio.to_thread(_end, attacker, report) if attacker else None
            assert hostile or not attacker, "the hostile clients' process failed"
        problems = _problems(healthy, hostile, kills if is_killing else None, minutes)
        try:
            await all_pages_free(client.server_info)
        except AssertionError as error:
            problems.append(f"pages leaked: {error}")
    return {
        "minutes": minutes,
        "problems": problems,
        "healthy": {
            "exact": healthy.num_exact, "of_these_sampled": healthy.num_sampled, "wrong": healthy.wrong,
            "errors": healthy.errors, "slowest_gap_s": healthy.slowest_gap_s,
            "slowest_first_token_s": healthy.slowest_first_s,
            "gap_percentiles_s": _percentiles(healthy.gaps_s),
        },
        "hostile": hostile,
        "kills": {f"{role} {phase}": count for (role, phase), count in kills.items()},
        "router_peak_mib": peak_mib,
    }  # fmt: skip


def _attack(address: str, key: str, report: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.stress.hostile", address, "--report", str(report)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, API_KEY_VARIABLE: key})


def _end(attacker: subprocess.Popen[bytes], report: Path) -> dict[str, Any] | None:
    attacker.send_signal(signal.SIGTERM)
    try:
        attacker.wait(150)
    except subprocess.TimeoutExpired:
        attacker.kill()
        attacker.wait()
    return json.loads(report.read_text()) if report.is_file() else None


async def _pass_time(seconds: float, cluster: LocalCluster, console: Console) -> float:
    """Wait with a bar; return the router's largest resident memory, MiB."""
    peak_mib = 0.0
    router = psutil.Process(cluster.router.pid)
    columns = (TextColumn("under attack"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=seconds)
        began_s = time.monotonic()
        while (passed_s := time.monotonic() - began_s) < seconds:
            progress.update(task, completed=passed_s)
            assert cluster.router.poll() is None, f"the router ended: {cluster.router.last_words()}"
            peak_mib = max(peak_mib, router.memory_info().rss / 2**20)
            await asyncio.sleep(min(1.0, max(0.0, seconds - passed_s)))
    return peak_mib


def _problems(
    healthy: HealthyResult, hostile: dict[str, Any] | None, kills: Counter[tuple[str, str]] | None, minutes: float
) -> list[str]:
    problems = [f"wrong answer: {text}" for text in healthy.wrong]
    problems += [f"{count} healthy requests ended with {reason}" for reason, count in healthy.errors.items()]
    outcomes: dict[str, dict[str, int]] = hostile["outcomes"] if hostile else {}
    for kind, counts in outcomes.items():
        problems += [f"{kind}: {count} times {name}" for name, count in counts.items() if name.startswith("bare")]
    if minutes >= FULL_MINUTES:
        if healthy.num_exact < MIN_ANSWERS or 3 * healthy.num_sampled < healthy.num_exact:
            problems.append(f"only {healthy.num_exact} answers were checked, {healthy.num_sampled} sampled ones")
        for kind in KINDS if hostile else ():
            if sum(outcomes[kind].values()) < MIN_ATTEMPTS:
                problems.append(f"{kind}: only {sum(outcomes[kind].values())} attempts")
        if hostile and hostile["share_with_three_kinds"] < 0.5:
            problems.append(f"three kinds were active only {hostile['share_with_three_kinds']:.0%} of the time")
        if kills is not None:
            problems += [
                f"no {role} worker was killed while {phase}" for role, phase in PHASES if not kills[role, phase]
            ]
    return problems


def _percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100)
    return {"25": cuts[24], "50": cuts[49], "99": cuts[98]}


def _show(report: dict[str, Any], console: Console) -> None:
    healthy = report["healthy"]
    if report["hostile"]:
        table = Table("attack", "attempts", "what became of them")
        for kind, counts in report["hostile"]["outcomes"].items():
            words = ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda pair: -pair[1]))
            table.add_row(kind, str(sum(counts.values())), words)
        console.print(table)
    console.print(f"kills: {report['kills'] or 'none'}")
    console.print(
        f"healthy: {healthy['exact']} answers exact ({healthy['of_these_sampled']} sampled), {len(healthy['wrong'])} "
        f"wrong, errors {dict(healthy['errors']) or 'none'}; slowest gap {healthy['slowest_gap_s']:.2f} s, slowest "
        f"first token {healthy['slowest_first_token_s']:.2f} s; gap percentiles {healthy['gap_percentiles_s']}"
    )
    console.print(f"router at most {report['router_peak_mib']:.0f} MiB")
    for problem in report["problems"]:
        console.print(f"[red]problem:[/red] {problem}")


def main() -> None:
    """Run and exit with 1 on any problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--no-attack", action="store_true", help="healthy clients alone: what to compare with")
    parser.add_argument("--no-kills", action="store_true", help="leave the workers alone")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "stress.json")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    report = asyncio.run(
        run(arguments.minutes, is_attacked=not arguments.no_attack, is_killing=not arguments.no_kills, console=console)
    )
    report |= {"machine": machine(), "command": sys.argv}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    _show(report, console)
    raise SystemExit(bool(report["problems"]))


if __name__ == "__main__":
    main()
